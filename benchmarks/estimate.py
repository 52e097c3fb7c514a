"""What a case will need, before it is begun, and the least it can move."""

from __future__ import annotations

import dataclasses

from benchmarks.cases import CHANNELS, Case, map_size
from benchmarks.inputs import config_of

SHARE = 0.9
"""of the available memory that a case may be expected to need"""
MARGIN, CONSTANT = 1.15, 200_000_000
"""what a peak is taken to be above what is counted; with them the estimate was 1.3 to 1.8 times what was measured"""
VGG_BYTES_PER_PIXEL = 1200
"""outputs of ReLUs and indices of poolings that autograd keeps, per pixel of the image"""


def _maps(case: Case) -> list[tuple[int, int, int]]:
    """Channels, height and width of every map that is compared."""
    layers = (case.layer,) if case.kind == "layer" else config_of(case).layers
    return [(CHANNELS[f"{name[:5]}_1"], *map_size(name, case.size)) for name in layers]


def plain_bytes(case: Case) -> int:
    """Peak of a plain formula over all frames at once.

    Autograd keeps int64 index and difference, 12 bytes, for both parts of every projected value, and spectrum and amplitude, 12 bytes,
    for every coefficient. The largest layer needs about 24 bytes a value for the condition's lists while they are sorted, and 48 bytes a
    coefficient in the backward of its FFT, when half of what was kept of the values is gone.
    """
    maps = _maps(case)
    coefficients = [c * h * w for c, h, w in maps]
    values = [case.num_projections * h * w for _, h, w in maps]
    pixels = case.size[0] * case.size[1] if case.kind == "video" else 0
    if case.mode in ("no_grad", "prepare"):
        per_frame = 16 * max(values) + 24 * max(coefficients) + VGG_BYTES_PER_PIXEL * pixels
    else:
        kept = 12 * sum(coefficients) + VGG_BYTES_PER_PIXEL * pixels
        per_frame = kept + max(24 * sum(values), 12 * sum(values) + 48 * max(coefficients))
    once = 24 * max(values) + 32 * max(coefficients)
    return round(MARGIN * (case.frames * per_frame + once)) + CONSTANT


def needed_bytes(provider: str, case: Case) -> int:
    """Upper bound of the peak; ours and VGG19 alone take frame after frame and keep pixels and their gradients of all."""
    if provider in ("eager", "compile", "published"):
        return plain_bytes(case)
    pixels = 3 * case.size[0] * case.size[1] * (case.frames + 1) if case.kind == "video" else 0
    return plain_bytes(dataclasses.replace(case, frames=1)) + 4 * 4 * pixels


def floor_bytes(case: Case) -> int | None:
    """What forward and backward of the distance have to move at least, features to gradient, with the condition's side prepared.

    Half of the spectrum read twice and its gradient written (8 bytes each), projected values written and read, the target's read (4
    bytes each), signs written and read (1 byte). The passes of a sort come on top. None for other modes and for patches.
    """
    if case.mode != "both" or case.reading != "vcd" or case.kind != "layer":
        return None
    channels, height, width = _maps(case)[0]
    half = height * width // 2
    return half * (channels * 24 + 2 * case.num_projections * (8 + 4 + 2)) * case.frames


def expected_seconds(provider: str, case: Case) -> float:
    """Seconds of a round on two CPU cores, good to a factor of two; decides how often a case is repeated, nothing else."""
    maps = _maps(case)
    values = 2 * case.num_projections * case.frames * sum(height * width for _, height, width in maps)
    seconds = 0.0
    if case.mode == "backward":
        values //= 2
    if provider in ("eager", "compile", "published"):
        seconds += 2 * values / 15e6
    elif provider != "vgg19":
        seconds += values / (20e6 if provider == "reference" else 100e6)
    if case.reading == "fdl":
        operations = sum(2 * case.num_projections * 25 * c * h * w for c, h, w in maps)
        seconds += 4 * operations * case.frames / 200e9
    if case.kind == "video":
        per_pixel = 72e9 / (272 * 368) * (1 if case.mode == "no_grad" else 3)
        seconds += per_pixel * case.size[0] * case.size[1] * case.frames / 150e9
    return seconds
