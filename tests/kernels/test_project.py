"""Projections of amplitudes and phases against float64, and the kernel that projects and compares in one."""

import math

import pytest
import torch

from vcd_fast.distance.spectrum import half_plane, self_conjugate_phase
from vcd_fast.kernels import config
from vcd_fast.kernels.half_list import single_places
from vcd_fast.kernels.project import project_fwd
from vcd_fast.kernels.rows import project_rows_fwd, rows_fwd

EVEN, ODD = 1, 2
SHAPES = [(5, 7), (6, 8), (1, 9), (8, 2), (1, 1)]


@pytest.fixture
def make_spectrum(device):
    """make_spectrum(samples, C, H, W) -> half plane, z as int64, index int32, half spectrum complex64 [samples, C, H·(W//2 + 1)]."""

    def make(samples, channels, height, width, seed=0):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(samples, channels, height, width, generator=generator).to(device)
        plane = half_plane(height, width, device)
        half = torch.fft.rfft2(x).flatten(-2).contiguous()
        index = torch.cat([plane.representatives, plane.self_conjugate]).to(torch.int32)
        return plane, half.view(torch.int64), index, half

    return make


def unit(count, channels, device):
    generator = torch.Generator().manual_seed(9)
    return torch.nn.functional.normalize(torch.randn(count, channels, generator=generator), dim=1).to(device)


def exact(plane, half, directions):
    """Projected amplitudes and phases of the kept bins in float64."""
    half = half.to(torch.complex128).unflatten(-1, (plane.height, plane.half_width))
    rep, own = plane.split(half)
    values = (torch.cat([rep.abs(), own.abs()], -1), torch.cat([rep.angle(), self_conjugate_phase(own)], -1))
    return [directions.double() @ v for v in values]


@pytest.mark.parametrize(("height", "width"), SHAPES)
def test_equals_float64(height, width, make_spectrum, device):
    plane, z, index, half = make_spectrum(2, 5, height, width)
    directions = unit(18, 5, device)
    m, singles = len(plane.representatives), len(plane.self_conjugate)
    got = project_fwd(z, index, directions, m, singles)
    for values, want in zip(got, exact(plane, half, directions), strict=True):
        assert values.shape[-1] % 16 == 0
        torch.testing.assert_close(values[..., : m + singles].double(), want, rtol=1e-5, atol=2e-6)


def test_more_channels_and_bins_than_a_block(make_spectrum, device):
    plane, z, index, half = make_spectrum(1, 37, 9, 10)
    directions = unit(33, 37, device)
    got = project_fwd(z, index, directions, len(plane.representatives), len(plane.self_conjugate))
    for values, want in zip(got, exact(plane, half, directions), strict=True):
        torch.testing.assert_close(values[..., : len(index)].double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("precision", ["ieee", "tf32x3", "tf32"])
def test_precisions(precision, make_spectrum, device):
    if precision == "tf32x3" and torch.version.hip:
        pytest.skip("not known to Triton on AMD GPUs")
    plane, z, index, half = make_spectrum(1, 16, 5, 7)
    directions = unit(16, 16, device)
    got = project_fwd(z, index, directions, len(plane.representatives), 1, precision=precision)
    tolerance = 2e-2 if precision == "tf32" else 2e-5
    for values, want in zip(got, exact(plane, half, directions), strict=True):
        torch.testing.assert_close(values[..., : len(index)].double(), want, rtol=tolerance, atol=tolerance)


def test_only_what_is_wanted(make_spectrum, device):
    plane, z, index, _ = make_spectrum(1, 3, 5, 7)
    directions = unit(4, 3, device)
    both = project_fwd(z, index, directions, len(plane.representatives), 1)
    amplitude, nothing = project_fwd(z, index, directions, len(plane.representatives), 1, phase=False)
    assert nothing.numel() == 0
    assert torch.equal(amplitude[..., : len(index)], both[0][..., : len(index)])


def test_self_conjugate_bins_are_real_whatever_the_fft_rounded_to(make_spectrum, device):
    plane, z, index, half = make_spectrum(1, 2, 6, 8)
    half[..., plane.self_conjugate] += -1e-6j
    half[..., plane.self_conjugate[1]] = torch.complex(torch.tensor(-3.0), torch.tensor(-0.0)).to(device)
    directions = torch.eye(2, device=device)
    m = len(plane.representatives)
    amplitude, phase = project_fwd(z, index, directions, m, 4)
    assert torch.equal(amplitude[..., m : m + 4], half[..., plane.self_conjugate].real.abs())
    assert set(phase[..., m : m + 4].unique().tolist()) <= {0.0, torch.tensor(math.pi).item()}
    torch.testing.assert_close(phase[0, 0, m + 1].item(), math.pi, rtol=1e-6, atol=0)


def test_mirror_images_on_the_branch_cut(make_spectrum, device):
    """A negative real bin and its mirror image both have the angle +pi; elsewhere the phase is odd."""
    plane, z, index, half = make_spectrum(1, 2, 5, 7)
    half[0, 0, plane.representatives[3]] = -2.0
    m = len(plane.representatives)
    every = torch.cat([index, index[:m]])
    directions = torch.eye(2, device=device)
    amplitude, phase = project_fwd(z, every, directions, m, 1)
    want = -phase[..., :m]
    want[0, 0, 3] = math.pi
    torch.testing.assert_close(phase[..., m + 1 : 2 * m + 1], want, rtol=1e-6, atol=0)
    assert torch.equal(amplitude[..., m + 1 : 2 * m + 1], amplitude[..., :m])


@pytest.mark.parametrize("form", [EVEN, ODD])
@pytest.mark.parametrize(("height", "width"), [(6, 8), (5, 7), (1, 1)])
def test_projected_and_compared_in_one_kernel(form, height, width, make_spectrum, device):
    plane, z, index, _ = make_spectrum(2, 5, height, width)
    _, other, _, _ = make_spectrum(1, 5, height, width, seed=1)
    directions = unit(19, 5, device)
    m, singles = len(plane.representatives), len(plane.self_conjugate)
    y = project_fwd(other, index, directions, m, singles)[form == ODD]
    w = (y[..., :m].abs() if form == ODD else y[..., :m]).sort(-1).values.contiguous()
    own = y[..., m : m + singles].sort(-1).values.contiguous()
    fixed = (w, own, single_places(w, own, form), form)
    small = config.RowsConfig(block=32, warps=1)
    cost, sign = project_rows_fwd(z, index, directions[2:].contiguous(), *fixed, first_direction=2, config=small)
    v = project_fwd(z, index, directions[2:].contiguous(), m, singles)[form == ODD]
    want_cost, want_sign = rows_fwd(v, *fixed, first_direction=2)
    torch.testing.assert_close(cost, want_cost, rtol=1e-5, atol=1e-5)
    assert torch.equal(sign[..., : m + singles], want_sign[..., : m + singles])


def test_nan_stays_in_its_sample(make_spectrum, device):
    plane, z, index, half = make_spectrum(2, 3, 5, 7)
    half[1, 1, plane.representatives[2]] = complex(math.nan, 1.0)
    for values in project_fwd(z, index, unit(4, 3, device), len(plane.representatives), 1):
        assert values[0, :, : len(index)].isfinite().all()
        assert values[1, :, 2].isnan().all()


def test_bad_arguments_are_named(make_spectrum, device):
    plane, z, index, half = make_spectrum(1, 3, 5, 7)
    directions, m = unit(4, 3, device), len(plane.representatives)
    with pytest.raises(TypeError, match=r"z must be torch\.int64, got torch\.complex64"):
        project_fwd(half, index, directions, m, 1)
    with pytest.raises(ValueError, match=r"directions must be \[any, 3\], got \[4, 2\]"):
        project_fwd(z, index, directions[:, :2].contiguous(), m, 1)
    with pytest.raises(ValueError, match="precision must be one of ieee, tf32x3, tf32; got 'bf16'"):
        project_fwd(z, index, directions, m, 1, precision="bf16")
    with pytest.raises(ValueError, match=r"index must name 17 \+ 4 bins"):
        project_fwd(z, index, directions, m, 4)
    w, own = torch.zeros(1, 4, m, device=device), torch.zeros(1, 4, 1, device=device)
    with pytest.raises(ValueError, match=r"config\.block must hold a row of 18 values, got 16"):
        project_rows_fwd(
            z, index, directions, w, own, own.to(torch.int32), EVEN, config=config.RowsConfig(block=16, warps=1)
        )
