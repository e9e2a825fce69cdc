"""From a recipe to a table: train, evaluate with several decoders, write what came out.

    settings   the recipe's section ``evaluate``, read strictly; a recipe's whole file
    decoders   what answers the test: base, adapter, adapter with contrasts; one evaluation each
    runner     train once, evaluate once, go on where an earlier call stopped
    report     result.json and table.md
    tour       the quick start; its parts are pace (forecasts), strength (an adapter's copy at another scale), mixed
               (eight requests in one batch) and why (the scores behind a changed token)
    merge_model  a model with adapters merged in, as files; both steps measured (``colora-ms merge``)

``colora-ms run`` and ``colora-ms quickstart`` are made of these. The recipes themselves live in ``model_zoo/``; the
quick start's is copied into ``data/`` of an installed package (setup.py).
"""
