"""The processes of one job under msrun: workers, and the shards of a split model."""
