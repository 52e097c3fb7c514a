"""Which tensors are alive, and how much they are at the worst moment: of real tensors, or of tensors on the meta device."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

Peaks = dict[str, dict[str, int]]
"""phase -> part -> bytes"""


class MemoryTracker(TorchDispatchMode):
    """Follows the storages that operators allocate while it is active, from the operator to their last reference, in forwards and
    backwards. Views and what autograd saves share storages, which count once.

    Bytes are those of the tensors: what a kernel needs inside (workspaces), rounding to an allocator's blocks and its fragmentation are
    not seen. Tensors made before it is active are not counted, weights for example.

    Attributes:
        part: what storages are booked under; a function is asked for every one.
        call: calls an operator; see `MetaKernels`.
        alive: bytes by part, now.
        peaks: for every phase the bytes by part when their sum was largest.
    """

    def __init__(self, part: str | Callable[[], str] = "tensors", call: Callable[..., Any] | None = None) -> None:
        super().__init__()
        self.part = part
        self.call = call or _call
        self.alive: dict[str, int] = {}
        self.peaks: Peaks = {}
        self._total = 0
        self._phase: str | None = None
        self._highest: dict[str, int] = {}
        self._known: dict[int, weakref.ref] = {}

    def ignore(self, tensors: Iterable[Tensor]) -> None:
        """Do not count what stands in the storages of these."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self._known[storage._cdata] = weakref.ref(storage, partial(self._forget, storage._cdata))

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """What is alive inside counts for the peak of `name`; a phase entered again goes on."""
        before, self._phase = self._phase, name
        self._look()
        try:
            yield
        finally:
            self._phase = before

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Mapping | None = None) -> Any:
        result = self.call(func, args, kwargs or {})
        for value in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(value, Tensor):
                self._see(value)
        return result

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        part, size = self.part() if callable(self.part) else self.part, storage.nbytes()
        self._known[key] = weakref.ref(storage, partial(self._free, key, part, size))
        self.alive[part] = self.alive.get(part, 0) + size
        self._total += size
        self._look()

    def _look(self) -> None:
        if self._phase is not None and self._total > self._highest.get(self._phase, -1):
            self._highest[self._phase] = self._total
            self.peaks[self._phase] = {part: size for part, size in self.alive.items() if size}

    def _free(self, key: int, part: str, size: int, _: weakref.ref) -> None:
        self._known.pop(key, None)
        self.alive[part] -= size
        self._total -= size

    def _forget(self, key: int, _: weakref.ref) -> None:
        self._known.pop(key, None)


def _call(func: Any, args: tuple, kwargs: Mapping) -> Any:
    return func(*args, **kwargs)


class SavedTensors:
    """What autograd saves for backwards: distinct storages, those of `apart` (parameters) left out."""

    def __init__(self, apart: Iterable[Tensor] = ()) -> None:
        self._apart = {tensor.untyped_storage()._cdata for tensor in apart}
        self._storages: dict[int, torch.UntypedStorage] = {}

    def add(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._apart:
            self._storages[storage._cdata] = storage  # held, so that no other gets its address
        return tensor

    @property
    def nbytes(self) -> int:
        return sum(storage.nbytes() for storage in self._storages.values())

    @contextlib.contextmanager
    def counting(self) -> Iterator[SavedTensors]:
        with torch.autograd.graph.saved_tensors_hooks(self.add, lambda tensor: tensor):
            yield self
