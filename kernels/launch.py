"""What every launcher does before it launches: check what came, choose the device, say where kernels can run."""

import contextlib
import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from .config import PRECISIONS

LARGEST_ROW = 2**30 - 1  # index and sign of a value share one int32


def interpreted() -> bool:
    """Whether the kernels of this process run in Triton's interpreter (decided when triton was imported), on the CPU."""
    return type(tl.sort).__name__ == "InterpretedFunction"


def checked(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple, device: torch.device) -> Tensor:
    """`tensor` if it is contiguous, of `dtype`, on `device` and of `shape` (None: any size); else TypeError or ValueError."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if tensor.dtype != dtype:
        raise TypeError(f"{name} must be {dtype}, got {tensor.dtype}")
    if tensor.device != device:
        raise ValueError(f"{name} must be on {device} like the other arguments, got {tensor.device}")
    fits = len(shape) == tensor.ndim and all(w is None or w == h for w, h in zip(shape, tensor.shape, strict=True))
    if not fits:
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{name} must be [{wanted}], got {list(tensor.shape)}")
    if not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous, got strides {tensor.stride()}")
    return tensor


def checked_precision(precision: str, device: torch.device) -> str:
    """`precision` if `tl.dot` is to be called with it, else ValueError.

    'ieee': float32 products and sums. 'tf32x3': three TF32 products, about as exact. 'tf32': 10 bits of mantissa, which turns half a
    percent of the phase signs.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}; got {precision!r}")
    if precision == "tf32x3" and device.type == "cuda" and torch.version.hip:
        raise ValueError("precision 'tf32x3' is not known to Triton on AMD GPUs; use 'ieee'")
    return precision


def checked_extent(name: str, *sizes: int) -> None:
    """Raises ValueError where offsets inside one sample would not fit 32 bits; samples are told apart by 64-bit ones."""
    extent = 1
    for size in sizes:
        extent *= size
    if extent >= 2**31:
        raise ValueError(f"{name} may hold at most 2**31 - 1 elements a sample, got {' x '.join(map(str, sizes))}")


def guard(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Makes the device of `tensor` the current one, which is where Triton launches. Raises ValueError where no kernel can run."""
    if tensor.is_cuda:
        return torch.cuda.device(tensor.device)
    if not interpreted():
        raise ValueError(
            f"Triton kernels need tensors on a CUDA or ROCm device, got {tensor.device}; "
            "on a CPU they only run in Triton's interpreter: set TRITON_INTERPRET=1 before triton is imported"
        )
    return contextlib.nullcontext()


@functools.lru_cache(maxsize=64)
def architecture(device: torch.device) -> str:
    """'sm_80', 'sm_90', 'sm_100', .. (NVIDIA), 'gfx942', .. (AMD), or 'interpreter'."""
    if device.type != "cuda":
        return "interpreter"
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return properties.gcnArchName.split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def row_pitch(values: int) -> int:
    """Elements from one row of a scratch tensor to the next: a multiple of 16, without which loads are not vectorised."""
    return max(16, (values + 15) // 16 * 16)


def tiles(values: int, block: int) -> int:
    """How many blocks cover `values`, at least one, so that a row without pairs is visited for its single values."""
    return max(1, triton.cdiv(values, block))


def checked_target(
    samples: int,
    directions: int,
    device: torch.device,
    representatives: Tensor,
    own: Tensor,
    place: Tensor,
    first_direction: int,
    form: int,
    power: int,
) -> tuple[int, int, int]:
    """Checks the target that rows [samples, directions] are compared with; -> (m, S, frames).

    representatives [targets, K, m], own [targets, K, S]: float32, sorted; place: int32 [targets, K, S]. Directions first_direction.. of
    the K are compared; samples is a multiple `frames` of targets, and sample i is compared with target i // frames.
    """
    checked("representatives", representatives, torch.float32, (None, None, None), device)
    targets, every, m = representatives.shape
    checked("own", own, torch.float32, (targets, every, None), device)
    singles = own.shape[-1]
    checked("place", place, torch.int32, (targets, every, singles), device)
    if form not in (0, 1, 2) or singles not in ((0,) if form == 0 else (1, 2, 4)):
        raise ValueError(
            f"form must be 0 with no single values, or 1 or 2 with 1, 2 or 4; got form {form} with {singles}"
        )
    if power not in (1, 2):
        raise ValueError(f"power must be 1 or 2, got {power}")
    if 2 * m + singles > LARGEST_ROW:
        raise ValueError(f"rows may stand for at most {LARGEST_ROW} values, got {2 * m + singles}")
    if targets < 1 or samples < 1 or samples % targets:
        raise ValueError(f"samples must be a multiple of the {targets} targets, got {samples}")
    if not 0 <= first_direction <= every - directions:
        raise ValueError(
            f"directions {first_direction}..{first_direction + directions} are not among the target's {every}"
        )
    return m, singles, samples // targets


def checked_rows(v: Tensor, representatives: Tensor, own: Tensor, place: Tensor, *target: int) -> tuple[int, int, int]:
    """`checked_target` for projected values v: float32 [samples, directions, pitch], a row's m + S values first."""
    checked("v", v, torch.float32, (None, None, None), v.device)
    samples, directions, pitch = v.shape
    m, singles, frames = checked_target(samples, directions, v.device, representatives, own, place, *target)
    if m + singles > pitch:
        raise ValueError(f"v must hold rows of {m} + {singles} values like the target's, got a pitch of {pitch}")
    return m, singles, frames


def sign_dtype(power: int) -> torch.dtype:
    """What the derivatives are kept in: sums of at most two signs, or 2 (x - y)."""
    return torch.int8 if power == 1 else torch.float32
