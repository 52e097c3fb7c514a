"""What moved in a clip: registration of every frame with the first, and the path of a cut-out.

Registration finds the shift, zoom and rotation that warp the first frame onto another by Gauss-Newton on intensities of mean 0 and
deviation 1 (Lucas and Kanade 1981), blurred less and less, each frame starting where the one before ended. A cut-out is found by
normalised cross-correlation with the piece of the first frame it was.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from examples.tiny_i2v.clips import CutOut, Motion

BLURS = (3.0, 1.5, 0.8)
ITERATIONS = 12
ENOUGH = 0.5
"""of the motion asked for, to count as it"""
STILL = 0.3
"""of any motion, up to which nothing has moved"""
UNITS = {"x": 16.0, "y": 12.0, "zoom": math.log(1.3), "angle": 15.0, "bright": math.log(1.6), "dark": math.log(2.0)}
"""how much of each is one motion's worth: what `clips.MOTIONS` asks for"""


@dataclass(frozen=True)
class Pose:
    """Where the first frame's content is in another: pixels to the right and down, factor, degrees clockwise."""

    x: float = 0.0
    y: float = 0.0
    zoom: float = 1.0
    angle: float = 0.0


@dataclass(frozen=True)
class Measured:
    poses: list[Pose]
    """of every frame, the first one at rest"""
    gain: float
    """mean of the last frame over mean of the first"""
    drift: tuple[float, float] | None
    """of the cut-out from the first to the last frame, in pixels"""


def measure(clip: Tensor, cutout: CutOut | None = None) -> Measured:
    """clip [T, 3, H, W] in [0, 1]; cutout: where it is in the first frame, if there is one."""
    grey = clip.float().mean(1)
    poses = [torch.zeros(4)]
    for frame in grey[1:]:
        poses.append(_register(grey[0], frame, poses[-1]))
    gain = float(grey[-1].mean() / grey[0].mean().clamp_min(1e-3))
    return Measured([_pose(p) for p in poses], gain, None if cutout is None else _track(clip, cutout))


def amount(measured: Measured, motion: Motion) -> float:
    """The part of the motion asked for that was measured, along it: 1 is all of it, 0 none. For stillness, the largest movement there is."""
    last = measured.poses[-1]
    if motion.drift is not None:
        length = math.hypot(*motion.drift)
        return sum(a * b for a, b in zip(measured.drift, motion.drift, strict=True)) / length**2
    if motion.shift != (0.0, 0.0):
        length = math.hypot(*motion.shift)
        return (last.x * motion.shift[0] + last.y * motion.shift[1]) / length**2
    if motion.zoom != 1:
        return math.log(last.zoom) / math.log(motion.zoom)
    if motion.angle:
        return last.angle / motion.angle
    if motion.gain != 1:
        return math.log(max(measured.gain, 1e-3)) / math.log(motion.gain)
    return max(_amounts(measured).values())


def _amounts(measured: Measured) -> dict[str, float]:
    """Every kind of movement of the whole picture, in units of what a motion of that kind asks for; no sign."""
    last, light = measured.poses[-1], math.log(max(measured.gain, 1e-3))
    return {
        "x": abs(last.x) / UNITS["x"],
        "y": abs(last.y) / UNITS["y"],
        "zoom": abs(math.log(last.zoom)) / UNITS["zoom"],
        "angle": abs(last.angle) / UNITS["angle"],
        "light": abs(light) / (UNITS["bright"] if light > 0 else UNITS["dark"]),
    }


def kind(motion: Motion) -> str | None:
    """The key of `_amounts` a motion is about; None for cut-outs and stillness."""
    if motion.drift is not None:
        return None
    if motion.shift[0]:
        return "x"
    if motion.shift[1]:
        return "y"
    return "zoom" if motion.zoom != 1 else "angle" if motion.angle else "light" if motion.gain != 1 else None


def shows(measured: Measured, motion: Motion) -> bool:
    """Whether the motion measured is the one named: at least half of what was asked, and of the whole picture's movements the largest."""
    found = amount(measured, motion)
    if motion.drift is not None:
        across = (
            abs(measured.drift[0] * motion.drift[1] - measured.drift[1] * motion.drift[0])
            / math.hypot(*motion.drift) ** 2
        )
        return found >= ENOUGH and across < found
    amounts = _amounts(measured)
    if kind(motion) is None:
        return found <= STILL
    return found >= ENOUGH and max(amounts, key=amounts.get) == kind(motion)


def warp(image: Tensor, pose: Pose) -> tuple[Tensor, Tensor]:
    """The first frame [C, H, W] as it looks after `pose`, and [H, W] where that is known: 1 inside the picture, 0 outside."""
    return _warp(image, torch.tensor([pose.x, pose.y, math.log(pose.zoom), math.radians(pose.angle)]))


def _warp(image: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
    height, width = image.shape[-2:]
    y, x = torch.meshgrid(torch.arange(height) + 0.5 - height / 2, torch.arange(width) + 0.5 - width / 2, indexing="ij")
    x, y = x - p[0], y - p[1]
    cos, sin = torch.cos(p[3]) * torch.exp(-p[2]), torch.sin(p[3]) * torch.exp(-p[2])
    grid = torch.stack([(cos * x + sin * y) / (width / 2), (-sin * x + cos * y) / (height / 2)], dim=-1)
    inside = ((grid.abs() <= 1 - 2 / min(height, width)).all(-1)).float()
    return F.grid_sample(image[None], grid[None], mode="bilinear", padding_mode="border", align_corners=False)[
        0
    ], inside


STEPS = torch.tensor([0.1, 0.1, 0.003, 0.003])
"""of the finite differences: a tenth of a pixel, or what moves the corners as far"""


def _register(first: Tensor, frame: Tensor, start: Tensor) -> Tensor:
    """[x, y, log zoom, radians] that warps `first` onto `frame`, both [H, W]."""
    p = start.clone()
    for blur in BLURS:
        source, target = _blurred(first, blur), _blurred(frame, blur)
        for _ in range(ITERATIONS):
            warped, inside = _warp(source[None], p)
            if inside.mean() < 0.2:
                return start
            weight = inside.flatten()
            residual = _standard(target.flatten(), weight) - _standard(warped.flatten(), weight)
            columns = []
            for i in range(4):
                step = torch.zeros(4)
                step[i] = STEPS[i]
                moved, _ = _warp(source[None], p + step)
                columns.append((_standard(moved.flatten(), weight) - _standard(warped.flatten(), weight)) / STEPS[i])
            jacobian = torch.stack(columns, 1)
            # outliers (new content, cut-outs) weigh less: Huber at one deviation of the residual
            scale = (weight * residual.abs()).sum() / weight.sum() * 1.5 + 1e-6
            robust = weight * (scale / residual.abs().clamp_min(1e-6)).clamp(max=1)
            normal = jacobian.T @ (robust[:, None] * jacobian)
            normal = normal + 1e-4 * torch.diag(normal.diagonal() + 1e-6)
            change = torch.linalg.solve(normal, jacobian.T @ (robust * residual))
            change = change.clamp(-30 * STEPS, 30 * STEPS)
            p = p + change
            if bool((change.abs() < 0.1 * STEPS).all()):
                break
    return p


def _standard(values: Tensor, weight: Tensor) -> Tensor:
    mean = (weight * values).sum() / weight.sum()
    deviation = ((weight * (values - mean).square()).sum() / weight.sum()).sqrt()
    return weight * (values - mean) / (deviation + 1e-3)


def _blurred(image: Tensor, sigma: float) -> Tensor:
    reach = math.ceil(2.5 * sigma)
    kernel = torch.exp(-(torch.arange(-reach, reach + 1) ** 2) / (2 * sigma**2))
    kernel = kernel / kernel.sum()
    padded = F.pad(image[None, None], (reach,) * 4, mode="reflect")
    return F.conv2d(F.conv2d(padded, kernel.view(1, 1, 1, -1)), kernel.view(1, 1, -1, 1))[0, 0]


def _pose(p: Tensor) -> Pose:
    return Pose(float(p[0]), float(p[1]), math.exp(float(p[2])), math.degrees(float(p[3])))


def _track(clip: Tensor, cutout: CutOut) -> tuple[float, float]:
    """Displacement of the cut-out by the last frame: the best match of its disc, anywhere it fits."""
    reach = math.floor(cutout.radius)
    x, y = round(cutout.centre[0] - 0.5), round(cutout.centre[1] - 0.5)
    piece = clip[0, :, y - reach : y + reach + 1, x - reach : x + reach + 1]
    offsets = torch.arange(-reach, reach + 1)
    disc = ((offsets[:, None] ** 2 + offsets[None] ** 2) <= (cutout.radius - 1) ** 2).float().expand(3, -1, -1)
    count = disc.sum()
    template = disc * (piece - (disc * piece).sum() / count)
    frame = clip[-1][None]
    cross = F.conv2d(frame, template[None])[0, 0]
    total, squares = F.conv2d(frame, disc[None])[0, 0], F.conv2d(frame**2, disc[None])[0, 0]
    spread = (squares - total**2 / count).clamp_min(1e-6).sqrt()
    best = int((cross / (spread * template.norm() + 1e-6)).argmax())
    row, column = divmod(best, cross.shape[1])
    return float(column + reach - x), float(row + reach - y)
