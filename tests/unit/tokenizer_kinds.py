"""Small tokenizers of every kind that is read, made on the spot, for tests that hold for all of them."""

import io

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend

from colora_ms.models.tokenizer import Tokenizer
from colora_ms.models.tokenizer_build import _LLAMA3, _QWEN2, from_sentencepiece

CORPUS = ["the little girl named Lily said: the little dog is here", "Answer: the adapter\nAnswer: of the of the",
          "def f(x):\n    return x\n\n\n        y  =  1\t\tz", "Ünïcödé é è 한국어 日本語 😀😀 café naïve",
          "a  b   c    d     e",
          "1 22 333 4444", "don't can't I'll"] * 20
SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]


def byte_level(rule="gpt2"):
    """Byte-level BPE: "gpt2", "llama3" (offsets trimmed by its post-processor) or "qwen2" (NFC)."""
    backend = Backend(models.BPE())
    if rule == "gpt2":
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        backend.pre_tokenizer = pre_tokenizers.Sequence([
            pre_tokenizers.Split(Regex(_LLAMA3 if rule == "llama3" else _QWEN2), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    backend.decoder = decoders.ByteLevel()
    if rule == "qwen2":
        backend.normalizer = normalizers.NFC()
    backend.train_from_iterator(CORPUS, trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False))
    if rule == "llama3":
        backend.post_processor = processors.Sequence([
            processors.ByteLevel(trim_offsets=True),
            processors.TemplateProcessing(single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 0)])])
    return Tokenizer(backend, {"bos_token": "<s>", "eos_token": "</s>"})


def metaspace(scheme="always", words=True):
    """BPE behind a Metaspace pre-tokenizer; ``words`` False lets tokens run over blanks."""
    backend = Backend(models.BPE(unk_token="<unk>", byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=words)
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme=scheme)])
    backend.train_from_iterator(CORPUS, trainers.BpeTrainer(
        vocab_size=500, special_tokens=["<unk>", *SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))],
        show_progress=False, limit_alphabet=60))
    backend.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>",
                                                                                                              2)])
    return Tokenizer(backend, {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"})


def sentencepiece_model(path, prefix=True, words=True, collapse=False):
    """Train a SentencePiece BPE model with byte tokens into the file ``path``; returns the path."""
    import sentencepiece
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(line.replace("\n", " ") for line in CORPUS), model_writer=out, vocab_size=400,
        model_type="bpe", byte_fallback=True, normalization_rule_name="identity", add_dummy_prefix=prefix,
        remove_extra_whitespaces=collapse, split_by_whitespace=words, character_coverage=0.98, minloglevel=2,
        allow_whitespace_only_pieces=True, max_sentencepiece_length=12)
    with open(path, "wb") as file:
        file.write(out.getvalue())
    return str(path)


def sentencepiece_tokenizer(path):
    """``Tokenizer`` of a SentencePiece file."""
    return Tokenizer(*from_sentencepiece(str(path)))


def with_greedy_specials():
    """Byte-level, with special tokens that swallow the blanks beside them (as Phi-3's ``<|assistant|>``)."""
    tokenizer = byte_level("gpt2")
    backend = tokenizer.backend
    backend.add_special_tokens([AddedToken("<|assistant|>", rstrip=True, special=True, normalized=False),
                                AddedToken("<mask>", lstrip=True, special=True, normalized=False)])
    return Tokenizer(backend, {"bos_token": "<s>", "eos_token": "</s>"})


def gguf_of_sentencepiece(library, path, prefix=True):
    """Write a ``SentencePieceProcessor``'s tables as a GGUF; returns the path."""
    import gguf
    size = library.vocab_size()
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_tokenizer_model("llama")
    writer.add_token_list([library.id_to_piece(index).encode() for index in range(size)])
    writer.add_token_scores([library.get_score(index) for index in range(size)])
    writer.add_token_types([2 if library.is_unknown(index) else 3 if library.is_control(index) else
                            6 if library.is_byte(index) else 1 for index in range(size)])
    writer.add_bos_token_id(library.bos_id())
    writer.add_eos_token_id(library.eos_id())
    writer.add_add_space_prefix(prefix)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return str(path)
