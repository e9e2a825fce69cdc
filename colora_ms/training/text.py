"""Plain text as training data: windows of tokens, every token predicted from those before it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from colora_ms.errors import DataError
from colora_ms.training.encoding import EncodedExample, EncodedSet, windows

if TYPE_CHECKING:
    from colora_ms.models.tokenizer import Tokenizer


def read_text(path: str | Path) -> str:
    """The content of a UTF-8 text file.

    Raises:
        DataError: it cannot be read, is not UTF-8, or has nothing in it.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(f"the text {path} cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise DataError(f"{path} is not UTF-8 text") from None
    if not text.strip():
        raise DataError(f"the text {path} is empty; give a file with some thousand words of running text")
    return text


def encode_text(text: str, tokenizer: Tokenizer, max_length: int, vocab_size: int | None = None) -> EncodedSet:
    """Cut a text into windows for next-token training.

    Neighbouring windows share one token, so that every token but the first is predicted once. The end that does not
    fill a window is left out: all windows have one length, one graph.

    Args:
        text: any length.
        tokenizer: has ``encode``.
        max_length: tokens of a window, at least 2; the model sees one less.
        vocab_size: ids must be below it.

    Returns:
        ``EncodedSet``; all labels count.

    Raises:
        DataError: the text does not fill one window, or an id does not fit the model.
    """
    ids = np.array(tokenizer.encode(text, add_special_tokens=False), np.int32)
    if max_length < 2:
        raise DataError(f"a window has {max_length} tokens, expected at least 2")
    if len(ids) < max_length:
        raise DataError(f"the text has {len(ids)} tokens, which do not fill a window of {max_length}; give more text "
                        "or a smaller max_length")
    if vocab_size is not None and (ids.min() < 0 or ids.max() >= vocab_size):
        raise DataError(f"the tokenizer gave the id {ids.max()}, but the model has {vocab_size} rows; do the two "
                        "belong together?")
    places = [(begin, end) for begin, end in windows(len(ids), max_length) if end - begin == max_length]
    items = [EncodedExample(ids[begin:end], ids[begin:end], number) for number, (begin, end) in enumerate(places)]
    return EncodedSet(items, [], 0, max_length, left_tokens=len(ids) - places[-1][1])
