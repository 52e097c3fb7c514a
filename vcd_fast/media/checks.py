"""What every function on pictures and videos checks of its tensors."""

from __future__ import annotations

import torch
from torch import Tensor


def require(tensor: Tensor, name: str, layout: str, in_range: bool = True) -> None:
    """Raise unless `tensor` is floating point, of the layout ("3HW", "T3HW" or "...3HW") and, if asked, in [0, 1]."""
    shape = {"3HW": "[3, H, W]", "T3HW": "[T, 3, H, W]", "...3HW": "[..., 3, H, W]"}[layout]
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a tensor {shape}, got {type(tensor).__name__}")
    if not tensor.is_floating_point():
        raise TypeError(f"{name}: expected floating point in [0, 1], got {tensor.dtype}; divide 8-bit values by 255")
    dims = tensor.dim()
    if (dims < 3 if layout.startswith("...") else dims != len(layout)) or tensor.shape[-3] != 3 or not tensor.numel():
        raise ValueError(f"{name}: expected the shape {shape}, nothing empty, got {list(tensor.shape)}")
    if in_range:
        low, high = (value.item() for value in torch.aminmax(tensor.detach().float()))
        # the slack is half a step of 8 bits: what rounding to 8 bits forgives. Negated, so that NaN fails too.
        if not (low >= -0.5 / 255 and high <= 1 + 0.5 / 255):
            raise ValueError(f"{name}: expected values in [0, 1], got {low:.4g} to {high:.4g}")


def size_of(tensor: Tensor) -> str:
    """Height and width, for messages."""
    return f"{tensor.shape[-2]} x {tensor.shape[-1]}"


def to_uint8(tensor: Tensor) -> Tensor:
    """[0, 1] -> 0..255, rounded to nearest, on the CPU."""
    return tensor.detach().cpu().float().clamp(0, 1).mul(255).round().to(torch.uint8)


def to_float(pixels: Tensor) -> Tensor:
    """0..255 -> [0, 1] float32, contiguous."""
    return pixels.contiguous().float().div_(255)
