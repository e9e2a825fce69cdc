"""mindformers' log files in a temporary folder, and tiny models of its own classes that a CPU can run."""

import os
import tempfile

import numpy as np
import pytest

# mindformers writes log files below the current folder unless this is set before it is imported.
os.environ.setdefault("LOCAL_DEFAULT_PATH", tempfile.mkdtemp(prefix="colora-mindformers-"))

#: What makes mindformers' legacy Llama run on a CPU: no fused norm, rotary embedding without BatchMatMul's broadcast.
ON_CPU = dict(use_flash_attention=False, fused_rms_norm=False, use_rope_slice=True)
FLOAT32 = dict(compute_dtype="float32", layernorm_compute_type="float32", softmax_compute_type="float32",
               rotary_dtype="float32", param_init_type="float32")
SIZES = dict(batch_size=2, seq_length=16, hidden_size=32, num_layers=2, num_heads=4, n_kv_heads=2, vocab_size=97,
             intermediate_size=48, use_past=False, pad_token_id=0, bos_token_id=1, eos_token_id=2)


@pytest.fixture(scope="session")
def mindformers(mindspore):
    return pytest.importorskip("mindformers", reason="mindformers is not installed")


@pytest.fixture(scope="session")
def tiny_llama(mindformers):
    """A function that builds mindformers' own LlamaForCausalLM in float32 with the same random weights each time."""
    from mindformers.models.llama import LlamaConfig, LlamaForCausalLM
    from mindspore import Tensor

    def build(**changes):
        net = LlamaForCausalLM(LlamaConfig(**{**SIZES, **FLOAT32, **ON_CPU, **changes}))
        for parameter in sorted(net.get_parameters(), key=lambda one: one.name):
            random = np.random.default_rng(len(parameter.name) + sum(parameter.name.encode()))
            value = random.standard_normal(parameter.shape) * 0.3 + ("norm" in parameter.name)
            parameter.set_data(Tensor(value.astype(np.float32)).astype(parameter.dtype))
        return net

    return build
