"""Direct Preference Optimization (Rafailov et al., arXiv 2305.18290): training on pairs of a better and a worse answer.

For a prompt x with the chosen answer c and the rejected answer r, with pi the model with its adapter and ref the same
model without it:

    reward(x, y) = beta (log pi(y | x) - log ref(y | x))          margin = reward(x, c) - reward(x, r)
    loss         = -(1 - e) log sigmoid(margin) - e log sigmoid(-margin)

e is the label smoothing of conservative DPO (0 is the paper's loss). Log-probabilities are sums over the answer's
tokens, its end included, or means (``length_normalised``). ``loss: ipo`` is (margin / beta - 1 / (2 beta))^2 of arXiv
2310.12036.

The reward is the log-ratio of an adapter to its base. That ratio is also what a contrast of the two scales in decoding
(``colora_ms.decoding.contrast``), so that for an adapter trained like this a contrast amplifies what was preferred.

The reference needs no second model: each row stands in the batch twice, with the adapter's slot and with slot -1, and
both go through the weights in one pass.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import mindspore as ms
from mindspore import Tensor, nn, ops

from colora_ms.adapters import adapters_of
from colora_ms.adapters.outside import leaf
from colora_ms.errors import ConfigError
from colora_ms.kernels import bind, linear_token_cross_entropy, linear_token_losses, token_losses_of_logits
from colora_ms.models.head import capped, logit_cap, plain_head
from colora_ms.training.encoding import IGNORE

if TYPE_CHECKING:
    from colora_ms.models.decoder import Decoder
    from colora_ms.training.config import PreferenceConfig


class PreferenceLossCell(nn.Cell):
    """The loss of pairs of answers; in the place of ``CausalLossCell``.

    Args:
        decoder: a ``Decoder`` with an adapter injected, whose rows take slots.
        config: ``PreferenceConfig``.

    Attributes:
        figures: names of the third result.

    Raises:
        ConfigError: the rows with slot -1 would not be the base model (see :func:`check_reference`).
    """

    figures = ("accuracy", "margin", "chosen_reward", "rejected_reward", "chosen_logprob", "rejected_logprob")

    def __init__(self, decoder: Decoder, config: PreferenceConfig) -> None:
        super().__init__(auto_prefix=False)
        bind()
        check_reference(decoder)
        self.decoder = decoder
        self.fused, self.cap = plain_head(decoder), logit_cap(decoder)
        self.beta, self.smoothing = config.beta, config.label_smoothing
        self.ipo, self.normalised = config.loss == "ipo", config.length_normalised

    def construct(self, ids: Tensor, labels: Tensor, lengths: Tensor, slots: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The summed loss of the pairs; rows 2p and 2p + 1 are the chosen and the rejected answer of pair p.

        Args:
            ids, labels: (rows, tokens) int32 as ``CausalLossCell`` takes them, rows even; a pair whose rows carry no
                label does not count.
            lengths, slots: (rows,) int32.

        Returns:
            ``(loss_sum, count, sums)``: 0-d float32, the number of pairs, and (6,) float32, the sums over the pairs of:
            1 where the margin is above 0, margin, rewards and log-probabilities of the chosen and the rejected answer.
        """
        losses, reference = self.token_losses(ids, labels, lengths, slots)
        tokens = (labels != IGNORE).astype(ms.float32).sum(1)
        share = 1.0 / ops.maximum(tokens, ops.ones_like(tokens)) if self.normalised else ops.ones_like(tokens)
        # Token by token first: the difference of two long sums would lose what the pairs differ in.
        ratios = ((reference - losses).sum(1) * share).reshape((-1, 2))
        logprobs = (-losses.sum(1) * share).reshape((-1, 2))
        counts = (tokens.reshape((-1, 2))[:, 0] > 0).astype(ms.float32)
        rewards = self.beta * ratios
        margin = rewards[:, 0] - rewards[:, 1]
        loss = (self.pair_losses(ratios[:, 0] - ratios[:, 1]) * counts).sum()
        right = (margin > 0).astype(ms.float32)
        rows = ops.stack((right, margin, rewards[:, 0], rewards[:, 1], logprobs[:, 0], logprobs[:, 1]))
        return loss, counts.sum(), (rows * counts).sum(1)

    def pair_losses(self, ratio: Tensor) -> Tensor:
        """The loss of each pair from its difference of log-ratios, both (pairs,) float32."""
        if self.ipo:
            return ops.square(ratio - 1.0 / (2.0 * self.beta))
        z = self.beta * ratio
        # -log sigmoid(z), stable for every z and smooth at 0, where each training begins: the shift has no gradient.
        shift = ops.stop_gradient(ops.maximum(-z, ops.zeros_like(z)))
        plain = shift + ops.log(ops.exp(-shift) + ops.exp(-z - shift))
        return plain + self.smoothing * z  # -log sigmoid(-z) is -log sigmoid(z) + z

    def token_losses(self, ids: Tensor, labels: Tensor, lengths: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
        """-log p of each label, with the adapter and without it: (rows, tokens) float32 both, 0 where there is none.

        The second has no gradient, and the backward pass does not compute its rows' products.
        """
        rows, flat = ids.shape[0], labels.reshape((-1,))
        twice = ops.concat((slots, -ops.ones_like(slots)))
        hidden = self.decoder.hidden(ops.concat((ids, ids)), ops.concat((lengths, lengths)), twice)
        trained, base = hidden[:rows], ops.stop_gradient(hidden[rows:])
        if self.fused:
            base_of_head = self.decoder.lm_head.base()
            # Equal to the last bit; the first one also prepares the gradient.
            of_tokens = linear_token_cross_entropy if self.training else linear_token_losses
            losses = of_tokens(trained.reshape((-1, trained.shape[-1])), base_of_head, flat)
            reference = linear_token_losses(base.reshape((-1, base.shape[-1])), base_of_head, flat)
        else:
            logits = capped(self.decoder.lm_head(trained, (slots, lengths)), self.cap)
            losses = token_losses_of_logits(logits.reshape((-1, logits.shape[-1])), flat)
            logits = capped(self.decoder.lm_head(base, (twice[rows:], lengths)), self.cap)
            logits = ops.stop_gradient(logits)
            reference = token_losses_of_logits(logits.reshape((-1, logits.shape[-1])), flat)
        return losses.reshape(labels.shape), reference.reshape(labels.shape)


def check_reference(decoder: Decoder) -> None:
    """Refuse a model whose rows with slot -1 are not its base model, or would not stay it.

    Raises:
        ConfigError: no adapter, an adapter that is merged or changed the base weights (PiSSA, OLoRA), one on Cells
            whose rows take no slots, or trained parameters of the base model; the message names it.
    """
    handle = adapters_of(decoder)
    wrong = ""
    if handle is None:
        wrong = "the model has no adapter; inject one first"
    elif handle.changed_base:
        start = handle.config(handle.changed_base).init_lora_weights
        wrong = (f"the adapter {handle.changed_base!r} started from the base weights and changed them "
                 f"(init_lora_weights={start!r}); use init_lora_weights: true or gaussian")
    elif handle.merged:
        wrong = f"the adapter {handle.merged!r} is merged into the base weights; call unmerge() first"
    else:
        faces = {path: leaf(handle.cells[path]) for path, _ in handle.sites}
        whole = [path for path, face in faces.items() if face is None or not face.takes_rows]
        trained = [parameter.name for parameter, _ in handle.frozen if parameter.requires_grad]
        if whole:
            wrong = (f"{whole[0]} ({len(whole)} such modules) takes no slot for each row, so that rows without the "
                     "adapter cannot stand beside rows with it; use colora_ms.models.Decoder")
        elif trained:
            wrong = (f"{trained[0]} ({len(trained)} such parameters) of the base model is trained; train the adapter "
                     "alone")
    if wrong:
        raise ConfigError(f"train: dpo compares with the base model, which has to stay as it is: {wrong}")
