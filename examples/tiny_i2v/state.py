"""What training keeps between two starts: weights, their moving average, the optimizer, a log."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from examples.tiny_i2v.muon import MuonAndAdamW


class Average:
    """Exponential moving average of a module's parameters; young averages forget faster."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay, self.updates = decay, 0
        self.values = {name: tensor.detach().clone() for name, tensor in module.named_parameters()}

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        self.updates += 1
        weight = 1 - min(self.decay, self.updates / (self.updates + 9))
        for name, tensor in module.named_parameters():
            self.values[name].lerp_(tensor, weight)

    @contextmanager
    def of(self, module: nn.Module) -> Iterator[nn.Module]:
        """The module with averaged parameters, until the block ends."""
        own = {name: tensor.detach().clone() for name, tensor in module.named_parameters()}
        copy_into(module, self.values)
        try:
            yield module
        finally:
            copy_into(module, own)


@torch.no_grad()
def copy_into(module: nn.Module, values: dict[str, Tensor]) -> None:
    for name, tensor in module.named_parameters():
        tensor.copy_(values[name])


def save_state(
    path: Path, module: nn.Module, optimizer: MuonAndAdamW, average: Average, step: int, seconds: float
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    state = {"module": module.state_dict(), "optimizer": optimizer.state_dict(), "step": step, "seconds": seconds}
    torch.save(state | {"average": average.values, "updates": average.updates}, partial)
    os.replace(partial, path)


def load_state(path: Path, module: nn.Module, optimizer: MuonAndAdamW, average: Average) -> tuple[int, float]:
    """(steps done, seconds spent); zeros where there is nothing yet."""
    if not path.is_file():
        return 0, 0.0
    state = torch.load(path, weights_only=True)
    module.load_state_dict(state["module"])
    optimizer.load_state_dict(state["optimizer"])
    average.values, average.updates = state["average"], state["updates"]
    return state["step"], state["seconds"]


class Log:
    """A JSON line per entry, also shown."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path

    def write(self, **entry: Any) -> None:
        text = json.dumps({key: round(value, 6) if isinstance(value, float) else value for key, value in entry.items()})
        print(text, flush=True)
        with self.path.open("a") as file:
            file.write(text + "\n")
