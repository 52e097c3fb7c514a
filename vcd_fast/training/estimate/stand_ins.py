"""What the meta device lacks: attention that does not build its matrix, autocast, and answers to questions about values."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from vcd_fast.rollout import offload

HALF = (torch.bfloat16, torch.float16)
LOWER = {
    "linear", "matmul", "bmm", "mm", "mv", "addmm", "addbmm", "baddbmm", "conv1d", "conv2d", "conv3d", "conv_transpose1d",
    "conv_transpose2d", "conv_transpose3d", "scaled_dot_product_attention",
}  # fmt: skip
"""operators that autocast computes in the lower precision; also those it would not meet in a transformer are harmless here"""
FLOAT32 = {
    "cuda": {"layer_norm", "group_norm", "rms_norm", "pow", "exp", "log", "rsqrt", "reciprocal"},
    "cpu": set(),
}
"""operators that autocast computes in float32, by device: of PyTorch's lists what transformers call"""


class _Attention(torch.autograd.Function):
    """The tensors that a flash or memory-efficient kernel keeps and makes; nothing is computed."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = query.new_empty((*query.shape[:-1], value.shape[-1]))
        ctx.save_for_backward(query, key, value, output, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value, _, _ = ctx.saved_tensors
        # FlashAttention sums the gradient of the queries in float32.
        accumulated = query.new_empty(query.shape, dtype=torch.float32) if query.dtype in HALF else None
        gradients = tuple(torch.empty_like(tensor) for tensor in (query, key, value))
        del accumulated
        return gradients


class StandIns(TorchFunctionMode):
    """While it is active, code written for a GPU runs on meta tensors with the memory it has there.

    Args:
        autocast: the dtype of the engine's autocast, None without one.
        device: whose lists of operators autocast follows, "cuda" or "cpu".
    """

    def __init__(self, autocast: torch.dtype | None = None, device: str = "cuda") -> None:
        super().__init__()
        self._dtype = autocast
        self._depth = 0
        self._casts: dict[int, tuple[Tensor, Tensor]] = {}
        self._lower = _functions(LOWER)
        self._float32 = _functions(FLOAT32[device])
        self._in_backward = False

    @contextlib.contextmanager
    def forward(self) -> Iterator[None]:
        """A forward of the engine: under autocast, weights cast once."""
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
            if self._depth == 0:
                self._casts.clear()

    @contextlib.contextmanager
    def backward(self) -> Iterator[None]:
        """A backward, which recomputes parts of forwards as they were."""
        self._in_backward = True
        try:
            yield
        finally:
            self._in_backward = False

    @contextlib.contextmanager
    def without_autocast(self) -> Iterator[None]:
        before, self._dtype = self._dtype, None
        try:
            yield
        finally:
            self._dtype = before

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: Mapping | None = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.__bool__ and args[0].is_meta:
            return True  # whether something is finite
        if func in (torch.autograd.grad, torch.Tensor.backward):
            with self:  # a mode is off within what it handles, and backwards recompute
                return _run_backward(*args, **kwargs) if func is torch.autograd.grad else _run_backward(args[0])
        casting = self._dtype is not None and (self._depth > 0 or self._in_backward)
        if casting and func in self._lower:
            args, kwargs = self._map(self._to_lower, args, kwargs)
        elif casting and func in self._float32:
            args, kwargs = self._map(_to_float32, args, kwargs)
        if func is F.scaled_dot_product_attention:
            return _Attention.apply(*_attention_inputs(*args, **kwargs))
        return func(*args, **kwargs)

    @staticmethod
    def _map(cast: Callable[[Any], Any], args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        return tuple(cast(value) for value in args), {name: cast(value) for name, value in kwargs.items()}

    def _to_lower(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or value.dtype not in (torch.float32, *HALF):
            return value
        if value.dtype == self._dtype:
            return value
        if self._depth == 0 or not (value.dtype == torch.float32 and value.is_leaf and value.requires_grad):
            return value.to(self._dtype)
        if id(value) not in self._casts:
            self._casts[id(value)] = (value, value.to(self._dtype))
        return self._casts[id(value)][1]


@contextlib.contextmanager
def offloading_to_nowhere() -> Iterator[None]:
    """Tensors that are offloaded leave no trace on the meta device and come back new: the memory of the CPU is not counted."""

    def to_host(tensor: Tensor) -> tuple:
        return tensor.shape, tensor.stride(), tensor.dtype

    def to_device(device: torch.device, host: tuple) -> Tensor:
        return torch.empty_strided(*host[:2], dtype=host[2], device=device)

    before = offload._to_host, offload._to_device
    offload._to_host, offload._to_device = to_host, to_device
    try:
        yield
    finally:
        offload._to_host, offload._to_device = before


def _run_backward(outputs: Any, inputs: Any = None, grad_outputs: Any = None, **_: Any) -> tuple[Tensor, ...]:
    """`torch.autograd.grad`, or without inputs `backward`, past the point where the mode would be asked again."""
    outputs, inputs, given = (
        (value,) if isinstance(value, Tensor) else tuple(value or ()) for value in (outputs, inputs, grad_outputs)
    )
    given = given or tuple(torch.ones_like(output) for output in outputs)
    engine = torch.autograd.Variable._execution_engine
    return engine.run_backward(outputs, given, False, False, inputs, False, accumulate_grad=not inputs)


def _to_float32(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype in HALF else value


def _attention_inputs(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor, Tensor]:
    return query, key, value


def _functions(names: set[str]) -> set[Any]:
    """The callables by which Python code reaches the operators of these names."""
    homes = (torch, torch.Tensor, F)
    found = {getattr(home, name) for name in names for home in homes if hasattr(home, name)}
    return found | ({torch.Tensor.__matmul__, torch.Tensor.__rmatmul__} if "matmul" in names else set())
