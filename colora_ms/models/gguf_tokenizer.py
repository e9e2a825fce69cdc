"""A tokenizer as the metadata of a GGUF file: the reverse of ``tokenizer_build.from_gguf``.

llama.cpp has two ways to cut text that the decoders here use: byte-level BPE (``gpt2``: pieces, merges, and the name of
the rule that cuts words) and SentencePiece BPE (``llama``: pieces with scores). A ``tokenizers`` backend has merges in
both cases. For SentencePiece the scores are derived from them: llama.cpp joins the pair whose piece has the best score,
``tokenizers`` the pair of the first merge; they agree if every piece's score is minus the place of its first merge
(that is also what a SentencePiece model's merges were sorted by).
"""

from __future__ import annotations

import json
from typing import Union

from colora_ms.errors import TokenizerError
from colora_ms.files import PathLike
from colora_ms.models import tokenizer_build
from colora_ms.models.config import DecoderConfig
from colora_ms.models.gguf_parts import open_gguf
from colora_ms.models.tokenizer import Tokenizer, load_tokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

#: Numbers of the value types in GGUF.
UINT32, INT32, FLOAT32, BOOL, STRING, ARRAY = 4, 5, 6, 7, 8, 9

#: Rules for cutting words, as llama.cpp calls them, of which a written file names the first that fits.
_RULES = ("smollm", "gpt-2", "qwen2", "llama-bpe")

#: Texts on which rules and tokenizers are compared: words, digits, contractions, blanks, line ends, other scripts.
PROBES = (
    "Hello world", " two  blanks   and\ttabs\t\tand\n\nlines \n  \r\n end ", "I'll we're DON'T it's 'tis 'S",
    "1 12 123 1234 12345678 3.14159 v2.0 x1y22z333", "foo_bar(baz)[i] = {'a': 1};//!!! ... ---->",
    "CamelCaseAndUPPER", "Ünïcödé naïve élève straße", "北京大学 日本語テキスト 한국어",
    "Привет, мир! العربية ١٢٣ हिन्दी १२", "😀😃 👩‍👩‍👧 🇫🇷",
    "\u00a0nbsp\u3000wide\u200bzero", "a\nb\n\nc\n\n\nd", "   leading", "trailing   ", "", "\n",
    "e\u0301 NFD", "≠±×÷√∞ $€£¥",
)


def tokenizer_entries(source: Union[Tokenizer, PathLike, None],
                      config: DecoderConfig) -> tuple[dict[str, tuple], list[str]]:
    """The metadata that describe a model's tokenizer.

    Args:
        source: what ``load_tokenizer`` takes, or None: the file then says that it has no tokenizer. The tables of a
            GGUF file with as many pieces as the model has rows are copied as they are.
        config: ``DecoderConfig``, for the number of rows and the ids of the begin, end and padding tokens.

    Returns:
        (entries, notes): entries {key: (value, type number, type number of an array's values or None)}; notes:
        sentences about what llama.cpp will do otherwise.

    Raises:
        TokenizerError: a tokenizer that llama.cpp's format has no words for, or more pieces than the model has rows.
    """
    if source is None:
        return {"tokenizer.ggml.model": ("none", STRING, None), **_id_entries({}, config)}, []
    if not isinstance(source, Tokenizer) and str(source).endswith(".gguf"):
        file = open_gguf(source)
        pieces = file.metadata.get("tokenizer.ggml.tokens")
        if isinstance(pieces, list) and len(pieces) == config.vocab_size:
            return {key: _copied(value, file.value_types[key]) for key, value in file.metadata.items()
                    if key.startswith("tokenizer.") and len(value if hasattr(value, "__len__") else [0])}, []
    tokenizer = load_tokenizer(source)
    return _described(tokenizer, config)


def _copied(value, kind):
    if not isinstance(kind, tuple):
        return value, kind, None
    return (value if isinstance(value, list) else value.tolist()), kind[0], kind[1]


def _described(tokenizer, config):
    state = json.loads(tokenizer.backend.to_str())
    model, added = state["model"], state["added_tokens"]
    if model["type"] != "BPE":
        raise TokenizerError(f"a tokenizer of the kind {model['type']} cannot be written into a GGUF file here; "
                             "byte-pair encoding is")
    if tokenizer.vocab_size > config.vocab_size:
        raise TokenizerError(f"the tokenizer has ids up to {tokenizer.vocab_size - 1}, but the model has only "
                             f"{config.vocab_size} rows of embeddings")
    pieces = [f"[PAD{index}]" for index in range(config.vocab_size)]
    types = [UNUSED] * config.vocab_size
    for piece, index in model["vocab"].items():
        pieces[index], types[index] = piece, NORMAL
    merges = [tuple(pair.split(" ", 1)) if isinstance(pair, str) else tuple(pair) for pair in model["merges"]]
    sentencepiece = _is_sentencepiece(state)
    if sentencepiece:
        for index, piece in enumerate(pieces):
            if model.get("byte_fallback") and is_byte_piece(piece) and types[index] == NORMAL:
                types[index] = BYTE
    for token in added:
        special = token["special"]
        pieces[token["id"]] = token["content"] if special else token["content"].replace("▁", " ")
        types[token["id"]] = CONTROL if special else USER_DEFINED
    if sentencepiece and model.get("unk_token") in model["vocab"]:
        types[model["vocab"][model["unk_token"]]] = UNKNOWN
    notes = [f"{token['content']!r} takes blanks beside it or stands for whole words only, which a GGUF file cannot say"
             for token in added if token.get("lstrip") or token.get("rstrip") or token.get("single_word")][:3]
    entries = {
        "tokenizer.ggml.model": ("llama" if sentencepiece else "gpt2", STRING, None),
        "tokenizer.ggml.pre": ("default" if sentencepiece else _rule(tokenizer.backend, model), STRING, None),
        "tokenizer.ggml.tokens": ([piece.encode("utf-8") for piece in pieces], ARRAY, STRING),
        "tokenizer.ggml.token_type": (types, ARRAY, INT32),
    }
    if sentencepiece:
        scores, in_order = _scores(pieces, types, merges)
        if not in_order:
            notes.append("the merges of this SentencePiece tokenizer do not follow one score a piece, as llama.cpp's "
                         "do: it may cut some texts otherwise")
        entries["tokenizer.ggml.scores"] = (scores, ARRAY, FLOAT32)
        plain = tokenizer.encode("x", add_special_tokens=False)
        prefix = bool(plain) and (tokenizer.backend.id_to_token(plain[0]) or "").startswith("▁")
        entries["tokenizer.ggml.add_space_prefix"] = (prefix, BOOL, None)
    elif merges:
        if any(" " in part for pair in merges for part in pair):
            raise TokenizerError("a merge of this byte-level tokenizer has a blank in it, which a GGUF file cannot "
                                 "hold")
        entries["tokenizer.ggml.merges"] = ([" ".join(pair).encode("utf-8") for pair in merges], ARRAY, STRING)
    ids = {"bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id, "unknown": tokenizer.unk_token_id,
           "padding": tokenizer.pad_token_id}
    entries.update(_id_entries(ids, config, pieces))
    notes += _added_around(tokenizer, entries)
    for name, template in tokenizer.chat_templates.items():
        entries["tokenizer.chat_template" + ("" if name == "default" else f".{name}")] = (template, STRING, None)
    others = [name for name in tokenizer.chat_templates if name != "default"]
    if others:
        entries["tokenizer.chat_templates"] = (others, ARRAY, STRING)
    return entries, notes + _differences(tokenizer, entries)


def is_byte_piece(piece: str) -> bool:
    """Whether a piece is SentencePiece's name of a byte, such as ``<0x0A>``."""
    return len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">")


def _is_sentencepiece(state):
    decoder = state.get("decoder") or {}
    kinds = {step.get("type") for step in decoder.get("decoders", [decoder])}
    if kinds & {"ByteFallback", "Metaspace"} or state["model"].get("byte_fallback"):
        return True
    if "ByteLevel" in kinds:
        return False
    raise TokenizerError(f"a tokenizer with the decoder {sorted(map(str, kinds))} is neither byte-level BPE nor "
                         "SentencePiece; a GGUF file can hold these two")


def _rule(backend, model):
    """llama.cpp's name of how the text is cut into words, found by cutting texts."""
    def cut(one, text):
        if one.normalizer is not None:
            text = one.normalizer.normalize_str(text)
        return [piece for piece, _ in one.pre_tokenizer.pre_tokenize_str(text)] if one.pre_tokenizer else [text]

    texts = [text for text in PROBES if "\u0301" not in text]  # Unicode normal forms are another matter
    own = [cut(backend, text) for text in texts]
    for name in _RULES:
        known, _ = tokenizer_build.from_gguf({"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": name,
                                              "tokenizer.ggml.tokens": [b"a"]}, name)
        whole = json.loads(known.to_str())["model"]["ignore_merges"]
        if own == [cut(known, text) for text in texts] and bool(model.get("ignore_merges")) == whole:
            return name
    raise TokenizerError("this byte-level tokenizer cuts words by a rule that is none of those known by a name in "
                         f"GGUF files here ({', '.join(_RULES)}); convert the model with llama.cpp's own converter")


def _scores(pieces, types, merges):
    """(a score for each piece, whether they order all merges as they stand)."""
    place, last, in_order = {}, None, True
    for rank, (left, right) in enumerate(merges):
        piece = left + right
        if piece != last and piece in place:
            in_order = False
        place.setdefault(piece, rank)
        last = piece
    worst = len(merges)
    scores = []
    for index, (piece, kind) in enumerate(zip(pieces, types)):
        if kind in (NORMAL, USER_DEFINED):
            scores.append(-float(place.get(piece, worst + index)))
        else:
            scores.append(-10000.0 if kind == UNUSED else 0.0)
    return scores, in_order


def _id_entries(ids, config, pieces=()):
    """Ids of special tokens: the tokenizer's own, else the config's; further ends as end of turn and of message."""
    ids = dict(ids)
    ids["bos"] = config.bos_token_id if ids.get("bos") is None else ids["bos"]
    ids["padding"] = config.pad_token_id if ids.get("padding") is None else ids["padding"]
    ends = [end for end in config.eos_token_ids if 0 <= end < config.vocab_size]
    if ids.get("eos") is None or ends and ids["eos"] not in ends:
        ids["eos"] = ends[0] if ends else ids.get("eos")
    rest = [end for end in ends if end != ids["eos"]]
    message = [end for end in rest if pieces and pieces[end] == "<|eom_id|>"]
    if message:
        ids["eom"] = message[0]
        rest.remove(message[0])
    if rest:
        ids["eot"] = rest[0]
    if rest[1:] and "eom" not in ids:
        ids["eom"] = rest[1]
    return {f"tokenizer.ggml.{name}_token_id": (value, UINT32, None) for name, value in ids.items()
            if value is not None and 0 <= value < config.vocab_size}


def _added_around(tokenizer, entries):
    """Set whether a begin token is put before texts (an end token never is, here); a note if there is more."""
    plain, ids = tokenizer.encode("x", add_special_tokens=False), tokenizer.encode("x")
    begin = ids[:1] == [entries.get("tokenizer.ggml.bos_token_id", (None,))[0]] and plain[:1] != ids[:1]
    entries["tokenizer.ggml.add_bos_token"] = (begin, BOOL, None)
    entries["tokenizer.ggml.add_eos_token"] = (False, BOOL, None)
    if (ids[1:] if begin else ids) == plain:
        return []
    return [f"the tokenizer makes {ids} of 'x', where a GGUF file can only put a begin token before {plain}"]


def _differences(tokenizer, entries):
    """A note if this package's own reader of the entries cuts a text otherwise."""
    again = Tokenizer(*tokenizer_build.from_gguf({key: value for key, (value, *_) in entries.items()}, "the written "
                                                                                                       "file"))
    specials = [token.content for token in tokenizer.backend.get_added_tokens_decoder().values()][:4]
    texts = [*PROBES, *(f"one{token}two {token} three" for token in specials)]
    for text in texts:
        if tokenizer.encode(text) != again.encode(text):
            return [f"texts such as {text!r} are cut otherwise by the tokenizer in the GGUF file: "
                    f"{again.encode(text)[:12]} in place of {tokenizer.encode(text)[:12]}"]
    return []
