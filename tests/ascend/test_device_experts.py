"""Routed experts in the device step: the stand-ins of the operators around them against NumPy, the wrong calls that
they refuse, mistakes that are seen, launches, refusals by name; and the models' steps in a process of their own."""
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

ms = pytest.importorskip("mindspore")
from mindspore import Tensor, nn, ops  # noqa: E402

from colora_ms.adapters import LoraConfig, inject  # noqa: E402
from colora_ms.kernels import ascend_builtin as device  # noqa: E402
from colora_ms.kernels.launches import launches_of  # noqa: E402
from colora_ms.models import device_form  # noqa: E402
from colora_ms.models.device_feed_forward import DeviceExperts, why_not_experts  # noqa: E402
from golden_experts import opened  # noqa: E402
from test_device_step import process  # noqa: E402
from test_rehearsal import HALF, back, close, loaded, random, tensor  # noqa: E402, F401
from test_rehearsal_refusals import B, F, call, ints, refused, t  # noqa: E402

HERE = Path(__file__).resolve().parent


class Top(nn.Cell):
    def __init__(self, count):
        super().__init__()
        self.count = count

    def construct(self, logits):
        return device.top_experts(logits, self.count)


class Around(nn.Cell):
    """Tokens to their experts and back, with nothing between."""

    def __init__(self, count):
        super().__init__()
        self.count = count

    def construct(self, x, experts, shares):
        rows, places, sizes = device.by_expert(x, experts, self.count)
        return rows, places, sizes, device.from_experts(rows, places, shares)


class Back(nn.Cell):
    def construct(self, y, places, shares):
        return device.from_experts(y, places, shares)


class Scaled(nn.Cell):
    def construct(self, x, factors):
        return device.scaled_rows(x, factors)


# -- the operators -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", (*HALF, ms.float32))
def test_the_largest_shares_and_whose_they_are(random, dtype):  # noqa: F811
    logits = tensor(random.normal(size=(7, 9)) * 4, dtype)
    shares, experts = Top(3)(logits)
    chances = np.exp(back(logits))
    chances /= chances.sum(-1, keepdims=True)
    order = np.argsort(-chances, -1, kind="stable")[:, :3]
    assert shares.dtype == dtype and experts.dtype == ms.int32
    np.testing.assert_array_equal(experts.asnumpy(), order)
    close(shares, np.take_along_axis(chances, order, 1), dtype)


@pytest.mark.parametrize("dtype", (*HALF, ms.float32))
def test_tokens_by_expert_and_back(random, dtype):  # noqa: F811
    x, shares = tensor(random.normal(size=(6, 20)), dtype), tensor(random.uniform(0.1, 1, (6, 2)), dtype)
    experts = np.array([[4, 1], [0, 4], [1, 0], [4, 3], [1, 4], [3, 1]], np.int32)  # none has expert 2
    rows, places, sizes, again = Around(5)(x, Tensor(experts), shares)
    order = np.argsort(experts.reshape(-1), kind="stable")
    np.testing.assert_array_equal(back(rows), back(x)[order // 2])
    np.testing.assert_array_equal(places.asnumpy()[order], np.arange(12))
    assert sizes.asnumpy().tolist() == [2, 4, 0, 2, 4] and sizes.dtype == ms.int32
    close(again, back(x) * back(shares).sum(1, keepdims=True), dtype)
    close(Scaled()(x, shares[:, :1]), back(x) * back(shares)[:, :1], dtype)


@pytest.mark.parametrize("words, cell, arguments", [
    ("k is 6", Top(6), (t(3, 5),)),
    ("k is 0|'k'", Top(0), (t(3, 5),)),
    ("2D or 3D|x has shape", Top(1), (t(5),)),
    ("x has shape", Top(1), (t(1, 3, 5),)),
    ("dtype", Top(1), (ints(1, 2),)),
    ("expert_idx", Around(5), (t(3, 8), Tensor(np.zeros((3, 2), np.int64)), t(3, 2))),
    ("first dim|expert_idx has shape", Around(5), (t(3, 8), Tensor(np.zeros((4, 2), np.int32)), t(3, 2))),
    ("probs has dtype Float32", Back(), (t(6, 8), ints(*range(6)), t(3, 2, dtype=F))),
    ("permuted_tokens has shape", Back(), (t(6, 8), ints(*range(6)), t(2, 2))),
    ("sorted_indices has shape", Back(), (t(6, 8), ints(*range(5)), t(3, 2))),
    ("sorted_indices", Back(), (t(6, 8), Tensor(np.arange(6)), t(3, 2))),
    ("probs has shape", Back(), (t(1026, 8), ints(*range(1026)), t(2, 513))),
    ("y has shape|shape", Scaled(), (t(3, 8), t(3, 8))),
    ("y has dtype|dtype|type", Scaled(), (t(3, 8), t(3, 1, dtype=B))),
])
def test_wrong_calls(words, cell, arguments):
    refused(words, cell, *arguments)


def test_what_the_operators_check_when_they_run():
    def top(x):
        held = np.zeros((2, 2), np.int32)
        return call("MoeGatingTopKSoftmax", np.asarray(x, np.float32), np.int64(2), np.zeros((2, 2), np.float32), held,
                    held.copy())

    def around(experts):
        x, some = np.ones((3, 8), np.float16), np.zeros(4, np.int32)
        return call("MoeInitRoutingV2", x, np.array(experts, np.int32), np.int64(4), np.ones((6, 8), np.float16),
                    np.zeros(6, np.int32), some, some.copy())

    def unsorted(places):
        y = np.ones((6, 8), np.float16)
        return call("MoeTokenUnpermute", y, np.array(places, np.int32), np.ones((3, 2), np.float16), y[:3].copy())

    assert top([[1, 2, 3], [4, 5, 6]]) == ""
    assert "x[1, 2] is nan, expected finite numbers" in top([[1, 2, 3], [4, 5, np.nan]])
    assert "x[0, 0] is inf" in top([[np.inf, 2, 3], [4, 5, 6]])
    assert around([[0, 3], [1, 2], [3, 0]]) == ""
    assert "expert_idx[1, 0] is 4, expected 0..3" in around([[0, 3], [4, 2], [3, 0]])
    assert "expert_idx[2, 1] is -1" in around([[0, 3], [1, 2], [3, -1]])
    assert unsorted([5, 0, 1, 2, 3, 4]) == ""
    assert "sorted_indices has 1 twice, also at 3" in unsorted([5, 0, 1, 1, 3, 4])
    assert "sorted_indices[0] is 6, expected 0..5" in unsorted([6, 0, 1, 2, 3, 4])


# -- experts alone -----------------------------------------------------------------------------------------------------


class Alone(nn.Cell):
    """Experts without a layer around them."""

    def __init__(self, experts):
        super().__init__()
        self.experts = experts

    def construct(self, h):
        return self.experts(h, ())


def made(mlp, h):
    """What routed experts make of h (tokens, hidden), in float64, and each token's experts."""
    def weight(cell):
        return cell.base_values()["weight"].astype(np.float64)

    def gated(one, x):
        gate, up = x @ weight(one.gate_linear).T, x @ weight(one.up_linear).T
        return gate / (1 + np.exp(-gate)) * up @ weight(one.down_linear).T

    shares = np.exp(h @ weight(mlp.gate).T)
    shares /= shares.sum(-1, keepdims=True)
    chosen = np.argsort(-shares, -1)[:, :mlp.per_token]
    shares = np.take_along_axis(shares, chosen, 1)
    if mlp.normalised:
        shares /= shares.sum(-1, keepdims=True)
    out = np.stack([sum(share * gated(mlp.experts[int(expert)], x) for share, expert in zip(*one))
                    for x, one in zip(h, zip(shares, chosen))])
    if mlp.shares:
        out += gated(mlp.shared_expert, h) / (1 + np.exp(-h @ weight(mlp.shared_expert_gate).T))
    return out, chosen


def off(got, want):
    """The largest error, in roundings of the largest number."""
    unit = 2.0 ** -11 if got.dtype == ms.float16 else 2.0 ** -8
    return np.abs(back(got) - want).max() / (np.abs(want).max() * unit)


@pytest.fixture(scope="module")
def routed(loaded):  # noqa: F811
    """RoutedMlp of five experts of which a token has two, normalised, and a shared one."""
    return opened("qwen2_moe_norm")[0].model.layers[0].feed_forward


def test_every_launch_is_one_whatever_the_experts_and_tokens(random, routed):  # noqa: F811
    kinds = {"Cast": 4, "MatMul": 4, "NanToNum": 1, "MoeGatingTopKSoftmax": 1, "SumExt": 1, "Div": 1,
             "MoeInitRoutingV2": 1, "GroupedMatmulV4": 2, "Swiglu": 2, "MoeTokenUnpermute": 1, "Sigmoid": 1, "Mul": 1,
             "Add": 1}
    many = opened("qwen2_moe_norm", num_experts=23, num_experts_per_tok=7)[0].model.layers[0].feed_forward
    few = opened("mixtral", num_hidden_layers=1)[0].model.layers[0].feed_forward
    for mlp, tokens, dtype in ((routed, 6, ms.float16), (routed, 6, ms.bfloat16), (many, 33, ms.float16),
                               (few, 6, ms.float16)):
        cell, h = Alone(DeviceExperts("x", mlp, dtype)), tensor(random.normal(size=(tokens, 32)), dtype)
        assert off(cell(h), made(mlp, back(h))[0]) < 8
        found = launches_of(cell)
        if mlp is few:  # no shared expert
            kinds = {**kinds, "Cast": 3, "MatMul": 1, "Swiglu": 1}
            kinds = {name: count for name, count in kinds.items() if name not in ("Sigmoid", "Mul", "Add")}
        assert found.by_name() == kinds and found.copied_bytes() == 0 and found.views_refused == ()
        banks = [name for one in found.launches for name, _ in one.reads]
        assert banks.count("experts.gate_up") == banks.count("experts.down") == 1, "each bank is read once"


def test_a_row_is_its_own(random, routed):  # noqa: F811
    """Other neighbours change no bit of a row here; a row that is no number spoils itself alone."""
    cell = Alone(DeviceExperts("x", routed, ms.float16))
    h = random.normal(size=(6, 32))
    first = cell(tensor(h, ms.float16)).asnumpy()
    h[2:] = random.normal(size=(4, 32)) * 3
    assert np.array_equal(cell(tensor(h, ms.float16)).asnumpy()[:2], first[:2])
    h[2], h[3, 5], h[4, 1] = np.nan, np.inf, -np.inf
    again = cell(tensor(h, ms.float16)).asnumpy()
    assert np.array_equal(again[:2], first[:2]) and np.isfinite(again[5]).all()
    assert all(not np.isfinite(again[row]).any() for row in (2, 3, 4))


class OthersShares(DeviceExperts):
    def route(self, wide):
        shares, experts = DeviceExperts.route(self, wide)
        return ops.flip(shares, (0,)), experts


class NotNormalised(DeviceExperts):
    def route(self, wide):
        return device.top_experts(device.linear(wide, self.router), self.per_token)


class Unsorted(DeviceExperts):
    """An expert's rows do not stand beside each other."""

    def grouped(self, rows, sizes):
        return DeviceExperts.grouped(self, ops.flip(rows, (0,)), sizes)


class Ends(DeviceExperts):
    """Where groups end, given as their sizes."""

    def grouped(self, rows, sizes):
        return DeviceExperts.grouped(self, rows, ops.cumsum(sizes, 0))


class LastMissing(DeviceExperts):
    """Groups that do not cover all rows."""

    def grouped(self, rows, sizes):
        return DeviceExperts.grouped(self, rows, ops.relu(sizes - 1))


@pytest.mark.parametrize("planted", [OthersShares, NotNormalised, Unsorted, Ends, LastMissing])
def test_a_planted_mistake_is_seen(random, routed, planted):  # noqa: F811
    h = tensor(random.normal(size=(6, 32)), ms.float16)
    want, chosen = made(routed, back(h))
    assert len(np.unique(chosen)) > 3 and np.bincount(chosen.reshape(-1)).max() > 2
    cell = Alone(planted("x", routed, ms.float16))
    if planted is Ends:
        refused(r"group_list\[\d\] is \d+, expected a count", cell, h)
        return
    with np.errstate(invalid="ignore"):
        assert not off(cell(h), want) < 64  # what a group does not cover is NaN


def test_experts_that_were_written_are_read_again(routed):
    experts = DeviceExperts("x", routed, ms.float16)
    weight = routed.experts[3].up_linear.weight
    before, kept = weight.asnumpy().copy(), experts.gate_up.asnumpy().copy()
    np.testing.assert_array_equal(kept[3, :, 24:], before.T.astype(np.float16))
    weight.requires_grad = True
    try:
        weight.asnumpy()[...] = 0.25
        experts.refresh(False)
        np.testing.assert_array_equal(experts.gate_up.asnumpy(), kept)
        experts.refresh(True)
        assert (experts.gate_up.asnumpy()[3, :, 24:] == 0.25).all()
        assert np.array_equal(experts.gate_up.asnumpy()[3, :, :24], kept[3, :, :24])
    finally:
        weight.asnumpy()[...], weight.requires_grad = before, False


# -- models ------------------------------------------------------------------------------------------------------------


def with_adapter(case, targets, **options):
    decoder = opened(case)[0]
    inject(decoder, LoraConfig(r=2, target_modules=targets, **options))
    return decoder


def test_who_has_a_device_step(mindspore):
    for case in ("mixtral", "qwen2_moe", "qwen2_moe_norm", "qwen3_moe"):
        for kept in ("float32", "bfloat16"):
            assert device_form.why_not(opened(case, kept)[0]) == ""
    assert device_form.why_not(with_adapter("qwen2_moe", r".*(self_attn|mlp|shared_expert)\.[a-z]+_proj")) == ""
    reasons = {
        "window=5": opened("mixtral", sliding_window=5)[0],
        "layer 1's gate is kept as int8; the device's grouped products take float32 or bfloat16":
            opened("qwen3_moe", "int8")[0],
        "layer 1's experts.0.gate_proj is a LoraLinear; the device step has adapters on attention and the shared":
            with_adapter("qwen3_moe", ["gate_proj"]),
        "layer 1's gate is a LoraLinear": with_adapter("qwen3_moe", ["gate"]),
        "layer 0's shared_expert_gate is a LoraLinear": with_adapter("qwen2_moe", ["shared_expert_gate"]),
        "layer 0's experts.0.gate_proj has 32 inputs and 33000 outputs":
            opened("qwen2_moe_norm", moe_intermediate_size=33000, num_experts=1, num_experts_per_tok=1)[0]}
    for words, decoder in reasons.items():
        assert words in device_form.why_not(decoder), device_form.why_not(decoder)
    assert why_not_experts(SimpleNamespace(count=1025, per_token=2)).startswith("1025 experts, 2 a token; the device's")
    assert "take 1024, 512 a token" in why_not_experts(SimpleNamespace(count=1000, per_token=513))


@pytest.fixture(scope="module")
def rehearsed(emulator):
    return json.loads(process(HERE / "experts_step.py").splitlines()[-1])


@pytest.mark.parametrize("case, sparse, shared, normed", [
    ("mixtral", 1, False, True), ("qwen2_moe", 2, True, False), ("qwen2_moe_norm", 1, True, True),
    ("qwen3_moe", 1, False, True)])
def test_models_with_experts_in_a_rehearsal(rehearsed, case, sparse, shared, normed):
    """Logits and tokens of requests with and without adapters and of a contrast, against the half-type reference; and
    against transformers where the config is the golden's, elsewhere against the Cells in float32."""
    found = rehearsed[case]
    assert found["cache"] == "DeviceCache" and ("golden" in found) == case.startswith("qwen2")
    for kind in ("half",) if "golden" in found else ("half", "cells"):
        one = found[kind]
        assert one["logits"] + one["unsettled"] == 35 and one["logits"] >= 24, (kind, one)
        # the norms of heads make scores of which a rounding is felt: the half-type reference is as far from float32
        assert one["off"] <= (64 if (kind, case) == ("cells", "qwen3_moe") else 16), (kind, one)
        assert one["decided"] == one["equal"] > 15 and one["possible"] == one["steps"] == 30, (kind, one)
    if "golden" in found:  # as far as the answer goes, which transformers made, too
        assert len(found["golden"]) == 5
        assert all(far < 16 * 2.0 ** -11 and token == want for far, token, want in found["golden"]), found["golden"]
    dense = found["layers"] - sparse
    for phase in ("prefill True", "increment True"):
        for counts, copied, views in found[phase]:
            assert copied == 0 and views == []
            assert counts["GroupedMatmulV4"] == 2 * sparse and counts["MoeInitRoutingV2"] == sparse
            assert counts["MoeGatingTopKSoftmax"] == counts["MoeTokenUnpermute"] == counts["NanToNum"] == sparse
            assert counts["Swiglu"] == dense + sparse * (1 + shared)
            assert counts.get("Div", 0) == counts.get("SumExt", 0) == sparse * normed
            assert counts.get("Sigmoid", 0) == counts.get("Mul", 0) == sparse * shared
            assert counts["Cast"] == 1 + sparse * (3 + shared)
    assert all(counts["MultiLora"] == 2 * found["layers"] + 2 * dense + 2 * sparse * shared
               for counts, _, _ in found["increment True"])
