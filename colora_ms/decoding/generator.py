"""Text in, text out: ``Generator`` plans requests into batches, runs the graphs and decodes their ids."""

from __future__ import annotations

from typing import Any, Callable, Dict, Iterable, Iterator, List, Optional, Sequence, Tuple

import numpy as np

import mindspore as ms
from mindspore import Tensor

from colora_ms import runtime
from colora_ms.decoding.batch import Batch
from colora_ms.decoding.completion import Completion
from colora_ms.decoding.loop import ContinueLoop, GenerationLoop
from colora_ms.decoding.options import PER_PROMPT, Options
from colora_ms.decoding.prompt import encode_prompt, ending_ids
from colora_ms.decoding.request import Limits, Request, Running
from colora_ms.decoding.values import shown
from colora_ms.errors import DecodingError
from colora_ms.models.cache import KeyValueCache

_BUCKETS = sorted({n * 2**k for n in (4, 6) for k in range(2, 14)})


def bucket(size: int, smallest: int = 16) -> int:
    """The smallest static size that holds ``size``: 16, 24, 32, 48, 64, 96, ..."""
    return next(b for b in _BUCKETS if b >= max(size, smallest))


def row_bucket(rows: int) -> int:
    """The smallest static number of rows that holds ``rows``: a power of two."""
    return 1 << max(rows - 1, 0).bit_length()


class Generator:
    """Generates text with a decoder, its adapters, and a contrast between them and the base model.

    Args:
        decoder: :class:`colora_ms.models.decoder.Decoder`.
        tokenizer: :class:`colora_ms.models.tokenizer.Tokenizer`.
        adapters: the handle that :func:`colora_ms.adapters.inject` or ``load_adapter`` returned, or None.
        max_rows: rows that one batch may have (a contrastive request takes two).
        chunk: tokens a graph call makes at most when text is streamed or stop strings are watched.
        cache_dtype: ``mindspore.float32`` or ``mindspore.bfloat16`` for keys and values.
    """

    def __init__(self, decoder: Any, tokenizer: Any, adapters: Any = None, max_rows: int = 16, chunk: int = 16,
                 cache_dtype: Any = ms.float32) -> None:
        if max_rows < 2:
            raise DecodingError(f"max_rows={max_rows} leaves no room for a contrastive request, which takes two rows")
        runtime.configure()
        self.decoder = decoder
        self.tokenizer = tokenizer
        self.adapters = adapters
        self.max_rows = max_rows
        self.chunk = chunk
        self.cache_dtype = cache_dtype
        self.cache: Any = None
        self._first: Any = None
        self._later: Any = None
        #: Graphs of the decoders that leave the graph at every token; see ``colora_ms.decoding.stepwise``.
        self.steppers = {}
        decoder.set_train(False)

    @classmethod
    def from_pretrained(cls, model: str = "smollm2-135m", adapters: Optional[Dict[str, Any]] = None,
                        weight_format: str = "float32", adapter_format: str = "float32", **options: Any) -> Generator:
        """Load a model, its tokenizer and named adapters.

        Args:
            model: a known name or the path of a folder or file (see ``colora_ms.models.load_model``).
            adapters: mapping of adapter names to PEFT folders, or None. Where one brings tokens that the model lacks,
                the tokenizer in its folder is used.
            weight_format: "float32", "bfloat16", "int8" or "int4".
            adapter_format: "float32" or "bfloat16", see :func:`colora_ms.adapters.inject`.
            options: passed to the constructor.
        """
        from colora_ms.adapters import load_adapters
        from colora_ms.adapters.vocabulary import tokenizer_for
        from colora_ms.models import load_model

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
            on_text: called with (index of the prompt, new text) after every chunk.
            options: ``contrast``, ``sampling``, ``max_new_tokens``, ``stop``, ``stop_token_ids``, ``seed``,
                ``records``, ``ignore_eos``: the attributes of :class:`colora_ms.decoding.options.Options`. The first
                three may be a list with one entry a prompt.

        Returns:
            list of :class:`Completion`, in the order of the prompts.

        Raises:
            DecodingError: empty prompt, prompt longer than the context, contrast without an adapter, an option that
                cannot be used.
            AdapterError: unknown adapter, or one that makes the logits of a prompt infinite or not a number.
            CheckpointError: so do the base model's weights.
        """
        eos = self.eos_token_ids
        requests = self._requests(prompts, adapter, options, eos)
        ending = () if options.get("ignore_eos") else eos
        watched = on_text is not None or any(one.request.options.stop or one.request.options.stop_token_ids
                                             for one in requests)
        order = sorted(range(len(requests)), key=lambda i: len(requests[i].request.ids))
        for batch in self._batches([(i, requests[i]) for i in order]):
            try:
                self._run(batch, ending, watched, on_text)
            except RuntimeError:
                # MindSpore does not run a graph again after one of its operators has failed.
                self._first = self._later = self.cache = None
                raise
        return [one.answer.completion(len(one.request.ids), one.request.adapter) for one in requests]

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
        if merged is not None and (options.contrast is not None or adapter != merged):
            raise DecodingError(f"adapter {merged!r} is merged into the base weights, so neither the base model, "
                                "another adapter nor a contrast can be decoded now; call unmerge() first")
        changed = getattr(self.adapters, "changed_base", None)
        if changed is not None and (options.contrast is not None or adapter is None):
            raise DecodingError(f"adapter {changed!r} started from the base weights and changed them, so the base "
                                "model cannot be decoded now; save it with as_lora=True and load that into an "
                                "untouched model")
        limits = Limits(self.decoder.config.vocab_size, self.max_length)
        request = Request.of(self.tokenizer, prompt, adapter, options, limits, f"prompt {index}")
        return Running(request, self.tokenizer, eos, [self._slot(row.adapter) for row in request.rows])

    def _slot(self, adapter: Optional[str]) -> int:
        if adapter is None or adapter == getattr(self.adapters, "merged", None):
            return -1
        if self.adapters is None:
            raise DecodingError(f"adapter {adapter!r} was asked for, but this generator has no adapters")
        return self.adapters.slot(adapter)

    def encode(self, prompt: Any) -> List[int]:
        """Token ids of a prompt: a string, ids, or chat messages."""
        return encode_prompt(self.tokenizer, prompt)

    def _batches(self, indexed: List[Tuple[int, Running]]) -> Iterator[List[Tuple[int, Running]]]:
        batch: List[Tuple[int, Running]] = []
        rows = 0
        for index, one in indexed:
            if batch and rows + len(one.request.rows) > self.max_rows:
                yield batch
                batch, rows = [], 0
            batch.append((index, one))
            rows += len(one.request.rows)
        if batch:
            yield batch

    def _reserve(self, rows: int, length: int) -> None:
        """A cache of at least this size; a larger one replaces the present one and its graphs."""
        if self.cache is not None and self.cache.rows >= rows and self.cache.max_length >= length:
            return
        if self.cache is not None:
            rows, length = max(rows, self.cache.rows), max(length, self.cache.max_length)
        self._first = self._later = self.cache = None
        length = min(max(256, 1 << (length - 1).bit_length()), self.max_length)
        self.cache = KeyValueCache(self.decoder.config, rows, length, self.cache_dtype)
        self._first = GenerationLoop(self.decoder, self.cache).set_train(False)
        self._later = ContinueLoop(self.decoder, self.cache).set_train(False)

    def _run(self, indexed: List[Tuple[int, Running]], eos: Iterable[int], watched: bool, on_text: Any) -> None:
        requests = [one for _, one in indexed]
        size = row_bucket(len(requests))
        behind = sum(len(one.request.rows) - 1 for one in requests)
        rows = size + (row_bucket(behind) if behind else 0)
        self._reserve(rows, max(len(one.request.ids) + one.left for one in requests))
        batch = Batch(requests, size, rows, size, eos)
        capacity = self.chunk if watched else bucket(max(one.left for one in requests))
        width = min(bucket(max(len(one.request.ids) for one in requests)), self.cache.max_length)
        prompt = batch.prompts(width)
        (ints, floats), (later_ints, later_floats, counts, state) = runtime.run(
            self._first, *prompt, *batch.layout, *batch.options(), batch.uniforms(1 + capacity), batch.eos,
            Tensor(1 + capacity, ms.int32))
        _take(requests, ints.asnumpy()[None], floats.asnumpy()[None], np.ones(size, np.int32))
        _take(requests, later_ints.asnumpy(), later_floats.asnumpy(), counts.asnumpy())
        while (active := self._going(indexed, state[2].asnumpy(), on_text)).any():
            state = (state[0], state[1], batch.array(active.tolist(), False, bool))
            ints, floats, counts, state = runtime.run(
                self._later, *state, *batch.layout, *batch.options(), batch.uniforms(capacity), batch.eos,
                Tensor(capacity, ms.int32), *prompt)
            _take(requests, ints.asnumpy(), floats.asnumpy(), counts.asnumpy())

    def _going(self, indexed: List[Tuple[int, Running]], active: np.ndarray, on_text: Any) -> np.ndarray:
        """Report new text; returns which requests go on."""
        for index, one in indexed if on_text is not None else ():
            text = one.answer.news()[0]
            if text:
                on_text(index, text)
        return np.array([one.answer.finish_reason is None for _, one in indexed]) & active[:len(indexed)].astype(bool)


def _take(requests: Sequence[Running], ints: np.ndarray, floats: np.ndarray, counts: np.ndarray) -> None:
    """Give the first ``counts[i]`` steps of (steps, requests, 3 or 4) arrays to the requests."""
    for place, one in enumerate(requests):
        one.take(ints[:, place], floats[:, place], int(counts[place]))
