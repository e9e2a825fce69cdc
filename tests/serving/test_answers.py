"""Text, tokens and ends of answers: the same from Generator, engine and HTTP, however the steps are cut into chunks."""

import json

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from colora_ms.decoding import Contrast, Generator, Sampling
from colora_ms.decoding.answer import Answer
from colora_ms.decoding.options import Options
from colora_ms.errors import DecodingError
from colora_ms.serving import Engine
from colora_ms.serving.http import Server, create_app
from colora_ms.serving.http import Settings as HttpSettings
from tests.serving.conftest import call

EOS, STORY = 2, "Once upon a time, there was a little girl named"
SLOW = [HealthCheck.function_scoped_fixture]


# -- one answer, token by token ---------------------------------------------------------------------------------------


class Pieces:
    """A tokenizer whose tokens are given strings; id 2 ends a sequence."""

    eos_token_id = EOS
    table = ["", "", "", "a", "b", "ab", "bc", "abc", "c", "\ufffd", "xa", "", "cab"]

    def decode(self, ids, skip_special_tokens=True):
        return "".join(self.table[one] for one in ids)


IDS = st.lists(st.integers(3, 12), min_size=1, max_size=14)
STOPS = st.lists(st.text("abcx", min_size=1, max_size=4), max_size=3)


def expected(ids, stop, stop_ids, budget, eos=(EOS,)):
    """(text, tokens, reason) by the definition, from the whole."""
    kept, reason = ids[:budget], "length" if len(ids) >= budget else None
    for place, one in enumerate(kept):
        if one in stop_ids or one in eos:
            kept, reason = kept[:place + 1], "stop"
            break
    shown = kept[:-1] if reason == "stop" else kept
    text = Pieces().decode(shown)
    found = [(text.find(one), len(one)) for one in stop if one in text]
    if found:
        begin, size = min(found)
        count = next(n for n in range(1, len(kept) + 1) if len(Pieces().decode(kept[:n])) >= begin + size)
        return text[:begin], kept[:count], "stop"
    return text, kept, reason


@settings(max_examples=400)
@given(ids=IDS, stop=STOPS, stop_ids=st.lists(st.integers(3, 12), max_size=1), budget=st.integers(1, 14),
       end=st.booleans(), cuts=st.sets(st.integers(1, 14)))
def test_an_answer_by_its_definition(ids, stop, stop_ids, budget, end, cuts):
    ids = ids + [EOS] if end else ids
    text, kept, reason = expected(ids, stop, stop_ids, budget)
    if reason is None:
        ids = ids + [EOS]  # every answer ends somewhere
        text, kept, reason = expected(ids, stop, stop_ids, budget)
    answer = Answer(Pieces(), [], Options(None, Sampling(), budget, tuple(stop), tuple(stop_ids), records=True),
                    (EOS,))
    news = [("", (), (), ())]
    for place, one in enumerate(ids):
        answer.take(one, one, 1, (0.0, 0.0, 0.0, 0.0))
        if place + 1 in cuts or answer.finish_reason:
            news.append(answer.news())
    done = answer.completion(3, None)
    assert (done.text, list(done.tokens), done.finish_reason) == (text, kept, reason)
    assert [record.token for record in done.records] == kept
    assert "".join(text for text, *_ in news) == done.text
    assert sum((tokens for _, tokens, *_ in news), ()) == done.tokens
    assert sum((records for _, _, records, *_ in news), ()) == done.records


@pytest.mark.parametrize("ids, stop, text, count", [
    ([3, 4, 8, 3], ["abc", "b"], "", 3),       # the longer one began first, and came
    ([3, 4, 3, 3], ["abc", "b"], "a", 2),      # it did not come: the shorter one counts, and what came behind it goes
    ([7, 3], ["bc", "abc"], "", 1), ([5, 8, 3], ["ab", "abc"], "", 1), ([12, 12, 3], ["bca", "cc"], "ca", 2),
])
def test_overlapping_stop_strings(ids, stop, text, count):
    answer = Answer(Pieces(), [], Options(None, Sampling(), 4, tuple(stop)), (EOS,))
    for one in ids:
        answer.take(one)
    assert (answer.text, len(answer.tokens)) == (text, count) and answer.finish_reason == "stop"


# -- the tiny model ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def generators(engine, adapter_folder, tiny_decoder, word_tokenizer):
    """Generators with two chunk sizes."""
    from colora_ms.adapters import load_adapters

    decoder = tiny_decoder()
    handle = load_adapters(decoder, {f"a{i}": adapter_folder / f"a{i}" for i in range(3)})
    return [Generator(decoder, word_tokenizer, handle, max_rows=4, chunk=chunk) for chunk in (3, 16)]


@settings(max_examples=25, suppress_health_check=SLOW)
@given(prompt=st.lists(st.integers(3, 96), min_size=1, max_size=6), adapter=st.sampled_from([None, "a0", "a1", "a2"]),
       contrast=st.none() | st.builds(Contrast, st.floats(0.05, 1), st.floats(0, 2),
                                      st.sampled_from(["fixed", "entropy"])),
       sampling=st.none() | st.builds(Sampling, st.sampled_from([0.0, 0.7, 1.5]), st.integers(0, 30),
                                      st.sampled_from([0, 0.9, 1]),
                                      st.integers(0, 99)),
       stop=st.lists(st.sampled_from(["3", " 5", "7 ", "1", "44", "9 1", " 2", "8"]), max_size=3),
       stop_token_ids=st.lists(st.integers(0, 96), max_size=8), budget=st.integers(1, 20), ignore_eos=st.booleans())
def test_generator_and_engine_agree(engine, generators, prompt, adapter, contrast, sampling, stop, stop_token_ids,
                                    budget, ignore_eos):
    wanted = dict(adapter=adapter, contrast=contrast if adapter else None, sampling=sampling, stop=stop,
                  stop_token_ids=stop_token_ids, max_new_tokens=budget, ignore_eos=ignore_eos, records=True)
    handle = engine.submit(prompt, **wanted)
    pieces, done = list(handle.pieces(60)), handle.result(60)
    assert "".join(piece.text for piece in pieces) == done.text
    assert sum((piece.tokens for piece in pieces), ()) == done.tokens
    assert [record.token for record in done.records] == list(done.tokens)
    for generator in generators:
        heard = []
        for found in (*generator.generate([prompt], on_text=lambda index, text: heard.append(text), **wanted),
                      *generator.generate([prompt], **wanted)):
            assert (found.text, found.tokens, found.finish_reason) == (done.text, done.tokens, done.finish_reason)
            assert found.records == done.records
        assert "".join(heard) == done.text


def test_tokens_behind_a_stop_are_not_counted(generators, engine):
    """Case 22: tokens, and the share that the contrast changed, as the engine counts them."""
    from colora_ms.evaluation.evaluate import _item
    from colora_ms.evaluation.scoring import score_exact
    from colora_ms.training.examples import Example

    example = Example(id="x", prompt="5 6", completion="7")
    wanted = dict(adapter="a0", contrast=Contrast(0.05, 1.0), max_new_tokens=30, ignore_eos=True, records=True)
    whole = engine.submit([5, 6], **wanted).result(60)
    stop = whole.text[9:12]
    done = engine.submit([5, 6], stop=stop, **wanted).result(60)
    assert len(done.tokens) < 12
    for generator in generators:
        found, = generator.generate([[5, 6]], stop=stop, **wanted)
        item = _item(example, found, score_exact, 0.0, False)
        assert item["tokens"] == len(done.tokens) and item["changed"] == sum(record.changed for record in done.records)


def test_stop_ids_and_refusals(generators, engine):
    whole = engine.submit([5, 6], max_new_tokens=20, ignore_eos=True).result(60)
    end = whole.tokens[7]
    first = whole.tokens.index(end)
    for found in (engine.submit([5, 6], max_new_tokens=20, ignore_eos=True, stop_token_ids=[end, 1]).result(60),
                  generators[0].generate([[5, 6]], max_new_tokens=20, ignore_eos=True,
                                         stop_token_ids=(np.int64(end),))[0]):
        assert found.tokens == whole.tokens[:first + 1] and found.finish_reason == "stop"
        assert found.text == engine.tokenizer.decode(whole.tokens[:first])
    for ids in ([97], [-1], "5", [1.0], [True], {5: 1}):
        for ask in (lambda **more: engine.submit([5], **more), lambda **more: generators[0].generate([[5]], **more)):
            with pytest.raises(DecodingError, match="stop_token_ids"):
                ask(stop_token_ids=ids)


# -- models that write what they are told -----------------------------------------------------------------------------


def scripted(successors, tokenizer, size=32):
    """(decoder, tokenizer) whose greedy answer goes from each token to its successor."""
    from colora_ms.models.config import DecoderConfig
    from colora_ms.models.decoder import Decoder

    config = DecoderConfig(model_type="llama", vocab_size=size, hidden_size=size, intermediate_size=8,
                           num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, head_dim=size // 2,
                           max_position_embeddings=128,
                           eos_token_ids=())
    weights = {name: np.full(shape, float("norm" in name), np.float32)
               for name, shape in config.parameter_shapes().items()}
    weights["model.embed_tokens.weight"][:] = np.eye(size)
    for before, after in successors.items():
        weights["lm_head.weight"][after, before] = 1.0
    return Decoder(config, weights), tokenizer


def made_tokenizer(pieces, special=(), added=(), decoder=None, **names):
    from tokenizers import AddedToken, models
    from tokenizers import Tokenizer as Backend

    from colora_ms.models.tokenizer import Tokenizer

    backend = Backend(models.BPE({piece: place for place, piece in enumerate(pieces)}, []))
    backend.add_special_tokens([AddedToken(one, special=True, normalized=False) for one in special])
    backend.add_tokens([AddedToken(one, special=False, normalized=False) for one in added])
    if decoder is not None:
        backend.decoder = decoder
    return Tokenizer(backend, names)


def everywhere(decoder, tokenizer, prompt, body=None, **wanted):
    """[(text, tokens or None, reason)] of Generator (whole, streamed), engine and HTTP (whole, streamed)."""
    found = []
    for chunk in (2, 16):
        heard = []
        generator = Generator(decoder, tokenizer, chunk=chunk)
        one, = generator.generate([prompt], on_text=lambda _, text: heard.append(text), **wanted)
        assert "".join(heard) == one.text
        found.append((one.text, one.tokens, one.finish_reason))
    with Engine(decoder, tokenizer, rows=2, max_length=64, chunk=4) as engine:
        handle = engine.submit(prompt, **wanted)
        assert "".join(handle) == handle.result(60).text
        found.append((handle.result().text, handle.result().tokens, handle.result().finish_reason))
        body = {"model": "base", "prompt": prompt, "max_tokens": wanted["max_new_tokens"],
                **{name: wanted[name] for name in ("stop", "stop_token_ids") if name in wanted}, **(body or {})}
        with Server(create_app(engine, HttpSettings())) as server:
            status, _, answer = call(server.url, "POST", "/v1/completions", body)
            assert status == 200, answer
            choice = answer["choices"][0]
            found.append((choice["text"], None, choice["finish_reason"]))
            events = call(server.url, "POST", "/v1/completions", {**body, "stream": True})[2].split("\n\n")
            parts = [json.loads(event[6:])["choices"][0] for event in events if event and event != "data: [DONE]"]
            found.append(("".join(part["text"] for part in parts), None, parts[-1]["finish_reason"]))
    return found


def agreed(found):
    """The one answer that all give."""
    assert len({(text, reason) for text, _, reason in found}) == 1, found
    assert len({tokens for _, tokens, _ in found if tokens is not None}) == 1, found
    return found[0]


CHAT = ["a", "b", "c", "X", "Y", "Z", "q"]


@pytest.mark.parametrize("kind, stop",
                         [("special", ["<|im_end|>"]), ("added", "<|im_end|>"), ("special", ["no", "<|im_end|>"])])
def test_a_stop_string_that_is_one_token_stops_at_its_id(mindspore, kind, stop):
    """Case 3: the model writes abc<|im_end|>XYZXYZ…"""
    from tokenizers import decoders

    end = ["<|im_end|>"]
    tokenizer = made_tokenizer(CHAT, *((end, []) if kind == "special" else ([], end)), decoder=decoders.Fuse())
    model = scripted({6: 0, 0: 1, 1: 2, 2: 7, 7: 3, 3: 4, 4: 5, 5: 3}, tokenizer)
    assert agreed(everywhere(*model, [6], max_new_tokens=20, stop=stop)) == ("abc", (0, 1, 2, 7), "stop")
    assert agreed(everywhere(*model, [6], max_new_tokens=20, stop_token_ids=[7])) == ("abc", (0, 1, 2, 7), "stop")
    text, tokens, reason = agreed(everywhere(*model, [6], max_new_tokens=9))
    assert (text, reason) == ("abcXYZXY" if kind == "special" else "abc<|im_end|>XYZXY", "length") and len(tokens) == 9
    assert agreed(everywhere(*model, [6], max_new_tokens=20, stop=["ZX"]))[1] == (0, 1, 2, 7, 3, 4, 5, 3)


def test_a_character_cut_by_max_tokens(mindspore):
    """Case 19: the model writes 😀😀… in byte tokens."""
    from tokenizers import decoders as d

    tokenizer = made_tokenizer([f"<0x{byte:02X}>" for byte in "😀".encode()] + ["▁a"],
                               decoder=d.Sequence([d.Replace("▁", " "), d.ByteFallback(), d.Fuse(),
                                                   d.Strip(" ", 1, 0)]))
    model = scripted({4: 0, 0: 1, 1: 2, 2: 3, 3: 0}, tokenizer)
    for count in (1, 4, 5, 6, 7, 8):
        whole, rest = divmod(count, 4)
        assert agreed(everywhere(*model, [4], max_new_tokens=count))[0] == "😀" * whole + "\ufffd" * rest


def test_an_empty_prompt(mindspore):
    """Case 25: the begin token alone where there is one, else a refusal."""
    from tokenizers import decoders as d

    tokenizer = made_tokenizer(["▁a", "b"], ["<s>"], decoder=d.Metaspace(), bos_token="<s>")
    model = scripted({2: 0, 0: 1, 1: 0}, tokenizer)
    for prompt in ("", []):
        assert agreed(everywhere(*model, prompt, max_new_tokens=3)) == ("ab a", (0, 1, 0), "length")
    assert agreed(everywhere(*model, [1], max_new_tokens=3))[0] == " ab a"
    tokenizer = made_tokenizer(["▁a", "b"], ["<s>"], decoder=d.Metaspace())
    model = scripted({2: 0, 0: 1, 1: 0}, tokenizer)
    for prompt in ("", []):
        with pytest.raises(DecodingError, match="is empty, and this model has no begin token"):
            Generator(*model).generate([prompt])


def test_echo(mindspore):
    from tokenizers import decoders as d

    tokenizer = made_tokenizer(["▁a", "b"] + [f"<0x{byte:02X}>" for byte in "é".encode()],
                               decoder=d.Sequence([d.ByteFallback(), d.Metaspace()]))
    model = scripted({0: 1, 1: 2, 2: 3, 3: 0}, tokenizer)
    found = everywhere(*model, [0, 1, 2], {"echo": True}, max_new_tokens=3)
    assert found[2][0] == "é ab" and {text for text, _, _ in found[3:]} == {"abé ab"}
    tokens, said = [0, 1], everywhere(*model, [0, 1], {"echo": True}, max_new_tokens=2)
    assert {text for text, _, _ in said[3:]} == {tokenizer.decode(tokens) + "é"}


# -- stories260k ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stories(shared, mindspore):
    from colora_ms.models import load_model

    return load_model(str(shared / "data" / "stories260k"), max_positions=256)


def test_the_first_blank_of_an_answer(stories):
    """Case 2."""
    text, tokens, _ = agreed(everywhere(*stories, STORY, max_new_tokens=8))
    assert text.startswith(" Lily. She") and text == stories[1].decode(tokens, before=stories[1].encode(STORY))
    whole = stories[1].backend.decode([*stories[1].encode(STORY), *tokens])
    assert STORY + text == whole
    assert agreed(everywhere(*stories, "", max_new_tokens=8))[0].startswith("Once upon")
    found = everywhere(*stories, STORY, {"echo": True}, max_new_tokens=8)
    assert {text for text, _, _ in found[3:]} == {whole}


def test_records_texts_join_to_the_answer(stories):
    for prompt in (STORY, ""):
        done, = Generator(*stories).generate([prompt], max_new_tokens=30, records=True, sampling=Sampling(1.2, seed=3))
        assert "".join(record.text for record in done.records) == done.text and done.text
        assert all(record.favourite_text == record.text for record in done.records if not record.changed)
