"""The table of a decoder's modules from its config alone, for work on adapters that needs no model in memory."""

from typing import TYPE_CHECKING

from colora_ms.adapters.matching import Module
from colora_ms.adapters.tree import HEADS

if TYPE_CHECKING:
    from colora_ms.models.config import DecoderConfig


def modules_of_config(config: 'DecoderConfig') -> dict[str, Module]:
    """What ``colora_ms.adapters.tree`` finds in a :class:`colora_ms.models.decoder.Decoder` of this config.

    Args:
        config: ``DecoderConfig``.

    Returns:
        {module name: Module}; the same as of the model, whose Cells need not be built.
    """
    shapes = dict(config.parameter_shapes())
    shapes.setdefault("lm_head.weight", (config.vocab_size, config.hidden_size))
    leaves = {}
    for name, shape in shapes.items():
        path, _, key = name.rpartition(".")
        leaves.setdefault(path, {})[key] = tuple(shape)
    found = {}
    for path, parameters in leaves.items():
        parts = path.split(".")
        for i in range(1, len(parts)):
            found.setdefault(".".join(parts[:i]), Module("other"))
        shape = parameters["weight"]
        if len(shape) == 1:
            found[path] = Module("norm", parameters=parameters)
        elif path == "model.embed_tokens":
            found[path] = Module("embedding", shape[0], shape[1], parameters)
        else:
            is_head = parts[-1] in HEADS
            tied_to = "model.embed_tokens" if is_head and config.tie_word_embeddings else ""
            found[path] = Module("linear", shape[1], shape[0], parameters, is_head, tied_to=tied_to)
    return found
