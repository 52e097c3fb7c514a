"""Peak memory of this process, in the unit people buy it in."""

from __future__ import annotations

import sys

import torch


def reset_peak_memory(device: torch.device) -> None:
    """Start anew on a GPU; a process's peak resident size cannot be."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory_gib(device: torch.device) -> float:
    """GiB: the allocator's peak on a GPU, the process's peak resident size on a CPU (Linux and macOS; 0 elsewhere)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    if sys.platform == "win32":
        return 0.0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**30 if sys.platform == "darwin" else peak / 2**20
