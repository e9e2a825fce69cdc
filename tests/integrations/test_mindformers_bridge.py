"""Weight names, LoRA files, pet types and CoLD on mindformers' own models, against its functions and this package's
decoder."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from colora_ms.adapters import LoraConfig, inject, load_adapter
from colora_ms.errors import AdapterError, CheckpointError, DecodingError
from colora_ms.integrations.mindformers.names import LAYOUTS, layout_of, row_order, to_huggingface, to_mindformers

IDS = np.random.default_rng(0).integers(3, 97, (2, 16)).astype(np.int32)


def decoder_config(model_type="llama", **changes):
    from colora_ms.models.config import DecoderConfig

    sizes = dict(model_type=model_type, vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                 num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=128,
                 rms_norm_eps=1e-5, eos_token_ids=(2,), attention_bias=model_type == "qwen2",
                 qk_norm=model_type == "qwen3")
    return DecoderConfig(**{**sizes, **changes})


def weights_of(config):
    random = np.random.default_rng(5)
    return {name: (random.standard_normal(shape) * 0.3).astype(np.float32)
            for name, shape in config.parameter_shapes().items()}


def our_logits(decoder, slots=-1):
    """(2, 16, 97) of this package's decoder; slots: the adapter of all rows."""
    from mindspore import Tensor

    return decoder(Tensor(IDS), Tensor(np.full(2, 16, np.int32)), Tensor(np.full(2, slots, np.int32))).asnumpy()


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_names_go_round(mindspore, model_type, layout):
    """Every tensor of every family goes to every layout and back, bit for bit."""
    if model_type == "qwen3" and layout.startswith("legacy"):
        pytest.skip("mindformers has no legacy Qwen3")
    config = decoder_config(model_type)
    weights = weights_of(config)
    theirs = to_mindformers(weights, config, layout)
    back = to_huggingface(theirs, config, layout)
    assert back.keys() == weights.keys() and all(np.array_equal(back[name], weights[name]) for name in weights)
    if layout != "mcore-joined":
        assert layout_of(theirs) == LAYOUTS[layout]


def test_row_orders_are_mindformers_own(mindformers):
    """The permutations against qkv_concat_hf2mg, ffn_concat_hf2mg and the converters of mcore."""
    from mindformers.checkpoint.converter.convert_op import ConcatConvertOp
    from mindformers.utils.convert_utils import ffn_concat_hf2mg, qkv_concat_hf2mg

    config = decoder_config()
    qkv, mlp = np.random.default_rng(1).standard_normal((64, 32)), np.random.default_rng(2).standard_normal((96, 32))
    assert np.array_equal(qkv_concat_hf2mg(qkv, 4, 2, 32), qkv[row_order(config, "qkv", "grouped")])
    assert np.array_equal(ffn_concat_hf2mg(mlp, 48), mlp[row_order(config, "mlp", "grouped")])
    converter = ConcatConvertOp(hf_names=["a", "b"], mf_names=["c"], dim=0)
    assert np.array_equal(converter._hf_to_mf([mlp[:48], mlp[48:]])[0], mlp[row_order(config, "mlp", "grouped")])


def test_names_are_mindformers_own(mindformers):
    from mindformers.models.llama import LlamaForCausalLM
    from mindformers.models.qwen2.utils import Qwen2PreTrainedModel
    from mindformers.models.qwen3.utils import Qwen3PreTrainedModel

    config = decoder_config()
    ours = [next(iter(to_mindformers({name: value}, config, "legacy"))) for name, value in weights_of(config).items()]
    assert ours == [LlamaForCausalLM.convert_name(name) for name in weights_of(config)]
    for model_type, cls in (("qwen2", Qwen2PreTrainedModel), ("qwen3", Qwen3PreTrainedModel)):
        config = decoder_config(model_type)
        for name, value in weights_of(config).items():
            theirs = name
            for old, new in cls.weight_mapping:
                theirs = theirs.replace(old, new)
            assert list(to_mindformers({name: value}, config, "mcore-separate")) == [theirs]


def test_name_refusals(mindspore):
    config = decoder_config()
    with pytest.raises(CheckpointError, match="model.strange.weight has no name"):
        to_mindformers({"model.strange.weight": np.zeros(1)}, config, "legacy")
    with pytest.raises(CheckpointError, match="lacks self_attn.k_proj, self_attn.v_proj"):
        to_mindformers({"model.layers.0.self_attn.q_proj.weight": np.zeros((32, 32))}, config, "mcore")
    with pytest.raises(CheckpointError, match="the names of a mindformers decoder"):
        layout_of(["a.weight"])


@pytest.mark.parametrize("qkv_concat", [False, True])
def test_llama_gives_the_logits_of_our_decoder(tiny_llama, tmp_path, qkv_concat):
    """mindformers' Llama, its weights renamed, and an adapter trained there and saved: equal logits in both
    frameworks."""
    from mindspore import Tensor

    from colora_ms.integrations.mindformers.lora_files import from_peft, to_peft
    from colora_ms.models.decoder import Decoder

    net = tiny_llama(qkv_concat=qkv_concat)
    net.set_train(False)
    config = decoder_config()
    theirs = {p.name: p.asnumpy() for p in net.get_parameters()}
    decoder = Decoder(config, to_huggingface(theirs, config))
    expected = net(Tensor(IDS))[0].asnumpy()
    assert np.abs(our_logits(decoder) - expected).max() < 2e-4
    targets = ["w_qkv", "w_gate_hidden", "w2"] if qkv_concat else ["wq", "wv", "w1", "wo"]
    handle = inject(net, LoraConfig(r=2, lora_alpha=6, target_modules=targets, init_lora_weights=False))
    pairs = {path: handle.sites[path, "lora"] for path in handle.matched().targets}
    for naming in ("mcore", "mindpet", "slora"):
        tensors = {}
        for path, cell in pairs.items():
            down, up = cell.down.asnumpy()[0], cell.up.asnumpy()[0]
            tensors.update({"mcore": {f"{path}.lora_A.weight": down, f"{path}.lora_B.weight": up},
                            "mindpet": {f"{path}.mindpet_delta_lora_a": down, f"{path}.mindpet_delta_lora_b": up},
                            "slora": {f"{path}.lora_a": np.stack([0 * down, down]),
                                      f"{path}.lora_b": np.stack([0 * up.T, 3 * up.T])}}[naming])
        to_peft({**theirs, **tensors}, tmp_path / naming, config, None if naming == "slora" else 6, adapter=1)
        other = Decoder(config, to_huggingface(theirs, config))
        load_adapter(other, tmp_path / naming)
        adapted = net(Tensor(IDS))[0].asnumpy()
        assert np.abs(our_logits(other, 0) - adapted).max() < 1e-3 < np.abs(adapted - expected).max()
    tensors, settings = from_peft(tmp_path / "mcore", config, layout_of(theirs))
    for path, cell in pairs.items():
        product = tensors[path + ".mindpet_delta_lora_b"] @ tensors[path + ".mindpet_delta_lora_a"]
        found = settings["lora_alpha"] / settings["lora_rank"] * product
        assert np.abs(found - cell.delta(0)).max() < 1e-5


def test_lora_file_refusals(mindspore, tmp_path):
    from colora_ms.integrations.mindformers.lora_files import read_pairs, to_peft

    down, up = np.zeros((2, 32), np.float32), np.zeros((32, 2), np.float32)
    with pytest.raises(AdapterError, match="no LoRA tensors"):
        read_pairs({"a.weight": down})
    with pytest.raises(AdapterError, match="a has down alone"):
        read_pairs({"a.lora_A.weight": down})
    with pytest.raises(AdapterError, match="named in 2 ways"):
        read_pairs({"a.lora_A.weight": down, "a.lora_B.weight": up, "b.mindpet_delta_lora_a": down,
                    "b.mindpet_delta_lora_b": up})
    pair = {"model.layers.0.attention.wo.lora_A.weight": down, "model.layers.0.attention.wo.lora_B.weight": up}
    with pytest.raises(AdapterError, match="give alpha"):
        to_peft(pair, tmp_path / "x", decoder_config())


def test_contrast_in_mindformers_generation(tiny_llama):
    """net.generate with the processor gives the tokens of a NumPy loop; process_ms and process_np agree."""
    from mindformers.generation import LogitsProcessorList
    from mindspore import Tensor, ops

    from colora_ms.decoding import Contrast, contrastive_scores
    from colora_ms.integrations.mindformers.contrast import BaseLogits, ContrastProcessor

    net = tiny_llama()
    net.argmax = ops.argmax  # mint.argmax has no CPU operator
    handle = inject(net, LoraConfig(r=2, lora_alpha=8, target_modules=["wq", "w1"], init_lora_weights=False))
    prompts = [[5, 6, 7, 8], [9, 10, 11, 12]]
    contrast = Contrast(alpha=0.05, beta=2.0)
    processor = ContrastProcessor(BaseLogits(net, handle, 0), contrast)
    processors = LogitsProcessorList()
    processors.append(processor)
    got = net.generate(prompts, max_new_tokens=5, do_sample=False, logits_processor=processors)
    plain = net.generate(prompts, max_new_tokens=5, do_sample=False)
    net.set_train(False)
    rows = np.zeros((2, 16), np.int32)
    rows[:, :4] = prompts
    done = [False, False]
    for length in range(4, 9):
        expert = net(Tensor(rows))[0].asnumpy()[:, length - 1]
        with handle.disable_adapter():
            amateur = net(Tensor(rows))[0].asnumpy()[:, length - 1]
        scores = contrastive_scores(expert, amateur, contrast.alpha, contrast.beta)
        one, two = processor.process_ms(Tensor(expert), Tensor(rows)).asnumpy(), processor.process_np(expert, rows)
        finite = np.isfinite(scores)
        assert np.abs(one[finite] - scores[finite]).max() < 1e-4
        assert np.array_equal(np.isfinite(one), np.isfinite(scores)) and np.array_equal(two, scores)
        for row in range(2):
            if not done[row]:
                rows[row, length] = scores[row].argmax()
                done[row] = rows[row, length] == 2
    for row in range(2):
        assert np.array_equal(got[row], rows[row, :len(got[row])])
    assert any(not np.array_equal(a, b) for a, b in zip(got, plain)), "the contrast changed nothing"
    with pytest.raises(DecodingError, match="no token but the padding"):
        processor.process_np(expert, np.zeros((2, 16), np.int32))


def test_pet_config_refusals(mindformers):
    from colora_ms.integrations.mindformers.pet import adapter_config

    assert adapter_config({"pet_type": "colora_lora", "lora_rank": 4, "lora_alpha": 8, "target_modules": ".*wq",
                           "param_init_type": "float16"}).r == 4
    with pytest.raises(AdapterError, match="pet_type 'colora_lara' is not one of"):
        adapter_config({"pet_type": "colora_lara"})
    with pytest.raises(AdapterError, match="lora_alhpa=8. Did you mean 'lora_alpha'"):
        adapter_config({"pet_type": "colora_lora", "lora_alhpa": 8})


@pytest.mark.parametrize("pet_type", ["colora_lora", pytest.param("colora_lily", marks=pytest.mark.slow)])
def test_trainer_trains_a_pet_type(mindformers, tmp_path, pet_type):
    """mindformers' own Trainer from a YAML: the loss falls, only the adapter changes, only it has optimizer state.

    mindformers draws the base anew in every run, so the passes over the rows are many: the loss falls by 0.08 to 0.16.
    """
    script = Path(__file__).with_name("mindformers_train.py")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "LOCAL_DEFAULT_PATH": str(tmp_path)}
    done = subprocess.run([sys.executable, str(script), pet_type], cwd=tmp_path, env=environment, capture_output=True,
                          text=True, timeout=280, check=False)
    line = [one for one in done.stdout.splitlines() if one.startswith("RESULT ")]
    assert line, (done.stdout + done.stderr)[-3000:]
    result = json.loads(line[0][7:])
    assert result["targets"] == 8 and len(result["losses"]) == 160
    assert np.mean(result["losses"][-4:]) < np.mean(result["losses"][:4]) - 0.02
    assert result["changed"] == result["trained"]
    state = {name.split(".", 1)[1] for name in result["state"] if name.startswith(("adam_m.", "adam_v.", "exp_avg"))}
    assert state == set(result["trained"])
