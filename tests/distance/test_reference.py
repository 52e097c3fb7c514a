"""The reference backend against published results, against the definition, and where the answer is known."""

import pytest
import torch
from torch.nn import functional as F

from vcd_fast import sliced_wasserstein
from vcd_fast.distance.projections import draw_projections

CHANNEL = ["swd_even", "swd_odd", "swd_odd_even", "swd_single_row", "swd_dead_channels", "swd_wide"]
PATCH = ["swd_patch5", "swd_patch3_odd"]
SHAPES = [(1, 1), (1, 2), (2, 1), (2, 2), (1, 5), (6, 1), (3, 3), (4, 4), (5, 6), (6, 5), (9, 8)]


def only(part, **options):
    return {"amplitude_weight": float(part == "amplitude"), "phase_weight": float(part == "phase"), **options}


def random_maps(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(2, *shape, generator=generator, dtype=dtype)


@pytest.mark.parametrize("part", ["amplitude", "phase"])
@pytest.mark.parametrize("name", CHANNEL + PATCH)
@pytest.mark.parametrize(
    ("dtype", "loss_error", "gradient_error"), [(torch.float64, 1e-13, 1e-12), (torch.float32, 1e-6, 3e-5)]
)
def test_published_fdl_values_and_gradients(golden, name, part, dtype, loss_error, gradient_error):
    tensors = golden(name)
    size = tensors["projections"].shape[-1]
    options = {"slicing": "patch", "patch_size": size} if name in PATCH else {}
    x = tensors["x"].to(dtype).requires_grad_()
    loss = sliced_wasserstein(
        x, tensors["y"].to(dtype), tensors["projections"], backend="reference", **only(part, **options)
    )
    assert loss.dtype == dtype
    torch.testing.assert_close(loss.double(), tensors[part], rtol=loss_error, atol=0)
    (gradient,) = torch.autograd.grad(loss.sum(), x)
    want = tensors[f"grad_{part}"]
    assert (gradient - want).norm() <= gradient_error * want.norm()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("slicing", ["channel", "flat", "patch"])
def test_definition_on_every_parity(naive, shape, p, slicing):
    x, y = random_maps(2, 3, *shape)
    size = min(2, *shape) if slicing == "patch" else 1
    directions = None if slicing == "flat" else draw_projections(3, "relu", 7, 3, size).unflatten(1, (3, size, size))
    options = {"slicing": slicing, "p": p, "num_projections": 7, "seed": 3, "patch_size": size, "layer": "relu"}
    want = naive(x, y, directions, p)
    for i, part in enumerate(("amplitude", "phase")):
        got = sliced_wasserstein(x, y, backend="reference", **only(part, **options))
        torch.testing.assert_close(got, want[:, i], rtol=1e-12, atol=1e-14)
    both = sliced_wasserstein(x, y, backend="reference", amplitude_weight=0.25, phase_weight=3.0, **options)
    torch.testing.assert_close(both, want @ torch.tensor([0.25, 3.0], dtype=torch.float64))


@pytest.mark.parametrize("norm", ["backward", "ortho", "forward"])
def test_fft_norms(naive, norm):
    x, y = random_maps(1, 4, 6, 7)
    directions = draw_projections(0, "", 16, 4).unflatten(1, (4, 1, 1))
    got = sliced_wasserstein(x, y, num_projections=16, fft_norm=norm, backend="reference")
    torch.testing.assert_close(got, naive(x, y, directions, norm=norm).sum(1))


@pytest.mark.parametrize("slicing", ["channel", "flat", "patch"])
def test_feature_domain_counts_both_weights(naive, slicing):
    x, y = random_maps(2, 3, 6, 5)
    size = 2 if slicing == "patch" else 1
    directions = None if slicing == "flat" else draw_projections(0, "", 4, 3, size).unflatten(1, (3, size, size))
    got = sliced_wasserstein(
        x, y, domain="feature", slicing=slicing, patch_size=2, num_projections=4, backend="reference"
    )
    torch.testing.assert_close(got, 2 * naive(x, y, directions, domain="feature")[:, 0])


@pytest.mark.parametrize("slicing", ["channel", "flat", "patch"])
@pytest.mark.parametrize("domain", ["frequency", "feature"])
@pytest.mark.parametrize("p", [1, 2])
def test_gradcheck(slicing, domain, p):
    x, y = random_maps(1, 2, 4, 5, seed=7)
    options = {
        "slicing": slicing,
        "domain": domain,
        "p": p,
        "num_projections": 3,
        "patch_size": 2,
        "backend": "reference",
    }
    assert torch.autograd.gradcheck(
        lambda x: sliced_wasserstein(x, y, **options), x.requires_grad_(), eps=1e-7, atol=1e-6
    )


@pytest.mark.parametrize("slicing", ["channel", "flat", "patch"])
def test_equal_maps_are_at_distance_zero(slicing):
    x, _ = random_maps(2, 3, 7, 6)
    x.requires_grad_()
    loss = sliced_wasserstein(x, x.detach(), slicing=slicing, num_projections=4, patch_size=3, backend="reference")
    assert torch.equal(loss, torch.zeros(2, dtype=torch.float64))
    assert not torch.autograd.grad(loss.sum(), x)[0].any()


def test_permuting_channels_with_their_directions_changes_nothing():
    x, y = random_maps(1, 5, 6, 6)
    order = torch.tensor([3, 0, 4, 1, 2])
    directions = torch.randn(9, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    got = sliced_wasserstein(x[:, order], y[:, order], directions[:, order], backend="reference")
    torch.testing.assert_close(got, sliced_wasserstein(x, y, directions, backend="reference"))


def test_samples_of_a_batch_are_independent():
    x, y = random_maps(3, 4, 6, 5)
    together = sliced_wasserstein(x, y, num_projections=5, backend="reference")
    apart = [sliced_wasserstein(x[i : i + 1], y[i : i + 1], num_projections=5, backend="reference") for i in range(3)]
    torch.testing.assert_close(together, torch.cat(apart))
    shared = sliced_wasserstein(x, y[:1], num_projections=5, backend="reference")
    torch.testing.assert_close(
        shared, sliced_wasserstein(x, y[:1].expand(3, -1, -1, -1), num_projections=5, backend="reference")
    )


@pytest.mark.parametrize("p", [1, 2])
def test_adding_a_constant_moves_every_sample_by_it(p):
    _, y = random_maps(1, 3, 4, 5)
    got = sliced_wasserstein(y + 0.3, y, domain="feature", slicing="flat", p=p, phase_weight=0.0, backend="reference")
    torch.testing.assert_close(got, torch.tensor([0.3**p], dtype=torch.float64))


def test_moving_along_a_direction_moves_the_projections():
    _, y = random_maps(1, 3, 4, 5)
    step = torch.tensor([0.1, -0.2, 0.4], dtype=torch.float64)
    directions = F.normalize(torch.tensor([[1.0, 2.0, 3.0], [0.0, 1.0, -1.0]], dtype=torch.float64), dim=1)
    got = sliced_wasserstein(
        y + step.view(3, 1, 1), y, directions, domain="feature", phase_weight=0.0, backend="reference"
    )
    torch.testing.assert_close(got, (directions @ step).abs().mean()[None])


def test_circular_shift_leaves_amplitudes():
    _, y = random_maps(1, 3, 8, 6)
    shifted = y.roll((3, 2), (-2, -1))
    assert sliced_wasserstein(shifted, y, num_projections=8, phase_weight=0.0, backend="reference").item() < 1e-13
    assert sliced_wasserstein(shifted, y, num_projections=8, amplitude_weight=0.0, backend="reference").item() > 0.1


def test_brightness_scales_amplitudes_and_leaves_phases():
    _, y = random_maps(1, 3, 8, 6)
    assert sliced_wasserstein(1.5 * y, y, slicing="flat", amplitude_weight=0.0, backend="reference").item() < 1e-13
    got = sliced_wasserstein(1.5 * y, y, slicing="flat", phase_weight=0.0, backend="reference")
    torch.testing.assert_close(got, 0.5 * torch.fft.fft2(y).abs().mean()[None])


def test_mirrored_picture_negates_phases():
    """x(-t) has the spectrum conj Z: every list of phases changes its sign, and as a set does not."""
    _, y = random_maps(1, 1, 7, 5)
    mirrored = y.flip(-2, -1).roll((1, 1), (-2, -1))
    assert sliced_wasserstein(mirrored, y, slicing="flat", backend="reference").item() < 1e-13


def test_zero_spectrum_has_no_gradient():
    x, y = random_maps(1, 4, 6, 6)
    x[:, 1:3] = 0
    x.requires_grad_()
    loss = sliced_wasserstein(x, y, num_projections=6, backend="reference")
    (gradient,) = torch.autograd.grad(loss.sum(), x)
    assert gradient.isfinite().all()
    assert not gradient[:, 1:3].any()
    assert gradient[:, 0].any()


def test_vanishing_spectrum_counts_as_zero():
    x, y = random_maps(1, 2, 6, 6, dtype=torch.float32)
    faint = x.clone()
    faint[:, 1] *= 1e-30
    faint.requires_grad_()
    loss = sliced_wasserstein(faint, y, num_projections=6, backend="reference")
    (gradient,) = torch.autograd.grad(loss.sum(), faint)
    assert gradient.isfinite().all()
    x[:, 1] = 0
    torch.testing.assert_close(loss, sliced_wasserstein(x, y, num_projections=6, backend="reference"))


@pytest.mark.parametrize(
    ("height", "width", "at"), [(6, 8, (0, 4)), (6, 8, (3, 0)), (6, 5, (3, 2)), (5, 8, (1, 4)), (6, 8, (2, 3))], ids=str
)
def test_one_active_pixel_has_plus_pi_on_both_sides_of_the_cut(naive, height, width, at):
    """Its spectrum is real and negative at many mirrored pairs: the angle is in (-π, π], so it is +π at both bins of a pair."""
    x, y = torch.zeros(1, 1, height, width, dtype=torch.float64), random_maps(1, 1, height, width)[0]
    x[0, 0, at[0], at[1]] = 1
    ky, kx = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    turns = (ky * at[0] * width + kx * at[1] * height) % (height * width)  # in units of 2π / (H·W), exact
    angle = -2 * torch.pi * turns.double() / (height * width)
    angle = torch.where(angle <= -torch.pi, angle + 2 * torch.pi, angle)
    fixed = torch.fft.fft2(y).angle().flatten().sort().values
    want = (angle.flatten().sort().values - fixed).abs().mean()
    got = sliced_wasserstein(x, y, slicing="flat", amplitude_weight=0.0, backend="reference")
    torch.testing.assert_close(got, want[None], rtol=1e-12, atol=0)


def test_negative_self_conjugate_bins_have_plus_pi():
    for shape in ((4, 4), (8, 4), (1, 8), (2, 1), (1, 1)):  # sums of these many twiddle factors are exact
        x = -torch.ones(1, 1, *shape, dtype=torch.float64)  # the mean is negative, everything else is 0
        zero = torch.zeros_like(x)
        got = sliced_wasserstein(x, zero, slicing="flat", amplitude_weight=0.0, backend="reference")
        torch.testing.assert_close(got, torch.tensor([torch.pi / x.numel()], dtype=torch.float64))
        signed = sliced_wasserstein(x, zero, torch.ones(1, 1), amplitude_weight=0.0, p=2, backend="reference")
        torch.testing.assert_close(signed, torch.tensor([torch.pi**2 / x.numel()], dtype=torch.float64))


def test_nan_ends_in_nan():
    x, y = random_maps(2, 3, 6, 6)
    x[0, 1, 2, 3] = torch.nan
    got = sliced_wasserstein(x, y, num_projections=4, backend="reference")
    assert got.isnan().tolist() == [True, False]
    assert sliced_wasserstein(y, x, num_projections=4, backend="reference").isnan().tolist() == [True, False]


def test_strides_do_not_matter():
    x, y = random_maps(2, 3, 6, 6)
    want = sliced_wasserstein(x, y, num_projections=4, backend="reference")
    last = x.contiguous(memory_format=torch.channels_last)
    wide = torch.stack([x, x], -1).flatten(-2)[..., ::2]
    for other in (last, wide, x.transpose(-1, -2).contiguous().transpose(-1, -2)):
        torch.testing.assert_close(sliced_wasserstein(other, y, num_projections=4, backend="reference"), want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype):
    x, y = (t.to(dtype) for t in random_maps(1, 3, 6, 6))
    want = sliced_wasserstein(x.float(), y.float(), num_projections=4, backend="reference")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = sliced_wasserstein(x, y, num_projections=4, backend="reference")
    assert got.dtype == torch.float32
    assert torch.equal(got, want)
