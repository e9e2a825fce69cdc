"""A Cell tree as adapters see it: the table of its modules, and the replacing of Cells in place."""

import importlib
from dataclasses import dataclass
from typing import Callable

import mindspore as ms
from mindspore import mint, nn

from colora_ms.adapters.matching import DEFAULT_TARGETS, Module
from colora_ms.errors import AdapterError
from colora_ms.models import layers as decoder_layers
from colora_ms.models.config import DecoderConfig
from colora_ms.models.low_rank import LowRankLinear
from colora_ms.models.formats import logical_shape, weight_values

#: Names on disk of MindSpore's parameter names.
DISK_NAMES = {"embedding_table": "weight", "embedding_weight": "weight", "gamma": "weight", "beta": "bias"}

#: Cells that can be adapted or saved whole: [(type, kind)]; the first match counts. Integrations put theirs in front.
KINDS = [
    (decoder_layers.Linear, "linear"),
    (LowRankLinear, "linear"),
    (decoder_layers.Embedding, "embedding"),
    (decoder_layers.RMSNorm, "norm"),
    (nn.Dense, "linear"),
    (mint.nn.Linear, "linear"),
    (nn.Embedding, "embedding"),
    (mint.nn.Embedding, "embedding"),
    (nn.LayerNorm, "norm"),
    (mint.nn.LayerNorm, "norm"),
]

#: Last part of the names of output heads, which "all-linear" leaves out.
HEADS = ("lm_head",)

#: {package: module} of libraries whose Cells have an integration here: it is imported when such a Cell is met first.
INTEGRATIONS = {"mindformers": "colora_ms.integrations.mindformers.cells"}


@dataclass(frozen=True)
class Traits:
    """How the Cells of a class differ from ``nn.Dense`` or ``nn.Embedding``; integrations put theirs into ``TRAITS``.

    Attributes:
        sizes: function (Cell) -> (in_features, out_features), or (vocabulary, hidden size); by default from the weight.
        transposed: function (Cell) -> whether the weight is stored (in, out).
        adapted: function (class of adapter Cell, Cell) -> the class to use in its place: one that is called as the base
            Cell is called, and returns what that returns.
        refusal: function (Cell) -> why no adapter can be put on it, or "".
        whole: whether ``modules_to_save`` may copy it.
        heads: names of output heads of this class, as in ``HEADS``.
    """

    sizes: Callable = None
    transposed: Callable = lambda cell: False
    adapted: Callable = lambda kind, cell: kind
    refusal: Callable = lambda cell: ""
    whole: bool = True
    heads: tuple = ()


#: {class: Traits}, looked up along a Cell's classes.
TRAITS = {LowRankLinear: Traits(sizes=lambda cell: (cell.in_features, cell.out_features), whole=False)}

#: The decoder's own Cells: they take (x, slots), all other Cells take x.
ROW_CELLS = (decoder_layers.Linear, LowRankLinear, decoder_layers.Embedding, decoder_layers.RMSNorm)


def takes_slots(cell):
    """Whether the Cell is one of the decoder's, whose rows carry adapter slots."""
    return isinstance(cell, ROW_CELLS)


def kind_of(cell):
    """"linear", "embedding", "norm", or "other"."""
    return next((kind for cls, kind in KINDS if isinstance(cell, cls)), "other")


def traits_of(cell):
    """The :class:`Traits` of a Cell; those of ``nn.Dense`` if nothing is known of its class."""
    return next((TRAITS[cls] for cls in type(cell).__mro__ if cls in TRAITS), Traits())


def is_plain_linear(cell):
    """Whether a linear has one weight (out, in) and is called like ``nn.Dense`` or the decoder's ``Linear``."""
    return kind_of(cell) == "linear" and not any(cls in TRAITS for cls in type(cell).__mro__)


def load_integrations(net):
    """Import the integrations of the libraries that the Cells of a model come from."""
    found = {type(cell).__module__.partition(".")[0] for _, cell in net.cells_and_names()}
    for package in found & set(INTEGRATIONS):
        importlib.import_module(INTEGRATIONS[package])


def sizes_of(cell):
    """(in_features, out_features) of a linear, (vocabulary, hidden size) of an embedding."""
    traits = traits_of(cell)
    if traits.sizes is not None:
        return traits.sizes(cell)
    first, second = _logical_shape(cell, "weight", leaf_parameters(cell)["weight"])
    return (second, first) if kind_of(cell) == "linear" else (first, second)


def leaf_parameters(cell):
    """{name on disk: Parameter} of a leaf Cell's floating-point parameters; a low-rank linear has no "weight"."""
    if isinstance(cell, LowRankLinear):
        return {"bias": cell.bias} if cell.has_bias else {}
    if isinstance(cell, ROW_CELLS):
        return {"weight": cell.weight, "bias": cell.bias} if getattr(cell, "has_bias", False) else {"weight": cell.weight}
    return {DISK_NAMES.get(name, name): value for name, value in cell._params.items()  # pylint: disable=protected-access
            if value is not None}


def base_values(cell):
    """{name on disk: float32 array} of a leaf Cell; integer weights are multiplied out."""
    found = {}
    for name, parameter in leaf_parameters(cell).items():
        found[name] = weight_values(cell) if _has_format(cell, name) else parameter.astype(ms.float32).asnumpy()
    return found


def cells_by_name(net, is_adapter=lambda cell: False):
    """{name: Cell} of all Cells under ``net``, in its order; adapter Cells are not entered."""
    found = {}

    def walk(cell, prefix):
        for name, child in cell._cells.items():  # pylint: disable=protected-access
            if child is None:
                continue
            path = f"{prefix}{name}"
            found[path] = child
            if not is_adapter(child):
                walk(child, path + ".")

    walk(net, "")
    return found


def tied_to(cells):
    """{name: name of the first Cell that holds the same weight} of the Cells with a tied weight.

    Args:
        cells: {name: Cell} in the order of the model.
    """
    owners, found = {}, {}
    for name, cell in cells.items():
        weight = leaf_parameters(cell).get("weight") if kind_of(cell) != "other" else None
        if weight is not None and owners.setdefault(id(weight), name) != name:
            found[name] = owners[id(weight)]
    return found


def module_of(name, cell):
    """The :class:`Module` of one (unwrapped) Cell."""
    kind = kind_of(cell)
    traits = traits_of(cell)
    is_head = kind == "linear" and name.rsplit(".", 1)[-1] in HEADS + traits.heads
    if kind == "other":
        return Module("other")
    shapes = {key: _logical_shape(cell, key, value) for key, value in leaf_parameters(cell).items()}
    in_features, out_features = (0, 0) if kind == "norm" else sizes_of(cell)
    return Module(kind, in_features, out_features, shapes, is_head, traits.refusal(cell), traits.whole)


def default_targets(net):
    """What target_modules=None means for this model, or None."""
    known = isinstance(getattr(net, "config", None), DecoderConfig)
    return list(DEFAULT_TARGETS) if known else None


def _has_format(cell, key):
    """Whether a leaf Cell's parameter is a weight whose format the Cell carries."""
    return key == "weight" and isinstance(cell, (decoder_layers.Linear, decoder_layers.Embedding))


def _logical_shape(cell, key, parameter):
    """The shape of a parameter's values, whatever they are packed into."""
    return logical_shape(cell) if _has_format(cell, key) else tuple(parameter.shape)


def replace(net, name, cell):
    """Put ``cell`` in the place of the Cell called ``name``; parameter names change as MindSpore changes them."""
    parent_name, _, last = name.rpartition(".")
    parent = net
    for part in parent_name.split(".") if parent_name else ():
        parent = parent._cells[part]  # pylint: disable=protected-access
    if isinstance(parent, (nn.CellList, nn.SequentialCell)):
        parent[list(parent._cells).index(last)] = cell  # pylint: disable=protected-access
    elif isinstance(parent, nn.CellDict):
        parent[last] = cell
    else:
        setattr(parent, last, cell)


class ParameterNames:
    """The names of a model's parameters, to be put back after Cells were replaced."""

    def __init__(self, net):
        self.names = [(parameter, parameter.name) for parameter in net.get_parameters()]
        taken = {}
        for parameter, name in self.names:
            if taken.setdefault(name, parameter) is not parameter:
                raise AdapterError(f"two parameters of the model are called {name!r}; give them different names first")

    def restore(self):
        """Give every parameter the name that it had."""
        for parameter, name in self.names:
            if parameter.name != name:
                parameter.name = name


def shared_parameters(net):
    """ids of the Parameters that more than one Cell holds (tied weights)."""
    seen, shared = set(), set()
    for _, cell in net.cells_and_names():
        for parameter in cell._params.values():  # pylint: disable=protected-access
            if parameter is not None:
                (shared if id(parameter) in seen else seen).add(id(parameter))
    return shared


def forget_graphs():
    """Make every compiled Cell compile anew at its next call: the tree under one of them has changed.

    MindSpore asks only for the arguments' types before it runs a compiled graph; its counter of registered hooks is part
    of that question for all Cells, and registering one on an unused Cell raises it.
    """
    nn.ReLU().register_forward_pre_hook(_no_change).remove()


def _no_change(cell, inputs):
    return inputs
