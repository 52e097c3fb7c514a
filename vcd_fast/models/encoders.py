"""What the encoders of all families do around their sub-models."""

from __future__ import annotations

import gc
from collections.abc import Sequence

import torch
from torch import Tensor


def check_inputs(
    images: Tensor, prompts: Sequence[str], negative_prompts: Sequence[str], height: int, width: int
) -> None:
    """
    Raises:
        ValueError: images that are not [B, 3, height, width], or not as many prompts as images.
    """
    if images.ndim != 4 or images.shape[1:] != (3, height, width):
        raise ValueError(f"images: expected [B, 3, {height}, {width}], got {list(images.shape)}")
    if not len(images) == len(prompts) == len(negative_prompts):
        raise ValueError(
            f"prompts: expected one prompt and one negative prompt for each of {len(images)} images, got "
            f"{len(prompts)} and {len(negative_prompts)}"
        )


def free_memory(device: torch.device, collect: bool) -> None:
    """Give back what the sub-model just dropped held, before the next one is loaded.

    Args:
        collect: look for reference cycles too; tens of milliseconds that only real weights are worth.
    """
    if collect:
        gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
