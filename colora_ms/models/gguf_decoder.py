"""A GGUF file seen as a Hugging Face decoder: its config, and its tensors under HF names and in HF's order."""

import re

import numpy as np

from colora_ms.errors import CheckpointError, ConfigError
from colora_ms.models.config import DecoderConfig
from colora_ms.models.families import find_gguf_family, unsupported
from colora_ms.models.family import QKV
from colora_ms.models.family_tensors import fused_parts
from colora_ms.models.formats import StoredWeight, stored_float
from colora_ms.models.gguf_names import (
    EMBEDDING,
    HEAD,
    LLAMA3_KEYS,
    LONGROPE,
    ROPE_FACTORS,
    expert_tensors,
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

_FUSED = re.compile(r"blk\.(\d+)\.(attn_qkv|[a-z_]+)\.(weight|bias)")

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
        experts = isinstance(architecture, str) and file.metadata.get(f"{architecture}.expert_count", 0) != 0
        self.family = find_gguf_family(architecture, experts)
        if self.family is None:
            raise ConfigError(unsupported(architecture))
        self._source, self._parts = {}, {}
        self.unknown = []
        fused = []
        for name, tensor in file.tensors.items():
            parts = expert_tensors(name, self.family, tensor.shape)
            target = hf_name(name, self.family)
            if parts is not None:
                self._source.update(dict.fromkeys(parts, name))
                self._parts.update({own: place for own, place in parts.items() if place != (None, None)})
            elif self._fused_name(name) is not None:
                fused.append(name)
            elif target is not None:
                self._source[target] = name
            elif name not in (ROPE_FACTORS, *LONGROPE):
                self.unknown.append(name)
        self._apart = {f"{layer}{part}.{field}" for layer, parts, field in map(self._fused_name, fused)
                       for part in parts}
        tied = self._tie_head()
        self.config = self._read_config(tied)
        for name in fused:
            self._take_apart(name)
        self.shapes = {name: self._shape(name) for name in self._source}

    def _fused_name(self, name):
        """The name, as in ``Family.fused``, of a tensor that holds several linears as one, or None."""
        match = _FUSED.fullmatch(name)
        if match is None:
            return None
        fused = {"attn_qkv": QKV, **self.family.gguf_fused}
        # ffn_up is both factors only where there is no ffn_gate
        there = match.group(2) in fused and f"blk.{match.group(1)}.ffn_gate.weight" not in self._file.tensors \
            or match.group(2) == "attn_qkv"
        return (f"model.layers.{match.group(1)}.", fused[match.group(2)], match.group(3)) if there else None

    def _take_apart(self, name):
        """Note where the linears of a fused tensor stand in it."""
        layer, parts, field = self._fused_name(name)
        shape = self._file.tensors[name].shape
        places = fused_parts(self.config, {"all": parts}, f"{layer}all.{field}", shape[0])
        for part, rows in places.items():
            self._source[part], self._parts[part] = name, (None, rows)

    def _shape(self, name):
        shape = self._file.tensors[self._source[name]].shape
        index, rows = self._parts.get(name, (None, None))
        shape = shape if index is None else shape[1:]
        shape = shape if rows is None else (rows[1] - rows[0], *shape[1:])
        return (1, *shape) if name.endswith("shared_expert_gate.weight") and len(shape) == 1 else shape

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
        if self.family.norm == "rms_plus_one" and name.endswith("norm.weight"):
            return stored_float(found.values() - np.float32(1))  # llama.cpp's files hold 1 + weight
        index, rows = self._parts.get(name, (None, None))
        part = found.data if index is None else found.data[index]
        part = part if rows is None else part[rows[0]:rows[1]]
        data = restore_rows(part, interleaved_heads(self.config, name.rpartition(".")[0]))
        if data is not part:
            release(part)  # the pages from which rows were copied
        shape = tuple(self.shapes[name])
        return StoredWeight(found.format, shape, data.reshape(found.format.data_shape(shape)))

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
        norm = "attention.layer_norm_epsilon" if self.family.norm == "layer" else "attention.layer_norm_rms_epsilon"
        epsilon = self._get(key + norm, float)
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
            self.family.eps: float(f"{epsilon:.6g}"),  # stored as float32: 9.9999997e-06
            "rope_theta": self._get(key + "rope.freq_base", float, 10000.0),
            "tie_word_embeddings": tied,
            "bos_token_id": self._get("tokenizer.ggml.bos_token_id", int, required=False),
            "eos_token_id": [item for index, item in enumerate(end)
                             if item is not None and item not in end[:index]],
            "pad_token_id": self._get("tokenizer.ggml.padding_token_id", int, required=False),
        }
        for option, field in self.family.keys().items():
            name = f"model.layers.0.{_BIASED[field]}.bias"
            values[option] = name in self._source or name in self._apart
        values["rope_scaling"] = self._scaling(key)
        self._family_values(key, values)
        config = DecoderConfig.from_hf(values)
        if ROPE_FACTORS in self._file.tensors:
            values["rope_scaling"] = self._llama3_scaling(config)
            config = DecoderConfig.from_hf(values)
        return config

    def _family_values(self, key, values):
        """Put what the family's record asks for into the values of config.json."""
        record, metadata = self.family, self._file.metadata
        for own, other in record.gguf_keys.items():
            value = metadata.get(key + other)
            if isinstance(value, float):
                value = float(f"{value:.6g}")
            if isinstance(value, (list, np.ndarray)):  # a boolean a layer, whether it slides
                values["layer_types"] = ["sliding_attention" if one else "full_attention" for one in value]
            elif value is not None:
                values[own] = value
        if record.partial_rotary:
            width = self._get(key + "rope.dimension_count", int, values["head_dim"])
            values["partial_rotary_factor"] = width / values["head_dim"]
        if record.routing is not None:
            routing = record.routing
            values[routing.count] = self._get(key + "expert_count", int)
            values[routing.per_token] = self._get(key + "expert_used_count", int)
            if routing.size != "intermediate_size":
                values[routing.size] = self._get(key + "expert_feed_forward_length", int, self._width("experts.0."))
            if routing.shared:
                values[routing.shared] = self._get(key + "expert_shared_feed_forward_length", int,
                                                   self._width("shared_expert."))
            if routing.dense:
                count = range(values["num_hidden_layers"])
                values["mlp_only_layers"] = [i for i in count if f"model.layers.{i}.{record.mlp}.gate.weight"
                                             not in self._source]
        record.gguf_rest(values, metadata)

    def _width(self, expert):
        """The width of an expert by its tensors, where the file does not say it; 0: there is none."""
        found = [name for name in self._source if f".{expert}up_proj." in name]
        return self._shape(found[0])[0] if found else 0

    def _refuse(self, key, head_dim, length):
        """Settings of llama.cpp's format that this package does not implement."""
        problems, record = [], self.family
        for name, expected in (("rope.dimension_count", head_dim),
                               ("attention.value_length", head_dim), ("expert_count", 0)):
            value = self._file.metadata.get(key + name, expected)
            read = name == "expert_count" and record.routing or name == "rope.dimension_count" and record.partial_rotary
            if value != expected and not read:
                problems.append(f"{key + name} is {value!r:.80}, only {expected} is implemented")
        window = self._file.metadata.get(key + "attention.sliding_window", 0)
        if record.sliding is None and (not isinstance(window, int) or 0 < window < length):
            problems.append(f"{key}attention.sliding_window is {window!r:.80}: sliding-window "
                            "attention is not implemented")
        if problems:
            raise ConfigError(f"{self._file.path} cannot be used: " + "; ".join(problems))

    def _scaling(self, key):
        """The rope_scaling dictionary of the metadata, or None."""
        kind = self._get(key + "rope.scaling.type", str, "")
        factor = self._get(key + "rope.scaling.factor", float,
                           self._file.metadata.get(key + "rope.scale_linear"), required=False)
        known = {key + "rope.scaling." + name
                 for name in ("type", "factor", "original_context_length", "finetuned", "yarn_beta_fast",
                              "yarn_beta_slow", *(("attn_factor",) if LONGROPE[0] in self._file.tensors else ()))}
        extra = [name for name in self._file.metadata
                 if name.startswith(key + "rope.scaling.") and name not in known]
        if extra:
            raise ConfigError(f"{self._file.path}: the GGUF rotary setting {extra[0]!r} is not "
                              "implemented")
        if LONGROPE[0] in self._file.tensors:
            return self._longrope(key)
        if kind == "none" or (not kind and factor in (None, 0.0, 1.0)):
            return None  # where the type says "none", a factor is not looked at
        kind = kind or "linear"
        scaling = {"rope_type": kind, "factor": factor}
        original = self._get(key + "rope.scaling.original_context_length", int, required=False)
        if kind == "yarn" and original is not None:
            scaling["original_max_position_embeddings"] = original
        for name in ("beta_fast", "beta_slow"):
            value = self._get(f"{key}rope.scaling.yarn_{name}", float, required=False)
            if kind == "yarn" and value is not None:
                scaling[name] = value
        return scaling

    def _longrope(self, key):
        """The two lists of longrope, which are tensors here, and the original length."""
        if LONGROPE[1] not in self._file.tensors:
            raise CheckpointError(f"{self._file.path} has {LONGROPE[0]} and no {LONGROPE[1]}")
        long, short = (self._file.read(name).reshape(-1).tolist() for name in LONGROPE)
        factor = self._get(key + "rope.scaling.attn_factor", float, required=False)
        found = {"rope_type": "longrope", "short_factor": short, "long_factor": long,
                 "original_max_position_embeddings": self._get(key + "rope.scaling.original_context_length", int)}
        return found if factor is None else dict(found, attention_factor=factor)

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
