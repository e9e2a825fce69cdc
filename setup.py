"""Installation of colora_ms; compiles the operators of ``ops/cpu`` into the package where there is a C++ compiler."""

import importlib.util
from pathlib import Path

from setuptools import Distribution, find_packages, setup
from setuptools.command.build_py import build_py
from setuptools.command.editable_wheel import editable_wheel

ROOT = Path(__file__).resolve().parent


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
        build_operators(Path(self.build_lib) / "colora_ms" / "_lib")


class EditableWithOperators(editable_wheel):
    def run(self):
        build_operators(ROOT / "colora_ms" / "_lib")
        super().run()


class BinaryDistribution(Distribution):
    """The wheel holds a compiled library, so it belongs to one platform."""

    def has_ext_modules(self):
        return True


setup(
    name="colora-ms",
    version="0.1.0",
    description="Low-rank adapters and Contrastive LoRA Decoding (CoLD) in MindSpore graph mode",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8") if (ROOT / "README.md").is_file() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.9,<3.13",
    packages=find_packages(include=["colora_ms", "colora_ms.*"]),
    package_data={"colora_ms": ["_lib/*.so"]},
    install_requires=[
        "mindspore==2.9.*",
        "mindformers==1.9.*",
        "numpy>=1.26,<2",
        "sentencepiece",
        "tokenizers",
        "safetensors",
        "gguf",
        "jinja2",
        "pyyaml",
        "rich",
        "tqdm",
        "matplotlib",
        "fastapi",
        "uvicorn",
        "prometheus-client",
    ],
    extras_require={
        "data": ["reasoning-gym", "datasets"],
        "test": ["pytest", "pytest-xdist", "hypothesis", "reasoning-gym", "openai", "ruff==0.17.6",
                 "mypy==2.4.1; python_version >= '3.10'"],
    },
    entry_points={"console_scripts": ["colora-ms = colora_ms.cli:main"]},
    cmdclass={"build_py": BuildWithOperators, "editable_wheel": EditableWithOperators},
    distclass=BinaryDistribution,
)
