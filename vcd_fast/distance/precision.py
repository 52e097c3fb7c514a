"""Products of float32 tensors that are float32 whatever PyTorch is allowed to round their factors to.

Ten bits of mantissa turn half a percent of the signs of phases, and the two sides of a comparison must be projected alike.
`torch.set_float32_matmul_precision` and its relatives belong to the whole process: switching them off for one product and on again
would reach into other threads, so where they are on the product is computed in float64.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F


def may_round(x: Tensor, operation: Literal["matmul", "conv"]) -> bool:
    """Whether PyTorch may turn float32 factors like x into TF32 or bfloat16; taken for granted where a compiler traces."""
    device = x.device.type
    if x.dtype != torch.float32 or device not in ("cpu", "cuda"):
        return False
    if torch.compiler.is_compiling():
        return True
    gpu = torch.backends.cudnn if operation == "conv" else torch.backends.cuda
    try:
        return getattr(torch.backends.mkldnn if device == "cpu" else gpu, operation).fp32_precision not in (
            "ieee",
            "none",
        )
    except AttributeError:  # before PyTorch 2.9
        if operation == "conv":
            return device == "cuda" and torch.backends.cudnn.allow_tf32
        return torch.get_float32_matmul_precision() != "highest"


def exact_matmul(a: Tensor, b: Tensor) -> Tensor:
    """a @ b."""
    if may_round(b, "matmul"):
        return (a.double() @ b.double()).to(b.dtype)
    return a @ b


def exact_conv2d(plane: Tensor, filters: Tensor) -> Tensor:
    """Valid convolution of plane [B, C, H, W] with filters [K, C, k, k] -> [B, K, H - k + 1, W - k + 1]."""
    if not may_round(plane, "conv"):
        return F.conv2d(plane, filters)
    # A GPU's convolutions round unless told not to, so this is how they are made there: not in float64, a shift at a time.
    size = filters.shape[-1]
    height, width = plane.shape[-2] - size + 1, plane.shape[-1] - size + 1
    total = None
    for top in range(size):
        for left in range(size):
            shifted = plane[..., top : top + height, left : left + width].flatten(2)
            product = exact_matmul(filters[..., top, left], shifted)
            total = product if total is None else total + product
    return total.unflatten(-1, (height, width))


def exact_conv_transpose2d(responses: Tensor, filters: Tensor) -> Tensor:
    """The adjoint of `exact_conv2d`: [B, K, h, w] -> [B, C, h + k - 1, w + k - 1]."""
    if may_round(responses, "conv"):
        return F.conv_transpose2d(responses.double(), filters.double()).to(responses.dtype)
    return F.conv_transpose2d(responses, filters)
