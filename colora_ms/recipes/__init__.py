"""From a recipe to a table: train, evaluate with several decoders, write what came out.

    settings   the recipe's section ``evaluate``, read strictly; a recipe's whole file
    decoders   what answers the test: base, adapter, adapter with contrasts; one evaluation each
    runner     train once, evaluate once, go on where an earlier call stopped
    report     result.json and table.md
    merge_model  a model with adapters merged in, as files; both steps measured (``colora-ms merge``)

``colora-ms run`` and ``colora-ms quickstart`` are made of these.
"""
