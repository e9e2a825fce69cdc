"""The generation loop as one static graph: prefill, then the token loop inside ``construct``.

Where the device has it and the model's Cells allow it, the token loop is one operator (``kernels.decode_steps``);
elsewhere it is a ``while`` of the graph over the operators of a step. Both make the same tokens.

A *request* is one answer to be generated; it owns one row of the batch, or two when it is contrastive (expert and
amateur, which see the same tokens). What it asks for travels in two tensors with a column for each option (see
:mod:`colora_ms.kernels.options`), ``whole`` (requests, columns) int32 and ``real`` (requests, columns) float32. All
shapes depend on four numbers only (requests, rows, prompt length, steps), so a graph is compiled once for each bucket
of those and reused for every adapter, contrast and sampling setting.
"""

from __future__ import annotations

import mindspore as ms
from mindspore import Tensor, nn, ops

from colora_ms.decoding.finite import finite_rows
from colora_ms.kernels import bind, contrast_strength, contrastive_select, decode_steps
from colora_ms.kernels.options import COLUMN, replaced
from colora_ms.models.cache import KeyValueCache
from colora_ms.models.decoder import Decoder

_EXPERT, _AMATEUR, _BUDGET = COLUMN["expert_rows"], COLUMN["amateur_rows"], COLUMN["budget"]
_BETA = COLUMN["beta"]


class _Loop(nn.Cell):
    """What both graphs share: one selection, and the token loop."""

    def __init__(self, decoder: Decoder, cache: KeyValueCache) -> None:
        super().__init__()
        bind()
        self.decoder = decoder
        self.cache = cache
        self.one = Tensor(1, ms.int32)
        #: 1: logits that are not finite end their request (``decoding.finite``), 0: they are an error.
        self.forgiving = Tensor([1], ms.int32)
        self.fused = decoder.fused

    def set_train(self, mode: bool = True) -> _Loop:
        """As of any Cell; adapters with dropout are part of fused steps in evaluation only."""
        super().set_train(mode)
        self.fused = self.decoder.fused
        return self

    def select(self, logits, options, uniform, active, adapt, previous):
        """Choose a token for every active request, with beta as ``kernels.contrast_strength`` scales it.

        Args:
            logits: (rows, vocab) float32; options: (whole, real); uniform: (requests,) float32.
            active: (requests,) bool.
            adapt: (prompt ids (requests, prompt), their lengths (requests,), ...) int32.
            previous: (requests,) int32, the token generated last, -1: none.

        Returns:
            (ints (requests, 3), floats (requests, 4)) of ``kernels.contrastive_select``.
        """
        whole, real = options
        prompt, lengths = adapt[:2]
        rows = ops.where(active, whole[:, _EXPERT], -self.one)  # (requests,)
        rows = finite_rows(logits, rows, whole[:, _AMATEUR], real[:, _BETA])
        whole = replaced(whole, _EXPERT, rows)  # (requests, columns)
        beta = contrast_strength(logits, whole, real, previous, prompt, lengths)  # (requests,)
        return contrastive_select(logits, whole, replaced(real, _BETA, beta), uniform)

    def ended(self, token, eos):
        """(requests,) bool: whether the token is one of eos (ends,) int32."""
        return ops.equal(token.reshape(-1, 1), eos.reshape(1, -1)).any(axis=1)

    def run(self, state, layout, options, uniforms, eos, steps, adapt):
        """Generate until every request ended or ``steps`` steps were made.

        Args:
            state: (token, position, active): the last token of each request, the position that it takes, and whether
                the request goes on; each (requests,).
            layout: (row_request, slots, cache_rows), each (rows,) int32.
            options: (whole, real); the budget is what each request may still take in this call.
            uniforms: (requests, capacity) float32, a random number a step.
            eos: (ends,) int32.
            steps: scalar int32, at most ``capacity``.
            adapt: (prompt ids (requests, prompt), their lengths (requests,)), each int32, for adaptive contrasts.

        Returns:
            (ints (capacity, requests, 3), floats (capacity, requests, 4), counts (requests,), state).
        """
        if self.fused:
            return self.run_fused(state, layout, options, uniforms, eos, steps, adapt)
        return self.run_steps(state, layout, options, uniforms, eos, steps, adapt)

    def run_fused(self, state, layout, options, uniforms, eos, steps, adapt):
        """:meth:`run` as one operator."""
        token, position, active = state
        _, slots, cache_rows = layout
        prompt, lengths = adapt[:2]
        ints, floats, counts, token, position, active = decode_steps(
            token, position, active.astype(ms.int32), self.previous(token, adapt), slots, cache_rows, *options,
            uniforms, eos, steps.reshape(1), self.forgiving, prompt, lengths, *self.decoder.step_operands(self.cache))
        return ints, floats, counts, (token, position, active > 0)

    def previous(self, token, adapt):
        """(requests,) int32: the token that each request generated last, -1 where it has none."""
        return token

    def run_steps(self, state, layout, options, uniforms, eos, steps, adapt):
        """:meth:`run` as a ``while`` of the graph."""
        token, position, active = state
        row_request, slots, cache_rows = layout
        budget = options[0][:, _BUDGET]  # (requests,)
        requests, capacity = uniforms.shape
        ints = ops.zeros((capacity, requests, 3), ms.int32)
        floats = ops.zeros((capacity, requests, 4), ms.float32)
        index = ops.arange(0, capacity).astype(ms.int32).reshape(-1, 1, 1)  # (capacity, 1, 1)
        counts = ops.zeros_like(token)
        step = steps - steps
        active = ops.logical_and(active, budget > 0)
        while ops.logical_and(step < steps, active.any()):
            length = ops.gather(active.astype(ms.int32), row_request, 0)  # (rows,)
            ids = ops.gather(token, row_request, 0).reshape(-1, 1)  # (rows, 1)
            start = ops.gather(position, row_request, 0)
            logits = self.decoder.step(ids, slots, self.cache, cache_rows, start, length)  # (rows, vocab)
            uniform = ops.gather(uniforms, step, 1)  # (requests,)
            new_ints, new_floats = self.select(logits, options, uniform, active, adapt, self.previous(token, adapt))
            here = ops.equal(index, step)
            ints = ops.where(here, new_ints.expand_dims(0), ints)  # (capacity, requests, 3)
            floats = ops.where(here, new_floats.expand_dims(0), floats)  # (capacity, requests, 4)
            token = ops.where(active, new_ints[:, 0], token)
            taken = active.astype(ms.int32)
            counts = counts + taken
            position = position + taken
            active = ops.logical_and(active, ops.logical_not(self.ended(token, eos)))
            active = ops.logical_and(active, counts < budget)
            step = step + self.one
        return ints, floats, counts, (token, position, active)


class GenerationLoop(_Loop):
    """Prefill of the prompts and the token loop in one graph. The arguments are flat tensors, so that none is a
    constant of the graph."""

    def construct(self, ids: Tensor, lengths: Tensor, row_request: Tensor, slots: Tensor, cache_rows: Tensor,
                  whole: Tensor, real: Tensor, uniforms: Tensor, eos: Tensor, steps: Tensor) -> tuple:
        """Read the prompts, choose the first token from their last logits, then loop.

        Args:
            ids: (requests, prompt) int32, padded at the right.
            lengths: (requests,) int32, tokens of each prompt; 0 marks a request that only fills the bucket.
            row_request: (rows,) int32, the request that each row belongs to.
            slots: (rows,) int32, adapter slots, -1 for the base model.
            cache_rows: (rows,) int32, the row of the cache that each row uses.
            whole, real: (requests, columns) int32 and float32, the requests' options.
            uniforms: (requests, 1 + capacity) float32, a random number a token.
            eos: (ends,) int32.
            steps: scalar int32, tokens to make at most in this call; at most 1 + capacity.

        Returns:
            (first ints (requests, 3), first floats (requests, 4)), then the results of ``run`` for the later tokens.
        """
        layout = (row_request, slots, cache_rows)
        length = ops.gather(lengths, row_request, 0)  # (rows,)
        rows_ids = ops.gather(ids, row_request, 0)  # (rows, prompt)
        start = ops.zeros_like(length)
        logits = self.decoder.step(rows_ids, slots, self.cache, cache_rows, start, length)  # (rows, vocab)
        active = lengths > 0
        adapt = (ids, lengths)
        ints, floats = self.select(logits, (whole, real), uniforms[:, 0], active, adapt,
                                   ops.zeros_like(lengths) - self.one)
        token = ints[:, 0]  # (requests,)
        going = ops.logical_and(active, ops.logical_not(self.ended(token, eos)))
        whole = replaced(whole, _BUDGET, whole[:, _BUDGET] - self.one)
        result = self.run((token, lengths, going), layout, (whole, real), uniforms[:, 1:], eos, steps - self.one, adapt)
        return (ints, floats), result


class ContinueLoop(_Loop):
    """Goes on where a :class:`GenerationLoop` with the same cache stopped: the graph of the later chunks."""

    def construct(self, token: Tensor, position: Tensor, active: Tensor, row_request: Tensor, slots: Tensor,
                  cache_rows: Tensor, whole: Tensor, real: Tensor, uniforms: Tensor, eos: Tensor, steps: Tensor,
                  ids: Tensor, lengths: Tensor) -> tuple:
        """Arguments and results as of :meth:`_Loop.run`, flat; ids, lengths: the prompts."""
        return self.run((token, position, active), (row_request, slots, cache_rows), (whole, real), uniforms, eos,
                        steps,
                        (ids, lengths))
