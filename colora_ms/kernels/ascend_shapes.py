"""What shapes and dtypes the Ascend C operators take, and what they give; the limits are those of the device source.

A dimension of -1 is one that is not known while the graph is compiled: it agrees with any, and the tiling function on
the host checks the sizes of each launch.
"""

from collections.abc import Sequence
from typing import Any

import mindspore as ms

from colora_ms.kernels.shapes import agree, element_type, require, require_dtype, require_shape

MOST_RANKS = 256
MOST_SLICES = 8  # of the outputs of multi_lora
MOST_DOWN_ROWS = 512  # slices x rank
MOST_TOKENS_OF_A_VOCABULARY = 262144
MOST_VOICES = 8  # rows that a request of contrastive_select has
MOST_MIXED_BYTES = 16384  # coefficients of a token in lily_mix, all experts


def _within(size, most):
    return size == -1 or 1 <= size <= most


def _check_down(name, down, columns):
    require(len(down) == 3 and agree(down[2], columns) and _within(down[1], MOST_RANKS), name, "down", down,
            f"(slots, rank, {columns}) with a rank of 1..{MOST_RANKS}")


def _lora_shapes(x, down, up, scale, slots, y, ends):
    name = "MultiLora"
    require(len(x) == 2, name, "x", x, "(tokens, in)")
    require(len(ends) == 1 and _within(ends[0], MOST_SLICES), name, "ends", ends, f"(slices,), 1..{MOST_SLICES}")
    require(len(up) == 3 and _within(up[1], MOST_RANKS), name, "up", up,
            f"(slots, rank, out), rank-major, with a rank of 1..{MOST_RANKS}")
    known = -1 not in (up[1], ends[0])
    rows = ends[0] * up[1] if known else -1
    require(len(down) == 3 and agree(down[0], up[0]) and agree(down[1], rows) and agree(down[2], x[1])
            and _within(down[1], MOST_DOWN_ROWS), name, "down", down,
            f"({up[0]}, {rows if known else 'slices * rank'}, {x[1]}), at most {MOST_DOWN_ROWS} rows")
    require_shape(name, "scale", scale, (up[0], ends[0]))
    require_shape(name, "y", y, (x[0], up[2]))
    require_shape(name, "slots", slots, (x[0],))
    return list(y)


def _shrink_shapes(x, down, scale, slots):
    require(len(x) == 2, "LoraShrink", "x", x, "(tokens, in)")
    _check_down("LoraShrink", down, x[1])
    require_shape("LoraShrink", "scale", scale, (down[0],))
    require_shape("LoraShrink", "slots", slots, (x[0],))
    return [x[0], down[1]]


def _expand_shapes(h, up, slots, y):
    require(len(h) == 2 and _within(h[1], MOST_RANKS), "LoraExpand", "h", h,
            f"(tokens, rank), rank 1..{MOST_RANKS}")
    require(len(up) == 3 and agree(up[1], h[1]), "LoraExpand", "up", up, f"(slots, {h[1]}, out), rank-major")
    require_shape("LoraExpand", "slots", slots, (h[0],))
    require_shape("LoraExpand", "y", y, (h[0], up[2]))
    return list(y)


def _select_shapes(logits, mix_rows, weights, log_alpha):
    name = "ContrastiveSelect"
    require(len(logits) == 2 and _within(logits[1], MOST_TOKENS_OF_A_VOCABULARY), name, "logits", logits,
            f"(rows, vocabulary), at most {MOST_TOKENS_OF_A_VOCABULARY} tokens")
    require(len(mix_rows) == 2 and _within(mix_rows[1], MOST_VOICES), name, "mix_rows", mix_rows,
            f"(requests, voices), at most {MOST_VOICES} voices")
    require_shape(name, "weights", weights, mix_rows)
    require_shape(name, "log_alpha", log_alpha, mix_rows[:1])
    return [mix_rows[0], 3], [mix_rows[0], 2 + mix_rows[1] if mix_rows[1] != -1 else -1]


def _mix_shapes(h, weights, up, scale, slots, y):
    name = "LilyMix"
    require(len(h) == 2 and _within(h[1], MOST_RANKS), name, "h", h, f"(tokens, rank), rank 1..{MOST_RANKS}")
    require(len(weights) == 2 and agree(weights[0], h[0]) and weights[1] != 0, name, "weights", weights,
            f"({h[0]}, experts)")
    require(len(up) == 4 and agree(up[1], weights[1]) and agree(up[2], h[1]), name, "up", up,
            f"(slots, {weights[1]}, {h[1]}, out), rank-major")
    # The kernel refuses by the bytes of its dtype; the larger of the two forms is asked for here.
    most = max(weights[1], 0) * max(-(-h[1] // 8) * 32, -(-h[1] // 16) * 32 + 32)
    require(most <= MOST_MIXED_BYTES, name, "up", up,
            f"fewer experts or ranks: {most} bytes of coefficients a token, at most {MOST_MIXED_BYTES} fit")
    require_shape(name, "scale", scale, (up[0],))
    require_shape(name, "slots", slots, (h[0],))
    require_shape(name, "y", y, (h[0], up[3]))
    return list(y)


#: operator -> function of the inputs' shapes that gives the output's, or raises a KernelError.
SHAPES = {
    "MultiLora": _lora_shapes,
    "LoraShrink": _shrink_shapes,
    "LoraExpand": _expand_shapes,
    "ContrastiveSelect": _select_shapes,
    "LilyMix": _mix_shapes,
}


def output_dtype(name: str, spec: dict[str, list[Any]], given: Sequence[Any]) -> Any:
    """The output's dtype, or a tuple of the outputs', for those of the inputs.

    Args:
        name: the operator. spec: its entry in ``ascend.OPERATORS``, where position k of every list of dtypes is one
            combination. given: the dtypes of its inputs.

    Raises:
        KernelError: they are none of the combinations.
    """
    given = [element_type(one) for one in given]
    typed = next(i for i, (_, types, _) in enumerate(spec["inputs"]) if len(set(types)) > 1)
    known = {"float16": ms.float16, "bfloat16": ms.bfloat16, "float32": ms.float32, "int32": ms.int32,
             "uint8": ms.uint8}
    choices = [known[one] for one in spec["inputs"][typed][1]]
    require_dtype(name, spec["inputs"][typed][0], given[typed], choices)
    k = choices.index(given[typed])
    for (argument, types, _), dtype in zip(spec["inputs"], given):
        require_dtype(name, argument, dtype, (known[types[k]],))
    outputs = tuple(known[types[k]] for _, types in spec["outputs"])
    return outputs if len(outputs) > 1 else outputs[0]
