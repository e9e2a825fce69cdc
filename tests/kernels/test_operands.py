"""The names of what travels to the operators: one list in Python, one in C++, held equal; and the table of options."""

import re
from pathlib import Path

import numpy as np
import pytest

from colora_ms.kernels import flat_step, layer_form, operands, options
from colora_ms.kernels.aot import KernelError
from colora_ms.kernels.options import OptionRows

CPU = Path(__file__).resolve().parents[2] / "ops" / "cpu"


def listed(file, name):
    """The entries of ``#define NAME(X) X(a) X(b, c) ...`` in a header, as tuples."""
    text = (CPU / file).read_text().replace("\\\n", " ")
    body = re.search(rf"#define {name}\(X\)(.*)", text).group(1)
    return [tuple(part.strip() for part in entry.split(",")) for entry in re.findall(r"X\(([^)]*)\)", body)]


@pytest.mark.parametrize("file, name, names", [
    ("options.h", "COLORA_WHOLE_OPTIONS", options.WHOLE), ("options.h", "COLORA_REAL_OPTIONS", options.REAL),
    ("operands.h", "COLORA_STEP_ARGUMENTS", flat_step.ARGUMENTS), ("operands.h", "COLORA_EXTRAS", flat_step.EXTRAS),
    *(("form.h", f"COLORA_{name}", getattr(layer_form, name))
      for name in ("NORM_KINDS", "ACTIVATIONS", "LAYER_WHOLE", "LAYER_REAL", "MODEL_WHOLE", "MODEL_REAL")),
])
def test_names_are_the_same_in_the_same_order(file, name, names):
    assert [one for one, in listed(file, name)] == list(names)


def test_layers_and_bases_are_the_same():
    assert listed("operands.h", "COLORA_LAYER_PARTS") == list(operands.LAYER)
    assert listed("operands.h", "COLORA_BASE_FORMATS") == [(name, str(len(tensors)))
                                                           for name, tensors in operands.FORMATS]


def test_no_number_of_an_operand_is_typed_by_hand():
    """Inputs are read by a name of a list or one after another; outputs are few and have their number."""
    for path in (CPU / name for name in ("linear.cpp", "linear_grad.cpp", "stack.h", "layer.h", "feed_forward.h",
                                         "step.cpp", "select.cpp", "contrast.cpp", "adjust.cpp", "details.cpp")):
        assert not re.search(r"\.in\(\s*[0-9at]", path.read_text()), path.name


def test_every_linear_is_found_again():
    for form, (name, tensors) in enumerate(operands.FORMATS):
        for bias in (0, 1):
            for adapter in (0, 1):
                tag = operands.tag_length(form, bias, adapter)
                count = len(tensors) + bias + 3 * adapter
                shapes = [[7], [tag], *[[1]] * count, [9]]
                places, at = operands.read_linear("op", shapes, 1)
                assert (places.form, at) == (name, 2 + count) and at + 1 == len(shapes)
                assert list(places.base) == [*tensors, *["bias"] * bias] and len(places.adapter) == 3 * adapter
                with pytest.raises(KernelError, match="number of operands"):
                    operands.read_linear("op", shapes[:at - 1], 1)
    for wrong in ([], [operands.tag_length(len(operands.FORMATS) - 1, 1, 1) + 1], [2, 2]):
        with pytest.raises(KernelError, match="a linear's tag"):
            operands.read_linear("op", [wrong], 0)


def test_options_begin_with_their_defaults_and_refuse_what_is_out_of_range():
    rows = OptionRows(3)
    assert rows.whole.dtype == np.int32 and rows.real.dtype == np.float32
    for names, array in ((options.WHOLE, rows.whole), (options.REAL, rows.real)):
        defaults = [next(o.default for o in options.OPTIONS if o.name == name) for name in names]
        assert np.array_equal(array, [defaults] * 3)
    rows.put(1, "alpha", 0.25)
    rows.put(slice(None), "budget", [4, 5, 6])
    assert rows.real[1, options.COLUMN["alpha"]] == 0.25 and rows.real[0, options.COLUMN["alpha"]] == 1
    assert list(rows.whole[:, options.COLUMN["budget"]]) == [4, 5, 6]
    for name, value in (("alpha", 0.0), ("alpha", 1.5), ("beta", float("inf")), ("beta", float("nan")), ("top_k", -1),
                        ("top_k", 2**31), ("mode", 12), ("nothing", 1)):
        with pytest.raises(KernelError, match=name):
            rows.put(0, name, value)


def test_what_a_request_asks_for_comes_from_the_fields_that_the_table_names():
    from colora_ms.decoding.options import Contrast, Sampling

    rows, column = OptionRows(3), options.COLUMN
    rows.take(0, "contrast", Contrast(0.3, 0.7, "margin", skip_copies=True))
    rows.take(0, "sampling", Sampling(0.8, 2**40, 0.9, min_p=0.2))
    assert list(rows.whole[:, column["mode"]]) == [11, 0, 0]
    assert list(rows.whole[:, column["top_k"]]) == [2**31 - 1, 0, 0]
    for name, value in (("alpha", 0.3), ("beta", 0.7), ("temperature", 0.8), ("top_p", 0.9), ("min_p", 0.2)):
        assert rows.real[0, column[name]] == np.float32(value)
        assert np.array_equal(rows.real[1], rows.real[2])


def test_flat_linears_are_taken_apart_again():
    """For every form, with and without bias and adapters; the parts are the very same tensors."""
    import itertools

    import mindspore as ms

    linears = []
    for form, bias, adapter in itertools.product(range(len(operands.FORMATS)), (0, 1), (0, 1)):
        assert operands.tag_parts(operands.tag_length(form, bias, adapter)) == (form, bias, adapter)
        sizes = len(operands.FORMATS[form][1]), bias, len(operands.ADAPTER) * adapter
        tensors, own_bias, pair = (tuple(ms.Tensor([0.0]) for _ in range(size)) for size in sizes)
        linears.append(((form, tensors, own_bias), pair))
    found = operands.linears_of(operands.flat_linears(tuple(linears)))
    assert len(found) == len(linears)
    for (base, pair), (wanted, other) in zip(found, linears):
        assert base[0] == wanted[0]
        for mine, theirs in zip((*base[1:], pair), (*wanted[1:], other)):
            assert [id(one) for one in mine] == [id(one) for one in theirs]


def test_the_tags_of_the_formats_are_the_numbers_of_the_bases():
    from colora_ms.models import formats

    known = [one for one in vars(formats).values() if isinstance(one, formats.WeightFormat) and one.tag is not None]
    assert known and all(operands.FORMATS[one.tag][0] == one.name for one in known)
    assert all(("weight_scale" in operands.FORMATS[one.tag][1]) == one.scaled for one in known)
