"""``colora-ms convert``: a model as a Hugging Face folder or a GGUF file, an adapter as llama.cpp's LoRA file."""

from __future__ import annotations

import argparse
from collections.abc import Iterable

TYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give the parser the command\'s options."""
    parser.add_argument("source", nargs="?", help="known name, folder or GGUF file of a model")
    parser.add_argument("target", nargs="?",
                        help="folder to write, or a GGUF file if it ends in .gguf; it must not exist")
    parser.add_argument("--dtype", default=None, choices=("float32", "bfloat16", "float16"),
                        help="of a folder's weights; none: float32")
    parser.add_argument("--type", default=None, type=str.upper, choices=TYPES,
                        help="of a GGUF file's matrices, whose vectors stay F32; none: F32")
    parser.add_argument("--adapter", default=None, metavar="FOLDER",
                        help="convert this LoRA (or LoRA GGUF) in place of a model, with --to")
    parser.add_argument("--to", default=None, metavar="FILE",
                        help="with --adapter: the .gguf file to write, or of a LoRA GGUF the PEFT folder")
    parser.add_argument("--base", default=None, metavar="MODEL",
                        help="with --adapter: its base model, of which only the settings are read; none: the one it "
                             "names")


def run(arguments: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    from colora_ms.errors import ConfigError

    if arguments.adapter is not None:
        return _adapter(arguments)
    if arguments.to is not None or arguments.base is not None:
        raise ConfigError("--to and --base go with --adapter; a model is converted by: colora-ms convert MODEL OUT")
    if arguments.source is None or arguments.target is None:
        raise ConfigError("give a model and what to write: colora-ms convert MODEL OUT, where OUT is a folder or "
                          "ends in .gguf")
    from colora_ms.models.checkpoint import open_checkpoint, resolve_model, write_hf_folder

    to_gguf = is_gguf(arguments.target)
    check_format_option(to_gguf, arguments.dtype, arguments.type)
    checkpoint = open_checkpoint(resolve_model(arguments.source))
    if to_gguf:
        from colora_ms.models.gguf_writer import write_gguf

        notes = write_gguf(arguments.target, checkpoint.config, checkpoint.tensors, checkpoint.tokenizer_source,
                           arguments.type or "F32")
        say(notes)
    else:
        write_hf_folder(arguments.target, checkpoint.config, checkpoint.tensors, checkpoint.tokenizer_source,
                        dtype=arguments.dtype or "float32")
    print(f"wrote {arguments.target}")
    return 0


def _adapter(arguments: argparse.Namespace) -> int:
    from colora_ms.adapters.gguf_convert import convert_adapter
    from colora_ms.errors import ConfigError

    if arguments.source is not None or arguments.dtype is not None:
        raise ConfigError("an adapter is converted by: colora-ms convert --adapter FOLDER --to lora.gguf [--base "
                          "MODEL] [--type F16]")
    if arguments.to is None:
        raise ConfigError("--adapter needs --to: the .gguf file to write, or the PEFT folder to make of a LoRA GGUF")
    if not is_gguf(arguments.to):
        if not is_gguf(arguments.adapter):
            raise ConfigError(f"--to is {arguments.to!r}, expected the name of the .gguf file to write for --adapter")
        check_format_option(False, None, arguments.type)
    say(convert_adapter(arguments.adapter, arguments.to, arguments.base, arguments.type or "F32"))
    print(f"wrote {arguments.to}")
    return 0


def is_gguf(target: str) -> bool:
    """Whether a target's name asks for a GGUF file."""
    return target.lower().endswith(".gguf")


def check_format_option(to_gguf: bool, dtype: str | None, kind: str | None) -> None:
    """ConfigError for the option of the other format."""
    from colora_ms.errors import ConfigError

    if to_gguf and dtype is not None:
        raise ConfigError(f"--dtype {dtype} is for folders; a GGUF file takes --type, one of {', '.join(TYPES)}")
    if not to_gguf and kind is not None:
        raise ConfigError(f"--type {kind} is for GGUF files, whose names end in .gguf; a folder takes --dtype")


def say(notes: Iterable[str]) -> None:
    """Print sentences to be known about what was written, to the standard error."""
    import sys

    for note in notes:
        print(f"note: {note}", file=sys.stderr)
