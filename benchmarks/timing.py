"""Clocks: pytest-benchmark's on the CPU, events on a GPU."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence

import torch

from benchmarks.operations import Operation

FLUSH_BYTES = 1 << 28
"""written between rounds on a GPU: more than the last-level cache of any"""


@dataclasses.dataclass(frozen=True)
class Times:
    p20: float
    p50: float
    p80: float
    rounds: int
    clock: str

    @property
    def seconds(self) -> dict[str, float]:
        return {"p20": self.p20, "p50": self.p50, "p80": self.p80}


def quantile(values: Sequence[float], q: float) -> float:
    """Linear between the two nearest ranks."""
    ordered = sorted(values)
    at = q * (len(ordered) - 1)
    below = int(at)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (at - below) * (ordered[above] - ordered[below])


def summary(seconds: Sequence[float], clock: str) -> Times:
    return Times(quantile(seconds, 0.2), statistics.median(seconds), quantile(seconds, 0.8), len(seconds), clock)


def rounds_for(first: float, budget: float, least: int, most: int) -> int:
    """How often to repeat what took `first` seconds within `budget` seconds."""
    return max(least, min(most, int(budget / max(first, 1e-6))))


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a case is repeated on the CPU: a first round that does not count, or none because every round is dear."""

    warm_up: bool
    least: int
    most: int
    budget: float
    """seconds"""


def cpu_plan(expected: float, full: bool) -> Plan:
    """For a case whose round is expected to take so many seconds."""
    if expected > 3:
        few = 1 if expected > 30 else 2 if expected > 8 else 3
        return Plan(False, few, few, 0.0)
    return Plan(True, 3, 30 if full else 10, 15.0 if full else 1.5)


def gpu_times(operation: Operation, device: torch.device, budget: float, least: int = 10, most: int = 200) -> Times:
    """Time on the device between two events around each round, the cache flushed before it.

    The device is not waited for between rounds, so that the host runs ahead as it does in use, except by what `operation` itself waits for.
    """
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device)
    with torch.cuda.device(device):
        for _ in range(3):  # compiles, autotunes, fills the allocator's pool
            operation.before()
            operation.run()
        first = _event_times(operation, flush, 2)[-1]
        seconds = _event_times(operation, flush, rounds_for(first, budget, least, most))
    return summary(seconds, "CUDA events, L2 flushed")


def _event_times(operation: Operation, flush: torch.Tensor, rounds: int) -> list[float]:
    pairs = []
    for _ in range(rounds):
        operation.before()
        flush.zero_()
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        operation.run()
        stop.record()
        pairs.append((start, stop))
    torch.cuda.synchronize()
    return [start.elapsed_time(stop) / 1000 for start, stop in pairs]
