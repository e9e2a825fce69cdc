"""A flat batch of tokens through a whole model and runs of decoding behind it, as one operator: what a decoding step
is."""

from __future__ import annotations

import mindspore as ms
from mindspore import Tensor

from colora_ms.kernels import bound
from colora_ms.kernels.aot import custom
from colora_ms.kernels.options import DETAILS, MOST_TOP, SELECTION
from colora_ms.kernels.registry import operation
from colora_ms.kernels.select import check_option_shapes
from colora_ms.kernels.shapes import element_type, require, require_dtype, require_shape

_NAME = "step"

#: Inputs, in order; ops/cpu/operands.h has the same.
ARGUMENTS = ("table", "tokens", "rows", "positions", "counts", "slots", "strengths", "tables", "copies", "previous",
             *SELECTION, "uniforms", "eos", "extras")

#: What a request may bring beside its options, of any length: entries of the table that ``extras`` names, these for the
#: first request, then for the second, ...; ops/cpu/operands.h has the same.
EXTRAS = ("prompt", "entries", "bias", "mask")

_REAL = ("strengths", "real", "mix_weights", "uniforms")
_HANDLES = ("table", "extras")


def fuses_step() -> bool:
    """Whether this device has the operator; elsewhere a step is a graph of the operators of its parts."""
    return bound.fuses_step


def step(table: Tensor, tokens: Tensor, rows: Tensor, positions: Tensor, counts: Tensor, slots: Tensor,
         strengths: Tensor, tables: Tensor, copies: Tensor, previous: Tensor, whole: Tensor, real: Tensor,
         mix_rows: Tensor, mix_weights: Tensor, uniforms: Tensor, eos: Tensor, extras: Tensor) -> tuple[Tensor, ...]:
    """Take a flat batch of tokens, choose a token for the requests that ask for one, and go on with those.

    Semantics, each line the operators of that name to the last bit. First the copies of blocks; then, in iteration 0,
    for every token t of the batch, with row r = rows[t] at positions[t] and slot slots[r]::

        x, residual = the layers of the model over embedding(tokens), with paged_attention(..., rows, positions, tables)
        logits[r] = multi_lora_linear(rms_norm_residual(x, residual)[0], lm_head)        at the last token of row r
        logits = adjust_logits(logits, whole, real, mix_rows, mix_weights, entries, bias, mask)
        beta' = contrast_strength(logits, whole, real, mix_rows, mix_weights, previous, prompt)
        ints, floats = contrastive_select(logits, whole, real with beta', mix_rows, mix_weights, uniforms[:, iteration])
        tops, details = token_details(logits, whole, real with beta', mix_rows, mix_weights, ints[:, 0])

    A following iteration takes, for every request that goes on, its new token in each of its rows, at the row's next
    position; the tokens that a request takes are counted for its penalties and ``min_tokens``. A request ends at a
    token of eos, when its budget is used up, or when its logits are not finite (then with results of zeros). Only what
    is read is computed: of rows behind a leading one the logits of its cut, but for the divergence, a mean of
    probabilities and ``voices``.

    Args:
        table: (2,) int64, handle of the :class:`colora_ms.kernels.weight_table.WeightTable` of the model
            (``Decoder.step_operands``).
        tokens, rows, positions: (T,) int32, the flat batch; tokens of one row stand together, their positions ascend by
            one.
        counts: (3,) int32: tokens in use, copies in use, iterations (at most ``capacity``).
        slots: (R,) int32, adapter slot of each row, -1 for none; strengths: (R,) float32, factors on the adapters'
            scales.
        tables: (R, blocks of a row) int32, see :func:`colora_ms.kernels.paged_attention`.
        copies: (C, 2) int32, blocks (source, target), copied one after another before anything else.
        previous: (Q,) int32, the token that each request generated last, -1: none.
        whole, real, mix_rows, mix_weights: the requests' options (:mod:`colora_ms.kernels.options`); no rows: the
            request takes no token now. The rows of the others have tokens in the batch, and blocks for what may come.
        uniforms: (Q, capacity) float32, a random number an iteration.
        eos: (ends,) int32.
        extras: (2,) int64, handle of an :class:`colora_ms.kernels.weight_table.ArrayTable` of ``EXTRAS``; (0, 0): none.
            Of each request: its prompt (tokens,) int32 where a contrast looks at it; its entries (n, 3) int32 with a
                bias
            (n,) float32 each, and its mask (words,) int32, see :mod:`colora_ms.kernels.options`.

    Returns:
        ints (capacity, Q, 3) int32 and floats (capacity, Q, 4) float32, the results of ``contrastive_select`` for every
        iteration, 0 where a request took no token; taken (Q,) int32; tops (capacity, Q, 20) int32 and details
        (capacity, Q, 29) float32, the results of ``token_details``.

    Raises:
        KernelError: a shape or dtype is wrong, or the device has no such operator.
        RuntimeError: a value is out of its range, a block is missing, or written by one row and used by another, or a
            handle is stale. Then nothing was written.

    Gradients: none.
    """
    return bound.step(table, tokens, rows, positions, counts, slots, strengths, tables, copies, previous, whole, real,
                      mix_rows, mix_weights, uniforms, eos, extras)


def _shapes(*shapes):
    require(len(shapes) == len(ARGUMENTS), _NAME, "number of operands", len(shapes), len(ARGUMENTS))
    named = dict(zip(ARGUMENTS, shapes))
    requests = check_option_shapes(_NAME, *(named[name] for name in SELECTION))
    for name in _HANDLES:
        require_shape(_NAME, name, named[name], (2,))
    require(len(named["tokens"]) == 1, _NAME, "tokens", named["tokens"], "(tokens,)")
    for name in ("rows", "positions"):
        require_shape(_NAME, name, named[name], named["tokens"])
    require_shape(_NAME, "counts", named["counts"], (3,))
    require(len(named["slots"]) == 1, _NAME, "slots", named["slots"], "(rows,)")
    rows = named["slots"][0]
    require_shape(_NAME, "strengths", named["strengths"], (rows,))
    require(len(named["tables"]) == 2 and named["tables"][0] == rows, _NAME, "tables", named["tables"],
            f"({rows}, blocks of a row)")
    require(len(named["copies"]) == 2 and named["copies"][1] == 2, _NAME, "copies", named["copies"], "(copies, 2)")
    require_shape(_NAME, "previous", named["previous"], (requests,))
    require(len(named["uniforms"]) == 2 and named["uniforms"][0] == requests, _NAME, "uniforms", named["uniforms"],
            f"({requests}, capacity)")
    require(len(named["eos"]) == 1, _NAME, "eos", named["eos"], "(ends,)")
    capacity = named["uniforms"][1]
    return [capacity, requests, 3], [capacity, requests, 4], [requests], [capacity, requests, MOST_TOP], \
        [capacity, requests, DETAILS]


def _dtypes(*dtypes):
    for name, kind in zip(ARGUMENTS, dtypes):
        wanted = ms.float32 if name in _REAL else ms.int64 if name in _HANDLES else ms.int32
        require_dtype(_NAME, name, element_type(kind), (wanted,))
    return ms.int32, ms.float32, ms.int32, ms.int32, ms.float32


operation(_NAME, cpu=lambda: custom(_NAME, _shapes, _dtypes))
# With device sources for a part of a layer, emulated or not, a step is not one operator.
operation("fuses_step", reference=lambda: False, cpu=lambda: True, emulator=lambda: False, ascend=lambda: False)
