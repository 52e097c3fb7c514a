"""Procedural clips: a photograph under a known motion, and the prompt that names it.

A motion is a path of the camera over a photograph (pan, zoom, rotation), a change of brightness, a piece cut out of another photograph
that drifts over a still one, or nothing. Its amounts are fixed up to a tenth, so that a prompt says what will be measured.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from examples.tiny_i2v.photos import pyramid

HEIGHT, WIDTH, FRAMES = 64, 96, 9
VARIATION = 0.1
RIM = 2.0
"""pixels of white around a cut-out, as of paper: among coins or leaves nobody could tell a round piece of picture without one"""


@dataclass(frozen=True)
class Motion:
    """What has happened by the last frame. Pixels of the clip, x to the right and y down; degrees clockwise as seen on the screen."""

    name: str
    prompts: tuple[str, ...]
    shift: tuple[float, float] = (0.0, 0.0)
    """of the picture's content; a camera that pans left moves it right"""
    zoom: float = 1.0
    angle: float = 0.0
    gain: float = 1.0
    drift: tuple[float, float] | None = None
    """of the cut-out"""


def _pan(to: str, shift: tuple[float, float]) -> Motion:
    return Motion(
        f"pan_{to}", (f"the camera pans {to}", f"the camera pans slowly to the {to}", f"a slow pan {to}"), shift
    )


def _drift(to: str, drift: tuple[float, float]) -> Motion:
    prompts = (f"a round cutout drifts {to}", f"the cutout drifts slowly {to}", f"a cutout moves {to} over the picture")
    return Motion(f"drift_{to}", prompts, drift=drift)


MOTIONS = {
    motion.name: motion
    for motion in (
        _pan("left", (16.0, 0.0)),
        _pan("right", (-16.0, 0.0)),
        _pan("up", (0.0, 12.0)),
        _pan("down", (0.0, -12.0)),
        Motion("zoom_in", ("the camera zooms in", "the camera slowly zooms in", "a slow zoom in"), zoom=1.3),
        Motion("zoom_out", ("the camera zooms out", "the camera slowly zooms out", "a slow zoom out"), zoom=1 / 1.3),
        Motion("rotate_clockwise", ("the picture rotates clockwise", "the picture turns slowly clockwise"), angle=15.0),
        Motion(
            "rotate_counterclockwise",
            ("the picture rotates counterclockwise", "the picture turns slowly counterclockwise"),
            angle=-15.0,
        ),
        _drift("left", (-24.0, 0.0)),
        _drift("right", (24.0, 0.0)),
        _drift("up", (0.0, -16.0)),
        _drift("down", (0.0, 16.0)),
        Motion("brighten", ("the light grows brighter", "the picture slowly brightens"), gain=1.6),
        Motion("darken", ("the light grows dimmer", "the picture slowly darkens"), gain=0.5),
        Motion("still", ("a still picture", "nothing moves", "the camera stands still")),
    )
}
OPENINGS = (
    "an old photograph of a harbour,", "my neighbour's house:", "footage of a busy market where", "someone waits while",
    "a close view of the garden,", "two friends talk and", "in the evening", "a portrait of a woman;", "macro photograph,",
)  # fmt: skip
"""put before some prompts in training: words a prompt may have that say nothing about the motion"""


def draw_prompt(motion: Motion, generator: torch.Generator) -> str:
    """One of the motion's phrases, a third of the time after words about something else."""
    phrase = motion.prompts[_integer(len(motion.prompts), generator)]
    return f"{OPENINGS[_integer(len(OPENINGS), generator)]} {phrase}" if _uniform(0, 1, generator) < 1 / 3 else phrase


@dataclass(frozen=True)
class CutOut:
    """Where the piece is in the first frame."""

    centre: tuple[float, float]
    """x, y in pixels of the clip"""
    radius: float


def scene(
    photo: Tensor,
    motion: Motion,
    generator: torch.Generator,
    *,
    piece_from: Tensor | None = None,
    whole: bool = False,
    frames: int = FRAMES,
) -> tuple[Tensor, CutOut | None]:
    """A clip of a random part of a photo.

    Args:
        photo: [3, h, w] in [0, 1]. piece_from: the photo a cut-out is taken from, for motions that have one.
        whole: show as much of the photo as the clip's shape allows instead of a random part. frames: only so many of the clip's.

    Returns:
        [frames, 3, HEIGHT, WIDTH] float32 in [0, 1], and the cut-out if there is one.
    """
    levels = pyramid(photo)
    height, width = photo.shape[-2:]
    most = min(height / HEIGHT, width / WIDTH)
    scale = most if whole else math.exp(_uniform(math.log(max(1.0, 0.3 * most)), math.log(most), generator))
    centre = []
    for size, wanted in ((width, WIDTH * scale), (height, HEIGHT * scale)):
        slack = max(0.0, size - wanted) / 2
        centre.append(size / 2 + (0.0 if whole else _uniform(-slack, slack, generator)))
    amount = 1 + _uniform(-VARIATION, VARIATION, generator)
    clip = torch.stack([_frame(levels, motion, centre, scale, amount * i / (FRAMES - 1)) for i in range(frames)])
    if motion.drift is None:
        return clip, None
    if piece_from is None:
        raise ValueError(f"piece_from: expected a photo for {motion.name}, got none")
    return _with_piece(clip, piece_from, motion.drift, amount, generator)


def _frame(levels: list[Tensor], motion: Motion, centre: list[float], scale: float, done: float) -> Tensor:
    """The picture after the part `done` of the motion: where content went is looked up backwards."""
    zoom, angle = motion.zoom**done, math.radians(motion.angle) * done
    x, y = _grid()
    x, y = x - motion.shift[0] * done, y - motion.shift[1] * done
    cos, sin = math.cos(angle) / zoom, math.sin(angle) / zoom
    x, y = cos * x + sin * y, -sin * x + cos * y
    level = min(len(levels) - 1, max(0, round(math.log2(scale / zoom) - 0.25)))
    image = levels[level]
    height, width = (size << level for size in image.shape[-2:])
    grid = torch.stack([(centre[0] + scale * x) / width, (centre[1] + scale * y) / height], dim=-1) * 2 - 1
    frame = F.grid_sample(image[None], grid[None], mode="bilinear", padding_mode="reflection", align_corners=False)[0]
    return (frame * motion.gain**done).clamp(0, 1)


def _with_piece(
    clip: Tensor, photo: Tensor, drift: tuple[float, float], amount: float, generator: torch.Generator
) -> tuple[Tensor, CutOut]:
    radius = _uniform(9.0, 13.0, generator)
    piece, _ = scene(photo, MOTIONS["still"], generator, frames=1)
    room = [size / 2 - radius - 2 for size in (WIDTH, HEIGHT)]
    start = []
    for free, path in zip(room, drift, strict=True):
        low, high = -free, free  # the whole path stays inside
        low, high = (low - min(0.0, path * amount), high - max(0.0, path * amount)) if path else (low, high)
        start.append(_uniform(min(low, high), max(low, high), generator))
    x, y = _grid()
    mixed = []
    for index, frame in enumerate(clip):
        done = amount * index / (FRAMES - 1)
        dx, dy = start[0] + drift[0] * done, start[1] + drift[1] * done
        distance = ((x - dx) ** 2 + (y - dy) ** 2).sqrt()
        cover, inner = (radius - distance + 0.5).clamp(0, 1), (radius - RIM - distance + 0.5).clamp(0, 1)
        # the piece's own middle travels with it
        grid = torch.stack([(x - dx) / (WIDTH / 2), (y - dy) / (HEIGHT / 2)], dim=-1)
        moved = F.grid_sample(piece, grid[None], mode="bilinear", padding_mode="border", align_corners=False)[0]
        mixed.append(frame * (1 - cover) + (moved * inner + 1 - inner) * cover)
    return torch.stack(mixed), CutOut((WIDTH / 2 + start[0], HEIGHT / 2 + start[1]), radius)


def _grid() -> tuple[Tensor, Tensor]:
    """x and y of pixel centres, from the middle of the clip; [HEIGHT, WIDTH] each."""
    y, x = torch.meshgrid(torch.arange(HEIGHT) + 0.5 - HEIGHT / 2, torch.arange(WIDTH) + 0.5 - WIDTH / 2, indexing="ij")
    return x, y


def recolour(clip: Tensor, generator: torch.Generator) -> Tensor:
    """Another photograph's colours, the same in every frame: channels permuted, gamma, contrast."""
    if _uniform(0, 1, generator) < 0.5:
        clip = clip[:, torch.randperm(3, generator=generator)]
    gamma, low, high = _uniform(0.7, 1.4, generator), _uniform(0, 0.15, generator), _uniform(0.85, 1, generator)
    return low + (high - low) * clip.clamp(0, 1) ** gamma


def _uniform(low: float, high: float, generator: torch.Generator) -> float:
    return low + (high - low) * float(torch.rand((), generator=generator))


def _integer(count: int, generator: torch.Generator) -> int:
    return int(torch.randint(count, (), generator=generator))
