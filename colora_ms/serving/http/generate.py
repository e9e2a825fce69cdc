"""From an HTTP request to the engine's handles, and from these to the response, whole or streamed."""

from __future__ import annotations

import asyncio
import dataclasses
from pathlib import Path
from typing import Any, AsyncIterator, Callable, Dict, Iterable, List, Optional

from fastapi import Request as HttpRequest
from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse, Response

from colora_ms.decoding import Completion
from colora_ms.decoding.prompt import encode_prompt
from colora_ms.serving.engine import Engine
from colora_ms.serving.handle import RequestHandle
from colora_ms.serving.http.answers import Answers
from colora_ms.serving.http.failures import RequestError, describe
from colora_ms.serving.http.follow import follow, unless_gone
from colora_ms.serving.http.logprobs import Place, Places
from colora_ms.serving.http.metrics import Metrics
from colora_ms.serving.http.settings import Settings
from colora_ms.serving.scoring import Scorer


@dataclasses.dataclass(frozen=True)
class Asked:
    """What one HTTP request asks of the engine.

    Attributes:
        prompts: for ``Engine.submit``; options: its keyword arguments.
        answers: what is made of the completions, ``answers.copies`` of each prompt.
        stream: whether as events.
        seed: of each prompt's first answer.
    """

    prompts: List[Any]
    options: Dict[str, Any]
    answers: Answers
    stream: bool
    seed: int


class Generation:
    """Answers requests.

    Args:
        engine: :class:`colora_ms.serving.Engine`; settings: the server's; metrics: takes the latencies.
        folder: the adapters' folder, which no message shows.
    """

    def __init__(self, engine: Engine, settings: Settings, metrics: Metrics, folder: Optional[Path]) -> None:
        self.engine = engine
        self.settings = settings
        self.folder = folder
        self._metrics = metrics
        self._scorer = Scorer(engine)

    async def respond(self, request: HttpRequest, ask: Callable[[], Asked]) -> Response:
        """The response to a request.

        Args:
            ask: says what is asked; it and the submission run in a thread, since both tokenize.
        """
        asked, handles = await run_in_threadpool(self._submit, ask)
        if asked.stream:
            return EventStream(self, handles, asked.answers)
        try:
            completions = await unless_gone(request.receive, _collect(handles))
        finally:
            self.finish(handles)
        if completions is None:
            return Response(status_code=499)  # nobody reads it; nginx's number for a client that left
        return JSONResponse(asked.answers.whole(completions))

    def _submit(self, ask: Callable[[], Asked]) -> Any:
        """(what is asked, handles of all its answers, or of none)."""
        asked = ask()
        copies = asked.answers.copies
        if len(asked.prompts) * copies > self.settings.most_answers:
            raise RequestError(f"{copies} answers of {len(asked.prompts)} prompts; this server gives "
                               f"{self.settings.most_answers} a request", "n")
        handles: List[RequestHandle] = []
        prompts = list(asked.prompts)
        if copies > 1 or asked.answers.scores_prompts:
            prompts = [encode_prompt(self.engine.tokenizer, prompt) for prompt in prompts]
        try:
            for prompt in prompts:
                for place in range(copies):
                    seed = (asked.seed + place) % (1 << 64)
                    handles.append(self.engine.submit(prompt, **asked.options, seed=seed))
            if asked.answers.scores_prompts:
                asked.answers.prompts = [self._scored(asked, prompt) for prompt in prompts]
        except BaseException:
            for handle in handles:
                handle.cancel()
            raise
        return asked, handles

    def _scored(self, asked: Asked, prompt: List[int]) -> List[Place]:
        """The log-probabilities of a prompt's tokens, computed while its answers are."""
        scores = self._scorer.score(prompt, asked.options["adapter"])
        return Places(self.engine.tokenizer).prompt(prompt, scores, asked.answers.top or 0)

    def finish(self, handles: Iterable[RequestHandle]) -> None:
        """Cancel what still runs, and take the latencies of what has ended."""
        for handle in handles:
            if handle.done:
                self._metrics.observe(handle)
            else:
                handle.cancel()


class EventStream(Response):
    """The response of a streamed request; ends its handles when the client leaves, however the stream ends."""

    def __init__(self, generation: Generation, handles: List[RequestHandle], answers: Answers) -> None:
        # Proxies must not hold events back.
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
                         media_type="text/event-stream")
        del self.headers["content-length"]
        self._generation = generation
        self._handles = handles
        self._answers = answers

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Send the stream until it ends or the client leaves."""
        try:
            await unless_gone(receive, self._send(send))
        finally:
            self._generation.finish(self._handles)

    async def _send(self, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async for part in self._parts():
            if part:
                await send({"type": "http.response.body", "body": part, "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    async def _parts(self) -> AsyncIterator[bytes]:
        ended: Dict[int, Completion] = {}
        try:
            for index in range(len(self._handles)):
                yield self._answers.opening(index)
            async for index, one in follow(self._handles):
                if isinstance(one, Completion):
                    ended[index] = one
                    yield self._answers.ending(index, one)
                else:
                    yield self._answers.piece(index, one)
            yield self._answers.closing([ended[index] for index in range(len(self._handles))])
        except asyncio.CancelledError:
            raise
        except Exception as error:  # the status is gone already, so the error is an event
            yield self._answers.failure(describe(error, self._generation.folder)[1])


async def _collect(handles: List[RequestHandle]) -> List[Completion]:
    """The completions of all handles, in their order."""
    found = {}
    async for index, one in follow(handles):
        if isinstance(one, Completion):
            found[index] = one
    return [found[index] for index in range(len(handles))]
