"""The second half of a decoder's layer: a gated MLP, or routed experts."""

import mindspore as ms
from mindspore import Tensor, nn, ops

from colora_ms.kernels import geglu, multi_lora_linear, swiglu


class Mlp(nn.Cell):
    """``down(act(gate(x)) * up(x))``.

    Args:
        build: the ``Builder``; prefix: the Cell's name in the model; parts: names of gate, up and down below it;
        activation: "silu" or "gelu_tanh".
    """

    def __init__(self, build, prefix, parts=("gate_proj", "up_proj", "down_proj"), activation="silu"):
        super().__init__()
        self.parts_names = parts
        self.gelu = activation == "gelu_tanh"
        for part in parts:
            setattr(self, part, build.linear(f"{prefix}.{part}"))

    @property
    def gate_linear(self) -> nn.Cell:
        """The gate, whatever its name."""
        return getattr(self, self.parts_names[0])

    @property
    def up_linear(self) -> nn.Cell:
        """The other factor."""
        return getattr(self, self.parts_names[1])

    @property
    def down_linear(self) -> nn.Cell:
        """What the product goes through."""
        return getattr(self, self.parts_names[2])

    def construct(self, x: Tensor, rows: tuple) -> Tensor:
        """x: (rows, tokens, hidden) float32 -> the same shape."""
        if self.gate_linear.fusible and self.up_linear.fusible:
            gate, up = multi_lora_linear(x, rows[0], self.gate_linear.operands(), self.up_linear.operands())
        else:
            gate, up = self.gate_linear(x, rows), self.up_linear(x, rows)
        return self.down_linear(geglu(gate, up) if self.gelu else swiglu(gate, up), rows)

    def cells(self) -> list:
        """Its linears: gate, up and down."""
        return [self.gate_linear, self.up_linear, self.down_linear]

    def parts(self) -> dict:
        """Its parts of a layer, see ``kernels.operands.flat_layer``."""
        return {name: cell.operands() for name, cell in zip(("gate_proj", "up_proj", "down_proj"), self.cells())}

    def numbers(self) -> dict:
        """Its numbers of a layer's form, see ``kernels.layer_form``."""
        return {"experts": 0, "experts_per_token": 0, "normalised": 0}


class RoutedMlp(nn.Cell):
    """Experts of which each token has a few (arXiv 2101.03961, 2401.04088), and maybe one that every token has.

    A token's shares are the softmax over all experts, of which the largest ones stay; they are divided by their sum
    where the config says so. Here every expert sees every token, in graphs that cannot group tokens; the fused step
    reads each expert for its own tokens only.
    """

    def __init__(self, config, build, prefix, parts, activation):
        super().__init__()
        self.count, self.per_token = config.experts, config.experts_per_token
        self.normalised = config.normalised_experts
        self.gate = build.linear(f"{prefix}.gate")
        self.experts = nn.CellList([Mlp(build, f"{prefix}.experts.{i}", parts, activation) for i in range(self.count)])
        self.shares = config.shared_size > 0
        if self.shares:
            self.shared_expert = Mlp(build, f"{prefix}.shared_expert", activation=activation)
            self.shared_expert_gate = build.linear(f"{prefix}.shared_expert_gate")

    def construct(self, x: Tensor, rows: tuple) -> Tensor:
        """x: (rows, tokens, hidden) float32 -> the same shape."""
        shares = ops.softmax(self.gate(x, rows), -1)  # (rows, tokens, experts)
        _, chosen = ops.topk(ops.stop_gradient(shares), self.per_token)
        mask = ops.one_hot(chosen, self.count, Tensor(1.0, ms.float32), Tensor(0.0, ms.float32)).sum(-2)
        shares = shares * mask
        if self.normalised:
            shares = shares / shares.sum(-1, keepdims=True)
        out = ops.zeros_like(x)
        for i, expert in enumerate(self.experts):
            out = out + shares[..., i:i + 1] * expert(x, rows)
        if self.shares:
            out = out + ops.sigmoid(self.shared_expert_gate(x, rows)) * self.shared_expert(x, rows)
        return out

    def cells(self) -> list:
        """All linears."""
        found = [self.gate]
        for expert in self.experts:
            found += expert.cells()
        return found + self.shared_expert.cells() + [self.shared_expert_gate] if self.shares else found

    def parts(self) -> dict:
        """As of :class:`Mlp`; the shared expert stands in the MLP's place."""
        found = {"router": self.gate.operands(),
                 "experts": tuple(cell.operands() for expert in self.experts for cell in expert.cells())}
        if self.shares:
            found.update(self.shared_expert.parts(), shared_gate=self.shared_expert_gate.operands())
        return found

    def numbers(self) -> dict:
        """As of :class:`Mlp`."""
        return {"experts": self.count, "experts_per_token": self.per_token, "normalised": int(self.normalised)}
