"""Options that several sub-commands share, and what they turn into."""

from __future__ import annotations

import argparse
import functools
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from colora_ms.decoding.fields import Record
from colora_ms.decoding.options import Contrast, Options, Sampling
from colora_ms.models.formats import WEIGHT_CHOICES

if TYPE_CHECKING:
    from colora_ms.decoding import Generator
    from colora_ms.decoding.mix import Mix
    from colora_ms.distributed.workers import Workers
    from colora_ms.serving import Engine


#: Options of a request that have a flag of their own beside the records'.
PLAIN = ("adapter_scale", "presence_penalty", "frequency_penalty", "repetition_penalty", "min_tokens")


def add_model(parser: argparse.ArgumentParser) -> None:
    """Options that name the base model."""
    parser.add_argument("--model", default="smollm2-135m", help="known name, Hugging Face folder or GGUF file")
    parser.add_argument("--weights", default="auto", choices=WEIGHT_CHOICES,
                        help="format of the base weights; auto: as the file has them")


def add_decoding(parser: argparse.ArgumentParser) -> None:
    """Options of adapter, contrast and sampling; :func:`generator` and :func:`decoding` read them."""
    parser.add_argument("--adapter", default=None, metavar="FOLDER",
                        help="PEFT adapter folder, or a LoRA GGUF; none: the base model")
    parser.add_argument("--contrast", action="store_true", help="contrast the adapter with the base model (CoLD)")
    add_record(parser, Contrast)
    add_record(parser, Sampling)
    parser.add_argument("--max-new-tokens", type=int, default=128, help="longest answer")
    add_mix(parser)


def add_mix(parser: argparse.ArgumentParser) -> None:
    """Options of mixes, penalties and forms of answers; :func:`asked` reads them."""
    parser.add_argument("--mix", default=None, metavar="FILE or JSON",
                        help="several voices: a mix.yaml, or such as '{\"negative\": {\"prompt\": \"...\"}}'")
    for name in PLAIN:
        one = Options.known()[name]
        parser.add_argument(f"--{name.replace('_', '-')}", type=one.kind, default=one.default, help=one.meaning)
    parser.add_argument("--grammar", default=None, metavar="JSON",
                        help="what answers keep to, such as '{\"regex\": \"[0-9]+\"}', '{\"json\": true}' or "
                             "'{\"json_schema\": {...}}'")


def mix(arguments: argparse.Namespace) -> tuple[Mix | None, dict[str, Path]]:
    """(the mix of the parsed options or None, {name: folder} of the adapters that its file names).

    Raises:
        ConfigError, DecodingError: the file, or what stands in the option, cannot be used.
    """
    if arguments.mix is None:
        return None, {}
    if arguments.mix.lstrip().startswith("{"):
        from colora_ms.decoding.mix import mix_of

        return mix_of(_mapping("mix", arguments.mix), "--mix"), {}
    from colora_ms.decoding.mix_file import load_mix

    saved = load_mix(arguments.mix)
    return saved.mix, dict(saved.adapters)


def asked(arguments: argparse.Namespace) -> dict[str, Any]:
    """Keyword arguments of ``Generator.generate`` for the options of :func:`add_mix` that ask for something."""
    known = Options.known()
    found = {name: getattr(arguments, name) for name in PLAIN if getattr(arguments, name) != known[name].default}
    if arguments.mix is not None:
        found["mix"] = mix(arguments)[0]
    if arguments.grammar is not None:
        found["grammar"] = _mapping("grammar", arguments.grammar)
    return found


def _mapping(name: str, text: str) -> Any:
    from colora_ms.errors import ConfigError

    try:
        return json.loads(text)
    except ValueError as error:
        raise ConfigError(f"--{name} {text!r:.80} is no JSON: {error}") from None


def add_record(parser: argparse.ArgumentParser, record: type[Record]) -> None:
    """A flag for each option of a record of ``colora_ms.decoding.options``."""
    for name, one in record.known().items():
        flag = f"--{name.replace('_', '-')}"
        if one.kind is bool:
            parser.add_argument(flag, action="store_true", help=one.meaning)
        else:
            parser.add_argument(flag, type=one.kind, default=one.default, help=one.meaning)


def given(arguments: argparse.Namespace, record: type[Record]) -> dict[str, Any]:
    """{name: value} of the parsed options of a record."""
    return {name: getattr(arguments, name) for name in record.known()}


def generator(arguments: argparse.Namespace, team: Workers | None = None) -> tuple[Generator, str | None]:
    """(Generator, adapter name or None) for the parsed options; ``team``: the workers to split the model over."""
    from colora_ms.decoding import Generator

    folder = getattr(arguments, "adapter", None)
    adapters = {**({"adapter": folder} if folder else {}), **(mix(arguments)[1] if "mix" in arguments else {})} or None
    if team is not None:
        from colora_ms.distributed.loading import load_sharded

        decoder, tokenizer, handle = load_sharded(arguments.model, team, arguments.weights, adapters=adapters)
        return Generator(decoder, tokenizer, handle), "adapter" if folder else None
    made = Generator.from_pretrained(arguments.model, adapters=adapters, weight_format=arguments.weights)
    return made, "adapter" if folder else None


def decoding(arguments: argparse.Namespace) -> dict:
    """Keyword arguments of ``Generator.generate`` for the parsed options, without the adapter."""
    return dict(contrast=Contrast(**given(arguments, Contrast)) if arguments.contrast else None,
                sampling=Sampling.asked(**given(arguments, Sampling)), max_new_tokens=arguments.max_new_tokens,
                **asked(arguments))


def model_hash(arguments: argparse.Namespace) -> str:
    """``evaluate.model_hash`` of the parsed options."""
    from colora_ms.evaluation import evaluate

    return evaluate.model_hash(arguments.model, arguments.weights)


#: Types of keys and values, as of ``models.paged_cache.CACHE_DTYPES`` (without MindSpore).
CACHE_DTYPES = ("float32", "bfloat16", "int8")


def add_engine(parser: argparse.ArgumentParser) -> None:
    """Options of the serving engine; :func:`engine` reads them."""
    parser.add_argument("--adapters", default=None, metavar="FOLDER", help="folder of PEFT adapter folders, named by "
                                                                           "these")
    parser.add_argument("--slots", type=int, default=8, help="adapters that one batch can mix")
    parser.add_argument("--max-rank", type=int, default=16, help="largest rank of an adapter")
    parser.add_argument("--adapter-format", default="float32", choices=("float32", "bfloat16"),
                        help="of the adapters in the slots; bfloat16 rounds them, unless they were stored so, for "
                             "speed")
    parser.add_argument("--host-megabytes", type=int, default=1024, help="memory for adapters behind the slots")
    parser.add_argument("--max-length", type=int, default=None,
                        help="tokens of a prompt and its answer together; none: what model and cache take")
    parser.add_argument("--cache-bytes", type=int, default=None,
                        help="memory for keys and values; none: as much as 1,024 tokens in every row need")
    parser.add_argument("--cache-dtype", default="float32", choices=CACHE_DTYPES,
                        help="of keys and values; bfloat16 and int8 take a half and a quarter of the memory")


def engine(arguments: argparse.Namespace, rows: int, team: Workers | None = None, **more: Any) -> tuple[Engine, str]:
    """(Engine, the base model's name) for the parsed options; ``more`` goes to the Engine.

    With a ``team`` of several workers the model is split over them; only worker 0 comes back, the others follow it to
    its end and leave the process.
    """
    import mindspore as ms

    from colora_ms.distributed.loading import load_sharded
    from colora_ms.models import load_model
    from colora_ms.serving import AdapterBank, Engine
    from colora_ms.serving.split import SplitBank, follow

    name = Path(arguments.model).name
    split = team is not None and team.world > 1
    banks: list[Any] = []

    def prepare(decoder: Any) -> None:
        if arguments.adapters is not None:
            kind: Any = functools.partial(SplitBank, team=team) if split else AdapterBank
            banks.append(kind(decoder, arguments.adapters, max_loaded=arguments.slots, max_rank=arguments.max_rank,
                              host_bytes=arguments.host_megabytes << 20, base_model=name,
                              adapter_format=arguments.adapter_format))

    if team is not None and split:
        decoder, tokenizer, _ = load_sharded(arguments.model, team, arguments.weights, arguments.max_length,
                                             prepare=prepare)
    else:
        decoder, tokenizer = load_model(arguments.model, arguments.weights, max_positions=arguments.max_length)
        prepare(decoder)
    made = Engine(decoder, tokenizer, next(iter(banks), None), rows=rows, max_length=arguments.max_length,
                  cache_bytes=arguments.cache_bytes, cache_dtype=getattr(ms, arguments.cache_dtype), team=team, **more)
    if team is not None and not team.first:
        follow(made.follower(), next(iter(banks), None), team)
        sys.exit(0)
    return made, name


def write_json(path: str | Path, value: Any) -> None:
    """Write the file of ``--json``, whole or not at all.

    Raises:
        ConfigError: the file cannot be written.
    """
    from colora_ms.errors import ConfigError
    from colora_ms.files import replacing

    with replacing(path, lambda reason: ConfigError(f"{path} cannot be written: {reason}")) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
