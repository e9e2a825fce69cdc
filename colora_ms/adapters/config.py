"""``LoraConfig``: the settings of a LoRA adapter, with PEFT's field names and meaning.

Reference: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685; rank-stabilised scaling:
Kalajdzievski, arXiv 2312.03732. A config from disk may carry settings of other methods (aLoRA, KaSA, ...): every one
that changes what the adapter computes and is not implemented is refused, and all refusals come in one error.
"""

import math
import re
from dataclasses import dataclass, field, fields
from typing import Any, Optional, Union

from colora_ms.adapters.peft_config import PeftConfig
from colora_ms.errors import AdapterError, near

#: Keys of adapter_config.json that are known and change nothing that is computed here, whatever their value.
#: ``fan_in_fan_out`` describes the storage of the base weight, not of the adapter; the ``*_config`` of initialisations
#: matter only with the ``init_lora_weights`` that asks for them, which is checked itself.
HARMLESS_KEYS = frozenset({
    "auto_mapping", "corda_config", "eva_config", "inference_mode", "loftq_config", "lora_ga_config", "megatron_core",
    "peft_version", "qalora_group_size", "runtime_config",
})

#: Settings that are known, change the mathematics and are not implemented: key -> what it is.
REFUSED_KEYS = {
    "alora_invocation_tokens": "activated LoRA (aLoRA)",
    "arrow_config": "Arrow routing between adapters",
    "enable_lora": "the merged q/k/v linears of old versions",
    "kasa_config": "KaSA",
    "layer_replication": "replicated layers",
    "megatron_config": "Megatron's parallel linears",
    "monteclora_config": "MonteCLoRA",
    "target_parameters": "adapters on bare parameters",
    "use_bdlora": "block-diagonal LoRA",
    "use_qalora": "QALoRA",
    "velora_config": "VeLoRA",
}

#: Largest rank, and most entries of a list or pattern: beyond any real adapter, below what would exhaust a machine.
MAX_RANK = 1 << 20
MAX_ENTRIES = 100_000
MAX_PATTERNS = 5_000

BIAS = ("none", "all", "lora_only")

#: Initialisations that can start a new adapter; "pissa_niter_N" with a whole number N is another one.
INITIALISATIONS = (True, False, "gaussian", "pissa", "olora")

#: Initialisations of which a trained adapter shows no trace: such an adapter can be loaded, but not begun, here.
LOADABLE_INITIALISATIONS = INITIALISATIONS + ("eva", "orthogonal")

_PISSA_NITER = re.compile(r"pissa_niter_([0-9]{1,3})")


@dataclass
class LoraConfig(PeftConfig):
    """Settings of one LoRA adapter.

    Each targeted linear computes ``W x + scaling * up (down dropout(x))``, with scaling = lora_alpha / r, or
    lora_alpha / sqrt(r) with ``use_rslora``.

    Raises:
        AdapterError: one or more values cannot be used; the message lists all of them.
    """

    #: Rank of the update; more rank, more capacity and more memory.
    r: int = 8
    #: Scale of the update relative to its rank (with Adam it acts much like the learning rate).
    lora_alpha: float = 8
    #: Probability of dropping an input of the low-rank branch in training.
    lora_dropout: float = 0.0
    #: Linears to adapt: a list of names or endings of names, a regular expression for the whole name, or "all-linear"
    #: (all but the output head). None takes q_proj and v_proj on the models of this package.
    target_modules: Optional[Union[list, str]] = None
    #: Modules to leave out, in the same notation.
    exclude_modules: Optional[Union[list, str]] = None
    #: Rank of single modules: {ending of the name or regular expression: rank}.
    rank_pattern: dict = field(default_factory=dict)
    #: lora_alpha of single modules, in the same notation.
    alpha_pattern: dict = field(default_factory=dict)
    #: Modules that are trained and saved whole beside the adapter (endings of their names).
    modules_to_save: Optional[list] = None
    #: Ids whose rows of the embedding are trained and replace the base's: a list, or {ending of a module's name: list}
    #: for embedding and head apart. A tied head uses the embedding's.
    trainable_token_indices: Optional[Union[list, dict]] = None
    #: Keep a tied head tied to what ``modules_to_save`` or ``trainable_token_indices`` make of the embedding.
    ensure_weight_tying: bool = False
    #: Layer index or indices to adapt; needs a list in ``target_modules``.
    layers_to_transform: Optional[Union[list, int]] = None
    #: Name of the list of layers ("layers"), for ``layers_to_transform``.
    layers_pattern: Optional[Union[list, str]] = None
    #: scaling = lora_alpha / sqrt(r) in place of lora_alpha / r.
    use_rslora: bool = False
    #: Biases that are trained: "none", "all", or "lora_only" (those of the adapted linears).
    bias: str = "none"
    #: Start of the factors: True (down uniform, up zero), "gaussian" (down normal / r, up zero), False (both random);
    #: "pissa" or "pissa_niter_N" (the largest singular values of the weight, exactly or by N iterations) and "olora"
    #: (its QR decomposition), which take what they start from away from the base weight.
    init_lora_weights: Union[bool, str] = True
    #: DoRA: the rows of the changed weight get trained lengths (arXiv 2402.09353).
    use_dora: bool = False
    #: A trained bias on lora_B, scaled like the low-rank product.
    lora_bias: bool = False
    #: Kept for the file only: the base weight's storage; it does not change the adapter.
    fan_in_fan_out: bool = False
    #: Kept for the file only, such as "CAUSAL_LM".
    task_type: Optional[str] = None
    #: Name or folder of the base model that the adapter was made for.
    base_model_name_or_path: Optional[str] = None
    #: Revision of the base model.
    revision: Optional[str] = None

    #: Written as ``peft_type``.
    peft_type = "LORA"

    def __post_init__(self) -> None:
        self.make_lists()
        if isinstance(self.trainable_token_indices, tuple):
            self.trainable_token_indices = list(self.trainable_token_indices)
        self.trainable_token_indices = self.trainable_token_indices or None
        self.rank_pattern = {} if self.rank_pattern is None else self.rank_pattern
        self.alpha_pattern = {} if self.alpha_pattern is None else self.alpha_pattern
        problems = self.problems()
        if problems:
            raise AdapterError("this LoRA config cannot be used: " + "; ".join(problems))

    def problems(self) -> list[str]:
        """All that is wrong with the values, as a list of sentences (empty when the config can be used)."""
        found = []
        if not _is_rank(self.r):
            found.append(f"r is {self.r!r}, expected a whole number from 1 to {MAX_RANK}")
        if not _is_finite(self.lora_alpha):
            found.append(f"lora_alpha is {self.lora_alpha!r}, expected a finite number")
        if not _is_finite(self.lora_dropout) or not 0 <= self.lora_dropout < 1:
            found.append(f"lora_dropout is {self.lora_dropout!r}, expected a number in [0, 1)")
        if self.bias not in BIAS:
            found.append(f"bias is {self.bias!r}, expected one of {', '.join(BIAS)}.{near(self.bias, BIAS)}")
        for name in ("use_rslora", "fan_in_fan_out", "use_dora", "lora_bias", "ensure_weight_tying"):
            if not isinstance(getattr(self, name), bool):
                found.append(f"{name} is {getattr(self, name)!r}, expected true or false")
        found += self._module_problems()
        found += self._token_problems()
        found += self._pattern_problems()
        if not _is_one_of(self.init_lora_weights, LOADABLE_INITIALISATIONS) and self.pissa_iterations is None:
            found.append(f"init_lora_weights={self.init_lora_weights!r} is not implemented (methods such as CorDA and "
                         "LoftQ change the base weights, so that the factors alone are not the adapter); convert the "
                         "adapter to plain LoRA first, or use one of "
                         + ", ".join(map(repr, INITIALISATIONS)) + ", 'pissa_niter_N'")
        elif self.changes_base and _is_finite(self.lora_alpha):
            if min([self.lora_alpha, *(a for a in self.alpha_pattern.values() if _is_finite(a))]) <= 0:
                found.append(f"init_lora_weights={self.init_lora_weights!r} needs every lora_alpha above 0")
        if self.lora_bias is True and self.use_dora is True:
            found.append("lora_bias and use_dora exclude each other")
        if self.lora_bias is True and not isinstance(self.init_lora_weights, bool):
            found.append(f"lora_bias needs init_lora_weights True or False, not {self.init_lora_weights!r}")
        found += self.text_problems()
        return found

    def _module_problems(self):
        found = []
        for name in ("target_modules", "exclude_modules", "layers_pattern"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str) and not _is_names(value):
                found.append(f"{name} is {value!r:.80}, expected a list of names or one regular expression")
        if self.modules_to_save is not None and not _is_names(self.modules_to_save):
            found.append(f"modules_to_save is {self.modules_to_save!r:.80}, expected a list of names")
        for name, most in (("target_modules", MAX_ENTRIES), ("exclude_modules", MAX_ENTRIES),
                           ("layers_to_transform", MAX_ENTRIES), ("modules_to_save", MAX_PATTERNS),
                           ("layers_pattern", MAX_PATTERNS)):
            value = getattr(self, name)
            if isinstance(value, list) and len(value) > most:
                found.append(f"{name} has {len(value)} entries, at most {most} are allowed")
        if self.target_modules in ("", []) and not self.modules_to_save and not self.trainable_token_indices:
            found.append("target_modules is empty: the adapter would change nothing")
        layers = self.layers_to_transform
        if layers is not None:
            indices = layers if isinstance(layers, list) else [layers]
            if not all(_is_int(i) and i >= 0 for i in indices):
                found.append(f"layers_to_transform is {layers!r:.80}, expected a layer index or a list of them")
            if isinstance(self.target_modules, str):
                found.append("layers_to_transform needs a list in target_modules, which is "
                             f"{self.target_modules!r:.80}: write the layers into that expression")
        elif self.layers_pattern:
            found.append(f"layers_pattern is {self.layers_pattern!r:.80}, but layers_to_transform is not given")
        return found

    def _token_problems(self):
        tables = self.trainable_token_indices or {}
        if not isinstance(tables, (list, dict)):
            return [f"trainable_token_indices is {tables!r:.80}, expected a list of token ids, or {{module name: "
                    "list}"]
        found = []
        for name, ids in (tables if isinstance(tables, dict) else {"": tables}).items():
            label = f"trainable_token_indices[{name!r:.80}]" if name else "trainable_token_indices"
            if not isinstance(ids, list) or not ids or not all(_is_int(i) and i >= 0 for i in ids):
                found.append(f"{label} is {ids!r:.80}, expected a list of token ids")
            elif len(ids) > MAX_ENTRIES:
                found.append(f"{label} has {len(ids)} entries, at most {MAX_ENTRIES} are allowed")
            elif len(set(ids)) < len(ids):
                found.append(f"{label} has {next(i for i in ids if ids.count(i) > 1)} more than once")
        return found

    def _pattern_problems(self):
        found = []
        for name, valid, expected in (
                ("rank_pattern", _is_rank, f"a whole number from 1 to {MAX_RANK}"),
                ("alpha_pattern", _is_finite, "a finite number")):
            patterns = getattr(self, name)
            if not isinstance(patterns, dict):
                found.append(f"{name} is {patterns!r:.80}, expected {{name or regular expression: number}}")
                continue
            if len(patterns) > MAX_PATTERNS:
                found.append(f"{name} has {len(patterns)} entries, at most {MAX_PATTERNS} are allowed")
            found += [f"{name}[{key!r}] is {value!r}, expected {expected}"
                      for key, value in patterns.items() if not isinstance(key, str) or not valid(value)]
        return found

    @classmethod
    def parse_peft(cls, values: Any) -> tuple[Optional['LoraConfig'], list[str]]:
        """Read an ``adapter_config.json`` without raising.

        Args:
            values: the file's JSON object.

        Returns:
            (LoraConfig, or None if its own values cannot be used; list of all problems).
        """
        if not isinstance(values, dict):
            return None, [f"an adapter config must be a JSON object, this is a {type(values).__name__}"]
        kind = values.get("peft_type")
        if kind != cls.peft_type:
            return None, [f"peft_type is {kind!r:.60}, expected {cls.peft_type!r}: another kind of adapter, or not an "
                          "adapter_config.json"]
        known = {one.name for one in fields(cls)}
        found, own = [], {}
        for key, value in values.items():
            if key in known:
                own[key] = value
            elif key == "alora_invocation_tokens" and value is not None or key in REFUSED_KEYS and value:
                found.append(f"the setting {key}={value!r:.60} ({REFUSED_KEYS[key]}) is not implemented")
        found += cls.unknown_settings(values, {*known, *HARMLESS_KEYS, *REFUSED_KEYS})
        try:
            return cls(**own), found
        except AdapterError as error:
            return None, found + [str(error)]

    @property
    def pissa_iterations(self) -> Optional[int]:
        """N of "pissa_niter_N", or None."""
        start = self.init_lora_weights
        match = _PISSA_NITER.fullmatch(start) if isinstance(start, str) else None
        return int(match[1]) if match else None

    @property
    def changes_base(self) -> bool:
        """Whether a new adapter takes what it starts from away from the base weights."""
        return self.init_lora_weights in ("pissa", "olora") or self.pissa_iterations is not None

    def scaling(self, r: int, alpha: float) -> float:
        """The factor of the low-rank branch for rank r and this alpha."""
        return alpha / math.sqrt(r) if self.use_rslora else alpha / r


def _is_int(value):
    return isinstance(value, int) and not isinstance(value, bool)


def _is_one_of(value, known):
    """Whether a bool or text is one of ``known``; 1 is not True here."""
    return any(value is one or isinstance(one, str) and value == one for one in known)


def _is_rank(value):
    return _is_int(value) and 1 <= value <= MAX_RANK


def _is_finite(value):
    """A number that float32 holds with room to spare (a comparison takes any int; math.isfinite does not)."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -1e30 <= value <= 1e30


def _is_names(value):
    return isinstance(value, list) and all(isinstance(one, str) and one for one in value)
