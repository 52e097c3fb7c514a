"""Modulus, angle and their derivatives against float64."""

import math

import pytest
import torch
import triton
import triton.language as tl

from vcd_fast.kernels.polar import load_complex, modulus_and_angle, polar_gradient

ANGLE_ULP, ANGLE_ABSOLUTE, MODULUS_ULP = 2.0, 3e-7, 1.5


@triton.jit
def polar_kernel(z_ptr, modulus_ptr, angle_ptr, re_ptr, im_ptr, d_modulus, d_angle, N: tl.constexpr):
    o = tl.program_id(0) * N + tl.arange(0, N)
    re, im = load_complex(z_ptr, o, o >= 0)
    modulus, angle = modulus_and_angle(re, im)
    tl.store(modulus_ptr + o, modulus)
    tl.store(angle_ptr + o, angle)
    g_re, g_im = polar_gradient(re, im, d_modulus, d_angle)
    tl.store(re_ptr + o, g_re)
    tl.store(im_ptr + o, g_im)


def polar(z, d_modulus=1.0, d_angle=0.0, block=4096):
    """complex64 [n] -> modulus, angle, gradient as complex; n a multiple of the block or less than it."""
    size = triton.next_power_of_2(len(z)) if len(z) < block else -(-len(z) // block) * block
    padded = torch.zeros(size, dtype=torch.complex64, device=z.device)
    padded[: len(z)] = z
    outputs = [torch.empty(size, device=z.device) for _ in range(4)]
    block = min(block, size)
    polar_kernel[(size // block,)](padded.view(torch.int64), *outputs, d_modulus, d_angle, N=block)
    modulus, angle, re, im = (out[: len(z)] for out in outputs)
    return modulus, angle, torch.complex(re, im)


def ulps(got, want):
    return (got.double() - want).abs() / torch.finfo(torch.float32).eps / torch.exp2(want.abs().log2().floor())


def spread(device, count=1 << 17):
    """Complex numbers of every direction, of moduli from 1e-15 to 1e15, some of them close to an axis or a diagonal."""
    generator = torch.Generator().manual_seed(0)
    angle = (torch.rand(count, generator=generator, dtype=torch.float64) * 2 - 1) * math.pi
    near = torch.arange(count) % 4 == 0
    angle[near] = (angle[near] / (math.pi / 4)).round() * (math.pi / 4) + 1e-4 * angle[near]
    modulus = 10 ** (torch.rand(count, generator=generator, dtype=torch.float64) * 30 - 15)
    return torch.polar(modulus, angle).to(torch.complex64).to(device)


def test_modulus_and_angle_are_within_two_units_in_the_last_place(device):
    z = spread(device)
    modulus, angle, _ = polar(z)
    exact = z.to(torch.complex128)
    assert ulps(modulus, exact.abs()).max() <= MODULUS_ULP
    assert (angle.double() - exact.angle()).abs().max() <= ANGLE_ABSOLUTE
    assert ulps(angle, exact.angle()).max() <= ANGLE_ULP


@pytest.mark.filterwarnings("ignore:invalid value encountered in multiply")  # NumPy's, in the interpreter: infinities
def test_axes_zero_and_branch_cut(device):
    """The angle lies in (-pi, pi]; the sign of a zero imaginary part says nothing, and zero has the angle 0."""
    pi = math.pi
    points = [
        (1.0, 0.0, 0.0), (1.0, -0.0, 0.0), (-1.0, 0.0, pi), (-1.0, -0.0, pi), (0.0, 2.0, pi / 2), (-0.0, -2.0, -pi / 2),
        (0.0, 0.0, 0.0), (-0.0, 0.0, 0.0), (-0.0, -0.0, 0.0), (3.0, 3.0, pi / 4), (-3.0, -3.0, -3 * pi / 4), (1e-20, 1e-20, 0.0),
        (1e30, 1e30, pi / 4), (math.inf, 1.0, 0.0), (-math.inf, 1.0, pi), (1.0, -math.inf, -pi / 2),
    ]  # fmt: skip
    z = torch.view_as_complex(torch.tensor([point[:2] for point in points])).to(device)
    modulus, angle, gradient = polar(z, d_angle=1.0)
    want = torch.tensor([point[2] for point in points], device=device)
    torch.testing.assert_close(angle, want, rtol=3e-7, atol=0)
    zero = [6, 7, 8, 11]
    assert (modulus[zero] == 0).all()
    assert (gradient[zero] == 0).all()
    torch.testing.assert_close(modulus[12].item(), math.sqrt(2) * 1e30, rtol=1e-6, atol=0)
    assert modulus[13:].isinf().all()


def test_nan_stays_nan(device):
    z = torch.view_as_complex(torch.tensor([[math.nan, 1.0], [1.0, math.nan], [math.nan, math.nan], [1.0, 0.0]]))
    modulus, angle, gradient = polar(z.to(device))
    for got in (modulus, angle, gradient.real):
        assert got.isnan().tolist() == [True, True, True, False]


def test_gradients_are_those_of_float64(device):
    z = spread(device, 1 << 12)
    for d_modulus, d_angle in ((1.0, 0.0), (0.0, 1.0), (0.7, -1.3)):
        exact = z.to(torch.complex128).requires_grad_()
        (d_modulus * exact.abs() + d_angle * exact.angle()).sum().backward()
        _, _, gradient = polar(z, d_modulus, d_angle)
        error = (gradient.to(torch.complex128) - exact.grad).abs() / exact.grad.abs()
        assert error.max() < 1e-6
