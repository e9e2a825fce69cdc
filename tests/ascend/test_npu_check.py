"""scripts/verify_on_npu.sh: a dry run through all steps, with a toolkit that compiles nothing; a machine where nothing
is; what is said of a hang and of error codes; that no secret goes into the archive."""
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tarfile
import types
from pathlib import Path

import numpy as np
import pytest

import fake_cann
from emulated import ROOT, load_module

CHECK = ROOT / "scripts" / "npu_check"
sys.path[:0] = [str(CHECK), str(ROOT / "ops" / "ascend")]
main = load_module(CHECK / "__main__.py", "npu_check_main")
del sys.path[:2]
codes, watch, steps_model, steps_operators = main.codes, main.watch, main.steps_model, main.steps_operators
from report import FAILED, NOT_RUN, OK, Outcome, Report, environment, scrubbed  # noqa: E402

golden = main.golden


def verify(folder, *arguments, path=(), **more):
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("ASCEND", "COLORA_K"))}
    paths = os.pathsep.join([*map(str, path), str(Path(sys.executable).parent), clean["PATH"]])
    return subprocess.run(["bash", str(ROOT / "scripts" / "verify_on_npu.sh"), "--folder", str(folder), *arguments],
                          capture_output=True, text=True, timeout=900,
                          env={**clean, "PYTHON": sys.executable, "PATH": paths, **more})


def test_a_dry_run_goes_through_all_steps(tmp_path, emulator):
    if not all(map(shutil.which, ("gcc", "nm", "readelf", "cmake", "make"))):
        pytest.skip("gcc, binutils, cmake and make are needed")
    cann = fake_cann.toolkit(tmp_path / "cann")
    stubs = tmp_path / "python"
    stubs.mkdir()
    for module in ("attr", "decorator"):
        if importlib.util.find_spec(module) is None:
            (stubs / f"{module}.py").write_text("")
    done = verify(tmp_path / "check", "--dry-run", "--quick", path=[fake_cann.npu_smi(tmp_path / "bin")],
                  ASCEND_HOME_PATH=str(cann), ASCEND_OPP_PATH=str(cann / "opp"), PYTHONPATH=str(stubs),
                  HF_TOKEN="hf_never", MS_SECRET="never", MS_PROXY_URL="http://me:never@host/")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = {int(line.split()[0]): line for line in done.stdout.splitlines() if line[:2].strip().isdigit()
             and line[4:5].strip()}
    assert sorted(lines) == list(range(1, 14)), done.stdout
    count = len(golden.CASES)
    for number, words in {1: "910B3 (ascend910b), 40 vector cores, card 0 of 2, 62145 MB free", 2: "CANN 9.0.0",
                          4: "built for ascend910b with CANN 9.0.0",
                          5: f"{2 * count} functions, {3 * count} binaries for ascend910b",
                          6: f"{count} operators launched", 7: f"{6 * count} of {6 * count} right",
                          8: f"one twice: {count} of {count}",
                          9: "20 of 20 calls", 10: "1 layers on rehearsal", 11: "6 times taken",
                          12: "tensor parallel"}.items():
        assert words in lines[number] and "FAILED" not in lines[number], lines[number]
    assert lines[11].split()[4] == "ok", lines[11]
    (archive,) = (tmp_path / "check").glob("*.tar.gz")
    with tarfile.open(archive) as pack:
        held = {Path(one.name).name: pack.extractfile(one).read() for one in pack.getmembers()}
    assert {"table.txt", "facts.json", "environment.txt", "matrix.log", "build.log", "worker_0.log"} <= set(held)
    assert json.loads(held["facts.json"])["cores"] == [20, 40]
    assert b"MS_ALLOC_CONF" in held["environment.txt"] or b"ASCEND_HOME_PATH" in held["environment.txt"]
    assert not [name for name, data in held.items() if b"never" in data]


def test_where_nothing_is_the_first_failure_says_what_to_try(tmp_path):
    done = verify(tmp_path, "--steps", "1-7,12", ASCEND_HOME_PATH="/nowhere")
    assert done.returncode == 2, done.stdout + done.stderr
    assert "card                   FAILED" in done.stdout and "ls /dev/davinci*" in done.stdout.splitlines()[1]
    assert done.stdout.count("next:") == 1 and "step 2 comes first" in done.stdout
    assert "2 of 9 steps failed" in done.stdout
    done = verify(tmp_path, "--steps", "1", path=[fake_cann.npu_smi(tmp_path / "bin", chip="310P3")])
    assert done.returncode == 1 and "'310P3' is not supported: it has no bfloat16" in done.stdout
    done = verify(tmp_path, "--steps", "1", path=[fake_cann.npu_smi(tmp_path / "bin")], ASCEND_RT_VISIBLE_DEVICES="1")
    assert done.returncode == 1 and "other processes on it: 12345 (python3 serve.py, 56610 MB)" in done.stdout


def test_the_card_and_its_name(tmp_path):
    smi = fake_cann.npu_smi(tmp_path / "bin", chip="Ascend910")
    done = verify(tmp_path, "--steps", "1", path=[smi])
    assert done.returncode == 1 and "gives it to an A3 (910_93xx) too. On an A3 set COLORA_SOC" in done.stdout
    done = verify(tmp_path, "--steps", "1", path=[smi], DEVICE_ID="1", COLORA_SOC="ascend910_93")
    assert "910 (ascend910_93)" in done.stdout and "card 1 of 2" in done.stdout


@pytest.mark.parametrize("device, visible, card", [
    ("1", None, 1), (None, None, 0), (None, "3,5", 3), ("1", "3,5", 5), ("2", "3,5", "lets 2 be seen"),
    ("one", None, "expected a number"), ("0", "a-b", "expected numbers with commas")])
def test_which_card(monkeypatch, device, visible, card):
    for name, value in (("DEVICE_ID", device), ("ASCEND_RT_VISIBLE_DEVICES", visible)):
        monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)
    if isinstance(card, int):
        assert main.steps_machine._card_in_use() == card
    else:
        with pytest.raises(main.steps_machine.ConfigError, match=card):
            main.steps_machine._card_in_use()


@pytest.mark.parametrize("steps", ["foo", "", "20", "7-1", "0", "1,", "1-2-3"])
def test_steps_that_are_none(tmp_path, steps, capsys):
    with pytest.raises(SystemExit) as ended:
        main.main(["--folder", str(tmp_path / "none"), "--steps", steps])
    assert ended.value.code == 2 and f"{steps!r}: expected steps from 1 to 13" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_a_child_that_hangs_is_ended_and_named(tmp_path):
    script = tmp_path / "child.py"
    script.write_text("import sys, time\nprint('{\"start\": \"MultiLora\"}', flush=True)\n"
                      "print('error code is 507034', flush=True)\ntime.sleep(float(sys.argv[1]))\n"
                      "print('{\"done\": \"MultiLora\", \"wrong\": null}', flush=True)\n")
    command = [sys.executable, str(script)]
    child = watch.run([*command, "60"], tmp_path / "a.log", dict(os.environ), limit=50, quiet=1)
    assert child.hung == "MultiLora" and child.code is None and "507034" in (tmp_path / "a.log").read_text()
    assert codes.explain(child.text)[0][0] == "507034" and "reset" in codes.explain(child.text)[0][2]
    (line,) = watch.run([*command, "0"], tmp_path / "b.log", dict(os.environ), limit=50, quiet=20).done()
    assert line["wrong"] is None
    assert watch.run([*command, "60"], tmp_path / "c.log", dict(os.environ), limit=1, quiet=50).hung == "MultiLora"


@pytest.mark.parametrize("text, words", [
    ("aclrtSynchronizeStream failed, error code 507014", "time limit"), ("[ERROR] EI0006: connect timeout", "in time"),
    ("EZ3003: No supported Ops kernel", "looked for another kind"), ("VEC_ERROR illegal configuration", "not allowed"),
    ("aclnnMultiLora not in libopapi.so", "export ASCEND_CUSTOM_OPP_PATH"), ("507018", "reset"),
    ("opp_kernels is not installed", "ops package"), ("RuntimeError: Out of memory", "COLORA_NPU_MEMORY")])
def test_error_codes(text, words):
    (found,) = codes.explain(text)
    assert words in " ".join(found)
    assert codes.explain("everything is fine, 1507014 times") == []


def fake_check(tmp_path, child, **more):
    """A Check on a device whose children all end as this one."""
    options = types.SimpleNamespace(dry_run=False, quick=True, folder=tmp_path, rebuild=False)
    check = main.Check(options)
    check.watch = types.SimpleNamespace(run=lambda *arguments, **named: child)
    check.child = lambda *arguments, **named: child
    return check


def test_what_the_steps_say_of_their_children(tmp_path):
    good = {"done": "MultiLora-1-float16 graph", "wrong": None, "share": 0.5, "seconds": 0.1}
    bad = {**good, "wrong": "the adapter has no effect"}

    def outcome(step, lines, code=0, hung=None, text=""):
        return step(fake_check(tmp_path, watch.Child(lines, code, hung, text)))

    hang = outcome(steps_operators.launches, [], None, "MultiLora-1-float16 graph", "507018")
    assert hang.result == FAILED and "did not end within 60 s (507018" in hang.line and "reset" in hang.advice
    assert outcome(steps_operators.launches, [], 1, text="ImportError: no library\n").line.endswith("no library")
    assert outcome(steps_operators.launches, [{"loaded": 7, "seconds": 9.5}, good]).result == OK
    assert "the adapter has no effect" in outcome(steps_operators.values, [good, bad], 1).line
    assert outcome(steps_operators.matrix, [good, bad], 1).line.startswith("one twice: 1 of 2 wrong")
    assert outcome(steps_operators.matrix, [good]).result == OK
    assert "1 of 2 differ" in outcome(steps_operators.built_in, [good, {**bad, "wrong": "NaN"}]).line
    assert outcome(steps_model.cards, []).result == NOT_RUN


def test_tokens_are_compared_where_they_are_decided():
    want = {"one": [{"tokens": [4, 5, 6], "margins": [1.0, 0.01, 1.0]}]}
    assert steps_model.compare({"one": [{"tokens": [4, 9, 9]}]}, want) == ([], 1, 2)
    problems, compared, left = steps_model.compare({"one": [{"tokens": [7, 5, 6]}]}, want)
    assert problems == ["one, prompt 0, token 0 is 7, right is 4 (won by 1.00)"] and (compared, left) == (0, 0)


def test_a_step_that_breaks_counts_and_the_archive_is_written(tmp_path, monkeypatch, capsys):
    def broken(check):
        raise KeyError("cores")

    monkeypatch.setattr(main, "STEPS", ((1, "card", (), broken), (2, "software", (1,), broken)))
    monkeypatch.setattr(main.Check, "environment", lambda self: {})
    assert main.main(["--folder", str(tmp_path / "f"), "--steps", "1-2"]) == 1
    said = capsys.readouterr().out
    assert "KeyError: 'cores'" in said and "step 1 comes first" in said and "next: a bug of the check" in said
    assert list((tmp_path / "f").glob("*.tar.gz"))
    assert main.chosen("1-3,7") == {1, 2, 3, 7}


def test_no_secret_is_packed(monkeypatch):
    for name in ("HF_TOKEN", "MS_API_KEY", "HTTPS_PROXY", "HCCL_PASSWORD"):
        monkeypatch.setenv(name, "never")
    monkeypatch.setenv("MS_SERVER", "http://me:never@host/")
    assert not [pair for pair in environment().items() if "never" in " ".join(pair)]
    assert scrubbed(b"https://u:never@h/x token=never Authorization: never") == \
        b"https://***@h/x token=*** Authorization: ***"
    report = Report(Path("."))
    report.rows = [(1, "card", 0.1, Outcome(FAILED, "line", "advice", ("detail",)))]
    assert report.failed == 1 and "try: advice" in report.table() and "detail" in report.table()


# ---- the golden cases ----------------------------------------------------------------------------------------------
def test_golden_cases_cover_every_operator_and_dtype_and_a_wrong_result_is_told(emulator, tmp_path):
    from colora_ms.kernels import ascend

    assert set(ascend.OPERATORS) == set(golden.CASES)
    assert {(name, arguments[-1]) for name, _, arguments in golden.shapes(small=True)} == \
        {(name, dtype) for name in golden.CASES for dtype in golden.DTYPES}
    case = golden.lora_case(3, 64, 4, (48,), "float32")
    wrong, idle = dict(case, want=case["want"].copy()), dict(case)
    wrong["want"][0, 5] += 1e-2
    idle["up"] = np.zeros_like(case["up"])
    idle["want"] = case["y"].astype(np.float64)
    poison = dict(case, slots=np.full(3, len(case["up"]) - 1, np.int32))
    for name, one in (("good", case), ("idle", idle), ("poison", poison), ("wrong", wrong)):
        np.savez(tmp_path / f"MultiLora-{name}-float32.npz", operator="MultiLora", **one)
    done = subprocess.run([sys.executable, str(ROOT / "ops" / "ascend" / "run_golden.py"), str(tmp_path), "--target",
                           "CPU"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and "1 of 4 cases right on CPU" in done.stdout, done.stdout + done.stderr
    for words in ("the adapter has no effect", "values are not finite", "WRONG: [0, 5] is "):
        assert words in done.stdout, done.stdout
