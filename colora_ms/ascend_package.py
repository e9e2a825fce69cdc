"""The built Ascend operators on disk: where they are, for which CANN they were built, what they export.

MindSpore reads ``ASCEND_CUSTOM_OPP_PATH`` once, at the first operator of a process; a path that is set later is not
seen, and the error then names a built-in library. ``import colora_ms`` therefore puts the package's own folder there,
and :func:`find` says which folder answers. The standard library only.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple, Optional

from colora_ms.errors import ConfigError

_log = logging.getLogger(__name__)

VARIABLE = "ASCEND_CUSTOM_OPP_PATH"
HEADER = "op_api/include/aclnn_multi_lora.h"
STAMP = "colora_build.json"
ANY_CANN = "COLORA_ANY_CANN"
OWN = Path(__file__).resolve().parent / "_lib" / "ascend"
_own_added = False


class Found(NamedTuple):
    """A package: its folder, whether the variable lacks it, other folders of the variable that hold the operators."""

    path: Path
    added: bool
    shadowed: tuple[Path, ...]


def paths() -> list[str]:
    """The folders of ``ASCEND_CUSTOM_OPP_PATH``, the first one first."""
    return [part for part in os.environ.get(VARIABLE, "").split(":") if part]


def find() -> Optional[Found]:
    """The package that answers, or None: the first folder of the variable that holds the operators, else this
    package's own. The environment is not changed."""
    holding = [Path(part) for part in paths() if (Path(part) / HEADER).is_file()]
    if holding:
        return Found(holding[0], False, tuple(dict.fromkeys(holding[1:])))
    return Found(OWN, True, ()) if (OWN / HEADER).is_file() else None


def put_first(folder: Path) -> None:
    """Put a folder in front of the variable."""
    os.environ[VARIABLE] = ":".join([str(folder), *[part for part in paths() if part != str(folder)]])


def add_own() -> None:
    """Put this package's own operators in front of the variable if they are there and no other folder holds them."""
    global _own_added
    found = find()
    if found is not None and found.added:
        put_first(found.path)
        _own_added = True


def own_was_added() -> bool:
    """Whether :func:`add_own` changed the variable."""
    return _own_added


def too_late(folder: Path) -> str:
    """The sentence for a path that MindSpore will not see any more."""
    return (f"the operators in {folder} are not in {VARIABLE}, and an operator ran already (or a job was joined): "
            "MindSpore reads the variable once, at the first operator of a process. Import colora_ms before anything "
            f"is computed, or start with `export {VARIABLE}={folder}`")


def missing() -> str:
    """The sentence for operators that are nowhere."""
    return (f"the Ascend operators are not built: looked in {VARIABLE}={':'.join(paths()) or '(not set)'} and {OWN}; "
            "run `bash ops/ascend/build.sh` on a machine with the CANN toolkit")


# -- CANN ------------------------------------------------------------------------------------------------------------

#: Files below a toolkit that say its version; MindSpore reads the first one.
_VERSION_FILES = ("compiler/version.info", "*-linux/ascend_toolkit_install.info", "runtime/version.info",
                  "opp/version.info", "version.cfg", "share/info/*/version.info")


def cann_version(toolkit: "str | Path | None") -> Optional[str]:
    """The version of a CANN toolkit, such as "8.5.0"; None if no file says it.

    Args:
        toolkit: its folder (``ASCEND_HOME_PATH``).
    """
    if not toolkit:
        return None
    for pattern in _VERSION_FILES:
        for file in sorted(Path(toolkit).glob(pattern)):
            match = re.search(r"^\s*(?:\w*_)?version\s*=\s*\[?\"?([0-9][\w.]*)", _text(file), re.M | re.I)
            if match:
                return match[1]
    return None


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def stamp(folder: Path) -> dict[str, Any]:
    """What the build wrote about itself: {"cann", "units", "operators", "exports", "mindspore"}; {} without a stamp."""
    try:
        return json.loads((folder / STAMP).read_text(encoding="utf-8"))
    except OSError:
        return {}
    except ValueError as error:
        raise ConfigError(f"{folder / STAMP} is damaged ({error}); build the operators again: "
                          "bash ops/ascend/build.sh") from error


def check(folder: Path, operators: Iterable[str], unit: Optional[str] = None) -> None:
    """Refuse a package that was built for another CANN or chip, or that lacks operators. One without a stamp, which
    ``build.sh`` did not build, is warned of, and so is one whose CANN cannot be compared with that of this process.

    Args:
        folder: the package. operators: names that this version of ``colora_ms`` calls. unit: of the chip in use.

    Raises:
        ConfigError: lists all that does not fit. ``COLORA_ANY_CANN=1`` allows another CANN.
    """
    known = stamp(folder)
    if not known:
        _log.warning("the operators in %s have no %s: they were not built by ops/ascend/build.sh, and for which CANN "
                     "is not known", folder, STAMP)
        return
    problems = []
    built, home = known.get("cann"), os.environ.get("ASCEND_HOME_PATH")
    now, asked = cann_version(home), os.environ.get(ANY_CANN) != "1"
    if asked and built and now and built != now:
        problems.append(f"they were built with CANN {built}, this process has {now} ({ANY_CANN}=1 allows it)")
    elif asked and not (built and now):
        _log.warning("the operators in %s were built with CANN %s, this process has CANN %s (ASCEND_HOME_PATH=%s): "
                     "whether they fit cannot be checked; source the toolkit's set_env.sh, and build them again if it "
                     "is the build that did not know (%s=1: this is not said)", folder, built or "(unknown)",
                     now or "(unknown)", home or "(not set)", ANY_CANN)
    lacking = sorted(set(operators) - set(known.get("operators", ())))
    if lacking:
        problems.append(f"{', '.join(lacking)} is lacking")
    if unit and unit not in known.get("units", ()):
        problems.append(f"they were built for {', '.join(known.get('units', ())) or 'no chip'}, this one is {unit}")
    if problems:
        raise ConfigError(f"the operators in {folder} do not fit: {'; '.join(problems)}. Build them again: "
                          "bash ops/ascend/build.sh")


def exported(library: Path) -> Optional[set[str]]:
    """The names of the aclnn functions that a library exports (``nm -D``); None where it cannot be read."""
    text = _output("nm", "-D", "--defined-only", str(library))
    return None if text is None else {line.split()[-1] for line in text.splitlines() if " aclnn" in line}


def needed(library: Path) -> Optional[list[str]]:
    """The libraries that a library is linked against (``readelf -d``); None where it cannot be read."""
    text = _output("readelf", "-d", str(library))
    return None if text is None else re.findall(r"\(NEEDED\).*\[(.+?)\]", text)


def _output(*command: str) -> Optional[str]:
    import subprocess  # not needed by a process that only loads the package

    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return None if done.returncode else done.stdout
