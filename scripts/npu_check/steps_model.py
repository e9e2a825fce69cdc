"""Steps 10 to 12: a layer and a small model, what was compiled and how long it takes, several cards."""
import json

from report import FAILED, LOOK, NOT_RUN, OK, Outcome

#: A token counts where the best one had more than this before the second, in log-probability: half types round.
MARGIN = 0.1


def _model(check, name, layers, weight_format, reference=False, prompts=4, more=()):
    """(Child, its result or None) of child_model.py; the reference runs on the CPU's own operators in float32."""
    out = check.folder / f"{name}.json"
    environment = {"COLORA_KERNELS": ""} if reference or not check.emulated else {"COLORA_KERNELS": check.kernels}
    child = check.child(name, "child_model.py", str(out), "--layers", str(layers), "--format", weight_format,
                        "--prompts", str(prompts), *more, limit=1800, quiet=900,
                        target="CPU" if reference else None, **environment)
    return child, json.loads(out.read_text()) if out.is_file() else None


def compare(got, want):
    """(sentences, tokens compared, tokens left out because the margin was too small).

    From the first token that differs below the margin on, the rest of an answer follows another text: left out.
    """
    problems, compared, left = [], 0, 0
    for case, answers in want.items():
        for k, (right, ours) in enumerate(zip(answers, got[case])):
            for at, (a, b, margin) in enumerate(zip(right["tokens"], ours["tokens"], right["margins"])):
                if a == b:
                    compared += 1
                elif margin < MARGIN:
                    left += len(right["tokens"]) - at
                    break
                else:
                    problems.append(f"{case}, prompt {k}, token {at} is {b}, right is {a} (won by {margin:.2f})")
                    break
    return problems, compared, left


def model(check):
    """10. One layer, then a small model, then one with experts: base, zero adapter = base, two adapters that differ,
    contrast."""
    prompts = 1 if check.options.quick else 4
    lines = []
    for layers, name in ((1, "1"),) if check.options.quick else ((1, "1"), (4, "4"), (2, "_experts")):
        more = ("--experts",) if name == "_experts" else ()
        _, want = _model(check, f"reference{name}", layers, "float32", reference=True, prompts=prompts, more=more)
        child, found = _model(check, f"model{name}", layers, "bfloat16", prompts=prompts, more=more)
        if found is None or child.hung or child.code or want is None:
            return check.failure(child, [], f"the model of {layers} layers does not run: logs/model{name}.log")
        check.facts[f"model{name}"] = {key: found[key] for key in ("graphs", "seconds", "kernels", "settings")}
        got = found["answers"]
        problems, compared, left = compare(got, want["answers"])
        tokens = {case: [one["tokens"] for one in answers] for case, answers in got.items()}
        if tokens["zero"] != tokens["base"]:
            problems.insert(0, "an adapter of zeros gives other tokens than no adapter")
        for one, other in (("one", "base"), ("two", "one"), ("contrast", "one")):
            if tokens[one] == tokens[other]:
                problems.insert(0, f"{one} gives the tokens of {other}")
        if problems:
            return Outcome(FAILED, f"{layers} layers: {problems[0]}" + (f" and {len(problems) - 1} more"
                                                                       if problems[1:] else ""),
                           f"{check.codes.OURS}; steps 7 and 9 are right, so look at what passes between operators",
                           tuple(problems))
        kind = "layers with experts" if more else "layers"
        lines.append(f"{layers} {kind} on {found['kernels']}: {compared} tokens equal, {left} too close to call")
    return Outcome(OK, "; ".join(lines))


def figures(check):
    """11. Compiled graphs, the lengths that PagedAttention found by name, step and kernel times beside the model's."""
    known = check.facts.get("model4") or check.facts.get("model1")
    shapes = " (one for each bucket of shapes: on a CPU they are static)" if check.emulated else ""
    line = f"{known['graphs']} graphs{shapes}, {known['seconds']} s with compiling"
    looks = []
    if known["graphs"] > 4 and not check.emulated:
        looks.append(f"{known['graphs']} graphs were compiled; two to four are enough (which shape differs?)")
    if not check.emulated:
        out = check.folder / "lengths.json"
        child = check.child("lengths", "child_model.py", str(out), "--prompts", "1", limit=900, quiet=600, GLOG_v="1",
                            COLORA_COMPILE_CACHE="0")
        seen = "batch_valid_length" in child.text
        line += f"; batch_valid_length {'is' if seen else 'is not'} in MindSpore's log"
        if not seen:
            looks.append("PagedAttention did not look its lengths up by name: another kernel answers than we think")
    vector_cores = str((check.facts.get("cores") or (24, 48))[1])
    child = check.child("times", "child_times.py", *check.quick, "--cores", vector_cores, limit=1800, quiet=300)
    rows, wrong = child.done(), [one for one in child.done() if one["wrong"]]
    if child.hung or child.code or wrong or not rows:
        return check.failure(child, wrong, "logs/times.log")
    check.facts["times"] = rows
    cores = check.facts.get("cores") or (None, None)
    details = [f"{'what':<44} {'measured us':>12} {'modelled us':>12}   ({cores[1] or 'emulated'} vector cores)"]
    details += [f"{one['done']:<44} {one['measured_us']:>12.1f} "
                + (f"{one['modelled_us']:>12.1f}" if one.get("modelled_us") else f"{'-':>12}") for one in rows]
    result = LOOK if looks else OK
    return Outcome(result, f"{line}; {len(rows)} times taken" + (f"; {looks[0]}" if looks else ""),
                   "please send the archive: these figures are what the model is held to", tuple(looks + details))


def cards(check):
    """12. Two processes by msrun: barrier, sums, data parallel, tensor parallel with shares of the adapters."""
    there = len((check.facts.get("npu_smi") or {}).get("cards", ()))
    if not check.emulated and there < 2:
        return Outcome(NOT_RUN, f"{there} card")
    port = check.free_port()
    logs = check.folder / "logs" / "msrun"
    command = ["msrun", "--worker_num=2", "--local_worker_num=2", f"--master_port={port}", "--join=True",
               "--cluster_time_out=300", f"--log_dir={logs}", str(check.here / "child_cards.py"), "--target",
               check.target, "--out", str(check.folder / "cards")]
    environment = check.environment(OMP_NUM_THREADS="1", COLORA_KERNELS="")
    child = check.watch.run(command, check.folder / "logs" / "cards.log", environment, limit=900, quiet=900)
    texts = [file.read_text(errors="replace") for file in sorted(logs.glob("worker_*.log"))] if logs.is_dir() else []
    found = [json.loads(file.read_text()) for file in sorted((check.folder / "cards").glob("worker*.json"))]
    if child.hung or child.code or len(found) != 2:
        return check.failure(child._replace(text=child.text + "\n".join(texts)), [],
                             "logs/msrun/worker_*.log: is a port taken, are both cards free, what does hccn_tool show?")
    wrong = [f"worker {k}: {problem}" for k, one in enumerate(found) for problem in one["wrong"]]
    if wrong:
        return Outcome(FAILED, wrong[0], "collectives give other values: please send the archive", tuple(wrong))
    return Outcome(OK, f"two processes: {', '.join(found[0]['done'])}")
