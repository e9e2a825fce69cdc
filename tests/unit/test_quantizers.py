"""Integer grids: the paper's vector, range search against brute force, asymmetric grids, downcasts and their
inverse."""

import numpy as np
import pytest

from colora_ms.errors import ConfigError
from colora_ms.quantization.grids import BITS, Grid, downcast, round_to_grid, search_range, upcast


def test_the_fixed_point_vector_of_the_paper():
    grid = Grid(4)
    values = np.array([[3.14159, -8.3, 7.9, 0.03]], np.float32)
    stored = downcast(values, np.ones(1, np.float32), np.array([-8]), grid, "fixed")
    assert stored.dtype == np.int8 and stored.tolist() == [[50, -128, 112, 0]]
    assert upcast(stored, [-8], grid, "fixed").tolist() == [[3.125, -8.0, 7.0, 0.0]]
    assert downcast(values, np.ones(1, np.float32), np.array([-8]), grid, "int").tolist() == [[3, -8, 7, 0]]
    assert values[0, 1] == np.float32(-8.3)  # the input is not scaled in place


@pytest.mark.parametrize("bits", BITS)
def test_a_full_range_divides_by_the_largest_positive_integer_and_ties_go_to_even(bits):
    top = 2 ** (bits - 1) - 1
    weight = np.array([[-top, top, 0.5, 1.5, -0.5]], np.float32) * np.float32(0.25)
    scale, low = search_range(weight, Grid(bits), candidates=1)
    assert scale[0] == np.float32(0.25) * (1 if top > 1 else 1.5) and low[0] == -top - 1
    if top > 1:
        assert round_to_grid(weight, scale, low, Grid(bits))[0, 2:].tolist() == [0, min(2, top), 0]


@pytest.mark.parametrize("bits, symmetric, norm", [(4, True, 4.0), (3, True, 2.4), (2, True, 2.0), (2, False, 4.0),
                                                   (3, False, 3.0)])
def test_the_range_search_finds_the_least_error_of_all_thresholds(bits, symmetric, norm):
    rng = np.random.default_rng(bits)
    weight = (rng.standard_normal((7, 33)) ** 3 + (0.0 if symmetric else 1.0)).astype(np.float32)
    grid = Grid(bits, symmetric=symmetric)
    scale, low = search_range(weight, grid, norm)
    for row, s, z in zip(weight.astype(np.float64), scale, low):
        errors = []
        for part in np.arange(1, 101) / 100:
            below, above = min(row.min(), 0) * part, max(row.max(), 0) * part
            if symmetric:
                t, bottom = max(-below, above) / (2 ** (bits - 1) - 1), -(2 ** (bits - 1))
            else:
                t = (above - below) / (2 ** bits - 1)
                bottom = -np.rint(-below / t)
            q = np.clip(np.rint(row / t), bottom, bottom + 2 ** bits - 1)
            errors.append((np.abs(row - q * t) ** norm).sum())
        q = np.clip(np.rint(row / s), z, z + 2 ** bits - 1)
        assert (np.abs(row - q * s) ** norm).sum() <= min(errors) * (1 + 1e-4)


def test_an_asymmetric_grid_holds_zero_and_fits_the_container():
    weight = np.array([[0.1, 2.9, 3.0, 1.4], [-3.0, -0.2, -1.0, -2.0], [0, 0, 0, 0]], np.float32)
    grid = Grid(2, symmetric=False)
    scale, low = search_range(weight, grid, candidates=1)
    assert low.tolist() == [0, -3, 0] and np.isfinite(scale).all() and (scale > 0).all()
    q = round_to_grid(weight, scale, low, grid)
    assert q.tolist() == [[0, 3, 3, 1], [-3, 0, -1, -2], [0, 0, 0, 0]]
    stored = grid.container(q.shape[1]).of_integers(q, scale)
    assert stored.data.shape == (3, 2) and stored.integers().tolist() == q.tolist()
    for how in ("fixed", "float", "int"):
        stored = downcast(weight, scale, low, grid, how)
        error = upcast(stored, low, grid, how) - weight / scale[:, None]
        assert np.abs(error).max() <= {"fixed": 1 / 128, "float": 0, "int": 0.5}[how] + 1e-6


def test_odd_inputs_take_the_int8_container_and_groups_are_rows():
    grid = Grid(4, group=3)
    weight = np.arange(18, dtype=np.float32).reshape(2, 9)
    assert grid.rows(weight).shape == (6, 3) and grid.container(9).of_integers(weight % 7, None).data.shape == (2, 9)
    with pytest.raises(ConfigError, match="group 3 does not divide the 8 inputs of q"):
        grid.group_of(8, "q")
    for bad in (dict(bits=16), dict(bits=True), dict(bits=4, group=-1), dict(bits=8, symmetric=False)):
        with pytest.raises(ConfigError, match="expected|asymmetric"):
            Grid(**bad)


def test_no_rows_and_one_column():
    scale, low = search_range(np.zeros((0, 4), np.float32), Grid(4))
    assert scale.shape == low.shape == (0,)
    scale, _ = search_range(np.array([[-2.0]], np.float32), Grid(4))
    assert abs(round_to_grid(np.array([[-2.0]]), scale, [-8], Grid(4))[0, 0] * scale[0] + 2) < 0.03
