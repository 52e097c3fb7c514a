"""The half plane against the whole one: every bin counted once, values and gradients equal to those of fft2."""

import math

import pytest
import torch

from vcd_fast.distance import spectrum
from vcd_fast.distance.spectrum import half_plane, half_plane_sizes, self_conjugate_phase, whole_list

SHAPES = [(h, w) for h in (1, 2, 3, 4, 5, 6, 7) for w in (1, 2, 3, 4, 5, 6, 7)] + [(17, 23), (34, 46), (14, 16)]


def generic_map(height, width, *lead):
    """A float64 map whose spectrum has no zero and no tie but the conjugate ones."""
    generator = torch.Generator().manual_seed(height * 100 + width)
    return torch.randn(*lead, height, width, dtype=torch.float64, generator=generator)


@pytest.mark.parametrize(("height", "width"), SHAPES)
def test_every_bin_of_the_whole_plane_is_named_once(height, width):
    plane = half_plane(height, width)
    columns = width // 2 + 1
    seen = torch.zeros(height, width, dtype=torch.int64)
    for table, conjugate in (
        (plane.representatives, False),
        (plane.representatives, True),
        (plane.self_conjugate, False),
    ):
        ky, kx = table // columns, table % columns
        if conjugate:
            ky, kx = -ky % height, -kx % width
        seen.index_put_((ky, kx), torch.ones_like(ky), accumulate=True)
    assert seen.eq(1).all()
    m, s = half_plane_sizes(height, width)
    assert (len(plane.representatives), len(plane.self_conjugate)) == (m, s)
    assert 2 * m + s == plane.bins == height * width
    assert plane.self_conjugate[0] == 0


@pytest.mark.parametrize(("height", "width"), SHAPES)
def test_tables_cover_the_half_plane_once(height, width):
    plane = half_plane(height, width)
    every = torch.cat([plane.representatives, plane.self_conjugate, plane.mirrors])
    assert torch.equal(every.sort()[0], torch.arange(height * plane.half_width))
    columns = plane.half_width
    paired = plane.representatives[plane.mirrored]
    assert torch.equal(plane.mirrors % columns, paired % columns)
    assert torch.equal(plane.mirrors // columns, height - paired // columns)


@pytest.mark.parametrize(("height", "width"), SHAPES)
def test_amplitudes_and_phases_of_all_bins_come_from_the_half(height, width):
    x = generic_map(height, width, 3)
    whole, half = torch.fft.fft2(x), torch.fft.rfft2(x)
    rep, own = half_plane(height, width).split(half)
    for got, want in (
        (whole_list(rep.abs(), own.abs(), odd=False), whole.abs()),
        (whole_list(rep.angle(), self_conjugate_phase(own), odd=True), whole.angle()),
    ):
        # the whole plane may say -pi where the bin is real and negative: the same angle
        want = want.flatten(-2)
        want = torch.where(want < -math.pi + 1e-9, math.pi, want)
        torch.testing.assert_close(got.sort(-1)[0], want.sort(-1)[0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("fft_norm", spectrum.FFT_NORMS)
@pytest.mark.parametrize(("height", "width"), SHAPES)
def test_feature_gradient_is_the_adjoint_of_rfft2(height, width, fft_norm):
    x = generic_map(height, width, 2).requires_grad_()
    rep, own = half_plane(height, width).split(torch.fft.rfft2(x, norm=fft_norm))
    rep.retain_grad()
    own.retain_grad()
    weight = torch.linspace(0.5, 1.5, rep.shape[-1], dtype=torch.float64)
    ((rep.abs() * weight).sum() + (rep.angle() * weight.flip(0)).sum() + (own.real * own.real.abs()).sum()).backward()
    got = half_plane(height, width).feature_gradient(rep.grad, own.grad, fft_norm)
    torch.testing.assert_close(got, x.grad, rtol=1e-10, atol=1e-11)


def test_hermitian_puts_back_what_split_took():
    for height, width in SHAPES:
        half = torch.fft.rfft2(generic_map(height, width, 2))
        plane = half_plane(height, width)
        torch.testing.assert_close(plane.hermitian(*plane.split(half)), half, rtol=1e-10, atol=1e-10)


def test_self_conjugate_phase_is_zero_or_plus_pi():
    z = torch.tensor([2.0, -3.0, 0.0, -0.0, math.inf, -math.inf, math.nan])
    want = torch.tensor([0.0, math.pi, 0.0, 0.0, 0.0, math.pi, math.nan])
    torch.testing.assert_close(self_conjugate_phase(z), want, rtol=0, atol=0, equal_nan=True)
    noisy = torch.complex(z, torch.full_like(z, -1e-7))
    torch.testing.assert_close(self_conjugate_phase(noisy), want, rtol=0, atol=0, equal_nan=True)


def test_tables_are_made_once_and_usable_by_autograd_whoever_asked_first():
    spectrum._PLANES.pop((13, 29, "cpu"), None)
    with torch.inference_mode():
        first = half_plane(13, 29)
    assert half_plane(13, 29) is first
    x = generic_map(13, 29).requires_grad_()
    rep, _ = first.split(torch.fft.rfft2(x))
    rep.abs().sum().backward()
    assert x.grad.isfinite().all()


def test_a_tracers_fake_tables_do_not_stay():
    from torch._subclasses.fake_tensor import FakeTensorMode

    spectrum._PLANES.pop((11, 31, "cpu"), None)
    with FakeTensorMode():
        half_plane(11, 31)
    assert type(half_plane(11, 31).representatives) is torch.Tensor


def test_the_cache_does_not_grow_without_bound():
    for width in range(1, 2 * spectrum._MOST_PLANES):
        half_plane(1, width)
    assert len(spectrum._PLANES) <= spectrum._MOST_PLANES


def test_bad_sizes_are_named():
    with pytest.raises(ValueError, match="height must be at least 1, got 0"):
        half_plane(0, 4)
    with pytest.raises(TypeError, match=r"width must be an integer, got 4\.0"):
        half_plane(4, 4.0)
    with pytest.raises(ValueError, match="fft_norm must be one of backward, ortho, forward; got 'unitary'"):
        spectrum.checked_norm("unitary")
    with pytest.raises(ValueError, match=r"half must be \[\.\.\., 4, 3\].*got \(2, 4, 4\)"):
        half_plane(4, 4).split(torch.zeros(2, 4, 4))
