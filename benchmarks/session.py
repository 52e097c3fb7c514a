"""One run of the suite: what it measures on, what it has written, what it left out and why."""

from __future__ import annotations

import dataclasses
import os
import time
import uuid
from collections import defaultdict
from pathlib import Path

import torch

from benchmarks import estimate, gate, machine, memory, providers, rows, timing
from benchmarks.accuracy import Accuracy
from benchmarks.cases import Case, Level, Measurement
from benchmarks.memory import Peak
from benchmarks.operations import operation
from benchmarks.timing import Times


class Run:
    """Measures, and writes a row as soon as it has one.

    Args:
        results: the file rows are added to; None: `results/<machine>-<date>.json`.
        minutes: after which no other measurement is begun; None: no limit.
        longest: rounds that are expected to take more seconds on a CPU are left out; None: none are.
        with_memory: whether peaks are measured.
    """

    def __init__(
        self,
        level: Level,
        device: torch.device,
        threads: int,
        weights: str,
        results: Path | None,
        minutes: float | None,
        longest: float | None,
        with_memory: bool,
    ) -> None:
        load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
        torch.set_num_threads(threads)
        if device.type == "cuda":  # all providers alike: TF32 moves phases
            torch.backends.cuda.matmul.allow_tf32 = False
            torch.backends.cudnn.allow_tf32 = False
        self.level, self.device, self.weights, self.with_memory = level, device, weights, with_memory
        self.threads = torch.get_num_threads()
        self.deadline = None if minutes is None else time.monotonic() + 60 * minutes
        self.minutes, self.longest = minutes, longest
        self.machine = machine.describe(device)
        self.common: rows.Row = {
            "schema": rows.SCHEMA,
            "run": f"{machine.now()} {uuid.uuid4().hex[:8]}",
            "device": device.type,
            "weights": weights,
            "threads": self.threads,
            "load_average": load,
            "machine": self.machine,
            "versions": machine.versions(),
            "commit": machine.commit(),
        }
        self.results = results or rows.RESULTS / f"{self.machine['slug']}-{machine.now()[:10]}.json"
        self.written = 0
        self.left_out: dict[str, list[Measurement]] = defaultdict(list)

    def obstacle(self, measurement: Measurement) -> str | None:
        """Why this is not measured now, or None."""
        if self.deadline is not None and time.monotonic() > self.deadline:
            return f"the {self.minutes:g} minutes of this run were over (--minutes)"
        if measurement.case.memory_only and not self.with_memory:
            return "peaks were not asked for (--no-memory)"
        if reason := providers.why_not(measurement.provider, measurement.case, self.device):
            return reason
        seconds = estimate.expected_seconds(measurement.provider, measurement.case)
        if self.longest is not None and self.device.type == "cpu" and seconds > self.longest:
            return f"a round is expected to take more than {self.longest:g} s (--longest)"
        needed = estimate.needed_bytes(measurement.provider, measurement.case)
        available = machine.available_bytes(self.device)
        if needed > estimate.SHARE * available:
            return f"does not fit in memory: needs about {needed / 1e9:.0f} GB, {available / 1e9:.0f} GB are available"
        return None

    def leave_out(self, measurement: Measurement, reason: str) -> None:
        self.left_out[reason].append(measurement)

    def accuracy(self, measurement: Measurement) -> Accuracy | None:
        """None for what computes no distance."""
        if measurement.provider == "vgg19":
            return None
        return gate.accuracy(measurement.provider, measurement.case, self.device, self.weights)

    def wants_memory(self, case: Case) -> bool:
        """Peaks of a backward alone are those of forward and backward. The subset leaves out those that say little."""
        if not self.with_memory or case.mode == "backward":
            return False
        return self.level != "subset" or (case.mode == "both" and case.num_projections == 256)

    def peak(self, measurement: Measurement) -> Peak:
        """Raises memory.OutOfMemory, RuntimeError."""
        provider, case = measurement.provider, measurement.case
        if self.device.type == "cpu":
            return memory.peak_in_fresh_process(provider, case, self.weights, self.threads)
        work = providers.workload(provider, case, self.device, self.weights)

        def once() -> None:
            step = operation(work, case.mode)
            step.before()
            step.run()

        once()
        work.variable.grad = None
        return memory.gpu_peak(once, self.device)

    def gpu_times(self, measurement: Measurement) -> Times:
        work = providers.workload(measurement.provider, measurement.case, self.device, self.weights)
        budget = 5.0 if self.level == "full" else 1.0
        return timing.gpu_times(operation(work, measurement.case.mode), self.device, budget)

    def write(
        self, measurement: Measurement, times: Times | None, peak: Peak | None, accuracy: Accuracy | None
    ) -> None:
        case = measurement.case
        rows.append(
            self.results,
            [
                {
                    **self.common,
                    **rows.case_fields(case),
                    "time": machine.now(),
                    "provider": measurement.provider,
                    "seconds": times.seconds if times else None,
                    "rounds": times.rounds if times else 0,
                    "clock": times.clock if times else None,
                    "peak_bytes": peak.bytes if peak else None,
                    "meter": peak.meter if peak else None,
                    "floor_bytes": estimate.floor_bytes(case),
                    "accuracy": dataclasses.asdict(accuracy) if accuracy else None,
                }
            ],
        )
        self.written += 1

    def summary(self) -> list[str]:
        """What the end of a run says."""
        name = self.machine["gpu"] or self.machine["cpu"]
        lines = [f"{self.written} rows written to {self.results} ({name}, {self.threads} threads, {self.level})"]
        load = self.common["load_average"]
        if load is not None and load > 0.5:
            lines.append(f"the machine was busy when the run began (load average {load:.1f}): times are too long")
        for reason, measurements in self.left_out.items():
            lines.append(f"left out: {reason}")
            lines += [f"    {line}" for line in compact(measurements)]
        return lines


def compact(measurements: list[Measurement]) -> list[str]:
    """One line for each provider: how many cases, and which where they are few."""
    by_provider: dict[str, list[str]] = defaultdict(list)
    for measurement in measurements:
        by_provider[measurement.provider].append(measurement.case.name)
    lines = []
    for provider, names in by_provider.items():
        shown = ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
        lines.append(f"{provider}, {len(names)} case{'s' * (len(names) > 1)}: {shown}")
    return lines
