"""A strict stand-in of the step: it keeps what was written at every position of every block, and computes from that.

What stands in a position is who wrote it (the adapter slot), where, and a hash of all tokens up to it. A row's history
is read through its table, and everything that is not exactly that row's is refused, as are writes into blocks that
somebody else has, or over what the pool lets others find. The next token is a hash of the histories of the request's
rows.
"""

import hashlib

import numpy as np

from colora_ms.decoding.step import FlatBatch, StepResult
from colora_ms.kernels.options import COLUMN, DETAILS, MOST_ROWS, MOST_TOP, REAL, WHOLE

VOCABULARY, EOS = 40, 2


class Refused(RuntimeError):
    """What the real one raises."""


def grown(history, slot, token):
    """The hash of a history and one more token."""
    return hashlib.blake2b(history + slot.to_bytes(4, "little", signed=True) + int(token).to_bytes(4, "little"),
                           digest_size=16).digest()


def chosen(histories, previous, uniform, temperature, copied):
    """The next token: it depends on the histories of all rows, on the request's numbers, and on what it made last."""
    text = b"".join(histories) + repr((int(previous), float(uniform) * (temperature > 0), copied)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=4).digest(), "little") % VOCABULARY


def alone(prompts, slots, budget, uniforms=None, copies=None, eos=(EOS,)):
    """The tokens of a request that has the cache to itself, computed without one; prompts: of each row."""
    histories, tokens = [], []
    for prompt, slot in zip(prompts, slots):
        history = b""
        for token in prompt:
            history = grown(history, slot, token)
        histories.append(history)
    while len(tokens) < budget:
        draw = 0.0 if uniforms is None else uniforms[len(tokens)]
        tokens.append(chosen(histories, tokens[-1] if tokens else -1, draw, uniforms is not None, copies))
        if tokens[-1] in eos:
            break
        histories = [grown(history, slot, tokens[-1]) for history, slot in zip(histories, slots)]
    return tokens


class FakeStep:
    """Args: blocks, size: of the cache; tokens, rows, capacity: of the graph; refuse: function (batch) -> a message or
    None; core: set by the test, for what nobody but the core knows."""

    def __init__(self, blocks, size, tokens, rows, capacity, fused=True, refuse=None):
        self.blocks, self.size, self.fused, self.refuse = blocks, size, fused, refuse
        self.tokens, self.rows, self.capacity = tokens, rows, capacity
        self.cells = {}  # (block, offset) -> (slot, position, history up to and with it)
        self.core = None
        self.failed = False
        self.calls = []  # (tokens, steps)

    def renew(self):
        self.failed = False

    def run(self, batch):
        assert isinstance(batch, FlatBatch) and not self.failed, "it does not run again after a failure"
        self.check_form(batch)
        if self.refuse is not None and self.refuse(batch):
            self.failed = True
            raise Refused(self.refuse(batch))
        before = dict(self.cells)
        targets = [int(target) for _, target in batch.copies]
        assert len(set(targets)) == len(targets)
        for source, target in batch.copies.tolist():
            assert source not in targets and self.core.pool.holders(source) > 0, "a copy's source may be lost"
            for offset in range(self.size):
                self.cells[target, offset] = before.get((source, offset))
        self.calls.append((len(batch.tokens), batch.steps))
        written = {}
        histories = [b""] * len(batch.slots)
        lengths = [0] * len(batch.slots)
        for token, row, position in zip(batch.tokens.tolist(), batch.rows.tolist(), batch.positions.tolist()):
            if lengths[row] == 0:
                histories[row] = self.history(batch, row, position)
            histories[row] = self.write(batch, row, position, histories[row], token, written)
            lengths[row] = position + 1
        return self.choose(batch, histories, lengths, written)

    def choose(self, batch, histories, lengths, written):
        count = len(batch.whole)
        ints, floats = np.zeros((batch.steps, count, 3), np.int32), np.zeros((batch.steps, count, 4), np.float32)
        counts, last = np.zeros(count, np.int32), batch.previous.tolist()
        places = [q for q in range(count) if batch.mix_rows[q, 0] >= 0]
        for step in range(batch.steps):
            for q in list(places):
                members = self.members(batch, q)
                if step:
                    for row in members:
                        histories[row] = self.write(batch, row, lengths[row], histories[row], last[q], written)
                        lengths[row] += 1
                assert all(lengths[row] for row in members), "a request takes a token, but a row of it has none"
                prompt = None if batch.prompts is None or not len(batch.prompts[q]) else batch.prompts[q]
                token = chosen([histories[row] for row in members], last[q], batch.uniforms[q, step],
                               batch.real[q, COLUMN["temperature"]], None if prompt is None else tuple(prompt.tolist()))
                ints[step, q], floats[step, q] = (token, token, 1), len(members)
                last[q] = token
                counts[q] += 1
                if token in batch.eos.tolist() or counts[q] == batch.whole[q, COLUMN["budget"]]:
                    places.remove(q)
        return StepResult(ints, floats, counts, np.full((batch.steps, count, MOST_TOP), -1, np.int32),
                          np.zeros((batch.steps, count, DETAILS), np.float32))

    @staticmethod
    def members(batch, q):
        return [int(row) for row in batch.mix_rows[q] if row >= 0]

    def write(self, batch, row, position, history, token, written):
        block, slot = int(batch.tables[row, position // self.size]), int(batch.slots[row])
        assert 0 <= block < self.blocks, f"row {row} has no block for position {position}"
        assert written.setdefault(block, row) == row, "two rows write one block"
        here = [other for other in range(len(batch.slots)) if block in batch.tables[other]]
        assert here == [row], "a block is written that another row of the call reads"
        tables = [line for seat in self.core.seats for line in seat.lines if block in line.table]
        assert len(tables) == 1 and tables[0].table.count(block) == 1, "a block is written that another request has"
        content = self.core.pool._content.get(block)
        assert content is None or position % self.size >= len(content.tokens), "what others may find is overwritten"
        history = grown(history, slot, token)
        self.cells[block, position % self.size] = slot, position, history
        return history

    def history(self, batch, row, length):
        """The hash of a row's history before ``length``, after every position of it was looked at."""
        slot, history = int(batch.slots[row]), b""
        for position in range(length):
            block = int(batch.tables[row, position // self.size])
            assert 0 <= block < self.blocks, f"row {row} has no block for position {position}"
            cell = self.cells.get((block, position % self.size))
            assert cell is not None, f"position {position} of row {row} was never written"
            assert cell[:2] == (slot, position), f"position {position} of row {row} holds another row's"
            # Which tokens these are is known to the core alone.
            token = self.sequences(batch, row)[position]
            history = grown(history, slot, token)
            assert cell[2] == history, f"position {position} of row {row} is stale"
        return history

    def sequences(self, batch, row):
        table = [block for block in batch.tables[row].tolist() if block >= 0]
        line, = [line for seat in self.core.seats for line in seat.lines if line.table == table]
        return line.ids(0, line.length).tolist()

    def check_form(self, batch):
        n, rows, requests = len(batch.tokens), len(batch.slots), len(batch.whole)
        whole = {"tokens": (n,), "rows": (n,), "positions": (n,), "slots": (rows,), "copies": (len(batch.copies), 2),
                 "tables": (rows, batch.tables.shape[1]), "whole": (requests, len(WHOLE)), "previous": (requests,),
                 "mix_rows": (requests, MOST_ROWS),
                 "eos": batch.eos.shape}
        for name, shape in whole.items():
            value = getattr(batch, name)
            assert value.dtype == np.int32 and value.shape == shape and value.flags.c_contiguous, name
        for name, shape in {"real": (requests, len(REAL)), "uniforms": (requests, self.capacity),
                            "mix_weights": (requests, MOST_ROWS)}.items():
            value = getattr(batch, name)
            assert value.dtype == np.float32 and value.shape == shape and value.flags.c_contiguous, name
        assert 1 <= n <= self.tokens and rows <= self.rows and requests <= self.rows and len(batch.copies) <= self.rows
        assert 1 <= batch.steps <= (self.capacity if self.fused else 1)
        assert batch.prompts is None or len(batch.prompts) == requests
        assert sorted(set(batch.rows.tolist())) == list(range(rows)), "a row has no token"
        for row in range(rows):
            places = np.flatnonzero(batch.rows == row)
            assert (np.diff(places) == 1).all() and (np.diff(batch.positions[places]) == 1).all()
            table = batch.tables[row]
            assert (table[int((table >= 0).sum()):] == -1).all(), "a table has a hole"
        members = [row for q in range(requests) for row in self.members(batch, q)]
        assert len(set(members)) == len(members) and set(members) <= set(range(rows))
        assert (batch.whole[:, COLUMN["budget"]] > 0).all()
