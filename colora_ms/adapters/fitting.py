"""Does an adapter fit the model, and the Cells that ``inject`` made?"""

from functools import partial
from typing import TYPE_CHECKING, Any, Callable, Optional

from colora_ms.adapters import vocabulary
from colora_ms.adapters.matching import Matched
from colora_ms.adapters.outside import leaf
from colora_ms.adapters.principal import as_plain_lora, check_splittable, starts_on
from colora_ms.adapters.registry import match
from colora_ms.adapters.starting import base_weight
from colora_ms.errors import AdapterError

if TYPE_CHECKING:
    from colora_ms.adapters.handle import Adapters
    from colora_ms.adapters.peft_format import StoredAdapter


def check_fits(handle: 'Adapters', config: Any, matched: Matched) -> None:
    """Refuse what needs Cells which ``inject`` did not make; all reasons in one error."""
    if config.peft_type != handle.peft_type:
        raise AdapterError(f"the adapter is of the method {config.peft_type}, the model was prepared for "
                           f"{handle.peft_type}; unload() its adapters first, or load this one into another model")
    problems = []
    for path, target in matched.targets.items():
        cell = handle.sites.get((path, "lora"))
        if cell is None or not cell.max_rank:
            problems.append(f"{path} was not prepared for adapters")
        elif cell.max_rank < target.r:
            problems.append(f"{path} has room for rank {cell.max_rank}, the adapter has rank {target.r}")
        else:
            problems += cell.problems_with(target)
    problems += [f"{path} was not prepared for a bias of the adapter's own" for path in matched.biases
                 if not getattr(handle.sites.get((path, "lora")), "has_bias", False)]
    problems += [f"{path} was not prepared to be saved whole" for path in matched.saved
                 if (path, "saved") not in handle.sites]
    for path, ids in matched.tokens.items():
        cell = handle.sites.get((path, "tokens"))
        problems += [f"{path} was not prepared for trained token rows"] if cell is None else cell.problems_with(ids)
    problems += [f"{path} is {'' if path in matched.ties else 'not '}tied to another module's values in this adapter, "
                 f"the model was prepared for one where it is{' not' if path in matched.ties else ''}"
                 for role in ("saved", "tokens") for path in getattr(matched, role) if handle.trainable
                 and (path, role) in handle.sites
                 and getattr(handle.sites[path, role], "tied_to", "") != matched.ties.get(path, "")]
    if handle.trainable and config.lora_dropout != handle.dropout:
        problems.append(f"lora_dropout is {config.lora_dropout}, the model was prepared for {handle.dropout}")
    if problems:
        more = f"; and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise AdapterError("the adapter does not fit the Cells that inject made: " + "; ".join(problems[:8]) + more
                           + ". Call inject (or load_adapter) with max_rank=... and reserve=... wide enough for all "
                           "adapters to come, so that adding one compiles nothing")


def stage(handle: 'Adapters', stored: 'StoredAdapter', check: Optional[Callable] = None) -> tuple[Matched, dict]:
    """Check an opened folder against the model and read it: (Matched, values). Changes nothing in the model; an adapter
    that started from the base weights is made into plain LoRA, its config too.

    Args:
        stored: StoredAdapter.
        check: function (config, matched) that may refuse the adapter before its tensors are read.
    """
    if stored.config is None:
        stored.refuse(stored.problems, handle.base_model)
    stored.problems += stored.fit(handle.net)
    try:
        more = vocabulary.larger(stored, handle.modules)
    except AdapterError as error:
        stored.refuse(stored.problems + [str(error)], handle.base_model)
    if more is not None:
        stored.refuse(stored.problems + [vocabulary.refusal(more, stored)], handle.base_model)
    try:
        matched = match(stored.config, handle.modules, handle.defaults)
    except AdapterError as error:
        stored.refuse(stored.problems + [str(error)], handle.base_model)
    if check is not None:
        check(stored.config, matched)
    values = stored.read(matched, handle.modules, lambda path: leaf(handle.cells[path]).base_values(),
                         handle.base_model)
    if getattr(stored.config, "changes_base", False):
        try:
            check_splittable(stored.config, matched, handle.modules, handle.cells)
            starts = starts_on(stored.config, matched, partial(base_weight, handle))
        except AdapterError as error:
            stored.refuse([str(error)], handle.base_model)
        stored.config, matched, values = as_plain_lora(stored.config, matched, values, starts)
        if check is not None:
            check(stored.config, matched)
    return matched, values
