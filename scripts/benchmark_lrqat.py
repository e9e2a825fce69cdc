"""Quantises SmolLM2-135M to 4, 3 and 2 bits, rounded to nearest and trained (LR-QAT), and measures what is lost.

    python scripts/benchmark_lrqat.py --data wikitext-2/test.txt --json lrqat.json            all parts, about an hour
    python scripts/benchmark_lrqat.py --data … --json … --parts memory sizes                  without the training runs

The text is cut into articles (WikiText's headings). Every sixth article, from the first, is for the measurement: 40
windows of 256 tokens, spread evenly over them. All other articles are the training data, so the training runs see the
domain of the test but none of its articles. A share above 1 is the domain's doing: the row "float32, LoRA on the same
data" (``--control`` updates) and ``recovered_share_w4_of_tuned_float``, which puts that LoRA in the place of the float
model, say how much.
Perplexity is exp of the mean loss over the 40 x 256 predicted tokens.

Measures: ``recovered_share_w4`` = (RTN - LR-QAT) / (RTN - float) of the W4 losses' perplexities; ``memory_ratio`` =
memory that LR-QAT's training needs over that of full quantisation-aware training, same code and batch, each in a
process of its own: parameters and optimizer state plus the most that MindSpore's allocator had in use.
``memory_ratio_rss`` is the ratio of peak resident memory, with the interpreter, the compiler and the allocator's pool:
it takes blocks of 1 GiB and spreads over them before it uses freed places again. ``int4_size_ratio`` = bytes of the
quantised linears, integers and scales, over float32.
"""

import argparse
import json
import math
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]
from benchmark_common import measure, peak_bytes, table, versions, write_json  # noqa: E402

WINDOW, WINDOWS, EVERY = 256, 40, 6
PARTS = ("quality", "sizes", "memory")


def articles(text):
    """The articles of a WikiText file, each with its heading."""
    starts = [found.start() for found in re.finditer(r"^ = [^=\n]+ = $", text, re.MULTILINE)]
    return [text[begin:end] for begin, end in zip(starts, [*starts[1:], len(text)])]


def split(path):
    """(training text, test text): every sixth article is for the test."""
    found = articles(Path(path).read_text(encoding="utf-8"))
    if len(found) < 2 * EVERY:
        sys.exit(f"{path} has {len(found)} articles, expected a WikiText file with at least {2 * EVERY}")
    return "".join(a for i, a in enumerate(found) if i % EVERY), "".join(a for i, a in enumerate(found)
                                                                         if i % EVERY == 0)


def windows_of(text, tokenizer):
    """40 windows of 257 ids, spread evenly."""
    ids = tokenizer.encode(text, add_special_tokens=False)
    begins = np.linspace(0, len(ids) - WINDOW - 1, WINDOWS).astype(int)
    return [ids[begin:begin + WINDOW + 1] for begin in begins]


def perplexity(net, windows, slot=-1):
    """exp of the mean loss over all windows."""
    from colora_ms.evaluation.decoder_scorer import DecoderScorer

    net.set_train(False)
    rows = DecoderScorer(net, slot=slot, rows=4).token_logprobs(windows)
    loss = -float(np.concatenate(rows).astype(np.float64).mean())
    return math.exp(min(loss, 700.0))


def quality_of(model, recipe, adapter, steps, text, windows_text, work):
    """Train (or round) in this process; returns a row of the table."""
    from colora_ms.models import load_model
    from colora_ms.quantization import quantize
    from colora_ms.training.quantize import QuantizationConfig
    from colora_ms.training.text import encode_text
    from colora_ms.training.trainer import Trainer

    net, tokenizer = load_model(model)
    windows = windows_of(windows_text, tokenizer)
    config = QuantizationConfig.from_dict({
        **recipe, "output": str(work), "adapter": {**recipe["adapter"], **adapter},
        "data": {**recipe["data"], "train": "in memory"},
        "loop": {**recipe["loop"], "steps": steps, "progress": False}})
    settings = config.quantization()
    began = time.perf_counter()
    quantized = quantize(net, settings, config.loop.seed)
    row = {"range_search_seconds": time.perf_counter() - began, "rounded": perplexity(net, windows)}
    print(json.dumps(row), flush=True)
    if settings.method != "rtn":
        data = encode_text(text, tokenizer, config.data.max_length, net.config.vocab_size)
        result = Trainer(net, data, config, quantized.save).train()
        row.update(seconds=result.seconds, first_loss=float(np.mean(result.losses[:5])),
                   last_loss=float(np.mean(result.losses[-5:])), updates=result.steps, tokens=result.tokens)
        row["perplexity"] = perplexity(net, windows)
    folder = quantized.export(Path(work) / "model", overwrite=True)
    stored, plain = quantized.sizes()
    row.update(stored=stored, plain=plain, file=(Path(folder) / "model.safetensors").stat().st_size)
    loaded, _ = load_model_without_tokenizer(folder)
    row["exported"] = perplexity(loaded, windows)
    return row


def load_model_without_tokenizer(folder):
    """The exported model; it was written without a tokenizer."""
    from colora_ms.models import build_decoder
    from colora_ms.models.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(folder)
    return build_decoder(checkpoint), checkpoint


def float_rows(model, recipe, steps, text, windows_text, work, rank):
    """Perplexity of the float model, and after a LoRA of the same rank on the same data."""
    from colora_ms import LoraConfig, inject
    from colora_ms.models import load_model
    from colora_ms.training.config import TrainingConfig
    from colora_ms.training.text import encode_text
    from colora_ms.training.trainer import Trainer

    net, tokenizer = load_model(model)
    windows = windows_of(windows_text, tokenizer)
    row = {"perplexity": perplexity(net, windows)}
    print(json.dumps(row), flush=True)
    if steps:
        lora = dict(r=rank, lora_alpha=rank, target_modules="all-linear")
        handle = inject(net, LoraConfig(**lora))
        config = TrainingConfig.from_dict({**recipe, "output": str(work), "adapter": lora,
                                           "data": {**recipe["data"], "train": "in memory"},
                                           "optimizer": {**recipe["optimizer"], "learning_rate": 2e-4},
                                           "loop": {**recipe["loop"], "steps": steps, "progress": False}})
        data = encode_text(text, tokenizer, config.data.max_length, net.config.vocab_size)
        result = Trainer(net, data, config, handle.save).train()
        row.update(tuned=perplexity(net, windows, slot=0), seconds=result.seconds)
    return row


def memory_of(model, method, rows, tokens, rank):
    """Peak resident bytes of three training steps in this process."""
    from colora_ms.models import load_model
    from colora_ms.quantization import LrQatConfig, quantize
    from colora_ms.training.batching import Batch
    from colora_ms.training.config import OptimizerConfig
    from colora_ms.training.step import Stepper

    net, _ = load_model(model, max_positions=tokens)
    # The search of the range does not change the memory of training.
    quantize(net, LrQatConfig(bits=4, r=rank, lora_alpha=float(rank), method=method, range_candidates=1))
    stepper = Stepper(net, OptimizerConfig(), slot=-1)
    ids = np.random.default_rng(0).integers(0, net.config.vocab_size, (rows, tokens + 1)).astype(np.int32)
    batch = Batch(ids[:, :-1].copy(), ids[:, 1:].copy(), np.full(rows, tokens, np.int32))
    seconds = []
    for step in range(1, 4):
        began = time.perf_counter()
        stepper([batch], step, 10)
        seconds.append(time.perf_counter() - began)
    kept = {id(p): p.nbytes for p in (*net.get_parameters(), *stepper.optimizer.mean, *stepper.optimizer.square)}
    return {"peak_rss": peak_bytes(), "kept": sum(kept.values()), "step_seconds": seconds[1:],
            "trained": sum(p.size for p in stepper.optimizer.trained)}


def in_a_process(arguments, **request):
    """Run one piece of work in a process of its own; returns its last line of JSON."""
    command = [sys.executable, __file__, "--data", arguments.data, "--model", arguments.model, "--recipe",
               arguments.recipe,
               "--work", arguments.work, "--request", json.dumps(request)]
    # MindSpore prints its allocator's peak when the process ends.
    environment = {**os.environ, "MS_DEV_RUNTIME_CONF": "memory_statistics:True"}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    result = json.loads([line for line in done.stdout.splitlines() if line.startswith("{")][-1])
    used = re.findall(r"dynamic memory pool total .*?actual peak used mem:(\d+)M", done.stdout)
    if used and "kept" in result:
        result["needed"] = result["kept"] + (int(used[-1]) << 20)
    print(f"{request}: {json.dumps(result)}", file=sys.stderr, flush=True)
    return result


def answer(arguments):
    """The work of one child process."""
    from colora_ms.training.config import read_yaml

    request, recipe = json.loads(arguments.request), read_yaml(arguments.recipe)
    what, work = request.pop("what"), Path(arguments.work) / request.pop("name", "x")
    if what == "memory":
        return memory_of(arguments.model, rank=recipe["adapter"].get("r", 32), **request)
    train, test = split(arguments.data)
    if what == "float":
        return float_rows(arguments.model, recipe, request["steps"], train, test, work, recipe["adapter"].get("r", 32))
    return quality_of(arguments.model, recipe, request["adapter"], request["steps"], train, test, work)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="a WikiText file with article headings (wiki.test.tokens, "
                                                      "test.txt)")
    parser.add_argument("--json", help="file for the results")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--recipe", default=str(ROOT / "model_zoo" / "smollm2-135m" / "lrqat.yaml"))
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--bits", nargs="+", type=int, default=[4, 3, 2])
    parser.add_argument("--steps", nargs="+", type=int, default=[70, 25, 25], help="updates for each of --bits")
    parser.add_argument("--control", type=int, default=70, help="updates of the LoRA on the float model; 0: left out")
    parser.add_argument("--batch", nargs=2, type=int, default=[4, 128],
                        help="rows and tokens of the memory measurement")
    parser.add_argument("--work", default="runs/benchmark_lrqat", help="folder for the runs; must not hold one")
    parser.add_argument("--request", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.request:
        print(json.dumps(answer(arguments)), flush=True)
        return
    measures, rows, details = [], [], {}
    if "quality" in arguments.parts:
        plain = details["float"] = in_a_process(arguments, what="float", name="float", steps=arguments.control)
        rows.append(("float32", "", f"{plain['perplexity']:.2f}", "", ""))
        if "tuned" in plain:
            rows.append(("float32, LoRA on the same data", "", f"{plain['tuned']:.2f}", "", f"{plain['seconds']:.0f}"))
        for bits, steps in zip(arguments.bits, arguments.steps):
            one = in_a_process(arguments, what="quality", name=f"w{bits}", adapter={"bits": bits}, steps=steps)
            details[f"w{bits}"] = one
            share = (one["rounded"] - one["exported"]) / (one["rounded"] - plain["perplexity"])
            rows.append((f"W{bits} RTN", bits, f"{one['rounded']:.2f}", "", ""))
            rows.append((f"W{bits} LR-QAT, {one['updates']} updates", bits, f"{one['exported']:.2f}", f"{share:.3f}",
                         f"{one['seconds']:.0f}"))
            measures += [measure(f"perplexity_rtn_w{bits}", one["rounded"], "perplexity"),
                         measure(f"perplexity_lrqat_w{bits}", one["exported"], "perplexity"),
                         measure(f"recovered_share_w{bits}", share, "ratio")]
            if "tuned" in plain:
                fair = (one["rounded"] - one["exported"]) / (one["rounded"] - plain["tuned"])
                measures.append(measure(f"recovered_share_w{bits}_of_tuned_float", fair, "ratio"))
            if bits == 4:
                measures.append(measure("int4_size_ratio", one["stored"] / one["plain"], "ratio"))
        measures.append(measure("perplexity_float", plain["perplexity"], "perplexity"))
        print(table(("model", "bits", "perplexity", "recovered share", "training, s"), rows))
    elif "sizes" in arguments.parts:
        one = in_a_process(arguments, what="quality", name="sizes", adapter={"bits": 4, "method": "rtn",
                                                                           "downcast": "int"}, steps=1)
        measures.append(measure("int4_size_ratio", one["stored"] / one["plain"], "ratio"))
    if "memory" in arguments.parts:
        size = dict(zip(("rows", "tokens"), arguments.batch))
        low = details["memory_lrqat"] = in_a_process(arguments, what="memory", method="lrqat", **size)
        full = details["memory_full"] = in_a_process(arguments, what="memory", method="full", **size)
        measures.append(measure("memory_ratio_rss", low["peak_rss"] / full["peak_rss"], "ratio"))
        if "needed" in low and "needed" in full:
            measures += [measure("memory_ratio", low["needed"] / full["needed"], "ratio"),
                         measure("memory_lrqat", low["needed"] / 2**20, "MiB"),
                         measure("memory_full", full["needed"] / 2**20, "MiB")]
    for one in measures:
        print(f"{one['name']:24} {one['value']:10.4f} {one['unit']}")
    if arguments.json:
        write_json(arguments.json, measures, versions("colora-ms", "mindspore", "numpy"), details=details)


if __name__ == "__main__":
    main()
