"""A convolution that keeps no input: what a network with frozen weights needs for its backward is the weight alone.

PyTorch's convolution keeps its input whenever the input or the weight requires a gradient, although the gradient with
respect to the input does not depend on it. In a frozen network (VGG19, a VAE's decoder) those inputs are most of the memory of
the graph. Values and gradients are PyTorch's own, bit for bit: the same kernels are called.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_ATTRIBUTE = "_conv_forward"


class _FrozenConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, options: tuple) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.options = options
        ctx.like = (x.shape, x.stride(), x.dtype, x.device)
        stride, padding, dilation, groups = options
        return torch.convolution(x, weight, bias, stride, padding, dilation, False, [0] * len(stride), groups)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        (weight,) = ctx.saved_tensors
        stride, padding, dilation, groups = ctx.options
        shape, strides, dtype, device = ctx.like
        # For the gradient of the input its values are not read, but its strides choose the kernel: with others the last bits differ.
        stand_in = torch.empty_strided(shape, strides, dtype=dtype, device=device)
        gradient_x, _, _ = torch.ops.aten.convolution_backward(
            gradient,
            stand_in,
            weight,
            None,
            stride,
            padding,
            dilation,
            False,
            [0] * len(stride),
            groups,
            (True, False, False),
        )
        return gradient_x, None, None, None


def frozen_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Sequence[int] = (1,),
    padding: Sequence[int] = (0,),
    dilation: Sequence[int] = (1,),
    groups: int = 1,
) -> Tensor:
    """The convolution of `torch.nn.functional.conv{1,2,3}d` for weights that want no gradient; keeps `weight` only.

    x [B, C, *size], weight [C', C/groups, *kernel], bias [C'] or None -> [B, C', *size']; first derivatives only. A single number in
    `stride`, `padding` or `dilation` stands for every dimension. Under autocast it computes in the autocast dtype, as PyTorch's does.

    Raises:
        ValueError: weight or bias requires a gradient, which this function does not compute.
    """
    if weight.requires_grad or (bias is not None and bias.requires_grad):
        raise ValueError("weight: expected frozen weights (requires_grad=False); use torch's convolution to train them")
    dimensions = weight.ndim - 2
    options = tuple(list(o) * dimensions if len(o) == 1 else list(o) for o in (stride, padding, dilation))
    # The meta device knows no autocast, and memory is counted on it.
    if x.device.type == "meta" or not torch.is_autocast_enabled(x.device.type) or x.dtype == torch.float64:
        return _FrozenConv.apply(x, weight, bias, (*options, groups))
    dtype = torch.get_autocast_dtype(x.device.type)
    x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    with torch.autocast(x.device.type, enabled=False):
        return _FrozenConv.apply(x, weight, bias, (*options, groups))


def _frozen_forward(self: nn.Module, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    trained = weight.requires_grad or (bias is not None and bias.requires_grad)
    if trained or self.padding_mode != "zeros" or isinstance(self.padding, str) or x.ndim != weight.ndim:
        return type(self)._conv_forward(self, x, weight, bias)
    return frozen_conv(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)


def freeze_convolutions(module: nn.Module) -> int:
    """Make every convolution of `module` whose weights are frozen keep no input; returns how many there are.

    Only these module objects change, by an attribute of their own; parameters, state dict and class do not. A convolution whose weights
    are trained later is computed by PyTorch as before. Recomputation under checkpointing is covered, which a context manager that
    has ended is not.
    """
    count = 0
    for child in module.modules():
        if isinstance(child, _CONVOLUTIONS):
            setattr(child, _ATTRIBUTE, MethodType(_frozen_forward, child))
            count += not any(p.requires_grad for p in child.parameters(recurse=False))
    return count


def thaw_convolutions(module: nn.Module) -> None:
    """Undo `freeze_convolutions`."""
    for child in module.modules():
        child.__dict__.pop(_ATTRIBUTE, None)


@contextlib.contextmanager
def frozen_convolutions(module: nn.Module) -> Iterator[None]:
    """`freeze_convolutions` for the forwards inside; backwards may follow outside (but not recomputation by checkpoints)."""
    frozen_before = {id(child) for child in module.modules() if _ATTRIBUTE in child.__dict__}
    freeze_convolutions(module)
    try:
        yield
    finally:
        for child in module.modules():
            if id(child) not in frozen_before:
                child.__dict__.pop(_ATTRIBUTE, None)
