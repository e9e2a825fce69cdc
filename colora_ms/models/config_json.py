"""``config.json`` of a decoder: read into the fields of ``DecoderConfig`` as its family's record says, and written."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Optional

from colora_ms.errors import ConfigError, short
from colora_ms.models.families import DEFAULTS, Family, family, family_of_class, find_family, unsupported
from colora_ms.models.rope import normalize_scaling

if TYPE_CHECKING:
    from colora_ms.models.config import DecoderConfig

_REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
# What a config that wraps one of a text model says beside it.
_OUTER = ("quantization_config", "bos_token_id", "eos_token_id", "pad_token_id", "torch_dtype", "dtype",
          "tie_word_embeddings")
_LAYER_TYPES = {"full_attention": False, "sliding_attention": True}


class _Values:
    """The keys of a config.json, with what transformers takes in the place of those that are not there."""

    def __init__(self, values: Mapping[str, Any], record: Family) -> None:
        self.values, self.record = values, record

    def given(self, key: str) -> Any:
        """The key's value in the file, or None."""
        return self.values.get(key)

    def read(self, key: str, otherwise: Any = None) -> Any:
        """The key's value, else what transformers takes."""
        value = self.values.get(key)
        return self.record.defaults.get(key, DEFAULTS.get(key, otherwise)) if value is None else value

    def number(self, key: str, problems: list[str], otherwise: Any = None) -> Any:
        """The key's value if it is a whole number >= 0, else a problem."""
        value = self.read(key, otherwise)
        if not _is_int(value) or value < 0:
            problems.append(f"{key} is {short(value)}, expected a whole number >= 0")
        return value


def read_config_json(values: object) -> dict[str, Any]:
    """The fields of ``DecoderConfig`` that a config.json says; see ``DecoderConfig.from_hf``."""
    if not isinstance(values, dict):
        raise ConfigError(f"config.json holds {short(values)}, expected a JSON object")
    record, values = _family_of(values)
    found = _Values(values, record)
    problems = _refused_settings(values, record)
    missing = [name for name in _REQUIRED if found.read(name) is None]
    if missing:
        problems.append("missing " + ", ".join(missing))
    theta, scaling, local = _read_rope(values, record, problems)
    if problems:
        raise ConfigError("the model config cannot be used: " + "; ".join(problems))
    fields = _sizes(found, theta, scaling)
    fields.update(_settings(found, problems))
    if local is not None and record.local_rotary:
        fields["rope_local_theta"] = local
    fields.update(_layers(found, problems))
    if record.routing is not None:
        fields.update(_routing(found, problems))
    if problems:
        raise ConfigError("the model config cannot be used: " + "; ".join(problems))
    return fields


def _sizes(found: _Values, theta: Any, scaling: Any) -> dict[str, Any]:
    """The fields that every family has."""
    record, read = found.record, found.read
    hidden, heads = read("hidden_size"), read("num_attention_heads")
    head_dim = read("head_dim") if record.head_dim_key else None
    eos = found.given("eos_token_id")
    fields = {name: read(name) for name in (*_REQUIRED, "max_position_embeddings", "tie_word_embeddings")}
    fields.update(
        model_type=record.name, num_key_value_heads=read("num_key_value_heads", heads),
        head_dim=_equal_heads(hidden, heads) if head_dim is None else head_dim,
        rms_norm_eps=read(record.eps), rope_theta=read("rope_theta") if theta is None else theta, rope_scaling=scaling,
        bos_token_id=found.given("bos_token_id"),
        eos_token_ids=() if eos is None else tuple(eos) if isinstance(eos, (list, tuple)) else (eos,),
        pad_token_id=found.given("pad_token_id"),
        torch_dtype=str(found.given("dtype") or found.given("torch_dtype") or "float32"))
    for name, option in record.options().items():
        fields[name] = option if isinstance(option, bool) else read(option, False)
    return fields


def _settings(found: _Values, problems: list[str]) -> dict[str, Any]:
    """The numbers that the record names. A cap that is null is none; one that is not there is the family's."""
    fields: dict[str, Any] = {}
    for field, (key, default) in found.record.settings.items():
        value = found.values.get(key, default)
        if field in ("attention_cap", "logit_cap") and value in (0, 0.0):
            value = None
        if value is None and default is not None and field not in ("attention_cap", "logit_cap"):
            value = default
        if value is not None and not _is_positive(value):
            problems.append(f"{key} is {short(value)}, expected a positive finite number")
        fields[field] = value
    if found.record.partial_rotary:
        fields["partial_rotary"] = value = found.read("partial_rotary_factor", 1.0)
        if not _is_positive(value) or value > 1:
            problems.append(f"partial_rotary_factor is {short(value)}, expected a number above 0, at most 1")
    return fields


def _layers(found: _Values, problems: list[str]) -> dict[str, Any]:
    """Which layers slide and which turn."""
    record, count = found.record, found.read("num_hidden_layers")
    fields: dict[str, Any] = {}
    if not _is_int(count) or not 1 <= count <= 1024:
        return fields  # reported by validate()
    sliding, kinds = record.sliding, found.given("layer_types")
    slides = [False] * count
    if sliding is not None:
        window = found.values.get("sliding_window", sliding.default)
        every = found.read(sliding.pattern, sliding.full_every) if sliding.pattern else sliding.full_every
        if not _is_int(every) or every < 0:
            problems.append(f"{sliding.pattern} is {short(every)}, expected a whole number >= 0")
            every = 0
        slides = [window is not None and not (every and (i + 1) % every == 0) for i in range(count)]
        if kinds is not None:
            if len(kinds) != count:
                problems.append(f"layer_types has {len(kinds)} entries, expected one for each of {count} layers")
            uniform, slides = slides, [window is not None and _LAYER_TYPES.get(kind, False) for kind in kinds]
            if not sliding.full_every and not sliding.pattern and len(kinds) == count and slides != uniform:
                # older releases of transformers ignore the list there, newer ones heed it
                problems.append(f"layer_types calls layer {slides.index(False)} of a {record.name} model "
                                f"full_attention, but sliding_window is {short(window)} for all layers: releases of transformers "
                                "differ in which of the two counts; take layer_types out, or make sliding_window null")
        if any(slides) and (not _is_int(window) or window < 1):
            problems.append(f"sliding_window is {short(window)}, but layer {slides.index(True)} slides: expected at "
                            "least 1 position")
        fields["window"] = window if any(slides) else None
        fields["sliding_layers"] = tuple(slides) if any(slides) else ()
    turns = [True] * count
    if record.rotary_layers == "sliding":
        turns = slides
    elif record.rotary_layers == "listed":
        turns = _listed(found, count, problems)
    fields["rotary_layers"] = () if all(turns) else tuple(turns)
    return fields


def _listed(found: _Values, count: int, problems: list[str]) -> list[bool]:
    """``no_rope_layers``: 1 for a layer that turns, despite the name."""
    listed = found.given("no_rope_layers")
    if listed is None:
        every = found.number("no_rope_layer_interval", problems, 4)
        return [not every or (i + 1) % every != 0 for i in range(count)] if _is_int(every) else [True] * count
    if not isinstance(listed, list) or len(listed) != count or not all(one in (0, 1) for one in listed):
        problems.append(f"no_rope_layers is {short(listed)}, expected a 0 or 1 for each of {count} layers")
        return [True] * count
    return [bool(one) for one in listed]


def _routing(found: _Values, problems: list[str]) -> dict[str, Any]:
    """The experts."""
    routing, count = found.record.routing, found.read("num_hidden_layers")
    assert routing is not None
    sizes = {field: found.number(key, problems) for field, key in
             (("experts", routing.count), ("experts_per_token", routing.per_token), ("expert_size", routing.size),
              ("shared_size", routing.shared)) if key}
    normalised = routing.normalised
    if isinstance(normalised, str):
        normalised = found.read(normalised, False)
        if not isinstance(normalised, bool):
            problems.append(f"{routing.normalised} is {short(normalised)}, expected true or false")
    dense: set[int] = set()
    if routing.dense and _is_int(count):
        step, only = found.number("decoder_sparse_step", problems, 1), found.read("mlp_only_layers", [])
        if not isinstance(only, list) or not all(_is_int(one) and 0 <= one < count for one in only):
            problems.append(f"mlp_only_layers is {short(only)}, expected numbers of layers")
            only = []
        if not _is_int(step) or step < 1:
            problems.append(f"decoder_sparse_step is {short(step)}, expected at least 1")
            step = 1
        dense = set(only) | {i for i in range(min(count, 1024)) if (i + 1) % step}
    if sizes["experts"] == 0:
        problems.append(f"{routing.count} is 0, but {found.record.name} is a family of routed experts")
    return dict(sizes, normalised_experts=normalised, dense_layers=tuple(sorted(dense)))


def write_config_json(config: DecoderConfig) -> dict[str, Any]:
    """See ``DecoderConfig.to_hf``."""
    record, eos = family(config.model_type), list(config.eos_token_ids)
    scaling = dict(config.rope_scaling) if config.rope_scaling else None
    values: dict[str, Any] = {
        "architectures": [record.architecture], "model_type": config.model_type,
        **{name: getattr(config, name) for name in _REQUIRED}, "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        record.activation_key: "silu" if record.activation == "silu" else "gelu_pytorch_tanh",
        "max_position_embeddings": config.max_position_embeddings, record.eps: config.rms_norm_eps,
        "rope_theta": config.rope_theta, "rope_scaling": scaling, "tie_word_embeddings": config.tie_word_embeddings,
        "bos_token_id": config.bos_token_id, "eos_token_id": eos[0] if len(eos) == 1 else eos or None,
        "pad_token_id": config.pad_token_id, "torch_dtype": config.torch_dtype,
    }
    for key, name in reversed(list(record.keys().items())):
        values[key] = getattr(config, name)
    if record.window_layers is not None:
        values["use_sliding_window"] = False
    if scaling and scaling["rope_type"] == "longrope":
        # transformers wants these keys alone; the original length stands beside them
        values["original_max_position_embeddings"] = scaling.pop("original_max_position_embeddings")
        scaling["type"] = scaling.pop("rope_type")
    for field, (key, _) in record.settings.items():
        values[key] = getattr(config, field)
    if record.partial_rotary:
        values["partial_rotary_factor"] = config.partial_rotary
    count = config.num_hidden_layers
    if record.sliding is not None:
        values["sliding_window"] = config.window
        if record.sliding.full_every:
            # without a sliding layer the window must not be null, or a reader would take its default
            values["sliding_window"] = config.window or config.max_position_embeddings
            values["layer_types"] = ["sliding_attention" if config.slides(i) else "full_attention"
                                     for i in range(count)]
    if record.rotary_layers == "listed":
        values["no_rope_layers"] = [int(config.turns(i)) for i in range(count)]
    if record.routing is not None:
        routing = record.routing
        for field, key in (("experts", routing.count), ("experts_per_token", routing.per_token),
                           ("expert_size", routing.size), ("shared_size", routing.shared)):
            if key:
                values[key] = getattr(config, field)
        if isinstance(routing.normalised, str):
            values[routing.normalised] = config.normalised_experts
        if routing.dense:
            values["mlp_only_layers"], values["decoder_sparse_step"] = list(config.dense_layers), 1
    return values


def _family_of(values: dict) -> tuple[Family, dict]:
    """The record of a config.json's family and the values that it is read from, or ConfigError."""
    inner, model_type = values.get("text_config"), values.get("model_type")
    if isinstance(inner, dict) and find_family(model_type) is None:
        if find_family(inner.get("model_type")) is None:
            raise ConfigError(f"model_type {short(model_type)} wraps a text model: "
                              + unsupported(inner.get("model_type")))
        outer = {key: values[key] for key in _OUTER if values.get(key) is not None}
        return family(inner["model_type"]), {**inner, **outer}
    names = values.get("architectures")
    if isinstance(names, str):
        names = [names]
    record = find_family(model_type)
    if model_type is None and isinstance(names, list) and len(names) == 1:
        record = family_of_class(names[0])
    if record is None:
        raise ConfigError(unsupported(model_type))
    if names and (not isinstance(names, list) or record.architecture not in names):
        raise ConfigError(
            f"config.json names the architecture {short(names)} for model_type {record.name!r}; "
            f"only {record.architecture} (a decoder with a language-model head) is supported")
    return record, dict(values)


def _refused_settings(values: dict, record: Family) -> list[str]:
    """Settings that are present and would change the output in a way not implemented here."""
    problems = []
    for name, allowed in record.refused().items():
        value = values.get(name)
        if not any(value is item or (not isinstance(value, bool) and value == item)
                   for item in allowed):
            reason = ("of quantized Hugging Face weights those of gptq, awq and compressed-tensors are read; use such "
                      "a folder, the unquantized model or a GGUF file" if name == "quantization_config"
                      else f"only {allowed[0]!r} is implemented")
            problems.append(f"{name} is {short(value)}: {reason}")
    for name in dict.fromkeys(["attention_bias", "mlp_bias", "tie_word_embeddings", *record.keys()]):
        if values.get(name) is not None and not isinstance(values[name], bool):
            problems.append(f"{name} is {short(values[name])}, expected true or false")
    for name, where in (("attention_bias", "q, k and v"), ("mlp_bias", "gate, up and down")):
        option, said = getattr(record, name), values.get(name)
        if option is True and said is False:
            problems.append(f"{name} is false, but {record.name} always has a bias on {where}")
        if option is False and said:
            problems.append(f"{name} is true, but {record.name} has none")
    return problems + _sliding_problems(values, record)


def _sliding_problems(values: dict, record: Family) -> list[str]:
    """A sliding window matters only if some layer uses it and it is shorter than the context."""
    window = values.get("sliding_window")
    layers = values.get("num_hidden_layers")
    kinds = values.get("layer_types")
    if kinds is not None and not (isinstance(kinds, list) and all(
            kind in ("full_attention", "sliding_attention") for kind in kinds)):
        return [f"layer_types is {short(kinds)}: only 'full_attention' and 'sliding_attention' are implemented"]
    if window is None or record.sliding is not None or (window == 0 and not values.get("use_sliding_window")):
        return []
    if not _is_int(window) or window < 1:
        return [f"sliding_window is {short(window)}, expected a positive integer or null"]
    switch = values.get("use_sliding_window")
    used = record.window if switch is None else bool(switch)
    if used and record.window_layers is not None:
        first = _default(values.get("max_window_layers"), record.window_layers)
        used = "sliding_attention" in kinds if kinds is not None else \
            not (_is_int(first) and _is_int(layers) and first >= layers)
    length = values.get("max_position_embeddings")
    if used and not (_is_int(length) and window >= length):
        return [f"sliding_window={window} is used by some layers: sliding-window attention is not "
                f"implemented for {record.name}"]
    return []


def _read_rope(values: dict, record: Family, problems: list[str]) -> tuple[Any, Optional[dict], Any]:
    """(theta or None, rope_scaling, theta of the sliding layers' own table or None) from either spelling."""
    theta, scaling, local = values.get("rope_theta"), values.get("rope_scaling"), None
    newer = values.get("rope_parameters")
    if isinstance(newer, dict) and record.local_rotary and set(newer) == set(_LAYER_TYPES) \
            and all(isinstance(one, dict) for one in newer.values()):
        own = dict(newer["sliding_attention"])
        local = own.pop("rope_theta", None)
        if own.pop("rope_type", "default") != "default" or own:
            problems.append(f"rope_parameters of sliding layers is {short(newer['sliding_attention'])}, expected "
                            "rope_theta alone")
        newer = newer["full_attention"]
    if newer is not None:
        if not isinstance(newer, dict) or any(isinstance(item, dict) for item in newer.values()):
            problems.append(f"rope_parameters is {short(newer)}: only one set of rotary settings for all layers is "
                            "implemented")
            return None, None, None
        newer = dict(newer)
        inner_theta = newer.pop("rope_theta", None)
        if theta is not None and inner_theta is not None and theta != inner_theta:
            problems.append(f"rope_theta={theta!r} contradicts rope_parameters' {inner_theta!r}")
            return None, None, None
        theta = inner_theta if inner_theta is not None else theta
        partial = newer.pop("partial_rotary_factor", None)
        if record.partial_rotary and partial is not None:
            values["partial_rotary_factor"] = partial
        elif partial not in (None, 1, 1.0):
            newer["partial_rotary_factor"] = partial
        if newer and newer.get("rope_type", newer.get("type")) is None:
            newer["rope_type"] = "default"
        newer = _longrope(newer, values, record)
        read, more = normalize_scaling(newer)
        if scaling is not None and not more and normalize_scaling(_longrope(scaling, values, record))[0] != read:
            more = [f"rope_scaling={short(scaling)} contradicts rope_parameters={short(newer)}"]
        problems += more
        return theta, newer or None, local
    scaling = _longrope(scaling, values, record)
    problems += normalize_scaling(scaling)[1]
    return theta, scaling, local


def _longrope(scaling: Any, values: dict, record: Family) -> Any:
    """Longrope under one name, with the original length that stands beside it."""
    if not isinstance(scaling, dict):
        return scaling
    kind = scaling.get("rope_type", scaling.get("type"))
    if kind != "longrope" and not (kind in record.longrope and "long_factor" in scaling):
        return scaling
    found = {key: value for key, value in scaling.items() if key != "type"}
    found["rope_type"] = "longrope"
    original = values.get("original_max_position_embeddings", record.defaults.get("original_max_position_embeddings"))
    if original is not None:
        found.setdefault("original_max_position_embeddings", original)
    return found


def _equal_heads(hidden: Any, heads: Any) -> int:
    """The size of a head where neither config.json nor the family says it."""
    if not _is_int(hidden) or not _is_int(heads) or heads < 1:
        return 2  # the sizes themselves are reported by validate()
    if hidden % heads:
        raise ConfigError(f"hidden_size={hidden} is not a multiple of num_attention_heads={heads} "
                          "and head_dim is not given")
    return hidden // heads


def _default(value: Any, default: Any) -> Any:
    return default if value is None else value


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_positive(value: Any) -> bool:
    return not isinstance(value, bool) and isinstance(value, (int, float)) and math.isfinite(value) and value > 0
