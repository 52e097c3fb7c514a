"""The distance as one writes it down in PyTorch: what people run today, and what ours are measured against.

    W = mean over filters and positions of | sort(f * A_x) - sort(f * A_y) |,  A = |FFT2|, and the same of the angle

with f unit filters [C, k, k], * the valid correlation. k = 1 is the sliced distance over channels (VCD's reading); k = 5 with 256
filters on FDL's layers is FDL (Ni et al., "Misalignment-Robust Frequency Distribution Loss for Image Transformation", CVPR 2024). Both
sides are transformed, projected and sorted in full whenever it is called, by autograd's own operators, all frames at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

Features = Callable[[Tensor], dict[str, Tensor]]


def _responses(part: Tensor, filters: Tensor) -> Tensor:
    """[B, C, H, W], [K, C, k, k] -> [B, K, positions]."""
    if filters.shape[-1] == 1:
        return filters.flatten(1) @ part.flatten(2)
    return F.conv2d(part, filters).flatten(2)


def sliced_wasserstein(x: Tensor, y: Tensor, filters: Tensor) -> Tensor:
    """Amplitude and phase distance together, [B]; x [B, C, H, W], y [B or 1, C, H, W], filters [K, C, k, k]."""
    total = x.new_zeros(x.shape[0])
    spectra = torch.fft.fft2(x), torch.fft.fft2(y)
    for part in (torch.abs, torch.angle):
        ordered = [_responses(part(z), filters).sort(-1).values for z in spectra]
        total = total + (ordered[0] - ordered[1]).abs().mean((1, 2))
    return total


def video_loss(video: Tensor, extractor: Features, filters: Mapping[str, Tensor], weights: Sequence[float]) -> Tensor:
    """Mean over frames of the weighted sum over layers.

    Args:
        video: [1, N, 3, H, W], the condition first. filters: by layer. weights: one for each of the N - 1 other frames.
    """
    with torch.no_grad():
        fixed = extractor(video[0, :1])
    found = extractor(video[0, 1:])
    per_frame = sum(sliced_wasserstein(found[name], fixed[name], filters[name]) for name in filters)
    return (per_frame * per_frame.new_tensor(weights)).mean()
