"""The families against transformers and PEFT: tiny models that can fail, see ``tests/goldens/make_family_goldens.py``.

Each is written as the folder that transformers writes, opened, run as whole passes of the Cells (the form for training)
and token by token through the fused step over the paged cache.
"""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

GOLDENS = Path(__file__).resolve().parents[1] / "goldens"
sys.path.insert(0, str(GOLDENS))
from family_rules import tensor  # noqa: E402

#: Linears that families fuse, and the parts that they are here.
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
CASES = sorted(path.stem for path in (GOLDENS / "families").glob("*.npz"))


class Golden:
    """One case: ``about`` (config, shapes, lora, targets, prompt), ids, logits, lora_logits."""

    def __init__(self, case):
        with np.load(GOLDENS / "families" / f"{case}.npz") as file:
            self.about = json.loads(str(file["about"]))
            self.ids, self.logits, self.lora_logits = file["ids"], file["logits"], file["lora_logits"]
        self.raised = case.startswith("gemma")
        self.prompt = self.about["prompt"]

    def write(self, folder, change=None, drop=()):
        """The model's folder."""
        from safetensors.numpy import save_file

        folder.mkdir(parents=True)
        values = {**self.about["config"], **(change or {})}
        (folder / "config.json").write_text(json.dumps({k: v for k, v in values.items() if k not in drop}))
        save_file({name: tensor(name, tuple(shape), self.raised) for name, shape in self.about["shapes"].items()},
                  folder / "model.safetensors")
        return folder

    def write_adapter(self, folder):
        """PEFT's folder."""
        from safetensors.numpy import save_file

        folder.mkdir(parents=True)
        (folder / "adapter_config.json").write_text(json.dumps(
            {"peft_type": "LORA", "r": 3, "lora_alpha": 5, "target_modules": self.about["targets"]}))
        save_file({name: tensor(name, tuple(shape)) for name, shape in self.about["lora"].items()},
                  folder / "adapter_model.safetensors")
        return folder


def opened(folder, **options):
    from colora_ms.models import build_decoder
    from colora_ms.models.checkpoint import open_checkpoint

    options.setdefault("max_positions", 64)
    return build_decoder(open_checkpoint(folder), **options)


def logits_of(decoder, *rows):
    """Logits of rows (ids, slot), each of its own length."""
    from mindspore import Tensor

    from colora_ms import runtime

    ids = np.zeros((len(rows), max(len(one) for one, _ in rows)), np.int32)
    for row, (one, _) in enumerate(rows):
        ids[row, :len(one)] = one
    lengths = np.array([len(one) for one, _ in rows], np.int32)
    found = runtime.run(decoder.set_train(False), Tensor(ids), Tensor(lengths),
                        Tensor(np.array([slot for _, slot in rows], np.int32))).asnumpy()
    return [found[row, :len(one)] for row, (one, _) in enumerate(rows)]


def log_softmax(x):
    x = x.astype(np.float64) - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def adapted(golden, folder, case, **options):
    """(decoder, handle) of a case with its adapter."""
    from colora_ms.adapters import load_adapter

    decoder = opened(golden.write(folder / "model"), max_positions=40 if case == "phi3_short" else 64)
    return decoder, load_adapter(decoder, golden.write_adapter(folder / "adapter"), "lora", **options)


def agree(found, wanted, prompt, ids):
    """How many tokens of an answer had log-probabilities to compare: as long as it is the golden's."""
    count = 0
    while count < len(found.logprobs) and prompt + list(found.tokens[:count]) == ids[:len(prompt) + count]:
        at = wanted[len(prompt) + count - 1]
        assert len(found.logprobs[count].tops) == 20
        for token, logprob, _ in found.logprobs[count].tops:
            assert abs(logprob - at[token]) < 2e-4
        count += 1
    return count


@pytest.mark.parametrize("case", CASES)
def test_logits_and_answers_are_those_of_transformers(case, mindspore, tmp_path, word_tokenizer):
    """Whole passes, with PEFT's adapter in one of the rows; then token by token through the fused step over the paged
    cache, from prompts of several lengths and cut in pieces, with the log-probabilities of 20 tokens at each."""
    from colora_ms.decoding import Generator

    golden = Golden(case)
    decoder, handle = adapted(golden, tmp_path, case)
    ids = golden.ids.tolist()
    plain, lora = logits_of(decoder, (ids, -1), (ids[:golden.prompt], handle.slot("lora")))
    np.testing.assert_allclose(plain, golden.logits, atol=2e-4, rtol=0)
    np.testing.assert_allclose(lora, golden.lora_logits, atol=2e-4, rtol=0)
    assert decoder.fused_step
    generator = Generator(decoder, word_tokenizer, handle, max_rows=4, chunk=3)
    count = len(ids) - golden.prompt
    prompts = [ids[:golden.prompt], ids[:3], ids[:9], ids[:golden.prompt]]
    answers = generator.generate(prompts, adapter=[None, None, None, "lora"], max_new_tokens=count, logprobs=20)
    assert agree(answers[0], log_softmax(golden.logits), prompts[0], ids) == len(answers[0].tokens)
    assert agree(answers[1], log_softmax(golden.logits), prompts[1], ids) > 0
    assert agree(answers[2], log_softmax(golden.logits), prompts[2], ids) > 0
    assert agree(answers[3], log_softmax(golden.lora_logits), prompts[3], ids[:golden.prompt]) == 1


@pytest.mark.parametrize("case", CASES)
def test_goldens_can_fail(case):
    """Every mistake that the maker tried moves the logits far beyond what the tests allow."""
    moves = Golden(case).about["moves"]
    assert moves and all(moved > 1e-3 for _, moved in moves), moves


@pytest.mark.parametrize("case", [case for case in CASES if case not in ("phi3_short", "qwen2_moe")])
def test_the_loss_and_its_gradients_are_those_of_peft(case, mindspore, tmp_path):
    """Of every lora_A and lora_B."""
    from mindspore import Tensor, value_and_grad

    from colora_ms.training.step import CausalLossCell

    golden = Golden(case)
    decoder, handle = adapted(golden, tmp_path, case, trainable=True)
    ids = golden.ids[:golden.prompt]
    labels = np.append(ids[1:], -100).astype(np.int32)
    cell, parameters = CausalLossCell(decoder), handle.trainable_params()
    lengths, slots = np.array([len(ids)], np.int32), np.zeros(1, np.int32)
    arguments = [Tensor(one) for one in (ids[None], labels[None], lengths, slots)]
    (loss, count), slopes = value_and_grad(cell, None, parameters, has_aux=True)(*arguments)
    count = float(count.asnumpy())
    assert abs(float(loss.asnumpy()) / count - golden.about["loss"]) < 1e-4
    found = {parameter.name: slope.asnumpy() / count for parameter, slope in zip(parameters, slopes)}
    for key, wanted in golden.about["slopes"].items():
        module, half = key.removeprefix("base_model.model.").removesuffix(".weight").rsplit(".", 1)
        above, last = module.rsplit(".", 1)
        parts = [found[f"{above}.{part}.{half}"][0] for part in FUSED.get(last, (last,))]  # of (slots, ...)
        # the parts of a fused linear have copies of its lora_A, and the rows of its lora_B
        own = sum(parts) if half == "lora_A" else np.concatenate(parts)
        probe = tensor(f"probe.{key}", tuple(golden.about["lora"][key]))
        assert abs(float((own * probe).sum()) - wanted) < 2e-4 + 2e-3 * abs(wanted), key


@pytest.mark.parametrize("name", CASES)
def test_a_gguf_is_the_folder(name, mindspore, tmp_path):
    """One random model both ways: the same config and the same tensors, so the same logits."""
    pytest.importorskip("gguf")
    from colora_ms.models.checkpoint import open_checkpoint
    from family_gguf import write_family_gguf

    golden = Golden(name)
    folder = open_checkpoint(golden.write(tmp_path / "model"))
    file = open_checkpoint(write_family_gguf(tmp_path / "m.gguf", name, golden))
    assert set(file.tensors) == set(folder.tensors)
    for key in folder.tensors:
        np.testing.assert_allclose(file.tensors[key], folder.tensors[key], atol=1.2e-7, rtol=0, err_msg=key)
    one, other = vars(file.config), vars(folder.config)
    ends = ("bos_token_id", "eos_token_ids", "pad_token_id", "torch_dtype")
    differ = {field for field in one if one[field] != other[field] and field not in ends
              and not (isinstance(one[field], float) and abs(one[field] - other[field]) < 1e-5)}
    known = {"mistral": {"window", "sliding_layers", "model_type"}, "mixtral": {"window", "sliding_layers"},
             "smollm3": {"rotary_layers"}, "qwen2_moe_norm": {"normalised_experts"},
             # the head's size takes the scalar's place; the lists are float32 there
             "gemma2": {"query_scalar"}, "gemma3_text": {"query_scalar"}, "phi3_long": {"rope_scaling"},
             "phi3_short": {"rope_scaling"}}
    assert differ == known.get(name, set())
