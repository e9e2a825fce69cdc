"""Log-probabilities over HTTP, in both forms: of answers, of prompts (echo), and the best of several answers."""

import math

import numpy as np
import pytest

from colora_ms.serving.scoring import Scorer
from tests.serving.test_scoring import expected


def complete(ask, **more):
    status, _, answer = ask("POST", "/v1/completions", {"model": "a1", "prompt": [5, 6, 7], "max_tokens": 4,
                                                        "ignore_eos": True, **more})
    assert status == 200, answer
    return answer


def test_completions(ask, served):
    choice = complete(ask, logprobs=3)["choices"][0]
    plain = complete(ask)["choices"][0]
    assert plain["logprobs"] is None and plain["text"] == choice["text"]
    found = choice["logprobs"]
    ids = [5, 6, 7, *map(int, choice["text"].split())]
    own, best = expected(served[0], ids, "a1")
    np.testing.assert_allclose(found["token_logprobs"], own[2:], atol=2e-4)
    for top, values in zip(found["top_logprobs"], best[2:]):
        np.testing.assert_allclose(sorted(top.values(), reverse=True), values[:3], atol=2e-4)  # greedy: among them
    assert found["tokens"] == choice["text"].split() and len(found["text_offset"]) == 4


def test_echo_gives_the_prompts_own(ask, served):
    """As lm-evaluation-harness asks, with several prompts of different lengths."""
    prompts = [[9, 8, 7, 6, 5], [11], [5, 6, 7]]
    answer = complete(ask, prompt=prompts, logprobs=1, echo=True, max_tokens=1, temperature=0)
    for prompt, choice in zip(prompts, answer["choices"]):
        found = choice["logprobs"]
        assert [len(found[name]) for name in found] == [len(prompt) + 1] * 4
        assert found["tokens"][:-1] == [str(one) for one in prompt]
        assert found["token_logprobs"][0] is None and found["top_logprobs"][0] is None
        own, best = expected(served[0], [*prompt, 5], "a1")  # the answer's token may have no text
        np.testing.assert_allclose(found["token_logprobs"][1:-1], own[:-1], atol=2e-4)
        np.testing.assert_allclose(found["token_logprobs"][-1], best[-1, 0], atol=2e-4)
        np.testing.assert_allclose([max(one.values()) for one in found["top_logprobs"][1:]], best[:, 0], atol=2e-4)
        for value, top in zip(found["token_logprobs"][1:], found["top_logprobs"][1:]):
            assert value in top.values()


def test_the_number_of_best_tokens_may_be_none(ask):
    found = complete(ask, logprobs=0)["choices"][0]["logprobs"]
    assert found["top_logprobs"] == [None] * 4 and all(value <= 0 for value in found["token_logprobs"])
    assert complete(ask, logprobs=False)["choices"][0]["logprobs"] is None


def test_chats(ask, served):
    body = {"model": "tiny", "messages": [{"role": "user", "content": "5 6"}], "max_tokens": 3, "ignore_eos": True}
    choice = ask("POST", "/v1/chat/completions", {**body, "logprobs": True, "top_logprobs": 2})[2]["choices"][0]
    content = choice["logprobs"]["content"]
    words = choice["message"]["content"].split()
    assert [one["token"] for one in content] == words and len(content) == 3
    own, _ = expected(served[0], [91, 5, 6, 92, *map(int, words)], None)
    np.testing.assert_allclose([one["logprob"] for one in content], own[3:], atol=2e-4)
    for one in content:
        assert len(one["top_logprobs"]) == 2 and one["top_logprobs"][0]["token"] == one["token"]
        assert bytes(one["bytes"]).decode() == one["token"]
    assert ask("POST", "/v1/chat/completions", {**body, "logprobs": True})[2]["choices"][0]["logprobs"]["content"][0][
        "top_logprobs"] == []
    for more, param in ((dict(top_logprobs=2), "top_logprobs"), (dict(logprobs=True, top_logprobs=21), "top_logprobs"),
                        (dict(logprobs=1), "logprobs")):
        status, _, answer = ask("POST", "/v1/chat/completions", {**body, **more})
        assert status == 400 and answer["error"]["param"] == param, answer


def test_the_best_of_several_answers(ask, served):
    """Those of the highest log-probability a token, of each prompt."""
    body = dict(prompt=["5 6", "9"], n=5, temperature=1.5, seed=3, max_tokens=8)
    answers = complete(ask, **body)["choices"]
    means = []
    for place, choice in enumerate(answers):
        prompt = [5, 6] if place < 5 else [9]
        ids = [*prompt, *map(int, choice["text"].split())]
        means.append(float(Scorer(served[0]).score(ids, "a1").logprobs[len(prompt):].mean()))
    best = complete(ask, **{**body, "n": 2, "best_of": 5})
    wanted = [answers[place]["text"] for begin in (0, 5)
              for place in sorted(range(begin, begin + 5), key=lambda place: -means[place])[:2]]
    assert [choice["text"] for choice in best["choices"]] == wanted
    assert [choice["index"] for choice in best["choices"]] == [0, 1, 2, 3]
    assert best["usage"]["completion_tokens"] == 80 and not math.isnan(sum(means))


def test_openais_client(served):
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=served[1].url + "/v1", api_key="none", max_retries=0)
    answer = client.completions.create(model="a1", prompt=[5, 6, 7], max_tokens=2, logprobs=1, echo=True)
    assert answer.choices[0].logprobs.token_logprobs[0] is None and len(answer.choices[0].logprobs.tokens) >= 4
    chat = client.chat.completions.create(model="a1", messages=[{"role": "user", "content": "5"}], max_tokens=2,
                                          logprobs=True, top_logprobs=1)
    assert chat.choices[0].logprobs.content[0].top_logprobs[0].logprob == chat.choices[0].logprobs.content[0].logprob
