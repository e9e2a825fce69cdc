"""The core over a strict stand-in of the step: whatever comes, goes, shares, fails or has to give its blocks back, each
request makes the tokens that it makes alone."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from colora_ms.decoding import Contrast, Ensemble, Guide, Negative, Sampling
from colora_ms.decoding.blocks import BlockPool
from colora_ms.decoding.core import Core
from colora_ms.decoding.options import Options
from colora_ms.decoding.request import Limits, Request, Running
from tests.decoding_fake import EOS, VOCABULARY, FakeStep, alone

SIZE = 16
SLOTS = {None: -1, "a": 0, "b": 1}
PREFIXES = [[], list(range(3, 23)), list(range(3, 23)) * 3, [5] * 33]


class Silent:
    """A tokenizer without text."""

    def decode(self, ids, skip_special_tokens=True):
        return ""


def running(prompt, adapter=None, budget=8, blocks=64, length=400, **options):
    request = Request.of(Silent(), prompt, adapter, Options(max_new_tokens=budget, **options),
                         Limits(VOCABULARY + 9, length, blocks=blocks))
    names = [row.adapter for row in request.rows]
    return Running(request, Silent(), (EOS,), [SLOTS[name] for name in names], [name or "" for name in names])


def expected(job):
    """Its tokens, by the definition."""
    options = job.request.options
    uniforms = None if options.sampling.greedy else options.sampling.uniforms(options.max_new_tokens)
    copies = tuple(job.request.ids.tolist()) if job.request.copies else None
    prompts = [job.prompt(number).tolist() for number in range(len(job.slots))]
    return alone(prompts, job.slots, options.max_new_tokens, uniforms, copies, () if options.ignore_eos else (EOS,))


def made(blocks=64, rows=6, tokens=48, chunk=4, budget=20, length=400, fused=True, refuse=None):
    pool = BlockPool(blocks, SIZE)
    graph = FakeStep(blocks, SIZE, tokens, rows, chunk, fused, refuse)
    graph.core = Core(graph, pool, rows, tokens, chunk, budget, length, (EOS,))
    return graph.core


def finish(core, jobs, most=2000):
    """Add jobs as they fit and step until all have ended; returns {job: error or None}."""
    waiting, ended = list(jobs), {}
    for _ in range(most):
        while waiting and core.fits(waiting[0]):
            core.add(waiting.pop(0))
        for outcome in core.step(bool(waiting)):
            if outcome.error is not None or outcome.job.answer.finish_reason is not None:
                assert outcome.job not in ended
                ended[outcome.job] = outcome.error
        if not core.busy and not waiting:
            assert core.pool.used == 0
            return ended
    raise AssertionError("the core does not come to an end")


#: function (adapter, another prompt) -> the options of one row, of two, of three, and of rows with other prompts.
MIXES = [
    lambda adapter, prompt: {},
    lambda adapter, prompt: {"contrast": Contrast()} if adapter else {},
    lambda adapter, prompt: {"contrast": Contrast(skip_copies=True)} if adapter else {},
    lambda adapter, prompt: {} if adapter else {"mix": Ensemble(["a", "b", None])},
    lambda adapter, prompt: {} if adapter else {"mix": Guide("a", None)},  # two rows of the base
    lambda adapter, prompt: {"mix": Negative(prompt)},
]

REQUESTS = st.builds(
    lambda prefix, tail, adapter, budget, mix, hot, seed, ignore: dict(
        prompt=PREFIXES[prefix] + tail, adapter=adapter, budget=budget,
        **MIXES[mix](adapter, PREFIXES[prefix][:18] + tail[:9]),
        sampling=Sampling(1.0, seed=seed) if hot else None, ignore_eos=ignore),
    st.integers(0, len(PREFIXES) - 1), st.lists(st.integers(0, 5), min_size=1, max_size=40),
    st.sampled_from([None, "a", "b"]),
    st.integers(1, 60), st.integers(0, len(MIXES) - 1), st.booleans(), st.integers(0, 3), st.booleans())


def play(core, requests, forget=None):
    """Let requests [(options, step at which it comes, steps after which it is cancelled or None)] run to their ends."""
    blocks = core.pool.blocks
    room = blocks // 3 * SIZE - 1  # for a prompt of three rows
    requests = [({**wanted, "prompt": wanted["prompt"][-room:]}, *more) for wanted, *more in requests]
    coming = sorted(((step, number, running(**wanted, blocks=blocks, length=blocks * SIZE), end)
                     for number, (wanted, step, end) in enumerate(requests)), key=lambda one: one[:2])
    waiting, cancels, ended = [], {}, []
    for step in range(4000):
        while coming and coming[0][0] <= step:
            _, _, job, end = coming.pop(0)
            waiting.append(job)
            if end is not None:
                cancels[job] = step + end
        for job, when in list(cancels.items()):
            if when <= step and job in core.jobs:
                core.remove(job)
                made_before = expected(job)[:len(job.tokens)]
                assert job.tokens == made_before
                ended.append(job)
        while waiting and core.fits(waiting[0]):
            core.add(waiting.pop(0))
        if step == forget:
            core.clear()
        for outcome in core.step(bool(waiting)):
            assert outcome.error is None
            if outcome.job.answer.finish_reason is not None:
                assert outcome.job.tokens == expected(outcome.job)
                ended.append(outcome.job)
        held = sum(len(set(line.table)) for seat in core.seats for line in seat.lines)
        assert core.pool.used <= held + sum(line.copy is not None for seat in core.seats for line in seat.lines)
        if not (coming or waiting or core.busy):
            break
    assert len(ended) == len(requests) and core.pool.used == 0 and not core.busy


@settings(max_examples=120)
@given(requests=st.lists(st.tuples(REQUESTS, st.integers(0, 12), st.none() | st.integers(0, 30)), min_size=1,
                         max_size=12),
       blocks=st.integers(6, 60), rows=st.integers(3, 6), more=st.integers(0, 40), chunk=st.integers(1, 6),
       budget=st.integers(1, 40), fused=st.booleans(), forget=st.none() | st.integers(0, 20),
       ahead=st.sampled_from([1, 16, 128]))
def test_any_schedule_gives_each_request_its_own_tokens(requests, blocks, rows, more, chunk, budget, fused, forget,
                                                        ahead):
    """Arrivals, cancels, few blocks, shared prefixes, mixes of rows with prompts of their own, samples, budgets."""
    core = made(blocks, rows, rows + more, chunk, budget, blocks * SIZE, fused)
    core.ahead = ahead
    play(core, requests, forget)


def test_any_schedule_under_pressure():
    """Many requests that grow long in a cache that holds two or three of them."""
    preemptions = []

    @settings(max_examples=40)
    @given(requests=st.lists(st.tuples(REQUESTS.map(lambda one: {**one, "budget": 60, "ignore_eos": True}),
                                       st.integers(0, 9), st.none() | st.integers(5, 60)), min_size=4, max_size=8),
           blocks=st.integers(10, 20), chunk=st.integers(1, 6))
    def run(requests, blocks, chunk):
        core = made(blocks, 6, 40, chunk, 20, blocks * SIZE)
        core.ahead = 1
        play(core, requests)
        preemptions.append(core.counts["preemptions"])

    run()
    assert sum(count > 0 for count in preemptions) >= 20


def test_prompts_share_steps_with_running_requests_within_the_budget():
    core = made(tokens=48, budget=20)
    first = running([7, 8, 9], budget=30, ignore_eos=True)
    core.add(first)
    core.step()
    assert core.graph.calls == [(3, 1)] and len(first.tokens) == 1
    core.step()
    assert core.graph.calls[1] == (1, 4)  # nothing waits: a chunk
    others = [running([5] * 30 + [n], budget=4, adapter=adapter, ignore_eos=True)
              for n, adapter in ((6, "a"), (7, "b"))]
    for job in others:
        core.add(job)
    before = len(first.tokens)
    core.step()
    core.step()
    assert core.graph.calls[2:] == [(21, 1), (21, 1)]  # pieces of 20 tokens, of two prompts in the second call
    assert len(first.tokens) == before + 2 and len(others[0].tokens) == 1
    ended = finish(core, [])
    assert len(ended) == 3 and all(job.tokens == expected(job) for job in ended)


def test_prompts_alone_take_all_that_the_step_holds():
    core = made(tokens=48, budget=20)
    jobs = [running([5] * 40 + [n], adapter=adapter) for n, adapter in ((1, None), (2, "a"))]
    ended = finish(core, jobs)
    assert [n for n, _ in core.graph.calls[:2]] == [48, 21]  # 41 and 7; then 20 beside one request that runs
    assert len(ended) == 2


def test_the_same_beginning_is_computed_once():
    prefix = list(range(3, 40)) + [3] * 16  # 53 tokens: three blocks and a part
    jobs = [running(prefix + [n], adapter=adapter, contrast=contrast, budget=3, ignore_eos=True)
            for n, adapter, contrast in ((5, None, None), (6, None, None), (7, "a", Contrast()), (8, "b", Contrast()))]
    core = made(blocks=100)
    ended = finish(core, jobs)
    assert all(job.tokens == expected(job) for job in ended)
    # The base's rows are four, and whole once; "a" and "b" once each. A prompt's last token is not counted.
    assert core.counts["prompt_rows_tokens"] == 3 * 53 and core.counts["cached_tokens"] == 3 * 53
    assert [job.cached for job in jobs] == [0, 53, 53, 53] and core.counts["copied_blocks"] == 3
    core.clear()
    again = running(prefix + [5], budget=3, ignore_eos=True)
    finish(core, [again])
    assert again.cached == 0 and again.tokens == jobs[0].tokens


def test_answers_of_one_prompt_and_generated_tokens_are_found():
    core = made(blocks=100)
    prompt = list(range(3, 35))
    jobs = [running(prompt, sampling=Sampling(1.0, seed=n), budget=20, ignore_eos=True) for n in range(4)]
    finish(core, jobs)
    assert core.counts["prompt_rows_tokens"] == 31 and [job.cached for job in jobs] == [0, 31, 31, 31]
    turn = running(prompt + jobs[2].tokens + [7, 8], budget=3)  # a conversation that goes on
    finish(core, [turn])
    assert turn.cached == 32 + 19  # the last token of an answer is in nobody's cache
    other = running(prompt, budget=3)
    other.salt = "another tenant"
    finish(core, [other])
    assert other.cached == 0


def test_the_youngest_gives_its_blocks_back_and_makes_the_same_tokens():
    core = made(blocks=24, rows=4, length=256)
    jobs = [running([5 + n] * 12, budget=200, blocks=24, length=256, ignore_eos=True) for n in range(3)]
    ended = finish(core, jobs)
    assert list(ended) == jobs  # the first ones first
    assert all(job.tokens == expected(job) and len(job.tokens) == 200 for job in jobs)
    assert core.counts["preemptions"] >= 1 and core.stats()["blocks_used"] == 0


def test_a_request_may_take_the_whole_cache():
    core = made(blocks=8, rows=4, length=128)
    job = running([5] * 100, budget=28, blocks=8, length=128, ignore_eos=True)
    finish(core, [running([5] * 90, budget=4), job])
    assert job.tokens == expected(job) and len(job.tokens) == 28
    pair = running([5] * 60, "a", budget=40, contrast=Contrast(), blocks=8, length=128, ignore_eos=True)
    finish(core, [pair])
    assert pair.tokens == expected(pair) and len(pair.tokens) == 4  # four blocks for each row


@pytest.mark.parametrize("fused", [True, False])
def test_a_refusal_ends_its_request_and_nobody_else(fused):
    bad = {VOCABULARY + 1}  # no answer has it
    core = made(chunk=4, fused=fused, refuse=lambda batch: "no" if bad & set(batch.tokens.tolist()) else None)
    good = [running([5 + n] * 20, budget=24, ignore_eos=True) for n in range(3)]
    for job in good:
        core.add(job)
    for _ in range(6):
        core.step()
    cached = len(core.pool._content)
    guilty = running([4, VOCABULARY + 1, 4], budget=4)
    ended = finish(core, [guilty])
    assert str(ended[guilty]) == "no" and core.counts["failures"] == 2
    assert all(ended[job] is None and job.tokens == expected(job) for job in good)
    assert cached > 3 and len(core.pool._content) > cached  # nothing was forgotten
    assert core.counts["prompt_rows_tokens"] == 3 * 19


def test_a_failure_that_finds_nobody_ends_nobody():
    left = [1]

    def once(batch):
        if len(set(batch.rows.tolist())) > 1 and left[0]:
            left[0] -= 1
            return "now and then"

    core = made(refuse=lambda batch: once(batch) or None)
    core.graph.refuse = None
    jobs = [running([5 + n] * 20, budget=24, ignore_eos=True) for n in range(3)]
    for job in jobs:
        core.add(job)
    for _ in range(3):
        core.step()
    run = core.graph.run

    def fails(batch):
        core.graph.run = run
        raise MemoryError("now and then")

    core.graph.run = fails
    ended = finish(core, [])
    assert all(ended[job] is None and job.tokens == expected(job) for job in jobs) and core.counts["failures"] == 1


def test_all_begin_anew_after_a_failure_that_nobody_foresaw():
    core = made()
    jobs = [running([5 + n] * 20, budget=24, ignore_eos=True) for n in range(3)]
    for job in jobs:
        core.add(job)
    for _ in range(6):
        core.step()
    assert core.restart() == [] and core.pool.used == 0
    core.graph.cells.clear()
    ended = finish(core, [])
    assert len(ended) == 3 and all(job.tokens == expected(job) for job in jobs)


def test_a_request_that_must_be_seen_token_by_token_makes_single_steps():
    class Seen(Running):
        one_step = True

    core = made()
    job = running([5, 6, 7], budget=6, ignore_eos=True)
    job.__class__ = Seen
    other = running([6, 7], budget=6, ignore_eos=True)
    finish(core, [job, other])
    assert {steps for _, steps in core.graph.calls} == {1} and job.tokens == expected(job)


def test_rows_are_grouped_by_slot_and_counted():
    core = made()
    jobs = [running([5, 6 + n], adapter, budget=2, contrast=Contrast() if adapter else None, ignore_eos=True)
            for n, adapter in enumerate(["b", None, "a"])]
    seen = []
    run = core.graph.run
    core.graph.run = lambda batch: (seen.append(batch), run(batch))[1]
    for job in jobs:
        core.add(job)
    assert core.rows_used == 5 and core.free_rows == 1 and not core.fits(jobs[0])
    with pytest.raises(RuntimeError, match="rows"):
        core.add(jobs[0])
    core.step()
    assert seen[0].slots.tolist() == [-1, -1, -1, 0, 1]
    assert np.array_equal(seen[0].tokens[seen[0].rows == 4], [5, 6])
    finish(core, [])
    assert core.counts["row_steps"] == 2 * 5 and core.counts["steps"] == 2
