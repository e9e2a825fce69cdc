"""Step 11, in a process of its own: how long our operators and the built-in products take, beside the model's figures.

A graph holds a chain of launches, each waiting for the one before; a time is that of many such graphs divided by the
launches in them, so that what a graph costs the host counts little: the smallest of several rounds.
"""
import argparse
import time

import child
import numpy as np
import predictions

HIDDEN, RANK, CHAIN = 4096, 16, 16


def microseconds(ms, cell, arguments, target, launches, rounds):
    """Of one launch of the chain: the best round."""
    cell(*arguments).asnumpy()  # compiled
    best = float("inf")
    for _ in range(rounds):
        began = time.perf_counter()
        for _ in range(launches):
            out = cell(*arguments)
        if target == "Ascend":
            ms.runtime.synchronize()
        else:
            out.asnumpy()
        best = min(best, (time.perf_counter() - began) / launches / CHAIN)
    return best * 1e6


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--target", default="Ascend")
    parser.add_argument("--quick", action="store_true", help="small, few")
    parser.add_argument("--cores", type=int, default=48, help="vector cores of the chip, for the model")
    options = parser.parse_args()
    import mindspore as ms
    from mindspore import Tensor, nn, ops

    from colora_ms.kernels import ascend

    ms.set_context(mode=ms.GRAPH_MODE)
    ms.set_device(options.target)
    ascend.load(options.target)

    class Lora(nn.Cell):
        def construct(self, x, slots, down, up, scale, y):
            for _ in range(CHAIN):
                y = ascend.multi_lora(x, slots, down, up, scale, y)
            return y

    class Product(nn.Cell):
        def __init__(self):
            super().__init__()
            self.product = ops.MatMul(False, True)

        def construct(self, x, weight):
            for _ in range(CHAIN):
                x = self.product(x, weight)
            return x

    hidden, launches, rounds = (256, 1, 1) if options.quick or options.target == "CPU" else (HIDDEN, 20, 5)
    rng = np.random.default_rng(0)

    def half(*shape):
        return Tensor((rng.standard_normal(shape) * hidden ** -0.5).astype(np.float16))

    weight = half(hidden, hidden)
    for batch in (1, 8, 32):
        x = half(batch, hidden)
        lora = (x, Tensor(np.arange(batch, dtype=np.int32) % 2), half(2, RANK, hidden), half(2, RANK, hidden),
                Tensor(np.ones(2, np.float32)), half(batch, hidden))
        with child.reported(f"multi_lora, {batch} rows, {hidden}, rank {RANK}") as line:
            line["measured_us"] = microseconds(ms, Lora(), lora, options.target, launches, rounds)
            line["modelled_us"] = predictions.multi_lora(batch, hidden, RANK, options.cores)
        with child.reported(f"MatMul, {batch} rows, {hidden} x {hidden}") as line:
            line["measured_us"] = microseconds(ms, Product(), (x, weight), options.target, launches, rounds)
            line["modelled_us"] = predictions.product(batch, hidden)


if __name__ == "__main__":
    main()
