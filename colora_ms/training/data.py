"""Training data, from a source description to batches; the parts live in modules of their own.

    examples   Example, Preference
    messages   the messages of a conversation, checked and in one form
    layouts    what rows of files look like, and which of their columns are read
    sources    JSON lines and arrays, Hugging Face datasets, reasoning-gym; without_overlap
    templates  how a question becomes the text in front of the answer
    turns      which parts of a rendered conversation the assistant has written
    encoding   token ids, with labels only on the answer
    batching   few static shapes, deterministic restorable order, sharding
"""

from colora_ms.training.batching import Batch, BatchLoader, choose_buckets, pack_examples
from colora_ms.training.encoding import (
                                         IGNORE,
                                         EncodedExample,
                                         EncodedSet,
                                         encode_example,
                                         encode_examples,
                                         end_token,
                                         prompt_ids,
)
from colora_ms.training.examples import Example, Preference
from colora_ms.training.layouts import LAYOUTS, Layout
from colora_ms.training.row_reader import example_from_record
from colora_ms.training.sources import (
                                         hugging_face_examples,
                                         load_examples,
                                         load_preferences,
                                         read_jsonl,
                                         reasoning_gym_examples,
                                         with_columns,
                                         without_overlap,
)
from colora_ms.training.templates import ChatTemplate, TextTemplate, make_template

__all__ = [
    "Batch", "BatchLoader", "ChatTemplate", "EncodedExample", "EncodedSet", "Example", "IGNORE", "LAYOUTS", "Layout",
    "Preference", "TextTemplate", "choose_buckets", "encode_example", "encode_examples", "end_token",
    "example_from_record", "hugging_face_examples", "load_examples", "load_preferences", "make_template",
    "pack_examples", "prompt_ids", "read_jsonl", "reasoning_gym_examples", "with_columns", "without_overlap",
]
