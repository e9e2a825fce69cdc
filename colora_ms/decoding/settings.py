"""What a request may ask for, checked once: ``Settings``, which Generator and engine share."""

import dataclasses
import math

from colora_ms.decoding.contrast import Contrast, Sampling
from colora_ms.decoding.values import flag, is_real, is_whole, sequence, shown, whole
from colora_ms.errors import DecodingError

#: Stop strings of a request, and characters of each, at most.
MOST_STOPS, LONGEST_STOP = 16, 256


@dataclasses.dataclass(frozen=True)
class Settings:
    """Checked settings of a request.

    Attributes:
        contrast: :class:`Contrast`, or None.
        sampling: :class:`Sampling`.
        budget: tokens that the answer may have: max_new_tokens, cut to the room behind the prompt by :meth:`within`.
        stop: strings that end the answer; stop_token_ids: ids that do.
        priority: larger ones leave the engine's queue first.
        timeout: seconds from submission on, None: no limit.
        records: whether a TokenRecord is kept for each token.
        ignore_eos: go on behind an end-of-sequence token.
    """

    contrast: Contrast
    sampling: Sampling
    budget: int
    stop: tuple = ()
    stop_token_ids: tuple = ()
    priority: int = 0
    timeout: float = None
    records: bool = False
    ignore_eos: bool = False

    @property
    def rows(self):
        """Rows of the batch that the request takes."""
        return 1 if self.contrast is None else 2

    def within(self, room):
        """The settings with a budget of at most ``room`` tokens."""
        return dataclasses.replace(self, budget=min(self.budget, room))

    def ends(self, eos):
        """The ids that end the answer, as a frozenset; ``eos``: those of the model."""
        return frozenset(self.stop_token_ids) | (frozenset() if self.ignore_eos else frozenset(eos))


def check_settings(adapter, contrast, sampling, max_new_tokens, stop=(), stop_token_ids=(), seed=None, priority=0,
                   timeout=None, records=False, ignore_eos=False, vocabulary=None):
    """Settings of what ``Engine.submit`` and ``Generator.generate`` are given.

    Args:
        vocabulary: size of the model's vocabulary, for the stop ids; None: not known.
        the others: as of ``Engine.submit``.

    Raises:
        DecodingError: a value cannot be used.
    """
    if contrast is not None and not isinstance(contrast, Contrast):
        raise DecodingError(f"contrast={shown(contrast)} is not a Contrast(alpha, beta)")
    if contrast is not None and adapter is None:
        raise DecodingError("a contrast compares an adapter with the base model, so it needs adapter=…")
    if sampling is not None and not isinstance(sampling, Sampling):
        raise DecodingError(f"sampling={shown(sampling)} is not a Sampling(temperature, top_k, top_p, seed)")
    sampling = sampling or Sampling()
    if seed is not None:
        sampling = dataclasses.replace(sampling, seed=seed)
    if not is_whole(priority):
        raise DecodingError(f"priority={shown(priority)} is not a whole number; larger ones go first, 0 is usual")
    return Settings(contrast, sampling, whole("max_new_tokens", max_new_tokens, 1), check_stop(stop),
                    check_stop_ids(stop_token_ids, vocabulary), int(priority), _seconds(timeout),
                    flag("records", records), flag("ignore_eos", ignore_eos))


def check_stop(stop):
    """The stop strings as a tuple; None is none.

    Raises:
        DecodingError: they are no strings, empty, too long or too many.
    """
    strings = (stop,) if isinstance(stop, str) else () if stop is None else stop
    if not isinstance(strings, (list, tuple, set, frozenset)) or len(strings) > MOST_STOPS \
            or any(not isinstance(s, str) or not 0 < len(s) <= LONGEST_STOP for s in strings):
        raise DecodingError(f"stop={shown(stop, 200)}: at most {MOST_STOPS} stop strings of 1 to {LONGEST_STOP} "
                            "characters")
    return tuple(strings)


def check_stop_ids(ids, vocabulary=None):
    """The stop ids as a tuple of ints; None is none, one id may stand alone.

    Raises:
        DecodingError: they are no ids of the vocabulary.
    """
    found = () if ids is None else (ids,) if is_whole(ids) else sequence(ids)
    if found is None:
        raise DecodingError(f"stop_token_ids={shown(ids)} is not a list of token ids")
    for one in found:
        if not is_whole(one) or one < 0 or vocabulary is not None and one >= vocabulary:
            size = "" if vocabulary is None else f" of the vocabulary, 0..{vocabulary - 1}"
            raise DecodingError(f"stop_token_ids holds {shown(one)}, which is no token id{size}")
    return tuple(dict.fromkeys(int(one) for one in found))


def _seconds(timeout):
    if timeout is None:
        return None
    try:
        seconds = float(timeout) if is_real(timeout) else 0.0
    except OverflowError:
        seconds = math.inf
    if not 0.0 < seconds < math.inf:
        raise DecodingError(f"timeout={shown(timeout)} is not a number of seconds > 0")
    return seconds
