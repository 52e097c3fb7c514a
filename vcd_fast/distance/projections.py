"""Random unit directions: a function of the seed and the layer's name alone."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor
from torch.nn import functional as F


def draw_projections(seed: int, layer: str, num_projections: int, channels: int, patch_size: int = 1) -> Tensor:
    """Directions uniform on the unit sphere, the same on every device, rank and run.

    They are drawn in float64 on the CPU, so that float32 and float64 computations use the same ones up to rounding.

    Args:
        seed: any integer; another one redraws all directions.
        layer: name of the feature map; maps of different names get independent directions.
        num_projections: K. channels: C. patch_size: k.

    Returns:
        float64 [K, C·k·k], rows of norm 1, laid out as a filter [C, k, k] is.
    """
    digest = hashlib.sha256(f"{seed}/{layer}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    drawn = torch.randn(num_projections, channels * patch_size**2, generator=generator, dtype=torch.float64)
    return F.normalize(drawn, dim=1)


def given_projections(projections: Tensor, channels: int, patch_size: int | None, argument: str) -> Tensor:
    """A caller's own directions [K, C] or [K, C, k, k] -> [K, C·k·k]. They are used as they are, normalised or not.

    Raises:
        TypeError, ValueError: not a floating-point tensor of that shape. `patch_size` None stands for the channel reading.
    """
    if not isinstance(projections, Tensor) or not projections.is_floating_point():
        raise TypeError(f"{argument}: expected a floating-point tensor, got {projections!r:.80}")
    k = patch_size or 1
    expected = f"[K, {channels}, {k}, {k}]" + (f" or [K, {channels}]" if k == 1 else "")
    shape = tuple(projections.shape)
    if (
        len(shape) not in ((2, 4) if k == 1 else (4,))
        or shape[0] < 1
        or shape[1:] not in ((channels,), (channels, k, k))
    ):
        raise ValueError(f"{argument}: expected shape {expected}, got {list(shape)}")
    return projections.detach().flatten(1)
