"""What the children of the check have in common: how they say what they begin and end."""
import contextlib
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))


def say(**line):
    """One JSON line."""
    print(json.dumps(line), flush=True)


@contextlib.contextmanager
def reported(name):
    """{"start": name}, and behind the block {"done": name, "seconds", "wrong"} with what the block put in."""
    say(start=name)
    line, began = {"wrong": None}, time.time()
    try:
        yield line
    except Exception as problem:  # one failure must not hide what comes behind it
        line["wrong"] = f"{type(problem).__name__}: {str(problem).strip().splitlines()[0] if str(problem) else ''}"
        print(problem, flush=True)  # the whole message goes into the log
    say(done=name, seconds=round(time.time() - began, 3), **line)
