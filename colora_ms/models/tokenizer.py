"""Tokenizers: text to ids and back, streaming, chat templates.

Sources: ``tokenizer.json``, a SentencePiece ``tokenizer.model``, the tables inside a GGUF.  The
``tokenizers`` library does the work for all of them.
"""

from __future__ import annotations

import functools
import json
import os
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Optional, Union

import numpy as np

from colora_ms.errors import CheckpointError, TokenizerError
from colora_ms.files import PathLike, replacing
from colora_ms.models import chat_template, detokenizer, tokenizer_build, turn_ends
from colora_ms.models.added_tokens import add_tokens, settings_of
from colora_ms.models.detokenizer import StreamDecoder
from colora_ms.models.gguf_parts import open_gguf
from colora_ms.models.tokenizer_classes import FLAG_CLASSES
from colora_ms.models.tokenizer_files import NAMED, read_tokenizer_files

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

_WITH_ID = ("bos_token", "eos_token", "unk_token", "pad_token")


class Tokenizer:
    """A tokenizer with its special tokens and chat template.

    Attributes:
        bos_token_id, eos_token_id, pad_token_id, unk_token_id: ``int`` or ``None``.
        vocab_size: largest id + 1 (a model's embedding may have more rows).
        special_tokens: {name: token}, as templates see them; ``additional_special_tokens`` is a list.
        stored_ends: {file, or key of a GGUF: end-token ids that it names}; see ``turn_ends``.
        known_ends: ids that end a turn by the name of their token in a GGUF's vocabulary.
        chat_template: Jinja2 source or ``None`` (of several: the one called "default").
        chat_templates: {name: Jinja2 source}; a single one is called "default".
        backend: the ``tokenizers.Tokenizer``.
    """

    def __init__(self, backend: Backend, settings: Mapping) -> None:
        """
        Args:
            backend: ``tokenizers.Tokenizer``.
            settings: ``{"bos_token": str, "eos_token": ..., "chat_template": ...}``, with the names of
                ``tokenizer_files.NAMED``, ``additional_special_tokens`` (list), ``extra_special_tokens``
                ({name: token}), ``chat_template`` (source, or {name: source}), ``stored_ends``
                ({file or key: end-token ids}) and ``known_ends`` (ids that end a turn by their name).
        """
        # a stored truncation would cut prompts without a word
        backend.no_truncation()
        backend.no_padding()
        self.backend = backend
        self._plain = _without_processor(backend)
        self._begin = _begin_ids(backend, self._plain)
        # tokens that swallow the blanks beside them, which are no text of theirs
        self._greedy = {index: token.content for index, token in backend.get_added_tokens_decoder().items()
                        if (token.lstrip or token.rstrip) and not token.normalized}
        templates = settings.get("chat_template")
        #: {name: Jinja2 source}; a model with one template has it as "default"
        self.chat_templates = dict(templates) if isinstance(templates, dict) else \
            {"default": templates} if templates else {}
        self.chat_template = self.chat_templates.get("default")
        self.special_tokens = {name: settings[name] for name in NAMED if settings.get(name)}
        self.special_tokens.update(settings.get("extra_special_tokens") or {})
        if settings.get("additional_special_tokens"):
            self.special_tokens["additional_special_tokens"] = list(settings["additional_special_tokens"])
        self.stored_ends = dict(settings.get("stored_ends") or {})
        self.known_ends = tuple(settings.get("known_ends") or ())
        for name in _WITH_ID:
            token = self.special_tokens.get(name)
            index = None if token is None else backend.token_to_id(token)
            if token is not None and index is None:
                raise TokenizerError(f"{name} is {token!r:.60}, which the vocabulary does not have")
            setattr(self, name + "_id", index)
        self.vocab_size = max(backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        if self.vocab_size < 1:
            raise TokenizerError("the tokenizer has an empty vocabulary")

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text.

        Special tokens that are spelled out in the text become their ids, as in a rendered chat.
        There is never an end token behind the text, whatever the files say (``add_eos_token``): a
        prompt goes on.  Who closes a document appends ``eos_token_id``.

        Args:
            text: ``str``.
            add_special_tokens: put the begin token that the model was trained with.

        Returns:
            ``list[int]``; may be empty.

        Raises:
            TokenizerError: not a string, or a string with unpaired surrogates.
        """
        ids = self._encoding(text).ids
        return self._begin + ids if add_special_tokens else ids

    def encode_offsets(self, text: str, add_special_tokens: bool = True) -> tuple[list[int], np.ndarray]:
        """``encode``, with the place of each token in the text.

        Args:
            text, add_special_tokens: as in ``encode``.

        Returns:
            ``(ids, offsets)``: ``list[int]`` and an int64 array ``(tokens, 2)`` with the first
            character of each token and the one behind its last.  A token that is a part of a
            character has the whole character; a begin token has (0, 0).

        Raises:
            TokenizerError: as ``encode``.
        """
        found = self._encoding(text)
        ids = found.ids
        offsets = np.array(found.offsets, np.int64).reshape(-1, 2)
        if self._greedy:
            for place, index in enumerate(ids):
                content = self._greedy.get(index)
                at = -1 if content is None else text.find(content, *offsets[place])
                if at >= 0:
                    offsets[place] = at, at + len(content)
        if add_special_tokens and self._begin:
            ids = self._begin + ids
            offsets = np.concatenate([np.zeros((len(self._begin), 2), np.int64), offsets])
        return ids, offsets

    def normalize(self, text: str) -> str:
        """The text as the tokenizer's normaliser changes it before it is cut into tokens."""
        normalizer = self.backend.normalizer
        return text if normalizer is None else normalizer.normalize_str(text)

    def _encoding(self, text):
        if not isinstance(text, str):
            raise TokenizerError(f"the text is a {type(text).__name__}, expected str")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise TokenizerError(f"the text cannot be encoded: it has the unpaired surrogate "
                                 f"{text[error.start]!r} at position {error.start}") from None
        return self._plain.encode(text, add_special_tokens=False)

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True, before: Iterable[int] = ()) -> str:
        """Text of token ids; bytes that are no UTF-8 become U+FFFD.

        Ids without a token (rows that only pad a model's embedding) give no text.

        Args:
            ids: integers, a list or a one-dimensional array.
            skip_special_tokens: leave out begin, end and other control tokens.
            before: ids that stand before, whose text is not given; see ``models.detokenizer``.

        Raises:
            TokenizerError: something that is not a token id, or a decoder that is not implemented.
        """
        return detokenizer.decode(self, ids, before, skip_special_tokens)

    def stream(self, skip_special_tokens: bool = True, before: Iterable[int] = (),
               shown: Collection[str] = ()) -> StreamDecoder:
        """A fresh ``StreamDecoder`` of this tokenizer."""
        return StreamDecoder(self, skip_special_tokens, before, shown)

    def apply_chat_template(self, messages: Sequence[Mapping], add_generation_prompt: bool = True,
                            return_spans: bool = False, continue_final_message: bool = False,
                            **variables: object) -> Union[str, tuple[str, list[tuple[int, int]]]]:
        """The prompt text of a conversation; encode it with ``add_special_tokens=False``.

        Of several named templates the one called "tool_use" is taken where tools are given, else
        "default".

        Args:
            messages: list of ``{"role": ..., "content": ...}``, see ``chat_template.render``.
            add_generation_prompt: end with the opening of the assistant's turn.
            return_spans: also tell where the template's ``{% generation %}`` blocks lie.
            continue_final_message: end behind the last message's text, so that it is gone on with;
                needs ``add_generation_prompt=False``.
            **variables: further names for the template, e.g. ``tools``, ``documents``.

        Returns:
            ``str``; with ``return_spans`` ``(str, [(begin, end), ...])`` in characters.

        Raises:
            TokenizerError: there is no template, or it refuses the messages.
        """
        template = self.template_for(variables.get("tools"))
        variables = {**self.special_tokens, **variables}
        if return_spans:
            if continue_final_message:
                raise TokenizerError("return_spans and continue_final_message cannot be asked for together")
            return chat_template.render_spans(template, messages, add_generation_prompt, variables)
        return chat_template.render(template, messages, add_generation_prompt, variables,
                                    continue_final_message)

    @functools.cached_property
    def closing_tokens(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Ids that the chat template writes behind an assistant's text, see ``turn_ends.closing_tokens``."""
        return turn_ends.closing_tokens(self)

    def marks_generation(self, tools: Optional[list] = None) -> bool:
        """Whether the chat template marks the assistant's turns with ``{% generation %}`` blocks.

        Args:
            tools: as for ``apply_chat_template``: there may be another template for them.
        """
        return chat_template.marks_generation(self.template_for(tools))

    def template_for(self, tools: Optional[Sequence] = None) -> str:
        """The source of the chat template for a conversation with these tools, see ``apply_chat_template``.

        Raises:
            TokenizerError: there is none.
        """
        if not self.chat_templates:
            raise TokenizerError("this model has no chat template; write the prompt yourself and "
                                 "use encode()")
        if tools is not None and "tool_use" in self.chat_templates:
            return self.chat_templates["tool_use"]
        if "default" not in self.chat_templates:
            raise TokenizerError(f"this model has the chat templates {', '.join(sorted(self.chat_templates))}, but "
                                 "none called 'default'")
        return self.chat_templates["default"]

    def save(self, folder: PathLike) -> None:
        """Write ``tokenizer.json`` and ``tokenizer_config.json``, as transformers reads them.

        Raises:
            TokenizerError: the folder cannot be written.
        """
        named = {name: token for name, token in self.special_tokens.items()
                 if name in NAMED or name == "additional_special_tokens"}
        extra = {name: token for name, token in self.special_tokens.items() if name not in named}
        config = {"tokenizer_class": "PreTrainedTokenizerFast", **named,
                  **({"extra_special_tokens": extra} if extra else {}),
                  **({"split_special_tokens": True} if self.backend.encode_special_tokens else {}),
                  **({"add_prefix_space": True} if _byte_level(self.backend).get("add_prefix_space") else {}),
                  "clean_up_tokenization_spaces": False,
                  "model_input_names": ["input_ids", "attention_mask"]}
        if list(self.chat_templates) == ["default"]:
            config["chat_template"] = self.chat_template
        elif self.chat_templates:
            config["chat_template"] = [{"name": name, "template": template}
                                       for name, template in self.chat_templates.items()]
        def refused(reason):
            return TokenizerError(f"the tokenizer cannot be written to {folder}: {reason}")

        try:
            os.makedirs(folder, exist_ok=True)
            for name, text in (("tokenizer.json", self.backend.to_str()),
                               ("tokenizer_config.json",
                                json.dumps(config, indent=2, ensure_ascii=False))):
                with replacing(os.path.join(folder, name), refused) as temporary:
                    temporary.write_text(text + "\n", encoding="utf-8")
        except OSError as error:
            raise refused(error.strerror or error) from None


def _without_processor(backend):
    """The backend without its post-processor, which trims blanks off the offsets; the model is shared, not copied."""
    from tokenizers import Tokenizer as Backend
    if backend.post_processor is None:
        return backend
    plain = Backend(backend.model)
    if backend.normalizer is not None:
        plain.normalizer = backend.normalizer
    if backend.pre_tokenizer is not None:
        plain.pre_tokenizer = backend.pre_tokenizer
    added = backend.get_added_tokens_decoder()
    plain.add_tokens([added[index] for index in sorted(added)])
    plain.encode_special_tokens = backend.encode_special_tokens
    if {index: token.content for index, token in plain.get_added_tokens_decoder().items()} != \
            {index: token.content for index, token in added.items()}:
        raise TokenizerError("the added tokens of the tokenizer have ids with gaps between them")
    return plain


def _begin_ids(backend, plain):
    """The ids that the post-processor puts in front of a text."""
    if backend.post_processor is None:
        return []
    for text in ("a", *list(backend.get_vocab(with_added_tokens=True))[:1000]):
        inner = plain.encode(text, add_special_tokens=False).ids
        if inner:
            outer = backend.encode(text, add_special_tokens=True)
            own = [place for place, number in enumerate(outer.sequence_ids) if number is not None]
            if own and outer.ids[own[0]:own[0] + len(inner)] == inner:
                return outer.ids[:own[0]]
    raise TokenizerError("the tokenizer's post-processor does more than to put tokens around a text, which is not "
                         "implemented")


def load_tokenizer(source: Union[Tokenizer, PathLike, None]) -> Tokenizer:
    """Read a tokenizer.

    Args:
        source: a folder with ``tokenizer.json`` or ``tokenizer.model``, one of these files, a
            ``.gguf`` file, or a ``Tokenizer`` (returned as it is).  What else the folder says about
            the tokenizer is read, too (see ``tokenizer_files``).

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
                    return _from_folder(path, name)
            raise TokenizerError(f"{path} has neither tokenizer.json nor tokenizer.model")
        if not os.path.isfile(path):
            raise TokenizerError(f"there is no file or folder {path}")
        if path.endswith(".gguf"):
            return Tokenizer(*tokenizer_build.from_gguf(open_gguf(path).metadata, path))
        if path.endswith((".model", ".json")):
            return _from_folder(*os.path.split(path))
    except CheckpointError as error:
        raise TokenizerError(str(error)) from None
    raise TokenizerError(f"{path} is no tokenizer that is read; expected tokenizer.json, "
                         "tokenizer.model or a .gguf file")


def _from_folder(folder, name):
    """The tokenizer of the file ``name`` with what the files beside it say."""
    files = read_tokenizer_files(folder)
    options, base = files.options, {}
    kind = files.kind or ("LlamaTokenizer" if name.endswith(".model") else None)
    rebuilt = kind == "LlamaTokenizer" and name == "tokenizer.json" and \
        (options.get("add_prefix_space") is not None or options.get("from_slow")) and \
        os.path.isfile(os.path.join(folder, "tokenizer.model"))
    backend = None
    if name.endswith(".model") or rebuilt:
        # as transformers: with these options tokenizer.json does not count
        path = os.path.join(folder, "tokenizer.model" if rebuilt else name)
        legacy = options.get("legacy") is not False or kind != "LlamaTokenizer"
        try:
            backend, base = tokenizer_build.from_sentencepiece(path, options.get("add_prefix_space"), legacy)
        except TokenizerError as error:
            if not rebuilt:
                raise
            warnings.warn(f"add_prefix_space calls for {path}, but {error}; tokenizer.json is used as it is",
                          stacklevel=3)
    if backend is None:
        backend = tokenizer_build.from_json(os.path.join(folder, name))
    add_tokens(backend, files, folder)
    settings = settings_of(files, backend, base)
    flags = FLAG_CLASSES.get("LlamaTokenizer" if name.endswith(".model") and kind not in FLAG_CLASSES else kind)
    if flags is not None:
        begin, end = (options.get(option, default) for option, default in zip(("add_bos_token", "add_eos_token"),
                                                                              flags))
        tokens = [settings.get(token) if wanted else None
                  for token, wanted in (("bos_token", begin), ("eos_token", end))]
        if (tokens[0] or not begin) and all(backend.token_to_id(token) is not None for token in tokens if token):
            tokenizer_build.add_template(backend, *tokens)
    if kind != "LlamaTokenizer" and options.get("add_prefix_space", False) is not None:
        _set_prefix_space(backend, options.get("add_prefix_space", False))
    if options.get("split_special_tokens"):
        backend.encode_special_tokens = True
    tokenizer = Tokenizer(backend, settings)
    wanted = options.get("add_bos_token")
    if wanted is not None and flags is None and wanted != bool(tokenizer.encode("")):
        puts = "no" if wanted else "a"
        warnings.warn(f"{folder}: tokenizer_config.json says add_bos_token: {json.dumps(wanted)}, but the "
                      f"post-processor of {name} decides, as in transformers, and puts {puts} begin token",
                      stacklevel=3)
    return tokenizer


def _byte_level(backend):
    """The state of a ByteLevel pre-tokenizer; empty for another."""
    state = {} if backend.pre_tokenizer is None else json.loads(backend.pre_tokenizer.__getstate__())
    return state if state.get("type") == "ByteLevel" else {}


def _set_prefix_space(backend, wanted):
    """transformers puts the config's add_prefix_space (false if it has none) into a ByteLevel pre-tokenizer."""
    from tokenizers import pre_tokenizers
    state = _byte_level(backend)
    if state and state.get("add_prefix_space") != wanted:
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(
            add_prefix_space=wanted, **{name: state[name] for name in ("trim_offsets", "use_regex") if name in state})
