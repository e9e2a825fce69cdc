"""Data, train step, checkpoints and the training loop for adapters.

    data        examples, templates, token ids, batches
    config      the recipe: every setting with its meaning
    optimizer   AdamW with a schedule, clipping and accumulation, inside the graph
    step        loss, gradients and update as one static graph
    preference  the loss of pairs of a better and a worse answer (DPO); preference_data: their ids and batches
    checkpoint  atomic saving, exact resuming
    trainer     the loop: evaluation, best checkpoint, stopping and resuming
    progress    the bar at the terminal, and Ctrl-C
    run         all of it from a recipe
    callback    adapters and their state in MindSpore's own ``Model.train``
    report      JSON lines and the loss curve

Import the modules that you need; this package imports nothing by itself.
"""
