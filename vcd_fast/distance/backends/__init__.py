"""Ways to compute the same sliced Wasserstein distance, and which one is used."""

from __future__ import annotations

import os

from torch import Tensor

VARIABLE = "VCD_FAST_BACKEND"
BACKENDS = ("auto", "reference", "simd", "triton")


def resolve_backend(backend: str, x: Tensor) -> str:
    """The name of the backend that computes for `x`.

    Args:
        backend: "reference", "simd" (CPU), "triton" (GPU), or "auto": what the environment variable `VCD_FAST_BACKEND` says, else
            the fastest that can run.

    Raises:
        ValueError: unknown name, or one that cannot run here; the message says why.
    """
    argument = "backend"
    if backend == "auto" and os.environ.get(VARIABLE):
        argument, backend = f"environment variable {VARIABLE}", os.environ[VARIABLE]
    if backend not in BACKENDS:
        raise ValueError(f"{argument}: expected one of {', '.join(BACKENDS)}, got {backend!r}")
    if backend in ("simd", "triton"):
        raise ValueError(f"{argument}: {backend!r} is not part of this version; use 'auto' or 'reference'")
    return "reference"
