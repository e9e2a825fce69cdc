"""``RequestHandle``: what a caller has of a request, from any thread."""

from __future__ import annotations

import logging
import threading
from collections import deque
from dataclasses import dataclass, field
from typing import Callable, Deque, Iterator, List, Optional, Tuple

from colora_ms.decoding.completion import Completion, TokenLogprob, TokenRecord

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Piece:
    """What one chunk of steps brought.

    Attributes:
        text: new text; a tail that may still become a stop string or another character is held back.
        tokens: new ids.
        records: a :class:`colora_ms.decoding.TokenRecord` for each of them, if they were asked for.
        logprobs: a :class:`colora_ms.decoding.completion.TokenLogprob` for each of them, if they were asked for.
    """

    text: str
    tokens: Tuple[int, ...] = ()
    records: Tuple[TokenRecord, ...] = ()
    logprobs: Tuple[TokenLogprob, ...] = ()


@dataclass
class Timing:
    """When a request passed its stages, in seconds of ``time.monotonic()``; None where it has not yet."""

    submitted: float
    admitted: Optional[float] = None
    first_token: Optional[float] = None
    finished: Optional[float] = None


@dataclass
class Usage:
    """Tokens of a request: its prompt's, those of it that came from the prefix cache (all its rows), and new ones."""

    prompt: int
    cached: int = 0
    generated: int = 0


@dataclass
class _State:
    pieces: Deque[Piece] = field(default_factory=deque)
    completion: Optional[Completion] = None
    error: Optional[Exception] = None
    listeners: List[Callable[[], None]] = field(default_factory=list)


class RequestHandle:
    """A request that the engine has taken.

    Iterating gives its text as it comes; :meth:`pieces` gives the tokens and records, too. Either consumes the stream,
    so use one of them, once; :meth:`result` may be called beside.

    Attributes:
        id: its number in the engine; adapter: the adapter's name, or None.
        timing: :class:`Timing`; usage: :class:`Usage`.
    """

    def __init__(self, number: int, adapter: Optional[str], timing: Timing, usage: Usage,
                 cancel: Callable[[RequestHandle], None]) -> None:
        self.id = number
        self.adapter = adapter
        self.timing = timing
        self.usage = usage
        self._cancel = cancel
        self._news = threading.Condition()
        self._state = _State()

    @property
    def done(self) -> bool:
        """Whether it ended, in whatever way."""
        return self._state.completion is not None or self._state.error is not None

    def cancel(self) -> None:
        """End it soon; ``result`` then has what there is, with finish_reason "cancelled"; harmless when it ended."""
        if not self.done:
            self._cancel(self)

    def result(self, timeout: Optional[float] = None) -> Completion:
        """Wait for the end.

        Args:
            timeout: seconds to wait at most; None waits for ever.

        Returns:
            :class:`colora_ms.decoding.Completion`; its finish_reason is "stop", "length", "cancelled" or "timeout".

        Raises:
            TimeoutError: it has not ended yet; it goes on.
            AdapterError, CheckpointError, DecodingError: its logits are not finite, see ``Generator.generate``.
            ServingError, EngineClosedError: it failed.
        """
        with self._news:
            if not self._news.wait_for(lambda: self.done, timeout):
                raise TimeoutError(f"request {self.id} has not ended within {timeout} s; it goes on, cancel() ends it")
        if self._state.error is not None:
            raise self._state.error
        assert self._state.completion is not None
        return self._state.completion

    def pieces(self, timeout: Optional[float] = None) -> Iterator[Piece]:
        """Iterate over :class:`Piece` until the end; raises as :meth:`result` does.

        Args:
            timeout: seconds to wait for one piece at most.
        """
        while True:
            with self._news:
                if not self._news.wait_for(lambda: self._state.pieces or self.done, timeout):
                    raise TimeoutError(f"request {self.id} had nothing new for {timeout} s; it goes on")
                piece = self._state.pieces.popleft() if self._state.pieces else None
            if piece is None:
                self.result()
                return
            yield piece

    def __iter__(self) -> Iterator[str]:
        return (piece.text for piece in self.pieces() if piece.text)

    def poll(self) -> List[Piece]:
        """The pieces that are there now, without waiting."""
        with self._news:
            found = list(self._state.pieces)
            self._state.pieces.clear()
            return found

    def subscribe(self, listener: Callable[[], None]) -> None:
        """Have ``listener()`` called, from the engine's thread, whenever there is a new piece and at the end; it must
        be quick (for asyncio: ``loop.call_soon_threadsafe(event.set)``)."""
        with self._news:
            self._state.listeners.append(listener)
        listener()

    # -- the engine's side -----------------------------------------------------------------------------------------

    def push(self, piece: Optional[Piece] = None, completion: Optional[Completion] = None,
             error: Optional[Exception] = None) -> None:
        """Add a piece, or the end."""
        with self._news:
            if piece is not None:
                self._state.pieces.append(piece)
            if completion is not None:
                self._state.completion = completion
            if error is not None:
                self._state.error = error
            listeners = list(self._state.listeners)
            self._news.notify_all()
        for listener in listeners:
            try:
                listener()
            except Exception:  # it is the caller's; the engine's thread and the other requests go on
                _log.exception("a listener of request %s failed", self.id)
