"""What a reward is given and what it gives back."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class RewardInput(NamedTuple):
    """The frames of a batch of clips, and where they stand in them."""

    video: Tensor
    """[B, T, 3, H, W] in [0, 1]: the T frames whose positions are `frame_index`; carries the graph"""
    frame_index: Tensor
    """[T] int64, 0-based positions in the clip, ascending; frame 0 is the conditioning image"""
    num_frames: int
    """frames of the whole clip"""
    image: Tensor
    """[B, 3, H, W] in [0, 1], the conditioning image"""
    prompt: list[str]
    fps: float
    step: int
    """optimizer step, from 0"""
    generator: torch.Generator
    """for whatever a reward draws; a function of run seed, step and sample"""


class RewardOutput(NamedTuple):
    reward: Tensor
    """[B] float32, larger is better; carries the graph"""
    metrics: dict[str, float]
    """what is logged beside it"""


class Reward(Protocol):
    def frames_wanted(self, num_frames: int, generator: torch.Generator) -> Tensor:
        """[T] int64, ascending positions of the frames to decode in this step."""
        ...

    def to(self, device: torch.device | str) -> Reward: ...

    def __call__(self, inputs: RewardInput) -> RewardOutput: ...
