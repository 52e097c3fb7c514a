"""Which latent frames of a clip are given, in Open-Sora's own notation for it ("mask strategy").

A strategy is a list of placements joined by `;`, each `loop,reference,reference start,start,length,edit ratio` with the defaults
`0,0,0,0,1,0`, so that `0` puts the image at the first frame. Loops of generation that continue one another are not offered: a placement
with another loop than 0 places nothing, as in the original's first loop.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

ALIGN = 5
"""Starts are moved to multiples of this, the first latent frames of chunks: only those are like the latent of an image."""


class Placement(NamedTuple):
    """Latent frames of a reference that stand in the clip."""

    loop: int = 0
    reference: int = 0
    reference_start: int = 0
    start: int = 0
    """0-based latent frame of the clip; negative: from its end"""
    length: int = 1
    edit: float = 0.0
    """0: kept as it is; e < 1: noised and generated from time 1000 e on"""


def parse_strategy(text: str) -> list[Placement]:
    """ "0" -> the image at the first frame, "" -> nothing placed.

    Raises:
        ValueError: not numbers in that notation, or an edit ratio outside [0, 1].
    """
    placements = []
    for group in filter(None, text.split(";")):
        values = [value.strip() for value in group.split(",")]
        try:
            if len(values) > len(Placement._fields):
                raise ValueError
            numbers = [float(v) if i == len(Placement._fields) - 1 else int(v) for i, v in enumerate(values)]
        except ValueError:
            raise ValueError(
                f"mask_strategy: expected groups of {', '.join(Placement._fields)} joined by ';' (`0` for the image at the first "
                f"frame), got {group!r}"
            ) from None
        placement = Placement(*numbers)
        if not 0 <= placement.edit <= 1 or placement.length < 1:
            raise ValueError(
                f"mask_strategy: expected a length of 1 or more and an edit ratio in [0, 1], got {group!r}"
            )
        placements.append(placement)
    return placements


def place(
    latents: Tensor, references: Sequence[Tensor], placements: Sequence[Placement], align: int | None = ALIGN
) -> tuple[Tensor, Tensor]:
    """Put references into a clip.

    Args:
        latents: [B, c, f, h, w], not changed.
        references: each [B, c, t, h, w].
        align: multiple that starts are moved to; None: as they are.

    Returns:
        the latents with the references in them, and the edit ratios [B, f] float32 (1 where nothing was placed).

    Raises:
        ValueError: a placement names a reference that is not there, or frames outside of the clip or reference.
    """
    latents = latents.clone()
    frames = latents.shape[2]
    edit = torch.ones(latents.shape[0], frames, dtype=torch.float32, device=latents.device)
    for placement in placements:
        if placement.loop != 0:
            continue
        if not 0 <= placement.reference < len(references):
            raise ValueError(
                f"mask_strategy: expected references 0..{len(references) - 1}, got {placement.reference} ({placement})"
            )
        reference = references[placement.reference]
        source = _start(placement.reference_start, reference.shape[2], align)
        target = _start(placement.start, frames, align)
        length = min(placement.length, frames - target, reference.shape[2] - source)
        latents[:, :, target : target + length] = reference[:, :, source : source + length]
        edit[:, target : target + length] = placement.edit
    return latents, edit


def _start(value: int, frames: int, align: int | None) -> int:
    """A start counted from 0 and, with `align`, moved to the nearest multiple that is not behind the last whole one."""
    start = frames + value if value < 0 else value
    if not 0 <= start < frames:
        raise ValueError(f"mask_strategy: expected a start in -{frames}..{frames - 1}, got {value}")
    if align is None:
        return start
    multiple, rest = divmod(start, align)
    if rest > align / 2 and multiple < frames // align - 1:
        multiple += 1
    return multiple * align
