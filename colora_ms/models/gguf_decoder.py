"""A GGUF file seen as a Hugging Face decoder: its config, and its tensors under HF names and in HF's order."""

import numpy as np

from colora_ms.errors import CheckpointError, ConfigError
from colora_ms.models.config import DecoderConfig
from colora_ms.models.families import find_gguf_family, unsupported
from colora_ms.models.formats import StoredWeight
from colora_ms.models.gguf_names import (
    EMBEDDING,
    HEAD,
    LLAMA3_KEYS,
    ROPE_FACTORS,
    hf_name,
    interleaved_heads,
    restore_rows,
)
from colora_ms.models.gguf_noise import finer_of_one_matrix
from colora_ms.models.mapped import release
from colora_ms.models.rope import rope_frequencies

# Llama 3.1 and 3.2 in GGUF: the frequency factors are a tensor, their rule is not written down.
_LLAMA3_RULE = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192}

# A linear of the first layer whose bias says that the model has those of a family's option.
_BIASED = {"attention_bias": "self_attn.q_proj", "attention_out_bias": "self_attn.o_proj", "mlp_bias": "mlp.gate_proj"}


class GgufDecoder:
    """The config and tensors of a GGUF model.

    Attributes:
        config: ``DecoderConfig``.
        shapes: ``{HF name: shape}`` of what the file holds.
        unknown: GGUF tensor names that belong to no decoder of this package.
    """

    def __init__(self, file):
        """
        Args:
            file: a ``GgufFile``.

        Raises:
            ConfigError: unsupported architecture or setting.
            CheckpointError: metadata missing or of a wrong type.
        """
        self._file = file
        if file.metadata.get("general.type") == "adapter":
            raise CheckpointError(f"{file.path} is a LoRA adapter (general.type is 'adapter'), not a model; give it "
                                  "as the adapter, with the model that it was made for as the model")
        if EMBEDDING not in file.tensors:
            raise CheckpointError(f"{file.path} holds no tensor 'token_embd.weight': it is not a "
                                  "whole language model (a vocabulary or an adapter only?)")
        architecture = self._get("general.architecture", str)
        self.family = find_gguf_family(architecture)
        if self.family is None:
            raise ConfigError(unsupported(architecture))
        self._source = {}
        self.unknown = []
        for name in file.tensors:
            target = hf_name(name, self.family)
            if target is not None:
                self._source[target] = name
            elif name != ROPE_FACTORS:
                self.unknown.append(name)
        tied = self._tie_head()
        self.config = self._read_config(tied)
        self.shapes = {name: file.tensors[source].shape for name, source in self._source.items()}

    def packed_types(self) -> "list[str]":
        """Names of the quantised types that the file's tensors have, in its order."""
        from gguf import GGMLQuantizationType
        types = dict.fromkeys(self._file.tensors[source].type for source in self._source.values())
        names = [GGMLQuantizationType(number).name for number in types]
        return [name for name in names if name not in ("F64", "F32", "F16", "BF16")]

    def stored(self, name: str) -> StoredWeight:
        """The tensor of a Hugging Face name as the file stores it, in Hugging Face's row order: whole packed rows are
        moved."""
        found = self._file.stored(self._source[name])
        data = restore_rows(found.data, interleaved_heads(self.config, name.rpartition(".")[0]))
        if data is not found.data:
            release(found.data)  # the pages from which rows were copied
        return StoredWeight(found.format, found.shape, data)

    def _tie_head(self):
        """Whether the head is the embedding; of two stored copies of one matrix the finer one serves both."""
        if "lm_head.weight" not in self._source:
            return True
        finer = finer_of_one_matrix(self._file, EMBEDDING, HEAD)
        if finer is None:
            return False
        self._source["model.embed_tokens.weight"] = finer
        del self._source["lm_head.weight"]
        return True

    def _get(self, key, kind, default=None, required=True):
        """A metadata value of the model's architecture, checked for its type."""
        value = self._file.metadata.get(key, default)
        if value is None and not required:
            return None
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            what = "is missing" if value is None else f"is {value!r:.80}"
            raise CheckpointError(f"{self._file.path}: the GGUF value {key!r} {what}, expected "
                                  f"{'an' if kind is int else 'a'} {kind.__name__}")
        return value

    def _read_config(self, tied):
        key = self.family.gguf + "."
        hidden = self._get(key + "embedding_length", int)
        heads = self._get(key + "attention.head_count", int)
        if heads < 1:
            raise CheckpointError(f"{self._file.path}: {key}attention.head_count is {heads}")
        head_dim = self._get(key + "attention.key_length", int, hidden // heads)
        length = self._get(key + "context_length", int)
        self._refuse(key, head_dim, length)
        epsilon = self._get(key + "attention.layer_norm_rms_epsilon", float)
        end = [self._get(f"tokenizer.ggml.{name}_token_id", int, required=False)
               for name in ("eos", "eot", "eom")]
        values = {
            "model_type": self.family.name, "hidden_size": hidden, "head_dim": head_dim,
            "vocab_size": self._file.tensors[EMBEDDING].shape[0],
            "intermediate_size": self._get(key + "feed_forward_length", int),
            "num_hidden_layers": self._get(key + "block_count", int),
            "num_attention_heads": heads,
            "num_key_value_heads": self._get(key + "attention.head_count_kv", int, heads),
            "max_position_embeddings": length,
            "rms_norm_eps": float(f"{epsilon:.6g}"),  # stored as float32: 9.9999997e-06
            "rope_theta": self._get(key + "rope.freq_base", float, 10000.0),
            "tie_word_embeddings": tied,
            "bos_token_id": self._get("tokenizer.ggml.bos_token_id", int, required=False),
            "eos_token_id": [item for index, item in enumerate(end)
                             if item is not None and item not in end[:index]],
            "pad_token_id": self._get("tokenizer.ggml.padding_token_id", int, required=False),
        }
        for option, field in self.family.keys().items():
            values[option] = f"model.layers.0.{_BIASED[field]}.bias" in self._source
        values["rope_scaling"] = self._scaling(key)
        config = DecoderConfig.from_hf(values)
        if ROPE_FACTORS in self._file.tensors:
            values["rope_scaling"] = self._llama3_scaling(config)
            config = DecoderConfig.from_hf(values)
        return config

    def _refuse(self, key, head_dim, length):
        """Settings of llama.cpp's format that this package does not implement."""
        problems = []
        for name, expected in (("rope.dimension_count", head_dim),
                               ("attention.value_length", head_dim), ("expert_count", 0)):
            value = self._file.metadata.get(key + name, expected)
            if value != expected:
                problems.append(f"{key + name} is {value!r:.80}, only {expected} is implemented")
        window = self._file.metadata.get(key + "attention.sliding_window", 0)
        if not isinstance(window, int) or 0 < window < length:
            problems.append(f"{key}attention.sliding_window is {window!r:.80}: sliding-window "
                            "attention is not implemented")
        if problems:
            raise ConfigError(f"{self._file.path} cannot be used: " + "; ".join(problems))

    def _scaling(self, key):
        """The rope_scaling dictionary of the metadata, or None."""
        kind = self._get(key + "rope.scaling.type", str, "none")
        factor = self._get(key + "rope.scaling.factor", float,
                           self._file.metadata.get(key + "rope.scale_linear"), required=False)
        known = {key + "rope.scaling." + name
                 for name in ("type", "factor", "original_context_length", "finetuned", "yarn_beta_fast",
                              "yarn_beta_slow")}
        extra = [name for name in self._file.metadata
                 if name.startswith(key + "rope.scaling.") and name not in known]
        if extra:
            raise ConfigError(f"{self._file.path}: the GGUF rotary setting {extra[0]!r} is not "
                              "implemented")
        if kind == "none":
            if factor in (None, 0.0, 1.0):
                return None
            kind = "linear"
        scaling = {"rope_type": kind, "factor": factor}
        original = self._get(key + "rope.scaling.original_context_length", int, required=False)
        if kind == "yarn" and original is not None:
            scaling["original_max_position_embeddings"] = original
        for name in ("beta_fast", "beta_slow"):
            value = self._get(f"{key}rope.scaling.yarn_{name}", float, required=False)
            if kind == "yarn" and value is not None:
                scaling[name] = value
        return scaling

    def _llama3_scaling(self, config):
        """Recover Llama 3.1's rule from its factors, and refuse factors that it did not make."""
        factors = self._file.read(ROPE_FACTORS).reshape(-1)
        values = dict(_LLAMA3_RULE, factor=float(factors.max()) if factors.size else 0.0)
        for name, own in LLAMA3_KEYS.items():
            values[name] = self._get(own, float, values[name])
        length = values["original_max_position_embeddings"]
        values["original_max_position_embeddings"] = int(length) if float(length).is_integer() else length
        hidden = config.to_hf()
        if np.all(factors == 1):
            return hidden["rope_scaling"]
        if values["factor"] > 1 and hidden["rope_scaling"] is None:
            plain, _ = rope_frequencies(config)
            scaled, _ = rope_frequencies(DecoderConfig.from_hf(dict(hidden, rope_scaling=values)))
            if factors.shape == plain.shape and np.allclose(plain / scaled, factors, rtol=1e-4):
                return values
        raise ConfigError(f"{self._file.path}: its 'rope_freqs.weight' does not follow Llama 3.1's "
                          "rule (low 1, high 4, original length 8192, or as the file says); other frequency factors "
                          "are not implemented")
