"""What autograd keeps for the backward, kept in the memory of the CPU instead of the GPU's."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator

import torch
from torch import Tensor, nn


@contextlib.contextmanager
def offloaded(module: nn.Module, enabled: bool = True) -> Iterator[None]:
    """Tensors that are saved for a backward inside go to the CPU and come back when the backward asks for them. Exact: they are copied.

    What a checkpoint saves inside, its inputs, goes too; what it recomputes later, outside, does not. Other than with
    `torch.autograd.graph.save_on_cpu` weights stay where they are, and a tensor that several operators save goes once.

    Args:
        module: its parameters and buffers, and views of them, are left alone.
        enabled: False changes nothing.
    """
    if not enabled:
        yield
        return
    stay = {tensor.untyped_storage()._cdata for tensor in (*module.parameters(), *module.buffers())}
    gone: dict[tuple, tuple[weakref.ref, Tensor]] = {}

    def pack(tensor: Tensor) -> tuple[torch.device, Tensor] | Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata in stay:
            return tensor
        layout = tensor.dtype, tensor.shape, tensor.stride(), tensor.storage_offset()
        key = storage._cdata, tensor._version, layout
        same, host = gone.get(key, (lambda: None, None))
        if same() is not storage:  # a storage that is gone leaves its address to another
            host = _to_host(tensor)
            gone[key] = weakref.ref(storage), host
        return tensor.device, host

    with torch.autograd.graph.saved_tensors_hooks(pack, _unpack):
        yield


def _unpack(packed: tuple[torch.device, Tensor] | Tensor) -> Tensor:
    return packed if isinstance(packed, Tensor) else _to_device(*packed)


def _to_host(tensor: Tensor) -> Tensor:
    """A copy with the same strides: an operator may choose its kernel by them, and with it the last bits."""
    host = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda, memory_format=torch.preserve_format)
    return host.copy_(tensor)


def _to_device(device: torch.device, tensor: Tensor) -> Tensor:
    return tensor.to(device, non_blocking=tensor.is_pinned())
