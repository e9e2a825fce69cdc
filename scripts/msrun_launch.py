"""Start a ``colora-ms`` command as several workers under msrun, watch them, and end the job when one fails.

    python scripts/msrun_launch.py COMMAND [-n WORKERS] [--log-dir FOLDER] [...] [arguments of colora-ms COMMAND]

What worker 0 prints is printed here; every worker's output is in FOLDER/worker_<rank>.log, msrun's own in
FOLDER/msrun.log. Exit codes: 0 all workers ended well, 130 stopped by a signal, 1 a worker failed.
"""

import argparse
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[1]
_FAILED = re.compile(r"Worker process (\d+) exit with exception. Error code: (-?\d+)")
_INTERRUPTED = 130
_TAIL = 15           # lines of a failed worker's log that are shown
_GRACE = 10.0        # seconds that msrun gets to end the job itself after a failure


def main(arguments=None):
    """Run the job; returns the exit code."""
    options, rest = parse(arguments)
    if shutil.which("msrun", path=environment(options)["PATH"]) is None:
        print("msrun is not in the PATH; it comes with MindSpore (pip install mindspore)", file=sys.stderr)
        return 1
    return Job(options, rest).run()


def parse(arguments):
    """(options of the launcher, arguments for colora-ms)."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter,
                                     allow_abbrev=False, usage="%(prog)s COMMAND [-n WORKERS] [options] [colora-ms's "
                                                               "options]")
    parser.add_argument("command", choices=("train", "run", "evaluate", "generate", "serve"))
    parser.add_argument("-n", "--workers", type=int, default=2, help="number of processes, one a device")
    parser.add_argument("--local-workers", type=int, default=None, help="how many of them run on this machine; all if "
                                                                        "left out")
    parser.add_argument("--node-rank", type=int, default=-1,
                        help="number of this machine, from 0, if there are several")
    parser.add_argument("--master-addr", default="127.0.0.1", help="address of machine 0")
    parser.add_argument("--master-port", type=int, default=None, help="port of machine 0; a free one if left out")
    parser.add_argument("--log-dir", default=None, help="where the logs go; msrun-logs/<time> if left out")
    parser.add_argument("--join-timeout", type=int, default=300, help="seconds to wait for all workers at the start")
    options, rest = parser.parse_known_args(arguments)
    if options.workers < 1:
        parser.error(f"--workers is {options.workers}, expected at least 1")
    if options.local_workers is None:
        options.local_workers = options.workers
    if not 1 <= options.local_workers <= options.workers:
        parser.error(f"--local-workers is {options.local_workers}, expected 1 to {options.workers} (--workers)")
    if options.local_workers < options.workers and (options.master_port is None or options.node_rank < 0):
        parser.error("with several machines give --master-addr, --master-port and --node-rank, the first two equal on "
                     "all")
    if options.log_dir is None:
        options.log_dir = os.path.join("msrun-logs", time.strftime("%Y%m%d-%H%M%S"))
    return options, rest


def free_port():
    """A port that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def environment(options):
    """The environment of msrun and its workers."""
    values = dict(os.environ)
    # msrun starts "python" from the PATH: it has to be this one, and find this package.
    values["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), values.get("PATH", "")])
    values["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [values.get("PYTHONPATH")])])
    values["PYTHONUNBUFFERED"] = "1"
    values.setdefault("GLOG_v", "3")
    # Workers of one machine share its cores; without this each would start a thread for every core.
    values.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // options.local_workers)))
    return values


class Job:
    """One msrun and the processes that it starts.

    Args:
        options: what ``parse`` gave.
        rest: arguments for ``colora-ms <command>``.
    """

    def __init__(self, options, rest):
        self.options, self.rest = options, rest
        self.folder = Path(options.log_dir)
        self.children = {}      # psutil.Process: rank, or None for the scheduler
        self.stopped = None     # number of the signal that asked to stop
        self.forwarded = False
        self.shown = 0          # bytes of worker 0's log that were printed

    def run(self):
        """Start, watch, clean up; returns the exit code."""
        options = self.options
        self.folder.mkdir(parents=True, exist_ok=True)
        for old in self.folder.glob("worker_*.log"):
            old.unlink()
        port = options.master_port or free_port()
        command = ["msrun", f"--worker_num={options.workers}", f"--local_worker_num={options.local_workers}",
                   f"--master_addr={options.master_addr}", f"--master_port={port}", f"--node_rank={options.node_rank}",
                   f"--log_dir={self.folder}", f"--cluster_time_out={options.join_timeout}", "--join=True",
                   f"--tail_worker_log={options.workers}",  # none: this script prints worker 0's log, to its last line
                   "python", "-m", "colora_ms", options.command, *self.rest]
        old = {number: signal.signal(number, self._stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            with open(self.folder / "msrun.log", "wb") as log:
                # A session of its own: msrun answers Ctrl-C by killing the workers before they have saved.
                msrun = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment(options),
                                         start_new_session=True)
            try:
                self._watch(msrun)
            finally:
                self._end(msrun)
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)
        return self._verdict(msrun.returncode)

    def _stop(self, number, frame):
        self.stopped = number

    def _watch(self, msrun):
        failed_at = None
        while msrun.poll() is None:
            self._find_children(msrun.pid)
            if self.stopped and not self.forwarded:
                self.forwarded = self._forward()
            if failed_at is None and self._failures():
                failed_at = time.monotonic()
            if failed_at is not None and time.monotonic() - failed_at > _GRACE:
                return  # msrun has killed the workers and waits for the scheduler, which waits for them
            self._show()
            time.sleep(0.2)

    def _find_children(self, parent):
        try:
            for child in psutil.Process(parent).children():
                if child not in self.children:
                    role = child.environ().get("MS_ROLE")
                    if role in ("MS_WORKER", "MS_SCHED"):
                        self.children[child] = child.environ().get("RANK_ID", "?") if role == "MS_WORKER" else None
        except psutil.Error:
            pass  # it ended just now, or is a zombie

    def _forward(self):
        """Ask the workers to stop after their current step; whether there was one."""
        workers = [child for child, rank in self.children.items() if rank is not None]
        for child in workers:
            try:
                child.send_signal(signal.SIGTERM)
            except psutil.Error:
                pass
        return bool(workers)

    def _end(self, msrun):
        """Leave no process of the job behind."""
        self._find_children(msrun.pid)
        if msrun.poll() is None:
            msrun.kill()
        for child in self.children:
            try:
                child.kill()  # psutil checks that the id still belongs to the same process
            except psutil.Error:
                pass
        msrun.wait()
        self._show()

    def _failures(self):
        """[(process id, exit code)] that msrun reports."""
        text = (self.folder / "msrun.log").read_text(encoding="utf-8", errors="replace")
        return [(int(pid), int(code)) for pid, code in _FAILED.findall(text)]

    def _show(self):
        """Print what worker 0 has written since."""
        path = self.folder / "worker_0.log"
        if path.is_file():
            with open(path, "rb") as handle:
                handle.seek(self.shown)
                new = handle.read()
            self.shown += len(new)
            sys.stdout.buffer.write(new)
            sys.stdout.buffer.flush()

    def _verdict(self, code):
        if code == 0:
            return 0
        failures = self._failures()
        if self.stopped and all(failure == _INTERRUPTED for _, failure in failures):
            return _INTERRUPTED
        ranks = {child.pid: rank for child, rank in self.children.items()}
        for pid, ended in failures:
            rank = ranks.get(pid, "?")
            how = f"was killed by {signal.Signals(-ended).name}" if ended < 0 else f"ended with code {ended}"
            path = self.folder / f"worker_{rank}.log"
            say(f"worker {rank} (process {pid}) {how}; the job of {self.options.workers} workers was stopped.")
            if path.is_file():
                lines = path.read_text(encoding="utf-8", errors="replace").splitlines()[-_TAIL:]
                say(f"the end of {path}:", *(f"    {line}" for line in lines))
        if not failures:
            say(f"msrun ended with code {code}; see {self.folder / 'msrun.log'}")
        if self.options.command in ("train", "run"):
            again = " with --resume" if self.options.command == "train" else ""
            say(f"Every checkpoint that was written is whole: the same command{again} goes on from the newest.")
        return 1


def say(*lines):
    """Lines on standard error."""
    print(*(f"msrun_launch: {line}" for line in lines), sep="\n", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
