"""The processes of one job under msrun: workers, the shards of a split model, and the training of its adapters."""
