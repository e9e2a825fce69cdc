"""Run a child that says what it begins and ends, and stop it when one thing takes too long.

The child prints JSON lines: {"start": name} before something that may hang, {"done": name, ...} behind it, and others.
A kernel that waits for ever cannot be interrupted from within its process; only its own process is ended here.
"""
import json
import os
import queue
import signal
import subprocess
import threading
import time
from typing import NamedTuple


class Child(NamedTuple):
    """What came of a child: its JSON lines, exit code (None if it was stopped), what it hung in (or None), its text."""

    lines: list
    code: object
    hung: object
    text: str

    def done(self, key="done"):
        """The lines that report something finished."""
        return [line for line in self.lines if key in line]


def run(command, log, environment, limit, quiet=60):
    """Run a command.

    Args:
        command: list of strings. log: file for all of its output. environment: its variables.
        limit: seconds for all. quiet: seconds for what has started and is not done.

    Returns:
        Child.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
                               env=environment, start_new_session=True, cwd=log.parent)
    incoming = queue.Queue()

    def read():
        for line in process.stdout:
            incoming.put(line)
        incoming.put(None)

    threading.Thread(target=read, daemon=True).start()
    lines, text, open_name, since, began, hung = [], [], None, time.monotonic(), time.monotonic(), None
    with open(log, "a", encoding="utf-8") as file:
        while True:
            now = time.monotonic()
            deadline = min(began + limit, since + quiet if open_name else began + limit)
            if now >= deadline:
                hung = open_name or "the start"
                break
            try:
                line = incoming.get(timeout=min(deadline - now, 1))
            except queue.Empty:
                continue
            if line is None:
                break
            file.write(line)
            file.flush()
            text.append(line)
            if line.startswith("{"):
                try:
                    found = json.loads(line)
                except ValueError:
                    continue
                lines.append(found)
                open_name, since = found.get("start"), time.monotonic()
    if hung:
        _end(process)
        return Child(lines, None, hung, "".join(text))
    return Child(lines, process.wait(), None, "".join(text))


def _end(process):
    """End the child and what it started: they are a session of their own."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            return
        try:
            process.wait(10)
            return
        except subprocess.TimeoutExpired:
            continue
