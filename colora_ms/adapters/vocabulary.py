"""Adapters trained after ``resize_token_embeddings``: their embedding and head have more rows than the base's.

The rows behind the base's belong to new tokens. Embedding, head and the tokenizer in the adapter's folder must agree on
how many there are; then the model's own tables get them, too, so that rows of the batch without the adapter have logits
for all tokens. What the base has there is what PEFT stored of it (``original_module``), otherwise the mean of the
base's rows, which is what transformers starts new rows from.

Shapes change, so that this happens before anything is compiled: in ``load_adapter`` and ``load_adapters`` on a model
without adapters. A model that has its adapter Cells already, such as a server's bank, refuses.
"""

import dataclasses
import os
import shutil
from typing import TYPE_CHECKING, Any, Callable, Optional, Union

import numpy as np

from mindspore import nn

from colora_ms.adapters import tree
from colora_ms.adapters.key_names import PREFIX
from colora_ms.adapters.matching import Module
from colora_ms.adapters.outside import leaf
from colora_ms.errors import AdapterError, AdapterWarning, TokenizerError
from colora_ms.files import replacing
from colora_ms.models.decoder import Decoder
from colora_ms.models.mapped import parameter_of
from colora_ms.models.replacing import forget_graphs

if TYPE_CHECKING:
    from colora_ms.adapters.handle import Adapters
    from colora_ms.adapters.peft_format import StoredAdapter

#: Trainers round the number of rows up to a multiple of one of these.
_MULTIPLES = (8, 16, 32, 64, 128, 256, 512)

#: Files of a tokenizer, as transformers writes them.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
                   "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json")


@dataclasses.dataclass(frozen=True)
class Tables:
    """Where a model keeps its vocabulary.

    Attributes:
        embedding, head: names of the modules; tied: whether the head shares the embedding's weight.
        rows: of both.
    """

    embedding: str
    head: str
    tied: bool
    rows: int


@dataclasses.dataclass(frozen=True)
class Larger:
    """The vocabulary of an adapter that has more tokens than its base.

    Attributes:
        tables: the base's; rows: the adapter's; stored: {module name: key of its tensor}, of the modules that the
            adapter has whole; originals: {module name: key of what PEFT stored of the resized base}.
    """

    tables: Tables
    rows: int
    stored: dict
    originals: dict


def tables_of(modules: dict[str, Module]) -> Optional[Tables]:
    """The :class:`Tables` of a model with one embedding and one head, else None; modules: {name: Module}."""
    embeddings = [name for name, module in modules.items() if module.kind == "embedding"]
    heads = [name for name, module in modules.items() if module.is_head]
    if len(embeddings) != 1 or len(heads) != 1:
        return None
    embedding, head = embeddings[0], heads[0]
    return Tables(embedding, head, modules[head].tied_to == embedding, modules[embedding].in_features)


def larger(stored: 'StoredAdapter', modules: dict[str, Module]) -> Optional[Larger]:
    """What an adapter folder holds of a vocabulary larger than the model's.

    Args:
        stored: :class:`colora_ms.adapters.peft_format.StoredAdapter`; modules: {name: Module} of the model.

    Returns:
        :class:`Larger`, or None where no table has more rows than the model's.

    Raises:
        AdapterError: embedding, head and tokenizer do not agree; all numbers are in the sentence.
    """
    tables = tables_of(modules)
    if tables is None:
        return None
    shapes = {name: entry[1] for name, entry in stored.file.entries.items()}
    whole, originals, rows = {}, {}, {}
    for path, label in ((tables.embedding, "embedding"), (tables.head, "head")):
        for field, owner, table in (("", "", whole), ("original_module.", "resized base's ", originals),
                                    ("base_layer.", "resized base's ", originals)):
            key = f"{PREFIX}{path}.{field}weight"
            if len(shapes.get(key, ())) == 2:
                table[path], rows[owner + label] = key, shapes[key][0]
    if not any(count > tables.rows for count in rows.values()):
        return None
    if "embedding" not in rows and "resized base's embedding" not in rows:
        rows = {"embedding": tables.rows, **rows}
    if "head" not in rows and "resized base's head" not in rows and not tables.tied:
        rows["head"] = tables.rows
    tokens = tokenizer_size(stored.folder)
    agreed = set(rows.values())
    count = max(agreed)
    if len(agreed) > 1 or tokens is not None and not _holds(count, tokens):
        numbers = [f"{label} {number} rows" for label, number in rows.items()]
        numbers.append(f"tokenizer {tokens} tokens" if tokens is not None else "no tokenizer in the folder")
        raise AdapterError(
            f"the vocabulary was changed when the adapter in {stored.folder} was trained, and its parts do not agree: "
            f"{', '.join(numbers)}; the base model has {tables.rows} rows. Save embedding, head and tokenizer of one "
            "training together, or use the base model that it belongs to")
    return Larger(tables, count, whole, originals)


def refusal(found: Larger, stored: 'StoredAdapter') -> str:
    """Why a model that has its adapter Cells already cannot take such an adapter."""
    return (f"the vocabulary was changed when the adapter in {stored.folder} was trained: it has {found.rows} rows for "
            f"tokens, this model has {found.tables.rows} and its adapter Cells already, whose shapes are fixed; load "
            "it first (Generator.from_pretrained, load_adapter on a fresh model), or merge it into the model "
            "(colora-ms merge) and use that")


def adopt(stored: 'StoredAdapter', found: Larger) -> None:
    """Make the tables that PEFT stores whenever the vocabulary was resized, asked or not, into modules saved whole.

    A tied head beside an embedding that is saved whole without ``ensure_weight_tying`` is the resized base's, not the
    adapter's: it stays out.
    """
    config, tables = stored.config, found.tables
    entries = config.modules_to_save or []
    covered = {path for path in (tables.embedding, tables.head) if any(path.endswith(entry) for entry in entries)}
    if covered and tables.tied:
        return
    missing = [path for path in found.stored if path not in covered]
    if tables.tied and len(missing) == 2 and hasattr(config, "ensure_weight_tying"):
        config.ensure_weight_tying, missing = True, [tables.embedding]
    if missing:
        config.modules_to_save = [*entries, *missing]


def warn_of_gaps(found: Larger, stored: 'StoredAdapter', warn: Callable) -> None:
    """Say what the new tokens lack: a tokenizer, or a tied head's rows."""
    if tokenizer_size(stored.folder) is None:
        warn(f"the adapter in {stored.folder} has {found.rows - found.tables.rows} tokens more than the model, but no "
             "tokenizer beside it: their ids can be used, no text becomes them", AdapterWarning)
    if found.tables.tied and found.tables.head not in found.stored and not found.originals:
        warn(f"the adapter in {stored.folder} holds an embedding with new tokens, but not the head, which was tied to "
             "the resized base's embedding: the new tokens get the logit of a mean row, as for the "
             "base", AdapterWarning)


class Growth:
    """A larger vocabulary for a model, decided before the model is touched.

    Args:
        net: the model; modules: {name: Module} of it; needs: {adapter name: (StoredAdapter, Larger)}, not empty.

    Attributes:
        modules: {name: Module} of the larger model; rows: its vocabulary; names: of the adapters that need it.

    Raises:
        AdapterError: the adapters want different numbers of rows, or this model's tables cannot be enlarged.
    """

    def __init__(self, net: nn.Cell, modules: dict[str, Module], needs: dict[str, tuple]) -> None:
        sizes = {name: found.rows for name, (_, found) in needs.items()}
        if len(set(sizes.values())) > 1:
            raise AdapterError("these adapters have different vocabularies ("
                               + ", ".join(f"{name}: {rows} rows" for name, rows in sizes.items())
                               + "), which one model cannot have; load them into models of their own")
        first = next(iter(needs.values()))[1]
        self.tables, self.rows = first.tables, first.rows
        self.names = tuple(needs)
        self.net = net
        self._check_net()
        self.new = {path: self._new_rows(path, needs) for path in (self.tables.embedding, self.tables.head)}
        self.modules = dict(modules)
        embedding, head = modules[self.tables.embedding], modules[self.tables.head]
        self.modules[self.tables.embedding] = dataclasses.replace(
            embedding, in_features=self.rows, parameters={"weight": (self.rows, embedding.out_features)})
        self.modules[self.tables.head] = dataclasses.replace(
            head, out_features=self.rows, parameters={"weight": (self.rows, head.in_features)})

    def _check_net(self):
        cells = tree.cells_by_name(self.net)
        head = cells[self.tables.head]
        if not isinstance(self.net, Decoder) or not leaf(head).plain or head.has_bias:
            raise AdapterError(f"the adapter has {self.rows} rows for tokens, the model {self.tables.rows}, and this "
                               f"model cannot get more: its head is a {type(head).__name__} of a "
                               f"{type(self.net).__name__}; use a "
                               "plain decoder (recompose a decomposed one), or a base model that was resized and saved")
        self.cells = cells

    def _new_rows(self, path, needs):
        """(new rows, hidden) float32 of one table of the base."""
        base = self.cells[path].base_values()["weight"]
        kept = []
        for stored, found in needs.values():
            key = found.originals.get(path) or found.tables.tied and found.originals.get(found.tables.embedding)
            kept += [stored.file.read(key)[self.tables.rows:]] if key else []
        if kept:
            if any(not np.array_equal(kept[0], one) for one in kept[1:]):
                raise AdapterError(f"the adapters {', '.join(needs)} were trained on bases whose new rows of {path} "
                                   "differ; load them into models of their own")
            return np.ascontiguousarray(kept[0], np.float32)
        mean = base.mean(axis=0, dtype=np.float64).astype(np.float32)
        return np.tile(mean, (self.rows - self.tables.rows, 1))

    def widen(self,
              values: dict[tuple[str, str], dict[str, np.ndarray]]) -> dict[tuple[str, str], dict[str, np.ndarray]]:
        """An adapter's values for the base's vocabulary, with the base's new rows behind those of modules saved
        whole."""
        widened = dict(values)
        for path, rows in self.new.items():
            own = values.get((path, "saved"))
            if own is not None:
                widened[path, "saved"] = {**own, "weight": np.concatenate([own["weight"], rows])}
        return widened

    def apply(self) -> None:
        """Put the larger tables into the model; cannot fail any more."""
        embedding, head = self.cells[self.tables.embedding], self.cells[self.tables.head]
        self._enlarge(embedding, self.new[self.tables.embedding])
        if self.tables.tied:
            head.weight, head.weight_scale = embedding.weight, embedding.weight_scale
        else:
            self._enlarge(head, self.new[self.tables.head])
        head.out_features = self.rows
        self.net.config = dataclasses.replace(self.net.config, vocab_size=self.rows)
        forget_graphs()

    @staticmethod
    def _enlarge(cell: nn.Cell, rows: np.ndarray) -> None:
        weight, scale = cell.weight, cell.weight_scale
        tensor, own_scale = cell.format.stored(weight, scale).and_rows(rows).tensors()
        cell.weight = parameter_of(tensor, weight.name, weight.requires_grad)
        if own_scale is not None:
            cell.weight_scale = parameter_of(own_scale, scale.name)


# -- tokenizers -------------------------------------------------------------------------------------------------------

def tokenizer_size(folder: Union[str, os.PathLike]) -> Optional[int]:
    """Largest id + 1 of the tokenizer in a folder, or None if it has none.

    Raises:
        AdapterError: its files cannot be read.
    """
    if not has_tokenizer(folder):
        return None
    return _read_tokenizer(folder).vocab_size


def has_tokenizer(folder: Union[str, os.PathLike]) -> bool:
    """Whether a folder has a tokenizer."""
    return any(os.path.isfile(os.path.join(folder, name)) for name in TOKENIZER_FILES[:2])


def copy_tokenizer(source: Union[str, os.PathLike], folder: Union[str, os.PathLike]) -> None:
    """Put a tokenizer's files beside an adapter.

    Raises:
        AdapterError: a file cannot be written.
    """
    for name in TOKENIZER_FILES:
        if os.path.isfile(os.path.join(source, name)):
            path = os.path.join(folder, name)
            with replacing(path, _refused(path), flush=True) as new:
                shutil.copyfile(os.path.join(source, name), new)


def _refused(path):
    return lambda reason: AdapterError(f"{path} cannot be written: {reason}")


def tokenizer_for(tokenizer: Any, folders: dict, handle: 'Adapters') -> Any:
    """The tokenizer to use with a model and its adapters: an adapter's own where it brings tokens that the base's
    lacks.

    Args:
        tokenizer: the base model's; folders: {adapter name: folder}, loaded; handle: their ``Adapters``.

    Returns:
        A tokenizer; ``tokenizer`` itself if no adapter changes rows of the embedding for tokens of its own.

    Raises:
        AdapterError: two adapters bring different tokens.
    """
    chosen, owner = tokenizer, None
    tables = tables_of(handle.modules)
    for name, folder in folders.items() if tables else ():
        matched = handle.matched(name)
        if tables.embedding not in {*matched.saved, *matched.tokens, *matched.targets} or not has_tokenizer(folder):
            continue
        own = _read_tokenizer(folder)
        if own.vocab_size <= getattr(tokenizer, "vocab_size", 0):
            continue
        if owner is not None and own.backend.get_vocab(with_added_tokens=True) != \
                chosen.backend.get_vocab(with_added_tokens=True):
            raise AdapterError(f"the adapters {owner} and {name} bring tokenizers with different tokens, of which one "
                               "generator can use one; load them into generators of their own")
        chosen, owner = own, name
    return chosen


def _read_tokenizer(folder):
    from colora_ms.models.tokenizer import load_tokenizer

    try:
        return load_tokenizer(folder)
    except TokenizerError as error:
        raise AdapterError(f"the tokenizer beside the adapter in {folder} cannot be read: {error}") from None


def _holds(rows, tokens):
    """Whether a table of so many rows belongs to a tokenizer: one row a token, or rounded up as trainers do."""
    return rows == tokens or any(rows == -(-tokens // size) * size for size in _MULTIPLES)
