"""What stands in an Ascend machine: chip, cores, memory, other processes, versions. The standard library alone.

    python ops/ascend/machine.py      print it

Used by build.sh (for which chip?) and by scripts/verify_on_npu.sh (is this a machine on which the rest can work?).
"""
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from colora_ms.ascend_facts import chip_name, unit_of, units_of  # noqa: E402
from colora_ms.ascend_package import cann_version  # noqa: E402
from colora_ms.errors import ConfigError  # noqa: E402

TOOLKITS = ("/usr/local/Ascend/ascend-toolkit/latest", "/usr/local/Ascend/cann")
#: Asks the runtime in a process of its own: a broken driver must not take this one down.
_ASK_RUNTIME = "import ctypes; f = ctypes.CDLL('libascendcl.so').aclrtGetSocName; " \
    "f.restype = ctypes.c_char_p; print(f().decode())"


def output(*command, seconds=30):
    """(exit code, text of stdout and stderr) of a command; (None, reason) if it is not there or takes too long."""
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
                              timeout=seconds)
    except FileNotFoundError:
        return None, f"{command[0]} is not in the PATH"
    except (OSError, subprocess.TimeoutExpired) as problem:
        return None, f"{command[0]}: {problem}"
    return done.returncode, done.stdout


def toolkit():
    """The CANN toolkit's folder with all links resolved, or None."""
    given = os.environ.get("ASCEND_HOME_PATH")
    for candidate in [given] if given else TOOLKITS:
        if os.path.isdir(candidate):
            return Path(os.path.realpath(candidate))
    return None


def parse_npu_smi(text):
    """What ``npu-smi info`` says: {"version", "cards": [{"id", "chip", "health", "used_mb", "total_mb"}], "processes":
    [{"card", "pid", "name", "mb"}]}. A line that has another form is passed over."""
    found = {"version": None, "cards": [], "processes": []}
    version = re.search(r"npu-smi\s+(\S+)\s+Version:\s*(\S+)", text)
    if version:
        found["version"] = version[2]
    for line in text.splitlines():
        cells = [cell.split() for cell in line.strip().strip("|").split("|")]
        head = re.match(r"\|\s*(\d+)\s+(\S*\d\S*)\s*\|\s*([A-Za-z]+)\s*\|", line)
        if head and not re.fullmatch(r"\d+", head[2]):
            found["cards"].append({"id": int(head[1]), "chip": chip_name(head[2]), "health": head[3], "used_mb": None,
                                   "total_mb": None})
        elif len(cells) == 3 and cells[1] and ":" in "".join(cells[1]) and found["cards"]:
            sizes = re.findall(r"(\d+)\s*/\s*(\d+)", line.split("|")[3])
            if sizes:
                found["cards"][-1].update(used_mb=int(sizes[-1][0]), total_mb=int(sizes[-1][1]))
        elif len(cells) == 4 and all(cells) and cells[0][0].isdigit() and cells[1][0].isdigit():
            found["processes"].append({"card": int(cells[0][0]), "pid": int(cells[1][0]), "name": " ".join(cells[2]),
                                       "mb": int(cells[3][0]) if cells[3][0].isdigit() else None})
    return found


def chip():
    """The name of the chip ("910B3"), as the runtime or npu-smi says it, or None.

    npu-smi names an A3 chip "Ascend910" only, so the runtime is asked first.
    """
    code, text = output(sys.executable, "-c", _ASK_RUNTIME)
    if code == 0 and text.strip():
        return chip_name(text.strip().splitlines()[-1])
    code, text = output("npu-smi", "info")
    cards = parse_npu_smi(text)["cards"] if code == 0 else []
    return cards[0]["chip"] if cards else None


def units(wanted=None):
    """The units to build for.

    Args:
        wanted: None: those of this machine's chip; "both"; or names of units or chips with ";" between them.

    Raises:
        ConfigError: a name is not known or refused, there is none, or this machine's chip cannot be asked.
    """
    if wanted:
        return units_of(wanted)
    here = chip()
    if here is None:
        raise ConfigError("the chip of this machine is not known: neither the runtime (libascendcl.so) nor npu-smi "
                          "says it; set COLORA_SOC to ascend910b, ascend910_93 or both")
    return [unit_of(here)]


def cores(cann, name):
    """(Cube cores, vector cores) of a chip by CANN's own platform file, or None."""
    for pattern in ("data/platform_config", "compiler/data/platform_config", "*-linux/data/platform_config"):
        for folder in sorted(Path(cann).glob(pattern)):
            file = folder / f"Ascend{name}.ini"
            if file.is_file():
                text = file.read_text(encoding="utf-8", errors="replace")
                counts = [re.search(rf"^{key}\s*=\s*(\d+)", text, re.M)
                          for key in ("(?:cube_core_cnt|ai_core_cnt)", "vector_core_cnt")]
                if all(counts):
                    return tuple(int(one[1]) for one in counts)
    return None


def version_file(*paths):
    """The version that the first readable file of these says after "version=", or None."""
    for path in paths:
        try:
            text = Path(path).read_text(encoding="utf-8", errors="replace")
        except OSError:
            continue
        match = re.search(r"^\s*(?:package_)?version\s*=\s*\"?(\S+?)\"?\s*$", text, re.M | re.I)
        if match:
            return match[1]
    return None


def driver():
    """(version of the driver, version of the firmware), each None where no file says it."""
    root = os.environ.get("COLORA_ASCEND_DRIVER", "/usr/local/Ascend")
    return version_file(f"{root}/driver/version.info"), version_file(f"{root}/firmware/version.info")


def main():
    cann = toolkit()
    print(f"toolkit   {cann}\nCANN      {cann_version(cann)}\nchip      {chip()}\ndriver    {driver()}")
    code, text = output("npu-smi", "info")
    print(parse_npu_smi(text) if code == 0 else text)


if __name__ == "__main__":
    main()
