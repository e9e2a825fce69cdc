"""Run by test_extras.py in a process of its own: every module is imported while the extras' packages cannot be."""

import importlib
import importlib.abc
import json
import pkgutil
import sys

import colora_ms
from colora_ms.extras import EXTRAS

MISSING = {name for packages in EXTRAS.values() for name in packages}
MISSING |= {"starlette", "pydantic", "sentencepiece", "rich"}


class Absent(importlib.abc.MetaPathFinder):
    """Says of the packages that they are not installed."""

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in MISSING:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return None


sys.meta_path.insert(0, Absent())
said, imported = {}, 0
for module in pkgutil.walk_packages(colora_ms.__path__, "colora_ms.", onerror=lambda name: None):
    if module.name.endswith(".__main__"):
        continue
    try:
        importlib.import_module(module.name)
        imported += 1
    except Exception as error:
        said[module.name] = [type(error).__name__, str(error)]


def refusal(call):
    try:
        call()
    except Exception as error:
        return [type(error).__name__, str(error)]
    return None


def draw():
    from colora_ms.pictures import new_figure

    new_figure((2, 2))


def generate():
    from colora_ms.training.sources import load_examples

    load_examples({"kind": "reasoning_gym", "task": "chain_sum", "size": 2, "seed": 1})


def read():
    from colora_ms.training.sources import load_examples

    load_examples({"kind": "datasets", "path": "x"})


def register():
    import colora_ms.integrations.mindformers as bridge

    bridge.register()


def command():
    from colora_ms.cli import main

    raise SystemExit(main(["serve"]))


calls = {function.__name__: refusal(function) for function in (draw, generate, read, register)}
try:
    command()
except SystemExit as end:
    calls["command"] = end.code
print(json.dumps({"modules": said, "imported": imported, "calls": calls}))
