"""Updates of a tiny model in the column that COLORA_KERNELS names: python training_step.py OUTPUT.npz
[packed]"""
import sys

import numpy as np

import mindspore as ms
from mindspore import Tensor

from colora_ms.adapters import LoraConfig, inject
from colora_ms.kernels import backend
from colora_ms.kernels.launches import launches_of
from colora_ms.models.config import DecoderConfig
from colora_ms.models.decoder import Decoder
from colora_ms.training.batching import Batch
from colora_ms.training.config import OptimizerConfig
from colora_ms.training.step import Stepper


def main(output):
    ms.set_context(mode=ms.GRAPH_MODE)
    config = DecoderConfig(model_type="llama", vocab_size=61, hidden_size=64, intermediate_size=96, num_hidden_layers=1,
                           num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=32,
                           eos_token_ids=(2,))
    decoder = Decoder(config, None)
    inject(decoder, LoraConfig(r=4, target_modules="all-linear"), adapter_name="a")
    random = np.random.default_rng(3)
    for one in decoder.get_parameters():
        if one.dtype == ms.float32 and "scale" not in one.name:
            gain = 1.0 if "norm" in one.name else 0.0
            one.set_data(Tensor((gain + random.normal(size=one.shape) * 0.15).astype(np.float32)))
    ids = random.integers(3, 61, (2, 12)).astype(np.int32)
    labels = np.where(np.arange(12) < np.array([[11], [7]]), np.roll(ids, -1, 1), -100).astype(np.int32)
    packed = np.array([[5, 7, 0], [3, 2, 3]], np.int32) if sys.argv[2:] == ["packed"] else None
    batch = Batch(ids, labels, np.array([12, 8], np.int32), packed)
    stepper = Stepper(decoder, OptimizerConfig(learning_rate=0.01, schedule="constant", warmup_ratio=0.0,
                                               max_grad_norm=None))
    losses, gradients = [], {}
    for step in range(1, 4):
        losses.append(stepper([batch], step, 3)[0])
        if step == 1:  # the first mean is (1 - beta1) times the gradient
            gradients = {f"gradient {one.name}": one.asnumpy().copy() for one in stepper.optimizer.mean}
    names = [name for name, times in launches_of(stepper.whole).by_name().items() for _ in range(times)]
    np.savez(output, losses=losses, backend=backend(), launches=names, **gradients)


if __name__ == "__main__":
    main(sys.argv[1])
