"""The first day on an Ascend machine: 13 steps in the order in which things go wrong (scripts/verify_on_npu.sh).

    python scripts/npu_check [--dry-run] [--steps 1-7] [--folder FOLDER] [--rebuild] [--quick]

Each step prints one line; the first failure says what to try. At the end one table and one archive to send. The exit
code is the number of failed steps. --dry-run: without a device; our operators run emulated, CANN's as the rehearsal's
stand-ins, and steps 1, 2, 4 and 5 look at what is there.
"""
import argparse
import os
import re
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(HERE), str(ROOT / "ops" / "ascend"), str(ROOT)]

import codes  # noqa: E402
import steps_machine  # noqa: E402
import steps_model  # noqa: E402
import steps_operators  # noqa: E402
import watch  # noqa: E402
from report import FAILED, LOOK, NOT_RUN, OK, Outcome, Report  # noqa: E402

import contract  # noqa: E402
import golden  # noqa: E402
import machine  # noqa: E402
import package_check  # noqa: E402

#: number, name, steps that must not have failed, function. 13 is the archive.
STEPS = (
    (1, "card", (), steps_machine.card),
    (2, "software", (), steps_machine.software),
    (3, "MindSpore itself", (2,), steps_machine.mindspore_itself),
    (4, "build", (2,), steps_machine.build),
    (5, "package on disk", (4,), steps_machine.package),
    (6, "one launch each", (3, 5), steps_operators.launches),
    (7, "values", (6,), steps_operators.values),
    (8, "whole matrix", (7,), steps_operators.matrix),
    (9, "built-in operators", (3,), steps_operators.built_in),
    (10, "layer and model", (7, 9), steps_model.model),
    (11, "graphs and times", (10,), steps_model.figures),
    (12, "two cards", (7,), steps_model.cards),
)


class Check:
    """What the steps share: options, folders, how a child is run, what was learned."""

    machine, watch, codes = machine, watch, codes
    golden, contract, package_check = golden, contract, package_check
    root, here, python = ROOT, HERE, sys.executable
    free_port = staticmethod(steps_machine.free_port)

    def __init__(self, options):
        self.options, self.emulated = options, options.dry_run
        self.target = "CPU" if self.emulated else "Ascend"
        self.kernels = "rehearsal"  # of the model in a dry run
        self.quick = ("--quick",) if options.quick else ()
        self.folder, self.facts = options.folder.resolve(), {"started": time.strftime("%Y-%m-%d %H:%M:%S")}

    def environment(self, **more):
        """The variables of a child."""
        values = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
                  "PYTHONUNBUFFERED": "1", "COLORA_QUIET": "1"}
        values.setdefault("GLOG_v", "3")
        values["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), values.get("PATH", "")])
        if os.environ.get("ASCEND_CUSTOM_OPP_PATH"):
            first = os.environ["ASCEND_CUSTOM_OPP_PATH"].split(":")[0]
            values["LD_LIBRARY_PATH"] = f"{first}/op_api/lib:{values.get('LD_LIBRARY_PATH', '')}"
        return {**values, **more}

    def child(self, name, script, *arguments, limit, quiet, target=None, **environment):
        """Run a script of this folder; its log is logs/<name>.log."""
        command = [sys.executable, str(HERE / script), *arguments, "--target", target or self.target]
        return watch.run(command, self.folder / "logs" / f"{name}.log", self.environment(**environment), limit, quiet)

    def failure(self, child, wrong, advice):
        """The outcome of a child that failed: what it hung in or said, and what is known of the codes in its log."""
        known = codes.explain(child.text)
        if child.hung:
            line = f"{child.hung} did not end in time"
        elif wrong:
            line = f"{len(wrong)} of {len(child.done())} wrong: {wrong[0]['done']}: {wrong[0]['wrong']}"
        else:
            said = [one for one in child.text.strip().splitlines() if one.strip() and not one.startswith("{")]
            line = f"ended with code {child.code}: {said[-1].strip() if said else 'no word'}"
        if known:
            line += f" ({known[0][0]}: {known[0][1]})"
        details = [f"{one['done']}: {one['wrong']}" for one in wrong] + [f"{a}: {b}; {c}" for a, b, c in known]
        return Outcome(FAILED, line[:300], known[0][2] if known else advice, tuple(details))


def chosen(text):
    """{step} of "1-7,9".

    Raises:
        argparse.ArgumentTypeError: it is not of that form, or there is no such step.
    """
    found = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part, re.ASCII)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
        if not 1 <= first <= last <= 13:
            raise argparse.ArgumentTypeError(f"{text!r}: expected steps from 1 to 13, such as 1-7,9 (13, the archive, "
                                             "is always written)")
        found |= set(range(first, last + 1))
    return found


def run(check, report, wanted):
    """Run the steps; those behind a failed one that they need are not run."""
    results = {}
    for number, name, needs, function in STEPS:
        if number not in wanted:
            continue
        began = time.time()
        broken = [need for need in needs if results.get(need) in (FAILED, "after a failure")]
        if broken:
            outcome = Outcome(NOT_RUN, f"step {broken[0]} comes first")
        else:
            try:
                outcome = function(check)
            except Exception as problem:  # the check itself must reach its archive
                outcome = Outcome(FAILED, f"{type(problem).__name__}: {problem}", "a bug of the check: please send it")
        if check.emulated and number in (1, 2) and outcome.result in (FAILED, LOOK):
            outcome = outcome._replace(result=NOT_RUN, line=f"no device: {outcome.line}")
        results[number] = "after a failure" if broken else outcome.result
        report.add(number, name, time.time() - began, outcome)


def logs_of_cann(since):
    """The plog files that were written during the check."""
    folder = Path(os.environ.get("ASCEND_PROCESS_LOG_PATH") or Path.home() / "ascend" / "log")
    return [file for file in sorted(folder.rglob("*.log")) if file.stat().st_mtime >= since] if folder.is_dir() else []


def main(arguments=None):
    """The command; returns the number of failed steps."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dry-run", action="store_true", help="without a device: emulated, with stand-ins")
    parser.add_argument("--quick", action="store_true", help="fewer and smaller cases, for a test of the check itself")
    parser.add_argument("--steps", default="1-12", type=chosen, help="which ones, such as 1-7,9")
    parser.add_argument("--folder", type=Path, default=Path("npu-check"), help="for logs, golden files and the archive")
    parser.add_argument("--rebuild", action="store_true", help="build although a package is there")
    options = parser.parse_args(arguments)
    began = time.time()
    options.folder.mkdir(parents=True, exist_ok=True)
    check, report = Check(options), Report(options.folder.resolve())
    run(check, report, options.steps)
    path = report.archive(check.facts, logs_of_cann(began))
    report.add(13, "archive", time.time() - began, Outcome(OK, f"{path}: please send it"))
    print(f"\n{report.table()}")
    return report.failed


if __name__ == "__main__":
    sys.exit(main())
