"""What autograd keeps for the backward, kept in the memory of the CPU instead of the GPU's."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn


@contextlib.contextmanager
def offloaded(module: nn.Module, enabled: bool = True) -> Iterator[None]:
    """Tensors that are saved for a backward inside go to the CPU and come back when the backward asks for them. Exact: they are copied.

    What a checkpoint saves inside, its inputs, goes too; what it recomputes later, outside, does not. A tensor that several operators save is
    copied for each of them, as `torch.autograd.graph.save_on_cpu` does. Unlike there, weights stay where they are.

    Args:
        module: its parameters and buffers, and views of them, are left alone.
        enabled: False changes nothing.
    """
    if not enabled:
        yield
        return
    stay = {tensor.untyped_storage()._cdata for tensor in (*module.parameters(), *module.buffers())}

    def pack(tensor: Tensor) -> tuple[torch.device, Tensor] | Tensor:
        if tensor.untyped_storage()._cdata in stay:
            return tensor
        return tensor.device, _to_host(tensor)

    def unpack(packed: tuple[torch.device, Tensor] | Tensor) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        return _to_device(*packed)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


def _to_host(tensor: Tensor) -> Tensor:
    """A copy with the same strides: an operator may choose its kernel by them, and with it the last bits."""
    host = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda, memory_format=torch.preserve_format)
    return host.copy_(tensor)


def _to_device(device: torch.device, tensor: Tensor) -> Tensor:
    return tensor.to(device, non_blocking=tensor.is_pinned())
