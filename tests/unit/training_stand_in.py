"""A model of a few hundred weights with the decoder's interface, and its loss in NumPy float64."""

import numpy as np

from mindspore import Parameter, Tensor, nn, ops

from colora_ms.adapters.dropout import Dropout
from colora_ms.models.layers import Linear
from colora_ms.training.data import IGNORE, EncodedExample

VOCAB, HIDDEN, RANK = 20, 8, 4


class TinyDecoder(nn.Cell):
    """x = embedding + 0.3 * sum of those before; x + up tanh(down x); head. Trains down and up."""

    max_positions = 64

    def __init__(self, seed=0, dropout=0.0, plain_head=True):
        super().__init__(auto_prefix=False)
        random = np.random.default_rng(seed)

        def value(*shape):
            return Tensor(random.normal(size=shape).astype(np.float32) * np.float32(0.4))
        self.embed = Parameter(value(VOCAB, HIDDEN), name="embed", requires_grad=False)
        self.down = Parameter(value(1, RANK, HIDDEN), name="layer.lora_A")
        self.up = Parameter(value(1, HIDDEN, RANK), name="layer.lora_B")
        self.lm_head = Linear(Parameter(value(VOCAB, HIDDEN), name="head", requires_grad=False), HIDDEN, VOCAB)
        self.lm_head.weight.name = "head"
        self.lm_head.has_bias = not plain_head
        self.dropout = Dropout(dropout, seed, "layer") if dropout else None

    def hidden(self, ids, lengths, slots):
        x = ops.gather(self.embed, ids, 0)
        x = x + 0.3 * ops.cumsum(x, 1)
        inner = x if self.dropout is None else self.dropout(x)
        return x + ops.matmul(ops.tanh(ops.matmul(inner, self.down[0].T)), self.up[0].T)

    def construct(self, ids, lengths, slots):
        return self.lm_head(self.hidden(ids, lengths, slots), (slots, lengths))


def numpy_loss(values, batch):
    """(loss_sum, count) of ``TinyDecoder`` in float64; values: {name: array}."""
    values = {name: np.asarray(item, np.float64) for name, item in values.items()}
    x = values["embed"][batch.ids]
    x = x + 0.3 * np.cumsum(x, 1)
    down, up = values["layer.lora_A"][0], values["layer.lora_B"][0]
    x = x + np.tanh(x @ down.T) @ up.T
    logits = x @ values["head"].T
    logits = logits - logits.max(-1, keepdims=True)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    mask = batch.labels != IGNORE
    picked = np.take_along_axis(log_p, np.maximum(batch.labels, 0)[..., None], -1)[..., 0]
    return -(picked * mask).sum(), mask.sum()


def numpy_gradients(values, batches, names=("layer.lora_A", "layer.lora_B"), step=1e-5):
    """Central differences of the summed loss of ``batches`` in float64."""
    values = {name: np.asarray(item, np.float64).copy() for name, item in values.items()}
    grads = {}
    for name in names:
        grads[name] = np.zeros_like(values[name])
        for index in np.ndindex(values[name].shape):
            kept = values[name][index]
            sums = []
            for sign in (1, -1):
                values[name][index] = kept + sign * step
                sums.append(sum(numpy_loss(values, batch)[0] for batch in batches))
            values[name][index] = kept
            grads[name][index] = (sums[0] - sums[1]) / (2 * step)
    return grads


def values_of(net):
    return {item.name: item.asnumpy().copy() for item in net.get_parameters()}


def counting_items(count, seed=0):
    """Examples that count upwards modulo the vocabulary: learnable, of lengths 4 to 11."""
    random = np.random.default_rng(seed)
    items = []
    for index in range(count):
        length = int(random.integers(4, 12))
        ids = ((np.arange(length) + int(random.integers(VOCAB))) % VOCAB).astype(np.int32)
        labels = np.where(np.arange(length) < 2, IGNORE, ids).astype(np.int32)
        items.append(EncodedExample(ids, labels, index))
    return items
