"""A prompt and its continuation as ids: the border, against SentencePiece's own surfaces and the tokens' own bytes."""

import os
import time
import unicodedata

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import tokenizer_kinds as kinds
from colora_ms.errors import TokenizerError
from colora_ms.models.detokenizer_steps import byte_level_bytes
from colora_ms.models.joint import encode_joint, encode_spans
from colora_ms.models.tokenizer import load_tokenizer

HERE = os.path.dirname(__file__)
STORIES = os.path.join(HERE, "..", "..", "..", "shared", "data", "stories260k")

WORDS = ["the", " the", " little", "girl", "\n", "\n\n", "  ", "    ", " ", "\t", "é", "e\u0301", "한국", "日本", "😀",
         "👩‍👩‍👧", " of the", "Answer:", " 42", "x", "\u00a0", "ﬁ", "<", "|", "Ω", "\u212b", "don't", "ക്ഷ",
         "\u1112\u1161\u11ab"]
TEXTS = st.one_of(st.lists(st.sampled_from(WORDS), max_size=9).map("".join), st.text(max_size=20),
                  st.lists(st.sampled_from(kinds.SPECIAL + WORDS), max_size=6).map("".join)
                  ).filter(lambda text: "\u2581" not in text and not any("\ud800" <= c < "\ue000" for c in text))
PROPERTY = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def made():
    """Tokenizers by name, each made once."""
    return {}


def once(made, name, make):
    if name not in made:
        made[name] = make()
    return made[name]


@pytest.mark.parametrize("rule", ["gpt2", "llama3", "qwen2"])
def test_byte_level_border_is_where_the_tokens_bytes_pass_the_prompts(made, rule):
    tokenizer = once(made, rule, lambda: kinds.byte_level(rule))

    @PROPERTY
    @given(text=TEXTS, share=st.floats(0, 1))
    def check(text, share):
        if rule == "qwen2":
            text = unicodedata.normalize("NFC", text)
        cut = round(share * len(text))
        found = encode_joint(tokenizer, text[:cut], text[cut:])
        assert found.ids == tokenizer.encode(text)
        begin = found.ids[:1] == [0] and rule == "llama3"
        sizes = [len(byte_level_bytes(tokenizer.backend.id_to_token(index))) for index in found.ids[begin:]]
        ends = np.cumsum(sizes)
        assert sum(sizes) == len(text.encode())
        wanted = int((ends <= len(text[:cut].encode())).sum())
        assert found.boundary == wanted + begin
        if wanted < len(sizes):
            assert found.spanning == (ends[wanted] - sizes[wanted] < len(text[:cut].encode()))
        else:
            assert not found.spanning
    check()


@pytest.mark.parametrize("prefix, words, collapse", [(True, True, False), (True, False, False), (False, True, False),
                                                     (True, True, True), (False, False, True)])
@pytest.mark.parametrize("inside", ["tokenizer.model", "gguf", "tokenizer.json"])
def test_sentencepiece_border_is_that_of_its_own_surfaces(made, tmp_path, prefix, words, collapse, inside):
    sentencepiece = pytest.importorskip("sentencepiece")
    if collapse and inside == "gguf":
        pytest.skip("a GGUF has no setting for collapsing blanks")
    path = kinds.sentencepiece_model(tmp_path / "tokenizer.model", prefix, words, collapse)
    library = sentencepiece.SentencePieceProcessor(model_file=path)
    tokenizer = load_tokenizer(path)
    if inside == "tokenizer.json":
        tokenizer.save(tmp_path / "saved")
        tokenizer = load_tokenizer(tmp_path / "saved")
    if inside == "gguf":
        tokenizer = load_tokenizer(kinds.gguf_of_sentencepiece(library, tmp_path / "v.gguf", prefix))

    @PROPERTY
    @given(text=TEXTS.filter(lambda text: "<" not in text and not (collapse and any(
        c.isspace() and c != " " for c in text))), share=st.floats(0, 1))
    def check(text, share):
        cut = round(share * len(text))
        truth = library.encode(text, return_type="offset_mapping")
        found = encode_joint(tokenizer, text[:cut], text[cut:])
        assert found.ids == [library.bos_id()] + truth["ids"]
        assert found.ids == tokenizer.encode(text)
        if not cut or collapse and not text[:cut].strip(" "):
            assert found.boundary == 1  # a prompt without a token of its own
            return
        wanted, last = len(truth["ids"]), None
        for place, (begin, end) in reversed(list(enumerate(truth["offsets"]))):
            # all bytes of a character but the last have no surface of their own
            last = last if begin == end and truth["pieces"][place].startswith("<0x") else end
            if last > cut:
                wanted = place
        assert found.boundary == wanted + 1
    check()


@pytest.mark.parametrize("words", [True, False])
@pytest.mark.parametrize("scheme", ["always", "first", "never"])
def test_metaspace_border_is_where_the_pieces_pass_the_prompt(made, scheme, words):
    tokenizer = once(made, scheme + str(words), lambda: kinds.metaspace(scheme, words))

    @PROPERTY
    @given(text=TEXTS.filter(lambda text: "<" not in text), share=st.floats(0, 1))
    def check(text, share):
        cut = round(share * len(text))
        found = encode_joint(tokenizer, text[:cut], text[cut:])
        assert found.ids == tokenizer.encode(text) and found.ids[:1] == [1]
        if not cut:
            assert found.boundary == 1
            return
        end = -(scheme != "never" and not text.startswith(" "))  # the blank that is put in front is no text
        wanted = 0
        for index in found.ids[1:]:
            piece = tokenizer.backend.id_to_token(index)
            end += 1 if piece.startswith("<0x") else len(piece.replace("\u2581", " ").encode())
            wanted += end <= len(text[:cut].encode())
        assert end == len(text.encode())
        assert found.boundary == wanted + 1
    check()


def test_special_tokens_that_are_spelled_out(made):
    tokenizer = once(made, "qwen2", lambda: kinds.byte_level("qwen2"))
    prompt = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    found = encode_joint(tokenizer, prompt, "the<|im_end|>")
    assert found.ids[found.boundary:] == tokenizer.encode("the") + [3] and not found.spanning
    # a special token that the border cuts is one token, and the continuation's
    found = encode_joint(tokenizer, "hi<|im_", "end|>x")
    assert found.ids[found.boundary:] == [3] + tokenizer.encode("x") and found.spanning


def test_blanks_that_a_special_token_swallows_are_not_its_text():
    tokenizer = kinds.with_greedy_specials()
    assistant, mask = (tokenizer.backend.token_to_id(name) for name in ("<|assistant|>", "<mask>"))
    found = encode_joint(tokenizer, "the<|assistant|>", "\n the")
    assert found.ids == tokenizer.encode("the<|assistant|>\n the")
    assert found.ids[found.boundary - 1] == assistant and found.ids[found.boundary:] == tokenizer.encode("the")
    found = encode_joint(tokenizer, "the ", " <mask>")
    assert found.ids[found.boundary:] == [mask] and not found.spanning


@pytest.mark.parametrize("prompt, continuation, spanning_text", [
    ("xe", "\u0301y", "é"), ("x\u1112\u1161", "\u11aby", "한"), ("x\u1112", "\u1161\u11aby", "한"),
    ("xa\u0316", "\u0301y", "á\u0316"), ("xe\u0301", "\u0316y", None), ("é", "y", None), ("xe\u0301", "y", None)])
def test_characters_that_the_normaliser_joins_over_the_border(made, prompt, continuation, spanning_text):
    tokenizer = once(made, "qwen2", lambda: kinds.byte_level("qwen2"))
    found = encode_joint(tokenizer, prompt, continuation)
    assert found.ids == tokenizer.encode(prompt + continuation)
    text = tokenizer.decode(found.ids[found.boundary:])
    if spanning_text is None:
        assert not found.spanning and text == unicodedata.normalize("NFC", prompt + continuation)[
            len(unicodedata.normalize("NFC", prompt)):]
    else:
        assert found.spanning and text == spanning_text + "y"


def test_empty_sides_and_no_end_token(made):
    tokenizer = once(made, "alwaysTrue", lambda: kinds.metaspace("always"))
    assert tokenizer.backend.encode("the").ids[-1] == 2  # the file's own post-processor puts one
    for prompt, continuation in (("", ""), ("the", ""), ("", "the"), ("the", " the")):
        found = encode_joint(tokenizer, prompt, continuation)
        assert 2 not in found.ids and found.ids == tokenizer.encode(prompt + continuation)
        assert found.boundary == len(tokenizer.encode(prompt)) and not found.spanning
    assert encode_joint(tokenizer, "the", " the", add_special_tokens=False).ids == tokenizer.encode("the the")[1:]


def test_the_case_of_the_stray_blank():
    path = os.path.join(STORIES, "tokenizer.model")
    if not os.path.isfile(path):
        pytest.skip(f"the stories260k model is not at {STORIES}")
    for name in ("tokenizer.model", "tokenizer.json"):
        tokenizer = load_tokenizer(os.path.join(STORIES, name))
        found = encode_joint(tokenizer, "Question: which one?\nAnswer:", " the adapter")
        pieces = [tokenizer.backend.id_to_token(index) for index in found.ids[found.boundary:]]
        assert "".join(pieces) == "\u2581the\u2581adapter" and pieces[:2] == ["\u2581the", "\u2581a"]


@PROPERTY
@given(data=st.data(), text=TEXTS)
def test_spans_are_what_two_borders_give(made, data, text):
    tokenizer = once(made, "llama3", lambda: kinds.byte_level("llama3"))
    places = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    spans = list(zip(places[::2], places[1::2]))
    ids, mask = encode_spans(tokenizer, text, spans, add_special_tokens=True)
    assert ids == tokenizer.encode(text) and mask.shape == (len(ids),) and not mask[0]
    ends = np.cumsum([len(byte_level_bytes(tokenizer.backend.id_to_token(index))) for index in ids[1:]])
    begins = np.concatenate([[0], ends[:-1]]).astype(int)
    wanted = np.zeros(len(ids) - 1, bool)
    for begin, end in spans:
        begin, end = len(text[:begin].encode()), len(text[:end].encode())
        if begin < end:
            wanted |= (ends > begin) & (begins < end)
    assert mask[1:].tolist() == wanted.tolist()


def test_spans_that_are_refused(made):
    tokenizer = once(made, "llama3", lambda: kinds.byte_level("llama3"))
    for spans in ([(0, 4)], [(2, 1)], [(0, 2), (1, 3)], [(-1, 2)]):
        with pytest.raises(TokenizerError, match="span"):
            encode_spans(tokenizer, "abc", spans)
    with pytest.raises(TokenizerError, match="NoneType"):
        encode_joint(tokenizer, None, "x")
    with pytest.raises(TokenizerError, match="continuation is a int"):
        encode_joint(tokenizer, "x", 3)


def test_a_megabyte_takes_seconds(made):
    for tokenizer in (once(made, "llama3", lambda: kinds.byte_level("llama3")), kinds.metaspace("first", False)):
        text = "Once upon a time é 😀   there\n\n" * 35000
        begin = time.monotonic()
        found = encode_joint(tokenizer, text[:600000], text[600000:])
        encode_spans(tokenizer, text, [(place, place + 20) for place in range(0, 10 ** 6, 40)])
        assert 0 < found.boundary < len(found.ids) and time.monotonic() - begin < 60


def test_objects_that_only_encode():
    class Letters:
        def encode(self, text, add_special_tokens=True):
            return [0] * add_special_tokens + [ord(letter) for letter in text]

    class Pairs:
        def encode(self, text, add_special_tokens=True):
            return [hash(text[at:at + 2]) for at in range(0, len(text), 2)]
    found = encode_joint(Letters(), "ab", "c")
    assert (found.ids, found.boundary) == ([0, 97, 98, 99], 3)
    with pytest.raises(TokenizerError, match="encode_offsets"):
        encode_joint(Pairs(), "abc", "d")


class Recorder:
    """Gives every token the same log-probability and keeps the sequences."""

    def __init__(self):
        self.seen = []

    def token_logprobs(self, sequences):
        self.seen += sequences
        return [[-1.0 - 0.001 * index for index in ids[1:]] for ids in sequences]


@pytest.mark.parametrize("blank", ["context", "choice"])
def test_multiple_choice_scores_the_joint_texts_ids(made, blank):
    from colora_ms.evaluation.likelihood import ChoiceItem, multiple_choice
    tokenizer = once(made, "alwaysTrue", lambda: kinds.metaspace("always"))
    context, choices = "Answer:", (" the adapter", " little Lily")
    if blank == "context":
        context, choices = context + " ", tuple(choice[1:] for choice in choices)
    model = Recorder()
    result = multiple_choice(model, tokenizer, [ChoiceItem("a", context, choices, 0)], "none")
    head = len(tokenizer.encode("Answer:"))
    for choice, score in zip((" the adapter", " little Lily"), result.items[0]["scores"]):
        ids = tokenizer.encode("Answer:" + choice)
        assert ids in model.seen
        assert score == pytest.approx(sum(-1.0 - 0.001 * index for index in ids[head:]))


def test_multiple_choice_without_a_token_in_front_is_refused(made):
    from colora_ms.errors import DataError
    from colora_ms.evaluation.likelihood import ChoiceItem, multiple_choice
    tokenizer = once(made, "gpt2", lambda: kinds.byte_level("gpt2"))  # has no begin token
    for context, choices in (("", (" the", " girl")), ("th", ("e", " girl")), ("the", ("", " girl"))):
        with pytest.raises(DataError, match="must both have tokens"):
            multiple_choice(Recorder(), tokenizer, [ChoiceItem("a", context, choices, 0)])


def test_the_likelihood_of_lily(mindspore):
    if not os.path.isdir(STORIES):
        pytest.skip(f"the stories260k model is not at {STORIES}")
    from colora_ms.evaluation.decoder_scorer import DecoderScorer
    from colora_ms.evaluation.likelihood import ChoiceItem, multiple_choice
    from colora_ms.models import load_model
    decoder, tokenizer = load_model(STORIES, max_positions=64)
    context = "Once upon a time, there was a little girl named"
    item = ChoiceItem("a", context, (" Lily", " Tom", " Timmy"), 0)
    scores = multiple_choice(DecoderScorer(decoder), tokenizer, [item], "none").items[0]["scores"]
    assert scores[0] == pytest.approx(-0.077, abs=1e-3)
    assert int(np.argmax(scores)) == 0
