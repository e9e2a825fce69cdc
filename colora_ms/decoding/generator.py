"""Text in, text out: ``Generator`` makes requests of prompts and drives the core until all are answered."""

from __future__ import annotations

import threading
from collections import deque
from typing import Any, Callable, Dict, Iterable, List, Optional, Sequence, Tuple

import numpy as np

from colora_ms import runtime
from colora_ms.decoding.completion import Completion
from colora_ms.decoding.core import Core, cache_blocks
from colora_ms.decoding.options import PER_PROMPT, Options
from colora_ms.decoding.prompt import encode_prompt, ending_ids
from colora_ms.decoding.request import Limits, Request, Running, refuse_strengths, row_key
from colora_ms.decoding.step import bucket
from colora_ms.decoding.values import shown
from colora_ms.errors import DecodingError
from colora_ms.models.device_form import cache_form
from colora_ms.models.replacing import replacements

#: Tokens of prompts in a call in which other requests make tokens; nobody waits for these one by one.
_BUDGET = 240

#: Rows and tokens of a call at most.
_MOST = 4096

#: Positions that each row of a cache has at least, where its size is not given.
_SHORTEST = 256


class Generator:
    """Generates text with a decoder, its adapters, and a contrast between them and the base model.

    Args:
        decoder: :class:`colora_ms.models.decoder.Decoder`.
        tokenizer: :class:`colora_ms.models.tokenizer.Tokenizer`.
        adapters: the handle that :func:`colora_ms.adapters.inject` or ``load_adapter`` returned, or None.
        max_rows: rows that are computed side by side (a contrastive request takes two).
        chunk: tokens a graph call makes at most.
        cache_dtype: ``mindspore.float32``, ``bfloat16`` or ``int8`` for keys and values; None: the device's own, on a
            CPU float32.
        cache_bytes: memory for keys and values; None: what the prompts and answers of ``max_rows`` rows need, so that
            it grows where they do.
    """

    def __init__(self, decoder: Any, tokenizer: Any, adapters: Any = None, max_rows: int = 16, chunk: int = 16,
                 cache_dtype: Any = None, cache_bytes: Optional[int] = None) -> None:
        for label, value, least in (("max_rows", max_rows, 2), ("chunk", chunk, 1)):
            if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= _MOST:
                raise DecodingError(f"{label}={shown(value)} is not a whole number of {least} to {_MOST}"
                                    + (" (a contrastive request takes two rows)" if label == "max_rows" else ""))
        runtime.configure(inference=True)
        self.decoder = decoder
        self.tokenizer = tokenizer
        self.adapters = adapters
        self.max_rows = max_rows
        self.chunk = chunk
        self.cache_dtype = cache_dtype
        self._blocks = None if cache_bytes is None else cache_blocks(decoder, cache_bytes, 0, cache_dtype)
        self._core: Optional[Core] = None
        self._form = cache_form(decoder)
        self._replacements = 0
        self._one = threading.RLock()  # one call at a time; a listener may make another one
        #: Graphs of the decoders that leave the graph at every token; see ``colora_ms.decoding.stepwise``.
        self.steppers: Dict[Any, Any] = {}
        decoder.set_train(False)

    @classmethod
    def from_pretrained(cls, model: str = "smollm2-135m", adapters: Optional[Dict[str, Any]] = None,
                        weight_format: str = "auto", adapter_format: str = "float32", **options: Any) -> Generator:
        """Load a model, its tokenizer and named adapters.

        Args:
            model: a known name or the path of a folder or file (see ``colora_ms.models.load_model``).
            adapters: mapping of adapter names to PEFT folders, or None. Where one brings tokens that the model lacks,
                the tokenizer in its folder is used.
            weight_format: "auto" (as the file has each weight), or as for :func:`colora_ms.load_model`.
            adapter_format: "float32" or "bfloat16", see :func:`colora_ms.adapters.inject`.
            options: passed to the constructor.
        """
        from colora_ms.adapters import load_adapters
        from colora_ms.adapters.vocabulary import tokenizer_for
        from colora_ms.models import load_model

        runtime.configure(inference=True)  # before the model's tensors

        decoder, tokenizer = load_model(model, weight_format=weight_format)
        handle = load_adapters(decoder, adapters, adapter_format=adapter_format) if adapters else None
        if handle is not None and adapters:
            tokenizer = tokenizer_for(tokenizer, adapters, handle)
        return cls(decoder, tokenizer, handle, **options)

    @property
    def max_length(self) -> int:
        """Tokens that a prompt and its answer may have together."""
        return min(self.decoder.max_positions, self.decoder.config.max_position_embeddings)

    @property
    def eos_token_ids(self) -> Tuple[int, ...]:
        """Ids that end an answer: the model config's and the tokenizer's."""
        return ending_ids(self.decoder, self.tokenizer)

    def generate(self, prompts: Any, adapter: Any = None, on_text: Optional[Callable[[int, str], None]] = None,
                 **options: Any) -> List[Completion]:
        """Answer prompts.

        Args:
            prompts: one prompt or a list; a prompt is a string, a list of token ids, or a list of chat messages
                (``{"role": …, "content": …}``), which go through the tokenizer's chat template.
            adapter: name of the adapter, None for the base model, or a list with one entry a prompt.
            on_text: called with (index of the prompt, new text) after every call of the graph.
            options: ``contrast``, ``mix``, ``sampling``, ``max_new_tokens``, ``stop``, ``records``, ``logprobs`` …: the
                attributes of :class:`colora_ms.decoding.options.Options`, but ``priority`` and ``timeout``. Those of
                ``options.PER_PROMPT`` may be a list with one entry a prompt.

        Returns:
            list of :class:`Completion`, in the order of the prompts.

        Raises:
            DecodingError: empty prompt, prompt longer than the context, contrast without an adapter, an option that
                cannot be used.
            AdapterError: unknown adapter, or one that makes the logits of a prompt infinite or not a number.
            CheckpointError: so do the base model's weights.
        """
        with self._one:
            return self._generate(prompts, adapter, on_text, options)

    def _generate(self, prompts: Any, adapter: Any, on_text: Optional[Callable[[int, str], None]],
                  options: Dict[str, Any]) -> List[Completion]:
        eos = self.eos_token_ids
        jobs = self._requests(prompts, adapter, options, eos)
        if not jobs:
            return []
        core = self._reserve(jobs)
        core.eos = eos
        core.clear()  # weights and adapters may have changed since the last call
        core.graph.reread()
        places = {id(job): place for place, job in enumerate(jobs)}
        waiting = deque(jobs)
        try:
            while waiting or core.busy:
                while waiting and core.fits(waiting[0]):
                    core.add(waiting.popleft())
                for outcome in core.step(waiting=bool(waiting)):
                    if outcome.error is not None:
                        raise outcome.error
                    text = outcome.job.answer.news()[0] if on_text is not None else ""
                    if on_text is not None and text:
                        on_text(places[id(outcome.job)], text)
        finally:
            for job in core.jobs:
                core.remove(job)
        return [job.answer.completion(len(job.request.ids), job.request.adapter) for job in jobs]

    def _reserve(self, jobs: Sequence[Running]) -> Core:
        """The core, with a cache for these; a larger one replaces the present one."""
        blocks = self._blocks or self._wanted(jobs)
        if self._core is not None and self._replacements != replacements() and self._form != cache_form(self.decoder):
            self._core = None  # what the model has become is kept in another form
        if self._core is None or self._core.pool.blocks < blocks:
            same = self._core is not None and self._replacements == replacements()
            graph = self._core.graph if self._core is not None and same else None
            self._core = None  # its cache goes first
            self._form = cache_form(self.decoder)
            self.decoder.set_train(False)
            self._core = Core.of(self.decoder, blocks, self.cache_dtype, self.max_rows, self.chunk, _BUDGET,
                                 self.max_length, self.eos_token_ids, graph)
            self._replacements = replacements()
        elif self._replacements != replacements():
            self._core.graph.renew()
            self._replacements = replacements()
        return self._core

    def _wanted(self, jobs: Sequence[Running]) -> int:
        """Blocks for the rows that may be computed side by side, the longest ones, and not too few."""
        least = min(_SHORTEST, self.max_length)
        rows = sorted((max(least, len(job.prompt(number)) + job.left) for job in jobs
                       for number in range(len(job.keys))), reverse=True)
        return bucket(sum(-(-length // self._form.block) for length in rows[:self.max_rows]))

    def _requests(self, prompts: Any, adapter: Any, options: Dict[str, Any], eos: Iterable[int]) -> List[Running]:
        if not hasattr(prompts, "__len__") or isinstance(prompts, (bytes, dict)):
            raise DecodingError(f"prompts={shown(prompts)} is neither a prompt nor a list of prompts")
        single = isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], (int, np.integer, dict)))
        prompts = [prompts] if single else list(prompts)
        columns = {"adapter": adapter, **{name: value for name, value in options.items() if name in PER_PROMPT}}
        for name, value in columns.items():
            names = name == "adapter" and isinstance(value, np.ndarray) and value.ndim
            many = names or isinstance(value, (list, tuple))
            columns[name] = list(value) if many else [value] * len(prompts)
            if len(columns[name]) != len(prompts):
                raise DecodingError(f"{name} has {len(columns[name])} entries for {len(prompts)} prompts")
        if not prompts:  # the options are checked all the same
            Options.asked(engine=False, **{name: value for name, value in options.items() if name not in PER_PROMPT})
        return [self._request(place, prompt, {**options, **{name: one[place] for name, one in columns.items()}}, eos)
                for place, prompt in enumerate(prompts)]

    def _request(self, index: int, prompt: Any, wanted: Dict[str, Any], eos: Iterable[int]) -> Running:
        adapter = wanted.pop("adapter")
        options = Options.asked(engine=False, **wanted)
        merged = getattr(self.adapters, "merged", None)
        if merged is not None and (options.mixture is not None or adapter != merged):
            raise DecodingError(f"adapter {merged!r} is merged into the base weights, so neither the base model, "
                                "another adapter nor a contrast can be decoded now; call unmerge() first")
        changed = getattr(self.adapters, "changed_base", None)
        if changed is not None and (options.mixture is not None or adapter is None):
            raise DecodingError(f"adapter {changed!r} started from the base weights and changed them, so the base "
                                "model cannot be decoded now; save it with as_lora=True and load that into an "
                                "untouched model")
        limits = Limits(self.decoder.config.vocab_size, self.max_length, hint="" if self._blocks is None else
                        "; with a larger cache_bytes it may hold more", blocks=self._blocks, block=self._form.block)
        request = Request.of(self.tokenizer, prompt, adapter, options, limits, f"prompt {index}")
        if len(request.rows) > self.max_rows:
            raise DecodingError(f"prompt {index} takes {len(request.rows)} rows, this generator has "
                                f"max_rows={self.max_rows}")
        if not self.decoder.fused_step:
            refuse_strengths(request.rows)
        slots = [self._slot(row.adapter) for row in request.rows]
        keys = [row_key("" if slot < 0 else f"slot {slot}", row) for slot, row in zip(slots, request.rows)]
        return Running(request, self.tokenizer, eos, slots, keys)

    def _slot(self, adapter: Optional[str]) -> int:
        if adapter is None or adapter == getattr(self.adapters, "merged", None):
            return -1
        if self.adapters is None:
            raise DecodingError(f"adapter {adapter!r} was asked for, but this generator has no adapters")
        return self.adapters.slot(adapter)

    def encode(self, prompt: Any) -> List[int]:
        """Token ids of a prompt: a string, ids, or chat messages."""
        return encode_prompt(self.tokenizer, prompt)
