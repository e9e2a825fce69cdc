"""What an evaluation counts behind a stop string: nothing. The batch decoder's numbers are the engine's."""

from types import SimpleNamespace

import numpy as np
import pytest

from colora_ms.decoding import Contrast, Generator
from colora_ms.evaluation.evaluate import evaluate

RANDOM = np.random.default_rng(23)
PROMPTS = [RANDOM.integers(3, 97, n).tolist() for n in (2, 5, 17, 9, 30, 3)]
TEMPLATE = SimpleNamespace(digest="ids", request=lambda example: example.ids)
LONGEST = 30


@pytest.fixture(scope="module")
def generator(adapter_folder, tiny_decoder, word_tokenizer):
    from colora_ms.adapters import load_adapters

    decoder = tiny_decoder()
    handle = load_adapters(decoder, {"a0": adapter_folder / "a0"})
    return Generator(decoder, word_tokenizer, handle, max_rows=8)


def until(tokens, stop, tokenizer):
    """How many tokens the answer has up to the one that completes a stop string, from the definition."""
    for count in range(1, len(tokens) + 1):
        if any(text in tokenizer.decode(tokens[:count]) for text in stop):
            return count
    return len(tokens)


@pytest.mark.parametrize("contrast", [None, Contrast(0.1, 0.8), Contrast(0.05, 2.0, "entropy")])
def test_tokens_and_changes_are_those_up_to_the_stop_string(engine, generator, word_tokenizer, contrast):
    options = dict(adapter="a0", contrast=contrast, max_new_tokens=LONGEST, records=True)
    whole = generator.generate(PROMPTS, **options)
    # A stop string inside each answer, some behind a few tokens only, of one or two tokens; the last answer has none.
    stop = [" " + word_tokenizer.decode(one.tokens[place:place + size])
            for one, place, size in zip(whole[:-1], (1, 3, 7, 13, 20), (1, 2, 1, 2, 1))]
    examples = [SimpleNamespace(id=str(i), ids=ids, completion="1") for i, ids in enumerate(PROMPTS)]
    result = evaluate(generator, examples, "exact", template=TEMPLATE, batch_size=3, options={**options, "stop": stop})
    handles = [engine.submit(prompt, stop=stop, **options) for prompt in PROMPTS]
    answers = [handle.result(60) for handle in handles]  # before the next graph runs in this thread
    counts = [until(one.tokens, stop, word_tokenizer) for one in whole]
    assert any(count < len(one.tokens) for count, one in zip(counts, whole))
    for item, answer, one, count in zip(result.items, answers, whole, counts):
        changed = sum(record.changed for record in one.records[:count])
        assert (item["tokens"], item["changed"], item["text"]) == (count, changed, answer.text)
        assert (item["tokens"], item["changed"]) == (len(answer.tokens),
                                                     sum(record.changed for record in answer.records))
    assert result.mean_tokens == sum(counts) / len(counts)
    assert result.changed_share == sum(item["changed"] for item in result.items) / sum(counts)
