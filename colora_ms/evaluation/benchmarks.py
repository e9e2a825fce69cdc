"""Well-known sets: GSM8K, the commonsense sets in the layout of LLM-Adapters, WikiText; few-shot prompts; their runs.

The loaders read files that the user has; nothing is downloaded. Generated answers (GSM8K, with the number scorer) go
through ``evaluate``; multiple choice and perplexity have their own runs here, resumable in the same way.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from colora_ms.distributed.workers import Workers
from colora_ms.errors import ConfigError, DataError
from colora_ms.evaluation.item_log import ItemLog, write_json
from colora_ms.evaluation.likelihood import ChoiceItem, ChoiceResult, multiple_choice, perplexity
from colora_ms.evaluation.sharded import ShardedScorer
from colora_ms.evaluation.shots import Shots
from colora_ms.evaluation.significance import wilson_interval

if TYPE_CHECKING:
    from colora_ms.evaluation.interfaces import TokenScorer
    from colora_ms.models.tokenizer import Tokenizer
    from colora_ms.training.templates import ChatTemplate, TextTemplate

#: Where an answer to a few-shot prompt of "Question: ... Answer: ..." ends.
FEW_SHOT_STOP = ("\nQuestion:", "\n\n")

_CALCULATOR = re.compile(r"<<[^<>]*>>")


@dataclasses.dataclass(frozen=True)
class Problem:
    """A question and its worked answer, as ``evaluate`` and the templates read them."""

    id: str
    prompt: str
    completion: str
    messages: tuple | None = None

    @property
    def question(self) -> str:
        """The prompt, under the name that templates read."""
        return self.prompt


def read_gsm8k(path: str | Path, limit: int | None = None, calculator: bool = False) -> list[Problem]:
    """Problems of GSM8K (arXiv 2110.14168), JSON lines with ``question`` and ``answer``.

    The answer is a chain of thought that ends with ``#### number``; ``scoring.score_number`` compares the final
    numbers.

    Args:
        path: the file.
        limit: at most this many.
        calculator: keep the ``<<48/2=24>>`` annotations in the answers.

    Returns:
        List of :class:`Problem`.

    Raises:
        DataError: unreadable file, or a line without the keys or without a final number.
    """
    problems: list[Problem] = []
    for number, line in enumerate(_text(path).splitlines(), 1):
        if limit is not None and len(problems) >= limit:
            break
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            question, answer = row["question"], row["answer"]
        except (ValueError, KeyError, TypeError):
            raise DataError(f"{path}:{number} is not a GSM8K line; expected "
                            '{"question": ..., "answer": "... #### number"}') from None
        if "####" not in answer:
            raise DataError(f"{path}:{number}: the answer has no final number after '####'")
        problems.append(Problem(f"gsm8k-{number}", question, answer if calculator else _CALCULATOR.sub("", answer)))
    if not problems:
        raise DataError(f"{path} holds no GSM8K problem")
    return problems


class FewShotTemplate:
    """A plain-text template with worked examples in front of every question.

    A question that stands among the worked examples is not shown with its answer: others of the list take that place.

    Args:
        template: a text template (``training.templates.TextTemplate``).
        shots: examples that may be shown, in this order.
        separator: between the examples.
        count: how many are shown to each question, the first ones; all if None.

    Attributes:
        setup: what the results file says of the shots.

    Raises:
        ConfigError: no shots or fewer than ``count``, or a template that is not plain text.
    """

    adds_special_tokens = True

    def __init__(self, template: TextTemplate | ChatTemplate, shots: Sequence[Problem], separator: str = "\n\n",
                 count: int | None = None) -> None:
        if not template.adds_special_tokens:
            raise ConfigError("few-shot prompts are made from a plain text template, not from the chat template")
        self._template = cast(Any, template)  # reads an id, a question and a completion
        self._shots = Shots([(shot.question, self._template.prompt(shot) + self._template.answer(shot) + separator)
                             for shot in shots],
                            count)
        self.digest = hashlib.sha256(f"shots\0{template.digest}\0{self._shots.digest}".encode()).hexdigest()[:16]
        self.setup = {"shots": self._shots.count, "of": len(self._shots)}

    def check(self, examples: Sequence[Problem]) -> int:
        """How many of the examples stand among the worked ones.

        Raises:
            DataError: too few others are left for one of them.
        """
        return self._shots.check([(example.question, f"example {example.id}") for example in examples])

    def prompt(self, example: Problem) -> str:
        """The worked examples and the question.

        Raises:
            DataError: the question stands among them, and too few others are left.
        """
        return self._shots.head(example.question, f"example {example.id}") + self._template.prompt(example)

    def request(self, example: Problem) -> str:
        """The prompt as text: the generator adds a beginning-of-text token if the model has one."""
        return self.prompt(example)

    def answer(self, example: Problem) -> str:
        """The text of the answer, with the blanks that belong to it."""
        return self._template.answer(example)


def read_commonsense(path: str | Path, form: str = "text", limit: int | None = None) -> list[ChoiceItem]:
    """Multiple-choice items in the JSON layout of LLM-Adapters (BoolQ, PIQA, SIQA, HellaSwag, WinoGrande, ARC, OBQA).

    A file is an array of ``{"instruction": "<question> Answer1: ... Answer format: answer1/answer2", "answer":
    "answer1"}``.

    Args:
        path: the file.
        form: "text": the context is the question and the choices are the answers' texts (how a base model is judged);
            "label": the context is the whole instruction and the choices are " the correct answer is answer1" and so on
            (what an adapter trained on this layout writes).
        limit: at most this many.

    Returns:
        List of :class:`ChoiceItem`.

    Raises:
        ConfigError: unknown form. DataError: unreadable file or another layout.
    """
    if form not in ("text", "label"):
        raise ConfigError(f"form is {form!r}, expected 'text' or 'label'")
    try:
        rows = json.loads(_text(path))
    except ValueError as error:
        raise DataError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(rows, list) or not rows:
        raise DataError(f"{path} holds no JSON array of items")
    return [choice_item(row, f"{Path(path).parent.name}-{number}", form) for number, row in enumerate(rows[:limit], 1)]


def choice_item(row: Any, name: str, form: str = "text") -> ChoiceItem:
    """The :class:`ChoiceItem` called ``name`` of one row of that layout; DataError if it has another."""
    try:
        instruction, answer = row["instruction"].strip(), row["answer"]
        body, _, listing = instruction.rpartition("Answer format:")
        labels = [label.strip() for label in listing.strip().split("/")]
        correct = labels.index(answer)
    except (KeyError, TypeError, AttributeError, ValueError):
        raise DataError(f"item {name} has not the layout of the commonsense sets: an instruction that ends with "
                        "'Answer format: a/b/...', and an answer that is one of these") from None
    if form == "label":
        return ChoiceItem(name, f"{instruction}\n", tuple(f" the correct answer is {label}" for label in labels),
                          correct)
    question, texts = _answer_texts(body.strip(), labels, name)
    return ChoiceItem(name, f"Question: {question}\nAnswer:", tuple(f" {text}" for text in texts), correct)


def _answer_texts(body: str, labels: list[str], name: str) -> tuple[str, list[str]]:
    """(question, the answers' texts): what follows "Answer1:" and so on; labels like true/false are texts
    themselves."""
    places, start = [], 0
    for label in labels:
        found = body.find(f"{label.capitalize()}:", start)
        if found < 0:
            break
        places.append((found, found + len(label) + 1))
        start = places[-1][1]
    question = re.split(r"question:|sentence:|context:|goal:", body[:places[0][0]] if places else body, maxsplit=1)[-1]
    if not places:
        return question.strip(), labels
    if len(places) < len(labels):
        raise DataError(f"item {name}: {len(labels)} answers are announced, {len(places)} are there")
    ends = [begin for begin, _ in places[1:]] + [len(body)]
    texts = [body[begin:end].strip() for (_, begin), end in zip(places, ends)]
    if not all(texts):
        raise DataError(f"item {name}: an answer is empty")
    return question.strip(), texts


def evaluate_choices(model: TokenScorer, tokenizer: Tokenizer, items: Sequence[ChoiceItem], *,
                     path: str | Path | None = None, normalise: str = "token", batch_size: int = 8,
                     model_hash: str = "", adapter_hash: str = "", resume: bool = True,
                     progress: Callable[[int, int], Any] | None = None, team: Workers = Workers()) -> ChoiceResult:
    """``likelihood.multiple_choice`` with its items in JSON lines, resumable, and a summary beside them.

    Args:
        model, tokenizer, items, normalise, batch_size: as in ``multiple_choice``.
        path, model_hash, adapter_hash, resume, team: as in ``evaluate.evaluate``.
        progress: called with (items done, items).

    Returns:
        ChoiceResult.

    Raises:
        ConfigError, DataError: as both of them raise.
    """
    items = list(items)
    digest = hashlib.sha256(repr([(i.id, i.context, i.choices, i.answer) for i in items]).encode()).hexdigest()[:16]
    setup = {"kind": "multiple choice", "encoded": "jointly", "normalise": normalise, "model": model_hash,
             "adapter": adapter_hash,
             "examples": digest}
    if len({item.id for item in items}) != len(items):
        raise DataError("two multiple-choice items have the same id; ids must be unique")
    log = ItemLog(path, setup, resume, team)
    if team.world > 1:
        model, batch_size = ShardedScorer(model, team), batch_size * team.world
    try:
        waiting = [item for item in items if item.id not in log.items]
        for start in range(0, len(waiting), 4 * batch_size):
            found = multiple_choice(model, tokenizer, waiting[start:start + 4 * batch_size], normalise, batch_size)
            log.add([{**row, "tokens": 0} for row in found.items])
            if progress is not None:
                progress(len(log.items), len(items))
    finally:
        log.close()
    if not items:
        raise DataError("there are no multiple-choice items")
    rows = [{key: value for key, value in log.items[item.id].items() if key != "tokens"} for item in items]
    correct = sum(row["correct"] for row in rows)
    result = ChoiceResult(rows, correct / len(rows), wilson_interval(correct, len(rows)))
    if path is not None and team.first:
        write_json(Path(path).with_suffix(".summary.json"),
                   {"accuracy": result.accuracy, "correct": correct, "items": len(rows),
                    "interval": list(result.interval), "setup": setup})
    return result


@dataclasses.dataclass(frozen=True)
class TextPerplexity:
    """``perplexity`` a token of the tokenizer, ``word_perplexity`` a word between blanks (comparable over
    tokenizers)."""

    perplexity: float
    word_perplexity: float
    loss: float
    tokens: int
    words: int

    def summary(self) -> str:
        """One line with both perplexities and the counts."""
        return (f"perplexity {self.perplexity:.3f} a token, {self.word_perplexity:.2f} a word; "
                f"{self.tokens} tokens, {self.words} words")


def evaluate_perplexity(model: TokenScorer, tokenizer: Tokenizer, text: str, *, window: int = 512,
                        stride: int | None = None, batch_size: int = 1, limit: int | None = None,
                        path: str | Path | None = None, model_hash: str = "", adapter_hash: str = "",
                        resume: bool = True, progress: Callable[[int, int], Any] | None = None,
                        team: Workers = Workers()) -> TextPerplexity:
    """Perplexity of a text (WikiText's file, say) in overlapping windows, resumable window by window.

    Args:
        model, window, stride, batch_size: as in ``likelihood.perplexity``.
        tokenizer: has ``encode(text, add_special_tokens=...)``.
        text: the text as it is; WikiText's ``<unk>`` and spaced punctuation are not undone.
        limit: only the first this many characters.
        path, model_hash, adapter_hash, resume, team: as in ``evaluate.evaluate``.
        progress: called with (windows done, tokens done).

    Returns:
        TextPerplexity.
    """
    text = text[:limit]
    ids = list(tokenizer.encode(text, add_special_tokens=True))
    stride = window // 2 if stride is None else stride
    setup = {"kind": "perplexity", "window": window, "stride": stride, "model": model_hash, "adapter": adapter_hash,
             "text": hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:16]}
    log = ItemLog(path, setup, resume, team)
    if team.world > 1:
        model, batch_size = ShardedScorer(model, team), batch_size * team.world
    done = [0]

    def keep(begin: int, loss: float, tokens: int) -> None:
        log.add([{"id": str(begin), "loss": loss, "tokens": tokens}])
        done[0] += tokens
        if progress is not None:
            progress(len(log.items), done[0])

    try:
        found = perplexity(model, ids, window, stride, batch_size,
                           known={int(key): row["loss"] for key, row in log.items.items()}, on_window=keep)
    finally:
        log.close()
    words = len(text.split())
    by_word = found.loss * found.tokens / max(words, 1)
    result = TextPerplexity(found.perplexity, math.exp(by_word) if by_word < 700 else math.inf, found.loss,
                            found.tokens,
                            words)
    if path is not None and team.first:
        write_json(Path(path).with_suffix(".summary.json"), {**dataclasses.asdict(result), "setup": setup})
    return result


def read_text(path: str | Path) -> str:
    """A whole text file, for ``evaluate_perplexity``.

    Raises:
        DataError: unreadable, not UTF-8, or empty.
    """
    text = _text(path)
    if not text.strip():
        raise DataError(f"{path} is empty")
    return text


def _text(path: str | Path) -> str:
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DataError(f"cannot read the data file {path}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text (byte {error.start})") from None
