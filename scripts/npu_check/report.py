"""The steps' outcomes: one line each while they run, one table and one archive at the end."""
import io
import json
import os
import re
import tarfile
import time
from typing import NamedTuple

OK, FAILED, LOOK, NOT_RUN = "ok", "FAILED", "look", "not run"
#: Variables that go into the archive by their beginning, and words that keep one out.
_PREFIXES = ("ASCEND", "HCCL", "MS_", "GLOG", "COLORA", "OMP_", "RANK", "DEVICE", "LCCL", "RUN_MODE")
_NAMES = ("PATH", "LD_LIBRARY_PATH", "PYTHONPATH", "LANG")
_SECRET = re.compile(r"TOKEN|SECRET|PASS|CRED|KEY|AUTH|COOKIE|PROXY", re.I)
_LARGEST = 4 << 20  # bytes of one log in the archive: its end


class Outcome(NamedTuple):
    """What a step says: its result, one line, and what to try when it failed; details go into the archive."""

    result: str
    line: str
    advice: str = ""
    details: tuple = ()


class Report:
    """Lines, table and archive of a run.

    Args:
        folder: where the logs are and the archive goes.
    """

    def __init__(self, folder):
        self.folder, self.rows, self.advised = folder, [], False

    def add(self, number, name, seconds, outcome):
        """Print a step's line; what to try next stands behind the first failure."""
        self.rows.append((number, name, seconds, outcome))
        print(f"{number:>2}  {name:<22} {outcome.result:<8} {seconds:6.1f} s  {outcome.line}", flush=True)
        if outcome.result == FAILED and not self.advised:
            self.advised = True
            print(f"    next: {outcome.advice or 'read the log of this step'}", flush=True)

    @property
    def failed(self):
        """Number of failed steps: the exit code."""
        return sum(row[3].result == FAILED for row in self.rows)

    def table(self):
        """The table of all steps, with the advice of every one that failed or wants a look."""
        lines = [f"{'step':>4}  {'what':<22} {'result':<8} {'seconds':>8}  line"]
        for number, name, seconds, outcome in self.rows:
            lines.append(f"{number:>4}  {name:<22} {outcome.result:<8} {seconds:>8.1f}  {outcome.line}")
            lines += [f"{'':>6}{detail}" for detail in outcome.details]
            if outcome.result in (FAILED, LOOK) and outcome.advice:
                lines.append(f"{'':>6}try: {outcome.advice}")
        lines.append(f"{self.failed} of {len(self.rows)} steps failed")
        return "\n".join(lines)

    def archive(self, facts, logs=()):
        """Write table, facts, environment and logs into one file; returns its path.

        Args:
            facts: what the steps learned, JSON values.
            logs: further files (plog), if they are there.
        """
        path = self.folder / f"colora_npu_check_{time.strftime('%Y%m%d_%H%M%S')}.tar.gz"
        with tarfile.open(path, "w:gz") as pack:
            def put(name, data):
                entry = tarfile.TarInfo(f"colora_npu_check/{name}")
                entry.size, entry.mtime = len(data), int(time.time())
                pack.addfile(entry, io.BytesIO(data))

            put("table.txt", self.table().encode())
            put("facts.json", json.dumps(facts, indent=1, default=str).encode())
            put("environment.txt", "\n".join(f"{k}={v}" for k, v in environment().items()).encode())
            for log in [*sorted(self.folder.glob("logs/**/*.log")), *logs]:
                if log.is_file():
                    with open(log, "rb") as handle:
                        handle.seek(max(0, log.stat().st_size - _LARGEST))
                        put(f"logs/{log.name}", scrubbed(handle.read()))
        return path


def environment():
    """The variables that say how this machine is set up; none that may hold a secret."""
    return {name: scrubbed(value.encode()).decode() for name, value in sorted(os.environ.items())
            if (name in _NAMES or name.startswith(_PREFIXES)) and not _SECRET.search(name)}


def scrubbed(data):
    """Bytes of a log without user:password@ in addresses and values behind names of secrets."""
    data = re.sub(rb"://[^/\s@]+@", b"://***@", data)
    return re.sub(rb"(?i)((?:token|secret|passw\w*|api_?key|authorization)\W{1,3})\S+", rb"\1***", data)
