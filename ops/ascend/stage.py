"""Lay ops/ascend out as one CANN operator project: op_host/ and op_kernel/ with the files of all operators, flat.

    python ops/ascend/stage.py FOLDER
"""
import shutil
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
OPERATORS = ("multi_lora", "lora_shrink", "lora_expand", "contrastive_select", "lily_mix")


def stage(folder):
    """Copy the sources to folder/op_host and folder/op_kernel; returns {side: sorted file names}."""
    copied = {}
    for side in ("op_host", "op_kernel"):
        target = Path(folder) / side
        target.mkdir(parents=True, exist_ok=True)
        for origin in ("common",) + OPERATORS:
            for source in sorted((HERE / origin / side).glob("*")):
                if (target / source.name).exists() and source.name in copied.get(side, ()):
                    raise ValueError(f"two operators have a file {side}/{source.name}")
                shutil.copyfile(source, target / source.name)
                copied.setdefault(side, []).append(source.name)
    return {side: sorted(names) for side, names in copied.items()}


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python ops/ascend/stage.py FOLDER")
    for side, names in stage(sys.argv[1]).items():
        print(f"{side}: {len(names)} files")
