"""The routes."""

import asyncio
from typing import Any, AsyncIterator, Dict, Iterable, List, Union

from fastapi import FastAPI
from fastapi import Request as HttpRequest
from fastapi.exceptions import RequestValidationError
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from colora_ms import __version__
from colora_ms.decoding import Completion
from colora_ms.errors import AdapterError, ColoraError, ConfigError, UnknownAdapterError
from colora_ms.models.detokenizer import stream_of
from colora_ms.serving.bank import AdapterBank
from colora_ms.serving.engine import Engine
from colora_ms.serving.handle import RequestHandle
from colora_ms.serving.http.answers import DONE, Answers, event
from colora_ms.serving.http.failures import RequestError, describe, respond
from colora_ms.serving.http.follow import follow, unless_gone
from colora_ms.serving.http.guard import Guard
from colora_ms.serving.http.metrics import Metrics
from colora_ms.serving.http.schema import ChatBody, CompletionBody, GenerationBody
from colora_ms.serving.http.settings import Settings


def create_app(engine: Engine, settings: Settings) -> FastAPI:
    """The ASGI application over an engine.

    Args:
        engine: :class:`colora_ms.serving.Engine`; the caller closes it.
        settings: :class:`colora_ms.serving.http.Settings`.

    Raises:
        ConfigError: an adapter has the base model's name.
    """
    if engine.bank is not None and settings.base_model in engine.bank.names():
        raise ConfigError(f"there is an adapter {settings.base_model!r}, which is the base model's name here too; "
                          "rename its folder, or give the base model another name")
    front = Front(engine, settings)
    app = FastAPI(title="colora_ms", version=__version__)
    app.add_middleware(Guard, settings=settings, metrics=front.metrics)
    for kind in (RequestError, RequestValidationError, HTTPException, ColoraError, Exception):
        app.add_exception_handler(kind, front.failed)
    app.post("/v1/completions", response_model=None)(front.complete)
    app.post("/v1/chat/completions", response_model=None)(front.chat)
    app.get("/v1/models")(front.models)
    app.get("/v1/models/{name:path}")(front.model)
    app.get("/v1/adapters")(front.adapters)
    app.post("/v1/adapters")(front.load)
    app.delete("/v1/adapters/{name:path}")(front.unload)
    app.get("/healthz")(front.health)
    app.get("/metrics", response_class=Response)(front.measure)
    return app


class Front:
    """The functions behind the routes. What reads files or tokenizes runs in a pool of threads (``def``, not
    ``async``)."""

    def __init__(self, engine: Engine, settings: Settings) -> None:
        self.engine = engine
        self.settings = settings
        self.folder = None if engine.bank is None else engine.bank.folder
        self.metrics = Metrics(engine)

    async def failed(self, request: HttpRequest, error: Exception) -> JSONResponse:
        return respond(error, self.folder)

    # -- answers -----------------------------------------------------------------------------------------------------

    async def complete(self, body: CompletionBody, request: HttpRequest) -> Response:
        prompts = body.prompts()
        if len(prompts) > self.settings.most_prompts:
            raise RequestError(f"{len(prompts)} prompts in one request; this server takes {self.settings.most_prompts}",
                               "prompt")
        return await self._answer(body, prompts, request, chat=False)

    async def chat(self, body: ChatBody, request: HttpRequest) -> Response:
        return await self._answer(body, [body.conversation()], request, chat=True)

    async def _answer(self, body: GenerationBody, prompts: List[Any], request: HttpRequest, chat: bool) -> Response:
        if body.stream_options is not None and not body.stream:
            raise RequestError("stream_options is only for \"stream\": true", "stream_options")
        handles = await run_in_threadpool(self._submit, body, prompts)
        echo = [self._text(prompt) for prompt in prompts] if getattr(body, "echo", False) else None
        answers = Answers(chat, body.model, bool(body.records), echo)
        if body.stream:
            counts = body.stream_options is not None and bool(body.stream_options.include_usage)
            return EventStream(self, handles, answers, counts)
        try:
            completions = await unless_gone(request.receive, _collect(handles))
        finally:
            self.finish(handles)
        if completions is None:
            return Response(status_code=499)  # nobody reads it; nginx's number for a client that left
        return JSONResponse(answers.whole(completions))

    def _text(self, prompt: Union[str, List[int]]) -> str:
        """A prompt's text: as it came, or what its ids give; a character that the answer completes is the answer's."""
        if isinstance(prompt, str):
            return prompt
        stream = stream_of(self.engine.tokenizer)
        return "".join([stream.push(one) for one in prompt])

    def _submit(self, body: GenerationBody, prompts: List[Any]) -> List[RequestHandle]:
        """Handles of all prompts, or of none."""
        arguments = body.submission(self.settings)
        handles: List[RequestHandle] = []
        try:
            for prompt in prompts:
                handles.append(self.engine.submit(prompt, **arguments))
        except BaseException:
            for handle in handles:
                handle.cancel()
            raise
        return handles

    def finish(self, handles: Iterable[RequestHandle]) -> None:
        """Cancel what still runs, and take the latencies of what has ended."""
        for handle in handles:
            if handle.done:
                self.metrics.observe(handle)
            else:
                handle.cancel()

    # -- models and adapters -----------------------------------------------------------------------------------------

    def models(self) -> Dict[str, Any]:
        return {"object": "list", "data": [self._model(name) for name in [self.settings.base_model, *self._names()]]}

    def model(self, name: str) -> Dict[str, Any]:
        if name != self.settings.base_model and name not in self._names():
            raise UnknownAdapterError(f"there is no model {name!r:.80}; GET /v1/models lists them")
        return self._model(name)

    def _names(self) -> List[str]:
        return [] if self.engine.bank is None else self.engine.bank.names()

    def _model(self, name: str) -> Dict[str, Any]:
        base = self.settings.base_model
        return {"id": name, "object": "model", "created": 0, "owned_by": "colora_ms", "root": base,
                "parent": None if name == base else base}

    def adapters(self) -> Dict[str, Any]:
        info = self._bank().info()
        return {"object": "list", "data": info["adapters"], "slots": info["max_loaded"], "max_rank": info["max_rank"],
                "adapter_format": info["adapter_format"], "slot_bytes": info["slot_bytes"],
                "host_bytes": info["host_bytes"], "host_limit": info["host_limit"]}

    def load(self, body: dict) -> Dict[str, Any]:
        if set(body) != {"name"} or not isinstance(body["name"], str):
            raise RequestError(f"expected {{\"name\": \"an adapter's folder name\"}}, got {body!r:.80}", "name")
        name = body["name"]
        if name == self.settings.base_model:
            raise RequestError(f"{name!r} is the base model's name here; rename the adapter", "name")
        self._bank().load(name)
        entry = next((one for one in self._bank().info()["adapters"] if one["name"] == name), None)
        if entry is None:
            raise UnknownAdapterError(f"adapter {name!r} was unloaded by another request while it was loaded; load it "
                                      "again")
        return entry

    def unload(self, name: str) -> Dict[str, Any]:
        self._bank().unload(name)
        return {"id": name, "object": "adapter", "deleted": True}

    def _bank(self) -> AdapterBank:
        if self.engine.bank is None:
            raise AdapterError("this server was started without adapters")
        return self.engine.bank

    # -- state -------------------------------------------------------------------------------------------------------

    def health(self) -> Dict[str, Any]:
        stats = self.engine.stats()
        return {"status": "ok", **{key: stats[key] for key in ("waiting", "running", "rows", "rows_used", "failures")}}

    def measure(self) -> Response:
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


class EventStream(Response):
    """The response of a streamed request; ends its handles when the client leaves, however the stream ends."""

    def __init__(self, front: Front, handles: List[RequestHandle], answers: Answers, counts: bool) -> None:
        # Proxies must not hold events back.
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
                         media_type="text/event-stream")
        del self.headers["content-length"]
        self.front = front
        self.handles = handles
        self.answers = answers
        self.counts = counts

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await unless_gone(receive, self._send(send))
        finally:
            self.front.finish(self.handles)

    async def _send(self, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async for part in self._parts():
            await send({"type": "http.response.body", "body": part, "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    async def _parts(self) -> AsyncIterator[bytes]:
        ended: Dict[int, Completion] = {}
        try:
            for index in range(len(self.handles)):
                yield self.answers.opening(index) or b""
            async for index, one in follow(self.handles):
                if isinstance(one, Completion):
                    ended[index] = one
                    yield self.answers.ending(index, one)
                else:
                    yield self.answers.piece(index, one) or b""
            if self.counts:
                yield self.answers.counts(ended.values())
        except asyncio.CancelledError:
            raise
        except Exception as error:  # the status is gone already, so the error is an event
            yield event(describe(error, self.front.folder)[1])
            return
        yield DONE


async def _collect(handles: List[RequestHandle]) -> List[Completion]:
    """The completions of all handles, in their order."""
    found = {}
    async for index, one in follow(handles):
        if isinstance(one, Completion):
            found[index] = one
    return [found[index] for index in range(len(handles))]
