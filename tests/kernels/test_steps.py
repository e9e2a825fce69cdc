"""decode_steps: the C operator against a loop over the operators of its parts, to the last bit, and its refusals."""

import copy

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from call import Refused, call, linear, options, product, set_threads
from colora_ms.kernels import steps as face
from colora_ms.kernels.aot import KernelError
from test_layers import Case, Product, bits, copied, first_shape, flat_layer

FIXED, ENTROPY, DIVERGENCE, MARGIN, SKIP = 0, 1, 2, 3, 8


class Loop(Case):
    """Random layers with an embedding and a head, random requests with rows of their own in any order."""

    def __init__(self, seed, requests=3, capacity=4, vocab=29, mode=None, temperature=0.0, adapted_head=True,
                 tied=False, alpha=0.2, eos=(), steps=None, prompt=3, hidden=24, voices=2, adjusted=False, **sizes):
        super().__init__(seed, rows=voices * requests + 1, hidden=hidden, max_len=prompt + capacity + 4, **sizes)
        random = self.random
        self.requests, self.capacity, self.vocab = requests, capacity, vocab
        self.embed = self.linear(vocab, hidden)[:2]
        self.last_norm = self.norm(hidden)
        head = self.linear(vocab, hidden)
        self.head = (self.embed if tied else head[:2]) + head[2:3] + (head[3:] if adapted_head else [None] * 3)
        whole = lambda low, high: random.integers(low, high, requests).astype(np.int32)  # noqa: E731
        rows = random.permutation(self.rows)
        self.expert = rows[:requests].astype(np.int32)
        self.amateur = np.where(random.random(requests) < 0.7, rows[requests:2 * requests], -1).astype(np.int32)
        self.token, self.position = whole(0, vocab), whole(0, prompt)
        self.active, self.previous = whole(0, 4).clip(0, 1), whole(-1, vocab)
        self.budget = whole(0, capacity + 3)
        self.alpha = np.full(requests, alpha, np.float32)
        self.beta = random.choice([0.0, 0.5, 2.0], requests).astype(np.float32)
        self.temperature = np.full(requests, temperature, np.float32)
        self.top_k, self.top_p = whole(0, 6), random.choice([0.7, 1.0], requests).astype(np.float32)
        self.uniforms = random.random((requests, capacity)).astype(np.float32)
        self.eos = np.array(eos, np.int32)
        self.steps = capacity if steps is None else steps
        self.forgiving = 0
        self.mix = self.voiced(voices, rows) if voices > 2 else {}
        self.adjusted = self.adjustment() if adjusted else None
        self.mode = None if mode is None else np.resize(np.int32(mode), requests)
        self.prompt, self.lengths = random.integers(0, vocab, (requests, prompt)).astype(np.int32), whole(0, prompt + 1)

    def voiced(self, voices, rows):
        """Options of mixes: every request gets all its rows, further ones behind those that a contrast has."""
        random, n = self.random, self.requests
        self.amateur = rows[n:2 * n].astype(np.int32)
        mix_rows = np.full((n, 8), -1, np.int32)
        mix_rows[:, :voices] = rows[:voices * n].reshape(voices, n).T
        mixing = random.choice([1, 2], n).astype(np.int32)
        weights = np.where(mixing[:, None] == 2, random.random((n, 8)), random.normal(size=(n, 8))).astype(np.float32)
        weights[random.random((n, 8)) < 0.2] = 0
        weights[:, 0] = 0.5
        return dict(mix_rows=mix_rows, mix_weights=weights, mixing=mixing, cut=random.choice([0, 1, 2], n),
                    logprobs=random.choice([-1, 0, 3, 20], n), voices=random.choice([0, 1], n))

    def adjustment(self):
        """A dict of what is told of each request: penalties, {token: [times, flags, bias]}, min_tokens, mask."""
        random, n, vocab = self.random, self.requests, self.vocab
        tokens = [sorted(random.choice(vocab, random.integers(0, min(vocab, 6) + 1), replace=False)) for _ in range(n)]
        allowed = random.random((n, vocab)) < 0.8
        allowed[:, random.integers(vocab)] = True
        return dict(
            entries=[{int(t): [int(random.integers(0, 3)), int(random.integers(0, 4 if vocab > 6 else 2)),
                               np.float32(random.normal())] for t in one} for one in tokens],
            real=dict(presence_penalty=random.choice([0.0, 0.7], n), frequency_penalty=random.choice([0.0, -0.3], n),
                      repetition_penalty=random.choice([1.0, 1.3], n)),
            min_tokens=random.integers(0, 4, n), masked=random.integers(0, 2, n), allowed=allowed)

    def tensors(self, entries):
        """entries, bias, offsets and mask of the adjustments; absent ones without any."""
        if self.adjusted is None:
            return [None] * 4
        rows = [(token, count, flags) for one in entries for token, (count, flags, _) in sorted(one.items())]
        bias = [b for one in entries for _, (_, _, b) in sorted(one.items())]
        room = [(0, 0, 0)] * 5  # entries that no request has
        bits = np.zeros((self.requests, -(-self.vocab // 32) * 32), np.uint8)
        bits[:, :self.vocab] = self.adjusted["allowed"]
        return [np.array(rows + room, np.int32), np.array(bias + [np.nan] * 5, np.float32),
                np.cumsum([0, *map(len, entries)]).astype(np.int32),
                np.packbits(bits, axis=1, bitorder="little").view(np.int32)]

    def inputs(self):
        adapt = [None] * 2 if self.mode is None else [self.prompt, self.lengths]
        return [self.token, self.position, self.active, self.previous, self.slots, self.cache_rows, *self.options(),
                *self.tensors(self.adjusted and self.adjusted["entries"]), self.uniforms, self.eos, np.int32([self.steps]), np.int32([self.forgiving]), *adapt, self.cos, self.sin,
                *self.last_norm, *linear(*self.embed),
                *(product(*self.head) if isinstance(self.head, Product) else linear(*self.head)),
                *(t for layer in self.layers for t in flat_layer(layer))]

    def options(self, expert=None, beta=None, min_tokens=None):
        """The options that the selection takes, with these columns in the place of the case's own."""
        whole = {**dict(top_k=self.top_k, budget=self.budget, mode=0 if self.mode is None else self.mode), **self.mix,
                 **dict(expert_rows=self.expert if expert is None else expert, amateur_rows=self.amateur)}
        real = dict(alpha=self.alpha, beta=self.beta if beta is None else beta, temperature=self.temperature,
                    top_p=self.top_p)
        if self.adjusted is not None:
            real |= self.adjusted["real"]
            whole["min_tokens"] = self.adjusted["min_tokens"] if min_tokens is None else min_tokens
            whole["masked"] = self.adjusted["masked"]
        return options(whole, real)

    def run(self):
        return call("decode_steps", self.inputs(), outputs(self.capacity, self.requests))

    def compose(self):
        """The same by the parts, all rows computed at every step; the caches are copies."""
        caches = [[copied(layer[name][0]) for name in ("k_cache", "v_cache")] for layer in self.layers]
        token, position, previous = self.token.copy(), self.position.copy(), self.previous.copy()
        active = (self.active > 0) & (self.budget > 0)
        counts = np.zeros(self.requests, np.int32)
        ints = np.zeros((self.capacity, self.requests, 3), np.int32)
        floats = np.zeros((self.capacity, self.requests, 4), np.float32)
        tops = np.full((self.capacity, self.requests, 20), -1, np.int32)
        details = np.zeros((self.capacity, self.requests, 29), np.float32)
        entries = copy.deepcopy(self.adjusted["entries"]) if self.adjusted else None
        least = self.adjusted["min_tokens"] if self.adjusted else 0
        for step in range(self.steps):
            if not active.any():
                break
            logits = self.logits(token, position, active, caches)
            expert = np.where(active, self.expert, -1).astype(np.int32)
            beta, now = self.beta, np.maximum(least - counts, 0)
            if self.adjusted is not None:
                logits = call("adjust_logits", [logits, *self.options(expert, None, now), *self.tensors(entries)],
                              [(logits.shape, "float32")])[0]
            if self.mode is not None:
                beta = call("contrast_strength", [logits, *self.options(expert), previous, self.prompt, self.lengths],
                            [((self.requests,), "float32")])[0]
            ints[step], floats[step] = call(
                "contrastive_select", [logits, *self.options(expert, beta),
                                       np.ascontiguousarray(self.uniforms[:, step])],
                [((self.requests, 3), "int32"), ((self.requests, 4), "float32")])
            tops[step], details[step] = call(
                "token_details", [logits, *self.options(expert, beta), np.ascontiguousarray(ints[step, :, 0])],
                [((self.requests, 20), "int32"), ((self.requests, 29), "float32")])
            for r in np.flatnonzero(active) if self.adjusted else ():
                entries[r].setdefault(int(ints[step, r, 0]), [0, 0, np.float32(0)])[0] += 1
            token = np.where(active, ints[step, :, 0], token)
            previous = np.where(active, token, previous)
            counts += active
            position += active
            active = active & ~np.isin(token, self.eos) & (counts < self.budget)
        return ints, floats, counts, token, position, active.astype(np.int32), tops, details, caches

    def every_row(self):
        """(requests,) rows, the first ones of the requests, the second ones, ...; -1 where one has no further row."""
        return self.mix["mix_rows"].T if self.mix else (self.expert, self.amateur)

    def logits(self, token, position, active, caches):
        ids, start, length = np.zeros((3, self.rows), np.int32)
        for rows in self.every_row():
            used = (rows >= 0) & active
            ids[rows[used]], start[rows[used]], length[rows[used]] = token[used], position[used], 1
        x = call("embedding", [ids.reshape(-1, 1), *self.embed], [((self.rows, 1, self.hidden), "float32")])[0]
        layers = [{**layer, "k_cache": [k], "v_cache": [v]} for layer, (k, v) in zip(self.layers, caches)]
        x, residual = call("decoder_layers",
                           [x, np.zeros_like(x), self.slots, self.cos, self.sin, self.cache_rows, start,
                                              length, *(t for layer in layers for t in flat_layer(layer))],
                           [(x.shape, "float32")] * 2)
        x = self.add_norm(x, residual, self.last_norm)[0].reshape(self.rows, -1)
        head = product(*self.head) if isinstance(self.head, Product) else linear(*self.head)
        return call("multi_lora_linear", [x, self.slots, *head], [((self.rows, self.vocab), "float32")])[0]


def outputs(c, r):
    return [((c, r, 3), "int32"), ((c, r, 4), "float32"), *[((r,), "int32")] * 4, ((c, r, 20), "int32"),
            ((c, r, 29), "float32")]


def check(case):
    *want, caches = case.compose()
    found = case.run()
    for name, a, b in zip(("ints", "floats", "counts", "token", "position", "active", "tops", "details"), found, want):
        assert np.array_equal(bits(a), bits(b)), name
    for layer, copies in zip(case.layers, caches):
        for name, kept in zip(("k_cache", "v_cache"), copies):
            assert np.array_equal(*(used_rows(case, cache) for cache in (layer[name][0], kept)))


def used_rows(case, cache):
    """Cache rows of rows with a request; the others hold what nobody reads."""
    rows = [r for rows in case.every_row() for r in rows if r >= 0]
    return bits(cache)[case.cache_rows[rows]]


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**16), requests=st.integers(1, 4), capacity=st.integers(1, 5), vocab=st.integers(1, 70),
       mode=st.sampled_from([None, (FIXED, ENTROPY), (DIVERGENCE, MARGIN + SKIP), (SKIP, DIVERGENCE + SKIP, FIXED)]),
       temperature=st.sampled_from([0.0, 0.0, 1.5]), adapted_head=st.booleans(), tied=st.booleans(),
       alpha=st.sampled_from([1e-6, 0.2, 1.0]), weights=st.sampled_from(["float32", "bfloat16", "int8"]),
       rank=st.sampled_from([0, 3]), qk_norm=st.booleans(), bf16_cache=st.booleans(), bias=st.booleans())
def test_equals_the_loop_over_the_operators_of_its_parts(seed, vocab, **options):
    check(Loop(seed, vocab=vocab, eos=(0, vocab // 2), **options))


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**16), requests=st.integers(1, 3), capacity=st.integers(1, 4), vocab=st.integers(1, 70),
       temperature=st.sampled_from([0.0, 0.9]), adapted_head=st.booleans(), alpha=st.sampled_from([1e-6, 0.2, 1.0]),
       weights=st.sampled_from(["float32", "int8"]), rank=st.sampled_from([0, 3]), voices=st.integers(3, 8),
       adjusted=st.booleans())
def test_mixes_of_several_rows_equal_the_parts(seed, vocab, **options):
    check(Loop(seed, vocab=vocab, eos=(0, vocab // 2), **options))


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**16), requests=st.integers(1, 3), vocab=st.sampled_from([1, 5, 33, 70]),
       mode=st.sampled_from([None, (FIXED, ENTROPY), (DIVERGENCE, MARGIN + SKIP)]),
       temperature=st.sampled_from([0.0, 0.9]), alpha=st.sampled_from([1e-6, 0.2]), rank=st.sampled_from([0, 3]))
def test_penalties_count_the_tokens_of_the_call(seed, vocab, **options):
    check(Loop(seed, capacity=5, vocab=vocab, adjusted=True, **options))


@pytest.mark.parametrize("weights", ["float32", "int4"])
@pytest.mark.parametrize("requests", [1, 5])
def test_usual_sizes_on_one_and_two_threads(weights, requests):
    """A vocabulary in which the survivors of the cut are few, so that the amateur's head is multiplied in parts."""
    for threads in (1, 2):
        set_threads(threads)
        case = Loop(3, requests=requests, vocab=6001, adapted_head=False, kv_heads=2, group=2, dim=16, hidden=64,
                    inner=96,
                    rank=4, weights=weights, capacity=6)
        case.amateur[0] = next(r for r in range(case.rows) if r not in (*case.expert, *case.amateur))
        case.active[:] = 1
        case.budget[:] = 6
        check(case)
        several = Loop(3, requests=requests, vocab=6001, adapted_head=False, kv_heads=2, group=2, dim=16, hidden=64,
                       inner=96, rank=4, weights=weights, capacity=3, voices=4, adjusted=True)
        several.active[:], several.budget[:] = 1, 3
        several.mix["cut"][:], several.mix["mixing"][:], several.mix["voices"][:] = 1, 1, 0  # the survivors alone
        check(several)


@pytest.mark.parametrize("adapted", [False, True])
def test_a_head_and_layers_that_are_products(adapted):
    """Decomposed linears with adapters, the head among them."""
    case = Loop(4, products=0.6, mode=(ENTROPY, DIVERGENCE), rank=3)
    case.embed = [case.normal(29, 24), None]
    down, up, scale = (case.normal(3, 2, 24), case.normal(3, 29, 2), case.normal(3)) if adapted else [None] * 3
    case.head = Product(case.normal(5, 24), case.normal(29, 5), None, None, down, up, scale)
    case.active[:], case.budget[:] = 1, 4
    check(case)


def test_a_contrast_that_adapts_needs_the_prompts():
    case = Loop(5, mode=ENTROPY)
    case.expert, case.amateur = np.int32([0, 1, 2]), np.int32([3, 4, 5])
    case.active[:], case.budget[:] = 1, 4
    inputs = case.inputs()
    inputs[face.ARGUMENTS.index("prompt")] = inputs[face.ARGUMENTS.index("lengths")] = None
    r, c = case.requests, case.capacity
    with pytest.raises(Refused, match=r"'lengths' is absent, but the contrast of request 0 adapts \(mode 1\)"):
        call("decode_steps", inputs, outputs(c, r))


def test_nothing_to_do():
    for change in ({"steps": 0}, {"requests": 0}):
        case = Loop(1, **change)
        ints, floats, counts, token, position, active, _, _ = case.run()
        assert not ints.any() and not floats.any() and not counts.any()
        assert np.array_equal(token, case.token) and np.array_equal(position, case.position)
    case = Loop(1)
    case.active[:] = 0
    assert not case.run()[2].any()


@pytest.mark.parametrize("name, value, message", [
    ("token", [29, 0, 0], "'token' is 29 in request 0"), ("slots", [3] + [0] * 6, "'slots' holds slot 3 at index 0"),
    ("position", [0, 9, 0], "'position' is 9 in row"), ("position", [-1, 0, 0], "'position' is -1 in row"),
    ("expert", [0, 1, 0], "row 0 is used twice"), ("expert", [7, 1, 2], "'mix_rows' is 7 at place 0 of request 0"),
    ("cache_rows", [8] * 7, "'cache_rows' is 8"), ("cache_rows", [1] * 7, "cache row of its own"),
    ("steps", 5, "'steps' is 5, expected 0 to 4"), ("top_k", [0, -1, 0], "'top_k' is -1 in request 1"),
    ("uniforms", [[0.5, 1.0, 0, 0]] * 3, "'uniforms' is 1 in request 0"),
    ("alpha", [0, 1, 1], "'alpha' is 0 in request 0"),
    ("mode", [4, 0, 0], "'mode' is 4 in request 0"), ("lengths", [0, 0, 4], "'lengths' is 4 in request 2"),
])
def test_a_bad_number_changes_nothing(name, value, message):
    case = Loop(5, mode=FIXED, temperature=1.0)
    case.expert, case.amateur = np.int32([0, 1, 2]), np.int32([3, 4, 5])
    case.active[:], case.budget[:] = 1, 4
    old = getattr(case, name)
    setattr(case, name, value if np.isscalar(value) else np.asarray(value, np.asarray(old).dtype))
    before = [layer["k_cache"][0].copy() for layer in case.layers]
    with pytest.raises(Refused, match=message):
        case.run()
    assert all(np.array_equal(layer["k_cache"][0], kept) for layer, kept in zip(case.layers, before))


def test_a_head_with_more_tokens_than_the_embedding():
    """Its tokens could not be embedded at the next step."""
    case = Loop(5, rank=0)
    case.embed = [case.embed[0][:-1], case.embed[1]]
    with pytest.raises(Refused, match="'lm_head' has 29 outputs, expected 1 to 28"):
        case.run()


def test_logits_that_are_not_finite():
    """An error, or, where that is asked for, the end of that request alone."""
    case = Loop(5, weights="float32", rank=0)
    case.expert, case.amateur = np.int32([0, 1, 2]), np.int32([-1, -1, -1])
    case.active[:], case.budget[:] = 1, 4
    case.embed[0][case.token[1]] = np.nan
    case.token[[0, 2]] = (case.token[1] + 1) % case.vocab
    with pytest.raises(Refused, match=r"holds NaN in row 1 \(request 1\)"):
        case.run()
    case.forgiving = 1
    ints, floats, counts, _, _, active, _, _ = case.run()
    assert list(counts) == [4, 1, 4] and not active.any()
    assert not ints[:, 1].any() and not floats[:, 1].any() and ints[0, 0, 2] == case.vocab


def shapes(case):
    return [list(first_shape(value)) if value is not None else [] for value in case.inputs()]


def test_shapes_are_checked_when_the_graph_is_compiled():
    case = Loop(7, mode=FIXED, rank=0)
    good = shapes(case)
    assert face._shapes(*good) == ([4, 3, 3], [4, 3, 4], [3], [3], [3], [3], [4, 3, 20], [4, 3, 29])
    names = dict(zip(face.ARGUMENTS, range(100)))
    for name, shape in [("position", [2]), ("cache_rows", [3]), ("uniforms", [2, 4]), ("eos", []), ("steps", []),
                        ("prompt", [2, 3]), ("lengths", [2]), ("norm", [1, 24]), ("cos", [9]), ("sin", [9, 9])]:
        with pytest.raises(KernelError, match=f"'{name}'|{name} "):
            face._shapes(*(shape if i == names[name] else s for i, s in enumerate(good)))
    with pytest.raises(KernelError, match="number of operands"):
        face._shapes(*good[:-1])
