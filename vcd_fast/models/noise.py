"""The noise a clip starts from."""

from __future__ import annotations

import torch
from torch import Tensor

from vcd_fast.models.base import Generators


def draw_noise(shape: tuple[int, ...], batch: int, generator: Generators) -> Tensor:
    """Standard normal float32 [batch, *shape] on the device of the generator.

    Args:
        generator: one for the whole batch, or one per sample, which makes a sample independent of its batch.

    Raises:
        ValueError: not as many generators as samples.
    """
    if isinstance(generator, torch.Generator):
        return torch.randn((batch, *shape), generator=generator, device=generator.device, dtype=torch.float32)
    if len(generator) != batch:
        raise ValueError(f"generator: expected one for each of {batch} samples, got {len(generator)}")
    return torch.stack(
        [torch.randn(shape, generator=each, device=each.device, dtype=torch.float32) for each in generator]
    )
