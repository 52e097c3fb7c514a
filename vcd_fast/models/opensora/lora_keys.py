"""LoRA files of VADER's Open-Sora scripts: a PEFT state dict in `torch.save`'s format, with neither rank nor alpha in it.

VADER (github.com/mihirp1998/VADER) makes its LoRA without naming alpha, so PEFT's default applies: every loader of such a file scales by
8 / rank. A LoRA of another alpha is written with its B matrices multiplied accordingly, so that it has the same effect there.
"""

from __future__ import annotations

import os
import pickle
import tempfile
import zipfile
from pathlib import Path

import torch
from torch import Tensor

from vcd_fast.models.lora_files import LoRAWeights

PREFIX = "base_model.model."
VADER_ALPHA = 8.0
A, B = ".lora_A.weight", ".lora_B.weight"


def to_vader(weights: LoRAWeights) -> dict[str, Tensor]:
    """The state dict as VADER saves it, of the same effect under its scale 8 / rank.

    Raises:
        ValueError: a LoRA for another family of models.
    """
    if weights.family not in (None, "opensora"):
        raise ValueError(f"lora: expected one for opensora, got one for {weights.family}")
    state = {}
    for module in weights.modules:
        state[PREFIX + module + A] = weights.tensors[module + A]
        state[PREFIX + module + B] = weights.tensors[module + B] * (weights.alpha[module] / VADER_ALPHA)
    return state


def from_vader(state: dict[str, Tensor], alpha: float = VADER_ALPHA) -> LoRAWeights:
    """The inverse of `to_vader`; `alpha` is what the LoRA was trained with.

    Raises:
        ValueError: keys that do not belong to such a state dict, or matrices without their partner.
    """
    foreign = [key for key in state if not (key.startswith(PREFIX) and key.endswith((A, B)))]
    if foreign or not state:
        raise ValueError(f"lora: expected keys {PREFIX}<module>{A} and {B}, got {', '.join(foreign[:3]) or 'none'}")
    tensors = {key.removeprefix(PREFIX): value for key, value in state.items()}
    modules = sorted({key.removesuffix(A).removesuffix(B) for key in tensors})
    for module in modules:
        pair = [tensors.get(module + suffix) for suffix in (A, B)]
        if any(matrix is None for matrix in pair) or pair[0].shape[0] != pair[1].shape[1]:
            raise ValueError(
                f"lora: expected a pair of matrices of one rank for {module}, got {list(map(_shape, pair))}"
            )
    return LoRAWeights(tensors, dict.fromkeys(modules, float(alpha)), "opensora")


def save_vader(path: str | os.PathLike[str], weights: LoRAWeights) -> Path:
    """Write a file that VADER's scripts load, and return it; nothing half-written is left.

    `path` is a folder, or a file name with a suffix.

    Raises:
        ValueError: a LoRA for another family.
        OSError: the file cannot be written.
    """
    path, state = Path(path), to_vader(weights)
    path = path if path.suffix else path / "lora_vader.pt"
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, partial = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".partial")
    os.close(handle)
    try:
        torch.save({key: value.detach().cpu().contiguous() for key, value in state.items()}, partial)
        os.replace(partial, path)
    except BaseException:
        Path(partial).unlink(missing_ok=True)
        raise
    return path


def load_vader(path: str | os.PathLike[str], alpha: float = VADER_ALPHA) -> LoRAWeights:
    """Read a file that VADER's scripts saved. No code in it is run.

    Raises:
        ValueError: not such a file, or damaged.
        OSError: it cannot be read.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (pickle.UnpicklingError, EOFError, RuntimeError) as error:
        first = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(f"{path}: expected a state dict written by torch.save ({first})") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path}: expected a dictionary of tensors, got {type(state).__name__}")
    return from_vader(state, alpha)


def _shape(tensor: Tensor | None) -> list[int] | None:
    return None if tensor is None else list(tensor.shape)
