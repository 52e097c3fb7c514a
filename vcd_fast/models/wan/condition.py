"""What a Wan 2.1 I2V clip is generated from."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from vcd_fast.models.base import Condition

TEXT_TOKENS = 512
"""The attention of Wan I2V takes the last 512 tokens of its context for text, whatever the prompt's length."""


@dataclasses.dataclass(frozen=True)
class WanCondition(Condition):
    prompt_embeds: Tensor
    """[B, 512, D] UMT5 states, zero after the prompt's last token"""
    negative_prompt_embeds: Tensor
    """[B, 512, D]"""
    latents: Tensor
    """[B, 20, f, h, w] float32: 4 channels of mask (1 in the first latent frame), 16 of the normalised image latents"""
    image_embeds: Tensor | None = None
    """[B, T, E] CLIP states of the layer before the last; None for models without image encoder"""

    def save(self, path: str | Path) -> None:
        """Write the tensors as safetensors, prompts without the zeros after them."""
        prompts = {name: _without_padding(getattr(self, name)) for name in ("prompt_embeds", "negative_prompt_embeds")}
        Condition.save(dataclasses.replace(self, **prompts), path)

    @classmethod
    def load(cls, path: str | Path) -> WanCondition:
        stored = super().load(path)
        return dataclasses.replace(
            stored,
            prompt_embeds=_padded(stored.prompt_embeds),
            negative_prompt_embeds=_padded(stored.negative_prompt_embeds),
        )


def _without_padding(embeds: Tensor) -> Tensor:
    used = (embeds != 0).any(2).any(0).nonzero()
    return embeds[:, : int(used.max()) + 1 if len(used) else 1]


def _padded(embeds: Tensor) -> Tensor:
    return F.pad(embeds, (0, 0, 0, TEXT_TOKENS - embeds.shape[1]))


def mask_channels(batch: int, frames: int, height: int, width: int) -> Tensor:
    """[batch, 4, frames, height, width] float32: 1 where a latent frame stands for known pixels, the first one only.

    Four channels for the four frames of a latent frame; the first latent frame stands for the conditioning image alone,
    which fills all four.
    """
    mask = torch.zeros(batch, 4, frames, height, width)
    mask[:, :, 0] = 1
    return mask
