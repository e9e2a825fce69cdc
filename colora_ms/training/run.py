"""Training from a recipe: its data, its model, its adapter, and the loop over them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from colora_ms import models, runtime
from colora_ms.adapters import inject
from colora_ms.adapters.continuing import continue_adapter
from colora_ms.adapters.vocabulary import copy_tokenizer, tokenizer_for
from colora_ms.distributed.adapter_files import save_whole
from colora_ms.distributed.workers import Workers
from colora_ms.errors import CheckpointError
from colora_ms.models.checkpoint import open_checkpoint, resolve_model
from colora_ms.models.tokenizer import load_tokenizer
from colora_ms.training import checkpoint as checkpoints
from colora_ms.training.config import START_FOLDER, TrainingConfig
from colora_ms.training.data import encode_examples, load_examples, load_preferences, make_template, without_overlap
from colora_ms.training.preference import PreferenceLossCell
from colora_ms.training.preference_data import PairLoader, encode_preferences
from colora_ms.training.progress import Progress
from colora_ms.training.split import ADAPTER, split_model
from colora_ms.training.trainer import Callback, Trainer, TrainingResult

if TYPE_CHECKING:
    from colora_ms.adapters.handle import Adapters
    from colora_ms.models.decoder import Decoder
    from colora_ms.models.tokenizer import Tokenizer
    from colora_ms.training.encoding import EncodedSet


def train(config: TrainingConfig | str | Path, resume: bool | str | Path = False, callbacks: Iterable[Callback] = (),
          team: Workers = Workers()) -> TrainingResult:
    """Train an adapter as a recipe says: load the model, inject, encode the data, run the loop.

    Args:
        config: ``TrainingConfig``, or the path of a recipe.
        resume: see ``Trainer.train``.
        callbacks: list of ``Callback``.
        team: the processes that train together; in groups of ``distributed.tensor_parallel`` they split the model.

    Returns:
        TrainingResult.

    Raises:
        ColoraError: in one of its kinds, see ``Trainer``; the output folder is checked before
            anything is loaded.
    """
    if not isinstance(config, TrainingConfig):
        config = TrainingConfig.from_yaml(config)
    if team.first:
        checkpoints.check_writable(config.output)
        if not resume and checkpoints.list_checkpoints(config.output):
            raise CheckpointError(f"{config.output} holds a run already; continue it with resume "
                                  "(--resume), or choose another output folder")
    if team.first and resume is True and not checkpoints.list_checkpoints(config.output):
        warnings.warn(f"there is no checkpoint in {config.output} to resume from: the run begins anew", stacklevel=2)
    train_examples, held_out, removed = load_data(config)
    split, team = team.grid(config.distributed.tensor_parallel)
    first = team.first and split.first
    own_tokenizer: Path | None
    if split.world > 1:
        runtime.configure()
        checkpoint = open_checkpoint(resolve_model(config.model))
        tokenizer, own_tokenizer = load_tokenizer(checkpoint.tokenizer_source), None
        decoder, handle = split_model(checkpoint, config.weight_format, split,
                                      lambda whole: begin_adapter(config, whole, tokenizer, first)[0])
    else:
        decoder, tokenizer = models.load_model(config.model, weight_format=config.weight_format)
        # An adapter to go on with may bring tokens of its own, so that it comes before the data.
        handle, tokenizer, own_tokenizer = begin_adapter(config, decoder, tokenizer, first)
    data, validation = encode_data(config, tokenizer, train_examples, held_out, decoder)
    say = Progress(0, 0, config.loop.progress and first).say
    say(f"training data: {data.summary()}"
        + (f"; removed {removed} that stand in the validation or test data" if removed else ""))
    if validation is not None:
        say(f"validation data: {validation.summary()}")
    report = data_report(data, validation, removed)
    if first:
        warn_left_out(report)

    def save(folder: str | Path) -> None:
        if split.world > 1:
            return save_whole(handle, folder, split, ADAPTER, writes=first)
        handle.save(folder, "default", as_lora=True)
        if own_tokenizer is not None:
            copy_tokenizer(own_tokenizer, folder)

    pairs = config.train == "dpo"
    if pairs and config.adapter.get("start_from") is not None:
        say("the reference is the base model alone, not the adapter that the training starts from; to prefer over that "
            "one, merge it into the model first")
    kind: dict[str, Any] = {}
    if config.train == "dpo" and config.dpo is not None:
        kind = {"loss_cell": PreferenceLossCell(decoder, config.dpo), "loader": PairLoader}
    trainer = Trainer(decoder, data, config, save, validation, callbacks, team=team, split=split, data_report=report,
                      **kind)
    say(f"batches: {trainer.loader.summary()}")
    if split.world > 1:
        say(f"the model is split over {split.world} workers")
    if team.world > 1:
        unit = "pairs" if pairs else "rows"
        who = "workers" if split.world == 1 else "groups of workers"
        say(f"{team.world} {who} with {trainer.loader.rows} {unit} each: an update sees at most "
            f"{team.world * trainer.loader.rows * config.optimizer.accumulation_steps} {unit}")
    return trainer.train(resume)


def begin_adapter(config: TrainingConfig, decoder: Decoder, tokenizer: Any = None,
                  first: bool = True) -> tuple[Adapters, Any, Path | None]:
    """Put a recipe's adapter into ``decoder``: a new one, or the one that it starts from, of which the run keeps a
    copy, so that it can be resumed whatever becomes of the original.

    Args:
        first: whether this process writes that copy.

    Returns:
        ``(handle, tokenizer, folder)``: the tokenizer to use, and the folder that it is from where that is the
        adapter's, otherwise None.

    Raises:
        AdapterError: what ``inject`` or loading the folder refuses; the model is unchanged.
    """
    settings: dict[str, Any] = dict(adapter_name="default", seed=config.loop.seed, base_model=config.model)
    if config.start_from is None:
        return inject(decoder, config.adapter_config(), **settings), tokenizer, None
    folder, kept = config.start_folder, Path(config.output) / START_FOLDER
    # What stands beside start_from was compared with the original, which need not be there any more.
    given = {} if folder == kept else {name: value for name, value in config.adapter.items()
                                       if name not in ("method", "start_from")}
    handle = continue_adapter(decoder, folder, given, "default", config.loop.seed, config.model)
    if first and folder != kept:
        handle.save(kept, "default")
        copy_tokenizer(folder, kept)
    own = tokenizer_for(tokenizer, {"default": folder}, handle)
    return handle, own, None if own is tokenizer else folder


def load_data(config: TrainingConfig) -> tuple[list, list, int]:
    """The examples of a recipe.

    Returns:
        ``(train, validation, removed)``: two lists of ``Example``, or of ``Preference`` with train:
        dpo (the second may be empty), and the number of examples taken out of the first because their question stands
        in ``data.validation``, ``data.held_out`` or ``evaluate.data``. The test keeps all its items:
        taking the shared ones out of the test instead would leave it the unusual, harder questions.
    """
    columns: Any = config.data.columns
    load: Callable[..., list] = load_preferences if config.train == "dpo" else load_examples
    train_examples = load(config.data.train, columns)
    validation = load(config.data.validation, columns) if config.data.validation else []
    test: list = load_examples(config.data.held_out, columns) if config.data.held_out else []
    asked = config.evaluate or {}
    if asked.get("data") and asked.get("task", "problems") == "problems":
        test = test + load_examples(asked["data"])
    if not validation and not test:
        return train_examples, [], 0
    train_examples, removed = without_overlap(train_examples, validation + test, config.data.loss)
    return train_examples, validation, removed


def encode_data(config: TrainingConfig, tokenizer: Tokenizer, train_examples: list, held_out: list,
                decoder: Decoder) -> tuple[EncodedSet, EncodedSet | None]:
    """The examples of a recipe as ``(EncodedSet, EncodedSet or None)``."""
    template = make_template(config.data.template, tokenizer, config.data.system)
    limit = min(config.data.max_length, decoder.max_positions)
    vocabulary = decoder.config.vocab_size
    options: dict[str, Any] = {"on_long": config.data.on_long, "vocab_size": vocabulary}
    encode: Callable[..., EncodedSet]
    if config.train == "dpo":
        encode = encode_preferences
    else:
        encode, options["loss"] = encode_examples, config.data.loss
    data = encode(train_examples, tokenizer, template, limit, **options)
    validation = encode(held_out, tokenizer, template, limit, **options) if held_out else None
    return data, validation


def data_report(data: EncodedSet, validation: EncodedSet | None = None, removed: int = 0) -> dict:
    """What a run was given and what was left out, for its log.

    Args:
        data, validation: ``EncodedSet``, the second may be ``None``.
        removed: examples taken out because their question stands in the validation or test data.

    Returns:
        Dictionary of JSON values; ``warnings`` holds the sentences of all that was left out.
    """
    said = [f"removed {removed} that stand in the validation or test data"] if removed else []
    said = [f"training data: {text}" for text in said + data.warnings()]
    report = {"train": data.report(), "removed": removed}
    if validation is not None:
        report["validation"] = validation.report()
        said += [f"validation data: {text}" for text in validation.warnings()]
    return {**report, "warnings": said}


def warn_left_out(report: dict) -> None:
    """Say what ``data_report`` says was left out, whether there is a progress bar or not."""
    for text in report["warnings"]:
        warnings.warn(text, stacklevel=3)
