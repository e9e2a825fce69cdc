"""What the tests need of ops/emulator: its driver (ops/emulator/driver.py) and its builder, as `build`."""
import importlib.util
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def load_module(path, name):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


build = load_module(ROOT / "ops" / "emulator" / "build.py", "emulator_build")
globals().update(vars(load_module(ROOT / "ops" / "emulator" / "driver.py", "emulator_driver")))
