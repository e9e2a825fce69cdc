"""Who goes next: the bounded queue of waiting requests, and the choice of shapes for prompts."""

import bisect
import threading

from colora_ms.errors import QueueFullError

#: Times that a request whose adapter finds no slot may be passed over by later ones before everybody waits for it.
PATIENCE = 64


class WaitingQueue:
    """Waiting requests, those of higher priority first, equal ones in the order of their coming.

    Args:
        limit: requests that may wait; a further one is refused.
    """

    def __init__(self, limit):
        self.limit = limit
        self._lock = threading.Lock()
        self._items = []  # (-priority, number, request)

    def __len__(self):
        return len(self._items)

    def check(self):
        """Raise QueueFullError if no further request may wait."""
        if len(self._items) >= self.limit:
            raise QueueFullError(f"{len(self._items)} requests wait, which is all that the queue takes; try again later")

    def add(self, request):
        """Add a request; QueueFullError if the queue is full."""
        with self._lock:
            self.check()
            bisect.insort(self._items, (-request.settings.priority, request.handle.id, request))

    def remove_if(self, test):
        """Take out the requests for which ``test`` holds, and return them."""
        with self._lock:
            found = [item for item in self._items if test(item[2])]  # once for each: its answer may change meanwhile
            numbers = {number for _, number, _ in found}
            if found:
                self._items = [item for item in self._items if item[1] not in numbers]
        return [request for _, _, request in found]

    def admit(self, rows, place):
        """Take out the requests that can start.

        Args:
            rows: rows of the batch that are free; expert and amateur of a request start together or not at all.
            place: function (request) that gives it a slot; False if it has to wait for one.

        Returns:
            list of requests. The first one that does not fit the rows ends the search, so that small requests cannot
            keep a large one waiting for ever; one that waits for a slot is passed over, up to PATIENCE times.
        """
        with self._lock:
            waiting = [request for _, _, request in self._items]
        taken = []
        for request in waiting:
            if len(request.rows) > rows:
                break
            if place(request):
                rows -= len(request.rows)
                taken.append(request)
            else:
                request.passed_over += 1
                if request.passed_over > PATIENCE:
                    break
        if taken:
            ids = {id(request) for request in taken}
            self.remove_if(lambda request: id(request) in ids)
        return taken


def row_buckets(rows):
    """Numbers of rows that a chunk of steps is compiled for: powers of two, and ``rows`` itself."""
    return sorted({1 << k for k in range(rows.bit_length()) if 1 << k <= rows} | {rows})


def prompt_shapes(rows, chunk):
    """(rows, tokens) that prompts are computed in: short ones together, long ones in chunks.

    Args:
        rows: rows of the batch; chunk: tokens of a prompt that one call takes at most.
    """
    wanted = [(2, 16), (8, 16), (1, 64), (1, chunk), (2, chunk)]
    return sorted({(min(r, rows), min(t, chunk)) for r, t in wanted})


def best_shape(shapes, lengths):
    """The shape with the most real tokens for its cost.

    Args:
        shapes: as :func:`prompt_shapes` gives them.
        lengths: tokens that each waiting row lacks, the rows in their order.
    """
    def worth(shape):
        rows, tokens = shape
        # The weights are read once a call, which costs about as much as some tens of tokens.
        return sum(min(n, tokens) for n in lengths[:rows]) / (rows * tokens + 32)

    return max(shapes, key=worth)
