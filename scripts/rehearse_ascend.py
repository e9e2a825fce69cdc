"""Rehearse Ascend's model path on a CPU: the same graph, with strict stand-ins, against a half-type NumPy decoder.

    python scripts/rehearse_ascend.py                         # a small random model
    python scripts/rehearse_ascend.py --experts               # one with routed experts
    python scripts/rehearse_ascend.py --model FOLDER --requests 20 --tokens 32 --json FILE

Mixed requests (base, two adapters, contrasts, a shared prefix, more than the cache holds at once, so that some are
preempted and computed again) are answered by a Generator whose steps are the device's. Every row of logits is compared
with the reference's, teacher-forced, and every token with those that the stated tolerance leaves possible. Then the
launches of a decode step are counted in the compiled graph, and the bytes that it moves are priced for a 7B model from
shapes alone, after the same list was held to the small graph byte by byte. Nothing of it was run on an NPU.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any, Dict, List, Tuple

import numpy as np

os.environ.setdefault("GLOG_v", "3")  # MindSpore's own warnings are for its developers
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

#: The random model: Llama's parts, grouped heads, and enough width for the device's alignment.
TINY = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 512, "hidden_size": 128,
        "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": True}

#: The same with routed experts in the MLP's place, and one that every token has.
EXPERTS = {"model_type": "qwen2_moe", "architectures": ["Qwen2MoeForCausalLM"], "num_experts": 8,
           "num_experts_per_tok": 2, "moe_intermediate_size": 96, "shared_expert_intermediate_size": 128,
           "norm_topk_prob": True}


class Words:
    """A tokenizer for ids: text is numbers."""

    eos_token_id = 2

    def encode(self, text: str, add_special_tokens: bool = True) -> List[int]:
        """Ids of a text of numbers."""
        return [int(word) for word in text.split()]

    def decode(self, ids: List[int], skip_special_tokens: bool = True) -> str:
        """The numbers."""
        return " ".join(str(one) for one in ids)


def main() -> int:
    """Returns 1 where a decided token differs, a logit is off by more than the tolerance, or a weight is copied."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None, metavar="FOLDER", help="a model to load; none: a random one")
    parser.add_argument("--experts", action="store_true", help="the random model has routed experts")
    parser.add_argument("--dtype", default="", choices=("bfloat16", "float16"), help="none: one after the other")
    parser.add_argument("--block", type=int, default=16, choices=(16, 32, 64, 128), help="positions of a cache's block")
    parser.add_argument("--requests", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=32, help="of each answer")
    parser.add_argument("--rows", type=int, default=8, help="side by side")
    parser.add_argument("--blocks", type=int, default=0, help="of the cache; 0: too few for all rows: some wait")
    parser.add_argument("--json", default=None, metavar="FILE", help="write the measures there")
    arguments = parser.parse_args()
    os.environ.update(COLORA_KERNELS="rehearsal", COLORA_ASCEND_BLOCK=str(arguments.block))
    import mindspore as ms

    ms.set_device("CPU")
    measures: Dict[str, float] = {}
    right = True
    for dtype in (arguments.dtype,) if arguments.dtype else ("float16", "bfloat16"):
        os.environ["COLORA_ASCEND_DTYPE"] = dtype
        right &= _compare(arguments, dtype, measures)
    right &= _count(measures)
    for name, value in measures.items():
        print(f"{name:32} {value:.6g}")
    if arguments.json:
        text = json.dumps({"measures": [{"name": name, "value": value} for name, value in measures.items()]}, indent=1)
        Path(arguments.json).write_text(text + "\n", encoding="utf-8")
    return 0 if right else 1


def random_decoder(layers: int, **other: Any) -> Any:
    """A random model of this many layers."""
    from colora_ms.models.config import DecoderConfig
    from colora_ms.models.decoder import Decoder

    return Decoder(DecoderConfig.from_hf({**TINY, "num_hidden_layers": layers, **other}))


def with_adapters(decoder: Any) -> Any:
    """Two adapters on all linears but routed experts and what chooses them, of ranks 8 and 4; the handle."""
    from colora_ms.adapters import LoraConfig, inject

    targets = r".*(self_attn|mlp|shared_expert)\.[a-z]+_proj" if decoder.config.experts else "all-linear"

    def config(rank: int) -> LoraConfig:
        return LoraConfig(r=rank, lora_alpha=rank / 4, target_modules=targets, init_lora_weights=False)

    handle = inject(decoder, config(8), "one", slots=2, seed=1)
    handle.add_adapter("two", config(4))
    return handle


def _compare(arguments: argparse.Namespace, dtype: str, measures: Dict[str, float]) -> bool:
    """The rehearsal itself, in one compute type."""
    from colora_ms.decoding import Contrast, Generator, core
    from colora_ms.models import load_model
    from colora_ms.models.device_form import cache_form
    from rehearsal_case import ROUNDINGS, mixed_requests, rehearse

    more = EXPERTS if arguments.experts else {}
    decoder, tokenizer = (random_decoder(2, **more), Words()) if arguments.model is None else load_model(
        arguments.model, max_positions=256)
    handle = with_adapters(decoder)
    form = cache_form(decoder)
    longest = -(-(40 + arguments.tokens) // form.block)  # blocks of a row
    blocks = arguments.blocks or max(2 * longest + 1, arguments.rows * longest // 2)
    core.AHEAD = 1  # no room is kept for those that run, so that some must wait in their middle
    generator = Generator(decoder, tokenizer, handle, max_rows=arguments.rows,
                          cache_bytes=blocks * form.block_bytes(decoder.config))
    requests = mixed_requests(arguments.requests, decoder.config.vocab_size, 40,
                              [Contrast(0.1, 0.5), Contrast(0.1, 1.0)], ["one", "two"])
    start = time.monotonic()
    found = rehearse(generator, requests, arguments.tokens, dtype)
    counts, graph = generator._core.counts, generator._core.graph  # type: ignore[union-attr]  # it has generated
    share = found.equal / max(1, found.decided)
    print(f"{dtype}: {found.logits} rows of logits: the largest error is {found.off:.1f} roundings of the row's "
          f"largest logit (tolerance {ROUNDINGS:g})")
    print(f"{found.steps} tokens: the tolerance decides {found.decided}, {found.equal} of these were made; it leaves "
          f"{found.steps - found.decided} open, {found.possible} of all were possible")
    if found.unsettled:
        print(f"{found.unsettled} rows of logits were left out: which experts computed them hangs on a rounding")
    print(f"{counts['preemptions']} preemptions, {counts['cached_tokens']} tokens found in the cache, "
          f"{counts['copied_blocks']} blocks copied, {graph.compilations()} graphs compiled, "
          f"{time.monotonic() - start:.0f} s")
    measures["rehearsal_equal"] = min(share, measures.get("rehearsal_equal", 1.0))
    measures.update({f"rehearsal_decided_{dtype}": found.decided / found.steps,
                     f"rehearsal_error_roundings_{dtype}": found.off,
                     f"rehearsal_preemptions_{dtype}": counts["preemptions"]})
    return share == 1.0 and found.possible == found.steps and found.off <= ROUNDINGS


def decode_graph(layers: int) -> Tuple[Any, Any]:
    """(:class:`colora_ms.kernels.launches.Launches`, ``step_bytes.Size``) of a decode step of the random model with
    adapters on all linears."""
    from colora_ms.decoding import Generator
    from colora_ms.kernels.launches import launches_of
    from rehearsal_case import watched
    from step_bytes import Size

    decoder = random_decoder(layers)
    generator = Generator(decoder, Words(), with_adapters(decoder), max_rows=4)
    again = []
    for _ in range(2):
        with watched() as rows:
            generator.generate([[5, 6, 7]] * 3, adapter=["one", "two", None], max_new_tokens=2, ignore_eos=True)
        again.append(np.stack([row.logits for row in rows]))
    if not np.array_equal(*again):
        raise AssertionError("equal calls gave other logits")
    graph = generator._core.graph  # type: ignore[union-attr]  # it has generated
    (key, cell), = [one for one in graph.device.steps.items() if one[0][:2] == ("increment", True)]
    tokens, _, _, _, tables, _, _, read, *choice = key[2]
    config, cache = decoder.config, graph.cache
    pair = decoder.model.layers[0].self_attn.q_proj.down.shape
    return launches_of(cell), Size(
        config.hidden_size, config.intermediate_size, layers, config.num_attention_heads, config.num_key_value_heads,
        cache.keys[0].shape[3], config.vocab_size, decoder.max_positions, tokens[0], read[0], tables[1], 0,
        cache.blocks, cache.block, pair[0], pair[1], 0, *(choice[0] if choice else ()))


def _count(measures: Dict[str, float]) -> bool:
    """Launches and bytes of a decode step."""
    from step_bytes import SEVEN_B, difference, over_minimum

    (two, size), (one, _) = decode_graph(2), decode_graph(1)
    layer = len(two.launches) - len(one.launches)
    measures.update(launches_per_layer=layer, launches_outside_layers=len(two.launches) - 2 * layer,
                    copied_bytes_step=two.copied_bytes())
    print("a layer launches", ", ".join(f"{count} {name}" for name, count in (two.by_name() - one.by_name()).items()))
    outside = one.by_name() - (two.by_name() - one.by_name())
    print("outside of layers", ", ".join(f"{count} {name}" for name, count in outside.items()))
    for refused in two.views_refused:
        print("refused on the device:", refused)
    different = difference(size, two.launches)
    print(f"the list of launches is {'the graph, byte by byte' if not different else different}")
    cases = [SEVEN_B._replace(used=used) for used in (1, 4, 8)]
    cases.append(SEVEN_B._replace(rows=1, asked=1, used=1, requests=1))
    ratios = [over_minimum(one) for one in cases]
    for one, ratio in zip(cases, ratios):
        print(f"7B shape, {one.rows} rows of {one.length} positions, {one.used} adapters in use: {ratio:.4f} of the "
              "least bytes")
    measures["bytes_over_minimum_step"] = max(ratios)
    return not different and not two.views_refused and two.copied_bytes() == 0


if __name__ == "__main__":
    sys.exit(main())
