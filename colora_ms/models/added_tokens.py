"""The tokens that a folder's files name beside the vocabulary, put into a ``tokenizers.Tokenizer``."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Union

from colora_ms.errors import TokenizerError
from colora_ms.models.tokenizer_files import NAMED, NEEDED, TOKENIZER_CONFIG, TokenizerFiles

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend


def add_tokens(backend: Backend, files: TokenizerFiles, folder: str) -> None:
    """Add the tokens that the files name to a ``tokenizers.Tokenizer``, with the ids that they give.

    Tokens that are only listed as special get the next free ids, in the order of the list.

    Raises:
        TokenizerError: an id that another token has, a token with another id, or a gap before an id.
    """
    from tokenizers import AddedToken
    named = {name: token for name, token in {**files.named, **files.extra}.items()
             if backend.token_to_id(token) is not None or token in {item["content"] for item in files.added.values()}}
    special = {*named.values(), *files.additional, *files.extra.values(),
               *(token for token in files.defaults.values() if backend.token_to_id(token) is not None)}
    for name, token in files.named.items():
        if name not in named and name not in NEEDED:  # Tokenizer refuses those that are needed
            warnings.warn(f"{folder}: {name} is {token!r:.60}, which the vocabulary does not have; it is left out",
                          stacklevel=3)
    known = backend.get_added_tokens_decoder()
    _check_ids(backend, files, folder)
    adding = []
    for index in sorted(files.added):
        token = AddedToken(**files.added[index])
        # as in transformers: flags of tokenizer_config.json stand before those of tokenizer.json
        if index not in known or files.source == TOKENIZER_CONFIG and repr(known[index]) != repr(token):
            token.special = token.special or token.content in special
            adding.append(_matched(backend, token))
    have = {token.content for token in known.values()} | {token.content for token in adding}
    # In the order of transformers: the named ones by their names, then the lists; each gets the next free id.
    listed = [files.named[name] for name in NAMED if files.named.get(name) in special]
    listed += sorted(token for token in special if token not in files.additional and token not in files.extra.values())
    for content in dict.fromkeys([*listed, *files.additional, *files.extra.values()]):
        if content not in have:
            adding.append(AddedToken(content, **{**files.flags.get(content, {}), "special": True}))
    backend.add_tokens(adding)
    for index, token in files.added.items():
        if backend.token_to_id(token["content"]) != index:
            raise TokenizerError(f"{folder}: {files.source} gives {token['content']!r:.60} the id {index}, but the "
                                 f"vocabulary has gaps, so it would get {backend.token_to_id(token['content'])}")


def _matched(backend, token):
    """The token, matched in the text as it is written where the normaliser would change its own spelling.

    SentencePiece's normaliser puts a blank in front, so "<|im_end|>" would only be found behind one: transformers' fast
    tokenizers lose it there, its slow ones do not.
    """
    from tokenizers import AddedToken
    if not token.normalized or backend.normalizer is None or \
            backend.normalizer.normalize_str(token.content) == token.content:
        return token
    return AddedToken(token.content, lstrip=token.lstrip, rstrip=token.rstrip, single_word=token.single_word,
                      special=token.special, normalized=False)


def _check_ids(backend, files, folder):
    """TokenizerError unless each added token is there with its id, or has the id behind the last."""
    last = max(backend.get_vocab(with_added_tokens=True).values(), default=-1)
    before = backend.id_to_token(last)
    for index in sorted(files.added):
        content = files.added[index]["content"]
        says = f"{folder}: {files.source} gives {content!r:.60} the id {index}"
        there, other = backend.token_to_id(content), backend.id_to_token(index)
        if there is not None and there != index:
            raise TokenizerError(f"{says}, but the vocabulary has it at {there}" + (
                f" and {other!r:.60} at {index}" if other is not None else "") + "; they are of different models")
        if there is None and other is not None:
            raise TokenizerError(f"{says}, where the vocabulary has {other!r:.60}; they are of different models")
        if there is None and index != last + 1:
            raise TokenizerError(f"{says}, but the token before it, {before!r:.60}, has {last}; the ids {last + 1} to "
                                 f"{index - 1} have no token")
        if there is None:
            last, before = index, content


def settings_of(files: TokenizerFiles, backend: Backend,
                base: Union[Mapping[str, str], Iterable[tuple[str, str]]] = ()) -> dict:
    """The ``settings`` of ``Tokenizer`` that follow from the files.

    Args:
        files: ``TokenizerFiles``.
        backend: ``tokenizers.Tokenizer`` with all tokens.
        base: named tokens of the vocabulary's own file.
    """
    return {**files.named_in(backend, base), "additional_special_tokens": list(files.additional),
            "extra_special_tokens": files.extra, "chat_template": files.templates, "stored_ends": files.ends}
