"""Goldens, a small extractor, and the distance written down naively: full plane, every value sorted."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import vcd_fast
from vcd_fast.distance.bins import half_spectrum
from vcd_fast.distance.spectrum import half_plane_sizes

GOLDENS = Path(__file__).parents[1] / "goldens" / "distance"


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    """Tensors here are tiny: a second thread only waits for the first."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def golden():
    """golden(name) -> the tensors of a golden file."""
    return lambda name: load_file(GOLDENS / f"{name}.safetensors")


@pytest.fixture(scope="session")
def vgg():
    """VGG19 with the recipe's weights, float32. Tests that change its dtype copy it."""
    with pytest.warns(UserWarning, match="random weights"):
        return vcd_fast.VGG19Features("random")


class TwoLayers(nn.Module):
    """Two strided convolutions with ReLU: maps of 6 and 5 channels, float64, smooth enough for finite differences."""

    minimum_size = 4

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.first = nn.Parameter(
            torch.randn(6, 3, 3, 3, generator=generator, dtype=torch.float64), requires_grad=False
        )
        self.second = nn.Parameter(
            torch.randn(5, 6, 3, 3, generator=generator, dtype=torch.float64), requires_grad=False
        )
        self.calls = 0
        self.images = 0
        self.with_gradient = []

    def forward(self, images):
        self.calls += 1
        self.images += len(images)
        self.with_gradient.append(images.requires_grad)
        first = torch.conv2d(images, self.first, padding=1)
        first = nn.functional.softplus(first)
        second = nn.functional.softplus(torch.conv2d(first, self.second, stride=2))
        return {"one": first, "two": second}


@pytest.fixture
def extractor():
    return TwoLayers()


@pytest.fixture(scope="session")
def two_layers():
    """The same for tests that copy it."""
    return TwoLayers()


@pytest.fixture
def tiny_loss(extractor):
    """tiny_loss(config="vcd", **options) -> a VCDLoss over `extractor`, with eight directions."""

    def make(config="vcd", **options):
        options = {"extractor": extractor, "layers": ("one", "two"), "num_projections": 8, "patch_size": 2, **options}
        return vcd_fast.VCDLoss(config, **options)

    return make


@pytest.fixture
def clip():
    """clip(batch, frames, height, width) -> float64 videos in [0, 1]."""

    def make(batch=2, frames=4, height=10, width=9, seed=0):
        generator = torch.Generator().manual_seed(seed)
        return torch.rand(batch, frames, 3, height, width, generator=generator, dtype=torch.float64)

    return make


def _naive_parts(x: Tensor, domain: str, norm: str) -> list[Tensor]:
    if domain == "feature":
        return [x]
    z = torch.fft.fft2(x, norm=norm)
    return [z.abs(), z.angle()]


@pytest.fixture(scope="session")
def naive():
    """naive(x, y, directions, ...) -> [B, parts], from the definition; directions [K, C, k, k], or None for the flat reading."""

    def distance(x, y, directions, p=1, domain="frequency", norm="backward"):
        terms = []
        for a, b in zip(_naive_parts(x, domain, norm), _naive_parts(y, domain, norm), strict=True):
            if directions is None:
                a, b = a.flatten(1)[:, None], b.flatten(1)[:, None]
            else:
                a, b = (torch.conv2d(v, directions).flatten(2) for v in (a, b))
            terms.append((a.sort(-1).values - b.sort(-1).values).abs().pow(p).mean((1, 2)))
        return torch.stack(terms, 1)

    return distance


@pytest.fixture(scope="session")
def branch_cut_bound():
    """branch_cut_bound(feature maps [B, C, H, W], directions [K, C]) -> [B], how far the phase term can move with an FFT's rounding.

    A bin whose imaginary part is zero but for rounding, and whose real part is negative, has the angle +π or -π as the rounding falls.
    A change of one value of a list by d changes W1 by at most d/n.
    """

    def bound(maps, directions):
        n = maps.shape[-1] * maps.shape[-2]
        z = half_spectrum(maps, "backward")
        m, _ = half_plane_sizes(*maps.shape[-2:])
        near = (z.real < 0) & (z.imag.abs() <= 1e-12 * z.abs())
        count = near.to(maps.dtype)
        count[..., :m] *= 2
        return (directions.abs() @ count).sum(-1).mean(-1) * 2 * torch.pi / n

    return bound
