"""Building a ``tokenizers.Tokenizer`` from a GGUF's metadata, a SentencePiece ``.model`` or a ``tokenizer.json``.

The first two are brought into the form that a ``tokenizer.json`` has, so that one code path encodes,
decodes and saves all of them.  Only byte-pair models are built (the Llama and Qwen families have
no others).
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from typing import TYPE_CHECKING, Optional

from colora_ms.errors import TokenizerError, near

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6

# How the words are cut before byte-pair merging, under the names that llama.cpp gave them.
_QWEN2 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
          r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
_LLAMA3 = _QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
_BYTE_PRE = {"smollm": "digits", "starcoder": "digits", "refact": "digits", "gpt-2": "plain",
             "qwen2": _QWEN2, "deepseek-r1-qwen": _QWEN2, "llama-bpe": _LLAMA3, "llama3": _LLAMA3,
             # Phi-4, OLMo-2 and SmolLM3: Llama 3's cut under other names
             "dbrx": _LLAMA3, "smaug-bpe": _LLAMA3}

# Tokens that end an answer by their name, whatever type the file gives them: llama.cpp's list (llama-vocab.cpp).
_END_NAMES = {"<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>",
              "<end_of_turn>",
              "<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>",
              "<end_of_utterance>", "<eos>", "<turn|>", "<|tool_response>"}


def from_gguf(metadata: Mapping, where: str) -> tuple[Backend, dict]:
    """The tokenizer inside a GGUF file.

    Args:
        metadata: ``GgufFile.metadata``.
        where: path for messages.

    Returns:
        ``(tokenizers.Tokenizer, settings)``, with ``settings`` as in ``tokenizer_config.json``
        (``bos_token``, ``eos_token``, ``unk_token``, ``pad_token``, ``chat_template``).

    Raises:
        TokenizerError: no tokenizer, one of a kind that is not built, or damaged tables.
    """
    kind = metadata.get("tokenizer.ggml.model")
    pieces = metadata.get("tokenizer.ggml.tokens")
    if kind not in ("gpt2", "llama") or not isinstance(pieces, list) or not pieces:
        raise TokenizerError(f"{where}: its tokenizer is {kind!r:.60}; 'gpt2' (byte-level BPE) and "
                             "'llama' (SentencePiece) are read")
    pieces = [piece.decode("utf-8", errors="replace") for piece in pieces]
    types = metadata.get("tokenizer.ggml.token_type")
    types = [_NORMAL] * len(pieces) if types is None else _integers(types, where)
    if len(types) != len(pieces):
        raise TokenizerError(f"{where}: {len(pieces)} tokens but {len(types)} token types")
    _refuse_repeats(pieces, types, where)
    ends = _known_ends(pieces, types)
    for index in ends:  # as in llama.cpp: files exist where such a token is an ordinary one
        types[index] = _CONTROL
    ids = {}
    for name, key in (("bos_token", "bos"), ("eos_token", "eos"), ("unk_token", "unknown"),
                      ("pad_token", "padding")):
        value = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if value is not None:
            if not _is_id(value, len(pieces)):
                raise TokenizerError(f"{where}: tokenizer.ggml.{key}_token_id is {value!r:.60}, "
                                     f"expected a number below {len(pieces)}")
            ids[name] = value
    if kind == "gpt2":
        tokenizer = _byte_level(metadata, pieces, types, where)
    else:
        scores = metadata.get("tokenizer.ggml.scores")
        if scores is None or len(scores) != len(pieces):
            raise TokenizerError(f"{where}: a SentencePiece tokenizer needs one score per token")
        prefix = metadata.get("tokenizer.ggml.add_space_prefix", True) is not False
        tokenizer = _sentencepiece(pieces, [float(item) for item in scores], types, prefix)
    # llama.cpp's defaults: SentencePiece and Llama 3 begin with BOS unless the file says otherwise
    default = kind == "llama" or metadata.get("tokenizer.ggml.pre") in ("llama-bpe", "llama3")
    begin = metadata.get("tokenizer.ggml.add_bos_token", default) is True
    finish = metadata.get("tokenizer.ggml.add_eos_token", False) is True
    add_template(tokenizer, pieces[ids["bos_token"]] if begin and "bos_token" in ids else None,
                 pieces[ids["eos_token"]] if finish and "eos_token" in ids else None)
    settings = {name: pieces[value] for name, value in ids.items()}
    settings["known_ends"] = ends
    settings["stored_ends"] = {f"tokenizer.ggml.{key}_token_id": [metadata[f"tokenizer.ggml.{key}_token_id"]]
                               for key in ("eos", "eot", "eom")
                               if _is_id(metadata.get(f"tokenizer.ggml.{key}_token_id"), len(pieces))}
    template = metadata.get("tokenizer.chat_template")
    if isinstance(template, str):
        settings["chat_template"] = template
    return tokenizer, settings


def _is_id(value, count):
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < count


def _known_ends(pieces, types):
    """Ids of the tokens whose name ends an answer, with llama.cpp's exceptions."""
    found = {piece: index for index, piece in enumerate(pieces) if piece in _END_NAMES and types[index] != _UNUSED}
    # where "<|end|>" only ends a part of an answer (gpt-oss, solar), and where "</s>" is an ordinary word (gemma 4)
    names = found.keys()
    if {"<|return|>", "<|call|>"} <= names or "<|flush|>" in names and names & {"<|call|>", "<|calls|>"}:
        found.pop("<|end|>", None)
    if "<|tool_response>" in found:
        found.pop("</s>", None)
    return sorted(found.values())


def _refuse_repeats(pieces, types, where):
    """Two ids for one piece: one of them could never be produced, and none is surely right."""
    seen = {}
    for index, (piece, kind) in enumerate(zip(pieces, types)):
        if kind != _UNUSED and seen.setdefault(piece, index) != index:
            raise TokenizerError(f"{where}: the piece {piece!r:.60} has the ids {seen[piece]} and "
                                 f"{index}; the vocabulary is damaged")


def _integers(values, where):
    try:
        return [int(item) for item in values]
    except (TypeError, ValueError):
        raise TokenizerError(f"{where}: tokenizer.ggml.token_type does not hold numbers") from None


def _byte_level(metadata, pieces, types, where):
    """Byte-level BPE: the vocabulary is written in GPT-2's printable byte alphabet."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
    pre = metadata.get("tokenizer.ggml.pre")
    if not isinstance(pre, str) or pre not in _BYTE_PRE:
        raise TokenizerError(f"{where}: the pre-tokenizer {pre!r:.60} is not known; known: "
                             f"{', '.join(_BYTE_PRE)}.{near(pre, _BYTE_PRE)} (A file without one "
                             "was made by an old llama.cpp: convert the model again)")
    vocab = {piece: index for index, piece in enumerate(pieces) if types[index] != _UNUSED}
    merges = []
    for line in metadata.get("tokenizer.ggml.merges") or []:
        pair = line.decode("utf-8", errors="replace").split(" ")
        if len(pair) != 2:
            raise TokenizerError(f"{where}: the merge {line[:60]!r} is not two pieces")
        merges.append(tuple(pair))
    rule = _BYTE_PRE[pre]
    try:
        tokenizer = Tokenizer(models.BPE(vocab, merges, fuse_unk=False,
                                         ignore_merges=rule is _LLAMA3))
    except Exception as error:  # the library raises plain Exception for a merge outside the vocab
        raise TokenizerError(f"{where}: the byte-pair merges do not fit the vocabulary ({error})"
                             ) from None
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=rule in ("digits", "plain"))
    if rule == "digits":
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), whole])
    elif rule == "plain":
        tokenizer.pre_tokenizer = whole
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(rule), behavior="isolated"), whole])
    if rule is _QWEN2:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    _add_tokens(tokenizer, pieces, types)
    return tokenizer


def from_json(path: str) -> Backend:
    """The tokenizer of a ``tokenizer.json``.

    Raises:
        TokenizerError: unreadable, damaged, or with ids that the library would give otherwise.
    """
    from tokenizers import Tokenizer
    try:
        backend = Tokenizer.from_file(path)
        with open(path, encoding="utf-8") as file:
            added = json.load(file).get("added_tokens") or []
    except Exception as error:  # the library raises plain Exception
        raise TokenizerError(f"{path} is not a usable tokenizer.json: {str(error)[:200]}") from None
    for token in added:
        # the library counts on from the last id, whatever the file says
        if backend.token_to_id(token["content"]) != token["id"]:
            raise TokenizerError(f"{path} gives the added token {token['content']!r:.60} the id {token['id']}, but its "
                                 f"vocabulary leaves {backend.token_to_id(token['content'])} for it")
    return backend


def from_sentencepiece(path: str, prefix: Optional[bool] = None, legacy: bool = True) -> tuple[Backend, dict]:
    """The tokenizer of a SentencePiece ``.model`` of type BPE.

    Args:
        path: the file.
        prefix: put a blank in front of the text; None: as the file says.
        legacy: put it in front of each text between special tokens, too (transformers' ``legacy``).

    Returns:
        ``(tokenizers.Tokenizer, settings)`` as ``from_gguf``.

    Raises:
        TokenizerError: unreadable, damaged, or not a byte-pair model.
    """
    try:
        with open(path, "rb") as file:
            data = file.read()
    except OSError as error:
        raise TokenizerError(f"{path} cannot be read: {error.strerror or error}") from None
    try:
        return _from_model_proto(data, path, prefix, legacy)
    except (struct.error, IndexError, UnicodeDecodeError, TypeError) as error:
        raise TokenizerError(f"{path} is not a usable SentencePiece model: {error}") from None


def _from_model_proto(data, path, prefix, legacy):
    """Field numbers are those of sentencepiece_model.proto.

    Read by hand, because sentencepiece's own module for the format needs the protobuf package, which it does not bring.
    """
    pieces, scores, types, trainer, normalizer = [], [], [], {}, {}
    for field, value in _fields(data):
        if field == 1:
            entry = dict(_fields(value))
            pieces.append(entry[1].decode("utf-8") if 1 in entry else "")
            scores.append(struct.unpack("<f", entry.get(2, b"\0\0\0\0"))[0])
            types.append(entry.get(3, _NORMAL))
        elif field == 2:
            trainer = dict(_fields(value))
        elif field == 3:
            normalizer = dict(_fields(value))
    if not pieces:
        raise TokenizerError(f"{path} is not a usable SentencePiece model: it holds no pieces")
    if trainer.get(3, 1) != 2:
        raise TokenizerError(f"{path} is a SentencePiece model of type {trainer.get(3, 1)}; only "
                             "byte-pair models (type 2) are read, as the Llama family has them")
    _refuse_repeats(pieces, types, path)
    if normalizer.get(2):
        raise TokenizerError(f"{path} normalizes its text with a character map, which is not "
                             "implemented; use the model's tokenizer.json")
    prefix = bool(normalizer.get(3, 1)) if prefix is None else prefix
    tokenizer = _sentencepiece(pieces, scores, types, prefix, collapse=bool(normalizer.get(4, 1)), legacy=legacy)
    settings = {}
    # protobuf writes -1 (no such token) as a 64-bit two's complement
    for name, field, default in (("unk_token", 40, 0), ("bos_token", 41, 1), ("eos_token", 42, 2),
                                 ("pad_token", 43, -1)):
        index = trainer.get(field, default)
        if 0 <= index < len(pieces):
            settings[name] = pieces[index]
    add_template(tokenizer, settings.get("bos_token"), None)
    return tokenizer, settings


def _fields(data):
    """The (field number, value) pairs of a protobuf message; bytes for lengths, ints for varints."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        field, wire = key >> 3, key & 7
        if wire == 0:
            value, at = _varint(data, at)
        elif wire in (1, 2, 5):
            size = 8 if wire == 1 else 4
            if wire == 2:
                size, at = _varint(data, at)
            if size > len(data) - at:
                raise IndexError(f"it ends in the middle of field {field}")
            value, at = data[at:at + size], at + size
        else:
            raise IndexError(f"field {field} has the wire type {wire}")
        yield field, value


def _varint(data, at):
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
        if shift > 63:
            raise IndexError("a number is longer than 64 bits")


def _sentencepiece(pieces, scores, types, prefix, collapse=False, legacy=True):
    """SentencePiece BPE: merges are every split of a piece into two pieces, best score first."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
    vocab = {piece: index for index, piece in enumerate(pieces)}
    unknown = next((piece for piece, kind in zip(pieces, types) if kind == _UNKNOWN), None)
    usable = {piece for piece, kind in zip(pieces, types)
              if kind in (_NORMAL, _USER_DEFINED, _UNUSED)}
    merges = []
    for index, piece in enumerate(pieces):
        if types[index] != _NORMAL:
            continue
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in usable and right in usable:
                merges.append((-scores[index], vocab[left], vocab[right], left, right))
    merges.sort(key=lambda item: item[:3])
    tokenizer = Tokenizer(models.BPE(vocab, [item[3:] for item in merges], unk_token=unknown,
                                     fuse_unk=True, byte_fallback=_BYTE in types))
    steps = []
    if collapse:
        steps = [normalizers.Replace(Regex(" {2,}"), " "), normalizers.Strip()]
    if legacy:
        steps += [normalizers.Prepend("▁")] if prefix else []
        steps.append(normalizers.Replace(" ", "▁"))
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first" if prefix else "never", split=False)
    if steps:
        tokenizer.normalizer = normalizers.Sequence(steps)
    after = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if prefix:
        after.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(after)
    _add_tokens(tokenizer, [piece.replace("▁", " ") if kind == _USER_DEFINED and piece.strip("▁")
                            == "" else piece for piece, kind in zip(pieces, types)], types)
    return tokenizer


def _add_tokens(tokenizer, pieces, types):
    """Control tokens become special, user-defined ones plain added tokens; ids stay the same."""
    from tokenizers import AddedToken
    special = [AddedToken(piece, special=True, normalized=False)
               for piece, kind in zip(pieces, types) if kind in (_CONTROL, _UNKNOWN)]
    plain = [AddedToken(piece, special=False, normalized=False)
             for piece, kind in zip(pieces, types) if kind == _USER_DEFINED]
    tokenizer.add_special_tokens(special)
    tokenizer.add_tokens(plain)


def add_template(tokenizer: Backend, begin: Optional[str], end: Optional[str]) -> None:
    """Let the post-processor put ``begin`` and ``end`` (token strings or None) around every text, and nothing else."""
    from tokenizers import processors
    single = ([begin] if begin else []) + ["$A"] + ([end] if end else [])
    pair = ([f"{begin}:0"] if begin else []) + ["$A:0"] + ([f"{end}:0"] if end else []) + \
        ([f"{begin}:1"] if begin else []) + ["$B:1"] + ([f"{end}:1"] if end else [])
    names = [(name, tokenizer.token_to_id(name)) for name in (begin, end) if name]
    tokenizer.post_processor = processors.TemplateProcessing(single=single, pair=pair,
                                                             special_tokens=names)
