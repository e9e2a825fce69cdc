"""step: the C operator against a loop over the operators of its parts, to the last bit, and its refusals."""

import copy

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from call import Refused, Table, call, options, set_threads
from colora_ms.kernels.aot import KernelError
from colora_ms.kernels.flat_step import ARGUMENTS, EXTRAS, _shapes
from model_case import STRENGTH, Model, Product, bits, copied, first_shape, tables_for
from paged_case import numbers

FIXED, ENTROPY, DIVERGENCE, MARGIN, SKIP = 0, 1, 2, 3, 8


class Case(Model):
    """Requests with rows of their own in any order, each row with a past, and a flat batch behind it; one row's prompt
    is not complete."""

    def __init__(self, seed, requests=3, capacity=4, mode=None, temperature=0.0, alpha=0.2, eos=(), steps=None,
                 most_new=5, voices=2, adjusted=False, **sizes):
        super().__init__(seed, blocks=4 * voices * requests + 8, positions=80, **sizes)
        random = self.random
        self.requests, self.capacity, self.steps = requests, capacity, capacity if steps is None else steps
        rows = self.rows = voices * requests + 1
        order = random.permutation(rows)
        self.expert = order[:requests].astype(np.int32)
        self.amateur = np.where(random.random(requests) < 0.7, order[requests:2 * requests], -1).astype(np.int32)
        self.mix = self.voiced(voices, order) if voices > 2 else {}
        self.adjusted = self.adjustment() if adjusted else None
        self.past = random.choice([0, 0, 3, 16, 30], rows)
        self.new = random.integers(1, most_new + 1, rows)
        used = {row for rows_ in self.every_row() for row in rows_ if row >= 0}
        self.starting = int(order[-1])  # nobody's: its prompt goes on later
        for row in range(rows):
            if row not in used and row != self.starting:
                self.new[row] = 0
        self.slots = random.integers(-1, 3, rows).astype(np.int32)
        self.strengths = random.choice([np.float32(1), STRENGTH], rows).astype(np.float32)
        self.ids = [random.integers(0, self.vocab, p + n).astype(np.int32) for p, n in zip(self.past, self.new)]
        self.tables = tables_for([p + n + capacity for p, n in zip(self.past, self.new)], self.blocks, random)
        self.budget = random.integers(0, capacity + 3, requests).astype(np.int32)
        self.previous = random.integers(-1, self.vocab, requests).astype(np.int32)
        self.alpha = np.full(requests, alpha, np.float32)
        self.beta = random.choice([0.0, 0.5, 2.0], requests).astype(np.float32)
        self.temperature = np.full(requests, temperature, np.float32)
        self.top_k = random.integers(0, 6, requests).astype(np.int32)
        self.top_p = random.choice([0.7, 1.0], requests).astype(np.float32)
        self.uniforms = random.random((requests, capacity)).astype(np.float32)
        self.eos = np.array(eos, np.int32)
        self.mode = np.zeros(requests, np.int32) if mode is None else np.resize(np.int32(mode), requests)
        self.prompts = [random.integers(0, self.vocab, n).astype(np.int32)
                        for n in random.integers(0, 5, requests)]
        self.copies = np.zeros((0, 2), np.int32)
        self.extra_tokens = 3  # places of the batch that are not used
        for row in range(rows):
            if self.past[row]:
                n = int(self.past[row])
                self.hidden_states(self.ids[row][:n], np.full(n, row, np.int32), np.arange(n, dtype=np.int32),
                                   np.full(n, self.part_slots[row], np.int32), self.tables)
        self.table = Table(self.operands())

    def batch(self, order=None):
        rows = [r for r in (range(self.rows) if order is None else order) if self.new[r]]
        return (np.concatenate([self.ids[r][self.past[r]:] for r in rows]).astype(np.int32),
                np.concatenate([np.full(self.new[r], r) for r in rows]).astype(np.int32),
                np.concatenate([np.arange(self.past[r], self.past[r] + self.new[r]) for r in rows]).astype(np.int32))

    def voiced(self, voices, order):
        """Options of mixes: every request gets all its rows, further ones behind those that a contrast has."""
        random, n = self.random, self.requests
        self.amateur = order[n:2 * n].astype(np.int32)
        mix_rows = np.full((n, 8), -1, np.int32)
        mix_rows[:, :voices] = order[:voices * n].reshape(voices, n).T
        mixing = random.choice([1, 2], n).astype(np.int32)
        weights = np.where(mixing[:, None] == 2, random.random((n, 8)), random.normal(size=(n, 8))).astype(np.float32)
        weights[random.random((n, 8)) < 0.2] = 0
        weights[:, 0] = 0.5
        return dict(mix_rows=mix_rows, mix_weights=weights, mixing=mixing, cut=random.choice([0, 1, 2], n),
                    logprobs=random.choice([-1, 0, 3, 20], n), voices=random.choice([0, 1], n))

    def adjustment(self):
        """What is told of each request: penalties, {token: [times, flags, bias]}, min_tokens, a mask."""
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

    def adjusting(self, entries):
        """(entries, biases, masks) of each request."""
        bits = np.zeros((self.requests, -(-self.vocab // 32) * 32), np.uint8)
        bits[:, :self.vocab] = self.adjusted["allowed"]
        rows = [np.array([(token, count, flags) for token, (count, flags, _) in sorted(one.items())],
                         np.int32).reshape(-1, 3) for one in entries]
        biases = [np.array([bias for _, (_, _, bias) in sorted(one.items())], np.float32) for one in entries]
        return rows, biases, np.packbits(bits, axis=1, bitorder="little").view(np.int32)

    def every_row(self):
        """(requests,) rows, the first ones of the requests, the second ones, ...; -1 where one has no further row."""
        return self.mix["mix_rows"].T if self.mix else (self.expert, self.amateur)

    def options(self, expert=None, beta=None, amateur=None, min_tokens=None):
        """The options that the selection takes, with these columns in the place of the case's own."""
        whole = {**dict(top_k=self.top_k, budget=self.budget, mode=self.mode), **self.mix,
                 **dict(expert_rows=self.expert if expert is None else expert,
                        amateur_rows=self.amateur if amateur is None else amateur)}
        real = dict(alpha=self.alpha, beta=self.beta if beta is None else beta, temperature=self.temperature,
                    top_p=self.top_p)
        if self.adjusted is not None:
            real |= self.adjusted["real"]
            whole["min_tokens"] = self.adjusted["min_tokens"] if min_tokens is None else min_tokens
            whole["masked"] = self.adjusted["masked"]
        return options(whole, real)

    @property
    def part_slots(self):
        """Slots whose scales hold the rows' strengths."""
        return (self.slots + 3 * ((self.slots >= 0) & (self.strengths != 1))).astype(np.int32)

    def inputs(self):
        tokens, rows, positions = self.batch()
        counts = np.int32([len(tokens), len(self.copies), self.steps])
        fill = np.full(self.extra_tokens, 10**6, np.int32)
        assert EXTRAS == ("prompt", "entries", "bias", "mask")
        nothing = np.zeros((self.requests, 0), np.int32)
        more = [nothing] * 3 if self.adjusted is None else self.adjusting(self.adjusted["entries"])
        extras = [one for of_request in zip(self.prompts, *more) for one in of_request]
        self.extras = Table(extras) if any(one.size for one in extras) else None
        handle = np.zeros(2, np.int64) if self.extras is None else self.extras.handle
        return [self.table.handle, *(np.concatenate([x, fill]) for x in (tokens, rows, positions)), counts, self.slots,
                self.strengths, self.tables, np.concatenate([self.copies, np.full((2, 2), -7, np.int32)]),
                self.previous,
                *self.options(), self.uniforms, self.eos, handle]

    def outputs(self):
        r, c = self.requests, self.capacity
        return [((c, r, 3), "int32"), ((c, r, 4), "float32"), ((r,), "int32"), ((c, r, 20), "int32"),
                ((c, r, 29), "float32")]

    def run(self):
        return call("step", self.inputs(), self.outputs())

    def compose(self):
        """The same by the parts; every row's logits are computed at every iteration."""
        q = self.requests
        active, taken = (self.budget > 0) & (self.expert >= 0), np.zeros(q, np.int32)
        previous, position = self.previous.copy(), (self.past + self.new - 1).astype(np.int32)
        ints, floats = np.zeros((self.capacity, q, 3), np.int32), np.zeros((self.capacity, q, 4), np.float32)
        tops, details = np.full((self.capacity, q, 20), -1, np.int32), np.zeros((self.capacity, q, 29), np.float32)
        entries = copy.deepcopy(self.adjusted["entries"]) if self.adjusted else None
        width = max((len(p) for p in self.prompts), default=0)
        prompt = np.zeros((q, max(width, 1)), np.int32)
        for i, one in enumerate(self.prompts):
            prompt[i, :len(one)] = one
        lengths = np.array([len(p) for p in self.prompts], np.int32)
        for step in range(self.steps):
            if step == 0:
                tokens, rows, positions = self.batch()
            else:
                users = [(r, i) for i in range(q) if active[i] for r in (one[i] for one in self.every_row())
                         if r >= 0]
                if not users:
                    break
                rows = np.array([r for r, _ in users], np.int32)
                tokens = np.array([previous[i] for _, i in users], np.int32)
                position[rows] += 1
                positions = position[rows]
            h = self.hidden_states(tokens, rows, positions, self.part_slots[rows], self.tables)
            last = {int(r): i for i, r in enumerate(rows)}  # the last token of each row
            states = np.zeros((self.rows, self.hidden), np.float32)
            for r, i in last.items():
                states[r] = h[i]
            logits = self.logits(states, self.part_slots)
            expert = np.where(active, self.expert, -1).astype(np.int32)
            if self.adjusted is not None:
                rows_, biases, masks = self.adjusting(entries)
                now = np.maximum(self.adjusted["min_tokens"] - taken, 0)
                logits = call("adjust_logits", [
                    logits, *self.options(expert, None, None, now), np.concatenate(rows_), np.concatenate(biases),
                    np.cumsum([0, *map(len, rows_)]).astype(np.int32), masks], [(logits.shape, "float32")])[0]
            beta = call("contrast_strength", [logits, *self.options(expert), previous, prompt, lengths],
                        [((q,), "float32")])[0]
            ints[step], floats[step] = call(
                "contrastive_select", [logits, *self.options(expert, beta),
                                       np.ascontiguousarray(self.uniforms[:, step])],
                [((q, 3), "int32"), ((q, 4), "float32")])
            tops[step], details[step] = call(
                "token_details", [logits, *self.options(expert, beta), np.ascontiguousarray(ints[step, :, 0])],
                [((q, 20), "int32"), ((q, 29), "float32")])
            for r in np.flatnonzero(active) if self.adjusted else ():
                entries[r].setdefault(int(ints[step, r, 0]), [0, 0, np.float32(0)])[0] += 1
            previous = np.where(active, ints[step, :, 0], previous).astype(np.int32)
            taken += active
            active = active & ~np.isin(previous, self.eos) & (taken < self.budget)
        return ints, floats, taken, tops, details


def check(case):
    before = [copied(cache) for cache in case.caches()]
    found = case.run()
    written = [copied(cache) for cache in case.caches()]
    case.restore(before)
    want = case.compose()
    for name, a, b in zip(("ints", "floats", "taken", "tops", "details"), found, want):
        assert np.array_equal(bits(a), bits(b)), name
    for a, b in zip(written, case.caches()):
        assert np.array_equal(numbers(a).view(np.uint8), numbers(b).view(np.uint8))


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**16), requests=st.integers(1, 4), capacity=st.integers(1, 5), vocab=st.integers(1, 70),
       mode=st.sampled_from([None, (FIXED, ENTROPY), (DIVERGENCE, MARGIN + SKIP), (SKIP, DIVERGENCE + SKIP, FIXED)]),
       temperature=st.sampled_from([0.0, 0.0, 1.5]), adapted_head=st.booleans(), tied=st.booleans(),
       alpha=st.sampled_from([1e-6, 0.2, 1.0]), weights=st.sampled_from(["float32", "bfloat16", "int8"]),
       rank=st.sampled_from([0, 3, 17]), qk_norm=st.booleans(), cache=st.sampled_from(["float32", "bfloat16", "int8"]),
       bias=st.booleans(), products=st.sampled_from([0.0, 0.5, 1.0]), kv_heads=st.integers(1, 3),
       group=st.integers(1, 3), half=st.integers(1, 9), most_new=st.sampled_from([1, 4, 25]))
def test_equals_the_loop_over_the_operators_of_its_parts(seed, vocab, half, **sizes):
    check(Case(seed, vocab=vocab, dim=2 * half, eos=(0, vocab // 2), **sizes))


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**16), requests=st.integers(1, 3), capacity=st.integers(1, 4), vocab=st.integers(1, 70),
       temperature=st.sampled_from([0.0, 0.9]), adapted_head=st.booleans(), alpha=st.sampled_from([1e-6, 0.2, 1.0]),
       weights=st.sampled_from(["float32", "int8"]), rank=st.sampled_from([0, 3]), voices=st.integers(3, 8),
       adjusted=st.booleans())
def test_mixes_of_several_rows_equal_the_parts(seed, vocab, **sizes):
    """Rows of one request have pasts of different lengths."""
    check(Case(seed, vocab=vocab, eos=(0, vocab // 2), **sizes))


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**16), requests=st.integers(1, 3), vocab=st.sampled_from([1, 5, 33, 70]),
       mode=st.sampled_from([None, (FIXED, ENTROPY), (DIVERGENCE, MARGIN + SKIP)]),
       temperature=st.sampled_from([0.0, 0.9]), alpha=st.sampled_from([1e-6, 0.2]), rank=st.sampled_from([0, 3]))
def test_penalties_count_the_tokens_of_the_call(seed, vocab, **sizes):
    check(Case(seed, capacity=5, vocab=vocab, adjusted=True, **sizes))


@pytest.mark.parametrize("weights", ["float32", "int4"])
@pytest.mark.parametrize("requests", [1, 5])
def test_usual_sizes_on_one_and_two_threads(weights, requests):
    """A vocabulary in which the survivors of the cut are few, so that the amateur's head is multiplied in parts."""
    for threads in (1, 2):
        set_threads(threads)
        case = Case(3, requests=requests, vocab=6001, adapted_head=False, kv_heads=2, group=2, dim=16, hidden=64,
                    inner=96, rank=4, weights=weights, capacity=6)
        case.amateur[0] = next(r for r in range(case.rows)
                               if r not in (*case.expert, *case.amateur) and r != case.starting) \
            if case.amateur[0] < 0 else case.amateur[0]
        case.budget[:] = 6
        if not case.new[case.amateur[0]]:
            case.amateur[0] = -1
        check(case)
        several = Case(3, requests=requests, vocab=6001, adapted_head=False, kv_heads=2, group=2, dim=16, hidden=64,
                       inner=96, rank=4, weights=weights, capacity=3, voices=4, adjusted=True)
        several.budget[:] = 3
        several.mix["cut"], several.mix["mixing"], several.mix["voices"] = 1, 1, 0  # the survivors alone
        check(several)


@pytest.mark.parametrize("adapted", [False, True])
def test_a_head_and_layers_that_are_products(adapted):
    """Decomposed linears with adapters, the head among them."""
    case = Case(4, products=0.6, mode=(ENTROPY, DIVERGENCE), rank=3)
    down, up, scale = (case.normal(6, 2, 24), case.normal(6, 29, 2), case.normal(6)) if adapted else [None] * 3
    case.head = Product(case.normal(5, 24), case.normal(29, 5), None, None, down, up, scale)
    case.embed = [case.normal(29, 24), None]
    case.table = Table(case.operands())
    case.budget[:] = 4
    check(case)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**16), cut=st.integers(1, 8), cache=st.sampled_from(["float32", "int8"]))
def test_tokens_do_not_depend_on_how_calls_are_cut(seed, cut, cache):
    """All at once, or the prompts in pieces of ``cut`` tokens and then an iteration a call."""
    case = Case(seed, most_new=25, steps=4, cache=cache, temperature=1.0)
    case.budget[:] = 4
    before = [copied(one) for one in case.caches()]
    ints, floats, taken, *_ = case.run()
    written = [copied(one) for one in case.caches()]
    case.restore(before)
    new, budget, steps = case.new.copy(), case.budget.copy(), case.steps
    left = new.copy()
    while (left > cut).any():  # pieces before the last one
        piece = np.where(left > cut, cut, 0)
        case.new = piece
        ids = case.ids
        case.ids = [one[:p + n] for one, p, n in zip(ids, case.past, piece)]
        case.budget = np.zeros_like(budget)
        case.run()
        case.ids, case.past, left = ids, case.past + piece, left - piece
    case.new, case.budget, case.steps = left, budget, 1
    uniforms = case.uniforms
    got = []
    for i in range(steps):
        case.uniforms = np.roll(uniforms, -i, 1)
        one_ints, one_floats, one_taken, *_ = case.run()
        got.append((one_ints[0], one_floats[0], one_taken))
        case.past = case.past + case.new
        case.new = np.zeros_like(new)
        for q in range(case.requests):
            if one_taken[q]:
                case.previous[q] = one_ints[0, q, 0]
                for row in (case.expert[q], case.amateur[q]):
                    if row >= 0:
                        case.ids[row] = np.append(case.ids[row], one_ints[0, q, 0]).astype(np.int32)
                        case.new[row] = 1
        case.budget = case.budget - one_taken
    assert np.array_equal(np.stack([g[0] for g in got]), ints)
    assert np.array_equal(bits(np.stack([g[1] for g in got])), bits(floats))
    assert np.array_equal(sum(g[2] for g in got), taken)
    for a, b in zip(written, case.caches()):
        assert np.array_equal(numbers(a).view(np.uint8), numbers(b).view(np.uint8))


def test_copies_come_first():
    """A row that goes on in a copy of another one's last block."""
    case = Case(6, requests=1, rank=0, cache="bfloat16")
    row, other = int(case.expert[0]), case.starting
    case.amateur[:] = -1
    case.budget[:] = 3
    case.new[:] = 0
    case.past[[row, other]], case.new[row] = 10, 1
    case.ids[row] = case.random.integers(0, 29, 11).astype(np.int32)
    case.tables[:] = -1
    case.tables[other, 0], case.tables[row, 0] = 2, 5
    case.hidden_states(case.ids[row][:10], np.full(10, other, np.int32), np.arange(10, dtype=np.int32),
                       np.full(10, -1, np.int32), case.tables)
    before = [copied(one) for one in case.caches()]
    case.copies = np.int32([[2, 5]])
    found = case.run()
    assert all(np.array_equal(numbers(a)[2], numbers(b)[2]) for a, b in zip(before, case.caches()))
    for one in case.caches():
        numbers(one)[5] = numbers(one)[2]
    for a, b in zip(found, case.compose()):
        assert np.array_equal(bits(a), bits(b))


def test_nothing_to_do():
    case = Case(1, steps=0)
    assert not any(x.any() for x in case.run()[:3])
    case = Case(1, requests=0)
    assert case.run()[2].shape == (0,)
    case = Case(1)
    case.budget[:] = 0
    assert not case.run()[2].any()


def set_batch(name, value):
    def change(case):
        place = ("tokens", "rows", "positions").index(name)
        batch = list(case.batch())
        batch[place][0] = value
        case.batch = lambda: tuple(batch)
    return change


def set_column(name, place, value):
    def change(case):
        getattr(case, name)[place] = value
    return change


@pytest.mark.parametrize("change, message", [
    (set_batch("tokens", 29), "'tokens' is 29 at token 0"), (set_batch("rows", 9), "'rows' is 9 at token 0"),
    (set_batch("rows", -1), "'rows' is -1 at token 0"), (set_batch("positions", -1), "'positions' is -1 at token 0"),
    (set_column("slots", 0, 6), "'slots' holds slot 6 at index 0"),
    (set_column("strengths", 0, np.nan), "'strengths' is nan in row 0"),
    (set_column("expert", 1, 0), "row 0 is used by request 0 and by request 1"),
    (set_column("expert", 0, 7), "'mix_rows' is 7 at place 0 of request 0"),
    (set_column("tables", (0, 0), -1), "'tables' has -1 as entry 0 of row 0"),
    (set_column("tables", (0, 0), 99), "'tables' has 99"),
    (lambda case: setattr(case, "steps", 5), "'counts' has 5 iterations, expected 0 to 4"),
    (set_column("top_k", 1, -1), "'top_k' is -1 in request 1"),
    (set_column("uniforms", (0, 1), 1.0), "'uniforms' is 1 in request 0"),
    (set_column("alpha", 0, 0), "'alpha' is 0 in request 0"), (set_column("mode", 0, 4), "'mode' is 4 in request 0"),
    (lambda case: setattr(case, "copies", np.int32([[0, 99]])), "'copies' has block 99 in copy 0"),
    (lambda case: case.table.set(case.operands()[:-1]), "stale"),
])
def test_a_bad_number_changes_nothing(change, message):
    case = Case(5, mode=FIXED, temperature=1.0)
    case.expert, case.amateur = np.int32([0, 1, 2]), np.int32([3, 4, 5])
    case.budget[:] = 4
    case.new[:] = 2
    case.ids = [case.random.integers(0, 29, p + 2).astype(np.int32) for p in case.past]
    case.tables = tables_for([p + 6 for p in case.past], case.blocks, case.random)
    inputs = case.inputs
    if "stale" in message:
        handle = case.table.handle.copy()
        case.inputs = lambda: [handle, *inputs()[1:]]
    change(case)
    before = [copied(one) for one in case.caches()]
    with pytest.raises(Refused, match=message):
        case.run()
    assert all(np.array_equal(numbers(a), numbers(b), equal_nan=numbers(a).dtype == np.float32)
               for a, b in zip(before, case.caches()))


def test_rows_that_would_collide_or_run_out():
    case = Case(5)
    case.expert, case.amateur = np.int32([0, 1, 2]), np.int32([-1, -1, -1])
    case.new[:], case.past[:], case.budget[:] = 1, 14, 4
    case.ids = [np.zeros(15, np.int32) for _ in range(case.rows)]
    case.tables = tables_for([14 + 5] * case.rows, case.blocks, case.random)
    case.hidden_states(*(np.concatenate(x).astype(np.int32) for x in zip(*[
        (np.zeros(14), np.full(14, r), np.arange(14)) for r in range(case.rows)])),
                       np.full(14 * case.rows, -1, np.int32),
                       case.tables)
    short = case.tables.copy()
    case.tables[1, 1] = -1  # its third iteration has no block
    with pytest.raises(Refused, match="'tables' has -1 as entry 1 of row 1"):
        case.run()
    case.tables = short.copy()
    case.tables[1, 1] = case.tables[0, 1]
    with pytest.raises(Refused, match="row 0 writes that block"):
        case.run()
    case.tables = short
    case.new[2] = 0
    with pytest.raises(Refused, match="request 2 takes a token, but its row 2 has none"):
        case.run()


def test_a_table_that_is_gone():
    case = Case(5)
    case.table.drop()
    with pytest.raises(Refused, match="not there"):
        case.run()


def test_a_head_with_more_tokens_than_the_embedding():
    """Its tokens could not be embedded at the next step."""
    case = Case(5, rank=0)
    case.embed = [case.embed[0][:-1], case.embed[1]]
    case.table.set(case.operands())
    with pytest.raises(Refused, match="'lm_head' has 29 outputs, expected 1 to 28"):
        case.run()


def test_logits_that_are_not_finite_end_that_request_alone():
    case = Case(5, rank=0)
    case.expert, case.amateur = np.int32([0, 1, 2]), np.int32([-1, -1, -1])
    case.budget[:], case.new[:], case.past[:] = 4, 1, 0
    case.embed[0][7] = np.nan
    case.ids = [np.int32([7 if r == 1 else 3]) for r in range(case.rows)]
    case.tables = tables_for([5] * case.rows, case.blocks, case.random)
    ints, floats, taken, *_ = case.run()
    assert list(taken) == [4, 1, 4]
    assert not ints[:, 1].any() and not floats[:, 1].any() and ints[0, 0, 2] == case.vocab


def test_shapes_are_checked_when_the_graph_is_compiled():
    case = Case(7, mode=FIXED, rank=0)
    good = [list(first_shape(value)) for value in case.inputs()]
    assert _shapes(*good) == ([4, 3, 3], [4, 3, 4], [3], [4, 3, 20], [4, 3, 29])
    for name, shape in [("table", [1]), ("positions", [2]), ("counts", [2]), ("tables", [3, 4]), ("copies", [2]),
                        ("previous", [2]), ("uniforms", [2, 4]), ("eos", []), ("extras", [3])]:
        with pytest.raises(KernelError, match=f"{name} "):
            _shapes(*(shape if i == ARGUMENTS.index(name) else s for i, s in enumerate(good)))
    with pytest.raises(KernelError, match="number of operands"):
        _shapes(*good[:-1])
