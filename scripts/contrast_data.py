"""Write the data of the contrast experiment: training, validation and test questions of four tasks.

    python scripts/contrast_data.py steps
    python scripts/contrast_data.py banking77 --data FOLDER     # holds banking77/train.csv and test.csv
    python scripts/contrast_data.py wikisql --data FOLDER       # holds wikisql/train.jsonl and test.jsonl
    python scripts/contrast_data.py svamp --data FOLDER         # holds svamp/SVAMP.json

| task | kind | question -> answer | where it comes from |
|---|---|---|---|
| steps | multi-step reasoning | "5 + 9 - 3 + 4 =" -> "14, 11, 15", the running totals | reasoning-gym's chain_sum |
| banking77 | classification | a customer's message -> one of 77 intents | PolyAI, CC BY 4.0 |
| wikisql | structured output | columns and a question -> a SQL query | WikiSQL, BSD-3 |
| svamp | word problems, for Qwen | a problem -> "(8 + 8) - 3 = 13" | SVAMP, MIT; its 1,000 problems are divided here |

Each task becomes ``<output>/<task>.train.jsonl``, ``.validation.jsonl`` and ``.test.jsonl`` with the keys id, prompt
and completion. Validation is taken from the source's training part; no question stands in two files.
"""

import argparse
import csv
import json
import random
import re
import sys
from pathlib import Path

VALIDATION, TEST = 200, 600


def steps(folder):
    """Sums of three or four one-digit terms with their running totals: (training items, test items)."""
    import reasoning_gym

    def items(size, seed):
        made = reasoning_gym.create_dataset("chain_sum", size=size, seed=seed, min_terms=3, max_terms=4, min_digits=1,
                                            max_digits=1)
        return [(f"{item['metadata']['expression']} =", ", ".join(map(str, running_totals(item)))) for item in made]

    # Items are made from seed + index, so seeds this far apart share none.
    return items(8000, 100000), items(800, 10100000)


def running_totals(item):
    """The totals after each term but the first of a chain_sum item; the last one is its answer."""
    first, *others = re.findall(r"[+-]?\d+", item["metadata"]["expression"].replace(" ", ""))
    totals = [int(first)]
    for term in others:
        totals.append(totals[-1] + int(term))
    if str(totals[-1]) != item["answer"]:
        raise ValueError(f"{item['metadata']['expression']} gave {totals}, the answer is {item['answer']}")
    return totals[1:]


def banking77(folder):
    """Customer messages and their intents."""
    def items(name):
        with open(folder / "banking77" / name, newline="", encoding="utf-8") as handle:
            return [(" ".join(row["text"].split()), row["category"].replace("_", " "))
                    for row in csv.DictReader(handle)]

    return items("train.csv"), items("test.csv")


def wikisql(folder):
    """Column names and a question, and the query that answers it."""
    def items(name):
        rows = [json.loads(line) for line in open(folder / "wikisql" / name, encoding="utf-8")]
        return [(f"Columns: {', '.join(row['columns'])}\nQuestion: {row['question']}", row["sql"]) for row in rows]

    return items("train.jsonl"), items("test.jsonl")


def svamp(folder):
    """Word problems, and an equation with its result; 300 of them are the test."""
    problems = json.loads((folder / "svamp" / "SVAMP.json").read_text(encoding="utf-8"))
    random.Random(1).shuffle(problems)
    items = [(question(problem), equation(problem)) for problem in problems]
    return items[300:], items[:300]


def question(problem):
    """Body and question of a SVAMP problem as one text."""
    body = problem["Body"].strip()
    return " ".join(f"{body}{'' if body.endswith('.') else ','} {problem['Question']}".split())


def equation(problem):
    """``"( ( 8.0 + 8.0 ) - 3.0 )"`` and 13.0 as ``"(8 + 8) - 3 = 13"``."""
    left = re.sub(r"(\d)\.0\b", r"\1", problem["Equation"]).strip()
    left = left[1:-1].strip() if left.startswith("(") else left
    left = left.replace("( ", "(").replace(" )", ")")
    return f"{left} = {int(problem['Answer']) if problem['Answer'] % 1 == 0 else problem['Answer']}"


TASKS = {"steps": steps, "banking77": banking77, "wikisql": wikisql, "svamp": svamp}


def split(task, folder):
    """``{part: [(prompt, completion)]}`` without a question in two parts; the order is shuffled by a fixed seed."""
    train, test = TASKS[task](folder)
    seen, parts = set(), {"train": [], "validation": [], "test": []}
    for source, part in ((test, "test"), (train, "train")):
        random.Random(0).shuffle(source)
        for prompt, completion in source:
            if " ".join(prompt.split()) not in seen:
                seen.add(" ".join(prompt.split()))
                parts[part].append((prompt, completion))
    parts["test"] = parts["test"][:TEST]
    parts["validation"], parts["train"] = parts["train"][:VALIDATION], parts["train"][VALIDATION:]
    return parts


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--data", type=Path, default=None, help="folder of the source data; steps needs none")
    parser.add_argument("--output", type=Path, default=Path("runs/contrast/data"), help="folder to write")
    arguments = parser.parse_args()
    if arguments.task != "steps" and (arguments.data is None or not (arguments.data / arguments.task).is_dir()):
        sys.exit(f"--data {arguments.data} has no folder {arguments.task!r}; give the folder that holds it")
    arguments.output.mkdir(parents=True, exist_ok=True)
    for part, items in split(arguments.task, arguments.data).items():
        path = arguments.output / f"{arguments.task}.{part}.jsonl"
        with open(path, "w", encoding="utf-8") as handle:
            for number, (prompt, completion) in enumerate(items):
                row = {"id": f"{part}-{number:05d}", "prompt": prompt, "completion": completion}
                handle.write(json.dumps(row, ensure_ascii=False) + "\n")
        print(f"{path}: {len(items)} questions")


if __name__ == "__main__":
    main()
