"""The sweep: its variants and costs, weights that stand in for factors, Pareto front, recommendation, files, command."""

import json

import numpy as np
import pytest

from mindspore import Tensor

from colora_ms.cli import main
from colora_ms.decomposition import LrdPlan, decompose
from colora_ms.errors import ColoraError, DataError
from colora_ms.evaluation.choices import load_choices
from colora_ms.evaluation.lrd_latency import without_layers
from colora_ms.evaluation.lrd_plot import plot
from colora_ms.evaluation.lrd_sweep import Switch, Variant, describe, pareto, recommend, table, variants
from colora_ms.models.config import DecoderConfig
from colora_ms.models.decoder import Decoder
from colora_ms.runtime import run

SMOLLM2 = DecoderConfig("llama", 49152, 576, 1536, 30, 9, 3, 64, 8192, tie_word_embeddings=True)
IDS = np.random.default_rng(2).integers(3, 97, (2, 6)).astype(np.int32)


def logits(net):
    return run(net, Tensor(IDS), Tensor(np.full(2, 6, np.int32)), Tensor(np.full(2, -1, np.int32))).asnumpy()


def arrays(net):
    return {p.name: p.asnumpy().copy() for p in net.get_parameters() if p.name.startswith(("model.", "lm_head"))}


def test_written_weights_stand_for_factors_and_dropped_blocks(tiny_decoder):
    net = tiny_decoder(num_hidden_layers=3)
    weights, before = arrays(net), logits(net)
    plans = [Variant("a", plan=LrdPlan([1], "all", 3)), Variant("b", plan=LrdPlan([0, 2], "mlp", 1)), Variant("c", dropped=(1,))]
    switch = Switch(net, plans)
    seen = []
    for variant in plans:
        switch.show(variant)
        seen.append(logits(net))
    switch.restore()
    assert all(np.array_equal(value, weights[name]) for name, value in arrays(net).items())
    assert np.array_equal(logits(net), before)
    for variant, found in zip(plans[:2], seen):
        chain = tiny_decoder(num_hidden_layers=3)
        decompose(chain, variant.plan)
        want = logits(chain)
        assert np.abs(found - want).max() < 2e-4 * np.abs(want).max() and np.abs(found - before).max() > 0.1
    config, tensors = without_layers(net.config, weights, (1,))
    assert config.num_hidden_layers == 2 and np.array_equal(tensors["model.layers.1.mlp.up_proj.weight"],
                                                            weights["model.layers.2.mlp.up_proj.weight"])
    want = logits(Decoder(config, tensors))
    assert np.abs(seen[2] - want).max() < 2e-4 * np.abs(want).max()


def test_variants_and_costs_of_smollm2():
    found = variants(SMOLLM2, ranks=(1, 1000))
    names = [variant.name for variant in found]
    assert names[0] == "base" and len(set(names)) == len(names)
    assert {"all spread r48", "all spread r1", "mlp late r32", "attn middle r1", "drop spread"} <= set(names)
    rows = {variant.name: describe(variant, SMOLLM2) for variant in found}
    block = 4 * 576 * 576 // 3 * 2 + 3 * 576 * 1536  # q and o are square, k and v a third of it
    assert rows["base"]["macs"] == 30 * block + 49152 * 576 and rows["base"]["parameters"] == 134_515_008
    assert rows["drop spread"]["macs"] == rows["base"]["macs"] - 4 * block
    assert rows["drop spread"]["parameters"] == 134_515_008 - 4 * (block + 2 * 576)
    assert rows["all spread r48"]["parameters"] == 122_377_536
    assert all(row["reduction"] >= 0.09 for row in rows.values() if row["name"] != "base" and row["tensors"] != "-")


def row(name, parameters, perplexity=None, accuracy=None, step=None):
    return {**describe(Variant(name), SMOLLM2), "parameters": parameters, "perplexity": perplexity, "accuracy": accuracy,
            "step_ratio": step, "step_ms": step}


def test_pareto_front_and_recommendation():
    rows = [row("base", 100, 10.0, 0.60), row("a", 90, 12.0, 0.57), row("b", 90, 11.0, 0.57), row("c", 80, 20.0, 0.50),
            row("d", 85, 30.0, 0.40), row("e", 70, 40.0)]
    assert pareto(rows) == {"base", "b", "c"}
    assert [recommend(rows, t) for t in (0, 2.9, 3.1, 10.1, 50)] == ["base", "base", "b", "c", "c"]
    text = table(rows, 3.1)
    assert "| b |" in text and text.splitlines()[4].endswith("| * <- |") and "+3.0" in text
    slow = [row("base", 100, 10.0, 0.60, 1.0), row("a", 90, 12.0, 0.57, 0.9), row("b", 90, 11.0, 0.57, 0.95)]
    assert pareto(slow) == {"base", "a", "b"}
    only_text = [row("base", 100, 10.0), row("a", 90, 12.0), row("b", 95, 12.0)]
    assert pareto(only_text) == {"base", "a"} and recommend(only_text, 9) == "base"


def test_the_plot(tmp_path):
    rows = [row("base", 100, 10.0, 0.60, 1.0), row("a", 90, 12.0, 0.57, 0.9)]
    plot(rows, tmp_path / "p.png", 5)
    assert (tmp_path / "p.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    with pytest.raises(ColoraError, match="cannot be written"):
        plot(rows, tmp_path / "none" / "p.png", 5)


def test_reading_choices(tmp_path):
    arc = {"instruction": "Please choose the correct answer to the question: What is two?\n\nAnswer1: one more than one "
                          "Answer2: a tree\n\nAnswer format: answer1/answer2", "answer": "answer2"}
    boolq = {"instruction": "Please answer the following question with true or false, question: is it?\n\nAnswer format: "
                            "true/false", "answer": "false"}
    own = {"question": "Which?", "choices": ["x", "y", "z"], "answer": 2}
    (tmp_path / "a.json").write_text(json.dumps([arc, boolq]))
    (tmp_path / "b.jsonl").write_text(json.dumps(own) + "\n" + json.dumps(own))
    first, second = load_choices(tmp_path / "a.json")
    assert (first.context, first.choices, first.answer) == (
        "Question: What is two?\nAnswer:", (" one more than one", " a tree"), 1)
    assert second.choices == (" true", " false") and second.answer == 1
    assert [item.answer for item in load_choices(tmp_path / "b.jsonl", 1)] == [2]
    for content, words in (("[]", "no items"), ("{", "neither"), (json.dumps([{"question": "q"}]), "row 1"),
                           (json.dumps([{**own, "answer": 3}]), "answer is 3")):
        (tmp_path / "c.json").write_text(content)
        with pytest.raises(DataError, match=words):
            load_choices(tmp_path / "c.json")
    with pytest.raises(DataError, match="cannot be read"):
        load_choices(tmp_path / "nothing.json")


# -- the command ------------------------------------------------------------------------------------------------------

def test_command_writes_a_folder(capsys, goldens, tmp_path):
    model, out = str(goldens / "tiny" / "llama"), tmp_path / "small"
    assert main(["decompose", model, "--layers", "0-1", "--tensors", "mlp", "--rank", "2", "--out", str(out), "--json",
                 str(tmp_path / "report.json")]) == 0
    assert "6 matrices" in capsys.readouterr().out
    report = json.loads((tmp_path / "report.json").read_text())
    assert len(report["matrices"]) == 6 and report["parameters_before"] - report["parameters_after"] == sum(
        one["parameters_before"] - one["parameters_after"] for one in report["matrices"])
    assert main(["info", str(out)]) == 0
    assert f"{report['parameters_after']:,}" in capsys.readouterr().out


@pytest.mark.parametrize("arguments, words", [
    ([], "exactly one of"),
    (["--layers", "1", "--preset", "lrd-9"], "exactly one of"),
    (["--preset", "lrd-8"], "lrd-9"),
    (["--layers", "0,x"], "'x'"),
    (["--layers", "5"], "blocks 0 to 1"),
    (["--layers", "0", "--tensors", "q_prj"], "q_proj"),
    (["--layers", "0", "--rank", "15"], "past break-even"),
    (["--plan", "nowhere.yaml"], "nowhere.yaml"),
    (["--sweep", "--reduction", "0.9"], "not within reach"),
    (["--latency-only", "--reduction", "0.1"], "--json"),
    (["--show", "--reduction", "0.1", "--json", "nowhere.json"], "nowhere.json"),
])
def test_command_errors(capsys, goldens, tmp_path, arguments, words):
    out = tmp_path / "out"
    assert main(["decompose", str(goldens / "tiny" / "llama"), "--out", str(out), *arguments]) == 1
    error = capsys.readouterr().err
    assert words in error and len(error.strip().splitlines()) == 1 and not out.exists()


def test_plan_files(capsys, goldens, tmp_path):
    plan = tmp_path / "plan.yaml"
    plan.write_text("layers: [0]\ntensors: attn\nrank: 3\nmodules: {o_proj: 0}\n")
    assert main(["decompose", str(goldens / "tiny" / "llama"), "--plan", str(plan)]) == 0
    assert "3 matrices" in capsys.readouterr().out
    for text in ("layers: [0\n", "- 3\n", "layer: [1]\n"):
        plan.write_text(text)
        assert main(["decompose", str(goldens / "tiny" / "llama"), "--plan", str(plan)]) == 1
        assert "plan.yaml" in capsys.readouterr().err


@pytest.fixture
def sweep(shared, tmp_path):
    """Arguments of a small sweep on a tiny trained model."""
    (tmp_path / "text.txt").write_text("Once upon a time, there was a little girl named Lily. She loved to play. " * 3)
    (tmp_path / "set.json").write_text(json.dumps([
        {"question": "Who?", "choices": ["Lily", "qxz"], "answer": 0}, {"question": "What?", "choices": ["zq", "a ball"],
                                                                        "answer": 1}]))
    return ["decompose", str(shared / "data" / "stories260k"), "--groups", "all", "--placements", "late", "--json",
            str(tmp_path / "s.json")]


def rows_of(folder):
    return {one["name"]: one for one in json.loads((folder / "s.json").read_text())["rows"]}


def test_sweep_command(capsys, sweep, tmp_path):
    assert main([*sweep, "--sweep", "--reduction", "0.15", "--text", str(tmp_path / "text.txt"), "--text-tokens", "33",
                 "--choices", str(tmp_path / "set.json"), "--plot", str(tmp_path / "s.png")]) == 0
    out, rows = capsys.readouterr().out, rows_of(tmp_path)
    assert list(rows)[0] == "base" and "drop late" in rows and (tmp_path / "s.png").is_file()
    assert all(one["perplexity"] > 1 and 0 <= one["accuracy"] <= 1 and one["step_ms"] is None for one in rows.values())
    assert rows["base"]["perplexity"] < min(one["perplexity"] for name, one in rows.items() if name != "base")
    assert f"{rows['base']['perplexity']:.2f}" in out
    assert main([*sweep, "--show", "--reduction", "0.15"]) == 0
    shown = capsys.readouterr().out
    assert shown[shown.index("| variant"):] == out[out.index("| variant"):out.index("wrote")]
    assert rows_of(tmp_path) == rows
    # What an interrupted sweep lacks is measured, and nothing else.
    kept = json.loads((tmp_path / "s.json").read_text())
    kept["rows"][1]["accuracy"], kept["rows"][0]["perplexity"] = None, 7.5
    (tmp_path / "s.json").write_text(json.dumps(kept))
    again = [*sweep, "--sweep", "--resume", "--reduction", "0.15", "--text", str(tmp_path / "text.txt"), "--choices",
             str(tmp_path / "set.json"), "--text-tokens"]
    assert main([*again, "33"]) == 0
    assert rows_of(tmp_path) == {**rows, "base": {**rows["base"], "perplexity": 7.5}}
    capsys.readouterr()
    assert main([*again, "34"]) == 1
    assert "text_tokens 33, not 34" in capsys.readouterr().err


@pytest.mark.slow
def test_latencies_are_added_to_a_sweep(capsys, sweep, tmp_path):
    assert main([*sweep, "--sweep", "--reduction", "0.15", "--text", str(tmp_path / "text.txt"), "--text-tokens", "33"]) == 0
    rows = rows_of(tmp_path)
    assert main([*sweep, "--latency-only", "--reduction", "0.15", "--steps", "2", "--repeats", "1"]) == 0
    timed = rows_of(tmp_path)
    assert all(one["prefill_ms"] > 0 and one["perplexity"] == rows[name]["perplexity"] for name, one in timed.items())
    assert timed["base"]["step_ratio"] == 1
    capsys.readouterr()
    assert main([*sweep, "--latency-only", "--reduction", "0.3"]) == 1
    assert "another sweep" in capsys.readouterr().err
