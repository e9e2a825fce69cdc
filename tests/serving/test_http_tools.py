"""Tools over HTTP with models that write calls: chats and responses, whole, as streams, through the openai client."""

import json

import pytest

from colora_ms.serving import Engine
from colora_ms.serving.http import Server, Settings, create_app
from colora_ms.serving.http.calls import FORMATS
from tests.serving.conftest import call
from tests.serving.test_answers import scripted
from tests.serving.test_http_requests import events_of

TOOLS = [{"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": {}}}}
         for name in ("weather", "time")]
FLAT = [{"type": "function", **tool["function"]} for tool in TOOLS]
HI = [{"role": "user", "content": "q"}]
ARGUMENTS = {"city": "Ulm"}
#: A template that writes tools, calls and results, in the form of Hermes.
TEMPLATE = ("{% if tools %}T{% for tool in tools %}{{ tool.function.name }}{% endfor %}{% endif %}"
            "{% for m in messages %}<|im_start|>{{ m.role }}{{ m.content or '' }}"
            "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}<|im_end|>"
            "{% endfor %}{% if add_generation_prompt %}<|go|>{% endif %}")
#: What the model writes behind <|go|>, a token each.
PIECES = ["Let me", " see.", "\n", "<tool_call>", '{"name": "weather", ', '"arguments": {"city": "Ulm"}}',
          "</tool_call>", "<|im_end|>"]


def model_of(pieces, special=("<|im_start|>", "<|im_end|>", "<|go|>"), template=TEMPLATE, letters="", **settings):
    """(decoder, tokenizer) of a model that writes these pieces behind <|go|>, and then ends; ``letters`` are tokens,
    too."""
    from tokenizers import AddedToken, decoders, models
    from tokenizers import Tokenizer as Backend

    from colora_ms.models.tokenizer import Tokenizer

    texts = list(dict.fromkeys(["q", *pieces, *special, *letters]))
    backend = Backend(models.BPE({text: place for place, text in enumerate(texts)}, []))
    backend.add_special_tokens([AddedToken(one, special=True, normalized=False) for one in special])
    backend.add_tokens([AddedToken(one, special=False, normalized=False) for one in ["q", *pieces]
                        if one not in special])
    backend.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.Fuse()])
    tokenizer = Tokenizer(backend, {"eos_token": "<|im_end|>", "chat_template": template, **settings})
    path = [texts.index(one) for one in ("<|go|>", *pieces)]
    return scripted(dict(zip(path, path[1:])), tokenizer, 128 if letters else 32)


@pytest.fixture
def served(mindspore):
    """A function (pieces, …): URL of a server over such a model."""
    stack = []

    def serve(pieces, tool_calls="auto", **more):
        decoder, tokenizer = model_of(pieces, **more)
        engine = Engine(decoder, tokenizer, rows=2, max_length=120, chunk=1)
        server = Server(create_app(engine, Settings(tool_calls=tool_calls)))
        server.__enter__()
        stack.extend((server, engine))
        return server.url

    yield serve
    while stack:
        engine, server = stack.pop(), stack.pop()
        server.__exit__()
        engine.close()


def chat(url, **more):
    return call(url, "POST", "/v1/chat/completions", {"model": "base", "messages": HI, "tools": TOOLS, **more})


def joined(events):
    """(content, [(id, name, arguments)], reason) of a stream of chat chunks."""
    text, calls, reason = "", {}, None
    for one in events:
        for choice in one["choices"]:
            text += choice["delta"].get("content") or ""
            reason = choice["finish_reason"] or reason
            for part in choice["delta"].get("tool_calls", []):
                found = calls.setdefault(part["index"], ["", "", ""])
                found[0] += part.get("id", "")
                found[1] += part["function"].get("name", "")
                found[2] += part["function"]["arguments"]
    return text, [tuple(calls[place]) for place in sorted(calls)], reason


def test_a_call_whole_and_streamed(served):
    url = served(PIECES)
    choice = chat(url)[2]["choices"][0]
    assert choice["finish_reason"] == "tool_calls" and choice["message"]["content"] == "Let me see."
    found, = choice["message"]["tool_calls"]
    assert found["function"]["name"] == "weather" and json.loads(found["function"]["arguments"]) == ARGUMENTS
    assert found["type"] == "function" and found["id"].startswith("call_")
    text, calls, reason = joined(events_of(chat(url, stream=True)[2]))
    assert (text, reason) == ("Let me see.", "tool_calls") and len(calls) == 1
    assert calls[0][1:] == ("weather", found["function"]["arguments"])
    # Without tools, or without a wish for calls, the same is text.
    written = "".join(PIECES[:-1])
    for more in (dict(tools=None), dict(tools=[]), dict(tool_choice="none")):
        message = chat(url, **more)[2]["choices"][0]
        assert message["message"] == {"role": "assistant", "content": written} and message["finish_reason"] == "stop"


def test_a_call_that_was_cut_is_text(served):
    url = served(PIECES)
    choice = chat(url, max_tokens=5)[2]["choices"][0]
    assert choice["finish_reason"] == "length" and "tool_calls" not in choice["message"]
    assert choice["message"]["content"] == "".join(PIECES[:5])
    assert joined(events_of(chat(url, max_tokens=5, stream=True)[2])) == ("".join(PIECES[:5]), [], "length")
    assert chat(url, max_tokens=7)[2]["choices"][0]["finish_reason"] == "tool_calls"  # whole, the end is missing


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("form, pieces", [
    ("llama3", ["<|python_tag|>", '{"name": "weather", ', '"parameters": {"city": "Ulm"}}', "<|im_end|>"]),
    ("mistral", ["[TOOL_CALLS]", '[{"name": "weather", ', '"arguments": {"city": "Ulm"}}]', "<|im_end|>"]),
    ("hermes", ["<tool_call>", '{"name": "weather", ', '"arguments": {"city": "Ulm"}}', "</tool_call>", "<|im_end|>"]),
])
def test_openings_that_are_special_tokens_are_seen(served, form, pieces, special):
    own = tuple(one for one in pieces if special and one[0] in "<[" and '"' not in one and one != "<|im_end|>")
    url = served(pieces, form, special=("<|im_start|>", "<|im_end|>", "<|go|>", *own))
    message = chat(url)[2]["choices"][0]["message"]
    assert message["content"] is None and json.loads(message["tool_calls"][0]["function"]["arguments"]) == ARGUMENTS
    text = chat(url, tools=None)[2]["choices"][0]["message"]["content"]
    assert text == "".join(one for one in pieces[:-1] if one not in own)
    shown = chat(url, tools=None, skip_special_tokens=False)[2]["choices"][0]["message"]["content"]
    assert shown == "".join(pieces[:-1])


def test_one_call_at_most(served):
    twice = [*PIECES[3:-1], " ", "<tool_call> ", '{"name": "time"}', " </tool_call>", "<|im_end|>"]
    url = served(twice)
    assert [one["function"]["name"] for one in chat(url)[2]["choices"][0]["message"]["tool_calls"]] == \
        ["weather", "time"]
    for more in ({}, {"stream": True}):
        answer = chat(url, parallel_tool_calls=False, **more)[2]
        calls = joined(events_of(answer))[1] if more else answer["choices"][0]["message"]["tool_calls"]
        assert len(calls) == 1


def test_the_template_gets_tools_calls_and_results(served):
    """Counted in tokens: q, and the special tokens of the template."""
    url = served(PIECES)
    made = chat(url)[2]["choices"][0]["message"]
    history = [*HI, made, {"role": "tool", "tool_call_id": made["tool_calls"][0]["id"], "content": "q q"}]
    assert chat(url, messages=history)[0] == 200
    made["tool_calls"][0]["function"]["arguments"] = "{broken"
    status, _, answer = chat(url, messages=history)
    assert status == 400 and "not valid JSON" in answer["error"]["message"]
    assert answer["error"]["param"] == "messages[1]"


@pytest.mark.parametrize("more, param", [
    (dict(tool_choice={"type": "function", "function": {"name": "wether"}}), "tool_choice"),
    (dict(tool_choice={"type": "function"}), "tool_choice"), (dict(tool_choice=5), "tool_choice"),
    (dict(tool_choice="perhaps"), "tool_choice"), (dict(tools=[], tool_choice="required"), "tool_choice"),
    (dict(tools=[{"type": "web_search"}]), "tools[0].type"), (dict(tools=[{"type": "function"}]), "tools"),
    (dict(tools=[{"type": "function", "function": {"name": "f", "strict": True}}]), "tools[0].function.strict"),
    (dict(functions=[{"name": "f"}]), "functions"), (dict(tools="weather"), "tools"),
])
def test_refusals(served, more, param):
    status, _, answer = chat(served(PIECES), **more)
    assert status == 400 and answer["error"]["param"] == param, answer


@pytest.mark.parametrize("template, words", [
    ("{% for m in messages %}{{ m.content }}{% endfor %}<|go|>", "none of the forms"),
    ("{% for m in messages %}{{ m.content }}{% endfor %}{# <tool_call> #}<|go|>", "does not write them"),
])
def test_templates_that_know_no_tools(served, template, words):
    url = served(PIECES, template=template)
    status, _, answer = chat(url)
    assert status == 400 and words in answer["error"]["message"] and answer["error"]["param"] == "tools"
    history = [*HI, {"role": "assistant", "content": "q", "tool_calls": [{"function": {"name": "f"}}]}]
    status, _, answer = chat(url, tools=None, messages=[*history, HI[0]])
    assert status == 400 and answer["error"]["param"] == "messages[1]" and "tool_calls" in answer["error"]["message"]


def test_the_tokenizer_as_clients_ask_for_it(served):
    url = served(PIECES)
    found = call(url, "GET", "/tokenizer_info")[2]
    assert found["eos_token"] == "<|im_end|>" and found["bos_token"] is None and found["chat_template"] == TEMPLATE
    asked = {"messages": HI}
    ids = call(url, "POST", "/tokenize", asked)[2]["tokens"]
    assert call(url, "POST", "/detokenize", {"tokens": ids})[2]["prompt"] == "<|im_start|>q<|im_end|><|go|>"
    assert chat(url, tools=None)[2]["usage"]["prompt_tokens"] == len(ids)
    assert call(url, "POST", "/tokenize", {**asked, "tools": [{"type": "web"}]})[0] == 400
    with_tools = call(url, "POST", "/tokenize", {**asked, "tools": TOOLS})[2]
    assert with_tools["count"] == chat(url)[2]["usage"]["prompt_tokens"]


# -- responses --------------------------------------------------------------------------------------------------------


def respond(url, **more):
    return call(url, "POST", "/v1/responses", {"model": "base", "input": "q", **more})


def response_events(text):
    """[(name, content)]; numbers must count up, and names be the types."""
    found = []
    for block in text.strip().split("\n\n"):
        name, data = block.split("\n")
        content = json.loads(data[6:])
        assert name == f"event: {content['type']}" and content["sequence_number"] == len(found)
        found.append((content["type"], content))
    return found


def without_ids(value):
    """Without what is new in each response."""
    if isinstance(value, dict):
        return {name: without_ids(one) for name, one in value.items() if name not in ("id", "call_id", "created_at")}
    return [without_ids(one) for one in value] if isinstance(value, list) else value


def test_a_response_whole_and_as_events(served):
    url = served(PIECES)
    status, _, whole = respond(url, tools=FLAT, instructions="q")
    assert status == 200 and whole["object"] == "response" and whole["status"] == "completed"
    said, made = whole["output"]
    assert said["content"] == [{"type": "output_text", "text": "Let me see.", "annotations": [], "logprobs": []}]
    assert made["type"] == "function_call" and made["name"] == "weather"
    assert json.loads(made["arguments"]) == ARGUMENTS and whole["usage"]["output_tokens"] == len(PIECES)
    events = response_events(respond(url, tools=FLAT, instructions="q", stream=True)[2])
    names = [name for name, _ in events]
    assert names[:4] == ["response.created", "response.in_progress", "response.output_item.added",
                         "response.content_part.added"]
    assert names[-9:] == ["response.output_text.delta", "response.output_text.done", "response.content_part.done",
                          "response.output_item.done", "response.output_item.added",
                          "response.function_call_arguments.delta", "response.function_call_arguments.done",
                          "response.output_item.done", "response.completed"]
    assert "".join(one["delta"] for name, one in events if name == "response.output_text.delta") == "Let me see."
    assert without_ids(events[-1][1]["response"]) == without_ids(whole)
    assert without_ids(events[0][1]["response"])["output"] == []


def test_a_conversation_of_items(served):
    """The same prompt as the chat that says the same."""
    url = served(PIECES)
    made = respond(url, tools=FLAT)[2]["output"]
    items = [{"role": "user", "content": [{"type": "input_text", "text": "q"}]}, *made,
             {"type": "function_call_output", "call_id": made[1]["call_id"], "output": "q q"}]
    answer = respond(url, tools=FLAT, input=items)[2]
    history = [*HI, {"role": "assistant", "content": "Let me see.", "tool_calls": [
        {"id": made[1]["call_id"], "type": "function",
         "function": {"name": "weather", "arguments": made[1]["arguments"]}}]},
        {"role": "tool", "tool_call_id": made[1]["call_id"], "content": "q q"}]
    assert answer["usage"]["input_tokens"] == chat(url, messages=history)[2]["usage"]["prompt_tokens"]


def test_a_response_that_is_cut(served):
    url = served(PIECES)
    whole = respond(url, max_output_tokens=2)[2]
    assert whole["status"] == "incomplete" and whole["incomplete_details"] == {"reason": "max_output_tokens"}
    assert whole["output"][0]["status"] == "incomplete" and whole["max_output_tokens"] == 2
    assert response_events(respond(url, max_output_tokens=2, stream=True)[2])[-1][0] == "response.incomplete"


@pytest.mark.parametrize("more, param", [
    (dict(previous_response_id="resp_1"), "previous_response_id"), (dict(background=True), "background"),
    (dict(max_output_tokens=0), "max_output_tokens"), (dict(max_tokens=5), "max_tokens"),
    (dict(tools=[{"type": "web_search"}]), "tools[0].type"), (dict(reasoning={"summary": "auto"}), "reasoning.summary"),
    (dict(text={"format": {"type": "xml"}}), "text.format"), (dict(input=[{"type": "item"}]), "input[0].type"),
    (dict(input=[{"role": "user", "content": [{"type": "input_image"}]}]), "input[0].content"),
    (dict(include=["message.output_text.logprobs"]), "include"), (dict(input=None), "input"),
])
def test_refused_responses(served, more, param):
    status, _, answer = respond(served(PIECES), **more)
    assert status == 400 and answer["error"]["param"] == param, answer


# -- calls that must be ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form, special",
                         [("hermes", False), ("hermes", True), ("mistral", True), ("llama3", False)])
def test_a_model_that_would_rather_talk_must_call(served, form, special):
    pytest.importorskip("llguidance", reason="llguidance is not installed: pip install 'colora-ms[constraints]'")
    opening, closing = FORMATS[form].opening, FORMATS[form].closing
    own = [one for one in (opening, closing) if one and special]
    letters = [chr(code) for code in range(32, 127)]
    special = ("<|im_start|>", "<|im_end|>", "<|go|>", *own)
    url = served(["Let me", "<|im_end|>"], form, special=special, letters=letters)
    only = {"type": "object", "properties": {"city": {"const": "Ulm"}}, "required": ["city"],
            "additionalProperties": False}
    tools = [{"type": "function", "function": {"name": name, "parameters": only, "strict": True}}
             for name in ("weather", "time")]
    assert chat(url, tool_choice="none")[2]["choices"][0]["message"]["content"] == "Let me"
    for name in ("weather", "time"):
        chosen = {"type": "function", "function": {"name": name}}
        status, _, answer = chat(url, tools=tools, tool_choice=chosen, max_tokens=100)
        assert status == 200, answer
        answer = answer["choices"][0]
        assert answer["finish_reason"] == "tool_calls" and answer["message"]["content"] is None, answer
        call, = answer["message"]["tool_calls"]
        assert call["function"]["name"] == name and json.loads(call["function"]["arguments"]) == ARGUMENTS
    item = respond(url, tools=[{"type": "function", **tool["function"]} for tool in tools], max_output_tokens=100,
                   tool_choice={"type": "function", "name": "weather"})[2]["output"][0]
    assert item["type"] == "function_call" and json.loads(item["arguments"]) == ARGUMENTS
