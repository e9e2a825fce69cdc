"""Tokenizers: text to ids and back, streaming, chat templates.

Sources: ``tokenizer.json``, a SentencePiece ``tokenizer.model``, the tables inside a GGUF.  The
``tokenizers`` library does the work for all of them.
"""

import codecs
import json
import os
import re

import numpy as np

from colora_ms.errors import CheckpointError, TokenizerError
from colora_ms.models import chat_template, tokenizer_build
from colora_ms.models.gguf_parts import open_gguf
from colora_ms.models.hf_folder import read_json

_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token")


class Tokenizer:
    """A tokenizer with its special tokens and chat template.

    Attributes:
        bos_token_id, eos_token_id, pad_token_id, unk_token_id: ``int`` or ``None``.
        vocab_size: largest id + 1 (a model's embedding may have more rows).
        chat_template: Jinja2 source or ``None``.
        backend: the ``tokenizers.Tokenizer``.
    """

    def __init__(self, backend, settings):
        """
        Args:
            backend: ``tokenizers.Tokenizer``.
            settings: ``{"bos_token": str, "eos_token": ..., "chat_template": ...}``.
        """
        # a stored truncation would cut prompts without a word
        backend.no_truncation()
        backend.no_padding()
        self.backend = backend
        self.chat_template = settings.get("chat_template")
        self.special_tokens = {name: settings[name] for name in _NAMES if settings.get(name)}
        for name in _NAMES:
            token = self.special_tokens.get(name)
            index = None if token is None else backend.token_to_id(token)
            if token is not None and index is None:
                raise TokenizerError(f"{name} is {token!r:.60}, which the vocabulary does not have")
            setattr(self, name + "_id", index)
        self.vocab_size = max(backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        if self.vocab_size < 1:
            raise TokenizerError("the tokenizer has an empty vocabulary")

    def encode(self, text, add_special_tokens=True):
        """Token ids of a text.

        Special tokens that are spelled out in the text become their ids, as in a rendered chat.

        Args:
            text: ``str``.
            add_special_tokens: put the begin (or end) token that the model was trained with.

        Returns:
            ``list[int]``; may be empty.

        Raises:
            TokenizerError: not a string, or a string with unpaired surrogates.
        """
        if not isinstance(text, str):
            raise TokenizerError(f"the text is a {type(text).__name__}, expected str")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise TokenizerError(f"the text cannot be encoded: it has the unpaired surrogate "
                                 f"{text[error.start]!r} at position {error.start}") from None
        return self.backend.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, ids, skip_special_tokens=True):
        """Text of token ids; bytes that are no UTF-8 become U+FFFD.

        Ids without a token (rows that only pad a model's embedding) give no text.

        Args:
            ids: integers, a list or a one-dimensional array.
            skip_special_tokens: leave out begin, end and other control tokens.

        Raises:
            TokenizerError: something that is not a token id.
        """
        return self.backend.decode([_token_id(item) for item in ids],
                                   skip_special_tokens=skip_special_tokens)

    def stream(self, skip_special_tokens=True):
        """A fresh ``StreamDecoder`` of this tokenizer."""
        return StreamDecoder(self, skip_special_tokens)

    def apply_chat_template(self, messages, add_generation_prompt=True, **variables):
        """The prompt text of a conversation; encode it with ``add_special_tokens=False``.

        Args:
            messages: list of ``{"role": "system" | "user" | "assistant", "content": str}``.
            add_generation_prompt: end with the opening of the assistant's turn.
            **variables: further names for the template, e.g. ``tools``.

        Returns:
            ``str``.

        Raises:
            TokenizerError: there is no template, or it refuses the messages.
        """
        if not self.chat_template:
            raise TokenizerError("this model has no chat template; write the prompt yourself and "
                                 "use encode()")
        names = {name: token for name, token in self.special_tokens.items()}
        return chat_template.render(self.chat_template, messages, add_generation_prompt,
                                    dict(names, **variables))

    def save(self, folder):
        """Write ``tokenizer.json`` and ``tokenizer_config.json``, as transformers reads them.

        Raises:
            TokenizerError: the folder cannot be written.
        """
        config = {"tokenizer_class": "PreTrainedTokenizerFast", **self.special_tokens,
                  "clean_up_tokenization_spaces": False,
                  "model_input_names": ["input_ids", "attention_mask"]}
        if self.chat_template:
            config["chat_template"] = self.chat_template
        try:
            os.makedirs(folder, exist_ok=True)
            for name, text in (("tokenizer.json", self.backend.to_str()),
                               ("tokenizer_config.json",
                                json.dumps(config, indent=2, ensure_ascii=False))):
                # a reader never sees half a file
                path = os.path.join(folder, name)
                with open(path + ".tmp", "w", encoding="utf-8") as file:
                    file.write(text + "\n")
                os.replace(path + ".tmp", path)
        except OSError as error:
            raise TokenizerError(f"the tokenizer cannot be written to {folder}: "
                                 f"{error.strerror or error}") from None


class StreamDecoder:
    """Text of ids that arrive one at a time; never emits half a character.

    The pieces of ``push`` and the final ``flush``, joined, are ``decode`` of all ids.  (Only for
    SentencePiece byte tokens that are no valid UTF-8 may the number of U+FFFD differ.)
    """

    def __init__(self, tokenizer, skip_special_tokens=True):
        self._backend = tokenizer.backend
        self._skip = set()
        if skip_special_tokens:
            self._skip = {index for index, token in
                          self._backend.get_added_tokens_decoder().items() if token.special}
        self._spm, self._strip = _decoder_kind(self._backend)
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._started = False

    def push(self, token_id):
        """Take one id; return the text that is now certain (often ``""``)."""
        token_id = _token_id(token_id)
        token = self._backend.id_to_token(token_id)
        if token is None or token_id in self._skip:
            return ""
        if not self._spm:
            return self._utf8.decode(_byte_level_bytes(token))
        if _BYTE_TOKEN.fullmatch(token):
            return self._first(self._utf8.decode(bytes([int(token[3:5], 16)])))
        # a whole piece ends any unfinished byte sequence
        return self._first(self._utf8.decode(b"", final=True) + token.replace("▁", " "))

    def flush(self):
        """End of the text: an unfinished character becomes U+FFFD.  The decoder starts anew."""
        text = self._first(self._utf8.decode(b"", final=True))
        self._utf8.reset()
        self._started = False
        return text

    def _first(self, text):
        """SentencePiece's artificial blank at the very beginning is not text."""
        if text and not self._started:
            self._started = True
            if self._strip and text[0] == " ":
                return text[1:]
        return text


_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")


def _decoder_kind(backend):
    """(is SentencePiece, strips the first blank) of a tokenizer's decoder."""
    decoder = json.loads(backend.decoder.__getstate__()) if backend.decoder else {"type": None}
    steps = decoder.get("decoders", [decoder])
    kinds = [step.get("type") for step in steps]
    if kinds == ["ByteLevel"]:
        return False, False
    if "ByteFallback" in kinds or "Metaspace" in kinds:
        strip = any(step.get("type") == "Strip" and step.get("start") == 1 for step in steps) or \
            any(step.get("type") == "Metaspace" and step.get("prepend_scheme") != "never"
                for step in steps)
        return True, strip
    raise TokenizerError(f"streaming is not implemented for a tokenizer whose decoder is {kinds}")


def _byte_alphabet():
    """GPT-2's printable stand-ins of the 256 bytes, as {character: byte}."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(256) if byte not in printable]
    table.update({chr(256 + index): byte for index, byte in enumerate(others)})
    return table


_ALPHABET = _byte_alphabet()


def _byte_level_bytes(token):
    """The bytes of a byte-level token; an added token outside the alphabet stands for itself."""
    try:
        return bytes([_ALPHABET[character] for character in token])
    except KeyError:
        return token.encode("utf-8")


def _token_id(value):
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, np.integer)) \
            or not 0 <= value < 1 << 32:
        raise TokenizerError(f"{value!r:.60} is not a token id; expected integers from 0")
    return int(value)


def load_tokenizer(source):
    """Read a tokenizer.

    Args:
        source: a folder with ``tokenizer.json`` or ``tokenizer.model``, one of these files, a
            ``.gguf`` file, or a ``Tokenizer`` (returned as it is).

    Returns:
        Tokenizer.

    Raises:
        TokenizerError: nothing there, damaged, or of a kind that is not read.
    """
    if isinstance(source, Tokenizer):
        return source
    if source is None:
        raise TokenizerError("this model has no tokenizer; put its tokenizer.json (or "
                             "tokenizer.model) beside the weights")
    path = os.fspath(source)
    try:
        if os.path.isdir(path):
            for name in ("tokenizer.json", "tokenizer.model"):
                if os.path.isfile(os.path.join(path, name)):
                    return load_tokenizer(os.path.join(path, name))
            raise TokenizerError(f"{path} has neither tokenizer.json nor tokenizer.model")
        if not os.path.isfile(path):
            raise TokenizerError(f"there is no file or folder {path}")
        if path.endswith(".gguf"):
            return Tokenizer(*tokenizer_build.from_gguf(open_gguf(path).metadata, path))
        if path.endswith(".model"):
            backend, settings = tokenizer_build.from_sentencepiece(path)
            stored = _read_settings(os.path.dirname(path))
            return Tokenizer(backend, {**settings, **stored})
        if path.endswith(".json"):
            return _from_json(path)
    except CheckpointError as error:
        raise TokenizerError(str(error)) from None
    raise TokenizerError(f"{path} is no tokenizer that is read; expected tokenizer.json, "
                         "tokenizer.model or a .gguf file")


def _from_json(path):
    from tokenizers import Tokenizer as Backend
    try:
        backend = Backend.from_file(path)
    except Exception as error:  # the library raises plain Exception
        raise TokenizerError(f"{path} is not a usable tokenizer.json: {str(error)[:200]}") from None
    settings = _read_settings(os.path.dirname(path))
    if settings.pop("tokenizer_class", None) in ("LlamaTokenizer", "LlamaTokenizerFast"):
        # these classes of transformers set the begin token by their flags, not by the file
        begin, end = settings.get("add_bos_token", True), settings.get("add_eos_token", False)
        tokenizer_build.add_template(backend, settings.get("bos_token") if begin else None,
                                     settings.get("eos_token") if end else None)
    return Tokenizer(backend, settings)


def _read_settings(folder):
    """Special tokens and chat template from the files beside a tokenizer."""
    settings = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        path = os.path.join(folder, name)
        if os.path.isfile(path):
            values = read_json(path)
            if not isinstance(values, dict):
                raise TokenizerError(f"{path} does not hold a JSON object")
            settings.update(values)
    for name in _NAMES:
        value = settings.get(name)
        if isinstance(value, dict):
            settings[name] = value = value.get("content")
        if value is not None and not isinstance(value, str):
            raise TokenizerError(f"{folder}: {name} is {value!r:.60}, expected a string")
    template = settings.get("chat_template")
    if isinstance(template, list):
        named = {item.get("name"): item.get("template") for item in template
                 if isinstance(item, dict)}
        settings["chat_template"] = named.get("default")
    path = os.path.join(folder, "chat_template.jinja")
    if os.path.isfile(path):
        with open(path, encoding="utf-8") as file:
            settings["chat_template"] = file.read()
    keep = _NAMES + ("chat_template", "tokenizer_class", "add_bos_token", "add_eos_token")
    return {name: settings[name] for name in keep if settings.get(name) is not None}
