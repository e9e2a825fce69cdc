"""Training data, from a source description to batches; the parts live in modules of their own.

    examples   Example, JSON lines
    sources    reasoning-gym, Hugging Face datasets, JSON lines by description; without_overlap
    templates  how a question becomes the text in front of the answer
    encoding   token ids, with labels only on the answer
    batching   few static shapes, deterministic restorable order, sharding
"""

from colora_ms.training.batching import Batch, BatchLoader, choose_buckets, pack_examples
from colora_ms.training.encoding import (IGNORE, EncodedExample, EncodedSet, encode_examples,
                                         end_token, prompt_ids)
from colora_ms.training.examples import Example, example_from_record, read_jsonl
from colora_ms.training.sources import (hugging_face_examples, load_examples,
                                        reasoning_gym_examples, without_overlap)
from colora_ms.training.templates import ChatTemplate, TextTemplate, make_template

__all__ = [
    "Batch", "BatchLoader", "ChatTemplate", "EncodedExample", "EncodedSet", "Example", "IGNORE",
    "TextTemplate", "choose_buckets", "encode_examples", "end_token", "example_from_record",
    "hugging_face_examples", "load_examples", "make_template", "pack_examples", "prompt_ids",
    "read_jsonl", "reasoning_gym_examples", "without_overlap",
]
