"""Generator, engine and HTTP make the same request: the rules of ``colora_ms/decoding/README.md``, for each of them."""

import dataclasses

import numpy as np
import pytest

from colora_ms.decoding import Contrast, Generator, Sampling
from colora_ms.decoding.fields import option
from colora_ms.decoding.options import LONGEST_STOP, MOST_STOPS, PER_PROMPT, Options
from colora_ms.decoding.request import AMATEUR, EXPERT, Limits, Request, Row
from colora_ms.errors import AdapterError, CheckpointError, DecodingError
from colora_ms.serving.http import Server, Settings, create_app
from tests.serving.conftest import adapter_tensors, call, unfused, write_adapter


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Adapters "good" and "huge"; the second one makes the logits infinite."""
    root = tmp_path_factory.mktemp("rules")
    write_adapter(root / "good", seed=1, r=2)
    huge = {key: np.full_like(value, 1e30) for key, value in adapter_tensors(3, 2).items()}
    write_adapter(root / "huge", seed=0, r=2, tensors=huge)
    return root


@pytest.fixture(scope="module")
def callers(folder, tiny_decoder, word_tokenizer):
    """{name: function (prompt, **options) -> Completion} of a generator, of one without the operator of steps, of an
    engine, and of one without."""
    from colora_ms.adapters import load_adapters
    from colora_ms.serving import AdapterBank, Engine

    found, engines = {}, []
    for fused in (True, False):
        decoder = tiny_decoder()
        handle = load_adapters(decoder, {name: folder / name for name in ("good", "huge")})
        generator = Generator(decoder, word_tokenizer, handle, max_rows=4, chunk=4, cache_bytes=1 << 20)
        if not fused:
            generator.generate([[5]], max_new_tokens=1)
            unfused(generator._core.graph)
        found[f"generator {fused}"] = lambda prompt, one=generator, **more: one.generate([prompt], **more)[0]
        decoder = tiny_decoder()
        engine = Engine(decoder, word_tokenizer, AdapterBank(decoder, folder, max_loaded=2, max_rank=2), rows=4,
                        max_length=128, chunk=4)
        engines.append(engine)
        if not fused:
            engine.call(lambda engine=engine: unfused(engine._core.graph))
        found[f"engine {fused}"] = lambda prompt, engine=engine, **more: engine.submit(prompt, **more).result(120)
    with Server(create_app(engines[0], Settings(base_model="tiny", max_tokens=200))) as server:
        found["url"] = server.url
        yield found
    for engine in engines:
        engine.close()


def python_callers(callers):
    return {name: ask for name, ask in callers.items() if name != "url"}


@pytest.mark.parametrize("wanted, kind, words", [
    (dict(stop=["x"] * (MOST_STOPS + 1)), DecodingError, "at most 16"),
    (dict(stop=["x" * (LONGEST_STOP + 1)]), DecodingError, "1 to 256 characters"),
    (dict(stop_token_ids=[97]), DecodingError, r"97, which is no token id of the vocabulary, 0\.\.96"),
    (dict(max_new_tokens=0), DecodingError, "max_new_tokens=0"), (dict(seed=-1), DecodingError, "seed=-1"),
    (dict(contrats=1), DecodingError, "no option 'contrats'.*Did you mean 'contrast'"),
    (dict(contrast=Contrast()), DecodingError, "needs adapter"),
    (dict(adapter="nobody"), AdapterError, "nobody"),
    (dict(prompt=[5] * 128), DecodingError, "128 tokens; .* holds 128"),
    (dict(prompt=[97]), DecodingError, "holds token id 97"), (dict(prompt=""), DecodingError, "is empty"),
])
def test_the_same_is_refused_with_the_same_sentence(callers, wanted, kind, words):
    wanted = {"prompt": [5, 6], **wanted}
    for ask in python_callers(callers).values():
        with pytest.raises(kind, match=words):
            ask(**wanted)


def test_the_limits_themselves_are_taken(callers):
    stop = [chr(0x4e00 + i) * LONGEST_STOP for i in range(MOST_STOPS)]
    answers = {ask([5, 6], stop=stop, max_new_tokens=5, ignore_eos=True).tokens
               for ask in python_callers(callers).values()}
    assert len(answers) == 1 and len(answers.pop()) == 5
    body = {"model": "tiny", "prompt": "5 6", "max_tokens": 5}
    assert call(callers["url"], "POST", "/v1/completions", {**body, "stop": stop})[0] == 200
    for bad in (stop + ["x"], ["x" * (LONGEST_STOP + 1)]):
        status, _, answer = call(callers["url"], "POST", "/v1/completions", {**body, "stop": bad})
        assert status == 400 and "at most 16 stop strings" in answer["error"]["message"]


@pytest.mark.parametrize("wanted, kind, words", [
    (dict(adapter="huge"), AdapterError, "'huge' makes the model's logits infinite"),
    (dict(adapter="huge", contrast=Contrast()), AdapterError, "'huge' makes the model's logits infinite"),
    (dict(adapter="good", contrast=Contrast(1e-30, 3e38)), DecodingError, r"beta=3e\+38 makes the scores"),
])
def test_logits_that_are_not_finite_end_their_request_and_no_graph(callers, wanted, kind, words):
    for ask in python_callers(callers).values():
        before = ask([7, 8], adapter="good", contrast=Contrast(), max_new_tokens=6).tokens
        with pytest.raises(kind, match=words):
            ask([5, 6, 7], max_new_tokens=20, ignore_eos=True, **wanted)
        assert ask([7, 8], adapter="good", contrast=Contrast(), max_new_tokens=6).tokens == before
    body = {"model": wanted["adapter"], "prompt": "5 6 7", "max_tokens": 20, "ignore_eos": True}
    if "contrast" in wanted:
        body["contrast"] = {"alpha": wanted["contrast"].alpha, "beta": wanted["contrast"].beta}
    assert call(callers["url"], "POST", "/v1/completions", body)[0] == 400


def test_a_damaged_base_is_said(tiny_decoder, word_tokenizer):
    from mindspore import Tensor

    from colora_ms.serving import Engine

    decoder = tiny_decoder()
    decoder.model.norm.weight.set_data(Tensor(np.full(32, np.nan, np.float32)))
    generator = Generator(decoder, word_tokenizer)
    for _ in range(2):  # the graphs can be used again
        with pytest.raises(CheckpointError, match="base model's logits are not finite"):
            generator.generate([[5, 6]])
    with Engine(decoder, word_tokenizer, rows=2, max_length=32, chunk=2) as engine:
        with pytest.raises(CheckpointError, match="base model's logits are not finite"):
            engine.submit([5, 6]).result(60)
        with Server(create_app(engine, Settings(base_model="tiny"))) as server:
            status, _, answer = call(server.url, "POST", "/v1/completions", {"model": "tiny", "prompt": "5"})
            assert status == 500 and "weights are damaged" in answer["error"]["message"]


@pytest.mark.parametrize("stop", [(), ("never", "\u4e00 1 2 3")])
def test_an_answer_that_is_cancelled_is_what_was_streamed(engine, stop):
    handle = engine.submit([5, 6], adapter="a0", max_new_tokens=80, ignore_eos=True, records=True, stop=stop)
    pieces = handle.pieces(60)
    parts = [next(pieces)]
    handle.cancel()
    parts += list(pieces)
    done = handle.result(60)
    assert done.finish_reason == "cancelled" and len(done.tokens) < 80
    assert "".join(part.text for part in parts) == done.text == engine.tokenizer.decode(done.tokens)
    assert sum((part.tokens for part in parts), ()) == done.tokens
    assert sum((part.records for part in parts), ()) == done.records
    assert handle.usage.generated == len(done.tokens)


def test_the_engines_options_are_refused_where_there_is_no_queue(callers):
    for name, value in (("priority", 1), ("timeout", 5.0), ("cache_salt", "x")):
        with pytest.raises(DecodingError, match=f"no option '{name}' here; only the serving engine has it"):
            callers["generator True"]([5], **{name: value})
        assert callers["engine True"]([5], max_new_tokens=1, **{name: value}).tokens


def test_rows_and_their_roles(word_tokenizer):
    limits = Limits(97, 20)
    plain = Request.of(word_tokenizer, [5, 6], None, Options(max_new_tokens=50), limits)
    assert plain.rows == (Row(EXPERT, None),) and plain.options.max_new_tokens == 18 and plain.ids.dtype == np.int32
    pair = Request.of(word_tokenizer, "5 6", "a", Options(contrast=Contrast()), limits)
    assert pair.rows == (Row(EXPERT, "a"), Row(AMATEUR, None)) and pair.adapter == "a"
    assert not pair.copies and Request.of(word_tokenizer, "5", "a", Options(Contrast(skip_copies=True)), limits).copies


def test_an_option_is_named_once():
    """HTTP, command line and Generator read the records; a field more is a field more everywhere."""
    import argparse

    from colora_ms.cli.options import add_record, given
    from colora_ms.serving.http.schema import CompletionBody, ContrastBody

    for name, one in {**Sampling.known(), **Contrast.known()}.items():
        assert one.meaning and one.default == getattr(Sampling() if name in Sampling.known() else Contrast(), name)
    assert set(Sampling.known()) <= set(CompletionBody.model_fields)
    assert list(ContrastBody.model_fields) == list(Contrast.known())
    assert set(PER_PROMPT) - {"adapter"} <= set(Options.known())

    @dataclasses.dataclass(frozen=True)
    class More(Sampling):
        typical: float = option(float, 1.0, "how typical", least=0.0, most=1.0, above=True, hint="1 is off")

    parser = argparse.ArgumentParser()
    add_record(parser, More)
    assert given(parser.parse_args(["--typical", "0.5"]), More)["typical"] == 0.5
    assert More.asked(temperature=1.0, typical=0.25).typical == 0.25 and More.asked(typical=7.0).typical == 1.0
    with pytest.raises(DecodingError, match=r"typical=0.0 is outside \(0, 1\]; 1 is off"):
        More.asked(temperature=1.0, typical=0.0)
    with pytest.raises(DecodingError, match="typical='x' is not a number"):
        More.asked(typical="x")


def test_prompts_are_handed_on_where_a_contrast_looks_at_them_and_copied_nowhere(engine, monkeypatch):
    seen = []
    real = engine._core.graph.run
    monkeypatch.setattr(engine._core.graph, "run", lambda batch: seen.append(batch.prompts) or real(batch))
    wanted = dict(adapter="a0", max_new_tokens=40, ignore_eos=True)
    assert len(engine.submit([5, 6] * 20, **wanted).result(60).tokens) == 40
    assert len(seen) >= 10 and not any(seen)
    seen.clear()
    contrast = Contrast(0.1, 0.8, skip_copies=True)
    done = engine.submit([5, 6] * 20, contrast=contrast, **wanted).result(60)
    prompts = [prompt for one in seen if one is not None for prompt in one]
    assert len(done.tokens) == 40 and len({id(prompt) for prompt in prompts}) == 1
    assert prompts[0].tolist() == [5, 6] * 20
