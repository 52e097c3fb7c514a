"""Frozen weights in 8 or 4 bits, through bitsandbytes: the linear layers of a transformer's blocks, the LoRA beside them in float32.

What is not a linear layer of a block (embeddings, norms, modulation, head) stays as it is. `nf4` (arXiv 2305.14314) is exact in what it promises:
values and gradients are those of the model with the rounded weights. `int8` (LLM.int8(), arXiv 2208.07339) also rounds activations in the
forward, which the gradient passes over.
"""

from __future__ import annotations

from collections.abc import Iterable
from types import ModuleType
from typing import Literal

import torch
from torch import Tensor, nn

Quantization = Literal["none", "int8", "nf4"]


def quantize_linears(
    blocks: Iterable[nn.Module], kind: Quantization, dtype: torch.dtype, device: torch.device | str
) -> int:
    """Replace the linear layers of `blocks` by quantized ones on `device`, one after the other; returns how many.

    Args:
        kind: `none` changes nothing.
        dtype: what layers compute in.

    Raises:
        ImportError: bitsandbytes is not installed, or cannot compute on `device`.
    """
    if kind == "none":
        return 0
    bitsandbytes, count = _bitsandbytes(kind), 0
    for block in blocks:
        for parent in list(block.modules()):
            for name, child in list(parent.named_children()):
                if type(child) is nn.Linear:
                    setattr(parent, name, _quantized(bitsandbytes, child, kind, dtype, device))
                    count += 1
    return count


def _bitsandbytes(kind: Quantization) -> ModuleType:
    try:
        import bitsandbytes
    except ImportError as error:
        raise ImportError(
            f"model.quantization: {kind} needs bitsandbytes ({error}). Install it with pip install bitsandbytes, or choose none"
        ) from error
    return bitsandbytes


def _quantized(
    bitsandbytes: ModuleType, linear: nn.Linear, kind: Quantization, dtype: torch.dtype, device: torch.device | str
) -> nn.Module:
    """A layer of the same shape, name and bias. bitsandbytes rounds weights when they are moved to a device."""
    size = linear.in_features, linear.out_features, linear.bias is not None
    weight = linear.weight.detach()
    try:
        if kind == "nf4":
            layer = bitsandbytes.nn.Linear4bit(*size, compute_dtype=dtype, quant_type="nf4", device="meta")
            layer.weight = bitsandbytes.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", module=layer)
            # On some CPUs the first forward without gradient would repack the weights for a kernel that has none, and only some shapes fit.
            layer.support_avx512bf16_for_cpu = False
        else:
            layer = bitsandbytes.nn.Linear8bitLt(*size, has_fp16_weights=False, threshold=6.0, device="meta")
            layer.weight = bitsandbytes.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
        if linear.bias is not None:
            layer.bias = nn.Parameter(linear.bias.detach(), requires_grad=False)
        layer = layer.to(device)
        with torch.no_grad():
            _check(layer(torch.ones(1, linear.in_features, dtype=dtype, device=device)))
    except (RuntimeError, NotImplementedError, AttributeError, OSError) as error:
        raise ImportError(
            f"model.quantization: bitsandbytes {bitsandbytes.__version__} cannot compute {kind} on {torch.device(device).type} here ({error}). "
            "Install a build for this device, or choose none"
        ) from error
    return layer.requires_grad_(False)


def _check(output: Tensor) -> None:
    if not bool(torch.isfinite(output).all()):
        raise RuntimeError("a layer of ones gives numbers that are not finite")
