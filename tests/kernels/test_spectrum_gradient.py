"""The gradient of the half spectrum against float64 autograd, through irfft2 down to the feature map."""

import pytest
import torch

from vcd_fast.distance.spectrum import half_plane, inverse_half_gradient, self_conjugate_phase
from vcd_fast.kernels import config
from vcd_fast.kernels.spectrum_gradient import spectrum_bwd

SHAPES = [(5, 7), (6, 8), (1, 9), (8, 2), (1, 1)]


@pytest.fixture
def case(device):
    """case(height, width, ...) -> a dictionary of arguments, the map, and the plane."""

    def make(height, width, samples=2, channels=5, count=18, seed=0):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(samples, channels, height, width, generator=generator).to(device)
        plane = half_plane(height, width, device)
        half = torch.fft.rfft2(x).flatten(-2).contiguous()
        index = torch.cat([plane.representatives, plane.self_conjugate]).to(torch.int32)
        mirror = torch.full_like(index, -1)
        mirror[plane.mirrored] = plane.mirrors.to(torch.int32)
        directions = torch.nn.functional.normalize(torch.randn(count, channels, generator=generator), dim=1).to(device)
        pitch = (len(index) + 15) // 16 * 16
        signs = [
            torch.randint(-2, 3, (samples, count, pitch), generator=generator).to(device, torch.int8) for _ in range(2)
        ]
        return plane, x, half, index, mirror, directions, signs

    return make


def exact(plane, x, directions, signs, scales, fft_norm="backward"):
    """d/dx of scale_a · sum(sign · projected amplitude) + scale_p · sum(sign · projected phase), float64 autograd."""
    x = x.double().requires_grad_()
    rep, own = plane.split(torch.fft.rfft2(x, norm=fft_norm))
    parts = (
        torch.cat([rep.abs(), own.real.abs()], -1),
        torch.cat([rep.angle(), self_conjugate_phase(own)], -1),
    )
    total = x.sum() * 0
    for values, sign, scale in zip(parts, signs, scales, strict=True):
        if sign is not None:
            total = total + scale * ((directions.double() @ values) * sign[..., : values.shape[-1]]).sum()
    return torch.autograd.grad(total, x)[0]


def to_map(gradient, plane, fft_norm="backward"):
    half = gradient.view(torch.complex64).unflatten(-1, (plane.height, plane.half_width))
    return inverse_half_gradient(half, plane.height, plane.width, fft_norm)


def assert_close(got, want):
    assert ((got.double() - want).norm() / want.norm().clamp_min(1e-30)).item() < 2e-6


@pytest.mark.parametrize(("height", "width"), SHAPES)
def test_equals_float64_autograd(height, width, case):
    plane, x, half, index, mirror, directions, signs = case(height, width)
    gradient = torch.empty_like(half.view(torch.int64))
    spectrum_bwd(
        half.view(torch.int64), index, mirror, directions, *signs, len(plane.representatives), 0.7, 1.3, gradient, False
    )
    assert torch.view_as_real(gradient.view(torch.complex64)).isfinite().all(), "every bin is written"
    assert_close(to_map(gradient, plane), exact(plane, x, directions, signs, (0.7, 1.3)))


@pytest.mark.parametrize("part", [0, 1])
def test_one_part_alone(part, case):
    plane, x, half, index, mirror, directions, signs = case(6, 7, samples=1)
    signs[1 - part] = None
    gradient = torch.empty_like(half.view(torch.int64))
    spectrum_bwd(
        half.view(torch.int64), index, mirror, directions, *signs, len(plane.representatives), 0.5, 0.5, gradient, False
    )
    assert_close(to_map(gradient, plane), exact(plane, x, directions, signs, (0.5, 0.5)))


def test_chunks_of_directions_add_up(case):
    plane, x, half, index, mirror, directions, signs = case(6, 8, samples=1, channels=20, count=37)
    z, m = half.view(torch.int64), len(plane.representatives)
    gradient = torch.empty_like(z)
    for chunk in (slice(0, 16), slice(16, 37)):
        some = [sign[:, chunk].contiguous() for sign in signs]
        spectrum_bwd(
            z, index, mirror, directions[chunk].contiguous(), *some, m, 1.0, 1.0, gradient, accumulate=chunk.start > 0
        )
    assert_close(to_map(gradient, plane), exact(plane, x, directions, signs, (1.0, 1.0)))


def test_derivatives_of_the_squared_cost_and_rows_of_different_pitch(case):
    plane, x, half, index, mirror, directions, signs = case(5, 7, samples=1)
    signs = [signs[0].float() * 0.37, torch.cat([signs[1], signs[1]], -1).contiguous()]
    gradient = torch.empty_like(half.view(torch.int64))
    spectrum_bwd(
        half.view(torch.int64), index, mirror, directions, *signs, len(plane.representatives), 1.0, 1.0, gradient, False
    )
    assert_close(to_map(gradient, plane), exact(plane, x, directions, signs, (1.0, 1.0)))


def test_nothing_flows_through_a_bin_that_is_zero(case):
    plane, _, half, index, mirror, directions, signs = case(5, 6, samples=1)
    dead = plane.representatives[2]
    half[0, 1] = 0  # a dead channel
    half[0, 0, dead] = 0
    gradient = torch.empty_like(half.view(torch.int64))
    spectrum_bwd(
        half.view(torch.int64), index, mirror, directions, *signs, len(plane.representatives), 1.0, 1.0, gradient, False
    )
    gradient = gradient.view(torch.complex64)
    assert (gradient[0, 1] == 0).all()
    assert gradient[0, 0, dead] == 0
    assert torch.view_as_real(gradient).isfinite().all()


@pytest.mark.parametrize("fft_norm", ["ortho", "forward"])
def test_normalised_transforms(fft_norm, case):
    plane, x, _, index, mirror, directions, signs = case(6, 7, samples=1)
    half = torch.fft.rfft2(x, norm=fft_norm).flatten(-2).contiguous()
    gradient = torch.empty_like(half.view(torch.int64))
    spectrum_bwd(
        half.view(torch.int64), index, mirror, directions, *signs, len(plane.representatives), 1.0, 1.0, gradient, False
    )
    assert_close(to_map(gradient, plane, fft_norm), exact(plane, x, directions, signs, (1.0, 1.0), fft_norm))


def test_bad_arguments_are_named(case):
    plane, _, half, index, mirror, directions, signs = case(5, 7, samples=1)
    z, m = half.view(torch.int64), len(plane.representatives)
    gradient = torch.empty_like(z)
    with pytest.raises(ValueError, match="amplitude_sign or phase_sign must be given"):
        spectrum_bwd(z, index, mirror, directions, None, None, m, 1.0, 1.0, gradient, False)
    with pytest.raises(ValueError, match=r"signs must be \[1, 18, any\], got \[1, 17, 32\]"):
        spectrum_bwd(z, index, mirror, directions, signs[0][:, 1:].contiguous(), None, m, 1.0, 1.0, gradient, False)
    with pytest.raises(ValueError, match="signs must hold 18 values a row, got 16"):
        spectrum_bwd(z, index, mirror, directions, signs[0][..., :16].contiguous(), None, m, 1.0, 1.0, gradient, False)
    with pytest.raises(ValueError, match=r"gradient must be \[1, 5, 20\]"):
        spectrum_bwd(z, index, mirror, directions, *signs, m, 1.0, 1.0, gradient[:, :4], False)


def test_a_given_configuration_is_used(case):
    plane, x, half, index, mirror, directions, signs = case(6, 8, samples=1)
    gradient = torch.empty_like(half.view(torch.int64))
    spectrum_bwd(
        half.view(torch.int64), index, mirror, directions, *signs, len(plane.representatives), 1.0, 1.0, gradient, False,
        config=config.GradientConfig(block_c=16, block_j=16, block_k=32, warps=4),
    )  # fmt: skip
    assert_close(to_map(gradient, plane), exact(plane, x, directions, signs, (1.0, 1.0)))
