"""How the tensors of linears and layers are laid out for the operators: the one place on this side that knows it.

``ops/cpu/operands.h`` is the other; ``tests/kernels/test_operands.py`` holds the names and their order equal, and no
number of an operand is written down anywhere.

In Python and in graphs a linear is one value, ``(base, adapter)``, made by :func:`linear_of`:

* base: ``(format, tensors, bias)``: the number of a format in ``FORMATS``, its tensors in that order, and ``()`` or
  ``(bias,)``; made by :func:`base_of` or :func:`product_of`. (A plain tuple, because MindSpore's graphs lose the fields
  of a NamedTuple that holds Parameters under a gradient.)
* adapter: ``()`` or ``(down, up, scale)``.

An operator gets, for each linear, a tag and only the tensors that are there. The tag is an int8 tensor whose *length*
says
which: a length is known while a graph is compiled, when nobody sees values. A whole model's tensors, layer after layer,
come to an operator by a table of weights (:mod:`colora_ms.kernels.weight_table`), in the same order.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from mindspore import Tensor

from colora_ms.kernels.aot import ABSENT
from colora_ms.kernels.layer_form import LAYER_REAL, LAYER_WHOLE, form_tensors
from colora_ms.kernels.shapes import require

#: Formats of a base: (name, its tensors); the first ones have the numbers of ``Format`` in ops/cpu/weights.h, which are
#: the tags of ``models.formats``. Column k of an ordered one meets ``x[order[k]]``. A product is the chain of its
#: tensors, the first one meets x.
FORMATS = (("float32", ("weight",)), ("bfloat16", ("weight",)), ("int8", ("weight", "weight_scale")),
           ("int4", ("weight", "weight_scale")), ("float16", ("weight",)), ("q4_0", ("weight",)), ("q4_1", ("weight",)),
           ("q5_0", ("weight",)), ("q5_1", ("weight",)), ("q8_0", ("weight",)), ("q4_k", ("weight",)),
           ("q5_k", ("weight",)), ("q6_k", ("weight",)), ("int4_zero", ("weight", "weight_scale")),
           ("int8_zero", ("weight", "weight_scale")), ("int4_zero_ordered", ("weight", "weight_scale", "order")),
           ("int8_zero_ordered", ("weight", "weight_scale", "order")), ("product", ("inner", "outer")),
           ("product_with_core", ("inner", "core", "outer")))
(FLOAT32, BFLOAT16, INT8, INT4, FLOAT16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K, Q5_K, Q6_K, INT4_ZERO, INT8_ZERO,
 INT4_ZERO_ORDERED, INT8_ZERO_ORDERED, PRODUCT, PRODUCT_WITH_CORE) = range(len(FORMATS))

#: {format: (values, elements of the weight's tensor)} of those that pack several values; the others are one each.
PACKED = {"int4": (2, 1), "int4_zero": (2, 1), "int4_zero_ordered": (2, 1), "q4_0": (32, 18), "q4_1": (32, 20),
          "q5_0": (32, 22), "q5_1": (32, 24), "q8_0": (32, 34), "q4_k": (256, 144), "q5_k": (256, 176),
          "q6_k": (256, 210)}
#: Formats whose scales are pairs, a factor and a zero point.
WITH_ZEROS = ("int4_zero", "int8_zero", "int4_zero_ordered", "int8_zero_ordered")

#: Tensors of a linear's adapters, which come together.
ADAPTER = ("down", "up", "scale")

#: Parts of a layer, in order: (name, kind). A norm is weight and eps, a tensor itself, experts are gate, up and down of
#: each.
LAYER = (("before_attention", "optional_norm"), ("q_proj", "linear"), ("k_proj", "linear"), ("v_proj", "linear"),
         ("q_norm", "optional_norm"), ("k_norm", "optional_norm"), ("k_cache", "tensor"), ("v_cache", "tensor"),
         ("o_proj", "linear"), ("after_attention", "optional_norm"), ("before_mlp", "optional_norm"),
         ("gate_proj", "optional_linear"), ("up_proj", "optional_linear"), ("down_proj", "optional_linear"),
         ("router", "optional_linear"), ("shared_gate", "optional_linear"), ("experts", "experts"),
         ("after_mlp", "optional_norm"))
OPTIONAL = tuple(name for name, kind in LAYER if kind.startswith("optional"))

#: Most tensors of one linear: tag, base, bias, adapters. Least: tag and weight.
MOST_TENSORS = 2 + max(len(tensors) for _, tensors in FORMATS) + len(ADAPTER)
LEAST_TENSORS = 2


def _tag(length):
    return Tensor(np.zeros(length, np.int8))


def tag_length(form: int, bias: int, adapter: int) -> int:
    """Length of a linear's tag; form: a number in ``FORMATS``; bias, adapter: 1 where there is one, else 0."""
    return 1 + (form * 2 + bias) * 2 + adapter


def tag_parts(length: int) -> tuple[int, int, int]:
    """(form, bias, adapter) of a linear's tag: the inverse of :func:`tag_length`; in graphs, too."""
    return (length - 1) // 4, (length - 1) // 2 % 2, (length - 1) % 2


_TAGS = tuple(tuple(tuple(_tag(tag_length(form, bias, adapter)) for adapter in (0, 1)) for bias in (0, 1))
              for form in range(len(FORMATS)))
_TENSORS = tuple(len(tensors) for _, tensors in FORMATS)


# -- in graphs --------------------------------------------------------------------------------------------------------


def base_of(form: int, weight: Tensor, weight_scale: Tensor = ABSENT, bias: Tensor = ABSENT,
            order: Tensor = ABSENT) -> tuple:
    """The base of a linear that is one matrix.

    Args:
        form: the tag of its format (``models.formats.WeightFormat.tag``), below PRODUCT; weight, weight_scale, bias,
            order: as for :func:`colora_ms.kernels.multi_lora_linear`.
    """
    bias = () if bias.ndim == 0 else (bias,)
    if _TENSORS[form] == 3:
        return (form, (weight, weight_scale, order), bias)
    if _TENSORS[form] == 2:
        return (form, (weight, weight_scale), bias)
    return (form, (weight,), bias)


def product_of(inner: Tensor, outer: Tensor, core: Tensor = ABSENT, bias: Tensor = ABSENT) -> tuple:
    """The base of a linear that is a product: inner (r, in), outer (out, r'), core (r', r) or ``ABSENT`` (then r' =
    r)."""
    bias = () if bias.ndim == 0 else (bias,)
    if core.ndim == 0:
        return (PRODUCT, (inner, outer), bias)
    return (PRODUCT_WITH_CORE, (inner, core, outer), bias)


def without_bias(base: tuple) -> tuple:
    """A base without its bias."""
    return (base[0], base[1], ())


def linear_of(base: tuple, down: Tensor = ABSENT, up: Tensor = ABSENT, scale: Tensor = ABSENT) -> tuple:
    """A linear: its base, and its adapters unless all three are ``ABSENT``."""
    if down.ndim == 0 and up.ndim == 0 and scale.ndim == 0:
        return (base, ())
    return (base, (down, up, scale))


def flat_base(base: tuple) -> tuple[Tensor, ...]:
    """The tensors of a base alone for an operator, its tag first."""
    return flat_linears(((base, ()),))


def flat_linears(linears: tuple) -> tuple[Tensor, ...]:
    """The tensors of linears for an operator, one linear after another."""
    flat = ()
    for base, adapter in linears:
        form, tensors, bias = base
        flat = flat + (_TAGS[form][len(bias)][1 if len(adapter) > 0 else 0],) + tensors + bias + adapter
    return flat


def linears_of(flat: tuple) -> tuple:
    """The linears whose tensors these are: the inverse of :func:`flat_linears`."""
    linears: tuple = ()
    at = 0
    while at < len(flat):
        form, bias, adapter = tag_parts(flat[at].shape[0])
        base_end = at + 1 + _TENSORS[form]
        bias_end = base_end + bias
        end = bias_end + len(ADAPTER) * adapter
        linears = linears + (((form, flat[at + 1:base_end], flat[base_end:bias_end]), flat[bias_end:end]),)
        at = end
    return linears


# -- for tables of weights --------------------------------------------------------------------------------------------


def flat_layer(form: Mapping[str, float], parts: Mapping[str, tuple]) -> tuple[Tensor, ...]:
    """The tensors of a layer in a table of weights.

    Args:
        form: the layer's numbers (``layer_form.LAYER_WHOLE`` and ``LAYER_REAL``) without ``parts``.
        parts: {name of ``LAYER``: what it is}: norms (weight, eps), linears as of :func:`linear_of`, caches (tensor,),
            experts a tuple of linears; what is not there is left out.
    """
    mask = sum(1 << i for i, name in enumerate(OPTIONAL) if name in parts)
    flat = form_tensors(LAYER_WHOLE, LAYER_REAL, {**form, "parts": mask})
    for name, kind in LAYER:
        if name not in parts:
            continue
        if kind in ("linear", "optional_linear"):
            flat += flat_linears((parts[name],))
        else:
            flat += flat_linears(parts[name]) if kind == "experts" else tuple(parts[name])
    return flat


# -- while a graph is compiled ----------------------------------------------------------------------------------------


class Places(NamedTuple):
    """Where the tensors of a linear stand among an operator's inputs.

    Attributes:
        form: the name of its format; base: {name: place} of its tensors and its bias; adapter: {name: place}, or {}.
    """

    form: str
    base: dict
    adapter: dict

    def of(self, values: tuple) -> dict:
        """{name: value} of all its tensors, given one value an input."""
        return {name: values[place] for name, place in (*self.base.items(), *self.adapter.items())}


def read_linear(op: str, shapes: tuple, at: int) -> tuple[Places, int]:
    """The linear whose tag is input ``at``, and the place behind it.

    Raises:
        KernelError: there is no tag, or tensors are missing.
    """
    tag = _tag_at(op, shapes, at, tag_length(len(FORMATS) - 1, 1, 1), "a linear's tag")
    form, has_bias, has_adapter = tag_parts(tag)
    name, tensors = FORMATS[form]
    names = tensors + (("bias",) if has_bias else ())
    adapter = ADAPTER if has_adapter else ()
    end = at + 1 + len(names) + len(adapter)
    require(end <= len(shapes), op, "number of operands", len(shapes), f"at least {end}, for a linear of {name}")
    places = range(at + 1, end)
    return Places(name, dict(zip(names, places)), dict(zip(adapter, places[len(names):]))), end


def _tag_at(op, shapes, at, most, what):
    require(at < len(shapes), op, "number of operands", len(shapes), f"one more, {what}")
    shape = list(shapes[at])
    require(len(shape) == 1 and 1 <= shape[0] <= most, op, f"operand {at}", shape, f"{what}: 1 to {most} numbers")
    return shape[0]
