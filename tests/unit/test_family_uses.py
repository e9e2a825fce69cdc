"""Every family in use, against the goldens of transformers and PEFT: merged into files, in a contrast, behind the
engine of the server. Training: test_family_goldens."""

import numpy as np
import pytest

from test_family_goldens import CASES, Golden, adapted, log_softmax, logits_of, opened

ONCE = [case for case in CASES if case != "phi3_short"]


@pytest.mark.parametrize("case", ONCE)
def test_merged_contrasted_and_served(case, mindspore, tmp_path, word_tokenizer):
    """The merged folder's logits are PEFT's; the first token of a contrast follows from both goldens (Li et al., arXiv
    2210.15097: the adapter's plausible tokens by the difference of the logarithms); the engine answers as the batch."""
    from colora_ms.decoding import Contrast, Generator
    from colora_ms.recipes.merge_model import merge_model
    from colora_ms.serving import AdapterBank, Engine

    golden = Golden(case)
    decoder, handle = adapted(golden, tmp_path, case)
    prompt = golden.ids[:golden.prompt].tolist()
    contrast = Contrast(alpha=0.1, beta=0.7)
    both = Generator(decoder, word_tokenizer, handle, max_rows=4, chunk=5)
    asked = [(None, None), ("lora", None), ("lora", contrast)]
    answers = [both.generate([prompt], adapter=name, contrast=mix, max_new_tokens=6, ignore_eos=True)[0].tokens
               for name, mix in asked]
    expert, amateur = (log_softmax(one[golden.prompt - 1]) for one in (golden.lora_logits, golden.logits))
    score = np.where(expert >= np.log(0.1) + expert.max(), 1.7 * expert - 0.7 * amateur, -np.inf)
    first, second = np.sort(score)[:-3:-1]
    assert first - second > 1e-2 and answers[2][0] == score.argmax()

    bank = AdapterBank(opened(tmp_path / "model"), tmp_path, max_loaded=2, max_rank=3)
    with Engine(bank.decoder, word_tokenizer, bank, rows=3, max_length=48, chunk=3, prompt_chunk=7) as engine:
        handles = [engine.submit(prompt, adapter=name and "adapter", contrast=mix, max_new_tokens=6, ignore_eos=True)
                   for name, mix in asked]
        assert [one.result(120).tokens for one in handles] == answers

    report = merge_model(tmp_path / "model", [tmp_path / "adapter"], tmp_path / "merged")
    assert report.share < 1e-3
    merged, = logits_of(opened(tmp_path / "merged"), (prompt, -1))
    np.testing.assert_allclose(merged, golden.lora_logits, atol=2e-4, rtol=0)
