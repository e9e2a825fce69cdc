"""The parts of ``colora-ms quickstart``, each of which says what it does and how long that takes."""

from __future__ import annotations

import dataclasses
import gc
import json
import time
from collections.abc import Callable
from pathlib import Path

from colora_ms.decoding import Contrast, Generator
from colora_ms.decoding.completion import Completion, TokenRecord
from colora_ms.errors import ConfigError
from colora_ms.evaluation.evaluate import EvaluationResult, evaluate
from colora_ms.evaluation.item_log import write_json, write_text
from colora_ms.models.checkpoint import resolve_model
from colora_ms.recipes import report
from colora_ms.recipes.decoders import ADAPTER, Choice, choices
from colora_ms.recipes.mixed import Answered, MixedBatch, answer_mixed, ask, eight
from colora_ms.recipes.pace import Pace, in_words
from colora_ms.recipes.settings import evaluation_settings
from colora_ms.recipes.strength import copy_adapter
from colora_ms.recipes.why import changed_tokens, explain
from colora_ms.training.config import TrainingConfig
from colora_ms.training.run import load_data, train
from colora_ms.training.sources import load_examples
from colora_ms.training.templates import make_template
from colora_ms.training.trainer import TrainingResult
from colora_ms.versions import versions

#: Requests of a batch.
BATCH = 8

#: Lines of the example of one's own data.
OWN_LINES = 24

OWN_RECIPE = """\
# Your own data: put it into {data}, a JSON object a line with prompt and completion, then
#
#   colora-ms train {path}
#
# The lines that are there now are the quick start's. model_zoo/README.md has more recipes, colora_ms/training/README.md
# all layouts of data and all settings.
model: {model}
output: {output}
adapter: {{r: 8, lora_alpha: 16, target_modules: all-linear}}
data:
  train: {data}
  template: {template}
  max_length: 256
  batch_size: 4
optimizer: {{learning_rate: 1.0e-3}}
loop: {{epochs: 3}}
"""


class Tour:
    """Train an adapter, compare it with its base and their contrast, mix requests in a batch, look into the contrast.

    Everything that can be checked is checked at once: the recipe, its test, the model's files.

    Args:
        config: the recipe; its output folder is the tour's.
        items: held-out problems.
        alpha, beta: of the contrast.
        weaker, strength: name and strength of the adapter's second copy.
        max_new_tokens, scorer: in place of the recipe's, or None.
        say: called with each line.

    Raises:
        ConfigError: a recipe without problems to compare decoders on. CheckpointError: the model is not installed.
        DataError: the problems cannot be read.
    """

    def __init__(self, config: TrainingConfig, *, items: int, alpha: float, beta: float, weaker: str, strength: float,
                 max_new_tokens: int | None = None, scorer: str | None = None,
                 say: Callable[[str], None] = print) -> None:
        self.config, self.folder, self.say = config, Path(config.output), say
        self.contrast, self.weaker, self.strength = Contrast(alpha, beta), weaker, strength
        settings = evaluation_settings(config)
        if settings.task != "problems":
            raise ConfigError("the quick start answers problems, the recipe's section evaluate has task "
                              f"{settings.task}; use colora-ms run")
        self.settings = settings
        self.scorer = scorer or settings.scorer
        self.max_new_tokens = max_new_tokens or settings.max_new_tokens
        self.examples = load_examples(settings.data)[:settings.items][:items]
        resolve_model(config.model)
        self.training: TrainingResult
        self.greedy: EvaluationResult
        self.cold: EvaluationResult
        self.mixed: MixedBatch
        self.results: dict[str, EvaluationResult] = {}
        self.rows: list[dict] = []
        self.training_seconds = 0.0

    def train(self) -> None:
        """Train the adapter, and copy it to ``adapters/`` at two strengths."""
        loop, began = self.config.loop, time.perf_counter()
        steps = loop.steps or 0
        length = f"{steps} updates" if steps else f"{loop.epochs:g} epochs"
        self.say(f"1/4  train a LoRA adapter on {self.config.model}: {length} of {self.config.data.batch_size} "
                 f"examples, into {self.folder}\n     first its graph is compiled; how long the updates take is said "
                 "after some of them")
        pace = Pace(steps, lambda line: self.say(f"     {line}"))
        self.training = result = train(self.config, callbacks=[pace])
        self.training_seconds = time.perf_counter() - began
        for name, strength in ((ADAPTER, 1.0), (self.weaker, self.strength)):
            copy_adapter(result.adapter, self.folder / "adapters" / name, strength)
        self.say(f"     {result.steps} updates in {in_words(pace.running)}, compiling {in_words(pace.compiling)}; loss "
                 f"{result.losses[0]:.3f} -> {result.losses[-1]:.3f}\n     PEFT folders: {self.folder / 'adapters'}"
                 f"/{ADAPTER}, and /{self.weaker}, a copy at {self.strength:g} times the strength")
        gc.collect()  # the trained model leaves before the next one is loaded

    def mix(self) -> MixedBatch:
        """Eight requests with different adapters and contrasts, one after another and in one batch."""
        self.say(f"\n2/4  eight requests: the base, the adapter, its copy at {self.strength:g} times the strength, and "
                 "contrasts,\n     one after another and then as one batch; three graphs are compiled first, which is "
                 "not timed")
        adapters = {name: self.folder / "adapters" / name for name in (ADAPTER, self.weaker)}
        self.generator = Generator.from_pretrained(self.config.model, adapters, weight_format=self.config.weight_format,
                                                   max_rows=2 * BATCH)
        self.template = make_template(self.settings.template or self.config.data.template, self.generator.tokenizer,
                                      self.config.data.system)
        self.prompts = [self.template.request(example) for example in self.examples]
        stronger = Contrast(self.contrast.alpha, 2 * self.contrast.beta)
        asked = eight(self._pair(0), ADAPTER, self.weaker, [self.contrast, stronger])
        mixed = self.mixed = answer_mixed(self.generator, asked, self.max_new_tokens, self.settings.stop)
        width = max(len(one.label) for one in asked)
        for place, (one, completion) in enumerate(zip(asked, mixed.completions)):
            question = self.examples[place // 4 % len(self.examples)].question
            self.say(f"     {_line(question)[-40:]}  {one.label:{width}}  {_line(completion.text)[:60]}")
        same = "the same tokens" if not mixed.different else \
            f"OTHER TOKENS in {', '.join(mixed.asked[i].label for i in mixed.different)}"
        self.say(f"\n     one after another {sum(mixed.alone):.2f} s, as one batch {mixed.together:.2f} s: "
                 f"batch8_speedup {mixed.speedup:.2f}, {same}")
        return mixed

    def _pair(self, start: int) -> list:
        """Two prompts from ``start`` on; the first one again behind the last."""
        return [self.prompts[(start + place) % len(self.prompts)] for place in range(2)]

    def evaluate(self) -> None:
        """Answer the held-out problems, each with the base, the adapter, its copy and the contrast in one batch."""
        count = len(self.examples)
        batches = range(0, count, 2)
        self.say(f"\n3/4  answer {count} held-out problems, each with the base model, the adapter, its copy, and the "
                 f"contrast\n     of adapter and base, in such batches: about "
                 f"{in_words(len(batches) * self.mixed.together)}")
        answers: list[list[Completion]] = [[], [], [], []]
        began = time.perf_counter()
        for start in batches:
            asked = eight(self._pair(start), ADAPTER, self.weaker, [self.contrast] * 2)
            found = ask(self.generator, asked, self.max_new_tokens, self.settings.stop, records=True)
            for place, completion in enumerate(found):
                answers[place % 4].append(completion)
        self.say(f"     {4 * count} answers in {in_words(time.perf_counter() - began)}")
        base, greedy, cold = choices(["base", "greedy", self.contrast])
        half = Choice(self.weaker, f"LoRA at {self.strength:g} of its strength, greedy", True)
        for chosen, adapter, completions in ((base, None, answers[0]), (greedy, ADAPTER, answers[1]),
                                             (half, self.weaker, answers[2]), (cold, ADAPTER, answers[3])):
            result = evaluate(
                Answered(completions), self.examples, self.scorer, template=self.template, keep_records=True,
                path=self.folder / "evaluation" / f"{chosen.key}.jsonl",
                options={"adapter": adapter, "contrast": chosen.contrast, "max_new_tokens": self.max_new_tokens,
                         "stop": list(self.settings.stop)})
            speed = self.mixed.tokens_per_second(adapter, chosen.contrast is not None)
            result = dataclasses.replace(result, tokens_per_second=speed)
            self.rows.append(report.row_of(chosen, result))
            if chosen is not half:
                self.results[chosen.label] = result
        self.greedy, self.cold = self.results[greedy.label], self.results[cold.label]
        self.say(f"\n{report.table(self.rows)}\n\nCoLD against greedy, same adapter, same problems: "
                 f"{self.greedy.compare(self.cold).summary()}\ntokens/s: one request at a time, from step 2. No task "
                 "of ours was answered better with the contrast;\nask your own with colora-ms tune-contrast.")

    def why(self) -> None:
        """Three tokens that the contrast changed, with the scores that decided."""
        cold = self.cold
        answers = [[TokenRecord(**record) for record in item.get("records", ())] for item in cold.items]
        found = changed_tokens(self.generator, self.prompts, answers, ADAPTER, self.contrast)
        share = 100 * (cold.changed_share or 0.0)
        self.say(f"\n     of the tokens of the held-out answers the contrast changed {share:.1f} %"
                 + (f"; {len(found)} of them, and why:" if found else ""))
        for change in found:
            self.say(f"\n{explain(change, _line(self.examples[change.item].question), self.contrast)}")

    def own_recipe(self) -> Path:
        """Write a recipe for one's own data, with some lines of this training as an example; returns its path."""
        path = self.folder / "own.yaml"
        data = path.with_suffix(".jsonl")
        examples = load_data(self.config)[0][:OWN_LINES]
        rows = [{"prompt": one.question, "completion": one.completion} for one in examples]
        write_text(data, "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows))
        texts = {"model": self.config.model, "output": self.folder / "own", "data": data,
                 "template": self.config.data.template}
        write_text(path, OWN_RECIPE.format(path=path, **{name: json.dumps(str(text)) for name, text in texts.items()}))
        return path

    def measures(self, seconds: float) -> list[dict]:
        """What the tour measured, in the form of the benchmarks' results."""
        base, mixed = self.results["base"], self.mixed
        return [{"name": name, "value": value, "unit": unit} for name, value, unit in (
            ("batch8_speedup", mixed.speedup, "ratio"), ("batch8_equal", int(not mixed.different), "1 = yes"),
            ("base_accuracy", base.accuracy, "share"), ("adapter_accuracy", self.greedy.accuracy, "share"),
            ("contrast_accuracy", self.cold.accuracy, "share"), ("training_seconds", self.training_seconds, "s"),
            ("ready_seconds", seconds, "s"))]

    def write(self, seconds: float, path: str | None = None) -> None:
        """Write ``quickstart.json`` into the run's folder, and the measures to ``path`` if one is given.

        Raises:
            DataError: a file cannot be written.
        """
        measures = {"versions": versions(), "measures": self.measures(seconds)}
        write_json(self.folder / "quickstart.json", {
            **measures, "seconds": seconds, "training_seconds": self.training_seconds, "steps": self.training.steps,
            "decoders": self.rows, "results": {name: result.to_json() for name, result in self.results.items()}})
        if path is not None:
            write_json(path, measures)


def _line(text: str) -> str:
    """A text on one line."""
    return " / ".join(text.strip().splitlines())
