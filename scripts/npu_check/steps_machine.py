"""Steps 1 to 5: card, software, MindSpore's own check, build, package on disk."""
import importlib.util
import os
import shutil
import socket
import tempfile
from pathlib import Path

from report import FAILED, LOOK, NOT_RUN, OK, Outcome

from colora_ms import ascend_facts, ascend_package
from colora_ms.errors import ConfigError
from colora_ms.versions import versions

CARD_MEMORY_MB = 4096  # what the checks need


def card(check):
    """1. Chip, cores, memory, other processes, driver."""
    machine, facts = check.machine, check.facts
    code, text = machine.output("npu-smi", "info")
    found = machine.parse_npu_smi(text) if code == 0 else {"cards": [], "processes": [], "version": None}
    driver, firmware = machine.driver()
    facts.update(npu_smi=found, driver=driver or found["version"], firmware=firmware)
    name = machine.chip()
    if name is None:
        said = text.strip().splitlines()[-1] if text.strip() else "npu-smi is silent"
        return Outcome(FAILED, f"no chip found: {said}",
                       "ls /dev/davinci*; is the driver loaded, and are the devices passed into the container?")
    facts["chip"] = name
    try:
        facts["unit"] = ascend_facts.unit_in_use(name, os.environ.get("COLORA_SOC", ""))
    except ConfigError as problem:
        return Outcome(FAILED, str(problem), "COLORA_SOC names the unit of a chip whose name says too little; else use "
                       "one of these chips, or COLORA_KERNELS=reference")
    cann = machine.toolkit()
    facts["cores"] = (machine.cores(cann, name) if cann else None) or ascend_facts.CORES.get(name)
    try:
        facts["card"] = mine = _card_in_use()
    except ConfigError as problem:
        return Outcome(FAILED, str(problem), "unset both, or let DEVICE_ID count from 0 among the visible ones")
    here = next((one for one in found["cards"] if one["id"] == mine), None)
    free = here["total_mb"] - here["used_mb"] if here and here["total_mb"] is not None else None
    line = (f"{name} ({facts['unit']}), {facts['cores'] and facts['cores'][1]} vector cores, card {mine} of "
            f"{len(found['cards'])}, {free} MB free, driver {facts['driver']}, firmware {firmware}")
    others = [one for one in found["processes"] if one["card"] == mine]
    if others:
        names = ", ".join(f"{one['pid']} ({one['name']}, {one['mb']} MB)" for one in others)
        return Outcome(FAILED, f"{line}; other processes on it: {names}",
                       "kernels that wait for all cores need the card alone: choose another one with "
                       "ASCEND_RT_VISIBLE_DEVICES, or let their owner end them")
    if free is not None and free < CARD_MEMORY_MB:
        return Outcome(FAILED, line, "the card's memory is taken without a process to see: see npu-smi on the host")
    if here and here["health"] != "OK":
        return Outcome(LOOK, f"{line}; npu-smi says its health is {here['health']}", "npu-smi info -t health -i CARD")
    return Outcome(OK, line)


def _card_in_use():
    """The number of the card, as npu-smi counts: the one of ASCEND_RT_VISIBLE_DEVICES that DEVICE_ID names.

    Raises:
        ConfigError: one of the two is malformed, or there is none of that number.
    """
    given, visible = os.environ.get("DEVICE_ID") or "0", os.environ.get("ASCEND_RT_VISIBLE_DEVICES", "")
    cards = [one.strip() for one in visible.split(",")]
    if not given.isdigit():
        raise ConfigError(f"DEVICE_ID={given!r}: expected a number, such as 0")
    if not visible:
        return int(given)
    if not all(one.isdigit() for one in cards):
        raise ConfigError(f"ASCEND_RT_VISIBLE_DEVICES={visible!r}: expected numbers with commas, such as 0,1")
    if int(given) >= len(cards):
        raise ConfigError(f"DEVICE_ID={given}, but ASCEND_RT_VISIBLE_DEVICES={visible!r} lets {len(cards)} be seen")
    return int(cards[int(given)])


def software(check):
    """2. CANN, its operators, MindSpore, versions that fit, tools, folders."""
    facts, problems, looks = check.facts, [], []
    have = versions("mindspore", "mindformers", "numpy", "colora-ms", "msopmodeling")
    cann = check.machine.toolkit()
    facts.update(versions=have, cann=ascend_package.cann_version(cann), toolkit=str(cann))
    if cann is None:
        problems.append(("no CANN toolkit", "install it, or set ASCEND_HOME_PATH"))
    for name in ("ASCEND_HOME_PATH", "ASCEND_OPP_PATH"):
        if not os.environ.get(name):
            problems.append((f"{name} is not set", "source the set_env.sh of the CANN toolkit"))
    opp = os.environ.get("ASCEND_OPP_PATH", "")
    if opp and not (Path(opp) / "built-in" / "op_impl").is_dir():
        problems.append((f"{opp} has no built-in/op_impl", "from CANN 8.5 on the operators are a package of their own: "
                         "install the ops package of this chip after the toolkit"))
    before = opp.split("opp")[0]
    if opp and not (Path(before) / "include").is_dir():
        problems.append((f"MindSpore looks for CANN's headers in {before}include: it cuts ASCEND_OPP_PATH at the first "
                         "'opp'", "install CANN in a folder whose path has no other 'opp' in it"))
    problems += _tools(check)
    looks += ascend_facts.misfits(have.get("mindspore"), facts["cann"], facts.get("driver"), have.get("mindformers"))
    line = f"CANN {facts['cann']}, MindSpore {have.get('mindspore')}, mindformers {have.get('mindformers')}"
    if problems:
        return Outcome(FAILED, f"{line}; {problems[0][0]}" + (f" and {len(problems) - 1} more" if problems[1:] else ""),
                       problems[0][1], tuple(f"{what}: {then}" for what, then in problems))
    if looks:
        return Outcome(LOOK, f"{line}: {looks[0]}", "versions that were not published together mostly fail later, and "
                       "oddly: see the table in ops/ascend/README.md", tuple(looks))
    return Outcome(OK, f"{line}, published together")


def _tools(check):
    found = []
    for tool in ("g++", "cmake", "make", "nm", "readelf"):
        if shutil.which(tool) is None:
            found.append((f"{tool} is not in the PATH", "install g++, cmake, make and binutils"))
    if importlib.util.find_spec("mindspore") is None:
        found.append(("this Python has no mindspore", "set PYTHON to the interpreter that has it"))
    code, text = check.machine.output("python3", "-c", "import attr, decorator, numpy, psutil")
    if code != 0:
        found.append((f"CANN's compiler lacks a module: {text.strip().splitlines()[-1]}",
                      "python3 -m pip install attrs decorator numpy psutil"))
    cache = os.environ.get("MS_COMPILER_CACHE_PATH") or tempfile.gettempdir()
    for folder in (os.getcwd(), cache, str(check.folder)):
        if not os.access(folder, os.W_OK):
            found.append((f"{folder} is not writable", "MindSpore compiles a callback for each operator into the "
                          "current folder or MS_COMPILER_CACHE_PATH: run where you may write"))
        if " " in folder:
            found.append((f"{folder!r} has a blank", "MindSpore cuts compiler commands at blanks: use another folder"))
    return found


def mindspore_itself(check):
    """3. run_check, and one built-in product in each half type against NumPy."""
    child = check.child("device", "child_device.py", limit=600, quiet=300)
    bad = [line for line in child.done() if line["wrong"]]
    if child.hung or child.code or bad:
        return check.failure(child, bad, "MindSpore itself does not work here: this is not about our operators")
    return Outcome(OK, ", ".join(f"{line['done']} {line.get('note', '')}".strip() for line in child.done()))


def build(check):
    """4. Our operators for this chip alone."""
    given = os.environ.get("ASCEND_CUSTOM_OPP_PATH", "")
    found = ascend_package.find()
    if check.emulated:
        code, text = check.machine.output(check.python, str(check.root / "ops/emulator/build.py"), seconds=900)
        if code != 0:
            return Outcome(FAILED, f"the emulator does not build: {text.strip().splitlines()[-1]}", "install g++")
        if check.machine.toolkit() is None:
            return Outcome(OK, "the emulator's library, in place of a build by CANN")
    if found is not None and not check.options.rebuild:
        check.facts["package"] = str(found.path)
        more = f"; shadowed: {', '.join(map(str, found.shadowed))}" if found.shadowed else ""
        return Outcome(LOOK if found.shadowed else OK, f"built before: {found.path}{more}",
                       "two packages hold the same operators: the first one answers")
    install = check.folder / "install"
    environment = {**check.environment(), "COLORA_BUILD": str(check.folder / "logs" / "build")}
    environment.pop("ASCEND_CUSTOM_OPP_PATH", None)
    if "unit" in check.facts:
        environment["COLORA_SOC"] = check.facts["unit"]
    child = check.watch.run(["bash", str(check.root / "ops/ascend/build.sh"), str(install)],
                            check.folder / "logs" / "build.log", environment, limit=3600, quiet=3600)
    if child.code:
        return check.failure(child, [], "logs/build/compiler has build.log and install.log")
    package = install / "vendors" / "colora"
    check.facts["package"] = str(package)
    # In front of what the user has: other packages stay visible.
    os.environ["ASCEND_CUSTOM_OPP_PATH"] = ":".join(filter(None, [str(package), given]))
    return Outcome(OK, next(line for line in child.text.splitlines() if line.startswith("built for")))


def package(check):
    """5. Headers, exported functions, op-info, binaries, tiling library, version."""
    if check.emulated and "package" not in check.facts:
        return _contract(check)
    folder = Path(check.facts["package"])
    facts = ascend_package.stamp(folder)
    units = [check.facts["unit"]] if "unit" in check.facts else facts.get("units", [])
    found, more = check.package_check.problems(folder, check.contract.definitions(), units, check.machine.toolkit())
    check.facts["package_files"] = more
    if facts.get("cann") != check.facts.get("cann"):
        found.append(f"built with CANN {facts.get('cann')}, here is {check.facts.get('cann')}")
    if found:
        return Outcome(FAILED, f"{found[0]}" + (f" and {len(found) - 1} more" if found[1:] else ""),
                       "build again: scripts/verify_on_npu.sh --rebuild", tuple(found))
    return Outcome(OK, f"{len(more['exports'])} functions, {more['binaries']} binaries for {', '.join(units)}, "
                       f"built with CANN {facts.get('cann')}")


def _contract(check):
    """Without a package: what a build would register, laid out and read."""
    with tempfile.TemporaryDirectory() as folder:
        check.contract.write(folder)
        found, _ = check.package_check.problems(folder, check.contract.definitions(), ascend_facts.UNITS)
    found = [one for one in found if "op_kernel" not in one and ("ops-info" in one or one.endswith(".h is not there"))]
    if found:
        return Outcome(FAILED, found[0], "the sources do not fit one another")
    return Outcome(NOT_RUN, "no package without CANN; headers and op-info that a build would register are whole")


def free_port():
    """A port that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]
