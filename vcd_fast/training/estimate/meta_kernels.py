"""Operators on the meta device, remembered: a network repeats few of them, and PyTorch works each out in Python."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

IN_PLACE = frozenset(f"aten::{name}_" for name in ("add", "sub", "mul", "div", "copy", "fill", "zero", "relu", "clamp"))
"""operators that change values only"""


class MetaKernels:
    """Calls operators. One that makes new tensors out of meta tensors is worked out once per shapes, strides, dtypes and options."""

    def __init__(self) -> None:
        self._made: dict[Any, tuple[bool, list[tuple] | None]] = {}
        self._new: dict[Any, bool] = {}

    def __call__(self, func: Any, args: tuple, kwargs: dict) -> Any:
        if func not in self._new:
            self._new[func] = _makes_new_tensors(func)
        if not self._new[func]:
            if func._schema.name in IN_PLACE and args[0].is_meta:
                return args[0]
            return func(*args, **kwargs)
        try:
            key = (func, _key(args), _key(tuple(kwargs.items())))
            made = self._made.get(key)
        except (TypeError, _NotMeta):
            return func(*args, **kwargs)
        if made is None:
            result = func(*args, **kwargs)
            self._made[key] = _described(result)
            return result
        several, outputs = made
        if outputs is None:
            return func(*args, **kwargs)
        results = [
            None if each is None else torch.empty_strided(each[0], each[1], dtype=each[2], device="meta")
            for each in outputs
        ]
        return tuple(results) if several else results[0]


class _NotMeta(Exception):
    pass


def _makes_new_tensors(func: Any) -> bool:
    schema = func._schema
    return all(value.alias_info is None for value in (*schema.arguments, *schema.returns))


def _key(value: Any) -> Any:
    if isinstance(value, Tensor):
        if not value.is_meta:
            raise _NotMeta
        return value.shape, value.stride(), value.dtype
    if isinstance(value, (tuple, list)):
        return tuple([_key(each) for each in value])
    return value if value is None or isinstance(value, str) else (type(value), value)  # 1 and 1.0 promote differently


def _described(result: Any) -> tuple[bool, list[tuple] | None]:
    """Whether there are several outputs, and how to make each; None where they are not just meta tensors."""
    several = isinstance(result, tuple)
    outputs = result if several else (result,)
    if not all(each is None or (isinstance(each, Tensor) and each.is_meta) for each in outputs):
        return several, None
    return several, [None if each is None else (each.shape, each.stride(), each.dtype) for each in outputs]
