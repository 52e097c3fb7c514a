"""What a run says when memory ran out: where, how much there was and should have been, and what to turn on next."""

from __future__ import annotations

import torch

from vcd_fast.training.estimate import GIB, LAST_RESORT, estimate, next_option
from vcd_fast.training.memory import peak_memory_gib
from vcd_fast.training.settings import RunConfig

PLACES = {
    "encode": "while prompts and pictures were encoded",
    "load": "while the model was loaded",
    "rollout": "in the rollout",
    "decode": "in the decode",
    "reward": "in the reward",
    "backward": "in the backward",
    "optimizer": "in the optimizer's step",
    "samples": "while samples were made",
}


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a GPU's or the CPU's allocator gave up; the CPU's says so in the message of a RuntimeError."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def explain(error: BaseException, config: RunConfig, phase: str | None, device: torch.device, gpus: int) -> str:
    """A message for the user.

    Args:
        phase: where it happened, None outside any.
        gpus: that share the run.
    """
    peak = peak_memory_gib(device)
    if device.type == "cuda":
        there = torch.cuda.get_device_properties(device).total_memory / GIB
        truth = f"The allocator's peak was {peak:.2f} GiB of the GPU's {there:.2f}"
    else:
        truth = f"The process had taken {peak:.2f} GiB at most, everything included"
    first = next(iter(str(error).splitlines()), type(error).__name__)
    lines = [
        f"out of memory {PLACES.get(phase, 'outside a step')} ({first})",
        f"{truth}{_estimated(config, phase, gpus)}",
    ]
    return "\n".join([*lines, _advice(config, phase, gpus), "`vcd estimate` with the same options shows all of it"])


def _estimated(config: RunConfig, phase: str | None, gpus: int) -> str:
    try:
        found = estimate(config, gpus)
    except (ValueError, OSError) as problem:
        return f"; there is no estimate: {problem}"
    here, peak = found.phase(phase) if phase else None, found.peak
    parts = "" if here is None else "; ".join(f"{name} {size / GIB:.2f}" for name, size in here.parts.items())
    at = "" if here is None else f"; the estimate for this phase is {here.total / GIB:.2f} GiB ({parts})"
    return f"{at}; the whole run should do with {peak.needed / GIB:.2f} GiB, the most of it in phase {peak.name}"


def _advice(config: RunConfig, phase: str | None, gpus: int) -> str:
    if phase in ("encode", "load"):
        return (
            "encoders and weights have to fit as they are: free the GPU of other processes, or encode on a larger machine and bring its "
            "folder of encodings (--cache)"
        )
    try:
        found = next_option(config, gpus, phase)
    except (ValueError, OSError):
        found = None
    if found is None:
        return f"what there is to turn on is on; what is left: {LAST_RESORT}"
    option, after = found
    here = after.phase(phase) if phase else None
    size = (after.needed if here is None else here.total) / GIB
    return f"next, turn on {option.flag} (costs: {option.costs}): the estimate is then {size:.2f} GiB"
