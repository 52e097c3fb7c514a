"""Ways to compute the same sliced Wasserstein distance, and which one is used."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from vcd_fast.distance.target import SortedTarget

VARIABLE = "VCD_FAST_BACKEND"
BACKENDS = ("auto", "reference", "simd", "triton")

TermsAndGradient = Callable[[Tensor, "SortedTarget", bool], tuple[Tensor, Tensor | None]]
"""(x [N, C, H, W], target, whether the gradient is wanted) -> terms [N, parts], gradient of their weighted sum [N, C, H, W] or None"""

_log = logging.getLogger("vcd_fast")
_said: set[str] = set()


def check_backend(backend: str) -> str:
    """`backend`, or what the environment variable `VCD_FAST_BACKEND` says in place of "auto".

    Raises:
        ValueError: neither of `BACKENDS`.
    """
    argument = "backend"
    if backend == "auto" and os.environ.get(VARIABLE):
        argument, backend = f"environment variable {VARIABLE}", os.environ[VARIABLE]
    if backend not in BACKENDS:
        raise ValueError(f"{argument}: expected one of {', '.join(BACKENDS)}, got {backend!r}")
    return backend


def fused_backend(backend: str, x: Tensor, target: SortedTarget) -> TermsAndGradient | None:
    """What computes terms and gradient of x at once, or None for the reference, which autograd differentiates.

    "auto" is "triton" on a GPU and "simd" on a CPU where they can run, else "reference". "simd" leaves very small maps to the reference.

    Raises:
        ValueError: unknown name, or a backend that cannot run here; the message says why.
    """
    backend, device = check_backend(backend), x.device
    if backend == "reference":
        return None
    if backend == "simd" or (backend == "auto" and device.type == "cpu"):
        reason = _simd_cannot(device, target)
        if reason is None:
            from vcd_fast.distance.backends import simd

            return None if simd.is_small(x, target) else simd.sliced_terms
        if backend == "simd":
            raise ValueError(f"backend: 'simd' cannot run: {reason}; use 'auto' or 'reference'")
        return None
    if backend == "auto" and device.type != "cuda":
        return None
    from vcd_fast.distance.backends import triton_fused

    reason = triton_fused.unavailable(device) or triton_fused.unsupported(target)
    if reason is None:
        return triton_fused.sliced_terms
    if backend == "triton":
        raise ValueError(f"backend: 'triton' cannot run: {reason}; use 'auto' or 'reference'")
    if reason not in _said:
        _said.add(reason)
        _log.info("the reference computes instead of the Triton kernels: %s", reason)
    return None


def _simd_cannot(device: torch.device, target: SortedTarget) -> str | None:
    """Why the CPU backend cannot compute a distance to `target`, or None."""
    if device.type != "cpu":
        return f"it is for the CPU, and the tensors are on {device}"
    if target.dtype != torch.float32:
        return f"it computes in torch.float32, and the target is {target.dtype}"
    return None
