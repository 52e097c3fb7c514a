"""What is timed, and whose memory is measured: one round of a case. Speed and memory share it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.cases import Mode
from benchmarks.providers import Workload


@dataclasses.dataclass(frozen=True)
class Operation:
    """`before` is not measured and makes what `run` needs; both may be called again and again."""

    before: Callable[[], None]
    run: Callable[[], None]


def operation(work: Workload, mode: Mode) -> Operation:
    """One round of `mode`. What is the condition's is prepared here, once, except where `mode` is to measure that."""
    if mode == "prepare":
        return Operation(lambda: None, lambda: _discard(work.prepare()))
    fixed = work.prepare()
    graph: list[Tensor] = []

    def clear() -> None:
        graph.clear()
        work.variable.grad = None

    def forward() -> None:
        graph.append(work.loss(fixed))

    def backward() -> None:
        graph.pop().backward()

    def no_grad() -> None:
        with torch.no_grad():
            work.loss(fixed)

    def both() -> None:
        work.loss(fixed).backward()

    def clear_and_forward() -> None:
        clear()
        forward()

    if mode == "backward":
        return Operation(clear_and_forward, backward)
    return Operation(clear, {"both": both, "no_grad": no_grad, "forward": forward}[mode])


def _discard(_: object) -> None:
    pass


def value_and_gradient(work: Workload) -> tuple[Tensor, Tensor]:
    """The loss and its gradient, float64, for the accuracy gate."""
    value = work.loss(work.prepare())
    (gradient,) = torch.autograd.grad(value, work.variable)
    return value.detach().double(), gradient.double()
