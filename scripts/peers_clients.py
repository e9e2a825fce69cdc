#!/usr/bin/env python
"""One real client against a running server, in the environment of ``scripts/setup_peers.sh --clients``; colora_ms is
not imported. ``scripts/check_clients.py`` starts the server and this.

    peers_clients.py openai URL MODEL
    peers_clients.py langchain URL MODEL
    peers_clients.py harness URL MODEL FOLDER TASK LIMIT     prints {"accuracy": …, "answers": [...]} as its last line

A task of the harness is FOLDER/TASK.yaml, over FOLDER's own data.
"""

import asyncio
import json
import sys

TOOLS = [{"type": "function", "function": {
    "name": "weather", "description": "The weather of a city.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}}}]
QUESTION = [{"role": "user", "content": "Say hello in three words."}]


def said(text):
    """A text for a line of a transcript."""
    return repr(text if len(text) < 70 else text[:67] + "...")


def try_openai(url, model):
    """Plain, several answers, streamed, asynchronous, tools, responses."""
    import openai

    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    more = dict(model=model, messages=QUESTION, max_tokens=16)
    whole = client.chat.completions.create(**more)
    choice = whole.choices[0]
    print("openai chat:", said(choice.message.content), choice.finish_reason, whole.usage.total_tokens, "tokens")
    events = list(client.chat.completions.create(**more, stream=True))
    text = "".join(event.choices[0].delta.content or "" for event in events)
    assert text == whole.choices[0].message.content, "the stream is another answer"
    print(f"openai stream: the same in {len(events)} events")
    several = client.chat.completions.create(**more, n=3, temperature=0.8, seed=7)
    print("openai n=3:", *[said(choice.message.content) for choice in several.choices])

    async def ask():
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as other:
            answers = await asyncio.gather(*(other.completions.create(model=model, prompt=f"{number} plus 1 is",
                                                                      max_tokens=4) for number in range(4)))
        return [answer.choices[0].text for answer in answers]

    print("openai asynchronous:", *map(said, asyncio.run(ask())))
    try:
        choice = client.chat.completions.create(model=model, messages=QUESTION, tools=TOOLS, max_tokens=48).choices[0]
        print("openai tools:", choice.finish_reason, choice.message.tool_calls or said(choice.message.content))
    except openai.BadRequestError as error:  # a model whose template knows no tools
        print("openai tools, refused:", error.body["message"])
    form = {"type": "json_schema", "json_schema": {"name": "colour", "schema": {
        "type": "object", "properties": {"colour": {"enum": ["red", "green", "blue"]}, "sure": {"type": "boolean"}},
        "required": ["colour", "sure"], "additionalProperties": False}}}
    asked = [{"role": "user", "content": "What colour is the sky?"}]
    try:
        answer = client.chat.completions.create(model=model, messages=asked, response_format=form, max_tokens=48)
        print("openai response_format:", json.loads(answer.choices[0].message.content))
    except openai.BadRequestError as error:  # a server without the extra "constraints"
        print("openai response_format, refused:", error.body["message"])
    scored = client.completions.create(model=model, prompt="The capital of France is", max_tokens=1, logprobs=3,
                                       echo=True)
    lists = scored.choices[0].logprobs
    print("openai logprobs:", [(token, value and round(value, 2))
                               for token, value in zip(lists.tokens, lists.token_logprobs)])
    events = list(client.responses.create(model=model, input="Say hello.", instructions="Be brief.",
                                          max_output_tokens=16, stream=True))
    final = events[-1].response
    print("openai responses:", said(final.output_text), final.status, len(events), "events")
    try:
        client.chat.completions.create(**more, extra_body={"guided_regex": "["})
    except openai.BadRequestError as error:
        print("openai refusal:", said(error.body["message"]))


def try_langchain(url, model):
    """ChatOpenAI: a call, a stream, bound tools."""
    import openai
    from langchain_core.messages import HumanMessage, SystemMessage
    from langchain_openai import ChatOpenAI

    chat = ChatOpenAI(base_url=f"{url}/v1", api_key="none", model=model, temperature=0, max_tokens=16, max_retries=0)
    messages = [SystemMessage("Be brief."), HumanMessage("Say hello in three words.")]
    whole = chat.invoke(messages)
    print("langchain:", said(whole.content), whole.response_metadata["finish_reason"], whole.usage_metadata)
    parts = list(chat.stream(messages))
    assert "".join(part.content for part in parts) == whole.content, "the stream is another answer"
    print(f"langchain stream: the same in {len(parts)} chunks")
    try:
        bound = chat.bind_tools(TOOLS).invoke(messages)
        print("langchain tools:", bound.tool_calls or said(bound.content))
    except openai.BadRequestError as error:  # a model whose template knows no tools
        print("langchain tools, refused:", error.body["message"])
    again = chat.invoke([*messages, whole, HumanMessage("And in French?")])
    print("langchain, the answer sent back:", said(again.content))


def try_harness(url, model, folder, task, limit):
    """lm-evaluation-harness: local-completions for likelihoods, local-chat-completions for generated answers."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    chat = "chat" in task
    route = "chat/completions" if chat else "completions"
    settings = dict(model=model, base_url=f"{url}/v1/{route}", num_concurrent=1, max_retries=1, max_length=1024)
    found = lm_eval.simple_evaluate(
        model="local-chat-completions" if chat else "local-completions", model_args=settings, tasks=[task],
        task_manager=TaskManager(include_path=folder, include_defaults=False), apply_chat_template=chat,
        limit=int(limit), bootstrap_iters=0)
    name = next(key for key in found["results"][task] if key.startswith(("acc,", "exact_match,")))
    samples = sorted(found["samples"][task], key=lambda one: one["doc_id"])
    print(json.dumps({"accuracy": found["results"][task][name], "items": len(samples),
                      "answers": [one["resps"][0][0] for one in samples]}))


if __name__ == "__main__":
    {"openai": try_openai, "langchain": try_langchain, "harness": try_harness}[sys.argv[1]](*sys.argv[2:])
