"""POST /v1/responses, OpenAI's newer form of a chat: text and calls of functions, whole or as events.

Nothing is stored: a conversation is sent whole each time, ``previous_response_id`` is refused.
"""

from __future__ import annotations

import uuid
from typing import Any, ClassVar, Dict, List, Optional, Sequence, Tuple, Union

from colora_ms.decoding.completion import Completion
from colora_ms.decoding.grammar import grammar_of
from colora_ms.serving.handle import Piece
from colora_ms.serving.http import fields
from colora_ms.serving.http.answers import AnswerParts, Answers, event, usage
from colora_ms.serving.http.calls import Call, Part
from colora_ms.serving.http.conversation import Toolbox
from colora_ms.serving.http.failures import RequestError
from colora_ms.serving.http.forms import response_format
from colora_ms.serving.http.registry import Registry
from colora_ms.serving.http.schema import ChatBody, GenerationBody
from colora_ms.serving.http.settings import Settings

#: Kinds of text in an item's content.
_TEXTS = ("input_text", "output_text", "text")


class ResponsesBody(GenerationBody):
    """POST /v1/responses."""

    input: Union[str, List[Dict]]
    instructions: Optional[str] = None
    max_output_tokens: Optional[int] = None
    tools: Optional[List[Dict]] = None
    tool_choice: Optional[Union[str, Dict[str, Any]]] = None
    parallel_tool_calls: Optional[bool] = None
    reasoning: Optional[Dict[str, Any]] = None
    text: Optional[Dict[str, Any]] = None
    metadata: Optional[Dict[str, Any]] = None
    chat_template_kwargs: Optional[Dict[str, Any]] = None

    lengths: ClassVar[Tuple[str, ...]] = ("max_output_tokens",)
    neutral: ClassVar[Dict[str, Tuple[Any, ...]]] = {
        **fields.NEUTRAL, "previous_response_id": (None,), "conversation": (None,), "background": (None, False),
        "include": (None, []), "truncation": (None, "disabled"), "max_tool_calls": (None,), "prompt": (None,),
        "context_management": (None,), "stream_options": (None, {}, {"include_obfuscation": False},
                                                          {"include_obfuscation": True}),
    }

    def chat(self) -> ChatBody:
        """The same as a chat.

        Raises:
            RequestError: an item or a tool cannot be used.
        """
        said: List[Dict[str, Any]] = []
        if self.instructions:
            said.append({"role": "system", "content": self.instructions})
        if isinstance(self.input, str):
            said.append({"role": "user", "content": self.input})
        else:
            _add_items(said, self.input)
        choice = self.tool_choice
        if isinstance(choice, dict) and choice.get("type") == "function":
            choice = {"type": "function", "function": {"name": choice.get("name")}}
        tools = [_tool(number, one) for number, one in enumerate(self.tools or [])]
        return ChatBody(model=self.model, messages=said, tools=tools, tool_choice=choice,
                        parallel_tool_calls=self.parallel_tool_calls,
                        reasoning_effort=self._effort(), chat_template_kwargs=self.chat_template_kwargs)

    def submission(self, settings: Settings, tokenizer: Any, registry: Registry) -> Dict[str, Any]:
        """As the base class, with the form that ``text.format`` asks for."""
        options = super().submission(settings, tokenizer, registry)
        wanted = {name: value for name, value in (self.text or {}).items() if value is not None}
        form = wanted.pop("format", {"type": "text"})
        for name, value in wanted.items():
            if (name, value) != ("verbosity", "medium"):
                raise RequestError(f"text.{name}={value!r:.60}: this server does not implement it; leave it out",
                                   f"text.{name}", "unsupported_parameter")
        mapping = response_format(form if isinstance(form, dict) else {}, "text.format")
        if mapping is not None:
            options["grammar"] = grammar_of(mapping, "text.format")
        return options

    def _effort(self) -> Optional[str]:
        wanted = {name: value for name, value in (self.reasoning or {}).items() if value is not None}
        effort = wanted.pop("effort", None)
        if wanted:
            name = next(iter(wanted))
            raise RequestError(f"reasoning.{name}={wanted[name]!r:.40}: this server does not implement it; leave it "
                               "out", f"reasoning.{name}", "unsupported_parameter")
        return effort


def _add_items(said: List[Dict[str, Any]], items: Sequence[Dict[str, Any]]) -> None:
    """Add the items of an input to a conversation; calls that stand together are one message's."""
    for number, item in enumerate(items):
        where, kind = f"input[{number}]", item.get("type", "message")
        if kind == "message":
            said.append({"role": item.get("role"), "content": _content(item.get("content"), where)})
        elif kind == "function_call":
            call = {"id": item.get("call_id"), "type": "function",
                    "function": {"name": item.get("name"), "arguments": item.get("arguments")}}
            if said and said[-1]["role"] == "assistant":
                said[-1].setdefault("tool_calls", []).append(call)
            else:
                said.append({"role": "assistant", "content": None, "tool_calls": [call]})
        elif kind == "function_call_output":
            said.append({"role": "tool", "tool_call_id": item.get("call_id"),
                         "content": _content(item.get("output"), where)})
        else:
            raise RequestError(f"{where} has the type {kind!r:.40}; this server reads message, function_call and "
                               "function_call_output", f"{where}.type")


def _content(content: Any, where: str) -> Any:
    """The content of an item as chats have it."""
    if not isinstance(content, list):
        return content
    made = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else part
        if kind == "refusal":
            made.append({"type": "text", "text": part.get("refusal")})
        elif kind in _TEXTS:
            made.append({"type": "text", "text": part.get("text")})
        else:
            raise RequestError(f"{where}.content has a part of the type {kind!r:.40}; this model reads text only",
                               f"{where}.content")
    return made


def _tool(number: int, tool: Dict[str, Any]) -> Dict[str, Any]:
    """A tool as chats have it: its function stands in an object of its own."""
    if tool.get("type") != "function" or "function" in tool:
        return tool
    inner = {name: value for name, value in tool.items() if name != "type" and value is not None}
    if not isinstance(inner.get("name"), str):
        raise RequestError(f"tools[{number}] has no name", f"tools[{number}].name")
    return {"type": "function", "function": inner}


class ResponseAnswers(Answers):
    """What /v1/responses gives.

    Args:
        body: the request's; options: what the engine was asked, for the fields that are told back.
        box: the tools that may be called.
    """

    def __init__(self, body: ResponsesBody, options: Dict[str, Any], box: Optional[Toolbox]) -> None:
        super().__init__(body.model)
        self._box = box
        self._number = 0  # of the next event
        sampling = options["sampling"]
        self._head = {
            "id": "resp_" + uuid.uuid4().hex, "object": "response", "created_at": self.created, "model": body.model,
            "error": None, "incomplete_details": None, "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens, "metadata": body.metadata or {},
            "parallel_tool_calls": body.parallel_tool_calls is not False, "previous_response_id": None,
            "reasoning": body.reasoning or {"effort": None, "summary": None}, "store": False,
            "temperature": sampling.temperature, "text": {"format": {"type": "text"}, **(body.text or {})},
            "tool_choice": body.tool_choice or "auto", "tools": body.tools or [], "top_p": sampling.top_p,
            "truncation": "disabled", "usage": None, "user": None,
        }
        self._parts = AnswerParts(box)
        self._output: List[Dict[str, Any]] = []
        self._open: Optional[Dict[str, Any]] = None  # the message whose text is being written

    def whole(self, completions: Sequence[Completion]) -> Dict[str, Any]:
        """The object of an answer that is not streamed."""
        completion = completions[0]
        self._take([*self._parts.push(completion.text), *self._parts.end()])
        self._close(completion)
        return self._response(completion)

    def opening(self, index: int) -> bytes:
        """The response begins."""
        return self._event("response.created", response=self._response()) + \
            self._event("response.in_progress", response=self._response())

    def piece(self, index: int, piece: Piece) -> bytes:
        """New text and calls."""
        return self._take(self._parts.push(piece.text))

    def ending(self, index: int, completion: Completion) -> bytes:
        """What was held back, and the whole."""
        rest = self._take(self._parts.end()) + self._close(completion)
        whole = self._response(completion)
        return rest + self._event(f"response.{whole['status']}", response=whole)

    def closing(self, completions: Sequence[Completion]) -> bytes:
        """Nothing: the last event has all."""
        return b""

    def failure(self, error: Dict[str, Any]) -> bytes:
        """The event of an error in a stream."""
        inner = error["error"]
        failed = {**self._response(), "status": "failed",
                  "error": {"code": inner["code"] or "server_error", "message": inner["message"]}}
        return self._event("response.failed", response=failed)

    def _response(self, completion: Optional[Completion] = None) -> Dict[str, Any]:
        if completion is None:
            return {**self._head, "status": "in_progress", "output": list(self._output)}
        found = {**self._head, "status": "completed", "output": list(self._output), "usage": _usage(completion)}
        if completion.finish_reason != "stop":
            reason = "max_output_tokens" if completion.finish_reason == "length" else completion.finish_reason
            found.update(status="incomplete", incomplete_details={"reason": reason})
        return found

    def _take(self, parts: Sequence[Part]) -> bytes:
        return b"".join(self._call(part) if isinstance(part, Call) else self._text(part) for part in parts)

    def _text(self, text: str) -> bytes:
        events = b""
        if self._open is None:
            self._open = {"id": "msg_" + uuid.uuid4().hex, "type": "message", "role": "assistant",
                          "status": "in_progress", "content": []}
            self._output.append(self._open)
            events = self._event("response.output_item.added", output_index=self._place, item=self._open)
            self._open["content"].append(_output_text(""))
            events += self._event("response.content_part.added", **self._where(), part=_output_text(""))
        self._open["content"][0]["text"] += text
        return events + self._event("response.output_text.delta", **self._where(), delta=text, logprobs=[])

    def _close_text(self, status: str = "completed") -> bytes:
        if self._open is None:
            return b""
        self._open["status"] = status
        part = self._open["content"][0]
        events = self._event("response.output_text.done", **self._where(), text=part["text"], logprobs=[]) + \
            self._event("response.content_part.done", **self._where(), part=part) + \
            self._event("response.output_item.done", output_index=self._place, item=self._open)
        self._open = None
        return events

    def _call(self, call: Call) -> bytes:
        events = self._close_text()
        item = {"id": "fc_" + uuid.uuid4().hex, "type": "function_call", "call_id": call.id, "name": call.name,
                "arguments": call.arguments, "status": "completed"}
        self._output.append(item)
        where = {"item_id": item["id"], "output_index": self._place}
        begun = {**item, "arguments": "", "status": "in_progress"}
        return events + self._event("response.output_item.added", output_index=self._place, item=begun) + \
            self._event("response.function_call_arguments.delta", **where, delta=call.arguments) + \
            self._event("response.function_call_arguments.done", **where, name=call.name, arguments=call.arguments) + \
            self._event("response.output_item.done", output_index=self._place, item=item)

    def _close(self, completion: Completion) -> bytes:
        """Close the text; an answer without any output has an empty message."""
        events = b"" if self._output else self._text("")
        return events + self._close_text("completed" if completion.finish_reason == "stop" else "incomplete")

    @property
    def _place(self) -> int:
        return len(self._output) - 1

    def _where(self) -> Dict[str, Any]:
        assert self._open is not None
        return {"item_id": self._open["id"], "output_index": self._place, "content_index": 0}

    def _event(self, kind: str, /, **content: Any) -> bytes:
        number, self._number = self._number, self._number + 1
        return event({"type": kind, "sequence_number": number, **content}, kind)


def _output_text(text: str) -> Dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _usage(completion: Completion) -> Dict[str, Any]:
    counts = usage([completion])
    return {"input_tokens": counts["prompt_tokens"], "input_tokens_details": {"cached_tokens": 0},
            "output_tokens": counts["completion_tokens"], "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": counts["total_tokens"]}
