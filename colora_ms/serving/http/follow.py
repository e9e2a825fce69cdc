"""From the engine's thread to asyncio: waiting for handles, and for a client that goes away."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any, AsyncIterator, Awaitable, Callable, Coroutine, List, Optional, Tuple, TypeVar, Union

from colora_ms.decoding.completion import Completion
from colora_ms.serving.handle import Piece, RequestHandle

_Result = TypeVar("_Result")


async def follow(handles: List[RequestHandle]) -> AsyncIterator[Tuple[int, Union[Piece, Completion]]]:
    """Yield (index, piece) as pieces come, and (index, completion) when a handle ends.

    Args:
        handles: list of :class:`colora_ms.serving.RequestHandle`.

    Raises:
        The error of the first handle that fails.
    """
    loop, news = asyncio.get_running_loop(), asyncio.Event()

    def notify() -> None:
        # The loop may be gone when a request outlives the server; the engine's thread must not stumble over it.
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(news.set)

    for handle in handles:
        handle.subscribe(notify)
    running = dict(enumerate(handles))
    while running:
        await news.wait()
        news.clear()
        for index, handle in list(running.items()):
            done = handle.done  # asked before polling, so that no piece is left behind
            for piece in handle.poll():
                yield index, piece
            if done:
                del running[index]
                yield index, handle.result()


async def gone(receive: Callable[[], Awaitable[Any]]) -> None:
    """Return when the client has closed the connection."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def unless_gone(receive: Callable[[], Awaitable[Any]],
                      work: Coroutine[Any, Any, _Result]) -> Optional[_Result]:
    """Run a coroutine as long as the client is there; returns its result, None if the client left first."""
    watch, task = asyncio.ensure_future(gone(receive)), asyncio.ensure_future(work)
    try:
        await asyncio.wait({watch, task}, return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        for one in (watch, task):
            one.cancel()
        await asyncio.gather(watch, task, return_exceptions=True)
