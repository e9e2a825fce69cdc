#!/usr/bin/env python
"""Real clients against a real server: openai, LangChain's ChatOpenAI and lm-evaluation-harness.

    bash scripts/setup_peers.sh --clients
    .venv/bin/python scripts/check_clients.py --clients .venv-clients/bin/python [--model smollm2-135m] [--limit 20]

The server is started here; each client runs with the other environment's Python in a process of its own
(scripts/peers_clients.py) and prints what it got. The harness's accuracies on local data are compared with those of
``colora-ms evaluate`` on the same items.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmark_common import ROOT

CLIENT = ROOT / "scripts" / "peers_clients.py"


#: Templates of the harness's tasks: what of the data is asked, and how an answer is scored.
GENERATED = """task: chat_sums
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{prompt}}}}"
doc_to_target: "{{{{completion}}}}"
generation_kwargs: {{until: ["@@@"], max_gen_toks: 32, temperature: 0}}
filter_list:
  - name: last number
    filter:
      - {{function: regex, regex_pattern: "(-?[0-9]+)", group_select: -1}}
      - {{function: take_first}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""
LIKELIHOOD = """task: choices
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{context}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
target_delimiter: ""
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


def start(arguments):
    """(process, URL, the base model's name) of a server on a free port."""
    process = subprocess.Popen([sys.executable, "-m", "colora_ms", "serve", "--model", arguments.model, "--port", "0",
                                "--no-warm-up", "--max-length", "1024", "--tool-calls", "hermes"],
                               stdout=subprocess.PIPE, text=True, cwd=ROOT)
    for line in process.stdout:
        if line.startswith("serving "):
            return process, line.split()[-1], line.split()[1]
    sys.exit("check_clients.py: the server did not start; its message is above")


def run(arguments, *command):
    """What a client printed."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment.update(HF_DATASETS_OFFLINE="1", HF_HUB_OFFLINE="1", OPENAI_API_KEY="none")
    done = subprocess.run([arguments.clients, str(CLIENT), *map(str, command)], capture_output=True, text=True,
                          cwd=ROOT, env=environment)
    if done.returncode:
        sys.exit(f"check_clients.py: {command[0]} failed:\n{done.stdout}\n{done.stderr[-4000:]}")
    return done.stdout


def evaluate(arguments, *options):
    """The items that ``colora-ms evaluate`` scored."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ours.json"
        subprocess.run([sys.executable, "-m", "colora_ms", "evaluate", "--model", arguments.model, "--limit",
                        str(arguments.limit), "--output", str(path), *map(str, options)], check=True, cwd=ROOT,
                       stdout=subprocess.DEVNULL)
        return [row for row in map(json.loads, path.read_text().splitlines()) if "correct" in row]


def sums(folder):
    """A file of problems that a small chat model can solve in part."""
    path = folder / "sums.jsonl"
    rows = [{"prompt": f"What is {a} + {b}?", "completion": str(a + b)} for a in range(2, 10) for b in (3, 7, 12, 25)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "chat_sums.yaml").write_text(GENERATED.format(data=path))
    return path


def choices(folder, data, limit):
    """ARC-Easy's items as the harness reads them: the contexts and choices of ``colora-ms evaluate --task choice``."""
    from colora_ms.evaluation.benchmarks import read_commonsense

    path = folder / "choices.jsonl"
    rows = [{"context": one.context, "choices": list(one.choices), "answer": one.answer}
            for one in read_commonsense(data, limit=limit)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "choices.yaml").write_text(LIKELIHOOD.format(data=path))


def compare(name, found, items):
    """Print both accuracies, and how many answers are the same; returns whether the accuracies are equal."""
    theirs, ours = found["accuracy"], sum(item["correct"] for item in items) / len(items)
    alike = "" if "text" not in items[0] else \
        f", {sum(a == item['text'] for a, item in zip(found['answers'], items))} of {len(items)} answers the same"
    print(f"{name}: {theirs:.4f}, colora-ms evaluate {ours:.4f} on {len(items)} items{alike}")
    return len(items) == found["items"] and abs(theirs - ours) < 1e-9


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", default=str(ROOT / ".venv-clients" / "bin" / "python"),
                        help="Python of the environment with the clients")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--limit", type=int, default=32, help="items of each task of the harness")
    parser.add_argument("--choices", default=str(ROOT / "shared" / "data" / "ARC-Easy" / "test.json"),
                        help="multiple choice in the layout of LLM-Adapters; left out where the file is not there")
    parser.add_argument("--only", choices=("openai", "langchain", "generated", "likelihood"), default=None)
    arguments = parser.parse_args()
    found = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        process, url, model = start(arguments)
        try:
            for client in ("openai", "langchain"):
                if arguments.only in (None, client):
                    print(run(arguments, client, url, model), end="", flush=True)
            if arguments.only in (None, "generated"):
                problems = sums(folder)
                found["generated"] = json.loads(run(arguments, "harness", url, model, folder, "chat_sums",
                                                    arguments.limit).splitlines()[-1])
            if arguments.only in (None, "likelihood") and Path(arguments.choices).is_file():
                choices(folder, arguments.choices, arguments.limit)
                found["likelihood"] = json.loads(run(arguments, "harness", url, model, folder, "choices",
                                                     arguments.limit).splitlines()[-1])
        finally:
            process.terminate()
            process.wait(60)
        same = True
        if "generated" in found:
            ours = evaluate(arguments, "--data", problems, "--template", "chat", "--max-new-tokens", 32)
            same &= compare("lm-evaluation-harness, local-chat-completions", found["generated"], ours)
        if "likelihood" in found:
            ours = evaluate(arguments, "--task", "choice", "--data", arguments.choices, "--normalise", "none")
            same &= compare("lm-evaluation-harness, local-completions", found["likelihood"], ours)
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
