"""What common clients send beside the plain fields: fields that ask for nothing, several answers, chats with all that
former answers hold, templates' variables, ids of texts, adapters by path, pages of other origins."""

import json

import pytest

from colora_ms.decoding import Sampling
from colora_ms.errors import ConfigError
from colora_ms.serving.http import Server, Settings, create_app
from tests.serving.conftest import call, write_adapter

USER = {"role": "user", "content": "5 6"}


def complete(ask, **more):
    status, _, answer = ask("POST", "/v1/completions", {"model": "tiny", "prompt": "5 6", "max_tokens": 4, **more})
    return status, answer


def chat(ask, *messages, **more):
    body = {"model": "tiny", "messages": list(messages) or [USER], "max_tokens": 4, **more}
    status, _, answer = ask("POST", "/v1/chat/completions", body)
    return status, answer


def events_of(text):
    """The JSON of each server-sent event; the last must be [DONE]."""
    lines = [line[6:] for line in text.split("\n") if line.startswith("data: ")]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


# -- section F: fields that ask for nothing, or for something plain ---------------------------------------------------


NOTHING = [
    dict(repetition_penalty=1.0), dict(min_p=0), dict(skip_special_tokens=True), dict(top_k=-1), dict(top_k=0),
    dict(verbosity="medium"), dict(presence_penalty=0.0), dict(frequency_penalty=0), dict(logit_bias={}),
    dict(best_of=1), dict(n=None), dict(stop_token_ids=[]), dict(length_penalty=1.0), dict(use_beam_search=False),
    dict(include_stop_str_in_output=False), dict(spaces_between_special_tokens=True), dict(min_tokens=0),
    dict(guided_json=None), dict(repeat_penalty=1.0), dict(typical_p=1.0), dict(mirostat=0), dict(lora=[]),
    dict(response_format={"type": "text"}), dict(user="a", metadata={"a": "b"}, store=True, service_tier="auto"),
    dict(logprobs=None), dict(suffix=""), dict(seed=None), dict(stop=None), dict(top_p=None), dict(cache_prompt=True),
]


@pytest.mark.parametrize("change", NOTHING)
def test_what_asks_for_nothing_changes_nothing(ask, change):
    wanted = complete(ask)[1]["choices"][0]["text"]
    status, answer = complete(ask, **change)
    assert status == 200, answer
    assert answer["choices"][0]["text"] == wanted


@pytest.mark.parametrize("change, param", [
    (dict(repetition_penalty=True), "repetition_penalty"), (dict(length_penalty=2.0), "length_penalty"),
    (dict(skip_special_tokens=0), "skip_special_tokens"), (dict(top_k=-2, temperature=1.0), "top_k"),
    (dict(verbosity="low"), "verbosity"), (dict(guided_choice=[5]), None), (dict(mirostat=2), "mirostat"),
    (dict(use_beam_search=True), "use_beam_search"), (dict(top_p=1.5, temperature=1.0), "top_p"),
    (dict(max_tokens=2.0), "max_tokens"), (dict(best_of=0), "best_of"), (dict(stop_token_ids=[97]), None),
])
def test_what_asks_for_something_else_is_refused_by_its_name(ask, change, param):
    status, answer = complete(ask, **change)
    assert status == 400 and (param is None or answer["error"]["param"] == param), answer


def test_max_tokens_of_minus_one_is_as_many_as_there_may_be(ask):
    found = complete(ask, max_tokens=-1, ignore_eos=True)[1]["usage"]["completion_tokens"]
    assert found == 80  # the server's limit
    status, answer = chat(ask, max_completion_tokens=0)
    assert status == 400 and answer["error"]["param"] == "max_completion_tokens"
    assert "max_new_tokens" not in answer["error"]["message"]


def test_messages_as_clients_send_back_what_they_got(ask):
    plain = [USER, {"role": "assistant", "content": "7 8"}, {"role": "user", "content": "9"}]
    wanted = chat(ask, *plain)[1]
    more = dict(refusal=None, annotations=[], audio=None, function_call=None, tool_calls=[], reasoning_content=None)
    for second in (dict(plain[1], **more), dict(plain[1], reasoning_content="hm"), dict(plain[1], name="someone"),
                   {"role": "assistant", "content": [{"type": "text", "text": "7 "}, {"type": "text", "text": "8"}]},
                   dict(plain[1], parsed={"a": 1}, reasoning="hm", logprobs=None, function_call=None),
                   {"role": "assistant", "content": [{"type": "text", "text": "7 8", "annotations": [], "index": 0,
                                                      "cache_control": {"type": "ephemeral"}}]},
                   {"role": "assistant", "content": [{"type": "refusal", "refusal": "7 8"}]},
                   {"role": "assistant", "content": None, "refusal": "7 8"}):
        status, answer = chat(ask, plain[0], second, plain[2])
        assert status == 200 and answer["choices"][0]["message"] == wanted["choices"][0]["message"], answer
        assert answer["usage"] == wanted["usage"]
    empty = chat(ask, USER, {"role": "assistant", "content": ""}, USER)[1]
    for second in ({"role": "assistant", "content": None, "tool_calls": []}, {"role": "assistant"}):
        assert chat(ask, USER, second, USER)[1]["usage"] == empty["usage"]
    for second in (dict(plain[1], weight=1), dict(plain[1], audio={"id": "x"}), dict(plain[1], something="else"),
                   dict(plain[1], function_call={"name": "f", "arguments": "{}"})):
        status, answer = chat(ask, USER, second, USER)
        assert status == 400 and answer["error"]["param"] == "messages[1]", answer


def test_a_developer_is_the_system_where_the_template_knows_none(ask):
    found = [chat(ask, {"role": role, "content": "7"}, USER)[1] for role in ("system", "developer")]
    assert found[0]["choices"] == found[1]["choices"] and found[0]["usage"] == found[1]["usage"]


def test_switches_of_reasoning_are_no_business_of_a_template_without_them(ask):
    for value in (True, False):
        assert chat(ask, chat_template_kwargs={"enable_thinking": value})[0] == 200
    assert chat(ask, chat_template_kwargs={})[0] == 200
    status, answer = chat(ask, chat_template_kwargs={"enable_thinkin": True})
    assert status == 400 and answer["error"]["param"] == "chat_template_kwargs.enable_thinkin"
    status, answer = chat(ask, chat_template_kwargs={"tools": []})
    assert status == 400 and "a field of its own" in answer["error"]["message"]
    status, answer = chat(ask, reasoning_effort="high")
    assert status == 400 and answer["error"]["param"] == "reasoning_effort"


# -- several answers --------------------------------------------------------------------------------------------------


def test_n_answers_have_seeds_of_their_own(ask, served):
    body = dict(temperature=1.2, seed=11, n=3, ignore_eos=True, max_tokens=10)
    wanted = [served[0].submit("5 6", sampling=Sampling(1.2, seed=11 + place), max_new_tokens=10, ignore_eos=True)
              .result(60).text for place in range(3)]
    status, answer = complete(ask, **body)
    assert [(one["index"], one["text"]) for one in answer["choices"]] == list(enumerate(wanted)), answer
    assert len(set(wanted)) == 3
    assert answer["usage"] == {"prompt_tokens": 2, "completion_tokens": 30, "total_tokens": 32}
    assert complete(ask, **body, best_of=3)[1]["choices"] == answer["choices"]
    texts = {one["text"] for one in complete(ask, **{**body, "seed": None})[1]["choices"]}
    assert len(texts) == 3


@pytest.mark.parametrize("route", ["completions", "chat/completions"])
def test_a_stream_of_several_answers_joins_to_the_whole(ask, route):
    asked = {"prompt": ["5 6", "9"]} if route == "completions" else {"messages": [USER]}
    body = {"model": "a1", **asked, "n": 2, "temperature": 1.0, "seed": 5, "max_tokens": 12, "ignore_eos": True}
    whole = ask("POST", f"/v1/{route}", body)[2]
    events = events_of(ask("POST", f"/v1/{route}", {**body, "stream": True,
                                                    "stream_options": {"include_usage": True}})[2])
    assert events.pop()["usage"] == whole["usage"]
    texts, reasons = {}, {}
    for one in events:
        choice, = one["choices"]
        texts[choice["index"]] = texts.get(choice["index"], "") + (
            choice["text"] if "text" in choice else choice["delta"].get("content", ""))
        reasons[choice["index"]] = choice["finish_reason"] or reasons.get(choice["index"])
    wanted = [one["text"] if "text" in one else one["message"]["content"] for one in whole["choices"]]
    assert [texts[place] for place in range(len(wanted))] == wanted and len(set(wanted)) == len(wanted)
    assert len(wanted) == (4 if route == "completions" else 2) and set(reasons.values()) == {"length"}


def test_prompts_of_ids_and_echo_with_n(ask):
    answer = complete(ask, prompt=[[5, 6], [9]], n=2, echo=True, max_tokens=3)[1]
    assert [one["text"][:2] for one in answer["choices"][:2]] == ["5 ", "5 "]
    assert [one["text"][0] for one in answer["choices"]] == ["5", "5", "9", "9"]
    assert answer["usage"]["prompt_tokens"] == 3


def test_all_answers_or_none(ask, served):
    engine = served[0]
    before = engine.stats()
    status, answer = complete(ask, prompt=[[5], [6], [97]], n=2)  # the last prompt's id is none
    assert status == 400 and "97" in answer["error"]["message"]
    while engine.stats()["running"] or engine.stats()["waiting"] or engine.stats()["starting"]:
        pass
    after = engine.stats()
    assert after["cancelled"] + after["finished"] - before["cancelled"] - before["finished"] == 4


# -- prompts of chats -------------------------------------------------------------------------------------------------


def test_going_on_with_the_last_message(goldens):
    """Against what the template writes: the answer stands behind the last message's own text."""
    from colora_ms.serving.http.conversation import conversation
    from colora_ms.serving.http.failures import RequestError
    from colora_ms.serving.http.schema import ChatBody

    class Chat:
        chat_template = (goldens / "chat_templates" / "chatml.jinja").read_text()

        def apply_chat_template(self, messages, add_generation_prompt=True, **more):
            from colora_ms.models.chat_template import render

            goes_on = more.pop("continue_final_message", False)
            return render(self.chat_template, messages, add_generation_prompt, more, goes_on)

    messages = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "It is"}]
    texts = {}
    for name, fields in (("open", {}), ("on", dict(continue_final_message=True)),
                         ("closed", dict(add_generation_prompt=False))):
        body = ChatBody(model="x", messages=messages, **fields)
        texts[name] = conversation(body, Chat()).text(Chat())
    assert texts["on"].endswith("assistant\nIt is") and texts["closed"].startswith(texts["on"])
    assert texts["open"].startswith(texts["closed"]) and texts["open"].endswith("<|im_start|>assistant\n")
    with pytest.raises(RequestError, match="send one of them"):
        conversation(ChatBody(model="x", messages=messages, continue_final_message=True, add_generation_prompt=True),
                     Chat())


def test_variables_of_templates(goldens):
    from colora_ms.models.chat_template import variables_of

    names = variables_of((goldens / "chat_templates" / "qwen3.jinja").read_text())
    assert {"messages", "tools", "enable_thinking", "add_generation_prompt"} <= names
    assert "date_string" in variables_of((goldens / "chat_templates" / "llama31.jinja").read_text())
    assert "tool_call" not in names


# -- ids of texts -----------------------------------------------------------------------------------------------------


def test_tokenize_and_detokenize(ask):
    assert ask("POST", "/tokenize", {"model": "a0", "prompt": "5 6 7"})[2] == {
        "count": 3, "max_model_len": 96, "tokens": [5, 6, 7], "token_strs": None}
    found = ask("POST", "/tokenize", {"messages": [USER], "return_token_strs": True})[2]
    assert found["tokens"] == [91, 5, 6, 92] and found["token_strs"] == ["91", "5", "6", "92"]
    assert ask("POST", "/tokenize", {"messages": [USER], "add_generation_prompt": False})[2]["count"] == 3
    assert ask("POST", "/tokenize", {"content": "5 6"})[2] == {"tokens": [5, 6]}
    assert ask("POST", "/tokenize", {"content": "5", "with_pieces": True})[2] == {"tokens": [{"id": 5, "piece": "5"}]}
    assert ask("POST", "/detokenize", {"tokens": [5, 6]})[2] == {"prompt": "5 6", "content": "5 6"}
    for body, param in (({}, "prompt"), ({"prompt": "5", "content": "6"}, "prompt"), ({"prompt": 5}, "prompt"),
                        ({"prompt": "5", "parse_special": False}, "parse_special")):
        status, _, answer = ask("POST", "/tokenize", body)
        assert status == 400 and answer["error"]["param"] == param
    assert ask("POST", "/tokenize", {"prompt": "5", "model": "nobody"})[0] == 404
    assert ask("POST", "/detokenize", {"tokens": [97]})[0] == 400
    assert ask("POST", "/detokenize", {"tokens": [-1]})[0] == 400


def test_health(ask):
    assert ask("GET", "/health")[0] == 200 and ask("GET", "/health")[2]["status"] == "ok"


# -- adapters by path -------------------------------------------------------------------------------------------------


def test_adapters_by_path(engine, tmp_path):
    other = tmp_path / "others"
    write_adapter(other / "extra", seed=77, r=2)
    write_adapter(tmp_path / "secret", seed=78, r=2)
    (other / "broken").mkdir()
    (other / "link").symlink_to(tmp_path / "secret")
    app = create_app(engine, Settings(base_model="tiny", adapter_roots=(str(other),)))
    with Server(app) as server:
        def post(path, **body):
            return call(server.url, "POST", path, body)

        def answer(model):
            return post("/v1/completions", model=model, prompt="5 6", max_tokens=6, ignore_eos=True)

        status, _, text = post("/v1/load_lora_adapter", lora_name="other", lora_path=str(other / "extra"))
        assert status == 200 and "other" in text and "Success" in text
        assert "other" in [one["id"] for one in call(server.url, "GET", "/v1/models")[2]["data"]]
        assert answer("other")[0] == 200
        assert answer("other")[2]["choices"][0]["text"] != answer("tiny")[2]["choices"][0]["text"]
        status, _, found = post("/v1/load_lora_adapter", lora_name="other", lora_path=str(other / "extra"))
        assert status == 400 and "already" in found["error"]["message"]
        assert post("/v1/load_lora_adapter", lora_name="other", lora_path=str(other / "extra"),
                    load_inplace=True)[0] == 200
        assert post("/v1/load_lora_adapter", lora_name="a0", lora_path="a0")[0] == 200  # its own folder: read anew
        assert post("/v1/load_lora_adapter", lora_name="again", lora_path="a0")[0] == 200
        assert answer("again")[2]["choices"][0]["text"] == answer("a0")[2]["choices"][0]["text"]
        for path in (tmp_path / "secret", other / "link", other / ".." / "secret", other, "/etc", "../../etc"):
            status, _, found = post("/v1/load_lora_adapter", lora_name="new", lora_path=str(path))
            assert status == 400 and "outside" in found["error"]["message"], path
        for body in (dict(lora_name="new", lora_path=str(other / "broken")), dict(lora_name="new"), dict(lora_path="x"),
                     dict(lora_name="../new", lora_path=str(other / "extra")),
                     dict(lora_name="tiny", lora_path=str(other / "extra"))):
            assert post("/v1/load_lora_adapter", **body)[0] == 400, body
        assert post("/v1/load_lora_adapter", lora_name="new", lora_path=str(other / "nothing"))[0] in (400, 404)
        assert answer("new")[0] == 404
        for name in ("other", "again"):
            assert post("/v1/unload_lora_adapter", lora_name=name)[0] == 200
            assert answer(name)[0] == 404
        assert post("/v1/unload_lora_adapter", lora_name="other")[0] == 404


# -- pages of other origins -------------------------------------------------------------------------------------------


def test_cors_is_an_option(engine, ask):
    asked = {"Origin": "https://a.example", "Access-Control-Request-Method": "POST",
             "Access-Control-Request-Headers": "authorization,content-type"}
    assert ask("OPTIONS", "/v1/chat/completions", headers=asked)[0] == 405
    app = create_app(engine, Settings(base_model="tiny", token="s3cret", cors=("https://a.example",)))
    with Server(app) as server:
        status, headers, _ = call(server.url, "OPTIONS", "/v1/chat/completions", headers=asked)
        assert status == 200 and headers["Access-Control-Allow-Origin"] == "https://a.example"
        assert "authorization" in headers["Access-Control-Allow-Headers"]
        assert call(server.url, "OPTIONS", "/v1/models", headers={**asked, "Origin": "https://b.example"})[0] == 400
        status, headers, _ = call(server.url, "GET", "/v1/models", headers={"Origin": "https://a.example"})
        assert status == 401 and headers["Access-Control-Allow-Origin"] == "https://a.example"
        assert call(server.url, "GET", "/health")[0] == 200
    for origin in ("a.example", "https://a.example/x", ""):
        with pytest.raises(ConfigError, match="origin"):
            Settings(cors=(origin,))


@pytest.mark.parametrize("options, words", [
    (["--cors", "example.org"], "is not an origin"), (["--allow-adapters-from", "/nowhere/at/all"], "no folder"),
    (["--mixes", "/nowhere/at/all"], "no folder"), (["--tool-calls", "xml"], "invalid choice"),
])
def test_the_commands_options_are_checked_before_the_model_is_loaded(capsys, options, words):
    from colora_ms.cli import main

    try:
        code = main(["serve", "--model", "/no/such/model", *options])
    except SystemExit as stop:
        code = stop.code
    assert code and words in capsys.readouterr().err


class Templated:
    """A tokenizer that is only a chat template."""

    def __init__(self, source, special):
        self.chat_template, self._special = source, special

    def apply_chat_template(self, messages, add_generation_prompt=True, continue_final_message=False, **more):
        from colora_ms.models.chat_template import render

        return render(self.chat_template, messages, add_generation_prompt, {**self._special, **more},
                      continue_final_message)


@pytest.mark.parametrize("name", ["qwen25", "llama31"])
def test_a_chats_prompt_is_the_one_of_transformers(goldens, name):
    """With arguments as the JSON texts that OpenAI's messages have. (Parts of a content are joined here, a tool's
    result is a text, and no tools are none.)"""
    from colora_ms.serving.http.conversation import conversation, toolbox
    from colora_ms.serving.http.schema import ChatBody

    golden = json.loads((goldens / "chat_templates.json").read_text())
    tokenizer = Templated((goldens / "chat_templates" / f"{name}.jinja").read_text(), golden["special"])
    compared = set()
    for case in golden["cases"]:
        messages, variables = golden["conversations"][case["name"]]
        if case["template"] != f"{name}.jinja" or "error" in case or set(variables) - {"tools"} \
                or case["name"] in ("tool gives an object", "parts") or variables.get("tools") == [] \
                or case["mode"] == "continue" and "tool_calls" in messages[-1]:  # which is cut off, and so refused
            continue
        messages = json.loads(json.dumps(messages))
        for made in (one for message in messages for one in message.get("tool_calls", [])):
            made["function"]["arguments"] = json.dumps(made["function"]["arguments"], ensure_ascii=False)
        body = ChatBody(model="x", messages=messages, **variables, add_generation_prompt=case["mode"] == "open",
                        continue_final_message=case["mode"] == "continue")
        asked = conversation(body, tokenizer, toolbox(body, tokenizer, "auto"))
        assert asked.text(tokenizer) == case["text"], case["name"]
        compared.add((case["name"], case["mode"]))
    assert len(compared) > 20 and {("tools", "open"), ("turns", "continue")} <= compared
