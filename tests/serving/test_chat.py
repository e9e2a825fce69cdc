"""The terminal chat: commands, memory, what /why shows; the command with piped input."""

import io
import os
import subprocess
import sys

import numpy as np
import pytest

from colora_ms.decoding import Contrast
from colora_ms.serving.chat import Chat


def talk(engine, *lines, **more):
    """(what was printed, the chat)."""
    out = io.StringIO()
    chat = Chat(engine, "tiny", max_new_tokens=8, out=out, **more)
    chat.loop(line + "\n" for line in lines)
    return out.getvalue(), chat


def test_answers_are_the_engines(engine):
    text, chat = talk(engine, "5 6 7", "/adapter a1", "5 6 7", plain=True)
    base, adapted = (engine.submit([5, 6, 7], adapter=a, max_new_tokens=8).result(60) for a in (None, "a1"))
    assert base.text in text and adapted.text in text and base.text != adapted.text and chat.last.tokens == adapted.tokens


def test_why_lists_the_changed_tokens(engine):
    prompt = "5 17 33"
    text, chat = talk(engine, "/adapter a4", "/contrast 0.05 2", prompt, "/why", plain=True)
    changed = [r for r in chat.last.records if r.changed]
    assert changed and f"changed {len(changed)} of {len(chat.last.records)} tokens" in text
    for record in changed:
        assert f"'{record.favourite}' -> '{record.token}'" in text and f"score {record.score:.2f}" in text
    text, chat = talk(engine, "/adapter a4", "/contrast on", "/contrast off", prompt, "/why", contrast=Contrast(0.05, 2.0),
                      plain=True)
    assert "contrast: fixed, alpha 0.05, beta 2" in text and "changed 0 of" in text


@pytest.mark.parametrize("line, words", [
    ("/contrast on", "choose one with /adapter"), ("/contrast 3 1", "alpha=3.0"), ("/contrast x", "ALPHA BETA"),
    ("/adapter a11", "'a1'"), ("/adapter ../a1", "cannot be"), ("/adapter a b", "one name"), ("/addapter", "'/adapter'"),
    ("/why", "nothing has been answered"), ("5 " * 100, "shorten it"), ("/help", "/contrast on|off|ALPHA BETA"),
    ("/adapter", "a0, a1"),
])
def test_mistakes_do_not_end_it(engine, line, words):
    text, chat = talk(engine, line, "/quit", "5 6", plain=True)
    assert words in text and chat.last is None and "Traceback" not in text


def test_piped_command(goldens, tmp_path):
    """The whole command over a model from disk and two adapters."""
    from colora_ms.models.checkpoint import open_checkpoint

    path = goldens / "tiny" / "llama"
    if not any((path / name).exists() for name in ("tokenizer.json", "tokenizer.model")):
        pytest.skip("the golden model has no tokenizer")
    assert open_checkpoint(path).config.vocab_size > np.int32(0)
    done = subprocess.run([sys.executable, "-m", "colora_ms", "chat", "--model", str(path), "--max-length", "64"],
                          input="/help\nhello\n/quit\n", capture_output=True, text=True, timeout=300, env={**os.environ})
    assert done.returncode == 0 and "/why" in done.stdout
