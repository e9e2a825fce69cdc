"""Low-rank decomposition (LRD) of a model's weights without training, arXiv 2405.06626.

    decoder, tokenizer = load_model("smollm2-135m")
    decompose(decoder, preset("lrd-9", decoder.config))     # or LrdPlan(layers=[9, 16], tensors="mlp", rank=8)
    save_decomposed(decoder, "smaller", tokenizer)          # load_model("smaller") reads it
"""

from colora_ms.decomposition.decompose import Decomposed, decompose, recompose
from colora_ms.decomposition.folders import decompose_checkpoint, save_decomposed, write_low_rank_folder
from colora_ms.decomposition.plan import (
    LrdPlan, Piece, break_even, factor_parameters, linear_shapes, place, plan_for, preset, reduction,
)
from colora_ms.decomposition.tucker import Factors, factorise, hooi, reconstruct

__all__ = ["Decomposed", "Factors", "LrdPlan", "Piece", "break_even", "decompose", "decompose_checkpoint",
           "factor_parameters", "factorise", "hooi", "linear_shapes", "place", "plan_for", "preset", "recompose",
           "reconstruct", "reduction", "save_decomposed", "write_low_rank_folder"]
