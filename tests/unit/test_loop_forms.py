"""The step as one operator and as a graph of the Cells: the same tokens and records."""

import pytest

from colora_ms import Contrast, Generator, Sampling
from colora_ms.adapters import LoraConfig, inject
from colora_ms.kernels import fuses_step
from tests.serving.conftest import unfused

pytestmark = pytest.mark.skipif(not fuses_step(), reason="the compiled operators are not there")

PROMPTS = [[5, 6, 7, 8, 6, 7], [9], [11, 12, 13], [14, 15, 14, 15], [20, 21]]
CONTRASTS = [None, Contrast(0.3, 0.5), Contrast(0.1, 2.0, adapt="entropy"),
             Contrast(0.2, 1.0, adapt="divergence", skip_copies=True), Contrast(0.5, 0.5, adapt="margin")]


@pytest.fixture(scope="module")
def generators(tiny_decoder, word_tokenizer):
    """(fused, graph): two generators over equal models."""
    found = []
    for fused in (True, False):
        net = tiny_decoder()
        handle = inject(net, LoraConfig(r=3, target_modules="all-linear", init_lora_weights=False), seed=1)
        generator = Generator(net, word_tokenizer, handle, max_rows=16, chunk=7, cache_bytes=1 << 20)
        generator.generate([[5]], max_new_tokens=1)
        assert generator._core.graph.fused
        if not fused:
            unfused(generator._core.graph)
        found.append(generator)
    return found


@pytest.mark.parametrize("sampling", [None, Sampling(temperature=0.8, top_k=9, top_p=0.9, seed=4)])
@pytest.mark.parametrize("contrasts", [None, CONTRASTS])
@pytest.mark.parametrize("stop", [(), ("50",)])
def test_same_tokens_and_records(generators, contrasts, sampling, stop):
    answers = [one.generate(PROMPTS, adapter="default", contrast=contrasts, sampling=sampling, records=True, stop=stop,
                            max_new_tokens=[20, 1, 9, 17, 2]) for one in generators]
    for a, b in zip(*answers):
        assert a.tokens == b.tokens and a.finish_reason == b.finish_reason
        assert a.records == b.records
    assert any(len(a.tokens) > 7 for a in answers[0]) and len({a.tokens for a in answers[0]}) == 5


def test_a_cell_that_computes_more_than_its_operands_keeps_the_cells(tiny_decoder, word_tokenizer):
    net = tiny_decoder()
    handle = inject(net, LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"], init_lora_weights=False), seed=1)
    generator = Generator(net, word_tokenizer, handle)
    assert len(generator.generate([[5, 6]], adapter="default", max_new_tokens=5, ignore_eos=True)[0].tokens) == 5
    assert not generator._core.graph.fused
