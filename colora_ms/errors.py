"""The exceptions of colora_ms, and the "did you mean" helper that their messages use.

``ColoraError`` catches all of them and nothing else; each kind is also a ``ValueError``, so code
that only knows Python's own exceptions still catches it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ColoraError(Exception):
    """Base of every error that colora_ms raises on purpose."""


class ConfigError(ColoraError, ValueError):
    """A model, adapter, recipe or option has a value that cannot be used."""


class CheckpointError(ColoraError, ValueError):
    """A model's files are missing, damaged, or do not fit the model's config."""


class AdapterError(ColoraError, ValueError):
    """An adapter cannot be loaded, saved, injected or merged."""


class DecodingError(ColoraError, ValueError):
    """A generation request cannot be carried out (prompt, limits, contrast or sampling values)."""


class UnknownAdapterError(AdapterError):
    """A request names an adapter that is not there, or that was withdrawn."""


class ServingError(ColoraError, ValueError):
    """The serving engine cannot take or finish a request."""


class QueueFullError(ServingError):
    """The queue of the serving engine is full; try again later."""


class EngineClosedError(ServingError):
    """The serving engine was closed, or could not go on."""


class DataError(ColoraError, ValueError):
    """Training or evaluation data is missing, empty or malformed."""


class AdapterWarning(UserWarning):
    """An adapter's config or file has something that changes nothing here, as in PEFT: it is said, not refused."""


class TokenizerError(ColoraError, ValueError):
    """A tokenizer cannot be read, written, or used on the given text or ids."""


def short(value: object, length: int = 120) -> str:
    """``repr(value)``, cut to a length that fits a message."""
    text = repr(value)
    return text if len(text) <= length else text[:length - 3] + "..."


def near(name: object, known: Iterable, n: int = 3) -> str:
    """Return a hint with the known names that look like ``name``.

    Args:
        name: the name that was not found (any object; compared as ``str(name)``).
        known: an iterable of the names that exist.
        n: the largest number of suggestions.

    Returns:
        ``" Did you mean 'a', 'b' or 'c'?"`` with a leading blank, ready to be appended to a
        message, or ``""`` when nothing is similar enough.
    """
    text = str(name)
    by_lower: dict = {}
    for item in known:
        by_lower.setdefault(str(item).lower(), str(item))
    # A low cutoff would suggest unrelated names; 0.6 is difflib's own default.
    hits = difflib.get_close_matches(text.lower(), list(by_lower), n=max(n, 1), cutoff=0.6)
    found = [repr(by_lower[hit]) for hit in hits]
    if not found:
        return ""
    if len(found) == 1:
        listing = found[0]
    else:
        listing = ", ".join(found[:-1]) + " or " + found[-1]
    return f" Did you mean {listing}?"
