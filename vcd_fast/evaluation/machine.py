"""Facts about this machine: installed versions, GPUs, memory."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
from typing import TYPE_CHECKING

import torch

from vcd_fast.errors import describe

if TYPE_CHECKING:
    from packaging.specifiers import SpecifierSet

PACKAGES = {
    "torch": "core",
    "numpy": "core",
    "safetensors": "core",
    "huggingface_hub": "core",
    "av": "train",
    "diffusers": "train",
    "transformers": "train",
    "peft": "train",
    "deepspeed": "train",
    "pydantic": "train",
    "numba": "cpu",
    "triton": "gpu",
    "xformers": "gpu",
}
"""distributions that matter, and the extra of `setup.py` that brings them"""


def versions() -> dict[str, str | None]:
    """Of Python and of everything in `PACKAGES`; None: not installed."""
    return {"python": platform.python_version(), **{name: _installed(name) for name in PACKAGES}}


def why_no_gpu() -> str:
    """Why `torch.cuda.is_available()` is False, in words."""
    if torch.version.cuda is None and torch.version.hip is None:
        return f"PyTorch {torch.__version__} is built without CUDA and ROCm"
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if hidden is not None and hidden.strip() in ("", "-1"):
        return f"CUDA_VISIBLE_DEVICES={hidden!r} hides them"
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return describe(error).splitlines()[0]
    return "PyTorch sees none"


def gpu_driver() -> str | None:
    """The version of NVIDIA's driver, as its own program says; None where there is no such program."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    command = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.split("\n")[0].strip() or None


def _installed(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def requirements() -> dict[str, SpecifierSet]:
    """Distribution -> the versions that vcd_fast asks for."""
    from packaging.requirements import Requirement

    try:
        texts = importlib.metadata.requires("vcd_fast") or []
    except importlib.metadata.PackageNotFoundError:
        return {}
    parsed = map(Requirement, texts)
    return {requirement.name: requirement.specifier for requirement in parsed if requirement.name in PACKAGES}


def memory_bytes() -> int:
    """Bytes of this machine's memory; 0 where it cannot be asked."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return 0


def gib(count: float) -> str:
    return f"{count / 2**30:.1f} GiB"
