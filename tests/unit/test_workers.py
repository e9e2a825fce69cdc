"""Splitting over workers, with threads in place of processes."""

import threading

import numpy as np
import pytest

from colora_ms.decoding.completion import Completion
from colora_ms.distributed.workers import Workers
from colora_ms.errors import DataError, DecodingError
from colora_ms.evaluation.benchmarks import Problem
from colora_ms.evaluation.evaluate import evaluate
from colora_ms.evaluation.sharded import ShardedGenerator, ShardedScorer
from colora_ms.training.batching import BatchLoader
from colora_ms.training.encoding import EncodedExample
from colora_ms.training.templates import make_template


class Threads(Workers):
    """Workers whose values meet in a list."""

    def __init__(self, rank, world, board, barrier):
        super().__init__(rank, world)
        self.board, self.barrier = board, barrier

    def gather(self, value):
        self.board[self.rank] = value
        self.barrier.wait(20)
        values = list(self.board)
        self.barrier.wait(20)
        return values


def on_all(world, work):
    """``work(team)`` on every worker; list of results or errors by rank."""
    board, barrier, results = [None] * world, threading.Barrier(world), [None] * world

    def one(rank):
        try:
            results[rank] = work(Threads(rank, world, board, barrier))
        except Exception as error:  # an error is a result here
            results[rank] = error
    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return results


class Echo:
    """Answers with the prompt and the settings it came with."""

    def __init__(self):
        self.seen = []

    def generate(self, prompts, adapter=None, stop=()):
        self.seen += prompts
        if any(text.startswith("bad") for text in prompts):
            raise DecodingError("bad is refused")
        names = adapter if isinstance(adapter, list) else [adapter] * len(prompts)
        return [Completion(f"{p}/{n}/{len(stop)}", (1,), 1, "stop", n) for p, n in zip(prompts, names)]


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("count", [0, 1, 2, 5, 7])
def test_parts_join_to_the_whole_in_order(world, count):
    items = list(range(count))
    assert on_all(world, lambda team: team.join(team.split(items))) == [items] * world
    assert on_all(world, lambda team: team.share(team.rank + 10)) == [10] * world


def test_each_prompt_is_answered_once_with_its_own_settings():
    echoes = [Echo() for _ in range(3)]
    prompts, names = list("abcde"), ["A", None, "C", "D", "E"]
    found = on_all(3, lambda team: ShardedGenerator(echoes[team.rank], team).generate(
        prompts, adapter=names, stop=["x", "y"]))
    assert [[c.text for c in one] for one in found] == [[f"{p}/{n}/2" for p, n in zip(prompts, names)]] * 3
    assert sorted(sum((echo.seen for echo in echoes), [])) == prompts


def test_a_refusal_of_one_worker_is_raised_by_all():
    found = on_all(2, lambda team: ShardedGenerator(Echo(), team).generate(["a", "bad", "c"]))
    assert [type(one) for one in found] == [DecodingError] * 2 and "bad is refused" in str(found[0])

    class Scorer:
        def token_logprobs(self, sequences):
            if any(len(ids) < 2 for ids in sequences):
                raise DataError("too short")
            return [np.array(ids[1:], np.float32) for ids in sequences]
    found = on_all(2, lambda team: ShardedScorer(Scorer(), team).token_logprobs([[1, 2], [3]]))
    assert [type(one) for one in found] == [DataError] * 2
    found = on_all(2, lambda team: ShardedScorer(Scorer(), team).token_logprobs([[1, 2], [3, 4, 5], [6, 7]]))
    assert [[row.tolist() for row in one] for one in found] == [[[2], [4, 5], [7]]] * 2


def test_evaluation_writes_once_goes_on_and_counts_refused_prompts(tmp_path):
    problems = [Problem(str(k), text, text) for k, text in enumerate(["a", "b", "bad", "d", "e"])]
    path = tmp_path / "items.jsonl"

    def run(team):
        return evaluate(Echo(), problems, "exact", template=make_template("{prompt}={completion}", None), path=path,
                        batch_size=1, team=team)
    found = on_all(2, run)
    assert [[item["id"] for item in one.items] for one in found] == [list("01234")] * 2, found
    assert [one.refused for one in found] == [1, 1]
    text = path.read_text()
    assert text.count("\n") == 6
    path.write_text("".join(text.splitlines(keepends=True)[:3]))  # interrupted after two items
    again = on_all(2, run)
    assert [one.items for one in again] == [again[0].items] * 2
    assert [item["text"] for item in again[0].items] == [item["text"] for item in found[0].items]
    assert path.read_text().count("\n") == 6


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("world, count", [(2, 21), (3, 8), (4, 1)])
def test_ranks_together_see_each_example_once_an_epoch(world, count, packing):
    # Example k is made of the token k + 1 alone.
    items = [EncodedExample(np.full(3 + k % 4, k + 1, np.int32), np.full(3 + k % 4, k + 1, np.int32), k)
             for k in range(count)]
    loaders = [BatchLoader(items, 2, seed=3, buckets=[8], packing=packing, rank=rank, world=world)
               for rank in range(world)]
    whole = BatchLoader(items, 2 * world, seed=3, buckets=[8], packing=packing)
    for epoch in range(2):
        seen, alone = [], []
        for _ in range(whole.batches_per_epoch):
            batches = [loader.next() for loader in loaders]
            seen += [tuple(row) for batch in batches for row in batch.labels if (row > 0).any()]
            alone += [tuple(row) for row in whole.next().labels if (row > 0).any()]
        assert sorted(seen) == sorted(alone)
        if not packing:
            assert sorted(max(row) for row in seen) == [k + 1 for k in range(count)]
    assert all(loader.state() == loaders[0].state() for loader in loaders)
