"""Writes tests/goldens/pickle: the adapter of tests/goldens/peft/qv_r8 as torch.save writes it, in float32 and
bfloat16.

    .venv-peers/bin/python tests/goldens/make_pickle.py
"""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

HERE = Path(__file__).resolve().parent

if __name__ == "__main__":
    source = HERE / "peft" / "qv_r8"
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        folder = HERE / "pickle" / name
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {key: value.to(dtype) for key, value in load_file(source / "adapter_model.safetensors").items()}
        torch.save(tensors, folder / "adapter_model.bin")
        save_file(tensors, folder / "expected.safetensors")
        (folder / "adapter_config.json").write_bytes((source / "adapter_config.json").read_bytes())
