"""Measuring a model: exact match, multiple choice, perplexity, and the statistics of a comparison.

    scoring       is this answer right? numbers as in GSM8K, exact match after normalisation
    significance  Wilson interval, exact McNemar test
    evaluate      run a generator over examples, item by item into JSON lines, resumable
    likelihood    perplexity with a stride, multiple choice by log-likelihood
    decoder_scorer  the decoder as the model behind likelihood

What is measured comes in through small protocols; nothing here imports training or models.
"""
