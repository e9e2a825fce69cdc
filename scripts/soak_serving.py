#!/usr/bin/env python
"""Soak of the HTTP server: many adapters over few slots, random loads and unloads, clients that leave, and bad
requests.

    python scripts/soak_serving.py --minutes 10 --json soak.json                  SmolLM2-135M
    python scripts/soak_serving.py --minutes 1 --tiny --json soak.json            a tiny random model: seconds to start

A real uvicorn server in this process, clients in threads. Every request must end in one of two ways: an answer whose
tokens are right, or a refusal with a status below 500 and a sentence. What does neither is *lost*, and the script
fails. ``--flood`` then sends that many requests as fast as the server takes connections: each must be answered or
refused at once because the queue is full, and the server must answer as before when the flood is over.
"Right": greedy answers of the same prompt and adapters are always the same, whatever runs beside them. The cache holds
fewer blocks than the batch's rows want, so that requests are set back and computed again; a run in which that never
happens fails, too. Ensembles of three adapters go to the engine directly. Memory is the resident memory when the
warm-up (a fifth of the time) is over and at the end. An engine without blocks or ensembles is soaked without them, and
the summary says so.
"""

import argparse
import json
import os
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

from benchmark_common import ROOT, measure, table, versions, write_json
from soak_clients import ANSWERS, VOICES, Client, Flood, Tally

sys.path.insert(0, str(ROOT))  # so that it runs from a checkout that is not installed


#: Tokens of the longest request, prompt and answer; most of a prompt.
LONGEST, PROMPT_TOKENS = 160, 60
ROWS = 8


def resident():
    """Resident memory of this process in MiB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


# -- models and adapters ----------------------------------------------------------------------------------------------


def tiny_model():
    """(decoder, tokenizer) of a random model: hidden 32, 2 layers, 97 tokens that are numbers."""
    from colora_ms.models.config import DecoderConfig
    from colora_ms.models.decoder import Decoder

    class Numbers:
        eos_token_id, chat_template = 2, None

        def encode(self, text, add_special_tokens=True):
            return [int(word) for word in text.split()]

        def decode(self, ids, skip_special_tokens=True):
            return " ".join(str(i) for i in ids if i > 2)

    config = DecoderConfig(model_type="llama", vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                           num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=256,
                           eos_token_ids=(2,))
    return Decoder(config), Numbers()


def write_adapters(folder, config, count):
    """Adapters "a00", "a01", ... of ranks 1 to 16 on all linears, and the broken ones of BAD."""
    from safetensors.numpy import save_file

    shapes = {name.removesuffix(".weight"): shape for name, shape in config.parameter_shapes().items()
              if name.endswith("_proj.weight")}

    def write(name, seed, r):
        values, source = {}, np.random.default_rng(seed)
        for module, (out, inner) in shapes.items():
            for half, shape in (("lora_A", (r, inner)), ("lora_B", (out, r))):
                scale = np.float32(0.5 / shape[1] ** 0.5 if half == "lora_A" else 0.05)
                values[f"base_model.model.{module}.{half}.weight"] = source.standard_normal(shape, np.float32) * scale
        (folder / name).mkdir()
        (folder / name / "adapter_config.json").write_text(json.dumps({
            "peft_type": "LORA", "r": r, "lora_alpha": 16, "bias": "none",
            "target_modules": sorted({module.rsplit(".", 1)[1] for module in shapes})}))
        if name == "nan":
            next(iter(values.values()))[0, 0] = np.nan
        save_file(values, str(folder / name / "adapter_model.safetensors"))

    for i in range(count):
        write(f"a{i:02d}", i, 1 + i % 16)
    for name, r in (("truncated", 4), ("wide", 17), ("nan", 4)):
        write(name, count, r)
    path = folder / "truncated" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    return [f"a{i:02d}" for i in range(count)]


def few_blocks(config):
    """Bytes of a cache in which the longest ensemble just fits: about a third of what the rows want."""
    from colora_ms.models.paged_cache import BLOCK, block_bytes

    return (VOICES * -(-(PROMPT_TOKENS + 64) // BLOCK) + 2) * block_bytes(config)


def engine_options(config):
    """Further arguments of the Engine: a small cache, and more requests let in than it holds."""
    return {"max_length": LONGEST, "cache_bytes": few_blocks(config), "ahead": 1}


def ensembles(engine):
    """The clients' way to an ensemble's answer, or None."""
    import colora_ms

    if not hasattr(colora_ms, "Ensemble"):
        return None
    return lambda prompt, adapters, tokens: list(engine.submit(
        prompt, mix=colora_ms.Ensemble(adapters), max_new_tokens=tokens).result(120).tokens)


def soak(arguments, folder):
    """(tally, memory after the warm-up, memory at the end, engine's counters, the flood)"""
    from colora_ms.models import load_model
    from colora_ms.serving import AdapterBank, Engine
    from colora_ms.serving.http import Server, Settings, create_app

    decoder, tokenizer = tiny_model() if arguments.tiny else load_model(max_positions=256)
    names = ["base", *write_adapters(folder, decoder.config, arguments.adapters)]
    bank = AdapterBank(decoder, folder, max_loaded=arguments.slots, max_rank=16,
                       host_bytes=arguments.host_megabytes << 20)
    tally, source = Tally(), np.random.default_rng(3)
    prompts = [source.integers(3, decoder.config.vocab_size, source.integers(1, PROMPT_TOKENS)).tolist()
               for _ in ANSWERS]
    with Engine(decoder, tokenizer, bank, rows=ROWS, queue=arguments.clients // 2,
                **engine_options(decoder.config)) as engine:
        engine.warm_up()
        mixed = ensembles(engine)
        with Server(create_app(engine, Settings(base_model="base"))) as server:
            start = time.monotonic()
            end = start + 60 * arguments.minutes
            address = server.url.removeprefix("http://")
            threads = [threading.Thread(target=Client(i, address, names, prompts, tally, end, mixed).run)
                       for i in range(arguments.clients)]
            for thread in threads:
                thread.start()
            time.sleep((end - start) / 5)
            first = resident()
            for thread in threads:
                thread.join()
            last = resident()
            flood = Flood(address, names[:1 + arguments.slots], prompts, tally)
            if arguments.flood:
                flood.run(arguments.flood)
                check = Client(0, address, names, prompts, tally, end)
                before = tally.counts["answered"]
                for _ in range(5):
                    check.answer()
                if tally.counts["answered"] != before + 5:
                    tally.lose("the server does not answer after the flood")
            waited = time.monotonic() + 30
            while (state := engine.stats())["waiting"] + state["starting"] + state["running"]:
                if time.monotonic() > waited:
                    tally.lose(f"{state['waiting']} waiting and {state['running']} running requests are left behind")
                    break
                time.sleep(0.1)
            ended = sum(state[key] for key in ("finished", "cancelled", "timeouts", "failed"))
            if ended != state["submitted"]:
                tally.lose(f"{state['submitted']} requests were taken, {ended} ended")
            if state.get("preemptions") == 0:
                tally.lose("no request was ever set back: the cache has too many blocks for this load")
            # A waiting request fails if its adapter is withdrawn and pushed out of memory before its turn.
            if state["failures"] or state["failed"] > tally.refusals["adapter unloaded"] or state["bank"]["pinned"]:
                tally.lose(f"failures: {state['failures']}, failed: {state['failed']}, pinned slots: "
                           f"{state['bank']['pinned']}")
    return tally, first, last, {**state, "mixes": mixed is not None}, flood


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0, help="how long")
    parser.add_argument("--flood", type=int, default=0, help="requests of the flood at the end")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the summary here")
    parser.add_argument("--tiny", action="store_true", help="a tiny random model in place of SmolLM2-135M")
    parser.add_argument("--adapters", type=int, default=64, help="adapters")
    parser.add_argument("--slots", type=int, default=8, help="slots")
    parser.add_argument("--host-megabytes", type=int, default=256, help="host memory for adapters behind the slots")
    parser.add_argument("--clients", type=int, default=24, help="threads that send requests; the queue takes half as "
                                                                "many")
    arguments = parser.parse_args()
    os.environ.setdefault("GLOG_v", "3")
    if not VOICES <= arguments.adapters <= 99 or arguments.slots < VOICES or arguments.minutes <= 0 \
            or arguments.clients < 2:
        parser.error(f"--adapters must be {VOICES} to 99, --slots at least {VOICES}, --minutes above 0, --clients at "
                     "least 2")
    with tempfile.TemporaryDirectory(prefix="soak-serving-") as folder:
        tally, first, last, state, flood = soak(arguments, Path(folder))
    bank = state["bank"]
    missing = {name: f"this engine has no {name}" for name, there in
               (("preemptions", "preemptions" in state), ("mixes", state["mixes"])) if not there}
    measures = [
        measure("requests", sum(tally.counts.values()) + sum(tally.refusals.values()), "requests"),
        measure("answered", tally.counts["answered"], "requests"),
        measure("left_by_client", tally.counts["left by the client"], "requests"),
        measure("reloaded", tally.counts["reloaded adapters"], "adapters"),
        measure("refused", sum(tally.refusals.values()), "requests"),
        measure("lost", len(tally.lost), "requests"),
        measure("different_answers_kept", len(tally.expected), "prompt, adapter, contrast"),
        measure("slot_loads", bank["loads"], "adapters"), measure("slot_evictions", bank["evictions"], "adapters"),
        measure("generated_tokens", state["generated_tokens"], "tokens"),
        *([] if "mixes" in missing else [measure("mixes", tally.counts["mixes"], "requests")]),
        *([] if "preemptions" in missing else [measure("preemptions", state["preemptions"], "requests")]),
        measure("memory_after_warm_up_mib", first, "MiB"), measure("memory_at_end_mib", last, "MiB"),
        measure("memory_growth", last / first - 1, "share"),
    ]
    if arguments.flood:
        measures += [measure("flood_requests", arguments.flood, "requests"),
                     measure("flood_seconds", flood.seconds, "s"),
                     measure("flood_answered", tally.counts["flood answered"], "requests"),
                     measure("flood_refused", tally.refusals["flood: queue full"], "requests"),
                     measure("flood_slowest_refusal_s", flood.slowest_refusal, "s"),
                     measure("memory_after_flood_mib", resident(), "MiB")]
    print(table(("measure", "value", "unit"), [(m["name"], f"{m['value']:g}", m["unit"]) for m in measures]))
    print(table(("refused", "requests"), sorted(tally.refusals.items())))
    for name, reason in missing.items():
        print(f"{name} missing: {reason}")
    for sentence in tally.lost[:20]:
        print(f"lost: {sentence}")
    if arguments.json:
        write_json(arguments.json, measures, versions("colora-ms", "mindspore", "fastapi", "uvicorn"),
                   refusals=dict(tally.refusals), lost=tally.lost[:100], missing=missing, minutes=arguments.minutes,
                   tiny=arguments.tiny)
    return 1 if tally.lost else 0


if __name__ == "__main__":
    sys.exit(main())
