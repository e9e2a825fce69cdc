"""Steps 6 to 9: our operators one by one, their values, the whole matrix; then CANN's built-in operators."""
import shutil

from report import FAILED, OK, Outcome

ONE_LAUNCH = 60  # seconds for one launch before it counts as hung


def _golden(check, name, folder, *arguments, limit=1800, quiet=ONE_LAUNCH, prefix=()):
    """run_golden.py on a folder of cases, watched."""
    script = str(check.root / "ops" / "ascend" / "run_golden.py")
    command = [*prefix, check.python, script, str(check.folder / folder), "--target", check.target, "--json"]
    log = check.folder / "logs" / f"{name}.log"
    quiet = max(quiet, 600) if check.emulated else quiet  # a busy CPU is no hung kernel
    return check.watch.run([*command, *arguments], log, check.environment(), limit, quiet)


def _cases(check):
    """Write the golden files once: "one" (float16, smallest), "small" (every dtype), "all"."""
    golden = check.golden
    if not check.options.quick:
        golden.write(check.folder / "all")
    golden.write(check.folder / "small", small=True)
    one = check.folder / "one"
    one.mkdir(exist_ok=True)
    for file in sorted((check.folder / "small").glob("*-float16.npz")):
        shutil.copy(file, one / file.name)


def launches(check):
    """6. A fresh process constructs the operators and launches each once, with a limit."""
    _cases(check)
    child = _golden(check, "launches", "one")
    done, wrong = child.done(), [line for line in child.done() if line["wrong"]]
    loaded = next(iter(child.done("loaded")), {})
    check.facts["callbacks_seconds"] = loaded.get("seconds")
    if child.hung:
        check.facts["hung"] = child.hung
        codes = check.codes.explain(child.text)
        return Outcome(FAILED, f"{child.hung} did not end within {ONE_LAUNCH} s"
                       + (f" ({codes[0][0]}: {codes[0][1]})" if codes else ""),
                       codes[0][2] if codes else f"this is a hang of our operator, please send the archive; "
                       f"{check.codes.RESET}")
    if child.code is None or not done or (child.code and not wrong):
        return check.failure(child, wrong, "the operators do not load: the end of logs/launches.log")
    crashed = [line for line in wrong if ":" in line["wrong"] and "Error" in line["wrong"]]
    if crashed:
        return check.failure(child, crashed, "logs/launches.log has the whole message")
    return Outcome(OK, f"{len(done)} operators launched, {loaded.get('seconds')} s to construct them, slowest launch "
                       f"{max(line['seconds'] for line in done):.2f} s" + (", values wrong (step 7)" if wrong else ""))


def values(check):
    """7. The smallest case of each operator and dtype, as a graph and in PyNative."""
    child = _golden(check, "values", "small", "--modes", "graph,pynative")
    return _judged(check, child, "right: finite, within the allowance, changed by the adapter, unused slots not read, "
                                 "tokens without an adapter untouched")


def matrix(check):
    """8. All cases twice; many launches; on a device also dynamic shapes, a second stream, a profiler."""
    many = "3" if check.emulated else "1000"
    cases = "one" if check.options.quick else "all"
    parts = [(f"{cases} twice", _golden(check, "matrix", cases, "--twice")),
             (f"{many} launches", _golden(check, "many", "one", "--repeat", many, quiet=ONE_LAUNCH * 5))]
    if not check.emulated:
        parts.append(("dynamic shapes", _golden(check, "dynamic", "one", "--dynamic")))
        parts.append(("second stream", _golden(check, "stream", "one", "--stream", "--modes", "pynative")))
        if shutil.which("msprof"):
            prefix = ("msprof", f"--output={check.folder / 'msprof'}")
            parts.append(("under msprof", _golden(check, "msprof", "one", prefix=prefix, quiet=ONE_LAUNCH * 5)))
    failures = [(name, outcome) for name, child in parts
                if (outcome := _judged(check, child, name)).result == FAILED]
    counts = ", ".join(f"{name}: {sum(not one['wrong'] for one in child.done())} of {len(child.done())}"
                       for name, child in parts)
    if failures:
        return Outcome(FAILED, f"{failures[0][0]}: {failures[0][1].line}", failures[0][1].advice, (counts,))
    return Outcome(OK, counts + " right")


def _judged(check, child, what):
    done, wrong = child.done(), [line for line in child.done() if line["wrong"]]
    if child.hung or wrong or child.code or not done:
        return check.failure(child, wrong, f"{check.codes.OURS}: {child.hung or (wrong or [{}])[0].get('done', '')}")
    return Outcome(OK, f"{len(done)} of {len(done)} {what}; worst share of the allowance "
                       f"{max(line['share'] for line in done):.2f}")


def built_in(check):
    """9. CANN's operators as our graphs call them, alone, against NumPy; emulated: their strict stand-ins."""
    child = check.child("builtins", "child_builtins.py", *check.quick, limit=1800,
                        quiet=600 if check.emulated else ONE_LAUNCH * 3)
    done, wrong = child.done(), [line for line in child.done() if line["wrong"]]
    if child.hung or child.code or not done:
        return check.failure(child, wrong, "logs/builtins.log: which operator refuses which argument")
    if wrong:
        return Outcome(FAILED, f"{len(wrong)} of {len(done)} differ: {wrong[0]['done']}: {wrong[0]['wrong']}",
                       "what we believe of this operator is wrong here: please send the archive",
                       tuple(f"{one['done']}: {one['wrong']}" for one in wrong))
    if check.emulated:
        return Outcome(OK, f"{len(done)} of {len(done)} calls of the rehearsal's stand-ins equal NumPy")
    return Outcome(OK, f"{len(done)} of {len(done)} calls equal NumPy")
