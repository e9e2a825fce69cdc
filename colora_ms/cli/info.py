"""``colora-ms info``: show what a model or an adapter is."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from colora_ms.models.checkpoint import Checkpoint


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give the parser the command\'s options."""
    parser.add_argument("path", help="known model name, model folder or file, or adapter folder")


def run(arguments: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    path = Path(arguments.path)
    if (path / "adapter_config.json").is_file():
        return _adapter(path)
    from colora_ms.models.checkpoint import open_checkpoint, resolve_model

    checkpoint = open_checkpoint(resolve_model(arguments.path))
    print(f"format      {checkpoint.format}\npath        {checkpoint.path}")
    if checkpoint.low_rank:
        from colora_ms.models.low_rank_folder import parameter_count

        count = parameter_count(checkpoint.config, checkpoint.low_rank)
        print(f"parameters  {count:,} ({checkpoint.config.parameter_count():,} before it was decomposed)")
        print(f"low rank    {len(checkpoint.low_rank)} matrices: {', '.join(list(checkpoint.low_rank)[:3])}, ...")
    else:
        print(f"parameters  {checkpoint.config.parameter_count():,}")
    kinds = checkpoint.packed or ([checkpoint.quantized["quant_method"]] if checkpoint.quantized else [])
    if kinds:
        print(f"packed      {', '.join(kinds)}: kept so unless another format is asked for")
    for name, value in checkpoint.config.to_hf().items():
        print(f"{name:24s} {value}")
    _attention(checkpoint)
    if checkpoint.tokenizer_source is not None:
        _turn_ends(checkpoint)
    return 0


def _attention(checkpoint: Checkpoint) -> None:
    """What the longest sequence and the form of the file decide."""
    from colora_ms.models.rope import default_positions, longrope_list

    config = checkpoint.config
    if longrope_list(config, 1):
        print(f"longrope: opened for up to {default_positions(config)} positions (the default), all of them turn by "
              f"the short list; for more, up to {config.max_position_embeddings}, all of them by the long one")
    if checkpoint.format == "gguf" and config.model_type in ("llama", "mixtral"):
        print("window: none; a GGUF file of this kind has no word for Mistral's, so every layer sees all positions")


def _turn_ends(checkpoint: Checkpoint) -> None:
    """Which tokens end an answer, and who says so."""
    from colora_ms.models.tokenizer import load_tokenizer
    from colora_ms.models.turn_ends import turn_ends

    config: Any = checkpoint.config
    ends = turn_ends(config, load_tokenizer(checkpoint.tokenizer_source))
    print("an answer ends with" + ("" if ends else ": no token; only a limit or a stop string ends it"))
    for end in ends:
        print(f"  {end.id:<8d} {'no token' if end.token is None else end.token:22s} {', '.join(end.sources)}")


def _adapter(path: Path) -> int:
    from colora_ms.adapters import digest
    from colora_ms.adapters.peft_format import StoredAdapter
    from colora_ms.adapters.store import config_text

    stored = StoredAdapter(path)
    print(f"digest      {digest(path)}")
    if stored.config is None:
        stored.refuse(stored.problems)
    print(config_text(stored.config.to_peft()), end="")
    return 0
