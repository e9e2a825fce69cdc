"""The table of operations: nothing happens at import, one column is bound, a later change is refused, Ascend starts."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from colora_ms.kernels import KernelError, registry

ROOT = Path(__file__).resolve().parents[2]


def run(code, **env):
    """Run Python code in a process of its own and return what it printed."""
    clean = {k: v for k, v in os.environ.items()
             if k not in ("COLORA_KERNELS", "COLORA_NUM_THREADS", "OMP_NUM_THREADS")}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300,
                          env={**clean, "GLOG_v": "3", **env})
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip()


IMPORT_ALL = """
import importlib, os, pkgutil, sys
before = dict(os.environ)
import mindspore as ms
started = dict(os.environ)
import colora_ms
skipped = ("colora_ms.__main__", "colora_ms.integrations.mindformers")
for module in pkgutil.walk_packages(colora_ms.__path__, "colora_ms."):
    if not module.name.startswith(skipped):
        importlib.import_module(module.name)
"""


def test_importing_everything_chooses_compiles_and_writes_nothing():
    run(IMPORT_ALL + """
from colora_ms.kernels import bound, registry
assert registry._BOUND is None and not [name for name in vars(bound) if not name.startswith("_") and name != "Any"]
assert dict(os.environ) == started, set(os.environ.items()) ^ set(started.items())
""", OMP_NUM_THREADS="3", COLORA_KERNELS="nonsense")


def test_every_operation_has_a_form_for_every_device_or_is_a_part_of_one():
    parts = ("_operator", "_operators", "_grad", "_plain", "_packed")
    for name, columns in registry.table():
        if name.startswith("device_"):
            assert columns == ("emulator", "ascend"), name
        elif name.startswith("builtin_"):
            assert columns == ("rehearsal", "ascend"), name
        elif name.startswith("rehearsal_"):
            assert columns == ("rehearsal",), name
        elif "reference" not in columns:
            assert columns == ("cpu",), name
            assert name.endswith(parts) or name == "step", name


def test_a_later_change_of_the_device_is_refused_with_a_sentence(monkeypatch):
    registry.bind()
    other = "reference" if registry.backend() == "cpu" else "cpu"
    monkeypatch.setenv("COLORA_KERNELS", "emulator" if other == "cpu" else other)
    with pytest.raises(KernelError, match="bound to .* when the first Cell was constructed, now .* is asked for"):
        registry.bind()
    assert registry.backend() != other


@pytest.mark.parametrize("wanted, words", [("gpu", "COLORA_KERNELS='gpu' is not known"), ("cpu", "does not exist")])
def test_a_wrong_choice_is_said_when_a_cell_is_constructed(wanted, words):
    out = run("""
import mindspore as ms, numpy as np
from colora_ms.kernels import KernelError
from colora_ms.models.layers import RMSNorm
try:
    RMSNorm(ms.Parameter(ms.Tensor(np.ones(4, np.float32))), 1e-6)
except KernelError as error:
    print(error)
""", COLORA_KERNELS=wanted, COLORA_CPU_LIBRARY=str(ROOT / "no" / "such.so"))
    assert words in out


def test_an_unknown_column_and_a_doubled_row_are_refused():
    with pytest.raises(KernelError, match="'gpu' is none of"):
        registry.operation("new", gpu=lambda: None)
    with pytest.raises(KernelError, match="in the table already"):
        registry.operation("rms_norm", reference=lambda: None)


ON_ASCEND = """
import sys, types
import mindspore as ms
real = ms.get_context
ms.get_context = lambda name: "Ascend" if name == "device_target" else real(name)
""" + IMPORT_ALL + """
import numpy as np
from colora_ms.adapters import LoraConfig, inject
from colora_ms.decoding import Generator
from colora_ms.decoding.step import StepGraph
from colora_ms.evaluation.decoder_scorer import DecoderScorer
from colora_ms.kernels import backend, bound, fuses_step
from colora_ms.models.paged_cache import PagedCache
from colora_ms.models.config import DecoderConfig
from colora_ms.models.decoder import Decoder
from colora_ms.training.config import OptimizerConfig
from colora_ms.training.step import Stepper
config = DecoderConfig(model_type="qwen3", qk_norm=True, vocab_size=97, hidden_size=32, intermediate_size=48,
                       num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
                       max_position_embeddings=128, eos_token_ids=(2,))
for weight_format in ("float32", "bfloat16", "int8", "int4"):
    decoder = Decoder(config, None, weight_format=weight_format)
    handle = inject(decoder, LoraConfig(r=4, target_modules="all-linear"), adapter_name="a")
    StepGraph(decoder, PagedCache(config, 8), 16, 2, 2, 4)
    DecoderScorer(decoder)
Stepper(decoder, OptimizerConfig())
assert backend() == "ascend" and not fuses_step() and "aclnn" in str(bound.device_multi_lora.__dict__)
print("constructed")
"""


def test_everything_imports_and_is_constructed_with_the_target_faked_as_ascend(tmp_path):
    header = tmp_path / "op_api" / "include" / "aclnn_multi_lora.h"
    header.parent.mkdir(parents=True)
    header.write_text("")
    assert run(ON_ASCEND, ASCEND_CUSTOM_OPP_PATH=str(tmp_path)).endswith("constructed")
