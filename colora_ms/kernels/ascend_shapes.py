"""What shapes the Ascend C operators take, and what they give; the limits are those of the device source."""

from colora_ms.kernels.shapes import require, require_shape

MOST_RANKS = 256
MOST_TOKENS_OF_A_VOCABULARY = 262144
MOST_MIXED_BYTES = 16384  # coefficients of a token in lily_mix, all experts


def _check_down(name, down, columns):
    require(len(down) == 3 and down[2] == columns and 1 <= down[1] <= MOST_RANKS, name, "down", down,
            f"(slots, rank, {columns}) with a rank of 1..{MOST_RANKS}")


def _lora_shapes(name, x, down, up, scale, slots, y, starts=None):
    require(len(x) == 2, name, "x", x, "(tokens, in)")
    _check_down(name, down, x[1])
    require(len(up) == 3 and list(up[:2]) == list(down[:2]), name, "up", up, f"({down[0]}, {down[1]}, out), rank-major")
    require_shape(name, "scale", scale, (down[0],))
    require(len(y) == 2 and y[0] == x[0] and y[1] >= up[2], name, "y", y, f"({x[0]}, at least {up[2]})")
    if starts is None:
        require_shape(name, "slots", slots, (x[0],))
    else:
        require(len(slots) == 1, name, "slots", slots, "(segments,)")
        require_shape(name, "starts", starts, (slots[0] + 1,))
    return list(y)


def _shrink_shapes(x, down, scale, slots):
    require(len(x) == 2, "LoraShrink", "x", x, "(tokens, in)")
    _check_down("LoraShrink", down, x[1])
    require_shape("LoraShrink", "scale", scale, (down[0],))
    require_shape("LoraShrink", "slots", slots, (x[0],))
    return [x[0], down[1]]


def _expand_shapes(h, up, slots, y):
    require(len(h) == 2 and 1 <= h[1] <= MOST_RANKS, "LoraExpand", "h", h, f"(tokens, rank), rank 1..{MOST_RANKS}")
    require(len(up) == 3 and up[1] == h[1], "LoraExpand", "up", up, f"(slots, {h[1]}, out), rank-major")
    require_shape("LoraExpand", "slots", slots, (h[0],))
    require(len(y) == 2 and y[0] == h[0] and y[1] >= up[2], "LoraExpand", "y", y, f"({h[0]}, at least {up[2]})")
    return list(y)


def _select_shapes(expert, amateur, log_alpha, beta, mask):
    name = "ContrastiveSelect"
    require(len(expert) == 2 and 1 <= expert[1] <= MOST_TOKENS_OF_A_VOCABULARY, name, "expert", expert,
            f"(requests, vocabulary), at most {MOST_TOKENS_OF_A_VOCABULARY} tokens")
    require_shape(name, "amateur", amateur, expert)
    require_shape(name, "log_alpha", log_alpha, expert[:1])
    require_shape(name, "beta", beta, expert[:1])
    require(list(mask) == [1] or (len(mask) == 2 and mask[1] == expert[1] and mask[0] in (1, expert[0])), name, "mask",
            mask,
            f"(1,) for none, (1, {expert[1]}) or {tuple(expert)}")
    return [expert[0]]


def _w4_shapes(x, weight, weight_scale, down, up, scale, slots):
    name = "W4Lora"
    require(len(x) == 2, name, "x", x, "(tokens, in)")
    require(len(weight) == 2 and weight[1] * 2 == x[1], name, "weight", weight,
            f"(out, {x[1] / 2:g}), two values a byte")
    out = weight[0]
    require(len(weight_scale) in (1, 2) and weight_scale[0] == out, name, "weight_scale", weight_scale,
            f"({out},) or ({out}, groups)")
    groups = weight_scale[1] if len(weight_scale) == 2 else 1
    require(groups == 1 or (groups > 1 and x[1] % (8 * groups) == 0), name, "weight_scale", weight_scale,
            f"one scale a row, or groups of a multiple of 8 columns that divide {x[1]}")
    _check_down(name, down, x[1])
    require(list(up) == [down[0], down[1], out], name, "up", up, f"({down[0]}, {down[1]}, {out}), rank-major")
    require_shape(name, "scale", scale, (down[0],))
    require_shape(name, "slots", slots, (x[0],))
    return [x[0], out]


def _mix_shapes(h, weights, up, scale, slots, y):
    name = "LilyMix"
    require(len(h) == 2 and 1 <= h[1] <= MOST_RANKS, name, "h", h, f"(tokens, rank), rank 1..{MOST_RANKS}")
    require(len(weights) == 2 and weights[0] == h[0] and weights[1] >= 1, name, "weights", weights,
            f"({h[0]}, experts)")
    require(len(up) == 4 and up[1] == weights[1] and up[2] == h[1], name, "up", up,
            f"(slots, {weights[1]}, {h[1]}, out), rank-major")
    # The kernel refuses by the bytes of its dtype; the larger of the two forms is asked for here.
    most = weights[1] * max(-(-h[1] // 8) * 32, -(-h[1] // 16) * 32 + 32)
    require(most <= MOST_MIXED_BYTES, name, "up", up,
            f"fewer experts or ranks: {most} bytes of coefficients a token, at most {MOST_MIXED_BYTES} fit")
    require_shape(name, "scale", scale, (up[0],))
    require_shape(name, "slots", slots, (h[0],))
    require(len(y) == 2 and y[0] == h[0] and y[1] >= up[3], name, "y", y, f"({h[0]}, at least {up[3]})")
    return list(y)


#: operator -> function of the inputs' shapes that gives the output's, or raises a KernelError.
SHAPES = {
    "MultiLora": lambda x, down, up, scale, slots, y: _lora_shapes("MultiLora", x, down, up, scale, slots, y),
    "MultiLoraSegments": lambda x, down, up, scale, starts, slots, y: _lora_shapes(
        "MultiLoraSegments", x, down, up, scale, slots, y, starts),
    "LoraShrink": _shrink_shapes,
    "LoraExpand": _expand_shapes,
    "ContrastiveSelect": _select_shapes,
    "W4Lora": _w4_shapes,
    "LilyMix": _mix_shapes,
}
