"""Errors as OpenAI's clients expect them: a status and ``{"error": {"message", "type", "param", "code"}}``."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any, Dict, Optional, Tuple

from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from colora_ms.errors import (
    AdapterError,
    CheckpointError,
    ColoraError,
    EngineClosedError,
    QueueFullError,
    ServingError,
    UnknownAdapterError,
)

_log = logging.getLogger(__name__)

#: What a union of types adds to the place of a problem; no part of the body.
_VARIANTS = ("str", "int", "list")
_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class RequestError(Exception):
    """A request that the front itself refuses."""

    def __init__(self, message: str, param: Optional[str] = None, code: Optional[str] = None,
                 status: int = 400) -> None:
        super().__init__(message)
        self.param = param
        self.code = code
        self.status = status


def describe(error: Exception, folder: Optional[Path] = None) -> Tuple[int, Dict[str, Any]]:
    """(status, body) of an exception.

    Args:
        error: any exception; what is no error of colora_ms gets status 500 and says nothing of its inside.
        folder: the adapter folder, whose path is kept out of the message.
    """
    status, param, code = 500, None, None
    message = str(error)
    if isinstance(error, RequestError):
        status, param, code = error.status, error.param, error.code
    elif isinstance(error, HTTPException):
        status, message = error.status_code, str(error.detail)
    elif isinstance(error, RequestValidationError):
        status, (param, message) = 400, _first_problem(error)
    elif isinstance(error, UnknownAdapterError):
        status, param, code = 404, "model", "model_not_found"
    elif isinstance(error, AdapterError):
        status, param, code = 400, "model", "adapter_invalid"
    elif isinstance(error, QueueFullError):
        status, code = 429, "queue_full"
    elif isinstance(error, EngineClosedError):
        status, code = 503, "shutting_down"
    elif isinstance(error, ColoraError):
        status = 500 if isinstance(error, (CheckpointError, ServingError)) else 400
        named = re.match(r"[a-z_]+(?==)", message)  # "top_p=1.5 is …"
        param = named[0] if named else None
    else:
        _log.error("a request failed unexpectedly", exc_info=error)
        message = "the server failed at this request; its log says why"
    if folder is not None:
        message = message.replace(f"{folder}/", "").replace(str(folder), "the adapter folder")
    kind = _TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return status, {"error": {"message": message, "type": kind, "param": param, "code": code}}


def respond(error: Exception, folder: Optional[Path] = None) -> JSONResponse:
    """The response of an exception."""
    status, body = describe(error, folder)
    headers = dict(getattr(error, "headers", None) or {})
    if status == 429:
        headers["Retry-After"] = "1"
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(body, status, headers)


def _first_problem(error: RequestValidationError) -> Tuple[Optional[str], str]:
    """(field, sentence) of the first thing that is wrong with a body."""
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return None, f"the body is not valid JSON: {first.get('ctx', {}).get('error', first['msg'])}"
    where = [str(part) for part in first["loc"] if part != "body"]
    name = ".".join(part for part in where if (part.isidentifier() or part.isdigit()) and part not in _VARIANTS)
    if first["type"] == "missing" and not name:
        return None, "the request has no body; send a JSON object with Content-Type: application/json"
    return name or None, f"{name or 'body'}: {first['msg']}; got {first.get('input')!r:.80}"
