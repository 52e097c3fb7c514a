"""The whole path through the kernels for whatever comes: shapes, strides, ties, degenerate maps, NaN; and inside torch.compile."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vcd_fast import sliced_wasserstein
from vcd_fast.distance.backends.reference import sliced_terms as reference_terms
from vcd_fast.distance.backends.triton_fused import sliced_terms
from vcd_fast.distance.sliced import weighted
from vcd_fast.distance.target import sort_target

bounded = settings(max_examples=24, deadline=None, derandomize=True)
METHODS = ("auto", "rows", "merge", "count", "sort")
LAYOUTS = {
    "contiguous": lambda x: x,
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.mT.contiguous().mT,
    "every other": lambda x: torch.stack([x, torch.full_like(x, torch.nan)], -1)[..., 0],
    "expanded": lambda x: x[:1].expand(len(x), -1, -1, -1),
}
KINDS = ("random", "random", "dead channels", "constant", "ties", "one pixel", "zero", "equal")


def filled(kind, shape, generator):
    values = torch.rand(shape, generator=generator)
    if kind == "dead channels":
        values[:, ::2] = 0
    if kind == "constant":
        values = values[..., :1, :1].expand(shape).clone()
    if kind == "ties":
        values = (values * 3).round() / 2
    if kind in ("zero", "one pixel"):
        values = torch.zeros(shape)
    if kind == "one pixel":
        values[..., shape[-2] // 2, shape[-1] // 2] = 1
    return values


@st.composite
def cases(draw, kinds=KINDS):
    """-> x, y, options of the distance, method."""
    batch, channels, height, width = (draw(st.integers(1, most)) for most in (2, 3, 5, 6))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    y = filled(
        draw(st.sampled_from(kinds[:-1])), (draw(st.sampled_from([1, batch])), channels, height, width), generator
    )
    kind = draw(st.sampled_from(kinds))
    shape = (batch, channels, height, width)
    x = y.expand(shape) if kind == "equal" else filled(kind, shape, generator)
    amplitude, phase = draw(st.sampled_from([(1.0, 1.0), (0.3, 2.0), (1.0, 0.0), (0.0, 1.0)]))
    method = draw(st.sampled_from(METHODS))
    options = {
        "p": 1 if method == "count" else draw(st.sampled_from([1, 2])),
        "amplitude_weight": amplitude,
        "phase_weight": phase,
        "fft_norm": draw(st.sampled_from(["backward", "ortho", "forward"])),
        "num_projections": draw(st.integers(1, 3)),
    }
    return LAYOUTS[draw(st.sampled_from(list(LAYOUTS)))](x), y, options, method


@bounded
@given(case=cases())
def test_any_maps(device, case):
    """Terms are the reference's. Brightening x by t is convex in t, so that the gradient along x is bounded by the slopes on either side."""
    x, y, options, method = case
    x, y = x.to(device), y.to(device)
    before = x.clone()
    target = sort_target(y, **options)
    terms, gradient = sliced_terms(x, target, True, method=method)
    want = reference_terms(x, target)
    scale = x.abs().amax() + y.abs().amax() if options["amplitude_weight"] else torch.zeros((), device=device)
    torch.testing.assert_close(terms, want, rtol=1e-4, atol=1e-5 + 1e-5 * scale.item())
    assert torch.equal(x, before)
    assert gradient.isfinite().all()
    assert not gradient[x.flatten(2).abs().amax(-1) == 0].any()

    exact = sort_target(y.double(), **options)

    def loss(factor):
        return weighted(reference_terms(x.double() * factor, exact), exact)

    along = (gradient.double() * x).sum((1, 2, 3))
    norms = gradient.double().flatten(1).norm(dim=1) * x.double().flatten(1).norm(dim=1)
    allowed = 1e-5 * (1 + loss(1.0) + scale * x.shape[-1] * x.shape[-2])
    for t in (0.5, -0.5, 0.01, -0.01):
        assert (loss(1 + t) >= loss(1.0) + t * along - allowed - 1e-5 * abs(t) * norms).all(), t


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # NumPy's, which interprets
@settings(bounded, max_examples=16)
@given(
    case=cases(("random", "dead channels", "ties")),
    value=st.sampled_from([torch.nan, torch.inf, -torch.inf]),
    in_target=st.booleans(),
    place=st.floats(0, 0.999),
)
def test_nan_and_infinity_stay_in_their_sample(device, case, value, in_target, place):
    x, y, options, method = case
    x, y = x.contiguous().clone().to(device), y.contiguous().clone().to(device)
    side = y if in_target else x
    index = int(place * side.numel())
    side.view(-1)[index] = value
    target = sort_target(y, **options)
    terms, gradient = sliced_terms(x, target, True, method=method)
    want = reference_terms(x, target)
    assert terms.isfinite().equal(want.isfinite())
    finite = want.isfinite().all(-1)
    assert gradient[finite].isfinite().all()
    if value != value:
        hit = (
            torch.ones(len(x), dtype=torch.bool) if len(side) == 1 else torch.arange(len(x)) == index // side[0].numel()
        )
        assert terms[hit.to(device)].isnan().all()


@pytest.mark.parametrize("with_gradient", [True, False])
def test_compiled_whole(device, with_gradient):
    """The library's function, not the operator alone: fullgraph, with its gradient."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.rand(2, 1, 2, 4, 5, generator=generator).to(device)
    target = sort_target(y, num_projections=2)

    def reward(x):
        return -sliced_wasserstein(x * 2.0, target, backend="triton").sum()

    x.requires_grad_(with_gradient)
    want = reward(x)
    torch._dynamo.reset()
    got = torch.compile(reward, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(got, want)
    if with_gradient:
        torch.testing.assert_close(torch.autograd.grad(got, x)[0], torch.autograd.grad(want, x)[0])


def test_upstream_gradients_and_what_is_kept(device):
    generator = torch.Generator().manual_seed(0)
    x, y = torch.rand(2, 2, 2, 4, 5, generator=generator).to(device)
    x, kept = x.bfloat16().requires_grad_(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        loss = sliced_wasserstein(x, sort_target(y, num_projections=2), backend="triton")
    assert [(t.shape, t.dtype) for t in kept] == [(x.shape, torch.float32)]
    assert loss.dtype == torch.float32
    (every,) = torch.autograd.grad(loss, x, torch.ones_like(loss), retain_graph=True)
    for upstream in (torch.tensor([[2.0, 9.0], [-0.5, 9.0]])[:, 0], torch.tensor(4.0).expand(2)):
        (got,) = torch.autograd.grad(loss, x, upstream.to(device), retain_graph=True)
        assert torch.equal(got, every * upstream.to(device, x.dtype).view(2, 1, 1, 1))
    (gradient,) = torch.autograd.grad(loss.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="has no second derivative"):
        gradient.sum().backward()
