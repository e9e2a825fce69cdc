"""What chooses the tokens, over HTTP: penalties, bias, mixes, an adapter's strength, forms of answers, as the engine
has it; log-probabilities in streams."""

import importlib.util
import json

import numpy as np
import pytest

from colora_ms.decoding import Sampling
from colora_ms.serving import Engine
from colora_ms.serving.http import Server, Settings, create_app
from tests.serving.conftest import call
from tests.serving.test_http_requests import events_of
from tests.serving.test_http_tools import TEMPLATE, TOOLS, joined

PROMPT = [5, 17, 33, 8]


def complete(ask, **more):
    body = {"model": "a1", "prompt": PROMPT, "max_tokens": 12, "ignore_eos": True, **more}
    status, _, answer = ask("POST", "/v1/completions", body)
    return status, answer


@pytest.mark.parametrize("fields, options", [
    (dict(presence_penalty=1.5), dict(presence_penalty=1.5)), (dict(frequency_penalty=2), dict(frequency_penalty=2.0)),
    (dict(repetition_penalty=1.3), dict(repetition_penalty=1.3)),
    (dict(repeat_penalty=1.3), dict(repetition_penalty=1.3)),
    (dict(logit_bias={"44": 100.0, "9": -100}), dict(logit_bias={44: 100.0, 9: -100.0})),
    (dict(min_tokens=12, ignore_eos=False), dict(min_tokens=12, ignore_eos=False)),
    (dict(adapter_scale=0.5), dict(adapter_scale=0.5)),
    (dict(model="tiny", lora=[{"name": "a1", "scale": 0.5}]), dict(adapter_scale=0.5)),
    (dict(model="tiny", lora=[{"id": 1, "scale": 0.5}, {"id": 2, "scale": 0}]), dict(adapter_scale=0.5)),
    (dict(lora=[{"id": 1, "scale": 2.0}]), dict(adapter_scale=2.0)),
    (dict(model="tiny", mix={"ensemble": {"adapters": ["a0", "a1", None], "mean": "prob"}}),
     dict(adapter=None, mix={"ensemble": {"adapters": ["a0", "a1", None], "mean": "prob"}})),
    (dict(model="tiny", mix={"guide": {"expert": "a0", "anti": "a2", "gamma": 1.5}}),
     dict(adapter=None, mix={"guide": {"expert": "a0", "anti": "a2", "gamma": 1.5}})),
    (dict(mix={"negative": {"prompt": "5 6", "gamma": 2.0}}), dict(mix={"negative": {"prompt": "5 6", "gamma": 2.0}})),
])
def test_the_fields_are_the_engines_options(ask, served, fields, options):
    options = {"adapter": "a1", "max_new_tokens": 12, "ignore_eos": True, **options}
    wanted = served[0].submit(PROMPT, **options).result(60)
    status, answer = complete(ask, **fields)
    assert status == 200, answer
    assert answer["choices"][0]["text"] == wanted.text and answer["usage"]["completion_tokens"] == len(wanted.tokens)


def test_the_options_change_something(ask):
    plain = complete(ask)[1]["choices"][0]["text"]
    for fields in (dict(presence_penalty=2.0, frequency_penalty=2.0), dict(logit_bias={"44": 100.0}),
                   dict(adapter_scale=0.0), dict(model="tiny", mix={"ensemble": {"adapters": ["a0", "a1", None]}})):
        assert complete(ask, **fields)[1]["choices"][0]["text"] != plain
    assert complete(ask, adapter_scale=0.0)[1]["choices"][0]["text"] == complete(ask, model="tiny")[1]["choices"][0][
        "text"]
    assert set(complete(ask, logit_bias={"44": 100.0})[1]["choices"][0]["text"].split()) == {"44"}


@pytest.mark.parametrize("fields, words", [
    (dict(lora=[{"id": 0, "scale": 1}]), "different adapters"), (dict(lora=[{"id": 9}]), "lora[0].id=9"),
    (dict(lora=[{"scale": 1}]), "expected"), (dict(lora=[{"name": "a1"}, {"name": "a2"}]), "does not add adapters"),
    (dict(lora=[{"name": "a1", "scale": "x"}]), "lora[0].scale"), (dict(lora={"name": "a1"}), "list"),
    (dict(lora=[{"name": "a1", "scale": 2.0}], adapter_scale=1.0), "say the same thing differently"),
    (dict(mix={"ensamble": {}}), "'ensamble'"), (dict(mix={"ensemble": {"adapters": []}}), "adapters"),
    (dict(mix={}, model="tiny"), "mapping"), (dict(contrast={}, mix={"negative": {"prompt": "5"}}), "give one of them"),
    (dict(repetition_penalty=1.2, repeat_penalty=1.3), "say the same thing"),
    (dict(repetition_penalty=0.0), "(0, 100]"),
    (dict(logit_bias={"97": 1.0}), "97"), (dict(logit_bias={"5": 101}), "logit_bias[5]"),
    (dict(mix={"ensemble": {"adapters": ["a0", "nobody"]}}, model="tiny"), "nobody"),
    (dict(response_format={"type": "yaml"}), "response_format"), (dict(grammar="root ::= x"), "GBNF"),
    (dict(guided_regex="a", guided_choice=["b"]), "both say"),
    (dict(structured_outputs={"json": {}, "regex": "a"}), "expected one of"),
])
def test_refusals(ask, fields, words):
    status, answer = complete(ask, **fields)
    assert status in (400, 404) and words in answer["error"]["message"], answer


def test_adapters_by_their_numbers(ask):
    found = ask("GET", "/lora-adapters")[2]
    assert found[1] == {"id": 1, "path": "a1", "scale": 0.0} and [one["id"] for one in found] == list(range(len(found)))


def test_records_of_a_mix_tell_every_voice(ask):
    answer = complete(ask, model="tiny", mix={"ensemble": {"adapters": ["a0", "a1"]}}, records=True)[1]
    for record in answer["choices"][0]["records"]:
        assert [role for role, _ in record["voices"]] == ["a0", "a1"]
        assert all(value <= 0 for _, value in record["voices"])


# -- log-probabilities in streams, and of mixtures ------------------------------------------------------------------


def test_a_stream_of_log_probabilities_joins_to_the_whole(ask):
    body = {"model": "a1", "prompt": ["5 6 7", "9"], "max_tokens": 9, "logprobs": 2, "echo": True, "temperature": 0.8,
            "seed": 4, "n": 2, "ignore_eos": True}
    whole = ask("POST", "/v1/completions", body)[2]["choices"]
    found = [{"text": "", "tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []} for _ in whole]
    for event in events_of(ask("POST", "/v1/completions", {**body, "stream": True})[2]):
        choice, = event["choices"]
        found[choice["index"]]["text"] += choice["text"]
        for name, values in (choice["logprobs"] or {}).items():
            found[choice["index"]][name] += values
    for streamed, choice in zip(found, whole):
        assert streamed.pop("text") == choice["text"] and streamed == choice["logprobs"]
        assert len(streamed["tokens"]) in (9 + 3, 9 + 1)


def test_a_chats_stream_of_log_probabilities(ask):
    body = {"model": "a1", "messages": [{"role": "user", "content": "5"}], "max_tokens": 7, "logprobs": True,
            "top_logprobs": 3, "ignore_eos": True, "contrast": {"alpha": 0.1, "beta": 0.5}}
    whole = ask("POST", "/v1/chat/completions", body)[2]["choices"][0]["logprobs"]["content"]
    found = []
    for event in events_of(ask("POST", "/v1/chat/completions", {**body, "stream": True})[2]):
        found += (event["choices"][0]["logprobs"] or {"content": []})["content"]
    assert found == whole and len(whole) == 7
    assert all(one["logprob"] == one["top_logprobs"][0]["logprob"] for one in whole)  # greedy: the best of the mixture


def test_log_probabilities_are_those_before_temperature(ask, served):
    cold, hot = (complete(ask, logprobs=1, temperature=value, seed=1, max_tokens=1)[1]["choices"][0]["logprobs"]
                 for value in (0.0, 1.7))
    wanted = served[0].submit(PROMPT, adapter="a1", sampling=Sampling(1.7, seed=1), max_new_tokens=1, logprobs=1,
                              ignore_eos=True).result(60)
    assert max(cold["top_logprobs"][0].values()) == max(hot["top_logprobs"][0].values())
    assert hot["token_logprobs"] == [wanted.logprobs[0].logprob]


# -- forms of answers -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stories(shared, mindspore):
    """URL of a server over stories260k with a chat template that writes tools."""
    if importlib.util.find_spec("llguidance") is None:
        pytest.skip("llguidance is not installed: pip install 'colora-ms[constraints]'")
    from colora_ms.models import load_model

    decoder, tokenizer = load_model(str(shared / "data" / "stories260k"), max_positions=512)
    tokenizer.chat_template, tokenizer.chat_templates = TEMPLATE, {"default": TEMPLATE}
    with Engine(decoder, tokenizer, rows=4, max_length=400, chunk=4) as engine:
        with Server(create_app(engine, Settings(base_model="stories"))) as server:
            yield server.url


SCHEMA = {"type": "object", "properties": {"city": {"enum": ["Ulm", "Rome"]}, "days": {"type": "integer", "minimum": 1,
                                                                                       "maximum": 9}},
          "required": ["city", "days"], "additionalProperties": False}


def chat(url, path="/v1/chat/completions", **more):
    body = {"model": "stories", "max_tokens": 120, "messages": [{"role": "user", "content": "Once"}], **more}
    status, _, answer = call(url, "POST", path, body)
    assert status == 200, answer
    return answer


@pytest.mark.parametrize("fields, fits", [
    (dict(response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}), json.loads),
    (dict(guided_json=SCHEMA), json.loads), (dict(structured_outputs={"json": SCHEMA}), json.loads),
    (dict(json_schema=json.dumps(SCHEMA)), json.loads),
    (dict(guided_regex="[a-c]{3}"), lambda text: len(text) == 3 and set(text) <= set("abc")),
    (dict(guided_choice=["yes", "no"]), ["yes", "no"].index), (dict(grammar={"choice": ["x"]}), ["x"].index),
])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_answers_keep_to_a_form(stories, fields, fits, temperature):
    choice = chat(stories, **fields, temperature=temperature, seed=2)["choices"][0]
    assert choice["finish_reason"] == "stop"
    found = fits(choice["message"]["content"])
    assert found is not False
    if isinstance(found, dict):
        assert found["city"] in ("Ulm", "Rome") and 1 <= found["days"] <= 9


@pytest.mark.parametrize("choice, names", [("required", {"weather", "time"}),
                                           ({"type": "function", "function": {"name": "time"}}, {"time"})])
def test_a_call_that_must_be(stories, choice, names):
    tools = [{"type": "function", "function": {**tool["function"], "parameters": SCHEMA, "strict": True}}
             for tool in TOOLS]
    more = dict(tools=tools, tool_choice=choice, parallel_tool_calls=False, temperature=0.7, seed=3)
    answer = chat(stories, **more)["choices"][0]
    assert answer["finish_reason"] == "tool_calls" and answer["message"]["content"] is None, answer
    made, = answer["message"]["tool_calls"]
    assert made["function"]["name"] in names and json.loads(made["function"]["arguments"])["city"] in ("Ulm", "Rome")
    text, calls, reason = joined(events_of(chat(stories, **more, stream=True)))
    assert (text, reason) == ("", "tool_calls") and calls[0][1:] == (made["function"]["name"],
                                                                    made["function"]["arguments"])


def test_a_response_of_a_form(stories):
    form = {"type": "json_schema", "name": "x", "schema": SCHEMA, "strict": True}
    status, _, answer = call(stories, "POST", "/v1/responses", {"model": "stories", "input": "Once",
                                                                "text": {"format": form}, "max_output_tokens": 120})
    assert status == 200 and answer["text"]["format"] == form
    assert set(json.loads(answer["output"][0]["content"][0]["text"])) == {"city", "days"}


def test_openais_client_parses_a_model(stories):
    openai, pydantic = pytest.importorskip("openai"), pytest.importorskip("pydantic")

    class Trip(pydantic.BaseModel):
        city: str = pydantic.Field(pattern="^[A-Z][a-z]{1,5}$")
        days: int = pydantic.Field(ge=1, le=9)

    client = openai.OpenAI(base_url=stories + "/v1", api_key="none", max_retries=0)
    answer = client.chat.completions.parse(model="stories", messages=[{"role": "user", "content": "Once"}],
                                           response_format=Trip, max_tokens=120)
    assert isinstance(answer.choices[0].message.parsed, Trip)


def test_a_grammar_that_cannot_be_read(stories):
    for fields in (dict(guided_regex="("), dict(guided_json={"type": 5}), dict(grammar={"lark": "start: ("})):
        status, _, answer = call(stories, "POST", "/v1/completions", {"model": "stories", "prompt": "Once", **fields})
        assert status == 400, answer


def test_nothing_of_numpy_reaches_the_json():
    from colora_ms.serving.http.logprobs import Place, completion_lists

    lists = completion_lists([Place("a", float(np.float32(-1.5)), (("b", -1.0),))], 1)
    assert json.loads(json.dumps(lists)) == {"tokens": ["a"], "token_logprobs": [-1.5], "text_offset": [0],
                                             "top_logprobs": [{"a": -1.5, "b": -1.0}]}
