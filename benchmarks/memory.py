"""Peak memory of a case.

On the CPU: the peak of the resident set above what is resident when the inputs are ready, in a fresh process for every case, after one
tiny round that loads what is loaded once. `python -m benchmarks.memory REQUEST` is that process. On a GPU: the allocator's peak above the
inputs, in the process that times.
"""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.cases import Case
from benchmarks.machine import ROOT

THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


@dataclasses.dataclass(frozen=True)
class Peak:
    bytes: int
    meter: str


class OutOfMemory(RuntimeError):
    """The process that measured was killed, or could not get its memory."""


def gpu_peak(run: Callable[[], None], device: torch.device) -> Peak:
    """Of torch's allocator, above what is allocated now."""
    torch.cuda.synchronize(device)
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    torch.cuda.synchronize(device)
    return Peak(torch.cuda.max_memory_allocated(device) - before, "CUDA allocator")


def _resident(field: str) -> int | None:
    """VmRSS (now) or VmHWM (peak) of this process in bytes; None where the system does not say."""
    status = Path("/proc/self/status")
    if not status.is_file():
        return None
    for line in status.read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    return None


def _trim() -> None:
    """Give freed memory back to the system, so that the next allocation counts."""
    gc.collect()
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except (OSError, AttributeError):  # another C library: what it keeps is counted as already there
        return


def process_peak(run: Callable[[], None]) -> Peak:
    """Peak of this process's resident set while `run` runs, above that before. Needs a process in which little ran before."""
    _trim()
    before = _resident("VmRSS")
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    except OSError:
        before = None
    if before is None:
        unit = 1 if sys.platform == "darwin" else 1024
        start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        run()
        return Peak(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit - start, "process peak (ru_maxrss)")
    run()
    return Peak(max(0, _resident("VmHWM") - before), "process peak (VmHWM)")


def peak_in_fresh_process(provider: str, case: Case, weights: str, threads: int) -> Peak:
    """Measure a case on the CPU in a process of its own.

    Raises:
        OutOfMemory: it needs more than there is. RuntimeError: it failed otherwise; the message ends with what it said.
    """
    request = json.dumps(
        {"provider": provider, "case": dataclasses.asdict(case), "weights": weights, "threads": threads}
    )
    environment = {**os.environ, **{name: str(threads) for name in THREAD_VARIABLES}}
    command = [sys.executable, "-m", "benchmarks.memory", request]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return Peak(**json.loads(done.stdout.splitlines()[-1]))
    last = (done.stderr.strip().splitlines() or ["nothing was said"])[-1]
    if done.returncode == -9 or "can't allocate memory" in last or "MemoryError" in last:
        raise OutOfMemory(f"{case.name} with {provider} does not fit in memory: {last}")
    raise RuntimeError(f"{case.name} with {provider} failed in its own process (exit {done.returncode}): {last}")


def main(request: str) -> None:
    asked = json.loads(request)
    torch.set_num_threads(asked["threads"])
    from benchmarks.operations import operation
    from benchmarks.providers import workload

    case = Case(**{**asked["case"], "size": tuple(asked["case"]["size"])})
    tiny = dataclasses.replace(case, size=(80, 80), num_projections=8, frames=1)
    device = torch.device("cpu")

    def once(case: Case) -> Callable[[], None]:
        work = workload(asked["provider"], case, device, asked["weights"])

        def run() -> None:
            step = operation(work, case.mode)
            step.before()
            step.run()

        return run

    once(tiny)()
    print(json.dumps(dataclasses.asdict(process_peak(once(case)))))


if __name__ == "__main__":
    main(sys.argv[1])
