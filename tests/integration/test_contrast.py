"""Contrastive decoding: the reference's vectors, its identities, and equality with the naive two-forward form."""

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies

from colora_ms.decoding import Contrast, Generator, Sampling, contrastive_scores
from colora_ms.errors import DecodingError

PROMPTS = [[5, 9, 33], [60, 7, 7, 21, 90, 3, 14], [11], [44, 45, 46, 47, 48]]


@pytest.fixture(scope="module")
def adapted(tiny_decoder):
    """(decoder, handle) with adapters "a" and "b" of random weights, and "zero" whose product is zero."""
    from mindspore import Tensor

    from colora_ms.adapters import LoraConfig, inject

    decoder = tiny_decoder()
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")
    handle = inject(decoder, config, adapter_name="a", slots=3)
    handle.add_adapter("b", config)
    handle.add_adapter("zero", config)
    random = np.random.default_rng(3)
    for name in ("a", "b"):
        slot = handle.slot(name)
        for parameter in handle.trainable_params():
            if "lora_B" in parameter.name:
                value = parameter.asnumpy().copy()
                value[slot] = random.standard_normal(value[slot].shape) * 0.3
                parameter.set_data(Tensor(value))
    return decoder, handle


@pytest.fixture(scope="module")
def generator(adapted, word_tokenizer):
    return Generator(*adapted[:1], word_tokenizer, adapted[1], max_rows=8)


def tokens(completions):
    return [c.tokens for c in completions]


def test_reference_vector():
    # papers.md section 1.8: the cut is 1.30685, two tokens survive, and the second wins where greedy takes the first.
    scores = contrastive_scores([2.0, 1.5, 0.5, -1.0], [2.5, 0.2, 0.4, -1.0], 0.5, 0.5)
    assert np.allclose(scores[:2], [1.75, 2.15]) and np.isneginf(scores[2:]).all()


@hypothesis.given(strategies.integers(2, 9), strategies.floats(0.01, 1.0), strategies.floats(0.0, 4.0),
                  strategies.integers(0, 2**32 - 1))
def test_a_changed_token_is_one_that_the_base_ranks_after_the_favourite_too(tokens_of, alpha, beta, seed):
    expert, amateur = np.random.default_rng(seed).standard_normal((2, tokens_of)).astype(np.float32) * 2
    chosen, favourite = contrastive_scores(expert, amateur, alpha, beta).argmax(), expert.argmax()
    assert chosen == favourite or amateur[favourite] > amateur[chosen]


def test_adapters_change_the_answer(generator):
    base, a, b = (tokens(generator.generate(PROMPTS, adapter=name, max_new_tokens=12)) for name in (None, "a", "b"))
    assert base != a and a != b and base != b


def test_beta_zero_is_greedy_of_the_expert(generator):
    greedy = generator.generate(PROMPTS, adapter="a", max_new_tokens=12)
    for alpha in (0.05, 1.0):
        assert tokens(generator.generate(PROMPTS, adapter="a", contrast=Contrast(alpha, 0.0), max_new_tokens=12)) \
            == tokens(greedy)


def test_alpha_one_is_greedy_of_the_expert_for_any_beta(generator):
    greedy = tokens(generator.generate(PROMPTS, adapter="b", max_new_tokens=12))
    for beta in (0.3, 7.0):
        assert tokens(generator.generate(PROMPTS, adapter="b", contrast=Contrast(1.0, beta),
                                         max_new_tokens=12)) == greedy


def test_zero_adapter_is_the_base_for_any_beta(generator):
    base = tokens(generator.generate(PROMPTS, max_new_tokens=12))
    for beta in (0.0, 0.5, 3.0):
        contrast = Contrast(0.1, beta)
        assert tokens(generator.generate(PROMPTS, adapter="zero", contrast=contrast, max_new_tokens=12)) == base


@pytest.mark.parametrize("alpha, beta", [(0.1, 0.5), (0.01, 1.0), (0.5, 2.0)])
def test_equals_the_naive_two_forward_form(generator, alpha, beta):
    from colora_ms.decoding.stepwise import naive_contrastive

    contrast = Contrast(alpha, beta)
    answers = generator.generate(PROMPTS, adapter="a", contrast=contrast, max_new_tokens=16)
    assert tokens(answers) == [tuple(naive_contrastive(generator, p, "a", contrast, 16)) for p in PROMPTS]
    assert tokens(answers) != tokens(generator.generate(PROMPTS, adapter="a", max_new_tokens=16))


ADAPTIVE = [Contrast(0.05, 1.5, adapt, skip) for adapt in ("fixed", "entropy", "divergence", "margin")
            for skip in (False, True)]


@pytest.mark.parametrize("contrast", ADAPTIVE[1:], ids=lambda c: c.label)
def test_adaptive_forms_equal_the_naive_two_forward_form(generator, contrast):
    from colora_ms.decoding.stepwise import naive_contrastive

    answers = generator.generate(PROMPTS, adapter="a", contrast=contrast, max_new_tokens=16)
    assert tokens(answers) == [tuple(naive_contrastive(generator, p, "a", contrast, 16)) for p in PROMPTS]


def test_adaptive_forms_differ_from_one_another(generator):
    prompt = [PROMPTS[1]] * len(ADAPTIVE)
    answers = tokens(generator.generate(prompt, adapter="a", contrast=ADAPTIVE, max_new_tokens=40, ignore_eos=True))
    assert len(set(answers)) >= 3, "the forms give the same answers"


def test_adaptive_strength_stands_in_the_records(generator):
    from colora_ms.decoding.contrast import contrast_strength

    for contrast in ADAPTIVE[2::2]:
        answer, = generator.generate(PROMPTS[1], adapter="a", contrast=contrast, max_new_tokens=12, records=True)
        weights = [(r.score - r.expert) / (r.expert - r.amateur) for r in answer.records
                   if abs(r.expert - r.amateur) > 0.1]
        assert all(-1e-3 <= w <= contrast.beta + 1e-3 for w in weights) and len({round(w, 3) for w in weights}) > 2
    # A step by itself: with two equal favourites the margin form contrasts in full.
    assert contrast_strength([1.0, 1.0, 0.0], [0.0, 0.0, 0.0], Contrast(0.1, 0.7, "margin")) == pytest.approx(0.7)


def test_copies_are_watched_across_chunks(generator):
    # Small chunks: the later ones run in the graph that goes on, which must know the prompt too.
    contrast = Contrast(0.05, 1.5, skip_copies=True)
    whole = generator.generate(PROMPTS, adapter="a", contrast=contrast, max_new_tokens=40)
    streamed = generator.generate(PROMPTS, adapter="a", contrast=contrast, max_new_tokens=40, on_text=lambda *_: None)
    assert tokens(whole) == tokens(streamed)


def test_records_hold_the_rule(generator):
    contrast = Contrast(0.05, 1.5)
    answer = generator.generate(PROMPTS[1], adapter="a", contrast=contrast, max_new_tokens=16, records=True)[0]
    assert len(answer.records) == len(answer.tokens)
    for record, token in zip(answer.records, answer.tokens):
        assert record.token == token and 1 <= record.valid <= 97
        assert record.expert >= np.log(np.float32(0.05)) + record.best - 1e-5
        assert record.score == pytest.approx(2.5 * record.expert - 1.5 * record.amateur, abs=1e-4)
        assert record.changed == (record.favourite != token)
    assert any(r.changed for r in answer.records)


def test_guidance_identity_without_the_mask(generator):
    # With the mask off, (1 + beta) e - beta a is classifier-free guidance a + gamma (e - a) with gamma = 1 + beta.
    answer = generator.generate(PROMPTS[0], adapter="a", contrast=Contrast(1e-30, 0.75), max_new_tokens=12,
                                records=True)[0]
    for record in answer.records:
        assert record.valid == 97
        assert record.score == pytest.approx(record.amateur + 1.75 * (record.expert - record.amateur), abs=1e-4)


def test_a_request_does_not_depend_on_its_neighbours(generator):
    settings = [(None, None), ("a", None), ("a", Contrast(0.1, 0.5)), ("b", Contrast(0.3, 1.0))]
    alone = [generator.generate(p, adapter=a, contrast=c, max_new_tokens=14)[0].tokens
             for p, (a, c) in zip(PROMPTS, settings)]
    mixed = generator.generate(PROMPTS, adapter=[a for a, _ in settings], contrast=[c for _, c in settings],
                               max_new_tokens=14)
    assert tokens(mixed) == alone


def test_changing_adapters_and_options_compiles_nothing(generator):
    options = dict(max_new_tokens=14)
    generator.generate(PROMPTS, adapter="a", contrast=Contrast(), **options)
    before = generator._core.graph.compilations()
    for adapter, contrast in [("b", Contrast(0.2, 0.9)), ("zero", Contrast(1.0, 0.0)), ("a", Contrast(0.7, 3.0)),
                              *(("b", contrast) for contrast in ADAPTIVE)]:
        generator.generate(PROMPTS, adapter=adapter, contrast=contrast, sampling=Sampling(0.7, 5, 0.9, 3), **options)
    assert generator._core.graph.compilations() == before


def test_sampling_depends_on_the_seed_alone(generator):
    sampling = [Sampling(1.0, seed=s) for s in (1, 2, 3, 1)]
    prompts = [PROMPTS[0]] * 4
    answers = tokens(generator.generate(prompts, adapter="a", contrast=Contrast(), sampling=sampling,
                                        max_new_tokens=20))
    assert answers[0] == answers[3] and len(set(answers)) > 1
    assert tokens(generator.generate(PROMPTS[0], adapter="a", contrast=Contrast(), sampling=sampling[1],
                                     max_new_tokens=20)) == [answers[1]]


def test_streaming_gives_the_same_text(generator):
    pieces = {}
    streamed = generator.generate(PROMPTS, adapter="a", contrast=Contrast(), max_new_tokens=40,
                                  on_text=lambda i, text: pieces.setdefault(i, []).append(text))
    whole = generator.generate(PROMPTS, adapter="a", contrast=Contrast(), max_new_tokens=40)
    assert tokens(streamed) == tokens(whole)
    assert ["".join(pieces.get(i, [])) for i in range(len(PROMPTS))] == [c.text for c in whole]


def test_stop_strings_cut_the_answer(generator):
    whole = generator.generate(PROMPTS[0], adapter="a", max_new_tokens=30, ignore_eos=True)[0]
    words = whole.text.split()
    stop = f" {words[5]}"
    cut = generator.generate(PROMPTS[0], adapter="a", max_new_tokens=30, stop=stop, ignore_eos=True)[0]
    assert cut.text == whole.text[:whole.text.find(stop)] and cut.finish_reason == "stop"


def test_beam_of_one_is_greedy(generator):
    from colora_ms.decoding.stepwise import beam_search

    greedy = generator.generate(PROMPTS[1], adapter="b", max_new_tokens=10)[0]
    assert tuple(beam_search(generator, PROMPTS[1], "b", beams=1, max_new_tokens=10)[0]) == greedy.tokens


def test_beams_find_a_likelier_answer(generator):
    from colora_ms.decoding.stepwise import beam_search

    one = beam_search(generator, PROMPTS[1], "b", beams=1, max_new_tokens=10, length_penalty=0.0)[1]
    four = beam_search(generator, PROMPTS[1], "b", beams=6, max_new_tokens=10, length_penalty=0.0)[1]
    assert four >= one


@pytest.mark.parametrize("alpha, beta, word", [
    (0.0, 0.5, "alpha"), (1.5, 0.5, "alpha"), (float("nan"), 0.5, "alpha"), (0.1, -1, "beta"),
    (0.1, float("inf"), "beta"), ("0.1", 0.5, "alpha"), (True, 0.5, "alpha"),
])
def test_bad_contrasts_are_refused(alpha, beta, word):
    with pytest.raises(DecodingError, match=word):
        Contrast(alpha, beta)


@pytest.mark.parametrize("settings, word", [
    (dict(temperature=-1), "temperature"), (dict(top_k=-1), "top_k"), (dict(top_k=1.5), "top_k"),
    (dict(top_p=-0.1), "top_p"), (dict(top_p=1.1), "top_p"), (dict(seed=-1), "seed"),
])
def test_bad_samplings_are_refused(settings, word):
    with pytest.raises(DecodingError, match=word):
        Sampling(**settings)


@pytest.mark.parametrize("prompt, options, message", [
    ("", {}, "prompt 0 is empty"),
    ([5, 97], {}, "97, outside the vocabulary"),
    ([5] * 128, {}, "128 tokens; the context holds 128"),
    ([5], {"max_new_tokens": 0}, "max_new_tokens=0"),
    ([5], {"contrast": Contrast()}, "needs adapter"),
    ([5], {"contrast": 0.5}, "is not a Contrast"),
    ([5], {"stop": ("",)}, "stop strings"),
    ([[5], [6]], {"adapter": ["a"]}, "1 entries for 2 prompts"),
])
def test_bad_requests_are_refused(generator, prompt, options, message):
    with pytest.raises(DecodingError, match=message):
        generator.generate(prompt, **options)


def test_unknown_adapter_is_refused(generator):
    from colora_ms.errors import AdapterError

    with pytest.raises(AdapterError, match="nobody"):
        generator.generate([5], adapter="nobody")


def test_a_merged_adapter_leaves_no_base_to_contrast_with(tiny_decoder, word_tokenizer):
    from mindspore import Tensor

    from colora_ms.adapters import LoraConfig, inject

    decoder = tiny_decoder()
    handle = inject(decoder, LoraConfig(r=2, target_modules=["q_proj"]), adapter_name="a")
    for parameter in handle.trainable_params():
        parameter.set_data(Tensor(np.random.default_rng(1).standard_normal(parameter.shape).astype(np.float32)))
    generator = Generator(decoder, word_tokenizer, handle)
    before = generator.generate(PROMPTS, adapter="a", max_new_tokens=8)
    handle.merge("a")
    assert tokens(generator.generate(PROMPTS, adapter="a", max_new_tokens=8)) == tokens(before)
    for options in ({}, {"adapter": "a", "contrast": Contrast()}):
        with pytest.raises(DecodingError, match="unmerge"):
            generator.generate(PROMPTS, **options)
    handle.unmerge()
    assert tokens(generator.generate(PROMPTS, adapter="a", max_new_tokens=8)) == tokens(before)
