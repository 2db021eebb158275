"""Metadata of klnorm; the build backend and the settings of the tools are in pyproject.toml."""

from pathlib import Path
from runpy import run_path

from setuptools import find_packages, setup

DEMO = ["scikit-learn", "scipy>=1.15", "matplotlib", "tabulate", "tqdm"]
BENCH = ["tabulate", "tqdm", "transformers>=5"]
HF = ["transformers>=5", "accelerate"]
LIGHTNING = ["lightning>=2.4"]
STUDY = [*DEMO, *HF]

setup(
    name="klnorm",
    version=run_path("klnorm/versions/__init__.py")["__version__"],
    description="KL-regularized LayerNorm for PyTorch, as fused Triton kernels",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="The klnorm developers",
    license="MIT",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=[*find_packages(include=["klnorm", "klnorm.*"]), "klnorm.kernels"],
    package_data={"klnorm": ["py.typed"]},
    # The link klnorm/kernels serves a source tree; an sdist has no links, and finds the device code by this line.
    package_dir={"klnorm.kernels": "kernels"},
    install_requires=["torch>=2.6", "triton>=3.4; platform_system == 'Linux'", "numpy"],
    extras_require={
        "demo": DEMO,
        "bench": BENCH,
        "plot": ["matplotlib"],
        "hf": HF,
        "lightning": LIGHTNING,
        "study": STUDY,
        "test": [
            *STUDY,
            *LIGHTNING,
            "peft",
            "safetensors",
            "onnx",
            "onnxscript",
            "pytest>=8",
            "pytest-xdist",
            "setuptools>=77",
        ],
    },
)
