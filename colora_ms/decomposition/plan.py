"""Which matrices are decomposed, to which rank, and what that saves: plans, break-even ranks, placements, presets.

Pure Python on the config's shapes, so that a plan for any model can be checked and counted without its weights.
Design space and findings: Moar, Tahmasebi, Pellauer, Kwon, arXiv 2405.06626.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from colora_ms.decomposition.tucker import METHODS
from colora_ms.errors import ConfigError, near
from colora_ms.models.config import DecoderConfig

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
GROUPS = {"attn": ATTENTION, "mlp": MLP, "all": ATTENTION + MLP}
PLACEMENTS = ("early", "middle", "late", "spread")

#: Share of the parameters that the preset removes.
PRESETS = {"lrd-9": 0.09}

_OPTIONS = ("rank", "factors", "method")


@dataclass(frozen=True)
class Piece:
    """One matrix to decompose: ``shape`` is (out, in)."""

    shape: tuple
    rank: int
    factors: int = 3
    method: str = "svd"

    @property
    def parameters(self) -> int:
        """Weights of the factors; also the multiplications of one token."""
        return factor_parameters(*self.shape, self.rank, self.factors)

    @property
    def saved(self) -> int:
        """Weights that the matrix has more than its factors (negative past break-even)."""
        return math.prod(self.shape) - self.parameters


@dataclass(frozen=True)
class LrdPlan:
    """What to decompose.

    Raises:
        ConfigError: one or more values cannot be used; the message lists all of them.
    """

    #: Blocks to decompose: "all" or a list of their numbers, from 0.
    layers: object = ()
    #: Matrices of these blocks: "all", "attn", "mlp", or a list of names.
    tensors: object = "all"
    #: Rank of every matrix; rank 1 hardly hurts more than a larger one, what counts is where (arXiv 2405.06626).
    rank: int = 1
    #: 3 as in the paper (outer, core, inner), or 2 with the core folded into the inner factor: same output, less work.
    factors: int = 3
    #: "svd" or "hooi"; both give the same product.
    method: str = "svd"
    #: Exceptions: {module name or ending of one: rank, or {"rank", "factors", "method"}, or 0 to leave it as it is}. A
    #: full name need not be in ``layers`` and ``tensors``; an ending means those of them that end so.
    modules: dict = field(default_factory=dict)
    #: Allow ranks past break-even, where the factors have more weights than the matrix.
    force: bool = False

    def __post_init__(self):
        if isinstance(self.tensors, list):
            object.__setattr__(self, "tensors", tuple(self.tensors))
        if isinstance(self.layers, (list, range)):
            object.__setattr__(self, "layers", tuple(self.layers))
        problems = []
        if self.layers != "all" and not (isinstance(self.layers, tuple) and all(map(_is_count, self.layers))):
            problems.append(f"layers is {self.layers!r:.100}, expected \"all\" or a list of block numbers from 0")
        problems += self._tensor_problems()
        problems += _option_problems("", {name: getattr(self, name) for name in _OPTIONS})
        if not isinstance(self.modules, dict):
            problems.append(f"modules is {self.modules!r:.100}, expected a mapping of module names to ranks")
        else:
            for key, value in self.modules.items():
                problems += _override_problems(key, value)
        if not isinstance(self.force, bool):
            problems.append(f"force is {self.force!r}, expected true or false")
        if problems:
            raise ConfigError("the decomposition plan cannot be used: " + "; ".join(problems))

    def _tensor_problems(self):
        known = (*GROUPS, *GROUPS["all"])
        if isinstance(self.tensors, str) and self.tensors in GROUPS:
            return []
        if not isinstance(self.tensors, tuple):
            return [f"tensors is {self.tensors!r:.100}, expected one of {', '.join(GROUPS)} or a list of names."
                    + near(self.tensors, known)]
        return [f"tensors has {name!r:.60}, known are {', '.join(GROUPS['all'])}." + near(name, known)
                for name in self.tensors if name not in GROUPS["all"]]

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str = "the plan") -> LrdPlan:
        """A plan from a parsed YAML or JSON mapping; ConfigError for an unknown key."""
        if not isinstance(values, dict):
            raise ConfigError(f"{where} holds {values!r:.80}, expected a mapping such as {{layers: [9, 16], rank: 1}}")
        known = [one.name for one in fields(cls)]
        unknown = [key for key in values if key not in known]
        if unknown:
            raise ConfigError(f"{where} has the unknown key {unknown[0]!r:.60}; known: {', '.join(known)}."
                              + near(unknown[0], known))
        try:
            return cls(**values)
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        """The mapping that :meth:`from_dict` reads."""
        values = {one.name: getattr(self, one.name) for one in fields(self)}
        return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}

    def resolve(self, shapes: Mapping[str, tuple[int, int]]) -> dict[str, Piece]:
        """The matrices that the plan means, with all checks.

        Args:
            shapes: {module name: (out, in)} of the linears of the blocks (:func:`linear_shapes`).

        Returns:
            {module name: :class:`Piece`} in the order of the model; not empty.

        Raises:
            ConfigError: the plan names a block or module that the model does not have, chooses nothing, or has a rank
                past break-even without ``force``; the message lists all of it.
        """
        problems = self._layer_problems(shapes)
        names = GROUPS[self.tensors] if isinstance(self.tensors, str) else self.tensors
        chosen = {path: {} for path in shapes
                  if _last(path) in names and (self.layers == "all" or _layer(path) in self.layers)}
        for key, value in self.modules.items():
            options = value if isinstance(value, dict) else {"rank": value}
            hits = [key] if key in shapes else [path for path in chosen if path.endswith("." + key)]
            if not hits:
                known = list(shapes) + sorted({_last(path) for path in shapes})
                problems.append(f"modules has {key!r:.100}, which names no linear of the "
                                f"{'chosen blocks' if self.layers else 'model'}." + near(key, known))
            for path in hits:
                chosen[path] = options
        pieces = {}
        for path in [path for path in shapes if path in chosen]:
            options = {**{name: getattr(self, name) for name in _OPTIONS}, **chosen[path]}
            if options["rank"] == 0:
                continue
            pieces[path] = Piece(tuple(shapes[path]), **options)
        if not problems and not pieces:
            problems.append("it chooses no matrix; give layers (\"all\" or numbers), or modules by name")
        problems += _rank_problems(pieces, self.force)
        if problems:
            raise ConfigError("the decomposition plan does not fit the model: " + "; ".join(problems))
        return pieces

    def _layer_problems(self, shapes):
        have = sorted({_layer(path) for path in shapes})
        absent = [] if self.layers == "all" else sorted(set(self.layers) - set(have))
        if not absent:
            return []
        return [f"layers has {', '.join(map(str, absent[:5]))}{' and more' if absent[5:] else ''}, but the model has "
                f"the blocks {have[0]} to {have[-1]}" if have else "the model has no numbered blocks"]


def linear_shapes(config: DecoderConfig) -> dict[str, tuple[int, int]]:
    """{module name: (out, in)} of the linears in the blocks of a config; embedding and head are never touched."""
    return {name[:-len(".weight")]: tuple(shape) for name, shape in config.parameter_shapes().items()
            if name.startswith("model.layers.") and name.endswith("_proj.weight")}


def factor_parameters(out: int, inner: int, rank: int, factors: int = 3) -> int:
    """Weights of the factors of an (out, in) matrix: r * (out + in + r), with two factors r * (out + in)."""
    return rank * (out + inner + (rank if factors == 3 else 0))


def break_even(out: int, inner: int, factors: int = 3) -> int:
    """The largest rank whose factors have no more weights than the (out, in) matrix itself."""
    if factors == 2:
        return out * inner // (out + inner)
    total = out + inner
    return (math.isqrt(total * total + 4 * out * inner) - total) // 2


def reduction(config: DecoderConfig, pieces: Mapping[str, Piece]) -> float:
    """Share of all the model's parameters that the pieces remove (a tied head counts once)."""
    return sum(piece.saved for piece in pieces.values()) / config.parameter_count()


def place(layers: int, count: int, placement: str) -> tuple[int, ...]:
    """Numbers of ``count`` blocks of a model with ``layers`` of them.

    "early" takes the first ones, "late" the last, "middle" neighbours around the middle; "spread" keeps them apart and
    away from both ends, as the paper advises (32 blocks, 3 of them: 9, 16, 23), as long as they fit so.
    """
    if placement not in PLACEMENTS:
        raise ConfigError(f"placement is {placement!r}, expected one of {', '.join(PLACEMENTS)}."
                          + near(placement, PLACEMENTS))
    if not 1 <= count <= layers:
        raise ConfigError(f"{count} blocks cannot be chosen among {layers}")
    if placement == "early":
        return tuple(range(count))
    if placement == "late":
        return tuple(range(layers - count, layers))
    if placement == "middle":
        start = (layers - count) // 2
        return tuple(range(start, start + count))
    bounds = ((-(-layers // 4) + 1, layers - 1 - layers // 4), (1, layers - 2), (0, layers - 1))
    for first, last in bounds:
        if last - first >= 2 * (count - 1) and last >= first:
            break
    if count == 1:
        return ((first + last) // 2,)
    return tuple(round(first + (last - first) * i / (count - 1)) for i in range(count))


def plan_for(config: DecoderConfig, share: float, placement: str = "spread", tensors: Any = "all",
             factors: int = 3) -> LrdPlan:
    """The plan that removes a given share of the parameters from few blocks.

    As many blocks as rank 1 needs to get there; then the largest rank out of 1 and the multiples of 8 that still does.

    Args:
        config: DecoderConfig; share: of all parameters, in (0, 1).
        placement, tensors: as in :func:`place` and :class:`LrdPlan`.

    Raises:
        ConfigError: even all blocks at rank 1 are not enough.
    """
    shapes = linear_shapes(config)
    layers = config.num_hidden_layers
    for count in range(1, layers + 1):
        plan = LrdPlan(place(layers, count, placement), tensors, 1, factors)
        found = reduction(config, plan.resolve(shapes))
        if found >= share:
            break
    else:
        raise ConfigError(f"{share:.1%} fewer parameters are not within reach: {tensors} of all {layers} blocks at "
                          f"rank 1 are {found:.1%}")
    rank = 1
    for candidate in range(8, config.hidden_size + 1, 8):
        trial = LrdPlan(plan.layers, tensors, candidate, factors, force=True)
        try:
            enough = reduction(config, trial.resolve(shapes)) >= share
        except ConfigError:
            break
        if not enough:
            break
        rank = candidate
    return LrdPlan(plan.layers, tensors, rank, factors)


def preset(name: str, config: DecoderConfig) -> LrdPlan:
    """The plan of a preset: "lrd-9" removes 9 % of the parameters from blocks apart from each other and from the ends.

    For Llama-2-7B that is the paper's point: blocks 9, 16 and 23 at rank 1, 9.006 % fewer parameters.
    """
    if name not in PRESETS:
        raise ConfigError(f"preset is {name!r}, known: {', '.join(PRESETS)}." + near(name, PRESETS))
    return plan_for(config, PRESETS[name])


def _option_problems(where, options):
    problems = []
    rank, factors, method = (options.get(name, default) for name, default in zip(_OPTIONS, (1, 3, "svd")))
    if not _is_count(rank) or rank < 1:
        problems.append(f"{where}rank is {rank!r:.60}, expected a whole number from 1 on")
    if factors not in (2, 3) or isinstance(factors, bool):
        problems.append(f"{where}factors is {factors!r:.60}, expected 2 or 3")
    if method not in METHODS:
        problems.append(f"{where}method is {method!r:.60}, expected one of {', '.join(METHODS)}."
                        + near(method, METHODS))
    return problems


def _override_problems(key, value):
    where = f"modules[{key!r:.80}] "
    if _is_count(value):
        return []
    if not isinstance(value, dict):
        return [f"{where}is {value!r:.60}, expected a rank (0 leaves the matrix as it is) or a mapping"]
    unknown = [name for name in value if name not in _OPTIONS]
    if unknown:
        return [f"{where}has the unknown key {unknown[0]!r:.60}; known: {', '.join(_OPTIONS)}"]
    return [] if value.get("rank") == 0 else _option_problems(where, value)


def _rank_problems(pieces, force):
    wide, past = [], []
    for path, piece in pieces.items():
        if piece.rank > min(piece.shape):
            wide.append((path, piece))
        elif piece.rank > break_even(*piece.shape, piece.factors) and not force:
            past.append((path, piece))
    problems = []
    if wide:
        path, piece = wide[0]
        problems.append(f"rank {piece.rank} is more than {path} of shape {piece.shape} can have ({min(piece.shape)})"
                        + _more(wide))
    if past:
        path, piece = past[0]
        problems.append(f"rank {piece.rank} is past break-even for {path} of shape {piece.shape}: with {piece.factors} "
                        f"factors, ranks up to {break_even(*piece.shape, piece.factors)} save weights{_more(past)}; "
                        "choose a smaller rank, or force it (force=True, --force)")
    return problems


def _more(found):
    return f" ({len(found) - 1} more of this kind)" if len(found) > 1 else ""


def _last(path):
    return path.rsplit(".", 1)[-1]


def _layer(path):
    return int(path.split(".")[2])


def _is_count(value):
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
