"""The terminal chat: commands, memory, what /why shows; the command with piped input."""

import io

import pytest

from colora_ms.cli import main
from colora_ms.decoding import Contrast
from colora_ms.decoding.mix import Guide
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
    assert base.text in text and adapted.text in text and base.text != adapted.text
    assert chat.last.tokens == adapted.tokens


def test_why_lists_the_changed_tokens(engine):
    prompt = "5 17 33"
    text, chat = talk(engine, "/adapter a4", "/contrast 0.05 2", prompt, "/why", plain=True)
    changed = [r for r in chat.last.records if r.changed]
    assert changed and f"changed {len(changed)} of {len(chat.last.records)} tokens" in text
    for record in changed:
        assert f"'{record.favourite}' -> '{record.token}'" in text and f"score {record.score:.2f}" in text
    text, chat = talk(engine, "/adapter a4", "/contrast on", "/contrast off", prompt, "/why",
                      contrast=Contrast(0.05, 2.0),
                      plain=True)
    assert "contrast: fixed, alpha 0.05, beta 2" in text and "changed 0 of" in text


def test_why_of_a_mix_lists_every_row(engine):
    mix = Guide("a4", "a0", 3.0)
    text, chat = talk(engine, "5 17 33", "/why", plain=True, more={"mix": mix, "frequency_penalty": 0.5})
    want = engine.submit([5, 17, 33], mix=mix, frequency_penalty=0.5, max_new_tokens=8).result(60)
    assert chat.last.tokens == want.tokens
    for record in (one for one in chat.last.records if one.changed):
        assert [role for role, _ in record.voices] == ["base", "expert", "anti"]
        assert all(f"{role} {chance:.2f}" in text for role, chance in record.voices)
    assert any(one.changed for one in chat.last.records)
    talk(engine, "/adapter a1", "/contrast on", "5 6", plain=True, more={"mix": mix})  # a contrast comes first


@pytest.mark.parametrize("line, words", [
    ("/contrast on", "choose one with /adapter"), ("/contrast 3 1", "alpha=3.0"), ("/contrast x", "ALPHA BETA"),
    ("/adapter a11", "'a1'"), ("/adapter ../a1", "cannot be"), ("/adapter a b", "one name"),
    ("/addapter", "'/adapter'"),
    ("/why", "nothing has been answered"), ("5 " * 100, "shorten it"), ("/help", "/contrast on|off|ALPHA BETA"),
    ("/adapter", "a0, a1"),
])
def test_mistakes_do_not_end_it(engine, line, words):
    text, chat = talk(engine, line, "/quit", "5 6", plain=True)
    assert words in text and chat.last is None and "Traceback" not in text


def test_piped_command(shared, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("/adapter\nOnce upon a time\n/why\n/quit\nnever read\n"))
    model = shared / "data" / "stories260k"
    assert main(["chat", "--model", str(model), "--adapters", str(tmp_path), "--slots", "1", "--max-length", "64",
                 "--max-new-tokens", "12"]) == 0
    text = capsys.readouterr().out
    assert "adapters: none" in text and ", there was a little girl" in text and "changed 0 of 12 tokens" in text


def test_piped_command_with_an_unknown_adapter(shared, tmp_path, capsys):
    model = shared / "data" / "stories260k"
    assert main(["chat", "--model", str(model), "--adapters", str(tmp_path), "--slots", "1", "--adapter", "x"]) == 1
    assert "there is no adapter 'x'" in capsys.readouterr().err
