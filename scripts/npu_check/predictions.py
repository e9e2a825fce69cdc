"""What the cost model says of a launch, in microseconds; None where it says nothing. Modelled, not measured."""
import importlib
import sys
from pathlib import Path

SCRIPTS = Path(__file__).resolve().parents[1]


def _model():
    sys.path.insert(0, str(SCRIPTS))
    try:
        return importlib.import_module("model_ascend_kernels")
    finally:
        sys.path.remove(str(SCRIPTS))


def multi_lora(batch, hidden, rank, cores=48):
    """multi_lora with two adapters in float16."""
    model = _model()
    shape = model.Shape(batch, hidden, rank, bank=2)
    report = model.run(model.driver.Emulator(model.builder.build()), "multi_lora", shape, [k % 2 for k in range(batch)])
    return max(model.cycles(core) for core in report["cores"]) / model.CLOCK_GHZ / 1e3


def product(batch, hidden):
    """The base product: its weight's way from memory."""
    return hidden * hidden * 2 / _model().MEMORY_TB_S / 1e6
