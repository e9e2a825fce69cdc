"""Regular expressions from configs, matched without the risk of a hang; and the order of patterns, which counts.

An expression such as ``(a+)+$`` takes exponential time on some names, and configs come from strangers. Expressions
that look cheap are matched in place; the others in a child process that is stopped after a few seconds.
"""

import json
import re
import subprocess
import sys
from typing import Any

from colora_ms.errors import AdapterError

#: Characters in an expression, at most.
MAX_LENGTH = 20_000

#: Repetitions in an expression that are matched in place; a name is short, so that the power stays small.
CHEAP_REPEATS = 2

#: Seconds that the child process may take.
TIMEOUT = 10

_CHILD = """
import json, re, sys
table = json.load(sys.stdin)
json.dump([[bool(getattr(re, how)(p, n)) for n in table["names"]] for how, p in table["patterns"]], sys.stdout)
"""


#: Settings that map patterns to numbers: the first one that matches a module holds for it.
ORDERED = ("rank_pattern", "alpha_pattern")


def in_order(settings: dict[str, Any]) -> dict[str, Any]:
    """A config's settings with its patterns as lists of pairs, for comparing and hashing: dicts forget the order
    then."""
    return {name: [list(pair) for pair in value.items()] if name in ORDERED and isinstance(value, dict) else value
            for name, value in settings.items()}


def match_all(patterns: list, names: list[str]) -> dict:
    """Which names each expression matches.

    Args:
        patterns: list of ``(label, how, expression)``: the label says in messages where the expression is from, ``how``
            is "match" (anchored at the start) or "fullmatch".
        names: list of strings.

    Returns:
        A list with a set of names for each expression.

    Raises:
        AdapterError: an expression is invalid, too long, or takes too long to match.
    """
    for label, _, pattern in patterns:
        if len(pattern) > MAX_LENGTH:
            raise AdapterError(f"{label} is an expression of {len(pattern)} characters, at most {MAX_LENGTH} are "
                               "allowed")
        try:
            re.compile(pattern)
        except (re.error, RecursionError, OverflowError) as error:
            raise AdapterError(f"{label} is not a valid regular expression ({error})") from None
    costly = [i for i, (_, _, pattern) in enumerate(patterns) if not _is_cheap(pattern)]
    found = [None] * len(patterns)
    if costly:
        rows = _in_child([patterns[i][1:] for i in costly], names, [patterns[i][0] for i in costly])
        for i, row in zip(costly, rows):
            found[i] = {name for name, hit in zip(names, row) if hit}
    for i, (_, how, pattern) in enumerate(patterns):
        if found[i] is None:
            test = getattr(re.compile(pattern), how)
            found[i] = {name for name in names if test(name)}
    return found


def _is_cheap(pattern):
    """Few repetitions and none of a group: matching takes polynomial time of a small power."""
    repeats = len(re.findall(r"[*+{]", pattern))
    return repeats <= CHEAP_REPEATS and not re.search(r"\)[*+{]", pattern)


def _in_child(patterns, names, labels):
    try:
        done = subprocess.run([sys.executable, "-I", "-S", "-c", _CHILD], timeout=TIMEOUT, capture_output=True,
                              text=True, input=json.dumps({"patterns": patterns, "names": names}), check=False)
    except subprocess.TimeoutExpired:
        raise AdapterError(f"matching {' and '.join(labels)} took longer than {TIMEOUT} s; write a simpler regular "
                           "expression, or a list of names") from None
    if done.returncode != 0:
        raise AdapterError(f"matching {' and '.join(labels)} failed: {done.stderr.strip()[-200:]}")
    return json.loads(done.stdout)
