"""Text in, text out: ``Generator`` plans requests into batches, runs the graphs and decodes their ids."""

import numpy as np

import mindspore as ms
from mindspore import Tensor

from colora_ms import runtime
from colora_ms.decoding.answer import Answer
from colora_ms.decoding.contrast import operands
from colora_ms.decoding.loop import ContinueLoop, GenerationLoop
from colora_ms.decoding.prompt import check_ids, encode_prompt, ending_ids
from colora_ms.decoding.settings import check_settings, check_stop, check_stop_ids
from colora_ms.decoding.values import shown
from colora_ms.errors import DecodingError
from colora_ms.models.cache import KeyValueCache

_BUCKETS = sorted({n * 2**k for n in (4, 6) for k in range(2, 14)})


def bucket(size, smallest=16):
    """The smallest static size that holds ``size``: 16, 24, 32, 48, 64, 96, ..."""
    return next(b for b in _BUCKETS if b >= max(size, smallest))


def row_bucket(rows):
    """The smallest static number of rows that holds ``rows``: a power of two."""
    return 1 << max(rows - 1, 0).bit_length()


class Request:
    """One prompt with its settings and its slot, and the answer so far."""

    def __init__(self, ids, adapter, slot, settings, answer):
        self.ids = ids
        self.adapter = adapter
        self.slot = slot
        self.settings = settings
        self.answer = answer

    @property
    def left(self):
        """Tokens that the answer may still take."""
        return self.settings.budget - len(self.answer.tokens)


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

    def __init__(self, decoder, tokenizer, adapters=None, max_rows=16, chunk=16, cache_dtype=ms.float32):
        if max_rows < 2:
            raise DecodingError(f"max_rows={max_rows} leaves no room for a contrastive request, which takes two rows")
        runtime.configure()
        self.decoder = decoder
        self.tokenizer = tokenizer
        self.adapters = adapters
        self.max_rows = max_rows
        self.chunk = chunk
        self.cache_dtype = cache_dtype
        self.cache = None
        self._first = self._later = None
        #: Graphs of the decoders that leave the graph at every token; see ``colora_ms.decoding.stepwise``.
        self.steppers = {}
        decoder.set_train(False)

    @classmethod
    def from_pretrained(cls, model="smollm2-135m", adapters=None, weight_format="float32", adapter_format="float32",
                        **options):
        """Load a model, its tokenizer and named adapters.

        Args:
            model: a known name or the path of a folder or file (see ``colora_ms.models.load_model``).
            adapters: mapping of adapter names to PEFT folders, or None. Where one brings tokens that the model lacks, the
                tokenizer in its folder is used.
            weight_format: "float32", "bfloat16", "int8" or "int4".
            adapter_format: "float32" or "bfloat16", see :func:`colora_ms.adapters.inject`.
            options: passed to the constructor.
        """
        from colora_ms.adapters import load_adapters
        from colora_ms.adapters.vocabulary import tokenizer_for
        from colora_ms.models import load_model

        decoder, tokenizer = load_model(model, weight_format=weight_format)
        handle = load_adapters(decoder, adapters, adapter_format=adapter_format) if adapters else None
        if handle is not None:
            tokenizer = tokenizer_for(tokenizer, adapters, handle)
        return cls(decoder, tokenizer, handle, **options)

    @property
    def max_length(self):
        """Tokens that a prompt and its answer may have together."""
        return min(self.decoder.max_positions, self.decoder.config.max_position_embeddings)

    @property
    def eos_token_ids(self):
        """Ids that end an answer: the model config's and the tokenizer's."""
        return ending_ids(self.decoder, self.tokenizer)

    def generate(self, prompts, adapter=None, contrast=None, sampling=None, max_new_tokens=64, stop=(), records=False,
                 ignore_eos=False, on_text=None, stop_token_ids=()):
        """Answer prompts.

        Args:
            prompts: one prompt or a list; a prompt is a string, a list of token ids, or a list of chat messages
                (``{"role": …, "content": …}``), which go through the tokenizer's chat template.
            adapter: name of the adapter, None for the base model, or a list with one entry a prompt.
            contrast: :class:`Contrast`, None for the expert alone, or a list with one entry a prompt.
            sampling: :class:`Sampling`, None for greedy, or a list with one entry a prompt.
            max_new_tokens: tokens an answer may have, or a list with one number a prompt.
            stop: a string, or strings, that end an answer; it is cut before them. One that spells a special token ends
                it at that token.
            records: whether each completion carries a :class:`TokenRecord` a token.
            ignore_eos: go on after an end-of-sequence token (for benchmarks).
            on_text: called with (index of the prompt, new text) after every chunk.
            stop_token_ids: ids that end an answer, beside the end of sequence.

        Returns:
            list of :class:`Completion`, in the order of the prompts.

        Raises:
            DecodingError: empty prompt, prompt longer than the context, unknown adapter, contrast without an adapter.
        """
        stop, stop_token_ids = check_stop(stop), check_stop_ids(stop_token_ids, self.decoder.config.vocab_size)
        eos = self.eos_token_ids
        requests = self._requests(prompts, adapter, contrast, sampling, max_new_tokens, eos,
                                  dict(stop=stop, stop_token_ids=stop_token_ids, records=records, ignore_eos=ignore_eos))
        eos = () if ignore_eos else eos
        watched = bool(stop or stop_token_ids) or on_text is not None
        order = sorted(range(len(requests)), key=lambda i: len(requests[i].ids))
        for batch in self._batches([(i, requests[i]) for i in order]):
            try:
                self._run(batch, eos, watched, on_text)
            except RuntimeError:
                # MindSpore does not run a graph again after one of its operators has failed.
                self._first = self._later = self.cache = None
                raise
        return [r.answer.completion(len(r.ids), r.adapter) for r in requests]

    def _requests(self, prompts, adapter, contrast, sampling, max_new_tokens, eos, shared):
        if not hasattr(prompts, "__len__") or isinstance(prompts, (bytes, dict)):
            raise DecodingError(f"prompts={shown(prompts)} is neither a prompt nor a list of prompts")
        single = isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], (int, np.integer, dict)))
        prompts = [prompts] if single else list(prompts)

        def spread(name, value):
            values = list(value) if isinstance(value, (list, tuple)) else [value] * len(prompts)
            if len(values) != len(prompts):
                raise DecodingError(f"{name} has {len(values)} entries for {len(prompts)} prompts")
            return values

        settings = zip(prompts, spread("adapter", adapter), spread("contrast", contrast), spread("sampling", sampling),
                       spread("max_new_tokens", max_new_tokens))
        return [self._request(i, *setting, eos, shared) for i, setting in enumerate(settings)]

    def _request(self, index, prompt, adapter, contrast, sampling, budget, eos, shared):
        ids = self.encode(prompt)
        check_ids(ids, self.decoder.config.vocab_size, f"prompt {index}")
        if len(ids) + 1 > self.max_length:
            raise DecodingError(f"prompt {index} has {len(ids)} tokens; the context holds {self.max_length}, and at least "
                                "one is needed for the answer")
        merged = getattr(self.adapters, "merged", None)
        if merged is not None and (contrast is not None or adapter != merged):
            raise DecodingError(f"adapter {merged!r} is merged into the base weights, so neither the base model, another "
                                "adapter nor a contrast can be decoded now; call unmerge() first")
        changed = getattr(self.adapters, "changed_base", None)
        if changed is not None and (contrast is not None or adapter is None):
            raise DecodingError(f"adapter {changed!r} started from the base weights and changed them, so the base model "
                                "cannot be decoded now; save it with as_lora=True and load that into an untouched model")
        settings = check_settings(adapter, contrast, sampling, budget, **shared).within(self.max_length - len(ids))
        answer = Answer(self.tokenizer, ids, settings, eos)
        return Request(ids, adapter, self._slot(adapter), settings, answer)

    def _slot(self, adapter):
        if adapter is None or adapter == getattr(self.adapters, "merged", None):
            return -1
        if self.adapters is None:
            raise DecodingError(f"adapter {adapter!r} was asked for, but this generator has no adapters")
        return self.adapters.slot(adapter)

    def encode(self, prompt):
        """Token ids of a prompt: a string, ids, or chat messages."""
        return encode_prompt(self.tokenizer, prompt)

    def _batches(self, indexed):
        batch, rows = [], 0
        for index, request in indexed:
            if batch and rows + request.settings.rows > self.max_rows:
                yield batch
                batch, rows = [], 0
            batch.append((index, request))
            rows += request.settings.rows
        if batch:
            yield batch

    def _reserve(self, rows, length):
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

    def _run(self, batch, eos, watched, on_text):
        requests = [request for _, request in batch]
        plan = _Plan(requests, eos)
        self._reserve(plan.rows, max(len(r.ids) + r.settings.budget for r in requests))
        longest = max(r.settings.budget for r in requests)
        capacity = self.chunk if watched else bucket(longest)
        prompt = plan.prompt(self.cache.max_length)
        (ints, floats), (later_ints, later_floats, counts, state) = runtime.run(
            self._first, *prompt, *plan.layout, *plan.options(), plan.uniforms(0, 1 + capacity), plan.eos,
            Tensor(1 + capacity, ms.int32))
        plan.take(ints.asnumpy()[None], floats.asnumpy()[None], np.ones(len(requests), np.int32))
        plan.take(later_ints.asnumpy(), later_floats.asnumpy(), counts.asnumpy())
        active = self._going(batch, state[2].asnumpy(), on_text)
        done = 1 + capacity
        while active.any():
            state = (state[0], state[1], plan.pad_bool(active))
            ints, floats, counts, state = runtime.run(
                self._later, *state, *plan.layout, *plan.options(), plan.uniforms(done, capacity), plan.eos,
                Tensor(capacity, ms.int32), *prompt)
            plan.take(ints.asnumpy(), floats.asnumpy(), counts.asnumpy())
            active = self._going(batch, state[2].asnumpy(), on_text)
            done += capacity

    def _going(self, batch, active, on_text):
        """Report new text; returns which requests go on."""
        for index, request in batch if on_text is not None else ():
            text = request.answer.news()[0]
            if text:
                on_text(index, text)
        return np.array([request.answer.finish_reason is None for _, request in batch]) & active[:len(batch)].astype(bool)


class _Plan:
    """The tensors of one batch, padded to its bucket, and the way back to its requests."""

    def __init__(self, requests, eos):
        self.requests = requests
        self.size = row_bucket(len(requests))
        contrastive = [i for i, r in enumerate(requests) if r.settings.contrast is not None]
        self.rows = self.size + (row_bucket(len(contrastive)) if contrastive else 0)
        row_request = np.zeros(self.rows, np.int32)
        slots = np.full(self.rows, -1, np.int32)
        expert = np.arange(self.size, dtype=np.int32)
        amateur = np.full(self.size, -1, np.int32)
        row_request[:self.size] = expert
        for i, r in enumerate(requests):
            slots[i] = r.slot
        # Amateur rows stand behind all expert rows; rows that only fill the bucket belong to a request of length 0.
        row_request[self.size:] = self.size - 1 if len(requests) < self.size else 0
        for k, i in enumerate(contrastive):
            amateur[i] = self.size + k
            row_request[self.size + k] = i
        cache_rows = np.arange(self.rows, dtype=np.int32)
        self.layout = tuple(Tensor(a) for a in (row_request, slots, cache_rows))
        self._options = operands([(r.settings.contrast, r.settings.sampling) for r in requests], self.size)
        self._options.put(slice(None), "expert_rows", expert)
        self._options.put(slice(None), "amateur_rows", amateur)
        # -1 is no token id: it stands for "no end of sequence".
        self.eos = Tensor(np.array(sorted(eos) or [-1], np.int32))

    def _array(self, value, filler, dtype):
        return np.array([value(r) for r in self.requests] + [filler] * (self.size - len(self.requests)), dtype)

    def prompt(self, limit):
        """(ids (requests, bucket) int32, lengths (requests,) int32)."""
        width = min(bucket(max(len(r.ids) for r in self.requests)), limit)
        ids = np.zeros((self.size, width), np.int32)
        for i, r in enumerate(self.requests):
            ids[i, :len(r.ids)] = r.ids
        return Tensor(ids), Tensor(self._array(lambda r: len(r.ids), 0, np.int32))

    def options(self):
        """The requests' options as they are now: whole (requests, columns) int32 and real (requests, columns) float32."""
        self._options.put(slice(None), "budget", self._array(lambda r: r.left, 0, np.int32))
        return Tensor(self._options.whole), Tensor(self._options.real)

    def uniforms(self, skip, count):
        """(requests, count) float32: the random numbers of the next tokens; zeros for greedy requests."""
        values = np.zeros((self.size, count), np.float32)
        for i, r in enumerate(self.requests):
            if not r.settings.sampling.greedy:
                values[i] = r.settings.sampling.uniforms(count, skip)
        return Tensor(values)

    def pad_bool(self, flags):
        return Tensor(np.concatenate([flags, np.zeros(self.size - len(flags), bool)]))

    def take(self, ints, floats, counts):
        """Give the first ``counts[i]`` steps of (steps, requests, 3 or 4) arrays to the answers."""
        for i, request in enumerate(self.requests):
            for step in range(int(counts[i])):
                request.answer.take(*ints[step, i].tolist(), floats[step, i].tolist())
