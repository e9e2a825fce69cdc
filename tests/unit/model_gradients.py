"""Gradients of a model's adapter in graph mode, for the tests that compare them with something else."""

import numpy as np


def gradients(net, handle, ids, noise, slots):
    """Value and gradients of sum(logits * noise) with respect to the trainable Parameters.

    Args:
        net: a Decoder; handle: its adapters.
        ids: (rows, tokens) int32, all real; noise: (rows, tokens, vocab) float32; slots: (rows,) int32 Tensor.

    Returns:
        (float, {Parameter's name: NumPy array}).
    """
    import mindspore as ms
    from mindspore import Tensor, nn

    rows, tokens = ids.shape

    class Loss(nn.Cell):
        def __init__(self):
            super().__init__(auto_prefix=False)
            self.net, self.noise = net, Tensor(noise)

        def construct(self, ids, lengths, slots):
            return (self.net(ids, lengths, slots) * self.noise).sum()

    class Step(nn.Cell):
        def __init__(self):
            super().__init__(auto_prefix=False)
            self.grad = ms.value_and_grad(Loss(), None, handle.trainable_params())

        def construct(self, ids, lengths, slots):
            return self.grad(ids, lengths, slots)

    value, found = Step()(Tensor(ids), Tensor(np.full(rows, tokens, np.int32)), slots)
    return float(value), {p.name: g.asnumpy() for p, g in zip(handle.trainable_params(), found)}
