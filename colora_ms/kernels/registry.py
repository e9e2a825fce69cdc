"""One table: operation x {reference, cpu, emulator, rehearsal, ascend}; here a process takes its column.

Every kernel has one Python face and several forms: ``reference`` (built-in operators of MindSpore, any device), ``cpu``
(the C++ library built from ``ops/cpu``), ``emulator`` (the Ascend C sources compiled for the host) and ``ascend``. The
environment variable ``COLORA_KERNELS`` names a column, otherwise the device target does; a CPU without the compiled
library takes ``reference``. ``rehearsal`` runs the device's graph on a CPU: strict stand-ins for Ascend's built-in
operators, our own from the emulator, everything else as on Ascend. Nothing is chosen at import: :func:`bind` does it
when the first Cell that needs an operation is constructed, and what was bound then holds for the life of the process,
because graphs may hold it.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, Optional

import mindspore as ms

from colora_ms import ascend_settings
from colora_ms.kernels.aot import KernelError, library_path

BACKENDS = ("reference", "cpu", "emulator", "rehearsal", "ascend")

_TABLE: dict[str, dict[str, Callable[[], Any]]] = {}
_BOUND: "Optional[Choice]" = None
_NAMES: dict[str, Any] = {}  # where the chosen forms go: the dictionary of ``bound``


class Choice(NamedTuple):
    """What decides the column: its name, MindSpore's device target, the CPU library (None: it is not there)."""

    backend: str
    target: str
    library: Optional[str]

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns in which a form is looked for, the best first."""
        if self.backend == "emulator":
            return ("emulator", "cpu", "reference") if self.library else ("emulator", "reference")
        if self.backend == "rehearsal":
            return "rehearsal", "emulator", "reference"
        return (self.backend,) if self.backend == "reference" else (self.backend, "reference")


def operation(name: str, **forms: Callable[[], Any]) -> None:
    """Put a row into the table.

    Args:
        name: under which :mod:`colora_ms.kernels.bound` has the chosen form.
        forms: column -> a function without arguments that returns the form: a function that a graph can parse, an
            ``ops.Custom`` primitive, or a constant. It is called once, when the column is bound, so that no primitive
            of another device is ever made.

    Raises:
        KernelError: an unknown column, or a second row of that name.
    """
    unknown = set(forms) - set(BACKENDS)
    if unknown or name in _TABLE:
        raise KernelError(f"operation {name!r}: " + (f"the column {unknown.pop()!r} is none of {', '.join(BACKENDS)}"
                                                      if unknown else "it is in the table already"))
    _TABLE[name] = forms
    if _BOUND is not None:  # a row of a user's own, made when the process has taken its column
        _fill([name], _BOUND)


def fills(names: dict[str, Any]) -> None:
    """Take the dictionary of the module in which graphs find the chosen forms by name (``bound``)."""
    global _NAMES
    _NAMES = names


def table() -> Iterator[tuple[str, tuple[str, ...]]]:
    """(operation, its columns), in the order of registration."""
    for name, forms in _TABLE.items():
        yield name, tuple(column for column in BACKENDS if column in forms)


def bind() -> Choice:
    """Bind every operation to the device that this process runs on; cheap when it is done already.

    Raises:
        KernelError: ``COLORA_KERNELS`` is unknown or needs a library that is not there, or something else was bound
            before: an operation that graphs hold cannot change under them. ConfigError: the column ``ascend`` on a
            chip that it cannot run on, or a setting of Ascend that cannot be had (see ``ascend_settings``).
    """
    global _BOUND
    choice = _choose()
    if _BOUND is None:
        # The threads of the CPU operators. MindSpore's C++ side sets OMP_NUM_THREADS for its own reasons, which
        # os.environ does not show: what stands there is what the user has set.
        if "OMP_NUM_THREADS" in os.environ:
            os.environ.setdefault("COLORA_NUM_THREADS", os.environ["OMP_NUM_THREADS"])
        if choice.target == "Ascend":
            if choice.backend == "ascend":
                ascend_settings.unit()  # refuses a chip that our operators cannot run on; MindSpore's own may
            ascend_settings.apply()
            ascend_settings.require_team()
        _fill(_TABLE, choice)
        _BOUND = choice
    elif choice != _BOUND:
        raise KernelError(f"the operations were bound to {_describe(_BOUND)} when the first Cell was constructed, now "
                          f"{_describe(choice)} is asked for; choose device and COLORA_KERNELS before that, in a new "
                          "process")
    return _BOUND


def fill(names: Iterable[str], column: str) -> None:
    """Put the forms of one column into ``bound`` beside those of the column in use, for tests."""
    _NAMES.update({name: _TABLE[name][column]() for name in names})


def backend() -> str:
    """The column in use: "reference", "cpu", "emulator", "rehearsal" or "ascend"; binds if nothing was bound yet."""
    return (_BOUND or bind()).backend


def _fill(names: Iterable[str], choice: Choice) -> None:
    """Put the chosen forms into ``bound``, all or none."""
    made = {}
    for name in names:
        column = next((column for column in choice.columns if column in _TABLE[name]), None)
        if column is not None:
            made[name] = _TABLE[name][column]()
    _NAMES.update(made)


def _describe(choice: Choice) -> str:
    return f"{choice.backend!r} (device target {choice.target}, CPU library {choice.library or 'absent'})"


def _choose() -> Choice:
    library, target = library_path(), ms.get_context("device_target")
    there = str(library) if library.is_file() else None
    wanted = os.environ.get("COLORA_KERNELS", "").strip().lower()
    if wanted:
        if wanted not in BACKENDS:
            raise KernelError(f"COLORA_KERNELS={wanted!r} is not known; use one of {', '.join(BACKENDS)}")
        if wanted == "cpu" and there is None:
            raise KernelError(
                f"COLORA_KERNELS=cpu, but {library} does not exist; install a C++ compiler (g++ or clang++) "
                "and run `python ops/cpu/build.py colora_ms/_lib/libcolora_cpu.so`, or reinstall the package"
            )
        return Choice(wanted, target, there)
    if target == "Ascend":
        return Choice("ascend", target, there)
    return Choice("cpu" if there else "reference", target, there)
