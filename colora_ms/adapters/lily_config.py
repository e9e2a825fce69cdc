"""``LilyConfig``: the settings of a Lily adapter, with PEFT's field names and meaning where PEFT has them.

Reference: Zhong et al., "Low-Rank Interconnected Adaptation across Layers", arXiv 2407.09946. ``router_pool``,
``router_form`` and ``share`` are ours: PEFT's Lily always pools over the batch, in the form of the authors' code, and
shares by the entry of ``target_modules``.
"""

from dataclasses import dataclass, fields
from typing import Any, Optional, Union

from colora_ms.adapters.config import MAX_RANK, LoraConfig
from colora_ms.adapters.peft_config import PeftConfig
from colora_ms.errors import AdapterError, near

#: What the router's weights are averaged over before the experts are mixed; "static" weights do not depend on the
#: input.
POOLS = ("token", "sequence", "batch", "static")

#: "code": softmax of each token's logits, then the mean. "paper": softmax of the summed logits.
FORMS = ("code", "paper")

#: Which modules share: "type" those with the same last part of the name; "entry" (PEFT's rule) those that the same
#: entry of target_modules matches and that have the same shape.
SHARES = ("type", "entry")

#: Keys of PEFT's adapter_config.json that change nothing that is computed here.
HARMLESS_KEYS = frozenset({"auto_mapping", "inference_mode", "peft_version", "runtime_config"})

#: More experts than any published recipe has.
MAX_EXPERTS = 4096

#: Largest scaling that float32 sums bear.
MAX_SCALING = 1e30


@dataclass
class LilyConfig(PeftConfig):
    """Settings of one Lily adapter.

    Each targeted linear of layer l computes, with a down factor A shared by ``stride_A`` neighbouring layers, ``num_B``
    experts B shared by all layers, and a router R of its own,

        h = A x,   p = softmax(R h),   y = W x + scaling * sum_e p_e B_e h

    with p pooled as ``router_pool`` says.

    Raises:
        AdapterError: one or more values cannot be used; the message lists all of them.
    """

    #: Rank; two to four times a LoRA's, since the factors are shared.
    r: int = 32
    #: Neighbouring layers that share one A. The authors give the number of A's instead: stride = layers // number.
    stride_A: int = 1
    #: Experts B, shared by all layers; the router mixes them.
    num_B: int = 2
    #: Factor of the low-rank branch; plain, not divided by the rank.
    scaling: float = 1.0
    #: What the router's weights are averaged over: "token" (causal, and a row does not depend on its neighbours),
    #: "sequence" and "batch" (of the call's real tokens: later tokens change earlier ones; "batch" is what PEFT and the
    #: authors do), or "static" (weights that do not depend on the input: can be merged, and written as plain LoRA).
    router_pool: str = "token"
    #: "code": softmax a token, then mean; "paper": softmax of the summed logits. The same for "token" and "static".
    router_form: str = "code"
    #: Which modules share: "type" (equal last part of the name) or "entry" (PEFT's rule).
    share: str = "type"
    #: Linears to adapt: a list of names or endings of names, a regular expression for the whole name, or "all-linear".
    target_modules: Optional[Union[list, str]] = None
    #: Modules to leave out, in the same notation.
    exclude_modules: Optional[Union[list, str]] = None
    #: Modules that are trained and saved whole beside the adapter (endings of their names).
    modules_to_save: Optional[list] = None
    #: Layer index or indices to adapt; needs a list in ``target_modules``.
    layers_to_transform: Optional[Union[list, int]] = None
    #: Name of the list of layers ("layers"), for ``layers_to_transform``.
    layers_pattern: Optional[Union[list, str]] = None
    #: Start: A and router random and B zero (True), or all random (False).
    init_weights: bool = True
    #: Kept for the file only, such as "CAUSAL_LM".
    task_type: Optional[str] = None
    #: Name or folder of the base model that the adapter was made for.
    base_model_name_or_path: Optional[str] = None
    #: Revision of the base model.
    revision: Optional[str] = None

    #: Written as ``peft_type``.
    peft_type = "LILY"
    #: The authors' code defines a dropout and never calls it; PEFT dropped the option, and so do we.
    lora_dropout = 0.0

    def __post_init__(self) -> None:
        self.make_lists()
        problems = self.problems()
        if problems:
            raise AdapterError("this Lily config cannot be used: " + "; ".join(problems))

    def problems(self) -> list[str]:
        """All that is wrong with the values, as a list of sentences (empty when the config can be used)."""
        found = []
        for name, least, most in (("r", 1, MAX_RANK), ("stride_A", 1, MAX_RANK), ("num_B", 2, MAX_EXPERTS)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
                found.append(f"{name} is {value!r}, expected a whole number from {least} to {most}"
                             + (" (a router needs at least two experts to choose between; for one, use LoRA)"
                                if name == "num_B" and value == 1 else ""))
        scaling = self.scaling
        if not isinstance(scaling, (int, float)) or isinstance(scaling, bool) or not abs(scaling) <= MAX_SCALING:
            found.append(f"scaling is {scaling!r}, expected a finite number")
        for name, known in (("router_pool", POOLS), ("router_form", FORMS), ("share", SHARES)):
            if getattr(self, name) not in known:
                found.append(f"{name} is {getattr(self, name)!r}, expected one of {', '.join(known)}."
                             + near(getattr(self, name), known))
        if not isinstance(self.init_weights, bool):
            found.append(f"init_weights is {self.init_weights!r}, expected true or false")
        found += self.text_problems()
        try:
            self.targets_of()
        except AdapterError as error:
            found.append(str(error).removeprefix("this LoRA config cannot be used: "))
        return found

    def targets_of(self) -> LoraConfig:
        """A LoraConfig with the same modules, which is how they are matched."""
        return LoraConfig(r=1, target_modules=self.target_modules, exclude_modules=self.exclude_modules,
                          modules_to_save=self.modules_to_save, layers_to_transform=self.layers_to_transform,
                          layers_pattern=self.layers_pattern)

    @classmethod
    def parse_peft(cls, values: Any) -> tuple[Optional['LilyConfig'], list[str]]:
        """Read an ``adapter_config.json`` without raising.

        A file without ``router_pool`` and ``share`` is PEFT's, and means what PEFT computes: "batch" and "entry".

        Args:
            values: the file's JSON object.

        Returns:
            (LilyConfig, or None if its own values cannot be used; list of all problems).
        """
        if not isinstance(values, dict):
            return None, [f"an adapter config must be a JSON object, this is a {type(values).__name__}"]
        if values.get("peft_type") != cls.peft_type:
            return None, [f"peft_type is {values.get('peft_type')!r:.60}, expected {cls.peft_type!r}"]
        known = {one.name for one in fields(cls)}
        own = {"router_pool": "batch", "share": "entry", **{key: values[key] for key in values if key in known}}
        found = cls.unknown_settings(values, {*known, *HARMLESS_KEYS})
        try:
            return cls(**own), found
        except AdapterError as error:
            return None, found + [str(error)]
