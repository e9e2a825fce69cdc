"""Clients that people use, against a real server: openai (sync, async, streams, tools, responses). LangChain and
lm-evaluation-harness run in scripts/check_clients.py, with the environment of scripts/setup_peers.sh --clients."""

import asyncio
import json

import pytest

from tests.serving.test_http_tools import ARGUMENTS, FLAT, HI, PIECES, TOOLS, served  # noqa: F401  (fixture)

openai = pytest.importorskip("openai", reason="the openai client is not installed: pip install openai")


@pytest.fixture
def url(served):  # noqa: F811
    return served(PIECES) + "/v1"


@pytest.fixture
def client(url):
    return openai.OpenAI(base_url=url, api_key="none", max_retries=0)


def test_tools_and_their_results(client):
    answer = client.chat.completions.create(model="base", messages=HI, tools=TOOLS)
    message = answer.choices[0].message
    assert answer.choices[0].finish_reason == "tool_calls" and message.content == "Let me see."
    assert json.loads(message.tool_calls[0].function.arguments) == ARGUMENTS
    # The message goes back as the client has it, with all its empty fields.
    history = [*HI, message, {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "q"}]
    assert client.chat.completions.create(model="base", messages=history, tools=TOOLS).choices
    assert client.chat.completions.create(model="base", messages=[*HI, message.model_dump(), *history[2:]],
                                          tools=TOOLS).choices


def test_a_stream_of_tools_through_the_clients_own_accumulator(client):
    with client.chat.completions.stream(model="base", messages=HI, tools=TOOLS) as stream:
        kinds = [event.type for event in stream]
        message = stream.get_final_completion().choices[0].message
    assert message.content == "Let me see." and json.loads(message.tool_calls[0].function.arguments) == ARGUMENTS
    assert "content.delta" in kinds and "tool_calls.function.arguments.done" in kinds


def test_several_answers(client):
    answer = client.chat.completions.create(model="base", messages=HI, n=3, max_tokens=2)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    events = client.completions.create(model="base", prompt=["q", "q"], n=2, max_tokens=2, stream=True)
    assert {choice.index for event in events for choice in event.choices} == {0, 1, 2, 3}


def test_the_asynchronous_client(url):
    async def ask():
        async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:
            whole, stream = await asyncio.gather(
                client.chat.completions.create(model="base", messages=HI, max_tokens=2),
                client.chat.completions.create(model="base", messages=HI, max_tokens=2, stream=True))
            return whole.choices[0].message.content, [event async for event in stream]

    text, events = asyncio.run(ask())
    assert text == "Let me see." == "".join(event.choices[0].delta.content or "" for event in events)


def test_responses(client):
    answer = client.responses.create(model="base", input="q", tools=FLAT, instructions="q")
    assert answer.output_text == "Let me see." and answer.status == "completed"
    made = next(item for item in answer.output if item.type == "function_call")
    assert json.loads(made.arguments) == ARGUMENTS
    again = client.responses.create(model="base", tools=FLAT, input=[
        {"role": "user", "content": "q"}, *answer.output,
        {"type": "function_call_output", "call_id": made.call_id, "output": "q"}])
    assert again.usage.input_tokens > answer.usage.input_tokens - 2
    with client.responses.stream(model="base", input="q", tools=FLAT) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_response()
    assert {"response.output_text.delta", "response.function_call_arguments.done", "response.completed"} <= kinds
    assert final.output_text == "Let me see." and final.output[1].name == "weather"
    with pytest.raises(openai.BadRequestError, match="previous_response_id"):
        client.responses.create(model="base", input="q", previous_response_id="resp_1")
