"""What an Open-Sora clip is generated from."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from vcd_fast.models.base import Condition

TEXTS = ("text", "negative_text")


@dataclasses.dataclass(frozen=True)
class OpenSoraCondition(Condition):
    """Texts keep their own lengths: a batch of different ones is padded behind, with a mask."""

    image_latents: Tensor
    """[B, 4, 1, h, w] float32, normalised latents of the conditioning image as a clip of one frame"""
    text: Tensor
    """[B, L, D] T5 states of the prompts, end token included"""
    text_mask: Tensor | None = None
    """[B, L] bool, True where a token counts; None when all do"""
    negative_text: Tensor | None = None
    """[B, L', D]; None: the transformer's null caption"""
    negative_text_mask: Tensor | None = None

    @classmethod
    def collate(cls, items: Sequence[OpenSoraCondition]) -> OpenSoraCondition:
        """One batch, in order; texts of different length are padded.

        Raises:
            ValueError: no items, images of different size, or negative prompts of some items only.
        """
        if not items:
            raise ValueError("items: expected at least one condition, got none")
        for name in TEXTS:
            texts = [(getattr(item, name), getattr(item, f"{name}_mask")) for item in items]
            if any(text is None for text, _ in texts):
                continue  # all None, or refused by the base class
            changes = [{name: text, f"{name}_mask": mask} for text, mask in padded_texts(texts)]
            items = [dataclasses.replace(item, **change) for item, change in zip(items, changes, strict=True)]
        return super().collate(items)

    def split(self) -> list[OpenSoraCondition]:
        """Conditions of batch size one, without padding."""
        return [_stripped(item) for item in super().split()]


def padded_texts(texts: Sequence[tuple[Tensor, Tensor | None]]) -> list[tuple[Tensor, Tensor | None]]:
    """Texts [B, L, D] and masks [B, L] of one length; masks stay None where nothing has to be padded."""
    if len({text.shape[1] for text, _ in texts}) == 1 and all(mask is None for _, mask in texts):
        return list(texts)
    length = max(text.shape[1] for text, _ in texts)
    padded = []
    for text, mask in texts:
        if mask is None:
            mask = torch.ones(text.shape[:2], dtype=torch.bool, device=text.device)
        missing = length - text.shape[1]
        padded.append((F.pad(text, (0, 0, 0, missing)), F.pad(mask, (0, missing), value=False)))
    return padded


def _stripped(item: OpenSoraCondition) -> OpenSoraCondition:
    changes = {}
    for name in TEXTS:
        mask = getattr(item, f"{name}_mask")
        if mask is not None:
            changes |= {name: getattr(item, name)[:, mask[0]], f"{name}_mask": None}
    return dataclasses.replace(item, **changes)
