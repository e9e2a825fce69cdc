"""Write preference pairs of sums: the right result is chosen, a plausible wrong one is rejected.

    python scripts/preference_data.py                      # runs/dpo/data/sums.train.jsonl and sums.validation.jsonl
    colora-ms train model_zoo/smollm2-135m/dpo.yaml

The sums are reasoning-gym's chain_sum with two or three numbers of one or two digits, as in the quick start; nothing is
downloaded. The wrong result of a sum is one of: its last number with the other sign, or 1, 2 or 10 off. Each line has
the keys id, prompt, chosen and rejected; no question stands in both files.
"""

import argparse
import json
import random
import re
from pathlib import Path

OPTIONS = {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 2}


def items(size, seed):
    """[(question, expression, right result)] of chain_sum; made from seed + index."""
    import reasoning_gym

    made = reasoning_gym.create_dataset("chain_sum", size=size, seed=seed, **OPTIONS)
    return [(item["question"].strip(), item["metadata"]["expression"], int(item["answer"])) for item in made]


def wrong_result(expression, right, choose):
    """A wrong result of a sum; choose: a ``random.Random``."""
    last = re.findall(r"[+-]?\d+", expression.replace(" ", ""))[-1]
    mistakes = {"sign": right - 2 * int(last), **{f"{off:+d}": right + off for off in (-10, -2, -1, 1, 2, 10)}}
    return mistakes[choose.choice(sorted(name for name, value in mistakes.items() if value != right))]


def pairs(size, seed, seen):
    """The records of sums that are not in ``seen``, which they are added to."""
    found = []
    for index, (question, expression, right) in enumerate(items(size, seed)):
        if question in seen:
            continue
        seen.add(question)
        wrong = wrong_result(expression, right, random.Random(seed + index))
        found.append({"id": f"sum-{seed}-{index}", "prompt": question, "chosen": str(right), "rejected": str(wrong)})
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("runs/dpo/data"), help="folder to write")
    parser.add_argument("--train", type=int, default=4000, help="sums to draw for the training")
    parser.add_argument("--validation", type=int, default=100, help="sums to draw for the validation")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    seen = set()
    # Seeds further apart than the sizes share no item.
    for part, size, seed in (("validation", arguments.validation, 30100000), ("train", arguments.train, 100000)):
        path = arguments.output / f"sums.{part}.jsonl"
        found = pairs(size, seed, seen)
        path.write_text("".join(json.dumps(record) + "\n" for record in found), encoding="utf-8")
        print(f"{path}: {len(found)} pairs")


if __name__ == "__main__":
    main()
