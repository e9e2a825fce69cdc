"""A folder of random adapters for the tiny decoder, an engine over it, and an HTTP server over that."""

import http.client
import json
import urllib.parse

import numpy as np
import pytest
from safetensors.numpy import save_file

LINEARS = {"q_proj": (32, 32), "k_proj": (16, 32), "v_proj": (16, 32), "o_proj": (32, 32), "gate_proj": (48, 32),
           "up_proj": (48, 32), "down_proj": (32, 48)}


def adapter_tensors(seed, r=4, targets=tuple(LINEARS), layers=2, scale=0.3):
    """{PEFT key: float32 array} of a random adapter for the tiny decoder."""
    random = np.random.default_rng(seed)
    found = {}
    for layer in range(layers):
        for name in targets:
            out, inner = LINEARS[name]
            block = "self_attn" if name[0] in "qkvo" else "mlp"
            key = f"base_model.model.model.layers.{layer}.{block}.{name}"
            found[f"{key}.lora_A.weight"] = (random.standard_normal((r, inner)) * scale).astype(np.float32)
            found[f"{key}.lora_B.weight"] = (random.standard_normal((out, r)) * scale).astype(np.float32)
    return found


def adapter_config(r=4, targets=tuple(LINEARS), **changes):
    """adapter_config.json as PEFT writes it."""
    return {"peft_type": "LORA", "r": r, "lora_alpha": 8, "target_modules": list(targets), "bias": "none", **changes}


def write_adapter(folder, seed, r=4, targets=tuple(LINEARS), tensors=None, **changes):
    """A PEFT folder with random values, or the given tensors."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(adapter_config(r, targets, **changes)))
    save_file(adapter_tensors(seed, r, targets) if tensors is None else tensors,
              str(folder / "adapter_model.safetensors"))
    return folder


def unfused(graph):
    """Make a ``StepGraph`` take the way through the Cells, which devices without the operator take."""
    graph.fused = False
    graph._make()


@pytest.fixture(scope="session")
def adapter_folder(tmp_path_factory):
    """Adapters "a0" to "a5" of ranks 1 to 6, on all linears or on two of them, some with rsLoRA's scale."""
    root = tmp_path_factory.mktemp("adapters")
    for i in range(6):
        targets = tuple(LINEARS) if i % 2 == 0 else ("q_proj", "down_proj")
        write_adapter(root / f"a{i}", seed=i, r=i + 1, targets=targets, use_rslora=i % 3 == 0)
    return root


@pytest.fixture(scope="session")
def engine(tiny_decoder, word_tokenizer, adapter_folder):
    """An engine with 4 rows and 3 slots for the six adapters; the tests share it, and its compiled graphs."""
    from colora_ms.serving import AdapterBank, Engine

    decoder = tiny_decoder()
    bank = AdapterBank(decoder, adapter_folder, max_loaded=3, max_rank=6)
    with Engine(decoder, word_tokenizer, bank, rows=4, max_length=96, chunk=4, queue=64, prompt_chunk=24) as engine:
        yield engine


class ChatWords:
    """The stand-in tokenizer with a chat template: role numbers before the contents."""

    chat_template = "words"

    def __init__(self, words):
        self.eos_token_id, self.encode, self.decode = words.eos_token_id, words.encode, words.decode

    def apply_chat_template(self, messages, add_generation_prompt=True):
        roles = {"system": 90, "user": 91, "assistant": 92}
        return " ".join(f"{roles[m['role']]} {m['content']}" for m in messages) + " 92" * add_generation_prompt


@pytest.fixture(scope="module")
def served(engine, word_tokenizer):
    """(engine, server) without a token; the tokenizer has a chat template."""
    from colora_ms.serving.http import Server, Settings, create_app

    former, engine.tokenizer = engine.tokenizer, ChatWords(word_tokenizer)
    with Server(create_app(engine, Settings(base_model="tiny", max_tokens=80, max_body_bytes=20_000))) as server:
        yield engine, server
    engine.tokenizer = former


@pytest.fixture
def ask(served):
    return lambda *arguments, **more: call(served[1].url, *arguments, **more)


def call(url, method, path, body=None, headers=None, raw=None):
    """(status, headers, JSON or text) of one request."""
    data = raw if raw is not None else None if body is None else json.dumps(body)
    connection = http.client.HTTPConnection(urllib.parse.urlsplit(url).netloc, timeout=60)
    try:
        connection.request(method, path, data, {"Content-Type": "application/json", **(headers or {})})
        response = connection.getresponse()
        text = response.read().decode()
    finally:
        connection.close()
    is_json = response.headers.get("content-type", "").startswith("application/json")
    return response.status, response.headers, json.loads(text) if is_json else text
