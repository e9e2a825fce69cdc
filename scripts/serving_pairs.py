"""The load of benchmark_serving.py on two sides: against its parts, with few blocks, and on llama.cpp's server.

Every function takes the :class:`benchmark_serving.Bench` of the run and adds its measures to it.
"""

import statistics

import llama_server
from benchmark_common import BenchmarkError, ratio, table
from serving_load import ANSWER_TOKENS, LONGEST, blocks_wanted, drive, load_prompts, over_parts, percentiles

#: Tokens of the longest request.
MOST_TOKENS = LONGEST + ANSWER_TOKENS
#: What the measures of a weight format are called.
TAGS = {"float32": "f32", "int8": "q8"}
#: Seeds of the prompts: no two loads of one engine have a beginning in common, which the prefix cache would find.
_seeds = iter(range(1, 1 << 30))


def roomy(bench, weight_format="float32"):
    """The worker over the base model alone, with the cache that the engine takes by itself."""
    return bench.engine(f"base {weight_format}", longest=MOST_TOKENS, weight_format=weight_format)[0]


def in_turn(sides, rounds):
    """Call {name: function (round's seed)} in rounds of alternating direction; returns {name: what came back}."""
    found = {name: [] for name in sides}
    for number in range(rounds):
        seed = next(_seeds)
        for name in list(sides)[::-1 if number % 2 else 1]:
            found[name].append(sides[name](seed))
    return found


def measure_load(bench):
    """The load against its parts."""
    arguments, worker = bench.arguments, roomy(bench)
    load = {"requests": arguments.requests}
    worker.ask("loaded", requests=arguments.rows, clients=arguments.rows, seed=next(_seeds), tokens=8)  # warm
    found = in_turn({
        "load": lambda seed: worker.ask("loaded", **load, clients=arguments.rows, seed=seed),
        "parts": lambda seed: worker.ask("parts", **load, rows=arguments.rows, seed=-seed % (1 << 32)),
    }, arguments.load_repeats)
    shares = [over_parts(parts["prompts"], parts["decode"], one["seconds"])
              for one, parts in zip(found["load"], found["parts"])]
    bench.add("load_over_parts", statistics.median(shares), "ratio")
    bench.add("load_tokens_per_second", statistics.median(one["tokens"] / one["seconds"] for one in found["load"]),
              "tokens/s")
    bench.more["load"] = found
    print(table(("round", "load, s", "prompts alone, s", "decoding alone, s", "parts over load"), [
        (i + 1, f"{one['seconds']:.2f}", f"{parts['prompts']:.2f}", f"{parts['decode']:.2f}", f"{share:.3f}")
        for i, (one, parts, share) in enumerate(zip(found["load"], found["parts"], shares))]), flush=True)


def measure_pressure(bench):
    """The load with a quarter of the blocks that it wants."""
    arguments, worker = bench.arguments, roomy(bench)
    names = ("pressure_over_roomy", "pressure_lost", "pressure_same_answers", "pressure_preemptions")
    stats = worker.ask("stats")
    if not stats.get("blocks"):
        return bench.lack("this engine's stats have no blocks", *names)
    from colora_ms.models.paged_cache import BLOCK

    wanted = blocks_wanted(arguments.rows, MOST_TOKENS, BLOCK)
    block_bytes = stats["cache_bytes"] // stats["blocks"]
    if stats["blocks"] < wanted:
        raise BenchmarkError(f"the engine took {stats['blocks']} blocks by itself, the load wants {wanted}")
    small, answer = bench.engine("few blocks", longest=MOST_TOKENS, cache_bytes=wanted // 4 * block_bytes)
    if "missing" in answer:
        return bench.lack(answer["missing"], *names)
    load = {"requests": arguments.requests, "clients": arguments.rows}
    found = in_turn({"few": lambda seed: small.ask("loaded", **load, seed=seed),
                     "enough": lambda seed: worker.ask("loaded", **load, seed=seed)}, arguments.load_repeats)
    bench.add("pressure_over_roomy", ratio(*([one["tokens"] / one["seconds"] for one in found[side]]
                                             for side in ("few", "enough"))), "ratio")
    bench.add("pressure_lost", sum(one["lost"] for one in found["few"]), "requests")
    bench.add("pressure_same_answers", all(a["digest"] == b["digest"] for a, b in zip(found["few"], found["enough"])),
              "1 = yes")
    bench.add("pressure_preemptions", sum(one["counts"].get("preemptions", 0) for one in found["few"]), "requests")
    blocks = small.ask("stats")["blocks"]
    print(f"pressure: {blocks} blocks of {block_bytes} bytes, the load wants {wanted}", flush=True)
    bench.more["pressure"] = {**found, "blocks": blocks, "wanted": wanted, "block_bytes": block_bytes}
    bench.close("few blocks")


def measure_llama_server(bench):
    """The load over HTTP on both servers."""
    binary = bench.arguments.peers_python.parent / "llama-server"
    reason = llama_server.missing(binary)
    if reason:
        return bench.lack(reason, *(f"load_vs_llama_server_{tag}" for tag in TAGS.values()), "ttft_vs_llama_server",
                          "itl_p99_vs_llama_server")
    bench.versions["llama-server"] = llama_server.version(binary)
    for weight_format, tag in TAGS.items():
        _one_format(bench, binary, weight_format, tag)
        bench.close(f"base {weight_format}")


def _one_format(bench, binary, weight_format, tag):
    arguments, kind = bench.arguments, llama_server.KINDS[weight_format]
    path = bench.folder / f"smollm2-{kind}.gguf"
    for remark in llama_server.write_model(path, kind):
        print(f"{path.name}: {remark}", flush=True)
    ours = roomy(bench, weight_format)
    peer = llama_server.LlamaServer(binary, path, arguments.threads, arguments.rows, llama_server.context(MOST_TOKENS))
    try:
        addresses = {"ours": ours.ask("listen"), "llama": peer.address}
        for address in addresses.values():  # warm
            drive(address, load_prompts(arguments.rows, next(_seeds)), arguments.rows, 8)
        loads = in_turn({side: lambda seed, address=address: drive(
            address, load_prompts(arguments.requests, seed), arguments.rows) for side, address in addresses.items()},
            arguments.load_repeats)
    finally:
        peer.close()
    figures = {side: [(load.tokens_per_second, *percentiles(load.first), *percentiles(load.between)) for load in found]
               for side, found in loads.items()}
    middle = {side: [statistics.median(column) for column in zip(*rows)] for side, rows in figures.items()}
    print(table((f"load over HTTP, {weight_format} or {kind}", "tokens/s", "first text p50, ms", "p99",
                 "between texts p50, ms", "p99"),
                [({"ours": "this project", "llama": "llama-server"}[side], *(f"{value:.1f}" for value in values))
                 for side, values in middle.items()]), flush=True)

    def against(column):
        return ratio(*([row[column] for row in figures[side]] for side in ("ours", "llama")))

    more = "" if tag == "f32" else f"_{tag}"
    bench.add(f"load_vs_llama_server_{tag}", against(0), "ratio")
    bench.add(f"ttft_vs_llama_server{more}", against(1), "ratio")
    bench.add(f"itl_p99_vs_llama_server{more}", against(4), "ratio")
    for side in ("ours", "llama"):
        for name, column, unit in (("tokens_per_second", 0, "tokens/s"), ("first_text_p50_ms", 1, "ms"),
                                   ("between_texts_p99_ms", 4, "ms")):
            bench.add(f"http_{name}_{side}_{tag}", middle[side][column], unit)
    equal = [sum(a.text == b.text for a, b in zip(*pair)) for pair in
             zip(*([load.answers for load in loads[side]] for side in ("ours", "llama")))]
    bench.more.setdefault("llama_server", {})[weight_format] = {
        "figures": figures, "columns": ["tokens/s", "first p50", "first p99", "between p50", "between p99"],
        "equal_answers": equal}
