"""What the files of a model folder say about its tokenizer, beside ``tokenizer.json`` or ``tokenizer.model``.

Read are ``tokenizer_config.json``, ``special_tokens_map.json``, ``added_tokens.json``,
``chat_template.jinja``, ``additional_chat_templates/*.jinja``, and the end tokens of ``config.json``
and ``generation_config.json``.  Where files disagree, the one counts that transformers (4.57) takes, and a
warning says so: if ``tokenizer_config.json`` has ``added_tokens_decoder``, it stands before the two older
files; if not, ``special_tokens_map.json`` stands before it.
"""

from __future__ import annotations

import dataclasses
import json
import os
import warnings
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Optional, Union

from colora_ms.errors import TokenizerError
from colora_ms.files import read_json
from colora_ms.models.tokenizer_classes import CLASS_TOKENS, tokenizer_class

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

#: Tokens that have a name of their own.
NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")

TOKENIZER_CONFIG, _MAP, _ADDED = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"

# Without these the vocabulary cannot be what the model was trained with; the others (of models that only
# understand text) are left out with a warning if the vocabulary lacks them.
NEEDED = ("bos_token", "eos_token", "unk_token", "pad_token")

_USED = {*NAMED, "additional_special_tokens", "extra_special_tokens", "added_tokens_decoder", "add_bos_token",
         "add_eos_token", "add_prefix_space", "legacy", "chat_template", "split_special_tokens", "tokenizer_class",
         "from_slow"}
# no influence on ids: other parts of transformers, padding and truncation, how ids become text there
_QUIET = {"model_max_length", "padding_side", "truncation_side", "clean_up_tokenization_spaces", "model_input_names",
          "name_or_path", "auto_map", "processor_class", "use_default_system_prompt", "use_fast", "errors",
          "tokenizer_file", "special_tokens_map_file", "pad_to_multiple_of", "pad_token_type_id", "max_length",
          "max_len",
          "stride", "truncation_strategy", "truncation", "padding", "spaces_between_special_tokens", "init_inputs",
          "transformers_version", "is_local", "local_files_only", "trust_remote_code", "backend", "response_schema",
          "return_token_type_ids", "fast_tokenizer_files", "verbose", "model_specific_special_tokens", "vocab_size",
          "bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id"}


@dataclasses.dataclass(frozen=True)
class TokenizerFiles:
    """The content of the files.

    Attributes:
        named: {one of ``NAMED``: token}, as far as the files say.
        defaults: the same for what transformers' class takes where the files say nothing.
        extra: {a model's own name such as "image_token": token}.
        flags: {token: keyword arguments of ``AddedToken``} of ``named``, ``extra`` and ``additional``.
        additional: special tokens without a name, in order.
        added: {id: ``AddedToken`` as keyword arguments (content, lstrip, ...)}.
        source: the file that ``added`` is from.
        options: ``add_bos_token``, ``add_eos_token``, ``add_prefix_space``, ``legacy``, ``split_special_tokens`` and
            ``from_slow``, where they are given.
        kind: transformers' class without "Fast" ("LlamaTokenizer", ...), or None.
        templates: {name: Jinja2 source}.
        ends: {"config.json" or "generation_config.json": end-token ids}.
    """

    named: dict
    defaults: dict
    extra: dict
    flags: dict
    additional: tuple
    added: dict
    source: str
    options: dict
    kind: Optional[str]
    templates: dict
    ends: dict

    def named_in(self, backend: Backend,
                 base: Union[Mapping[str, str], Iterable[tuple[str, str]]] = ()) -> dict[str, str]:
        """The named tokens: the files' own, else those of ``base``, else the class's where the vocabulary has them."""
        defaults = {name: token for name, token in self.defaults.items() if backend.token_to_id(token) is not None}
        said = {name: token for name, token in self.named.items()
                if name in NEEDED or backend.token_to_id(token) is not None}
        return {**defaults, **dict(base), **said}


def read_tokenizer_files(folder: str) -> TokenizerFiles:
    """Read all of them; a file that is not there says nothing.

    Raises:
        TokenizerError: a value of a wrong type, or two tokens with one id in a file.
        CheckpointError: a file that is no JSON.
    """
    config, older = _object(folder, TOKENIZER_CONFIG), _object(folder, _MAP)
    model = _object(folder, "config.json")
    decoder = config.get("added_tokens_decoder")
    leading = decoder is not None
    kind = tokenizer_class(folder, config, model)
    named, defaults, flags = {}, dict(CLASS_TOKENS.get(kind, {})), {}
    for name in NAMED:
        described = [_token(folder, name, source[name]) if source.get(name) is not None else None
                     for source in (config, older)]
        first, second = described if leading else reversed(described)
        if first and second and first["content"] != second["content"]:
            warnings.warn(f"{folder}: {name} is {described[0]['content']!r} in {TOKENIZER_CONFIG} and "
                          f"{described[1]['content']!r} in {_MAP}; {first['content']!r} is used, as in transformers",
                          stacklevel=2)
        chosen = first or second
        if chosen:
            named[name] = chosen["content"]
            flags[chosen["content"]] = {key: value for key, value in chosen.items() if key != "content"}
        elif config.get(name, 0) is None or older.get(name, 0) is None:
            defaults.pop(name, None)  # null: the class's default does not count either
    extra, additional = _extra(folder, config, flags)
    additional += _listed(folder, "additional_special_tokens", config, flags)
    given = _listed(folder, "additional_special_tokens", older, flags)
    if not leading:
        additional += given
    else:
        _say_ignored(folder, [token for token in given if token not in additional and token not in _contents(decoder)])
    source = TOKENIZER_CONFIG if leading else _ADDED
    added = _decoder(folder, decoder) if leading else _encoder(folder, {*flags, *additional})
    if leading:
        _compare_added(folder, added)
    _say_unknown(folder, config)
    return TokenizerFiles(
        named, defaults, extra, flags, tuple(dict.fromkeys(additional)), added, source, _options(folder, config), kind,
        _templates(folder, config),
        {name: _end_ids(folder, name, values) for name, values in
         (("config.json", model), ("generation_config.json", _object(folder, "generation_config.json")))})


# ------------------------------------------------------------------------------------------ single entries

def _object(folder, name):
    path = os.path.join(folder, name)
    if not os.path.isfile(path):
        return {}
    values = read_json(path)
    if not isinstance(values, dict):
        raise TokenizerError(f"{path} does not hold a JSON object")
    return values


def _token(folder, name, value):
    """A token as keyword arguments of ``AddedToken``: a text, or an object with its flags."""
    if isinstance(value, str):
        value = {"content": value}
    if not isinstance(value, dict) or not isinstance(value.get("content"), str) or not value["content"]:
        raise TokenizerError(f"{folder}: {name} is {value!r:.60}, expected a string or an object with a content")
    token = {"content": value["content"]}
    for key, flag in value.items():
        if key in ("content", "__type", "id"):
            continue
        if key not in ("lstrip", "rstrip", "single_word", "normalized", "special"):
            raise TokenizerError(f"{folder}: {name} has the unknown key {key!r}")
        if not isinstance(flag, bool):
            raise TokenizerError(f"{folder}: {name} has {key} {flag!r:.60}, expected true or false")
        token[key] = flag
    return token


def _listed(folder, name, values, flags):
    found = values.get(name)
    if found is None:
        return []
    if not isinstance(found, list):
        raise TokenizerError(f"{folder}: {name} is {found!r:.60}, expected a list of tokens")
    tokens = [_token(folder, name, item) for item in found]
    for token in tokens:
        if len(token) > 1:
            flags.setdefault(token["content"], {key: value for key, value in token.items() if key != "content"})
    return [token["content"] for token in tokens]


def _extra(folder, config, flags):
    """(named, listed) tokens of extra_special_tokens: an object in transformers 4, a list in transformers 5."""
    found = config.get("extra_special_tokens")
    if not isinstance(found, dict):
        return {}, _listed(folder, "extra_special_tokens", config, flags)
    named = {}
    for name, value in found.items():
        token = _token(folder, f"extra_special_tokens[{name!r:.60}]", value)
        named[name] = token["content"]
        flags.setdefault(token["content"], {key: flag for key, flag in token.items() if key != "content"})
    return named, []


def _decoder(folder, decoder):
    if not isinstance(decoder, dict):
        raise TokenizerError(f"{folder}: added_tokens_decoder is {decoder!r:.60}, expected an object of ids and tokens")
    added = {}
    for key, value in decoder.items():
        if not key.isascii() or not key.isdecimal() or int(key) >= 1 << 31:
            raise TokenizerError(f"{folder}: added_tokens_decoder has the key {key!r:.60}, expected a token id")
        token = _token(folder, f"added_tokens_decoder[{key}]", value)
        added[int(key)] = {"special": False, **token}
    return _unique(folder, TOKENIZER_CONFIG, added)


def _encoder(folder, special):
    """Tokens of added_tokens.json; as in transformers they are matched in the text as it is if they are special."""
    added = {}
    for content, index in _object(folder, _ADDED).items():
        if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < 1 << 31 or not content:
            raise TokenizerError(f"{folder}: {_ADDED} has {content!r:.60}: {index!r:.60}, expected a token and its id")
        if index in added:
            raise TokenizerError(f"{folder}: {_ADDED} gives {added[index]['content']!r:.60} and {content!r:.60} the id "
                                 f"{index}")
        added[index] = {"content": content, "special": content in special, "normalized": content not in special}
    return added


def _unique(folder, name, added):
    seen = {}
    for index, token in added.items():
        if seen.setdefault(token["content"], index) != index:
            raise TokenizerError(f"{folder}: {name} gives {token['content']!r:.60} the ids {seen[token['content']]} "
                                 f"and {index}")
    return added


def _contents(decoder):
    return {token.get("content") for token in decoder.values() if isinstance(token, dict)} \
        if isinstance(decoder, dict) else set()


def _options(folder, config):
    found = {}
    for name in ("add_bos_token", "add_eos_token", "add_prefix_space", "legacy", "split_special_tokens", "from_slow"):
        if name in config:
            if config[name] is not None and not isinstance(config[name], bool):
                raise TokenizerError(f"{folder}: {name} is {config[name]!r:.60}, expected true or false")
            found[name] = config[name]
    return found


def _templates(folder, config):
    found = config.get("chat_template")
    if isinstance(found, str):
        found = {"default": found} if found else {}
    elif isinstance(found, list) and all(isinstance(item, dict) and isinstance(item.get("name"), str)
                                         and isinstance(item.get("template"), str) for item in found):
        found = {item["name"]: item["template"] for item in found}
    elif found is None:
        found = {}
    elif not (isinstance(found, dict) and all(isinstance(item, str) for item in found.values())):
        raise TokenizerError(f"{folder}: chat_template is {found!r:.60}, expected a template or a list of "
                             "{'name': ..., 'template': ...}")
    more, places = os.path.join(folder, "additional_chat_templates"), {}
    if os.path.isdir(more):
        places = {name.removesuffix(".jinja"): os.path.join(more, name) for name in sorted(os.listdir(more))
                  if name.endswith(".jinja")}
    if os.path.isfile(os.path.join(folder, "chat_template.jinja")):
        places["default"] = os.path.join(folder, "chat_template.jinja")
    templates = dict(found)
    for name, path in places.items():
        try:
            with open(path, encoding="utf-8") as file:
                templates[name] = file.read()
        except (OSError, UnicodeDecodeError) as error:
            raise TokenizerError(f"{path} cannot be read: {error}") from None
        if name in found and found[name] != templates[name]:
            warnings.warn(f"{folder}: {os.path.relpath(path, folder)} differs from the chat template {name!r} in "
                          f"{TOKENIZER_CONFIG}; the file is used, as in transformers", stacklevel=4)
    return templates


def _end_ids(folder, name, values):
    found = values.get("eos_token_id")
    found = found if isinstance(found, list) else [] if found is None else [found]
    for item in found:
        if isinstance(item, bool) or not isinstance(item, int) or item < 0:
            raise TokenizerError(f"{folder}: {name} has the eos_token_id {item!r:.60}, expected token ids")
    return list(dict.fromkeys(found))


# ------------------------------------------------------------------------------------------ warnings

def _compare_added(folder, added):
    by_content = {token["content"]: index for index, token in added.items()}
    other = _object(folder, _ADDED)
    wrong = [f"{content!r:.60} ({index!r:.20}, not {by_content[content]})" for content, index in other.items()
             if content in by_content and by_content[content] != index]
    if wrong:
        warnings.warn(f"{folder}: {_ADDED} has other ids than {TOKENIZER_CONFIG} for {', '.join(wrong[:5])}; those of "
                      f"{TOKENIZER_CONFIG} are used, as in transformers", stacklevel=3)
    _say_ignored(folder, [content for content in other if content not in by_content], _ADDED)


def _say_ignored(folder, tokens, name=_MAP):
    if tokens:
        warnings.warn(f"{folder}: {name} names {', '.join(map(repr, tokens[:5]))}, which are not in the "
                      f"added_tokens_decoder of {TOKENIZER_CONFIG}; they are left out, as in transformers",
                      stacklevel=3)


def _say_unknown(folder, config):
    unknown = [f"{name}: {json.dumps(value, ensure_ascii=False)[:40]}" for name, value in config.items()
               if name not in _USED and name not in _QUIET and value not in (None, {}, [])
               and not (name.endswith("_token") and isinstance(value, (str, dict)))]
    if unknown:
        warnings.warn(f"{folder}: {TOKENIZER_CONFIG} has keys that are not read: {'; '.join(unknown)}", stacklevel=3)
