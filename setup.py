"""Packaging of vcd_fast. Tool settings live in pyproject.toml, pinned versions in constraints.txt."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.+)"$', (ROOT / "vcd_fast" / "version.py").read_text(), re.M).group(1)

CORE = ["torch>=2.8", "numpy>=1.26", "safetensors>=0.4.3", "huggingface_hub>=0.24"]
# PyAV before 17 converts BT.709 videos with BT.601's matrix
CLI = ["av>=17", "pillow>=10", "rich>=13", "typer>=0.15", "matplotlib>=3.8"]
CPU = ["numba>=0.60"]
TRAIN = [
    *CLI,
    *CPU,
    "diffusers>=0.42",
    "transformers>=5.0",
    "peft>=0.18",
    "accelerate>=1.0",
    "deepspeed>=0.19.8",  # the first release in which ZeRO-3, frozen parameters and checkpointing agree
    "pydantic>=2.7",
    "pyyaml>=6",
    "filelock>=3.12",
    "ftfy>=6.1",
    "beautifulsoup4>=4.12",  # with ftfy, what diffusers cleans captions with
    "sentencepiece>=0.2",
    "protobuf>=4",
    "tensorboard>=2.16",
]
GPU = ["triton>=3.4; sys_platform == 'linux'", "xformers>=0.0.32; sys_platform == 'linux'"]
EVAL = [*CLI, "scipy>=1.11"]
EXAMPLES = ["scikit-image>=0.22", "scipy>=1.11"]  # bundled photographs; quantiles of the study's intervals
TEST = [
    *CPU,
    "pytest>=8",
    "pytest-benchmark>=4",
    "pytest-xdist>=3.5",
    "hypothesis>=6.100",
    "import-linter>=2.0",
    "ruff>=0.8",
    "scipy>=1.11",  # what examples/tiny_i2v reports with
    "setuptools>=77",  # the wheel test builds without isolation
    "triton>=3.4; sys_platform == 'linux'",
]

setup(
    name="vcd_fast",
    version=VERSION,
    description="Video Consistency Distance as a fast, low-memory loss, metric and fine-tuning reward",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    # Only vcd_fast may become importable: a top-level `kernels` would shadow the PyPI package of that name,
    # which diffusers and transformers probe for. vcd_fast/kernels.py finds the files in either place.
    packages=[*find_packages(include=["vcd_fast", "vcd_fast.*"]), "vcd_fast.kernels", "vcd_fast.tiny_i2v"],
    package_dir={"vcd_fast.kernels": "kernels", "vcd_fast.tiny_i2v": "examples/tiny_i2v/model"},
    package_data={"vcd_fast": ["presets/*/*.yaml"], "vcd_fast.tiny_i2v": ["*.json", "*.md", "*/*"]},
    install_requires=CORE,
    extras_require={
        "cli": CLI,
        "cpu": CPU,
        "train": TRAIN,
        "gpu": GPU,
        "eval": EVAL,
        "test": TEST,
        "examples": EXAMPLES,
        "all": sorted({*TRAIN, *GPU, *EVAL, *TEST, *EXAMPLES}),
    },
    entry_points={"console_scripts": ["vcd = vcd_fast.cli.main:main"]},
    classifiers=[
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
