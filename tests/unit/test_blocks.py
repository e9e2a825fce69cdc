"""Blocks of the paged cache: counts of holders, what is found again, and that nothing shared or findable is
overwritten. A model of what stands in every block (the tokens that were written, and all before them) is the judge."""

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from colora_ms.decoding.blocks import BlockPool, OutOfBlocks, common

SIZE, BLOCKS = 4, 12


def ids(*values):
    return np.array(values, np.int32)


class Rows(RuleBasedStateMachine):
    """Rows that begin, append, fork, publish and end, over few blocks and few tokens, so that they often share."""

    def __init__(self):
        super().__init__()
        self.pool = BlockPool(BLOCKS, SIZE)
        self.rows = []  # [(owner, tokens, table, keys)]
        self.written = {}  # (block, offset) -> (owner, all tokens up to and with that position)

    def write(self, table, owner, tokens, position):
        block = table[position // SIZE]
        assert self.pool.holders(block) == 1, "a shared block is written"
        place, content = (block, position % SIZE), (owner, tuple(tokens[:position + 1]))
        found = self.pool._content.get(block)
        assert found is None or position % SIZE >= len(found.tokens), "content that can be found is overwritten"
        self.written[place] = content

    def copy(self, source, target):
        for offset in range(SIZE):
            self.written[target, offset] = self.written.get((source, offset))

    @rule(owner=st.sampled_from(["", "a"]), tokens=st.lists(st.integers(0, 1), min_size=1, max_size=14),
          partial=st.booleans())
    def begin(self, owner, tokens, partial):
        root = self.pool.root(owner)
        found = self.pool.find(root, ids(*tokens), partial)
        table, at = list(found.blocks), SIZE * len(found.blocks)
        self.pool.hold(table)
        if found.source is not None:
            assert 0 < found.more <= SIZE
            self.pool.hold([found.source])
            try:
                table += self.pool.take()
                self.copy(found.source, table[-1])
                at += found.more
            except OutOfBlocks:
                assert self.pool.available == 0
            self.pool.release([found.source])
        for position in range(at):  # all that was found is what this row would have computed
            there = self.written[table[position // SIZE], position % SIZE]
            assert there == (owner, tuple(tokens[:position + 1]))
        row = [owner, tokens[:at], table, list(found.keys)]
        self.rows.append(row)
        self.append(row, tokens[at:])

    def append(self, row, more):
        owner, tokens, table, _ = row
        for token in more:
            if len(tokens) == SIZE * len(table):
                if not self.pool.available:
                    with pytest.raises(OutOfBlocks):
                        self.pool.take()
                    return
                table += self.pool.take()
            try:
                copied = self.pool.own(table, len(tokens) // SIZE)
            except OutOfBlocks:
                return
            if copied is not None:
                self.copy(*copied)
            tokens.append(token)
            self.write(table, owner, tokens, len(tokens) - 1)

    @precondition(lambda self: self.rows)
    @rule(data=st.data(), more=st.lists(st.integers(0, 1), min_size=1, max_size=6))
    def go_on(self, data, more):
        self.append(data.draw(st.sampled_from(self.rows)), more)

    @precondition(lambda self: self.rows)
    @rule(data=st.data())
    def fork(self, data):
        owner, tokens, table, keys = data.draw(st.sampled_from(self.rows))
        self.pool.hold(table)
        self.rows.append([owner, list(tokens), list(table), list(keys)])

    def alone(self, row):
        """Whether a row is the only one at its last block."""
        return bool(row[2]) and self.pool.holders(row[2][-1]) == 1

    def publish(self, row, partial):
        owner, tokens, table, keys = row
        for index in range(len(keys), len(tokens) // SIZE):
            before = keys[-1] if keys else self.pool.root(owner)
            keys.append(self.pool.publish(table, index, before, ids(*tokens[SIZE * index:SIZE * (index + 1)])))
        rest = tokens[SIZE * len(keys):]
        if partial and rest:
            before = keys[-1] if keys else self.pool.root(owner)
            assert self.pool.publish(table, len(keys), before, ids(*rest)) is None

    @precondition(lambda self: self.rows)
    @rule(data=st.data(), partial=st.booleans())
    def let_be_found(self, data, partial):
        row = data.draw(st.sampled_from(self.rows))
        self.publish(row, partial and self.alone(row))
        found = self.pool.find(self.pool.root(row[0]), ids(*row[1]))
        assert len(found.blocks) == len(row[1]) // SIZE

    @precondition(lambda self: self.rows)
    @rule(data=st.data(), keep=st.booleans())
    def end(self, data, keep):
        row = data.draw(st.sampled_from(self.rows))
        if keep:
            self.publish(row, self.alone(row))
        self.pool.release(row[2])
        self.rows = [one for one in self.rows if one is not row]

    @rule()
    def forget(self):
        if len(self.rows) < 2:
            self.pool.forget()
            assert not self.pool.find(self.pool.root(""), ids(0, 0, 0, 0)).blocks
            for row in self.rows:
                row[3].clear()

    @invariant()
    def counts_are_those_of_the_tables(self):
        pool = self.pool
        held = [block for _, _, table, _ in self.rows for block in table]
        assert [pool.holders(block) for block in range(BLOCKS)] == [held.count(block) for block in range(BLOCKS)]
        assert pool.used == len(set(held)) and pool.available == BLOCKS - pool.used
        free = sorted([*pool._empty, *pool._idle])
        assert free == sorted(set(range(BLOCKS)) - set(held))  # none is lost, none is free twice
        assert set(pool._idle) <= set(pool._content) and not set(pool._empty) & set(pool._content)

    @invariant()
    def what_can_be_found_stands_there(self):
        for block, content in self.pool._content.items():
            for offset, token in enumerate(content.tokens):
                assert self.written[block, offset][1][-1] == token


TestRows = Rows.TestCase
TestRows.settings = settings(max_examples=60, stateful_step_count=30)


def published(pool, owner, tokens):
    """A row of these tokens, published and ended; returns its table."""
    table, key = pool.take(pool.count(len(tokens))), pool.root(owner)
    for index in range(len(table)):
        key = pool.publish(table, index, key, tokens[SIZE * index:SIZE * (index + 1)])
    pool.release(table)
    return table


def test_owners_kinds_and_salts_share_nothing():
    pool, tokens = BlockPool(BLOCKS, SIZE, "float32"), np.arange(10, dtype=np.int32)
    table = published(pool, "a", tokens)
    found = pool.find(pool.root("a"), tokens)
    assert found.blocks == table[:2] and (found.source, found.more) == (table[2], 2)
    assert pool.find(pool.root("a"), tokens, partial=False).source is None
    other = BlockPool(BLOCKS, SIZE, "bfloat16")
    for root in (pool.root(""), pool.root("a", "tenant"), other.root("a"), pool.root("aten", "ant")):
        assert pool.find(root, tokens).blocks == [] and pool.find(root, tokens).source is None


def test_an_end_is_copied_from_whatever_shares_the_most():
    pool = BlockPool(BLOCKS, SIZE)
    first = published(pool, "", ids(1, 2, 3, 4, 5, 6, 7, 8))
    assert published(pool, "", ids(1, 2, 3, 4, 5, 6))[0] == first[0]  # of whole blocks one is enough
    third = published(pool, "", ids(1, 2, 3, 4, 9))
    assert pool.available == BLOCKS and third[0] == first[0]
    for tokens, source, more in ((ids(1, 2, 3, 4, 5, 6, 9), first[1], 2), (ids(1, 2, 3, 4, 9, 9, 9, 9), third[1], 1),
                                 (ids(1, 2, 3, 5), first[0], 3), (ids(1, 2, 3, 4, 8), None, 0),
                                 (ids(1, 2, 3, 4, 5, 6, 7), first[1], 3), (ids(7, 8), None, 0)):
        found = pool.find(pool.root(""), tokens)
        assert (found.source, found.more) == (source, more)


def test_the_end_of_what_was_used_longest_ago_goes_first():
    pool = BlockPool(5, SIZE)
    old, new = published(pool, "a", ids(*range(8))), published(pool, "b", ids(*range(8)))
    assert pool.take(1) == [4]  # the one without content
    assert pool.take(1) == old[1:] and pool.find(pool.root("a"), ids(*range(8))).blocks == old[:1]
    pool.hold(old[:1])  # used again
    pool.release(old[:1])
    assert pool.take(2) == new[::-1] and pool.evictions == 3
    with pytest.raises(OutOfBlocks, match="2 blocks of the cache are wanted, 1 of 5"):
        pool.take(2)
    with pytest.raises(RuntimeError, match="nobody holds it"):
        pool.release([old[0]])


def test_common():
    assert common((1, 2, 3), (1, 2, 4)) == 2 and common((), (1,)) == 0 and common((1,), (1, 2)) == 1
