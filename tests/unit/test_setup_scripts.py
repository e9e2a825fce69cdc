"""``setup_peers.sh`` builds llama.cpp with what the processor has, and nothing else."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "setup_peers.sh"
pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")

BASE = "fpu vme sse sse2 ssse3 sse4_1 sse4_2 popcnt"
AVX2 = f"{BASE} avx f16c fma bmi1 bmi2 avx2"
AVX512 = f"{AVX2} avx512f avx512dq avx512cd avx512bw avx512vl"
VNNI = f"{AVX512} avx512_vnni avx512_bitalg"
AMX = f"{VNNI} avx512_bf16 amx_bf16 amx_tile amx_int8 avx_vnni"

NAMES = ("GGML_AVX", "GGML_AVX2", "GGML_FMA", "GGML_F16C", "GGML_BMI2", "GGML_AVX512", "GGML_AVX512_VNNI")


def x86(flags):
    return "".join(f"processor\t: {i}\nvendor_id\t: GenuineIntel\nmodel name\t: any, with avx512f in its name\n"
                   f"flags\t\t: {flags}\nvmx flags\t: vnmi avx512f\nbugs\t\t: spectre_v1\n\n" for i in range(2))


ARM = ("processor\t: 0\nBogoMIPS\t: 50.00\nFeatures\t: fp asimd evtstrm aes pmull sha1 sha2 crc32 asimddp sve\n"
       "CPU implementer\t: 0x41\n\n")


def flags_of(cpuinfo, *arguments):
    return subprocess.run(["bash", str(SCRIPT), *arguments], capture_output=True, text=True, timeout=60, check=False,
                          env={**os.environ, "CPUINFO": str(cpuinfo)})


def parsed(text):
    words = text.split()
    assert all(word.startswith("-DGGML_") and word.count("=") == 1 for word in words)
    return dict(word.removeprefix("-D").split("=") for word in words)


@pytest.mark.parametrize("name, cpuinfo, on", [
    ("before AVX", x86(BASE), ()),
    ("AVX only", x86(f"{BASE} avx"), NAMES[:1]),
    ("AVX2", x86(AVX2), NAMES[:5]),
    ("AVX-512 without VNNI", x86(AVX512), NAMES[:6]),
    ("AVX-512 with VNNI", x86(VNNI), NAMES),
    ("AMX", x86(AMX), NAMES),
    # Knights Landing has AVX-512 without the parts that ggml's code uses.
    ("parts of AVX-512", x86(f"{AVX2} avx512f avx512cd avx512er avx512pf"), NAMES[:5]),
    ("VNNI of 256 bits, of the later small cores", x86(f"{AVX2} avx_vnni"), NAMES[:5]),
    ("made up: VNNI beside parts", x86(f"{AVX2} avx512f avx512_vnni"), NAMES[:5]),
    ("ARM", ARM, ()),
    ("nothing known", "", ()),
])
def test_the_flags_are_those_of_the_processor(tmp_path, name, cpuinfo, on):
    path = tmp_path / "cpuinfo"
    path.write_text(cpuinfo)
    done = flags_of(path, "--print-flags")
    assert done.returncode == 0 and done.stderr == "" and done.stdout.count("\n") == 1
    # Never built for the machine itself, nor with AMX: both would take more than is named here.
    assert parsed(done.stdout) == {"GGML_NATIVE": "OFF", **{one: "ON" if one in on else "OFF" for one in NAMES}}


def test_flags_are_printed_whatever_else_is_asked_and_nothing_is_installed(tmp_path):
    path = tmp_path / "cpuinfo"
    path.write_text(x86(AVX2))
    alone = flags_of(path, "--print-flags").stdout
    for arguments in (("--llama-cpp", "--print-flags"), ("--print-flags", "--vllm")):
        assert flags_of(path, *arguments).stdout == alone
    missing = flags_of(tmp_path / "absent", "--print-flags")
    assert missing.returncode == 0 and "=ON" not in missing.stdout
    wrong = flags_of(path, "--print-flag")
    assert wrong.returncode == 2 and "unknown option '--print-flag'" in wrong.stderr and wrong.stdout == ""


def test_this_machine_has_what_its_flags_say():
    """Against /proc/cpuinfo itself: what is switched on stands there."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.is_file():
        pytest.skip("there is no /proc/cpuinfo")
    environment = {key: value for key, value in os.environ.items() if key != "CPUINFO"}
    done = subprocess.run(["bash", str(SCRIPT), "--print-flags"], capture_output=True, text=True, timeout=60,
                          env=environment,
                          check=True)
    words = next((line.split(":", 1)[1].split() for line in cpuinfo.read_text().splitlines()
                  if line.startswith("flags")), [])
    needed = {"GGML_AVX512": "avx512bw", "GGML_AVX512_VNNI": "avx512_vnni"}
    for name, state in parsed(done.stdout).items():
        if state == "ON":
            assert needed.get(name, name.removeprefix("GGML_").lower()) in words
