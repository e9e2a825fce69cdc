#!/usr/bin/env python
"""A GGUF file as it is stored, against llama.cpp on the same file: speed of decoding, and perplexity.

    python scripts/loading_formats.py --model qwen2.5-coder-1.5b.gguf --text wikitext-2/test.txt --json formats.json

* ``q4k_vs_llamacpp_1``: tokens a second at one row over llama.cpp's, same threads, no adapter; rounds alternate, each
  side in a process of its own, and the ratio is that of the medians. A token's time is that of a long answer less that
  of a short one.
* ``ppl_vs_llamacpp``: perplexity over llama.cpp's, less 1; windows of 512 tokens, second halves scored, same ids.

llama.cpp is llama-cpp-python in .venv-peers (bash scripts/setup_peers.sh --llama-cpp).
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

from benchmark_common import ROOT, BenchmarkError, Worker, machine, measure, run_benchmark, serve, table, versions

sys.path.insert(0, str(ROOT))  # so that it runs from a checkout that is not installed

SHORT, LONG = 8, 40  # tokens of the two answers
WINDOW, WINDOWS = 512, 20
PROMPT = "def quicksort(values):\n"


class Ours:
    """colora_ms in its process."""

    def load(self, model, threads):
        """Seconds of loading, and the formats that the weights have."""
        from colora_ms.decoding import Generator
        from colora_ms.models import load_model

        start = time.perf_counter()
        self.decoder, self.tokenizer = load_model(model)
        seconds = time.perf_counter() - start
        self.generator = Generator(self.decoder, self.tokenizer, max_rows=2)
        cells = [cell for _, cell in self.decoder.cells_and_names() if hasattr(cell, "format") and cell.format]
        return {"seconds": seconds, "formats": sorted({cell.format.name for cell in cells})}

    def ids(self, text, count):
        """The first tokens of a text."""
        return [int(one) for one in self.tokenizer.encode(text)][:count]

    def decode(self, ids, tokens):
        """Seconds and ids of a greedy answer."""
        start = time.perf_counter()
        answer = self.generator.generate([ids], max_new_tokens=tokens, ignore_eos=True)[0]
        return {"seconds": time.perf_counter() - start, "ids": [int(one) for one in answer.tokens]}

    def losses(self, windows):
        """Summed -log p of the second half of each window."""
        from colora_ms.evaluation.decoder_scorer import DecoderScorer

        scorer = DecoderScorer(self.decoder, rows=1)
        return [float(-one[len(window) // 2 - 1:].sum(dtype="float64"))
                for window in windows for one in scorer.token_logprobs([window])]


class LlamaCpp:
    """llama.cpp in its process."""

    def load(self, model, threads):
        """Open the file twice: for decoding, and with the logits of all tokens."""
        import llama_cpp

        self.llama_cpp, start = llama_cpp, time.perf_counter()
        options = {"n_threads": threads, "n_threads_batch": threads, "verbose": False}
        self.model = llama_cpp.Llama(model, n_ctx=256, **options)
        seconds = time.perf_counter() - start
        self.open = lambda: llama_cpp.Llama(model, n_ctx=WINDOW, n_batch=WINDOW, logits_all=True, **options)
        return {"seconds": seconds, "version": llama_cpp.__version__}

    def decode(self, ids, tokens):
        """Seconds and ids of a greedy answer."""
        import numpy as np

        start, chosen = time.perf_counter(), []
        self.model.reset()
        for _ in range(tokens):
            self.model.eval(ids)
            logits = np.ctypeslib.as_array(self.llama_cpp.llama_get_logits(self.model.ctx), (self.model.n_vocab(),))
            chosen.append(int(logits.argmax()))
            ids = chosen[-1:]
        return {"seconds": time.perf_counter() - start, "ids": chosen}

    def losses(self, windows):
        """As of Ours."""
        import numpy as np

        model, found = self.open(), []
        for window in windows:
            model.reset()
            model.eval(window)
            half = len(window) // 2
            logits = np.asarray(model.scores[half - 1:len(window) - 1], np.float64)  # each predicts the next token
            top = logits.max(1)
            lse = np.log(np.exp(logits - top[:, None]).sum(1)) + top
            found.append(float((lse - logits[np.arange(len(logits)), window[half:]]).sum()))
        return found


def measure_formats(arguments, folder):
    """(measures, further entries of the JSON file); ``arguments``: model, text, peers_python, threads, repeats."""
    for path in (arguments.model, arguments.text, arguments.peers_python):
        if path is None or not Path(path).exists():
            raise BenchmarkError(f"{path} is missing; see the head of {Path(__file__).name}")
    here = Path(__file__)
    sides = {"ours": Worker([sys.executable, here, "--child"], {"COLORA_CACHE": str(folder / "cache-formats")}, 3600),
             "llama.cpp": Worker([arguments.peers_python, here, "--peer"], timeout=3600)}
    loads = {name: side.ask("load", model=str(arguments.model), threads=arguments.threads)
             for name, side in sides.items()}
    print(f"weights are {', '.join(loads['ours']['formats'])}", flush=True)
    text = Path(arguments.text).read_text(encoding="utf-8")
    prompt = sides["ours"].ask("ids", text=PROMPT, count=64)
    rates, answers = {name: [] for name in sides}, {}
    for name, side in sides.items():
        side.ask("decode", ids=prompt, tokens=SHORT)  # graphs, caches
    for _ in range(arguments.repeats):
        for name, side in sides.items():
            short, long = (side.ask("decode", ids=prompt, tokens=tokens) for tokens in (SHORT, LONG))
            rates[name].append((LONG - SHORT) / (long["seconds"] - short["seconds"]))
            answers[name] = long["ids"]
    same = next((i for i, pair in enumerate(zip(*answers.values())) if pair[0] != pair[1]), LONG)
    middle = {name: statistics.median(found) for name, found in rates.items()}
    print(table(("one row", "tokens/s"), [(name, f"{rate:.2f}") for name, rate in middle.items()]), flush=True)
    ids = sides["ours"].ask("ids", text=text[:WINDOW * arguments.windows * 8], count=WINDOW * arguments.windows)
    windows = [ids[at:at + WINDOW] for at in range(0, len(ids) - WINDOW + 1, WINDOW)]
    if len(windows) < arguments.windows:
        raise BenchmarkError(f"{arguments.text} has {len(ids)} tokens, expected {WINDOW * arguments.windows}")
    losses = {name: side.ask("losses", windows=windows) for name, side in sides.items()}
    for side in sides.values():
        side.close()
    scored = WINDOW // 2 * len(windows)
    perplexity = {name: 2.718281828459045 ** (sum(found) / scored) for name, found in losses.items()}
    print(table(("perplexity", ""), [(name, f"{value:.5f}") for name, value in perplexity.items()]), flush=True)
    return [measure("q4k_vs_llamacpp_1", middle["ours"] / middle["llama.cpp"], "x"),
            measure("q4k_tokens_per_s_1", middle["ours"], "tokens/s"),
            measure("llamacpp_tokens_per_s_1", middle["llama.cpp"], "tokens/s"),
            measure("ppl_vs_llamacpp", perplexity["ours"] / perplexity["llama.cpp"] - 1, "ratio - 1")], {
        "formats": {"rates": rates, "perplexity": perplexity, "windows": len(windows), "loads": loads,
                    "equal_tokens": same}}


def benchmark(arguments, folder):
    """(measures, versions, further entries of the JSON file)"""
    print(", ".join(f"{k} {v}" for k, v in machine().items()), flush=True)
    measures, more = measure_formats(arguments, folder)
    print(table(("measure", "value", "unit"), [(m["name"], f"{m['value']:.4g}", m["unit"]) for m in measures]))
    return measures, versions("colora-ms", "mindspore"), more


def main():
    if sys.argv[1:] in (["--child"], ["--peer"]):
        return serve(Ours() if sys.argv[1] == "--child" else LlamaCpp())
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, metavar="FILE", help="GGUF file, such as Q4_K_M")
    parser.add_argument("--text", type=Path, required=True, metavar="FILE", help="text for the perplexity")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the measures here")
    parser.add_argument("--threads", type=int, default=2, help="processors to use")
    parser.add_argument("--repeats", type=int, default=3, help="rounds")
    parser.add_argument("--windows", type=int, default=WINDOWS, help="windows of the perplexity")
    parser.add_argument("--peers-python", type=Path, default=ROOT / ".venv-peers" / "bin" / "python", metavar="PYTHON")
    arguments = parser.parse_args()
    if arguments.repeats < 1 or arguments.windows < 1:
        parser.error("--repeats and --windows must be at least 1")
    return run_benchmark(benchmark, arguments)


if __name__ == "__main__":
    main()
