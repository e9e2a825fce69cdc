"""The families' tiny golden models that have routed experts (tests/goldens/families), as the device step takes them:
Mixtral without its window and with one layer, Qwen3-MoE with heads of 32, which have norms, and two layers."""
import json
import sys
from pathlib import Path

import numpy as np

from colora_ms.models.config import DecoderConfig
from colora_ms.models.decoder import Decoder

GOLDENS = Path(__file__).resolve().parents[1] / "goldens"
sys.path.append(str(GOLDENS))
from family_rules import tensor  # noqa: E402

#: case -> what is changed in its config; {}: the golden logits are those of transformers.
CASES = {"mixtral": {"sliding_window": None, "num_hidden_layers": 1}, "qwen2_moe": {}, "qwen2_moe_norm": {},
         "qwen3_moe": {"head_dim": 32, "num_hidden_layers": 2}}


def opened(case, weight_format="float32", **changes):
    """(decoder, ids, logits of transformers, or None where the config was changed)."""
    with np.load(GOLDENS / "families" / f"{case}.npz") as file:
        about, ids, logits = json.loads(str(file["about"])), file["ids"], file["logits"]
    changes = {**CASES[case], **changes}
    config = DecoderConfig.from_hf({**about["config"], **changes})
    weights = {name: tensor(name, shape) for name, shape in config.parameter_shapes().items()}
    return Decoder(config, weights, weight_format), ids, None if changes else logits
