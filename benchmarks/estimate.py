"""What a case will need, before it is begun, and the least it can move."""

from __future__ import annotations

from benchmarks.cases import CHANNELS, Case, map_size
from benchmarks.inputs import config_of

SHARE = 0.9
"""of the available memory that a case may be expected to need"""
VGG_BYTES_PER_PIXEL = 2600
"""activations that autograd keeps of VGG19 to its fifth block, per pixel of the image; a little more than measured"""


def _maps(case: Case) -> list[tuple[int, int, int]]:
    """Channels, height and width of every map that is compared."""
    layers = (case.layer,) if case.kind == "layer" else config_of(case).layers
    return [(CHANNELS[f"{name[:5]}_1"], *map_size(name, case.size)) for name in layers]


def plain_bytes(case: Case) -> int:
    """Peak of a plain formula: what autograd keeps of all frames, and what the largest layer needs besides while it is sorted.

    Kept per frame and coefficient: the spectrum and the gradients' inputs, 8 + 8 bytes, amplitude and phase where filters are larger
    than a point. Kept per projected value: int64 index and difference, 12 bytes. While sorting: projected and sorted values and indices.
    """
    kept, largest = 0, 0
    with_gradient = case.mode not in ("no_grad", "prepare")
    for channels, height, width in _maps(case):
        coefficients, values = channels * height * width, case.num_projections * height * width
        transient = case.frames * (32 * coefficients + 24 * values) + 16 * values
        largest = max(largest, transient)
        kept += case.frames * (24 * coefficients + 24 * values) if with_gradient else 0
    if case.kind == "video":
        pixels = case.size[0] * case.size[1] * case.frames
        kept += VGG_BYTES_PER_PIXEL * pixels if with_gradient else VGG_BYTES_PER_PIXEL // 4 * pixels
    return kept + largest


def needed_bytes(provider: str, case: Case) -> int:
    """An upper bound of the peak, good to a factor of two; ours and VGG19 alone take frame after frame."""
    if provider in ("eager", "compile", "published"):
        return plain_bytes(case)
    frames = min(case.frames, 1)
    one = Case(case.kind, case.mode, case.size, case.num_projections, case.reading, case.layer, frames, case.dtype)
    video = 4 * 3 * case.size[0] * case.size[1] * (case.frames + 1) * 4 if case.kind == "video" else 0
    return plain_bytes(one) + video


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
