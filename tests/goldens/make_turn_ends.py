"""Make tests/goldens/turn_ends.json: which tokens llama.cpp takes for ends of an answer, by vocabulary.

    .venv-peers/bin/python tests/goldens/make_turn_ends.py
"""

import ctypes
import json
import os
import tempfile

HERE = os.path.dirname(os.path.abspath(__file__))

#: name -> (tokens behind the 256 bytes with their types, ids that the file names as {key: token})
VOCABULARIES = {
    "chatml": ([("<|endoftext|>", 3), ("<|im_start|>", 3), ("<|im_end|>", 3)], {"eos": "<|endoftext|>"}),
    "llama 3": ([("<|begin_of_text|>", 3), ("<|end_of_text|>", 3), ("<|eom_id|>", 3), ("<|eot_id|>", 3)],
                {"eos": "<|end_of_text|>"}),
    "gemma": ([("<bos>", 3), ("<eos>", 3), ("<start_of_turn>", 4), ("<end_of_turn>", 4)], {"eos": "<eos>"}),
    "phi, not marked": ([("<|endoftext|>", 3), ("<|end|>", 1), ("<|user|>", 1)], {"eos": "<|endoftext|>"}),
    "harmony": ([("<|return|>", 3), ("<|call|>", 3), ("<|end|>", 3), ("<|endoftext|>", 3)], {"eos": "<|return|>"}),
    "named eot and eom": ([("</s>", 3), ("<turn>", 3), ("<message>", 3)], {"eos": "</s>", "eot": "<turn>",
                                                                           "eom": "<message>"}),
    "others": ([("<EOT>", 3), ("_<EOT>", 3), ("[EOT]", 3), ("[EOS]", 1), ("<end_of_utterance>", 3), ("<eos>", 3),
                ("<|im_end|>x", 1), ("<|IM_END|>", 3), ("x", 1)][:8], {"eos": "<eos>"}),
    "plain": ([("<s>", 3), ("<fin>", 3)], {"eos": "<fin>"}),
}


def write(path, name):
    """A GGUF with this vocabulary and no tensors."""
    import gguf
    added, named = VOCABULARIES[name]
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    alphabet = [chr(byte) for byte in printable] + [chr(256 + number) for number in range(256 - len(printable))]
    pieces = alphabet + ["he"] + [token for token, _ in added]
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.add_feed_forward_length(32)
    writer.add_head_count(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(pieces))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(pieces)
    writer.add_token_types([1] * (len(alphabet) + 1) + [kind for _, kind in added])
    writer.add_token_merges(["h e"])
    for key, token in named.items():
        writer.add_uint32(f"tokenizer.ggml.{key}_token_id", pieces.index(token))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return pieces


def main():
    import llama_cpp
    quiet = llama_cpp.llama_log_callback(lambda level, text, data: None)
    llama_cpp.llama_log_set(quiet, ctypes.c_void_p(0))
    found = {}
    for name in VOCABULARIES:
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "v.gguf")
            pieces = write(path, name)
            settings = llama_cpp.llama_model_default_params()
            settings.vocab_only = True
            model = llama_cpp.llama_model_load_from_file(path.encode(), settings)
            vocabulary = llama_cpp.llama_model_get_vocab(model)
            found[name] = [pieces[index] for index in range(len(pieces)) if llama_cpp.llama_vocab_is_eog(vocabulary,
                                                                                                         index)]
            print(name, found[name])
    with open(os.path.join(HERE, "turn_ends.json"), "w", encoding="utf-8") as file:
        json.dump(found, file, ensure_ascii=False, indent=1)
        file.write("\n")


if __name__ == "__main__":
    main()
