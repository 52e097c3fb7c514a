"""Half-plane geometry of a real two-dimensional FFT: which bins say everything, and how often each counts.

The spectrum Z of a real [H, W] map satisfies Z(-f) = conj Z(f), so that |Z| is even and angle(Z) odd in f. Of its n = H·W bins

* the `self_conjugate` ones satisfy f = -f: s of them (1, 2 or 4), one of which is the mean (DC); Z is real there;
* the other n - s come in conjugate pairs. `representatives` names one bin of each pair: m = (n - s)/2 of them.

Both lie in the half plane [H, W//2 + 1] that `torch.fft.rfft2` returns. A statistic over all n bins therefore needs m + s values:
an even one counts each representative twice, an odd one counts it once with either sign, and a self-conjugate bin counts once.
Of columns 0 and W/2 (W even) `rfft2` returns both bins of a pair; the half that is no representative is called `mirrors` here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

FFT_NORMS = ("backward", "ortho", "forward")
_ADJOINT_NORM = {"backward": "forward", "ortho": "ortho", "forward": "backward"}


@dataclass(frozen=True, eq=False)
class HalfPlane:
    """Where the bins of the half plane [H, W//2 + 1] of a real [H, W] map lie; made by `half_plane`, never modified.

    Positions are flat, row-major, int64, on one device.

    Attributes:
        height, width: H and W of the real map.
        representatives: [m] one bin of every conjugate pair: the interior columns row by row, then column 0, then column W/2.
        self_conjugate: [s] the bins that are their own conjugate; the first is the mean (DC).
        mirrors: [e] the bins of columns 0 and W/2 that are conjugates of a representative.
        mirrored: [e] where in `representatives` the conjugate of each of `mirrors` stands; they are its last e entries, in order.
    """

    height: int
    width: int
    representatives: Tensor
    self_conjugate: Tensor
    mirrors: Tensor
    mirrored: Tensor

    @property
    def half_width(self) -> int:
        """Columns of the half plane, W//2 + 1."""
        return self.width // 2 + 1

    @property
    def bins(self) -> int:
        """n = H·W = 2m + s, the number of bins of the whole plane."""
        return self.height * self.width

    def split(self, half: Tensor) -> tuple[Tensor, Tensor]:
        """Values on the half plane [..., H, W//2+1] -> those of the representatives [..., m] and of the self-conjugate bins [..., s].

        Raises ValueError when the last two dimensions are not the half plane of this shape.
        """
        if tuple(half.shape[-2:]) != (self.height, self.half_width):
            raise ValueError(
                f"half must be [..., {self.height}, {self.half_width}], the rfft2 of a {self.height}x{self.width} map; "
                f"got {tuple(half.shape)}"
            )
        flat = half.flatten(-2)
        return flat[..., self.representatives], flat[..., self.self_conjugate]

    def hermitian(self, representatives: Tensor, self_conjugate: Tensor) -> Tensor:
        """The inverse of `split` for spectra of real maps: complex [..., m] and real or complex [..., s] -> [..., H, W//2+1].

        Every bin is written once, the mirrors with the conjugate of their representative, so that the result is a valid input
        of `irfft2` on any device (cuFFT leaves other input undefined).
        """
        out = representatives.new_empty((*representatives.shape[:-1], self.height * self.half_width))
        out[..., self.representatives] = representatives
        out[..., self.mirrors] = representatives[
            ..., self.mirrored
        ].conj_physical()  # a lazy conj() is lost under torch.compile
        out[..., self.self_conjugate] = self_conjugate.to(out.dtype)
        return out.unflatten(-1, (self.height, self.half_width))

    def feature_gradient(self, representatives: Tensor, self_conjugate: Tensor, fft_norm: str = "backward") -> Tensor:
        """The adjoint of `rfft2`: from the gradient with respect to the bins to that with respect to the map [..., H, W].

        Args:
            representatives: complex [..., m], dL/dRe Z + i dL/dIm Z at each representative, the contributions of both bins of its
                pair summed (the loss seen as a function of the representative alone).
            self_conjugate: [..., s], dL/dRe Z at the self-conjugate bins; an imaginary part is dropped, because Z stays real there.
            fft_norm: the norm `rfft2` was called with.
        """
        own = self_conjugate.real if self_conjugate.is_complex() else self_conjugate
        return inverse_half_gradient(self.hermitian(representatives / 2, own), self.height, self.width, fft_norm)


def inverse_half_gradient(half: Tensor, height: int, width: int, fft_norm: str = "backward") -> Tensor:
    """`HalfPlane.feature_gradient` for a gradient that is laid out already: complex [..., H, W//2+1] -> real [..., H, W].

    `half` holds half the gradient at the representatives, the conjugate of that at their mirrors, and the real gradient at the
    self-conjugate bins.
    """
    return torch.fft.irfft2(half, s=(height, width), norm=_ADJOINT_NORM[checked_norm(fft_norm)])


def checked_norm(fft_norm: str) -> str:
    """`fft_norm` itself, or ValueError when torch.fft knows no such norm."""
    if fft_norm not in FFT_NORMS:
        raise ValueError(f"fft_norm must be one of {', '.join(FFT_NORMS)}; got {fft_norm!r}")
    return fft_norm


def half_plane_sizes(height: int, width: int) -> tuple[int, int]:
    """(m, s) for a real map of height x width, without making the index tables: n = height·width = 2m + s.

    Raises TypeError for sizes that are no integers and ValueError for sizes below 1.
    """
    for name, size in (("height", height), ("width", width)):
        if isinstance(size, bool) or not isinstance(size, (int, torch.SymInt)):
            raise TypeError(f"{name} must be an integer, got {size!r}")
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")
    edges = 2 - width % 2
    own = edges * (2 - height % 2)
    return (height * width - own) // 2, own


_PLANES: dict[tuple[int, int, str], HalfPlane] = {}
_MOST_PLANES = 256


def half_plane(height: int, width: int, device: torch.device | str = "cpu") -> HalfPlane:
    """The geometry of the half plane of real maps of height x width, with its tables on `device`; computed once per shape and device.

    Any sizes from 1 up, even or odd. The tables are made on the device by arithmetic: nothing is copied from the host and nothing
    waits for the device. Raises TypeError or ValueError for sizes that are no positive integers.
    """
    half_plane_sizes(height, width)  # validates
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    key = (int(height), int(width), str(device))
    plane = _PLANES.get(key)
    if plane is None:
        with torch.inference_mode(False):  # tables made in inference mode could not be used by autograd later
            plane = _make_half_plane(key[0], key[1], device)
        if type(plane.representatives) is Tensor:  # a tracer's fake tensors must not outlive the trace
            if len(_PLANES) >= _MOST_PLANES:
                _PLANES.clear()
            _PLANES[key] = plane
    return plane


def _make_half_plane(height: int, width: int, device: torch.device) -> HalfPlane:
    columns, interior = width // 2 + 1, (width - 1) // 2
    edges = [0] if width % 2 else [0, width // 2]  # columns that are their own mirror image
    j = torch.arange(height * interior, device=device)
    inner = j // max(interior, 1) * columns + 1 + j % max(interior, 1)
    below = torch.arange(1, (height + 1) // 2, device=device)  # 0 < ky < H/2
    outer = torch.cat([below * columns + column for column in edges])
    mirrors = torch.cat([(height - below) * columns + column for column in edges])
    rows = torch.arange(0, height, height // 2 if height % 2 == 0 else height, device=device)  # ky = 0 and, H even, H/2
    own = torch.cat([rows * columns + column for column in edges])
    mirrored = torch.arange(len(inner), len(inner) + len(outer), device=device)
    return HalfPlane(height, width, torch.cat([inner, outer]), own, mirrors, mirrored)


def self_conjugate_phase(values: Tensor) -> Tensor:
    """angle(Z) at self-conjugate bins, complex or real [..., s] -> real: +π where Z is negative, else 0; NaN stays NaN.

    Only the real part is looked at: an FFT may leave -0 or rounding noise in the imaginary one, which would turn +π into -π.
    """
    real = values.real if values.is_complex() else values
    angle = torch.zeros_like(real).masked_fill(real < 0, math.pi)
    return torch.where(real.isnan(), real, angle)


def whole_list(representatives: Tensor, self_conjugate: Tensor, odd: bool) -> Tensor:
    """The values of all n bins, unordered, from those of the half plane: [..., m] and [..., s] -> [..., n].

    `odd` says that the value changes sign under f -> -f (phases) instead of keeping it (amplitudes).
    """
    return torch.cat([representatives, -representatives if odd else representatives, self_conjugate], -1)
