"""Hold what this tree answers against an older revision, bit for bit.

    python scripts/compare_outputs.py --against COMMIT [--recorded FILE] [--formats float32 ...] [--steps N]
        [--json FILE]

Tokens, records and logits of 20 mixed requests in four weight formats and the losses of a training of 20 updates, once
by the older revision in a work tree of its own and once by this one. Exit code 1 where anything differs.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from benchmark_common import ROOT, measure, versions, write_json
from decode_worker import write_adapter
from record_outputs import ADAPTERS, FORMATS

LIBRARY = Path("colora_ms") / "_lib" / "libcolora_cpu.so"


@contextlib.contextmanager
def revision(commit: str, folder: Path) -> Iterator[Path]:
    """A work tree of ``commit`` below ``folder`` with its operators compiled; it is removed at the end."""
    tree = folder / "tree"
    subprocess.run(["git", "-C", str(ROOT), "worktree", "add", "--detach", "--quiet", str(tree), commit], check=True)
    try:
        subprocess.run([sys.executable, str(tree / "ops" / "cpu" / "build.py"), str(tree / LIBRARY)], check=True)
        yield tree
    finally:
        subprocess.run(["git", "-C", str(ROOT), "worktree", "remove", "--force", str(tree)], check=True)


def write_adapters(folder: Path) -> None:
    """The adapters of the requests, the same ones for both revisions."""
    folder.mkdir()
    for seed, name in enumerate(ADAPTERS):
        write_adapter(folder / name, seed)


def record(tree: Path, adapters: Path, folder: Path, formats: "list[str]", steps: int) -> dict:
    """What the package in ``tree`` answers, see record_outputs.py; its graphs are compiled anew."""
    folder.mkdir()
    environment = {**os.environ, "PYTHONPATH": str(tree), "COLORA_CACHE": str(folder / "cache")}
    file = folder / "outputs.json"
    subprocess.run([sys.executable, str(ROOT / "scripts" / "record_outputs.py"), str(file), str(adapters),
                    str(folder / "work"), "--steps", str(steps), "--formats", *formats], check=True, env=environment,
                   cwd=folder)
    found = json.loads(file.read_text())
    package = Path(found.pop("package"))
    if package != (tree / "colora_ms").resolve():
        raise SystemExit(f"asked {package}, wanted the package in {tree}")
    return found


def older(commit: str, adapters: Path, folder: Path, kept: "Path | None", formats: "list[str]", steps: int) -> dict:
    """What ``commit`` answers: read from ``kept`` where that holds all that is asked for, otherwise recorded now."""
    name = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "--verify", f"{commit}^{{commit}}"], check=True,
                          capture_output=True, text=True).stdout.strip()
    wanted = [*formats, "training"] if steps else list(formats)
    if kept is not None and kept.is_file():
        found = json.loads(kept.read_text())
        if found["commit"] == name and found["steps"] == steps and set(wanted) <= set(found["outputs"]):
            return {part: found["outputs"][part] for part in wanted}
    with revision(name, folder) as tree:
        outputs = record(tree, adapters, folder / "before", formats, steps)
    if kept is not None:
        kept.write_text(json.dumps({"commit": name, "steps": steps, "outputs": outputs}))
    return outputs


def differences(before: dict, now: dict) -> "list[tuple[str, str, int, int]]":
    """(format or "training", kind of output, equal ones, all) of two recordings."""
    rows = []
    for part, kinds in before.items():
        for kind, old in kinds.items():
            new = now[part][kind]
            rows.append((part, kind, sum(a == b for a, b in zip(old, new)), max(len(old), len(new))))
    return rows


def main(arguments: "list[str] | None" = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--against", required=True, metavar="COMMIT")
    parser.add_argument("--recorded", type=Path, help="keeps what the older revision answered")
    parser.add_argument("--formats", nargs="*", default=list(FORMATS), choices=FORMATS)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="compare-outputs-") as name:
        folder = Path(name)
        adapters = folder / "adapters"
        write_adapters(adapters)
        before = older(chosen.against, adapters, folder, chosen.recorded, chosen.formats, chosen.steps)
        now = record(ROOT, adapters, folder / "now", chosen.formats, chosen.steps)
    rows = differences(before, now)
    for part, kind, equal, count in rows:
        print(f"{part:10s} {kind:10s} {equal} of {count} equal")
    share = sum(row[2] for row in rows) / sum(row[3] for row in rows)
    if chosen.json:
        write_json(chosen.json, [measure("outputs_equal_share", share, "share")], versions())
    return 0 if share == 1 else 1


if __name__ == "__main__":
    sys.exit(main())
