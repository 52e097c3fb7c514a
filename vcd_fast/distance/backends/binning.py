"""Bins of a monotone key, scaled to a target's rows, and what a row has in them. NumPy.

Magnitudes (odd rows) are keyed in equal steps, signed values in equal ratios (a few bits of the mantissa). Bin b of row i of a block has the
index j = i·width + b + 1, width being one more than the bins of a row.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import torch
from torch import Tensor

from vcd_fast.distance.lists import Form

SHORT_ROW = 2048
"""rows up to this length are sorted whole, and need no bins"""
OCTAVES = 12
"""that the key of signed values resolves below the largest of all but a thousandth of the target's"""


class Workspace:
    """Arrays that a thread uses again for every block: the page faults of fresh ones cost more than what is done in them."""

    def __init__(self) -> None:
        self._arrays: dict[str, np.ndarray] = {}

    def array(self, name: str, shape: tuple[int, ...], dtype: type) -> np.ndarray:
        """An array of that shape under that name, with whatever it holds."""
        size = math.prod(shape)
        held = self._arrays.get(name)
        if held is None or held.size < size:
            held = self._arrays[name] = np.empty(size, dtype)
        return held[:size].reshape(shape)


@dataclasses.dataclass(frozen=True)
class Key:
    """The key of rows of one length."""

    form: Form
    bits: int
    """of the bins, or of the mantissa"""

    @classmethod
    def of_rows(cls, form: Form, m: int) -> Key:
        """More bins leave less to sort, and cost their own scan; these were the fastest of those tried for m = 3 k, 12 k and 50 k."""
        return cls(form, (m.bit_length() + 12) // 2 if form == "odd" else (m.bit_length() + 22) // 4)

    @property
    def bins(self) -> int:
        return 1 << self.bits if self.form == "odd" else (OCTAVES << self.bits) + 2

    def scale(self, target: np.ndarray) -> np.ndarray:
        """What fits the key to rows of a target [R, m], ascending; outliers, a thousandth on either side, share the outermost bins.

        Returns:
            odd: float32 [R, 1], bins per unit; else int32 [R, 3]: how far to shift the bits of a magnitude, what of the rest counts as
            zero, and the signed key of the first bin. Rows that hold both signs need twice the range and get half the resolution.
        """
        outliers = target.shape[1] // 1000
        low, high = (target[:, i, None] for i in (outliers, target.shape[1] - 1 - outliers))
        if self.form == "odd":
            with np.errstate(divide="ignore", over="ignore"):
                scale = self.bins / high
            return np.where(np.isfinite(scale), scale, 0).astype(np.float32)
        largest = np.maximum(np.abs(low), np.abs(high)).view(np.int32)
        fitted = None
        for shift in (24 - self.bits, 23 - self.bits):
            zero = (largest >> shift) - (OCTAVES << (23 - shift))
            first, last = (self._signed(values, shift, zero) for values in (low, high))
            found = np.concatenate([np.full_like(zero, shift), zero, first], 1)
            fitted = found if fitted is None else np.where(last - first < self.bins, found, fitted)
        return fitted

    @staticmethod
    def _signed(values: np.ndarray, shift: int, zero: np.ndarray) -> np.ndarray:
        bits = np.ascontiguousarray(values).view(np.int32)
        return np.maximum(((bits & 0x7FFFFFFF) >> shift) - zero, 0) ^ (bits >> 31)

    def indices(self, values: np.ndarray, scale: np.ndarray, workspace: Workspace, name: str) -> np.ndarray:
        """Indices of values [r, k], int64, kept in the workspace under `name`."""
        offset = np.arange(len(values), dtype=np.int32)[:, None] * (self.bins + 1) + 1
        key = workspace.array("key", values.shape, np.int32)
        if self.form == "odd":
            scaled = workspace.array("scaled", values.shape, np.float32)
            np.multiply(values, scale, out=scaled)
            np.fmin(scaled, np.float32(self.bins - 1), out=scaled)  # NaN goes to the last bin
            np.copyto(key, scaled, casting="unsafe")
        else:
            bits, sign = values.view(np.int32), workspace.array("sign", values.shape, np.int32)
            shift, zero, first = (scale[:, i, None] for i in range(3))
            np.bitwise_and(bits, 0x7FFFFFFF, out=key)
            np.right_shift(key, shift, out=key)
            np.subtract(key, zero, out=key)
            np.maximum(key, 0, out=key)
            np.right_shift(bits, 31, out=sign)
            np.bitwise_xor(key, sign, out=key)
            np.clip(key, first, first + (self.bins - 1), out=key)
            offset = offset - first
        return np.add(key, offset, out=workspace.array(name, values.shape, np.int64))

    def up_to(self, indices: np.ndarray, workspace: Workspace, name: str) -> np.ndarray:
        """[r, k] -> [r, width] int32: how many of a row lie in bins up to each; the first column is 0."""
        counts = workspace.array(name, (len(indices), self.bins + 1), np.int32)
        counts.fill(0)
        ones = torch.ones((), dtype=torch.int32).expand(indices.size)
        torch.from_numpy(counts.reshape(-1)).scatter_add_(0, torch.from_numpy(indices.reshape(-1)), ones)
        return counts.cumsum(-1, dtype=np.int32, out=counts)


@dataclasses.dataclass(frozen=True, eq=False)
class TargetBins:
    """What a target's rows have in their bins, computed once."""

    key: Key
    scale: Tensor
    """[B, K, 1 or 3], see `Key.scale`"""
    up_to: Tensor
    """[B, K, width] int32 representatives in bins up to each; the first is 0"""
    sums: Tensor
    """[B, K, bins] sum of the representatives of each, float64: such sums cancel"""

    @classmethod
    def of(cls, values: Tensor, form: Form) -> TargetBins | None:
        """For ascending float32 representatives [B, K, m] on the CPU, if they are worth it; None otherwise."""
        if values.device.type != "cpu" or values.dtype != torch.float32 or values.shape[-1] <= SHORT_ROW:
            return None
        rows = values.numpy().reshape(-1, values.shape[-1])
        key = Key.of_rows(form, rows.shape[1])
        scale = key.scale(rows)
        up_to = np.empty((len(rows), key.bins + 1), np.int32)
        sums = np.empty((len(rows), key.bins))
        workspace = Workspace()
        for i, row in enumerate(rows):
            indices = key.indices(row[None], scale[i : i + 1], workspace, "indices")
            up_to[i] = key.up_to(indices, workspace, "up to")[0]
            sums[i] = np.bincount(indices[0], weights=row, minlength=key.bins + 1)[1:]
        shape = values.shape[:2]
        return cls(key, *(torch.from_numpy(array).unflatten(0, shape) for array in (scale, up_to, sums)))

    def __getitem__(self, samples: slice) -> TargetBins:
        return TargetBins(self.key, self.scale[samples], self.up_to[samples], self.sums[samples])

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.scale, self.up_to, self.sums

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors())
