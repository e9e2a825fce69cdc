"""The settings of a process on Ascend, in one place: environment, graph compilation, memory, path of the operators.

Two moments matter. :func:`prepare` runs when ``colora_ms`` is imported: environment variables and the operators' path,
which MindSpore reads once, at the first operator of the process. :func:`apply` runs before the first graph and tensor
of this package (``kernels.registry.bind``, ``distributed.workers.start``): graph settings and memory. Neither
changes what the user has set; what was taken is printed once and asked back from MindSpore.
"""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import Any, NamedTuple, Optional

from colora_ms import ascend_package
from colora_ms.ascend_facts import ENVIRONMENT, unit_in_use
from colora_ms.errors import ConfigError

_log = logging.getLogger(__name__)

#: "54GB": the most that MindSpore's memory pool may take of the device. Not set: all that is free, as MindSpore does.
MEMORY = "COLORA_NPU_MEMORY"
QUIET = "COLORA_QUIET"  # "1": the settings are not printed
_CALLBACKS = "MS_COMPILER_CACHE_PATH"
_SYNTAX = {0: "strict", 1: "compatible", 2: "lax"}


class Setting(NamedTuple):
    """A setting in force: where it comes from is "ours", "yours", or "late" for one that came after the device."""

    name: str
    value: str
    origin: str


_prepared: list[Setting] = []
_applied: Optional[tuple[Setting, ...]] = None
_callbacks: Any = None  # keeps the folder of the compiled callbacks for the life of the process


def machine() -> bool:
    """Whether this looks like a machine with Ascend's software: its variables are set or its driver is loaded."""
    return bool(os.environ.get("ASCEND_HOME_PATH") or os.environ.get("ASCEND_OPP_PATH")
                or os.path.exists("/dev/davinci_manager"))


def prepare() -> None:
    """Set the environment variables that the user has not set, and the operators' path; nothing elsewhere than on a
    machine with Ascend's software. Cheap; done when ``colora_ms`` is imported."""
    if _prepared or not machine():
        return
    for variable in ENVIRONMENT:
        origin = "yours" if _set_by_user(variable.name) else "ours"
        if origin == "ours":
            os.environ[variable.name] = variable.value
        _prepared.append(Setting(variable.name, os.environ[variable.name], origin))
    ascend_package.add_own()


def _set_by_user(name: str) -> bool:
    if name not in os.environ:
        return False
    # MindSpore writes a value of its own into this one when it is imported, if nobody else has.
    context = sys.modules.get("mindspore.context")
    if name != "HCCL_CONNECT_TIMEOUT" or os.environ[name] != getattr(context, "_hccl_connect_timeout", None):
        return True
    try:
        return f"{name}=".encode() in Path("/proc/self/environ").read_bytes()
    except OSError:
        return True


def device_in_use() -> bool:
    """Whether MindSpore has initialized the Ascend device of this process: an operator ran, or a job was joined."""
    module = sys.modules.get("mindspore")
    if module is None:
        return False
    from mindspore.hal.device import is_initialized

    return bool(is_initialized("Ascend"))


def apply(cache: Optional[Path] = None) -> tuple[Setting, ...]:
    """Set what MindSpore must know before the first graph; once a process, later calls return the same.

    jit_level O0, the memory limit of ``COLORA_NPU_MEMORY``, and a folder for the callbacks that MindSpore compiles for
    every custom operator. The rest waits for :func:`boost`: what the process is for is not known yet.

    Args:
        cache: folder in which the folder of the callbacks is made; None: the system's temporary folder.

    Returns:
        All settings in force.

    Raises:
        ConfigError: a value did not arrive in MindSpore, the memory limit is malformed, or the
            operators' path would come too late; the message says what to do.
    """
    global _applied
    if _applied is not None:
        return _applied
    prepare()
    package = _package_path()
    found = [*_prepared, *_graph_settings(), *_memory(), *_callback_folder(cache), *package]
    _applied = tuple(found)
    if os.environ.get(QUIET, "0") != "1" and os.environ.get("RANK_ID", "0") == "0":
        print(report(), file=sys.stderr, flush=True)
    return _applied


def report() -> str:
    """The settings in force, a line each; "" before :func:`apply`."""
    return "\n".join(f"colora_ms on Ascend: {one.name} = {one.value or '(empty)'} ({one.origin})"
                     for one in _applied or ())


def require_team() -> None:
    """Refuse to make custom operators in a job of msrun before it was joined: each compiles a callback into the folder
    of its rank, which exists from then on only.

    Raises:
        ConfigError: ``communication.init()`` was not called yet.
    """
    if os.environ.get("MS_ROLE") != "MS_WORKER":
        return
    from mindspore.communication import GlobalComm

    if not GlobalComm.INITED:
        raise ConfigError("this process is a worker of msrun and has not joined its job: call "
                          "colora_ms.distributed.workers.start() (or mindspore.communication.init()) before the first "
                          "model or adapter is made; custom operators compile into a folder of their rank")


def boost(inference: bool) -> None:
    """Prepare MindSpore for graphs of this package: strict syntax; ``infer_boost`` on to decode, since PagedAttention
    has a kernel with it only, or off to train, since its kernels are those of inference.

    Graphs of others (mindformers' trainer with an adapter in it) keep the settings that they came with.

    Args:
        inference: whether the graphs to come decode.

    Raises:
        ConfigError: jit_level is not O0, with which there is no infer_boost.
    """
    import mindspore as ms

    if _SYNTAX.get(int(_context("jit_syntax_level"))) == "lax":  # MindSpore's default
        ms.set_context(jit_syntax_level=ms.STRICT)
    level, wanted = _context("jit_level"), "on" if inference else "off"
    if _context("infer_boost") == wanted and (level == "O0" or not inference):
        return
    if level != "O0":
        raise ConfigError(f"jit_level is {level!r}: PagedAttention has a kernel with 'O0' and infer_boost 'on' only; "
                          "leave both to colora_ms, or call mindspore.set_context(jit_config={'jit_level': 'O0'}) "
                          "before the first graph")
    _set_graph(jit_level=level, infer_boost=wanted)
    _log.info("infer_boost is %s, jit_syntax_level %s", wanted, _SYNTAX.get(int(_context("jit_syntax_level"))))


def _context(name: str) -> Any:
    from mindspore import context
    from mindspore._c_expression import ms_ctx_param

    return context._context().get_param(getattr(ms_ctx_param, name))  # get_context warns of its own end


def _set_graph(**values: str) -> None:
    import mindspore as ms

    ms.set_context(jit_config=values)
    for name, value in values.items():
        if _context(name) != value:
            raise ConfigError(f"MindSpore has {name} = {_context(name)!r} after {value!r} was set: this MindSpore is "
                              "not one of the table of versions in ops/ascend/README.md")


def chip() -> str:
    """The chip's name as MindSpore says it; "" where there is none."""
    from mindspore._c_expression import MSContext

    return str(MSContext.get_instance().get_ascend_soc_version() or "")


def unit() -> Optional[str]:
    """The unit that operators for this process's chip are compiled for; None where MindSpore names no chip.

    Raises:
        ConfigError: our operators cannot run on it; MindSpore's own can (``COLORA_KERNELS=reference``).
    """
    name = chip()
    return unit_in_use(name, os.environ.get("COLORA_SOC", "")) if name else None


def _graph_settings() -> list[Setting]:
    level = _context("jit_level")
    if level == "":  # not set; MindSpore would choose by the chip
        _set_graph(jit_level="O0")
    return [Setting("jit_level", _context("jit_level"), "yours" if level else "ours")]


def _memory() -> list[Setting]:
    import mindspore as ms
    from mindspore._c_expression import RuntimeConf

    wanted = os.environ.get(MEMORY, "").strip()
    if RuntimeConf.get_instance().is_memory_configured():
        return [Setting("memory", "as runtime.set_memory was called", "yours")]
    if not wanted:
        return [Setting("memory", "all that is free", "ours")]
    if device_in_use():
        raise ConfigError(f"{MEMORY}={wanted!r} comes too late: the device is in use already. Import colora_ms and "
                          "load the model before the first tensor, or call mindspore.runtime.set_memory yourself")
    try:
        ms.runtime.set_memory(max_size=wanted)
    except ValueError as error:
        raise ConfigError(f"{MEMORY}={wanted!r}: expected a size such as 54GB ({error})") from error
    return [Setting("memory", wanted, "yours")]


def _callback_folder(cache: Optional[Path]) -> list[Setting]:
    global _callbacks
    if _CALLBACKS in os.environ:
        folder, origin = os.environ[_CALLBACKS], "yours"
    else:
        import tempfile

        if cache is not None:
            cache.mkdir(parents=True, exist_ok=True)
        # The prefix is that of graph_cache, which takes a folder of its own in its place once graphs are compiled.
        _callbacks = tempfile.TemporaryDirectory(prefix="colora-process-", dir=cache)
        folder, origin = os.environ.setdefault(_CALLBACKS, _callbacks.name), "ours"
    if " " in folder:
        raise ConfigError(f"{_CALLBACKS}={folder!r} has a blank: MindSpore cuts the compiler's command line at blanks; "
                          "set it, or COLORA_CACHE, to a folder without")
    return [Setting(_CALLBACKS, folder, origin)]


def _package_path() -> list[Setting]:
    """Where the operators are; they need not be there for a process that does not use them."""
    found = ascend_package.find()
    if found is None:
        return []
    if found.added:
        if device_in_use():
            raise ConfigError(ascend_package.too_late(found.path))
        ascend_package.put_first(found.path)
    return [Setting(ascend_package.VARIABLE, os.environ.get(ascend_package.VARIABLE, ""),
                    "ours" if found.added or ascend_package.own_was_added() else "yours")]
