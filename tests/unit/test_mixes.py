"""Requests of several rows: mixes, strengths, penalties, log-probabilities and forms, against steppers and NumPy."""

import json
import threading

import numpy as np
import pytest

from colora_ms import Contrast, Generator, Sampling
from colora_ms.adapters import LoraConfig, inject
from colora_ms.decoding.mix import OWN, Context, Ensemble, Guide, Mix, Negative, Voice, as_mapping, mix_of
from colora_ms.decoding.options import Options
from colora_ms.decoding.stepwise import Stepper
from colora_ms.errors import DecodingError
from colora_ms.kernels import backend

NAMES = ("a", "b", "c")
PROMPT = [5, 6, 7, 8, 6, 7, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22]
OTHER = [7, 8, 9]
MIXES = {
    "log": Ensemble(NAMES), "prob": Ensemble(["a", None, "c"], [3, 1, 2], "prob"),
    "cut": Ensemble(["a", "b"], [1, 2], alpha=0.3), "prob cut": Ensemble(NAMES, None, "prob", alpha=0.2),
    "guide": Guide("a", "b", 1.5), "guide without cut": Guide("a", None, 0.7, alpha=None),
    "context": Context(0.05, 1.0, without=OTHER), "context, divergence": Context(0.05, 2.0, OTHER, "divergence"),
    "negative": Negative(OTHER, 1.8), "negative, cut": Negative(OTHER, 2.5, alpha=0.2),
    "one": Mix((Voice("only", "b"),)),
}


@pytest.fixture(scope="module")
def made(tiny_decoder, word_tokenizer):
    """(generator with three adapters, their handle)."""
    net = tiny_decoder()
    config = LoraConfig(r=3, lora_alpha=9, target_modules="all-linear", init_lora_weights=False)
    handle = inject(net, config, "a", slots=4, seed=1)
    for name in NAMES[1:]:
        handle.add_adapter(name, config)
    return Generator(net, word_tokenizer, handle, max_rows=16, chunk=7), handle


def log_softmax(x):
    away = np.asarray(x, np.float64) - x.max()
    return away - np.log(np.exp(away).sum())


def mixed(logits, mix, adapter):
    """The log-probabilities of the mixture, -inf outside the cut, as the papers define them."""
    logs = [log_softmax(row) for row in logits]
    weights = [1 + mix.beta, -mix.beta] if mix.by == "contrast" else [voice.weight for voice in mix.voices]
    if mix.adapt == "divergence":
        p, q = np.exp(logs[0]), np.exp(logs[1])
        m = (p + q) / 2
        share = ((p * np.log2(p / m)).sum() + (q * np.log2(q / m)).sum()) / 2
        weights = [1 + mix.beta * share, -mix.beta * share]
    scores = np.log(sum(w * np.exp(one) for w, one in zip(weights, logs))) if mix.by == "probability" \
        else sum(w * one for w, one in zip(weights, logs))
    voice = {"none": None, "leading": logs[0], "mixture": scores}[mix.within]
    valid = np.ones(len(scores), bool) if voice is None else voice >= np.log(mix.alpha) + voice.max()
    return log_softmax(np.where(valid, scores, -np.inf)), logs


def naive(generator, handle, mix, adapter, count):
    """[(log-probabilities of the mixture, those of each row)] of ``count`` greedy steps, a forward for each row."""
    slots = [-1 if (name := adapter if voice.adapter == OWN else voice.adapter) is None else handle.slot(name)
             for voice in mix.voices]
    stepper = Stepper(generator.decoder, len(slots), 64).use(slots)
    new, steps = [PROMPT if voice.prompt is None else voice.prompt for voice in mix.voices], []
    for _ in range(count):
        steps.append(mixed(stepper.append(new), mix, adapter))
        new = [[int(steps[-1][0].argmax())]] * len(slots)
    return steps


def one(generator, mix, **more):
    return generator.generate([PROMPT], adapter="a" if mix.needs_adapter else None, mix=mix, ignore_eos=True,
                              **{"max_new_tokens": 9, **more})[0]


@pytest.mark.parametrize("name", MIXES)
def test_a_mix_is_what_the_papers_say(made, name):
    generator, handle = made
    mix = MIXES[name]
    found = one(generator, mix, records=True, logprobs=4)
    for step, (record, listed, (chances, voices)) in enumerate(
            zip(found.records, found.logprobs, naive(generator, handle, mix, "a", 9))):
        assert record.token == listed.token == chances.argmax(), step
        assert listed.logprob == pytest.approx(chances.max(), abs=1e-4)
        best = np.sort(chances[np.isfinite(chances)])[::-1][:4]
        np.testing.assert_allclose([chance for _, chance, _ in listed.tops], best, atol=1e-4)
        if mix.by != "contrast":
            assert [role for role, _ in record.voices] == [voice.role for voice in mix.voices]
            np.testing.assert_allclose([chance for _, chance in record.voices], [one[record.token] for one in voices],
                                       atol=1e-4)
    assert len(found.tokens) == 9 and len(found.logprobs) == 9


def test_mixes_do_not_depend_on_their_neighbours_nor_on_their_form(made, monkeypatch):
    """All beside each other, in chunks and with sampling; each alone; and by the Cells: the same to the last bit."""
    generator, handle = made
    sampling = [Sampling(temperature=0.9, top_k=12, seed=i) if i % 2 else None for i in range(len(MIXES))]
    mixes = list(MIXES.values())
    adapters = ["a" if mix.needs_adapter else None for mix in mixes]
    options = dict(records=True, logprobs=2, max_new_tokens=8, ignore_eos=True)
    together = generator.generate([PROMPT] * len(mixes), adapter=adapters, mix=mixes, sampling=sampling, **options)
    for mix, adapter, drawn, answer in zip(mixes, adapters, sampling, together):
        alone = generator.generate([PROMPT], adapter=adapter, mix=mix, sampling=drawn, **options)[0]
        assert alone == answer
    assert len({answer.tokens for answer in together}) >= 7
    if backend() != "cpu":
        return
    monkeypatch.setattr(type(generator.decoder), "fused_step", property(lambda self: False))
    cells = Generator(generator.decoder, generator.tokenizer, handle, max_rows=16, chunk=7)
    for answer, other in zip(together, cells.generate([PROMPT] * len(mixes), adapter=adapters, mix=mixes,
                                                      sampling=sampling, **options)):
        assert other == answer


def test_a_contrast_is_a_mix(made):
    generator, _ = made
    for contrast in (Contrast(0.1, 0.7), Contrast(0.05, 1.5, "entropy", skip_copies=True)):
        options = dict(adapter="b", records=True, max_new_tokens=12, ignore_eos=True)
        want = generator.generate([PROMPT], contrast=contrast, **options)[0]
        assert generator.generate([PROMPT], mix=contrast, **options)[0] == want
        by_hand = mix_of({"by": "contrast", "within": "leading", "alpha": contrast.alpha, "beta": contrast.beta,
                          "adapt": contrast.adapt, "skip_copies": contrast.skip_copies,
                          "voices": [{"role": "expert"}, {"role": "amateur", "adapter": None}]})
        assert generator.generate([PROMPT], mix=by_hand, **options)[0] == want


def test_the_strength_of_an_adapter(made):
    """1 changes no bit, 0 is the base model, a half is an adapter of half the scale."""
    if backend() != "cpu":
        pytest.skip("needs the compiled CPU library")
    generator, handle = made

    def run(**options):
        return generator.generate([PROMPT], max_new_tokens=10, records=True, ignore_eos=True, **options)[0]

    whole = run(adapter="a")
    assert run(adapter="a", adapter_scale=1.0) == whole
    assert run(adapter="a", adapter_scale=0.0).records == run().records
    half = run(adapter="a", adapter_scale=0.5)
    assert half.tokens != whole.tokens
    scales = [adapter.scale for adapter in layers_with_scales(generator.decoder)]
    before = [scale.asnumpy().copy() for scale in scales]
    import mindspore as ms

    for scale, value in zip(scales, before):
        scale.set_data(ms.Tensor(value * np.float32(0.5)))
    try:
        again = run(adapter="a")
    finally:
        for scale, value in zip(scales, before):
            scale.set_data(ms.Tensor(value))
    assert again.records == half.records
    mix = Ensemble(["a", "a"], scales=[1.0, 0.5])
    assert one(generator, mix).tokens != one(generator, Ensemble(["a"])).tokens or half.tokens == whole.tokens


def test_strengths_need_the_operator(made, monkeypatch):
    """Elsewhere they are refused, and what the refusal advises has the same tokens."""
    generator, handle = made
    want = generator.generate([PROMPT], adapter="a", adapter_scale=0.5)[0].tokens
    handle.add_weighted_adapter(["a"], [0.5], "half", "cat")
    assert generator.generate([PROMPT], adapter="half")[0].tokens == want
    handle.delete_adapter("half")
    monkeypatch.setattr(type(generator.decoder), "fused_step", property(lambda self: False))
    said = (r"adapter 'a' at 0\.5 times its scale .* on CPU with the 'cpu' kernels .*"
            r"add_weighted_adapter\(\['a'\], \[0\.5\]")
    with pytest.raises(DecodingError, match=said):
        generator.generate([PROMPT], adapter="a", adapter_scale=0.5)
    with pytest.raises(DecodingError, match="adapter 'a' at 0.25 times its scale"):
        generator.generate([PROMPT], mix=Mix((Voice("one", "a", scale=0.25), Voice("two", "b"))))


def layers_with_scales(decoder):
    return [cell for _, cell in decoder.cells_and_names() if hasattr(cell, "scale") and hasattr(cell, "down")]


@pytest.mark.parametrize("options", [
    dict(presence_penalty=1.5), dict(frequency_penalty=0.8), dict(repetition_penalty=1.7),
    dict(presence_penalty=-0.5, frequency_penalty=0.3, repetition_penalty=1.2, logit_bias={40: 2.5, "41": -3}),
    dict(logit_bias={50: 100.0}), dict(logit_bias={50: -100}, min_tokens=5),
])
def test_penalties_and_bias_match_their_definitions(made, options):
    generator, handle = made
    got = generator.generate([PROMPT], adapter="c", max_new_tokens=14, ignore_eos=True, logprobs=0, **options)[0]
    asked = Options.asked(**options)
    stepper, new, made_ = Stepper(generator.decoder, 1, 64).use([handle.slot("c")]), PROMPT, []
    for token, listed in zip(got.tokens, got.logprobs):
        x = stepper.append([new])[0].astype(np.float64)
        seen = sorted(set(PROMPT) | set(made_))
        x[seen] = np.where(x[seen] < 0, x[seen] * asked.repetition_penalty, x[seen] / asked.repetition_penalty)
        for other in set(made_):
            x[other] -= asked.presence_penalty + asked.frequency_penalty * made_.count(other)
        for other, bias in asked.logit_bias:
            x[other] += bias
        assert token == x.argmax() and listed.logprob == pytest.approx(log_softmax(x).max(), abs=1e-4)
        made_.append(token)
        new = [token]


def test_penalties_with_a_contrast_do_not_depend_on_the_form(made, monkeypatch):
    generator, handle = made
    options = dict(adapter="a", contrast=Contrast(0.05, 1.0, "entropy"), frequency_penalty=0.9, repetition_penalty=1.3,
                   logit_bias={12: 1.5}, min_tokens=6, max_new_tokens=12, records=True, logprobs=3)
    want = generator.generate([PROMPT, OTHER], **options)
    assert want != generator.generate([PROMPT, OTHER], **{**options, "frequency_penalty": 0.0})
    if backend() == "cpu":
        monkeypatch.setattr(type(generator.decoder), "fused_step", property(lambda self: False))
        assert Generator(generator.decoder, generator.tokenizer, handle).generate([PROMPT, OTHER], **options) == want


def test_no_end_before_min_tokens(made):
    generator, _ = made
    plain = generator.generate([PROMPT], adapter="a", max_new_tokens=30, ignore_eos=True)[0].tokens
    stops = sorted(set(plain[:4]))
    for least in (0, 3, 10):
        found = generator.generate([PROMPT], adapter="a", max_new_tokens=30, stop_token_ids=stops, min_tokens=least)[0]
        assert len(found.tokens) > least and not set(found.tokens[:least]) & {*stops, 2}
    assert generator.generate([PROMPT], adapter="a", max_new_tokens=30, stop_token_ids=stops)[0].finish_reason == "stop"


@pytest.mark.parametrize("wanted, words", [
    (dict(mix={"ensemble": {"adapters": []}}), ("adapters", "list of adapter names")),
    (dict(mix={"ensemble": {"adapters": ["a"], "weights": [1, 2]}}), ("weights", "1 numbers")),
    (dict(mix={"ensembel": {}}), ("ensembel", "Did you mean 'ensemble'")),
    (dict(mix={"ensemble": {"adapter": ["a"]}}), ("adapter", "Did you mean 'adapters'")),
    (dict(mix={"guide": {"expert": "a"}}), ("mix.guide", "lacks anti")),
    (dict(mix={"voices": [{}] * 9}), ("1 to 8 voices",)), (dict(mix="a"), ("mapping",)),
    (dict(mix={"voices": [{"weight": 0.0}]}), ("not all 0",)),
    (dict(mix={"voices": [{}], "by": "contrast"}), ("two voices",)),
    (dict(mix=Negative([1]), contrast=Contrast()), ("both given",)),
    (dict(mix={"voices": [{}], "beta": 1.0}), ("belong to a contrast",)),
    (dict(logit_bias={"x": 1}), ("logit_bias", "'x'")), (dict(logit_bias={3: 101}), ("logit_bias[3]", "100")),
    (dict(logit_bias=7), ("logit_bias=7",)), (dict(logprobs=21), ("0 to 20",)),
    (dict(repetition_penalty=0), ("repetition_penalty=0", "(0, 100]")), (dict(presence_penalty=3), ("[-2, 2]",)),
    (dict(min_tokens=9, max_new_tokens=8), ("min_tokens=9", "max_new_tokens=8")),
    (dict(grammar={"xml": 1}), ("xml", "json_schema")), (dict(grammar={"choice": []}), ("choice",)),
])
def test_what_cannot_be_used_is_refused_by_name(wanted, words):
    with pytest.raises(DecodingError) as error:
        Options.asked(**wanted)
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize("adapter, wanted, words", [
    ("a", dict(mix=Ensemble(["a", "b"])), ("adapter='a'", "names all its adapters")),
    (None, dict(adapter_scale=0.5), ("adapter_scale=0.5", "needs adapter")),
    (None, dict(logit_bias={97: 1.0}), ("logit_bias", "97", "0..96")),
    ("a", dict(mix=Negative([1, 99])), ("voice 'negative'", "99")),
    ("a", dict(mix=Negative([5] * 200)), ("200 tokens",)),
])
def test_what_the_model_cannot_do_is_refused(made, adapter, wanted, words):
    with pytest.raises(DecodingError) as error:
        made[0].generate([PROMPT], adapter=adapter, **wanted)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_mappings_of_mixes_come_back(made):
    for mix in MIXES.values():
        assert mix_of(json.loads(json.dumps(as_mapping(mix)))) == mix
    assert mix_of({"ensemble": {"adapters": ["a", "b"], "mean": "prob"}}) == Ensemble(["a", "b"], mean="prob")


def test_a_strength_without_the_requests_adapter_is_refused(tiny_decoder, word_tokenizer):
    decoder = tiny_decoder()
    handle = inject(decoder, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False), adapter_name="a",
                    seed=1)
    generator = Generator(decoder, word_tokenizer, handle)
    with pytest.raises(DecodingError, match="needs adapter=…; a mix's voices have scale"):
        generator.generate([[5, 6]], mix=Ensemble(["a", None]), adapter_scale=0.5)
    with pytest.raises(DecodingError, match="scale=1e"):
        Voice(adapter="a", scale=1e20)
    with pytest.raises(DecodingError, match="role=3 is not a text"):
        Voice(role=3)


def test_threads_take_turns(tiny_decoder, word_tokenizer):
    """Several threads with one generator, and each with its own: everybody's tokens are right."""
    generators = [Generator(tiny_decoder(), word_tokenizer, max_rows=2) for _ in range(2)]
    want = generators[0].generate([[5, 6, 7]], max_new_tokens=6, ignore_eos=True)[0].tokens
    found = []

    def work(generator):
        for _ in range(3):
            found.append(generator.generate([[5, 6, 7]], max_new_tokens=6, ignore_eos=True)[0].tokens)

    threads = [threading.Thread(target=work, args=(generators[i % 2],)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert found == [want] * 12
