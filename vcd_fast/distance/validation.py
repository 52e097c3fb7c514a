"""What is asked of a video, an image and the positions of frames, before anything is computed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

RANGE_SLACK = 1e-3
"""how far outside [0, 1] a value may lie: rounding of decoders and resizing, not another range"""


def _check_images(
    images: Tensor, argument: str, layout: str, ndim: int, minimum: int, check_range: bool | None
) -> None:
    if not isinstance(images, Tensor):
        raise TypeError(f"{argument}: expected a tensor {layout}, got {type(images).__name__}")
    if not images.is_floating_point():
        hint = "; divide by 255" if images.dtype == torch.uint8 else ""
        raise TypeError(f"{argument}: expected floating-point numbers in [0, 1], got {images.dtype}{hint}")
    shape = list(images.shape)
    if images.ndim != ndim:
        raise ValueError(f"{argument}: expected shape {layout}, got {shape}")
    if images.shape[-3] != 3:
        hint = "; channels come third from last" if 3 in shape else ""
        raise ValueError(f"{argument}: expected 3 channels in {layout}, got {shape}{hint}")
    if 0 in shape:
        raise ValueError(f"{argument}: expected at least one of everything in {layout}, got {shape}")
    if min(shape[-2:]) < minimum:
        raise ValueError(
            f"{argument}: expected images of at least {minimum}×{minimum} pixels, got {shape[-2]}×{shape[-1]}"
        )
    if check_range or (check_range is None and images.device.type == "cpu"):
        low, high = (float(value) for value in images.detach().aminmax())
        if low < -RANGE_SLACK or high > 1 + RANGE_SLACK:
            hint = "divide by 255" if high > 2 else "clamp it, or map [-1, 1] to [0, 1] by (x + 1) / 2"
            raise ValueError(f"{argument}: expected values in [0, 1], got {low:.4g} to {high:.4g}; {hint}")


def check_video(video: Tensor, minimum: int, check_range: bool | None) -> None:
    """[B, T, 3, H, W] floating point in [0, 1], or TypeError or ValueError. NaN passes: it ends in a NaN distance."""
    _check_images(video, "video", "[batch, frames, 3, height, width]", 5, minimum, check_range)


def check_condition(condition: Tensor, minimum: int, check_range: bool | None) -> None:
    """[B, 3, H, W] floating point in [0, 1], or TypeError or ValueError."""
    _check_images(condition, "condition", "[batch, 3, height, width]", 4, minimum, check_range)


def frame_positions(
    num_given: int, frame_index: Sequence[int] | Tensor | None, num_frames: int | None
) -> tuple[tuple[int, ...], int]:
    """0-based positions of the frames given, and the number of frames of the clip.

    Raises:
        TypeError, ValueError: `frame_index` and `num_frames` do not describe `num_given` frames of a clip of at least two.
    """
    if num_frames is not None and (isinstance(num_frames, bool) or not isinstance(num_frames, int)):
        raise TypeError(f"num_frames: expected a whole number, got {num_frames!r}")
    if frame_index is None:
        if num_frames not in (None, num_given):
            raise ValueError(
                f"num_frames: expected the number of frames of the video, {num_given}, got {num_frames}; "
                "name the positions of the frames by frame_index"
            )
        if num_given < 2:
            raise ValueError(
                "video: expected at least two frames, the first being the condition, got 1; "
                "for single frames of a longer clip name frame_index, num_frames and condition"
            )
        return tuple(range(num_given)), num_given
    if num_frames is None:
        raise ValueError("num_frames: expected the length of the clip, because frame_index is given")
    values = frame_index.tolist() if isinstance(frame_index, Tensor) else list(frame_index)
    if not all(isinstance(value, int) and not isinstance(value, bool) for value in values):
        raise TypeError(f"frame_index: expected whole numbers [T], got {values!r:.80}")
    if len(values) != num_given:
        raise ValueError(f"frame_index: expected a position for each of the {num_given} frames, got {len(values)}")
    if outside := [value for value in values if not 0 <= value < num_frames]:
        raise ValueError(f"frame_index: expected positions from 0 to {num_frames - 1}, got {outside}")
    return tuple(values), num_frames
