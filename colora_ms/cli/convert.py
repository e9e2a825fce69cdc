"""``colora-ms convert``: write a model as a Hugging Face folder."""


def add_arguments(parser):
    parser.add_argument("source", help="known name, folder or GGUF file")
    parser.add_argument("target", help="folder to write; it must not exist")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))


def run(arguments):
    from colora_ms.models.checkpoint import open_checkpoint, resolve_model, write_hf_folder

    checkpoint = open_checkpoint(resolve_model(arguments.source))
    write_hf_folder(arguments.target, checkpoint.config, checkpoint.tensors, checkpoint.tokenizer_source,
                    dtype=arguments.dtype)
    print(f"wrote {arguments.target}")
    return 0
