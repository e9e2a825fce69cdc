#!/usr/bin/env python
"""Starting: what the first answer of a process costs beyond a later one.

    python scripts/benchmark_loading.py --json loading.json

* compile: the generation graph of a decoder of 30 layers of tiny random weights (hidden 64), so that nearly all is
  compilation, in a process of its own with an empty graph cache. ``compile_s_30_layers``: seconds of the first answer
  less those of a second one; ``compile_mib_30_layers``: the process's peak memory during the first answer less its
  memory before. The same for 4 layers, which tells what a layer costs.

* start (loading_start.py): seconds from process start to the first token of SmolLM2 with a LoRA and a contrast, and to
  the first completion of ``colora-ms serve``, each with an empty folder of compiled graphs and with a filled one.
* later: ``compilations_after_first``, graphs that 40 requests of random lengths, rows and budgets compile after the
  first answer of a Generator, of an Engine, and of ``colora-ms generate``, all together; ``rss_smollm2_int4_mib``, the
  process's peak memory up to its first answers.
* 1.5b, 8b (loading_real.py): files of real sizes, which loading_models.py gets: ``load_s_1_5b``, ``first_answer_s_8b``
  and so on; ``peak_over_file_…``: peak memory up to the end of the first answer, less what stood after ``import
  mindspore``, over the file's size. 8b makes a QLoRA step, too.
* formats (loading_formats.py): ``q4k_vs_llamacpp_1``, ``ppl_vs_llamacpp``, against llama.cpp on the file of 1.5b; with
  --text, wikitext-2's test.txt. These three run when they are named with --only.

Each round is a process of its own; the medians count. A further part is a function in ``PARTS`` that gives measures.
"""

import argparse
import os
import statistics
import sys
import time
from pathlib import Path

import loading_formats
import loading_models
import loading_real
import loading_start
from benchmark_common import (
    ROOT,
    BenchmarkError,
    Worker,
    machine,
    measure,
    peak_bytes,
    reset_peak,
    run_benchmark,
    serve,
    table,
    versions,
)

sys.path.insert(0, str(ROOT))  # so that it runs from a checkout that is not installed

FEW, LAYERS = 4, 30
PROMPT_TOKENS, ANSWER_TOKENS = 8, 8


# -- what runs in child processes -------------------------------------------------------------------------------------


def resident_bytes():
    """Resident memory of this process now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Numbers:
    """A tokenizer whose texts are ids with blanks between them."""

    eos_token_id, chat_template = 2, None

    def encode(self, text, add_special_tokens=True):
        return [int(word) for word in text.split()]

    def decode(self, ids, skip_special_tokens=True):
        return " ".join(map(str, ids))


class Child:
    """One process; the handler of the questions."""

    def compile(self, layers):
        """{"first", "second": seconds of an answer, the first one with the making of the Generator; "bytes": peak of
        the first one less what was there before; "graphs": compiled for it}."""
        from colora_ms import runtime
        from colora_ms.decoding import Generator
        from colora_ms.models.config import DecoderConfig
        from colora_ms.models.decoder import Decoder

        config = DecoderConfig(model_type="llama", vocab_size=256, hidden_size=64, intermediate_size=128,
                               num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
                               max_position_embeddings=256, eos_token_ids=(2,))
        decoder = Decoder(config)
        prompt, seconds, graphs = list(range(3, 3 + PROMPT_TOKENS)), [], [runtime.all_compilations()]
        generator, peak, before = None, 0, resident_bytes()
        reset_peak()
        for _ in range(2):
            start = time.perf_counter()
            generator = generator or Generator(decoder, Numbers())
            generator.generate([prompt], max_new_tokens=ANSWER_TOKENS, ignore_eos=True)
            seconds.append(time.perf_counter() - start)
            peak = peak or peak_bytes()
            graphs.append(runtime.all_compilations())
        if not graphs[0] < graphs[1] == graphs[2]:
            raise BenchmarkError(f"{graphs} graphs were compiled before the first answer, after it, and after the "
                                 "second one: they are expected in the first one")
        return {"first": seconds[0], "second": seconds[1], "bytes": peak - before, "graphs": graphs[1] - graphs[0]}

    def later(self, adapter, requests):
        """See :func:`loading_start.later`."""
        return loading_start.later(adapter, requests)

    def later_engine(self, adapter, requests):
        """See :func:`loading_start.later_engine`."""
        return loading_start.later_engine(adapter, requests)

    def answer(self, model, adapter=None):
        """See :func:`loading_real.answer`."""
        return loading_real.answer(model, adapter)

    def train(self, model):
        """See :func:`loading_real.train`."""
        return loading_real.train(model)


# -- measuring --------------------------------------------------------------------------------------------------------


def compilation(rounds):
    """Figures of one model's compilation from what its processes answered: {"s", "mib"}, medians."""
    return {"s": statistics.median(one["first"] - one["second"] for one in rounds),
            "mib": statistics.median(one["bytes"] / 2**20 for one in rounds)}


def measure_compile(arguments, folder):
    """(measures, further entries of the JSON file)"""
    rounds = {FEW: [], LAYERS: []}
    for number in range(arguments.repeats):
        for layers, answers in rounds.items():
            # A cache of its own, which is empty; graphs are kept there as a user's are.
            worker = Worker([sys.executable, __file__, "--child"],
                            {"COLORA_CACHE": str(folder / f"cache-{layers}-{number}")}, timeout=1800)
            answers.append(worker.ask("compile", layers=layers))
            worker.close()
    found = {layers: compilation(answers) for layers, answers in rounds.items()}
    measures = []
    for layers, one in found.items():
        measures += [measure(f"compile_s_{layers}_layers", one["s"], "s"),
                     measure(f"compile_mib_{layers}_layers", one["mib"], "MiB")]
    more = LAYERS - FEW
    measures += [measure("compile_s_a_layer", (found[LAYERS]["s"] - found[FEW]["s"]) / more, "s"),
                 measure("compile_mib_a_layer", (found[LAYERS]["mib"] - found[FEW]["mib"]) / more, "MiB")]
    return measures, {"compile": {str(layers): answers for layers, answers in rounds.items()}}


def measure_formats(arguments, folder):
    """See loading_formats.py; of the file of 1.5 billion weights."""
    arguments.model, arguments.windows = loading_models.model_path(loading_models.QWEN), loading_formats.WINDOWS
    return loading_formats.measure_formats(arguments, folder)


#: What can be measured, by name.
PARTS = {"compile": measure_compile, "start": loading_start.measure_start,
         "later": loading_start.measure_later, "1.5b": loading_real.measure_qwen, "8b": loading_real.measure_eight,
         "formats": measure_formats}
#: Those that need no further files, and run if none are named.
USUAL = ("compile", "start", "later")


def benchmark(arguments, folder):
    """(measures, versions, further entries of the JSON file)"""
    print(", ".join(f"{k} {v}" for k, v in machine().items()), flush=True)
    measures, more = [], {}
    for name in arguments.only or USUAL:
        found, entries = PARTS[name](arguments, folder)
        measures += found
        more.update(entries)
    print(table(("measure", "value", "unit"), [(m["name"], f"{m['value']:.4g}", m["unit"]) for m in measures]))
    return measures, versions("colora-ms", "mindspore"), more


def main():
    if sys.argv[1:] == ["--child"]:
        return serve(Child())
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the measures here")
    parser.add_argument("--only", nargs="+", choices=PARTS, metavar="PART", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--threads", type=int, default=2, help="processors to use")
    parser.add_argument("--repeats", type=int, default=3, help="processes for each measure")
    parser.add_argument("--text", type=Path, metavar="FILE", help="of part formats: the text of the perplexity")
    parser.add_argument("--peers-python", type=Path, default=ROOT / ".venv-peers" / "bin" / "python", metavar="PYTHON",
                        help="of part formats: the interpreter that has llama-cpp-python")
    arguments = parser.parse_args()
    if arguments.repeats < 1:
        parser.error("--repeats must be at least 1")
    return run_benchmark(benchmark, arguments)


if __name__ == "__main__":
    main()
