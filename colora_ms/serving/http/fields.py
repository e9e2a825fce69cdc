"""Which field of a request's body becomes which option, and which fields only their neutral values are taken of.

Options whose HTTP name is their own (``temperature``, ``min_p``, ``stop`` …) are read off the records in
:mod:`colora_ms.decoding.options` and stand nowhere here. :data:`ALIASES` has the fields of another name or form;
:data:`NEUTRAL` those that are not implemented, with the values that ask for nothing: any other value is refused by the
name that the client sent. A field of a record takes its name out of :data:`NEUTRAL` as soon as the record has it.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Callable, Dict, List, Optional, Tuple, Type

from colora_ms.decoding.fields import Record
from colora_ms.decoding.options import Options, Sampling
from colora_ms.errors import DecodingError, near
from colora_ms.serving.http.failures import RequestError

#: Options of ``Options`` that the server decides, or whose fields have another form here.
OTHERWISE = ("contrast", "mix", "sampling", "max_new_tokens", "seed", "timeout", "show_special", "logprobs", "grammar")


@dataclasses.dataclass(frozen=True)
class Alias:
    """A field whose name or form is not the option's.

    Attributes:
        record: the record that holds the option; field: the option's name in it.
        kind: what the client sends; turn: makes the option's value of it.
    """

    record: Type[Record]
    field: str
    kind: Any
    turn: Callable[[Any], Any]


#: {HTTP's name: alias}
ALIASES: Dict[str, Alias] = {
    "top_k": Alias(Sampling, "top_k", int, lambda value: 0 if value == -1 else value),  # vLLM's "off"
    "repeat_penalty": Alias(Options, "repetition_penalty", float, lambda value: value),  # llama-server's name
}

#: {field that is not implemented: values that ask for nothing}
NEUTRAL: Dict[str, Tuple[Any, ...]] = {
    # OpenAI's
    "suffix": (None, ""), "logprobs": (None, False), "top_logprobs": (None, 0), "functions": (None, []),
    "function_call": (None, "none"), "modalities": (None, ["text"]), "audio": (None,), "prediction": (None,),
    "reasoning_effort": (None, "none"), "verbosity": (None, "medium"), "web_search_options": (None,),
    "moderation": (None,), "tools": (None, []), "tool_choice": (None, "none", "auto"),
    "parallel_tool_calls": (None, True, False), "best_of": (None, 1), "echo": (None, False),
    "response_format": (None, {"type": "text"}),
    # vLLM's
    "length_penalty": (None, 1), "use_beam_search": (None, False), "include_stop_str_in_output": (None, False),
    "detokenize": (None, True), "spaces_between_special_tokens": (None, True), "truncate_prompt_tokens": (None,),
    "allowed_token_ids": (None, []), "bad_words": (None, []), "prompt_logprobs": (None, False),
    "return_token_ids": (None, False), "return_tokens_as_token_ids": (None, False), "add_special_tokens": (None,),
    "chat_template": (None,), "documents": (None, []), "logits_processors": (None, []),
    "include_reasoning": (None, True), "mm_processor_kwargs": (None,),
    "kv_transfer_params": (None,),
    # llama-server's
    "typical_p": (None, 1), "tfs_z": (None, 1), "mirostat": (None, 0), "dynatemp_range": (None, 0),
    "dry_multiplier": (None, 0), "xtc_probability": (None, 0), "top_n_sigma": (None, -1), "n_probs": (None, 0),
    "samplers": (None,), "id_slot": (None, -1), "min_keep": (None, 0),
}
#: Fields that do not change an answer.
HARMLESS = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key",
            "prompt_cache_retention", "request_id", "cache_prompt", "timings_per_token", "return_progress")

HINTS = {
    "functions": "this is OpenAI's older form; send tools",
    "function_call": "this is OpenAI's older form; send tool_choice",
    "chat_template": "templates are code; this server runs only the model's own",
    "prompt_logprobs": "send echo and logprobs to /v1/completions",
    "verbosity": "no chat template here reads it; leave it out",
}


def plain_fields() -> Dict[str, Any]:
    """{name: (type, default)} of the options that are offered by their own names, and of the aliases that count."""
    options = {name: one for name, one in Options.known().items() if name not in OTHERWISE}
    found: Dict[str, Any] = {name: (Optional[one.kind], None) for name, one in {**Sampling.known(), **options}.items()}
    found.update({name: (Optional[one.kind], None) for name, one in aliases().items()})
    return found


def aliases() -> Dict[str, Alias]:
    """The aliases whose option there is."""
    return {name: one for name, one in ALIASES.items() if one.field in one.record.known()}


def options_of(given: Dict[str, Any], record: Type[Record], left_out: Tuple[str, ...] = ()) -> Dict[str, Any]:
    """{option: value} of a record's options that a body has.

    Args:
        given: the body's fields; None: not given.
        left_out: options that are no fields.

    Raises:
        RequestError: two fields say one option, differently.
    """
    found: Dict[str, Any] = {}
    said: Dict[str, str] = {}
    known = aliases()
    names = {name: known[name].field if name in known else name for name in given}
    for name, field in names.items():
        if given[name] is None or field in left_out or field not in record.known() \
                or name in known and known[name].record is not record:
            continue
        value = known[name].turn(given[name]) if name in known else given[name]
        if field in found and found[field] != value:
            raise RequestError(f"{name}={given[name]!r:.40} and {said[field]}={given[said[field]]!r:.40} say the same "
                               "thing differently; send one of them", name)
        found[field], said[field] = value, name
    return found


def checked(name: str, record: Type[Record], field: str, value: Any) -> Any:
    """The value of an option as the record keeps it; errors call it by the name that the client sent.

    Raises:
        RequestError: it cannot be used.
    """
    try:
        return record.known()[field].checked(name, value)
    except DecodingError as error:
        raise RequestError(str(error), name) from None


def neutral(name: str, value: Any, table: Dict[str, Tuple[Any, ...]]) -> bool:
    """Whether a value asks for nothing; True is not 1 here."""
    return any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in table[name])


def kept_fields(values: Dict[str, Any], fields: List[str], table: Dict[str, Tuple[Any, ...]]) -> Dict[str, Any]:
    """A body's fields without those that ask for nothing.

    Args:
        values: the body; fields: names that are read; table: as :data:`NEUTRAL`.

    Raises:
        RequestError: a field is unknown, or asks for something that is not implemented.
    """
    kept = {}
    for name, value in values.items():
        if name in fields:
            kept[name] = value
        elif name in table:
            if not neutral(name, value, table):
                hint = HINTS.get(name, "this server does not implement it; leave it out")
                raise RequestError(f"{name}={value!r:.80}: {hint}", name, "unsupported_parameter")
        elif name not in HARMLESS:
            raise RequestError(f"unknown field {name!r:.80}.{near(name, [*fields, *table])}", str(name)[:80],
                               "unknown_parameter")
    return kept
