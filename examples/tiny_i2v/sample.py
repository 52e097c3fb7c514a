"""Scenes nobody was trained on, and what a model makes of their first frames."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from examples.tiny_i2v.build import MODEL
from examples.tiny_i2v.clips import FRAMES, HEIGHT, MOTIONS, WIDTH, CutOut, Motion, scene
from examples.tiny_i2v.photos import HELD_OUT, read_photo
from vcd_fast.models import wan
from vcd_fast.models.base import Condition, I2VModel

SAMPLING_STEPS = 12
GUIDANCE = 5.0
"""Wan's own; less of it, less of the motion asked for, and less contrast than the picture's in place of more"""
CONTRAST = 0.1
"""standard deviation a picture has at least: on an empty wall no motion can be seen"""


class Scene(NamedTuple):
    photo: str
    motion: Motion
    prompt: str
    true: Tensor
    """[FRAMES, 3, H, W]: the clip as the camera would have taken it; its first frame is the picture"""
    cutout: CutOut | None


def held_out_scenes(
    count: int, seed: int = 0, motions: Sequence[str] = tuple(MOTIONS), photos: Sequence[str] = HELD_OUT
) -> list[Scene]:
    """Every photograph with every motion in turn, each time another part of it."""
    found = []
    for index in range(count):
        name, motion = photos[index % len(photos)], MOTIONS[motions[index % len(motions)]]
        generator = torch.Generator().manual_seed((seed << 32) + index)
        piece = read_photo(photos[(index + 1) % len(photos)])
        clip = torch.zeros(1, 2)
        while clip[0].std() < CONTRAST:
            clip, cutout = scene(read_photo(name), motion, generator, piece_from=piece)
        found.append(Scene(name, motion, motion.prompts[0], clip, cutout))
    return found


def settings(model: Path = MODEL, guidance_scale: float = GUIDANCE) -> wan.ModelSettings:
    return wan.ModelSettings(
        weights=str(model),
        height=HEIGHT,
        width=WIDTH,
        num_frames=FRAMES,
        fps=8,
        dtype="float32",
        guidance_scale=guidance_scale,
    )


def encode(chosen: wan.ModelSettings, scenes: Sequence[Scene]) -> list[Condition]:
    images = torch.stack([scene.true[0] for scene in scenes])
    prompts = [scene.prompt for scene in scenes]
    return wan.load_encoder(chosen).encode(images, prompts, [""] * len(scenes), HEIGHT, WIDTH, FRAMES).split()


def animate(
    model: I2VModel,
    conditions: Sequence[Condition],
    seeds: Sequence[int],
    *,
    batch_size: int = 20,
    sampling_steps: int = SAMPLING_STEPS,
    report: Callable[[int], None] = lambda done: None,
) -> Tensor:
    """[B, FRAMES, 3, H, W] float32 in [0, 1]: a video of every condition, with noise of its own seed."""
    from vcd_fast.rollout.generate import generate

    videos = []
    for start in range(0, len(seeds), batch_size):
        part = conditions[start : start + batch_size]
        noise = [torch.Generator().manual_seed(seed) for seed in seeds[start : start + batch_size]]
        videos.append(generate(model, type(part[0]).collate(part), noise, sampling_steps))
        report(start + len(part))
    return torch.cat(videos)
