"""Does llama.cpp answer from the files written here as the model does here? Greedy tokens and prompts' ids, counted.

    python scripts/check_llama_cpp.py [--model smollm2-135m --adapter FOLDER] [--json FILE]

For a model and a LoRA it writes, in float32: the merged GGUF, the base as GGUF, and the adapter as llama.cpp's LoRA
file. llama.cpp (llama-cpp-python in .venv-peers, see scripts/setup_peers.sh) cuts the prompts into ids itself and
continues them greedily, with the merged model and with the base and the LoRA. Without --adapter a random LoRA is
made, of a size that changes the answers. The exit code is 1 if a token differs.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from benchmark_common import ROOT, BenchmarkError

PROMPTS = (
    "Once upon a time, there was a little girl named", "One day, Tom and his dog went to the park.", "The sun was",
    "Lily found a big, red ball", "\"Can I help you?\" asked the", "The capital of France is", "1, 2, 3, 4,",
    "Mom said:\n", "def add(a, b):\n    return", "Das kleine Mädchen – naïve café",
)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m", help="known name, folder or GGUF file")
    parser.add_argument("--adapter", default=None, metavar="FOLDER", help="PEFT LoRA; none: a random one")
    parser.add_argument("--tokens", type=int, default=24, help="of each answer")
    parser.add_argument("--size", type=float, default=0.02, help="standard deviation of the random LoRA's down factors")
    parser.add_argument("--peers-python", type=Path, default=ROOT / ".venv-peers" / "bin" / "python", metavar="PYTHON")
    parser.add_argument("--json", default=None, metavar="FILE", help="write the counts")
    arguments = parser.parse_args()
    os.environ.setdefault("GLOG_v", "3")  # MindSpore's own warnings
    try:
        counts = compare(arguments.model, arguments.adapter, arguments.tokens, arguments.peers_python, arguments.size)
    except BenchmarkError as error:
        print(f"check_llama_cpp: {error}", file=sys.stderr)
        return 2
    for name, (equal, total) in counts.items():
        print(f"{name:44s} {equal} of {total} equal")
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(counts, indent=2) + "\n", encoding="utf-8")
    return int(any(equal < total for name, (equal, total) in counts.items() if not name.startswith("base")))


def compare(model, adapter, tokens, python, size=0.02):
    """{what was compared: (equal, total)}, the answers of the model with the adapter here being the measure.

    Raises:
        BenchmarkError: llama.cpp is not there, or fails.
    """
    from colora_ms.adapters.gguf_convert import convert_adapter
    from colora_ms.decoding import Generator
    from colora_ms.models.checkpoint import open_checkpoint, resolve_model
    from colora_ms.models.gguf_writer import write_gguf
    from colora_ms.recipes.merge_model import merge_model

    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        path = resolve_model(model)
        if adapter is None:
            adapter = random_adapter(path, folder / "adapter", size)
        generator = Generator.from_pretrained(path, adapters={"adapter": adapter})
        ids = [generator.tokenizer.encode(prompt) for prompt in PROMPTS]
        here, plain = ([list(one.tokens) for one in generator.generate(
            list(PROMPTS), adapter=name, max_new_tokens=tokens, ignore_eos=True)] for name in ("adapter", None))
        del generator
        report = merge_model(path, [adapter], folder / "merged.gguf")
        print(f"merged: logits differ by {report.share:.2g} of their range from the unmerged model's", flush=True)
        checkpoint = open_checkpoint(path)
        write_gguf(folder / "base.gguf", checkpoint.config, checkpoint.tensors, checkpoint.tokenizer_source)
        convert_adapter(adapter, folder / "lora.gguf", path)
        job = {"prompts": ids, "texts": list(PROMPTS), "tokens": tokens}
        merged = ask(python, {**job, "model": str(folder / "merged.gguf"), "lora": None})
        lora = ask(python, {**job, "model": str(folder / "base.gguf"), "lora": str(folder / "lora.gguf")})
    count = len(PROMPTS)

    def equal(one, other):
        return sum(a == b for a, b in zip(one, other)), count

    return {"prompts cut into the same ids": equal(merged["ids"], ids),
            "merged GGUF: same greedy answers": equal(merged["answers"], here),
            "LoRA GGUF on the base: same greedy answers": equal(lora["answers"], here),
            "base without the adapter: same (should be few)": equal(plain, here)}


def ask(python, job):
    """The answer of peers_llama_cpp.py to a job."""
    if not Path(python).is_file():
        raise BenchmarkError(f"{python} is not there; run bash scripts/setup_peers.sh, or give --peers-python")
    done = subprocess.run([str(python), str(ROOT / "scripts" / "peers_llama_cpp.py")], input=json.dumps(job), text=True,
                          capture_output=True, check=False)
    if done.returncode:
        raise BenchmarkError(f"llama.cpp failed with exit code {done.returncode}:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def random_adapter(model, folder, size):
    """A PEFT folder of a random LoRA on all linears of a model."""
    from colora_ms.adapters import LoraConfig
    from colora_ms.adapters.config_modules import modules_of_config
    from colora_ms.adapters.matching import match
    from colora_ms.adapters.peft_format import write_adapter
    from colora_ms.models.checkpoint import open_checkpoint

    config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", base_model_name_or_path=str(model))
    modules = modules_of_config(open_checkpoint(model).config)
    made, random = match(config, modules), np.random.default_rng(0)
    values = {}
    for path in made.targets:
        module = modules[path]
        values[path, "lora"] = {
            "down": np.float32(size) * random.standard_normal((8, module.in_features), np.float32),
            "up": np.float32(size) * random.standard_normal((module.out_features, 8), np.float32)}
    write_adapter(folder, config, made, modules, values)
    return folder


if __name__ == "__main__":
    sys.exit(main())
