"""Goldens of Open-Sora: tensors, configurations, and weights drawn from the names of the state dict."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

FOLDER = Path(__file__).parents[2] / "goldens" / "opensora"
KEPT = {"rope.freqs", "scale", "shift"}


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Layers of a few channels are slower on two threads, and ten times slower where the cores are shared."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def golden() -> Callable[[str], SimpleNamespace]:
    """name -> `tensors` (by name) and `meta` of that golden."""

    def load(name: str) -> SimpleNamespace:
        description = json.loads((FOLDER / f"{name}.json").read_text())
        path = FOLDER / f"{name}.safetensors"
        tensors = load_file(path) if path.exists() else {}
        return SimpleNamespace(tensors=tensors, meta=description.get("meta", description))

    return load


def _drawn(key: str, shape: torch.Size) -> Tensor:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(key.encode()))) * 0.05
    parent, _, last = key.rpartition(".")
    is_norm = len(shape) == 1 and last == "weight" and "norm" in parent.rpartition(".")[2]
    return weight + 1 if is_norm else weight


@pytest.fixture(scope="session")
def recipe() -> Callable[..., nn.Module]:
    """Fill a module (on the meta device too) with the weights of the goldens and return it, in evaluation mode."""

    def fill(module: nn.Module) -> nn.Module:
        state = module.state_dict()
        new = {key: old if key in KEPT else _drawn(key, old.shape) for key, old in state.items()}
        module.load_state_dict(new, assign=True)
        return module.eval()

    return fill


@pytest.fixture(scope="session")
def lora_weight() -> Callable[[str, torch.Size], Tensor]:
    def draw(key: str, shape: torch.Size) -> Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(f"lora:{key}".encode()))) * 0.05

    return draw


@pytest.fixture(scope="session")
def error() -> Callable[[Tensor, Tensor], float]:
    """max|a - b| / max|b|"""

    def relative(actual: Tensor, expected: Tensor) -> float:
        assert actual.shape == expected.shape
        return ((actual - expected).abs().max() / expected.abs().max()).item()

    return relative
