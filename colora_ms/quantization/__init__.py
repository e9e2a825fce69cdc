"""LR-QAT (arXiv 2406.06385): low-rank adapters inside the quantiser, the grids of their integers, and the export.

    quantized = quantize(decoder, LrQatConfig(r=8, bits=4))     # train quantized.trainable_params()
    quantized.export("smaller", tokenizer_source)               # an integer model that load_model reads
"""
