"""llama.cpp runs what is written here: merged models, LoRA files, tokenizers (needs .venv-peers' llama-cpp-python)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))
sys.path.insert(0, str(ROOT / "tests" / "unit"))


@pytest.fixture(scope="module")
def llama_cpp():
    """The Python that has llama_cpp; COLORA_PEERS_PYTHON names another than .venv-peers'."""
    python = Path(os.environ.get("COLORA_PEERS_PYTHON", ROOT / ".venv-peers" / "bin" / "python"))
    if not python.is_file() or subprocess.run([python, "-c", "import llama_cpp"], capture_output=True,
                                              check=False).returncode:
        pytest.skip("llama-cpp-python is not in .venv-peers (bash scripts/setup_peers.sh)")
    return python


def ask(python, **job):
    from check_llama_cpp import ask as asked

    return asked(python, {"lora": None, "prompts": [], "texts": [], "tokens": 1, "logits": True, **job})


@pytest.mark.parametrize("name", ["llama", "llama_bias", "llama_linear", "llama_yarn", "qwen2", "qwen3"])
def test_logits_of_the_tiny_models(name, llama_cpp, goldens, tmp_path):
    """llama.cpp's logits of written files are those of transformers: rotary factors, biases, q/k norms, row order."""
    from colora_ms.models.checkpoint import open_checkpoint
    from colora_ms.models.gguf_writer import write_gguf

    source = open_checkpoint(goldens / "tiny" / name)
    write_gguf(tmp_path / "m.gguf", source.config, source.tensors)
    stored = np.load(goldens / "tiny" / name / "logits.npz")
    prompts = [[int(one) for one in row[:position + 1]] for row in stored["ids"] for position in stored["positions"]]
    got = np.array(ask(llama_cpp, model=str(tmp_path / "m.gguf"), prompts=prompts)["logits"])
    want = stored["logits"].reshape(got.shape)
    assert np.abs(got - want).max() < 1e-5 * np.ptp(want)


@pytest.mark.parametrize("name", ["llama", "llama_bias", "qwen2", "qwen3"])
def test_logits_with_a_lora_file(name, llama_cpp, mindspore, goldens, tmp_path):
    from colora_ms.adapters import load_adapter
    from colora_ms.adapters.gguf_convert import convert_adapter
    from colora_ms.models.checkpoint import open_checkpoint
    from colora_ms.models.gguf_writer import write_gguf
    from test_gguf_lora import ALL, adapter, decoder, logits

    source = open_checkpoint(goldens / "tiny" / name)
    write_gguf(tmp_path / "m.gguf", source.config, source.tensors)
    ends = [] if source.config.tie_word_embeddings else ["embed_tokens", "lm_head"]
    adapter(tmp_path / "a", name, target_modules=[*ALL, *ends], rank_pattern={"up_proj": 2},
            alpha_pattern={"down_proj": 3.0}, use_rslora=True)
    convert_adapter(tmp_path / "a", tmp_path / "lora.gguf")
    net = decoder(name)
    want = logits(net, load_adapter(net, tmp_path / "a"))[0, -1]
    got = ask(llama_cpp, model=str(tmp_path / "m.gguf"), lora=str(tmp_path / "lora.gguf"),
              prompts=[[1, 5, 9, 40, 77, 3, 8, 2]])["logits"][0]
    assert np.abs(np.array(got) - want).max() < 1e-4 * np.ptp(want)


@pytest.mark.parametrize("kind", ["sentencepiece", "smollm", "gpt-2", "qwen2", "llama-bpe"])
def test_ids_of_texts(kind, llama_cpp, tmp_path):
    """llama.cpp cuts texts as the tokenizer does that was written."""
    from colora_ms.models.gguf_tokenizer import PROBES
    from colora_ms.models.gguf_writer import write_gguf
    from test_gguf_writer import TOKENIZERS, model_for

    tokenizer = TOKENIZERS[kind]()
    config, tensors = model_for(tokenizer)
    write_gguf(tmp_path / "m.gguf", config, tensors, tokenizer)
    texts = [text for text in (*PROBES, "the and<|im_end|> the", "1212 the's", "<think> the\n\n", "<s>the") if text
             and "\u0301" not in text]
    got = ask(llama_cpp, model=str(tmp_path / "m.gguf"), texts=texts)["ids"]
    assert got == [tokenizer.encode(text) for text in texts]


def test_greedy_answers(llama_cpp, mindspore, shared):
    """The merged GGUF, and the LoRA file on the base, answer as the unmerged model does here."""
    from check_llama_cpp import compare

    counts = compare(str(shared / "data" / "stories260k"), None, 24, llama_cpp, 0.15)
    assert json.loads(json.dumps(counts)) == {
        "prompts cut into the same ids": [10, 10], "merged GGUF: same greedy answers": [10, 10],
        "LoRA GGUF on the base: same greedy answers": [10, 10],
        "base without the adapter: same (should be few)": [0, 10]}
