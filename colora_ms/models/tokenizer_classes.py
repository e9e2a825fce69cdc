"""What transformers' tokenizer classes do where a model's files say nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Optional

from colora_ms.errors import TokenizerError
from colora_ms.models.families import find_family

#: Classes of transformers that put the begin token by their flags, not by the file's post-processor: (begin, end) if
#: the config does not say.
FLAG_CLASSES = {"LlamaTokenizer": (True, False), "CodeLlamaTokenizer": (True, False), "GemmaTokenizer": (True, False),
                "CohereTokenizer": (True, False), "GPTNeoXTokenizer": (False, False)}

#: Named tokens that the classes have without a config.
CLASS_TOKENS = {
    "LlamaTokenizer": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
    "CodeLlamaTokenizer": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
    "GemmaTokenizer": {"bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>", "pad_token": "<pad>"},
    "CohereTokenizer": {"bos_token": "<BOS_TOKEN>", "eos_token": "<|END_OF_TURN_TOKEN|>", "unk_token": "<UNK>"},
    "GPTNeoXTokenizer": {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"},
    "GPT2Tokenizer": {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"},
    "Qwen2Tokenizer": {"eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>", "pad_token": "<|endoftext|>"},
}

# Classes of folders whose model is none of ``families``, by config.json's model_type: tokenizers are read on their own.
_OTHERS = {"gemma": "GemmaTokenizer", "cohere": "CohereTokenizer", "gpt2": "GPT2Tokenizer"}


def tokenizer_class(folder: str, config: Mapping, model: Mapping) -> Optional[str]:
    """The class of a folder's tokenizer, without "Fast": what its config names, else that of the model's family.

    Args:
        folder: for messages; config: the content of tokenizer_config.json; model: of config.json.

    Raises:
        TokenizerError: the config's class is no name.
    """
    name, model_type = config.get("tokenizer_class"), model.get("model_type")
    if name is None:
        record = find_family(model_type)
        name = record.tokenizer if record else _OTHERS.get(model_type) if isinstance(model_type, str) else None
    if name is not None and not isinstance(name, str):
        raise TokenizerError(f"{folder}: tokenizer_class is {name!r:.60}, expected a name")
    return name.removesuffix("Fast") if name else None
