"""The routes."""

from __future__ import annotations

from typing import Any, Dict, Optional

from fastapi import FastAPI
from fastapi import Request as HttpRequest
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse, Response

from colora_ms import __version__
from colora_ms.errors import ColoraError
from colora_ms.serving.engine import Engine
from colora_ms.serving.http import text
from colora_ms.serving.http.answers import ChatAnswers, CompletionAnswers
from colora_ms.serving.http.conversation import Toolbox, conversation, toolbox
from colora_ms.serving.http.failures import RequestError, respond
from colora_ms.serving.http.generate import Asked, Generation
from colora_ms.serving.http.guard import Guard
from colora_ms.serving.http.metrics import Metrics
from colora_ms.serving.http.registry import Registry
from colora_ms.serving.http.responses import ResponseAnswers, ResponsesBody
from colora_ms.serving.http.schema import AnswersBody, ChatBody, CompletionBody, GenerationBody
from colora_ms.serving.http.settings import Settings


def create_app(engine: Engine, settings: Settings) -> FastAPI:
    """The ASGI application over an engine.

    Args:
        engine: :class:`colora_ms.serving.Engine`; the caller closes it.
        settings: :class:`colora_ms.serving.http.Settings`.

    Raises:
        ConfigError: an adapter has the base model's name, or a mix cannot be served.
    """
    registry = Registry(engine, settings)
    front = Front(engine, settings, registry)
    app = FastAPI(title="colora_ms", version=__version__)
    app.add_middleware(Guard, settings=settings, metrics=front.metrics)
    if settings.cors:  # outside of the guard: a browser asks first without a token, and must be able to read refusals
        app.add_middleware(CORSMiddleware, allow_origins=list(settings.cors), allow_methods=["*"], allow_headers=["*"])
    for kind in (RequestError, RequestValidationError, HTTPException, ColoraError, Exception):
        app.add_exception_handler(kind, front.failed)
    app.post("/v1/completions", response_model=None)(front.complete)
    app.post("/v1/chat/completions", response_model=None)(front.chat)
    app.post("/v1/responses", response_model=None)(front.answer)
    app.get("/v1/models")(registry.models)
    app.get("/v1/models/{name:path}")(registry.model)
    app.get("/v1/adapters")(registry.adapters)
    app.post("/v1/adapters")(registry.load)
    app.delete("/v1/adapters/{name:path}")(registry.unload)
    app.get("/lora-adapters", response_model=None)(registry.numbered)
    app.post("/v1/load_lora_adapter", response_model=None)(registry.load_lora)
    app.post("/v1/unload_lora_adapter", response_model=None)(registry.unload_lora)
    for prefix in ("", "/v1"):
        app.post(f"{prefix}/tokenize", response_model=None)(front.tokenize)
        app.post(f"{prefix}/detokenize", response_model=None)(front.detokenize)
        app.get(f"{prefix}/tokenizer_info")(front.tokenizer_info)
    for path in ("/healthz", "/health"):
        app.get(path)(front.health)
    app.get("/metrics", response_class=Response)(front.measure)
    return app


class Front:
    """The functions behind the routes that answer. What reads files or tokenizes runs in a pool of threads (``def``,
    not ``async``)."""

    def __init__(self, engine: Engine, settings: Settings, registry: Registry) -> None:
        self.engine = engine
        self.settings = settings
        self.registry = registry
        self.folder = None if engine.bank is None else engine.bank.folder
        self.metrics = Metrics(engine)
        self.generation = Generation(engine, settings, self.metrics, self.folder)

    async def failed(self, request: HttpRequest, error: Exception) -> JSONResponse:
        """Any exception as OpenAI's clients expect it."""
        return respond(error, self.folder)

    # -- answers -----------------------------------------------------------------------------------------------------

    async def complete(self, body: CompletionBody, request: HttpRequest) -> Response:
        """POST /v1/completions."""
        def ask() -> Asked:
            prompts, several = body.prompts(self.settings), _several(body)
            options = self._options(body, several)
            echo = [text.shown(self.engine.tokenizer, prompt) for prompt in prompts] if body.echo else None
            answers = CompletionAnswers(body.model, self.engine.tokenizer, echo, records=bool(body.records), **several)
            return Asked(prompts, options, answers, bool(body.stream), body.first_seed())

        return await self.generation.respond(request, ask)

    async def chat(self, body: ChatBody, request: HttpRequest) -> Response:
        """POST /v1/chat/completions."""
        def ask() -> Asked:
            several = _several(body)
            box = toolbox(body, self.engine.tokenizer, self.settings.tool_calls)
            options = self._options(body, several, box)
            prompt = conversation(body, self.engine.tokenizer, box)
            answers = ChatAnswers(body.model, self.engine.tokenizer, box, records=bool(body.records), **several)
            return Asked([prompt], options, answers, bool(body.stream), body.first_seed())

        return await self.generation.respond(request, ask)

    async def answer(self, body: ResponsesBody, request: HttpRequest) -> Response:
        """POST /v1/responses."""
        def ask() -> Asked:
            chat = body.chat()
            box = toolbox(chat, self.engine.tokenizer, self.settings.tool_calls)
            options = self._options(body, {}, box)
            prompt = conversation(chat, self.engine.tokenizer, box)
            return Asked([prompt], options, ResponseAnswers(body, options, box), bool(body.stream), body.first_seed())

        return await self.generation.respond(request, ask)

    def _options(self, body: GenerationBody, several: Dict[str, Any], box: Optional[Toolbox] = None) -> Dict[str, Any]:
        """The engine's options; with tools the answer shows the tokens that calls stand between."""
        options = body.submission(self.settings, self.engine.tokenizer, self.registry)
        if several.get("top") is not None or several.get("wanted") != several.get("copies"):
            options["logprobs"] = several["top"] or 0
        if box is not None:
            options["show_special"] = tuple(sorted({*options["show_special"], *box.form.specials}))
            if box.grammar is not None:
                if options["grammar"] is not None:
                    raise RequestError("tool_choice asks for a call, and another field for another form of the answer; "
                                       "send one of them", "tool_choice")
                options["grammar"] = box.grammar
        return options

    # -- text --------------------------------------------------------------------------------------------------------

    def tokenize(self, body: text.TokenizeBody) -> Dict[str, Any]:
        """POST /tokenize."""
        self.registry.check(body.model)
        return text.tokenize(self.engine, body)

    def detokenize(self, body: text.DetokenizeBody) -> Dict[str, Any]:
        """POST /detokenize."""
        self.registry.check(body.model)
        return text.detokenize(self.engine, body)

    def tokenizer_info(self) -> Dict[str, Any]:
        """GET /tokenizer_info."""
        return text.tokenizer_info(self.engine.tokenizer)

    # -- state -------------------------------------------------------------------------------------------------------

    def health(self) -> Dict[str, Any]:
        """GET /health and /healthz."""
        stats = self.engine.stats()
        return {"status": "ok", **{key: stats[key] for key in ("waiting", "running", "rows", "rows_used", "failures")}}

    def measure(self) -> Response:
        """GET /metrics."""
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


def _several(body: AnswersBody) -> Dict[str, Any]:
    """How many answers, and what is told beside them: arguments of ``Answers``."""
    wanted, computed = body.copies()
    return {"copies": computed, "wanted": wanted, "counts": body.counts(), "top": body.top()}
