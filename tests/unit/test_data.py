"""Training data: sources, templates, encoding, batches, their order, state and sharding."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from colora_ms.errors import CheckpointError, ConfigError, DataError
from colora_ms.training import data, packing
from colora_ms.training.data import IGNORE, BatchLoader, EncodedExample, Example, TextTemplate


class ByteTokenizer:
    """One token a byte, shifted by 3; 1 begins a text, 2 ends it."""

    eos_token_ids = (2,)

    def encode(self, text, add_special_tokens=True):
        return [1] * add_special_tokens + [byte + 3 for byte in text.encode()]

    def decode(self, ids):
        return bytes(token - 3 for token in ids if token > 2).decode()

    def apply_chat_template(self, messages, add_generation_prompt=False):
        text = "".join(f"<{m['role']}>{m['content']}</>" for m in messages)
        return text + "<assistant>" * add_generation_prompt


def write(path, *lines):
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line)
                              for line in lines) + "\n", encoding="utf-8")
    return path


# -- JSON lines ------------------------------------------------------------------------------------


def test_jsonl_reads_both_formats_and_keeps_other_keys(tmp_path):
    path = write(tmp_path / "d.jsonl", {"prompt": "2+2=", "completion": "4", "level": 3}, "",
                 {"id": "x", "messages": [{"role": "system", "content": "s"},
                                          {"role": "user", "content": "q"},
                                          {"role": "assistant", "content": "a"}]})
    first, second = data.read_jsonl(path)
    assert (first.prompt, first.completion, first.id, first.meta) == \
        ("2+2=", "4", "d.jsonl:1", {"level": 3})
    assert second.id == "x" and second.completion == "a" and second.prompt is None
    assert [m["role"] for m in second.messages] == ["system", "user"]
    assert len(data.read_jsonl(path, limit=1)) == 1


@pytest.mark.parametrize("line, expected", [
    ('{"prompt": "a", "completion": ', "not valid JSON"),
    ("[" * 100000, "not valid JSON"),
    ("[1, 2]", "expected a JSON object"),
    ('{"promt": "a", "completion": "b"}', "Did you mean 'promt'"),
    ('{"prompt": "a"}', "'completion' is missing"),
    ('{"prompt": "  ", "completion": "b"}', "prompt is '  '"),
    ('{"prompt": "a", "completion": ""}', "completion is ''"),
    ('{"prompt": 3, "completion": "b"}', "prompt is 3"),
    ('{"messages": []}', "at least two messages"),
    ('{"messages": "hi"}', "at least two messages"),
    ('{"messages": [{"role": "user", "content": "q"}, {"role": "user", "content": "a"}]}',
     "assistant's answer"),
    ('{"messages": [{"role": "usr", "content": "q"}, {"role": "assistant", "content": "a"}]}',
     "Did you mean 'user'"),
    ('{"messages": [{"role": "user", "content": 1}, {"role": "assistant", "content": "a"}]}',
     "content 1"),
    ('{"messages": [7, {"role": "assistant", "content": "a"}]}', "messages[0] is 7"),
])
def test_jsonl_names_line_and_problem(tmp_path, line, expected):
    path = write(tmp_path / "bad.jsonl", {"prompt": "a", "completion": "b"}, line)
    with pytest.raises(DataError) as caught:
        data.read_jsonl(path)
    assert "bad.jsonl:2" in str(caught.value) and expected in str(caught.value)


def test_jsonl_counts_problems_and_refuses_missing_empty_and_binary_files(tmp_path):
    path = write(tmp_path / "many.jsonl", *["{}"] * 9)
    with pytest.raises(DataError, match=r"9 unusable lines.*and 4 more"):
        data.read_jsonl(path)
    with pytest.raises(DataError, match="cannot read"):
        data.read_jsonl(tmp_path / "absent.jsonl")
    with pytest.raises(DataError, match="cannot read"):
        data.read_jsonl(tmp_path)
    (tmp_path / "empty.jsonl").write_text("\n \n")
    with pytest.raises(DataError, match="holds no example"):
        data.read_jsonl(tmp_path / "empty.jsonl")
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "caf\xe9", "completion": "b"}')
    with pytest.raises(DataError, match="not UTF-8"):
        data.read_jsonl(tmp_path / "latin.jsonl")


# -- sources ---------------------------------------------------------------------------------------


def test_load_examples_joins_sources_and_explains_mistakes(tmp_path):
    path = write(tmp_path / "d.jsonl", {"q": "2+2=", "a": "4"})
    loaded = data.load_examples([
        {"kind": "jsonl", "path": str(path), "prompt_key": "q", "completion_key": "a"},
        {"kind": "jsonl", "path": path, "prompt_key": "q", "completion_key": "a"}])
    assert [example.completion for example in loaded] == ["4", "4"]
    for bad, expected in [({"kind": "jsonll", "path": "x"}, "Did you mean 'jsonl'"),
                          ({"kind": "jsonl"}, "needs path"),
                          ({"kind": "jsonl", "path": "x", "limt": 3}, "Did you mean 'limit'"),
                          ({"kind": "reasoning_gym", "task": "chain_sum", "size": 5}, "needs seed"),
                          ([], "expected a path"), (3, "expected a path"), ([3], "not a descrip")]:
        with pytest.raises(DataError, match=expected):
            data.load_examples(bad)


def test_reasoning_gym_is_deterministic_and_checks_its_arguments():
    pytest.importorskip("reasoning_gym")
    make = data.reasoning_gym_examples
    options = {"min_terms": 2, "max_terms": 2}
    first = make("chain_sum", 20, 5, options)
    assert first == make("chain_sum", 20, 5, options)
    assert len({example.id for example in first}) == 20
    for example in first:
        left, sign, right = example.prompt.split(":")[1].split("=")[0].split()
        value = int(left) + int(right) if sign == "+" else int(left) - int(right)
        assert int(example.completion) == value
    with pytest.raises(DataError, match="Did you mean 'chain_sum'"):
        make("chain_sums", 5, 1)
    with pytest.raises(DataError, match="Did you mean 'min_terms'"):
        make("chain_sum", 5, 1, {"min_term": 2})
    with pytest.raises(DataError, match="could not generate"):
        make("chain_sum", 5, 1, {"min_terms": -3})
    for size, seed in [(0, 1), (True, 1), (5, -1), (5, "a")]:
        with pytest.raises(DataError, match="expected an integer"):
            make("chain_sum", size, seed)


def test_gsm_symbolic_brings_its_worked_solution():
    pytest.importorskip("reasoning_gym")
    worked = data.reasoning_gym_examples("gsm_symbolic", 5, 3)
    bare = data.reasoning_gym_examples("gsm_symbolic", 5, 3, worked_solution=False)
    for long, short in zip(worked, bare):
        assert "####" in long.completion and "####" not in short.completion
        assert long.meta["answer"] == short.completion


def test_neighbouring_reasoning_gym_seeds_share_items_and_without_overlap_removes_them():
    pytest.importorskip("reasoning_gym")
    train = data.reasoning_gym_examples("spell_backward", 50, 1)
    held_out = data.reasoning_gym_examples("spell_backward", 10, 2)
    asked = {example.prompt for example in held_out}
    assert asked <= {example.prompt for example in train}  # the trap
    kept, removed = data.without_overlap(train, held_out)
    assert removed >= 10 and len(kept) + removed == 50
    assert not asked & {example.prompt for example in kept}
    assert kept == [example for example in train if example.prompt not in asked]
    with pytest.raises(DataError, match="all 50 training examples"):
        data.without_overlap(train, train)


def test_without_overlap_sees_through_format_and_blanks():
    chat = Example(messages=({"role": "user", "content": "2 + 2 ="},), completion="4")
    kept, removed = data.without_overlap(
        [chat, Example(prompt="2 +  2 =\n", completion="4"), Example(prompt="3", completion="3")],
        [Example(prompt="2 + 2 =", completion="four")])
    assert removed == 2 and kept[0].prompt == "3"


def test_hugging_face_folder_and_errors(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = {"question": ["a", "b", "c"], "answer": ["1", "2", "3"]}
    datasets.Dataset.from_dict(rows).save_to_disk(str(tmp_path / "set"))
    keys = {"prompt_key": "question", "completion_key": "answer"}
    read = data.load_examples({"kind": "datasets", "path": str(tmp_path / "set"), "limit": 2,
                               **keys})
    assert [(example.prompt, example.completion) for example in read] == [("a", "1"), ("b", "2")]
    with pytest.raises(DataError, match="is missing.*'answer', 'question'"):
        data.hugging_face_examples(str(tmp_path / "set"))
    (tmp_path / "junk").mkdir()
    with pytest.raises(DataError, match="datasets cannot load"):
        data.hugging_face_examples(str(tmp_path / "junk"))


# -- templates -------------------------------------------------------------------------------------


def test_text_template_moves_the_blank_to_the_answer():
    template = TextTemplate("Q: {prompt}\nA: {completion}")
    example = Example(prompt="{completion}{x}", completion="42")
    assert template.prompt(example) == "Q: {completion}{x}\nA:"
    assert template.answer(example) == " 42"
    assert template.digest == TextTemplate("Q: {prompt}\nA: {completion}").digest
    assert template.digest != TextTemplate("Q: {prompt}\nB: {completion}").digest


@pytest.mark.parametrize("text, expected", [
    ("{promt} {completion}", "Did you mean 'prompt'"), ("{prompt}", "end with"),
    ("{completion}", "once"), ("{prompt}{prompt}{completion}", "once"),
    ("{prompt}{completion}.", "end with"), (None, "expected a text")])
def test_text_template_refuses(text, expected):
    with pytest.raises(ConfigError, match=expected):
        TextTemplate(text)


def test_chat_template_with_and_without_system_message():
    tokenizer = ByteTokenizer()
    plain = data.make_template("chat", tokenizer)
    example = Example(prompt="q", completion="a")
    assert plain.prompt(example) == "<user>q</><assistant>"
    system = data.make_template("chat", tokenizer, system="be brief")
    assert system.prompt(example) == "<system>be brief</><user>q</><assistant>"
    own = Example(messages=({"role": "system", "content": "s"}, {"role": "user", "content": "q"}),
                  completion="a")
    assert system.prompt(own) == "<system>s</><user>q</><assistant>"
    assert plain.digest != system.digest
    with pytest.raises(ConfigError, match="needs the chat template"):
        data.make_template("{prompt}{completion}", tokenizer, system="x")
    with pytest.raises(DataError, match="conversation of 2 messages"):
        TextTemplate().prompt(own)


# -- encoding --------------------------------------------------------------------------------------


def test_encoding_puts_labels_on_the_answer_and_its_end_only():
    tokenizer = ByteTokenizer()
    for template, begin, end in [(TextTemplate("{prompt}: {completion}"), [1], [2]),
                                 (data.make_template("chat", tokenizer), [], tokenizer.encode("</>", False))]:
        example = Example(prompt="ab", completion="cde")
        encoded = data.encode_examples([example], tokenizer, template, 99)
        item = encoded[0]
        prompt = data.prompt_ids(example, tokenizer, template)
        assert prompt[:len(begin)] == begin and (begin or prompt[0] != 1)
        answer = tokenizer.encode(" cde" if begin else "cde", add_special_tokens=False) + end
        assert item.ids.tolist() == prompt + answer
        assert item.labels.tolist() == [IGNORE] * len(prompt) + answer
        assert item.ids.dtype == item.labels.dtype == np.int32


def test_encoding_counts_long_examples_or_refuses_them():
    examples = [Example(prompt="x" * n, completion="y", id=f"e{n}") for n in (3, 50, 4, 80)]
    template = TextTemplate("{prompt}{completion}")
    encoded = data.encode_examples(examples, ByteTokenizer(), template, 20)
    assert encoded.skipped == ["e50", "e80"] and encoded.longest_skipped == 83
    assert [item.index for item in encoded.items] == [0, 2]
    assert "skipped 2 longer than 20 tokens (longest 83)" in encoded.summary()
    with pytest.raises(DataError, match="example e50 has 53 tokens"):
        data.encode_examples(examples, ByteTokenizer(), template, 20, on_long="error")
    with pytest.raises(DataError, match="all 4 examples are longer than max_length=4"):
        data.encode_examples(examples, ByteTokenizer(), template, 4)
    with pytest.raises(DataError, match="no examples"):
        data.encode_examples([], ByteTokenizer(), template, 4)
    with pytest.raises(DataError, match="do the two belong together"):
        data.encode_examples(examples, ByteTokenizer(), template, 99, vocab_size=100)
    for arguments in ({"max_length": 1}, {"max_length": True}, {"on_long": "cut"}):
        with pytest.raises(ConfigError):
            data.encode_examples(examples, ByteTokenizer(), template,
                                 **{"max_length": 20, **arguments})


def test_encoding_needs_an_end_token():
    class Endless(ByteTokenizer):
        eos_token_ids = ()
    with pytest.raises(DataError, match="no end-of-text token"):
        data.encode_examples([Example(prompt="a", completion="b")], Endless(), TextTemplate(), 99)


# -- batches ---------------------------------------------------------------------------------------


def items_of(lengths):
    """Examples whose every token is unique, half of it prompt."""
    items, start = [], 1
    for index, length in enumerate(lengths):
        ids = np.arange(start, start + length, dtype=np.int32)
        labels = np.where(np.arange(length) < length // 2, IGNORE, ids).astype(np.int32)
        items.append(EncodedExample(ids, labels, index))
        start += length
    return items


def fed(batches):
    """(input token, label) of all real positions of the batches, and a check of the padding."""
    pairs = []
    for batch in batches:
        for ids, labels, length in zip(batch.ids, batch.labels, batch.lengths):
            assert (labels[length:] == IGNORE).all() and (ids[length:] == 0).all()
            pairs += list(zip(ids[:length].tolist(), labels[:length].tolist()))
    return pairs


def wanted_pairs(items):
    return sorted((int(a), int(b)) for item in items
                  for a, b in zip(item.ids[:-1], item.labels[1:]))


lengths_lists = st.lists(st.integers(2, 40), min_size=1, max_size=30)


@settings(max_examples=60, deadline=None)
@given(lengths_lists, st.integers(1, 5), st.integers(1, 4), st.booleans(), st.integers(1, 3))
def test_an_epoch_feeds_every_token_once_for_any_sharding(lengths, rows, buckets, packing, world):
    items = items_of(lengths)
    loaders = [BatchLoader(items, rows, seed=1, max_buckets=buckets, multiple=4, packing=packing,
                           rank=rank, world=world) for rank in range(world)]
    shards = [list(loader.epoch_batches()) for loader in loaders]
    assert len({len(shard) for shard in shards}) == 1
    for together in zip(*shards):
        assert len({batch.ids.shape for batch in together}) == 1
        assert together[0].ids.shape[0] == rows
        assert together[0].ids.shape[1] in loaders[0].buckets
    batches = [batch for shard in shards for batch in shard]
    assert sorted(fed(batches)) == wanted_pairs(items)
    # Rows that only fill a batch up count nothing.
    assert sum(batch.tokens for batch in batches) == sum(lengths) - len(lengths)
    assert all((batch.segments is not None) == packing for batch in batches)


def test_the_summary_says_shapes_and_the_share_of_real_tokens():
    items = items_of([5, 5, 5, 5, 9, 9])
    assert BatchLoader(items, 2, buckets=[5, 10]).summary() == \
        "3 an epoch (2 of 2 x 5, 1 of 2 x 10 tokens), 80 % of them real tokens"
    assert BatchLoader(items, 2, buckets=[16], packing=True, world=2).summary() == \
        "1 an epoch (1 of 2 x 16 tokens), 50 % of them real tokens"


def test_ranks_together_see_the_rows_of_one_process():
    items = items_of(range(2, 40))
    whole = BatchLoader(items, 6, seed=4)
    shards = [BatchLoader(items, 2, seed=4, rank=rank, world=3) for rank in range(3)]
    for _ in range(20):
        batch = whole.next()
        parts = [shard.next() for shard in shards]
        rows = {tuple(row) for part in parts for row in part.ids.tolist()}
        assert rows == {tuple(row) for row in batch.ids.tolist()}


def test_order_depends_on_the_seed_and_the_epoch_only():
    items = items_of(range(2, 40))

    def run(seed, steps=30):
        loader = BatchLoader(items, 4, seed=seed)
        return [loader.next().ids.tobytes() for _ in range(steps)]
    assert run(1) == run(1)
    assert run(1) != run(2)
    loader = BatchLoader(items, 4, seed=1)
    count = loader.batches_per_epoch
    sequence = run(1, 2 * count)
    assert sequence[:count] != sequence[count:]
    still = BatchLoader(items, 4, seed=1, shuffle=False, buckets=[64])
    assert [pair[0] for pair in fed(still.epoch_batches())] == \
        [int(token) for item in items for token in item.ids[:-1]]


@pytest.mark.parametrize("packing", [False, True])
def test_state_continues_with_the_very_next_batch(packing):
    items = items_of(range(2, 40))
    loader = BatchLoader(items, 4, seed=7, packing=packing)
    for done in range(25):
        state = json.loads(json.dumps(loader.state()))
        other = BatchLoader(items, 4, seed=7, packing=packing)
        other.restore(state)
        want = loader.next()
        got = other.next()
        assert got.ids.tobytes() == want.ids.tobytes(), done
        assert got.labels.tobytes() == want.labels.tobytes()
        assert loader.state() == other.state()
    assert loader.epoch >= 1


def test_restore_lists_what_differs():
    items = items_of(range(2, 20))
    state = BatchLoader(items, 4, seed=7).state()
    with pytest.raises(CheckpointError) as caught:
        BatchLoader(items[:-1], 3, seed=8).restore(state)
    for word in ("seed is 8, was 7", "data is", "rows is 3, was 4", "examples is 17, was 18"):
        assert word in str(caught.value)
    for change in ({"position": 999}, {"position": -1}, {"epoch": "1"}, {"epoch": True}):
        loader = BatchLoader(items, 4, seed=7)
        with pytest.raises(CheckpointError):
            loader.restore({**state, **change})
        assert loader.state() == state


def test_loader_refuses_bad_arguments():
    items = items_of([5, 6])
    with pytest.raises(DataError, match="data set is empty"):
        BatchLoader([], 2)
    for arguments in ({"batch_size": 0}, {"batch_size": 2.5}, {"rank": 1}, {"rank": -1},
                      {"world": 0}, {"seed": -1}, {"buckets": [4]}, {"buckets": [0, 9]}):
        with pytest.raises(ConfigError):
            BatchLoader(items, **{"batch_size": 2, **arguments})


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=25), st.integers(1, 3))
def test_buckets_waste_no_more_than_any_other_choice(lengths, count):
    from itertools import combinations

    def padded(buckets):
        return sum(min(b for b in buckets if b >= length) for length in lengths)
    chosen = data.choose_buckets(lengths, count, multiple=8)
    assert len(chosen) <= count and chosen[-1] >= max(lengths)
    values = sorted({-(-length // 8) * 8 for length in lengths})
    best = min(padded(set(some) | {values[-1]})
               for size in range(count) for some in combinations(values, min(size, len(values))))
    assert padded(chosen) == best


def test_buckets_respect_the_limit():
    assert data.choose_buckets([30, 45], 2, multiple=32, limit=48) == [32, 48]
    with pytest.raises(ConfigError, match="more than the limit"):
        data.choose_buckets([30, 49], 2, limit=48)
    with pytest.raises(ConfigError):
        data.choose_buckets([], 2)


@settings(max_examples=60, deadline=None)
@given(lengths_lists, st.integers(1, 5), st.lists(st.integers(40, 90), min_size=1, max_size=3), st.integers(0, 9))
def test_packed_examples_stand_whole_and_apart(lengths, rows, buckets, seed):
    """Each segment is one example without its last token; its labels are its own next tokens; batches have one
    width."""
    items = items_of(lengths)
    loader = BatchLoader(items, rows, seed=seed, buckets=buckets, packing=True)
    seen = []
    batches = list(loader.epoch_batches())
    assert len({batch.segments.shape for batch in batches}) == 1
    for batch in batches:
        assert batch.parts is batch.segments and batch.lengths.dtype == batch.segments.dtype == np.int32
        assert np.array_equal(batch.lengths, batch.segments.sum(1))
        for ids, labels, parts in zip(batch.ids, batch.labels, batch.segments):
            for end, size in zip(np.cumsum(parts), parts):
                if size:
                    seen.append((tuple(ids[end - size:end].tolist()), tuple(labels[end - size:end].tolist())))
    assert sorted(seen) == sorted((tuple(item.ids[:-1].tolist()), tuple(item.labels[1:].tolist())) for item in items)


def test_packing_fills_rows_without_splitting():
    items = items_of([5, 9, 4, 3, 8, 2])
    rows = data.pack_examples(items, 12, range(6))
    assert sorted(position for row in rows for position in row) == list(range(6))
    assert all(sum(len(items[k]) for k in row) <= 12 for row in rows)
    assert len(rows) == 3  # 31 tokens, the lower bound


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=60), st.integers(50, 120), st.integers(1, 70))
def test_packing_is_no_worse_than_first_fit(sizes, length, window):
    """Each example stands once, no row is too full, and in a window at most one row is less than half full."""
    order = np.random.default_rng(0).permutation(len(sizes))
    rows = packing.pack_examples(sizes, length, order, int, window)
    assert sorted(position for row in rows for position in row) == list(range(len(sizes)))
    filled = [sum(sizes[k] for k in row) for row in rows]
    assert max(filled) <= length
    assert rows == packing.pack_examples(sizes, length, list(order), int, window)
    if window >= len(sizes):
        assert sum(one <= length / 2 for one in filled) <= 1
        places = {position: place for place, position in enumerate(order.tolist())}
        opened = [places[max(row, key=lambda k: (sizes[k], -places[k]))] for row in rows]
        assert opened == sorted(opened)  # the order of the longest ones is kept


def test_rows_get_longer_where_examples_cannot_share_one():
    # 65 tokens fill a row of 80 badly; two of them and one of 30 fill one of 160.
    assert packing.packed_shape(items_of([66] * 40 + [31] * 20), 8) == (4, 160)
    assert packing.packed_shape(items_of([17, 17, 33] * 30), 8) == (8, 32)
    assert packing.packed_shape(items_of([41] * 40), 8) == (1, 384)  # 9 of 40: as good as it gets
    assert packing.packed_shape(items_of([41] * 40), 3) == (1, 144)
    assert packing.packed_shape(items_of([64]), 1) == packing.packed_shape(items_of([2, 60]), 1) == (1, 64)


# -- windows of accumulation -----------------------------------------------------------------------


@pytest.mark.parametrize("accumulation, epochs, expected", [
    (3, 1, [3, 1]), (64, 1, [4]), (1, 1, [1] * 4), (4, 2, [4, 4]), (3, 2, [3, 1, 3, 1]), (3, 1.5, [3, 1, 2]),
    (64, 0.5, [2]), (3, 0.1, [1]), (2, 1.75, [2, 2, 2, 1]), (3, 2.25, [3, 1, 3, 1, 1])])
@pytest.mark.parametrize("world", [1, 2])
def test_windows_end_with_their_epoch(accumulation, epochs, expected, world):
    items = items_of([5] * 4 * world)
    for rank in range(world):
        loader = BatchLoader(items, 1, seed=3, rank=rank, world=world)
        updates, end = loader.updates(epochs, accumulation)
        windows = [loader.window(accumulation, end) for _ in range(updates)]
        assert [len(window) for window in windows] == expected
        assert sum(batch.tokens for window in windows for batch in window) == 4 * sum(expected)
        state = loader.state()
        assert (state["epoch"], state["position"]) == end


@settings(max_examples=60, deadline=None)
@given(lengths_lists, st.integers(1, 4), st.integers(1, 9), st.floats(0.01, 4), st.booleans())
def test_updates_feed_what_the_epochs_ask_for(lengths, rows, accumulation, epochs, packed):
    loader = BatchLoader(items_of(lengths), rows, seed=2, packing=packed, multiple=4)
    updates, end = loader.updates(epochs, accumulation)
    before, windows = [], []
    for number in range(updates):
        windows.append(loader.window(accumulation, end))
        before.append(loader.epoch)
    assert before == sorted(before) and all(1 <= len(window) <= accumulation for window in windows)
    tokens, whole = sum(batch.tokens for window in windows for batch in window), sum(lengths) - len(lengths)
    assert int(epochs) * whole <= tokens <= -(-epochs // 1) * whole
    most = max(batch.tokens for window in windows for batch in window) if windows else 0
    if not packed and len({*lengths}) == 1 and len(lengths) % rows == 0:
        assert abs(tokens - epochs * whole) <= most
    assert loader.state()["epoch"] == end[0] and loader.state()["position"] == end[1]


def test_windows_without_an_end_go_on_into_the_next_epoch_and_resume_inside_one():
    items = items_of([5] * 4)
    loader = BatchLoader(items, 1, seed=3)
    sizes, states = [], []
    for _ in range(5):
        states.append(loader.state())
        sizes.append(len(loader.window(3)))
    assert sizes == [3, 1, 3, 1, 3]
    for state, size in zip(states, sizes):
        other = BatchLoader(items, 1, seed=3)
        other.restore(json.loads(json.dumps(state)))
        assert len(other.window(3)) == size


def test_a_run_that_packed_otherwise_is_not_continued():
    items = items_of(range(2, 20))
    loader = BatchLoader(items, 4, seed=7, packing=True)
    state = loader.state()
    state["settings"]["packing"] = True
    with pytest.raises(CheckpointError, match="packing is best fit.*, was True"):
        loader.restore(state)
