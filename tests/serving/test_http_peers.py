"""LangChain and lm-evaluation-harness from an environment of their own (scripts/setup_peers.sh --clients) against tiny
models; scripts/check_clients.py does the same with the default model."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from colora_ms.serving import Engine
from colora_ms.serving.http import Server, Settings, create_app
from tests.serving.test_http_tools import PIECES, served  # noqa: F401  (fixture)

ROOT = Path(__file__).resolve().parents[2]
PYTHON = Path(os.environ.get("COLORA_CLIENTS", ROOT / ".venv-clients" / "bin" / "python"))

pytestmark = pytest.mark.skipif(not PYTHON.exists(), reason="the clients are not installed: bash "
                                                            "scripts/setup_peers.sh --clients")


def run(*command):
    """What a client printed."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment.update(HF_DATASETS_OFFLINE="1", HF_HUB_OFFLINE="1", OPENAI_API_KEY="none")
    done = subprocess.run([PYTHON, ROOT / "scripts" / "peers_clients.py", *map(str, command)], capture_output=True,
                          text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_langchain(served):  # noqa: F811
    said = run("langchain", served(PIECES), "base")
    assert "the same in" in said and "langchain tools: [{'name': 'weather', 'args': {'city': 'Ulm'}" in said


def test_the_harness_finds_the_accuracy_that_evaluate_finds(shared, mindspore, tmp_path, monkeypatch):
    """Likelihoods of multiple choice under stories260k; both cut the choices off the joint text."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    from check_clients import LIKELIHOOD
    from colora_ms.evaluation.decoder_scorer import DecoderScorer
    from colora_ms.evaluation.likelihood import ChoiceItem, multiple_choice
    from colora_ms.models import load_model

    subjects = ("Once upon a time, there was a", "Lily went to the park with her", "The dog was very",
                "Tom and his mom", "They played with the", "One day, a little girl named")
    choices = (" little girl", " mom", " happy", " big red ball", " Lily", " sad and cold")
    items = [ChoiceItem(str(place), text, choices, place % len(choices)) for place, text in enumerate(subjects)]
    rows = [{"context": one.context, "choices": list(one.choices), "answer": one.answer} for one in items]
    (tmp_path / "choices.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "choices.yaml").write_text(LIKELIHOOD.format(data=tmp_path / "choices.jsonl"))
    decoder, tokenizer = load_model(str(shared / "data" / "stories260k"), max_positions=256)
    ours = multiple_choice(DecoderScorer(decoder), tokenizer, items, normalise="none")
    with Engine(decoder, tokenizer, rows=4, max_length=200, chunk=2) as engine:
        with Server(create_app(engine, Settings(base_model="stories"))) as server:
            found = json.loads(run("harness", server.url, "stories", tmp_path, "choices", 100).splitlines()[-1])
    assert found["items"] == len(items) and found["accuracy"] == pytest.approx(ours.accuracy)
    assert 0 < ours.accuracy < 1
