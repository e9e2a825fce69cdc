"""Measuring a model: exact match, multiple choice, perplexity, and the statistics of a comparison.

    scoring       is this answer right? numbers as in GSM8K, exact match after normalisation
    numbers       the number that a worked solution gives as its answer, exactly
    significance  Wilson interval, exact McNemar test, test of the best of many
    shots         worked examples in front of a question, never the question's own
    evaluate      run a generator over examples, item by item into JSON lines, resumable
    item_log      the JSON lines of a run and its summary
    tuning        contrasts against greedy decoding of the same adapter; choosing one, or none
    likelihood    perplexity with a stride, multiple choice by log-likelihood
    benchmarks    loaders of GSM8K, the commonsense sets and WikiText; few-shot prompts; their runs
    decoder_scorer  the decoder as the model behind likelihood

What is measured comes in through small protocols, which ``interfaces`` names; nothing here imports training.
"""
