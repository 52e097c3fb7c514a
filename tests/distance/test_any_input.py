"""The distance and its gradient for whatever comes: shapes, strides, dtypes, degenerate values; every CPU backend against float64."""

import contextlib
import copy
import dataclasses
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vcd_fast import sliced_wasserstein, sort_target
from vcd_fast.distance.backends import compiled, ranked, rows, simd
from vcd_fast.distance.config import SlicingConfig

BACKENDS = ("reference", "auto", "simd in NumPy", "simd compiled")
bounded = settings(max_examples=120, deadline=None, derandomize=True)


@contextlib.contextmanager
def backend_of(name):
    """The backend's name in the library; inside, `simd` leaves nothing to the reference, takes the way that is named, and many chunks."""
    if not name.startswith("simd"):
        yield name
        return
    module = compiled if name == "simd compiled" else ranked
    with (
        mock.patch.multiple(simd, SMALL_ROW=0, SMALL_PROBLEM=0, CHUNK_VALUES=400),
        mock.patch.multiple(rows, COMPILED_VALUES=1, implementation=lambda: module),
    ):
        yield "simd"


@dataclasses.dataclass
class Pair:
    """Two batches of maps and how they are compared."""

    x: torch.Tensor
    y: torch.Tensor
    options: dict
    generic: bool

    def loss(self, name="reference", x=None, double=False):
        x, y = (self.x if x is None else x), self.y
        if double:
            x, y = x.double(), y.double()
        with backend_of(name) as backend:
            return sliced_wasserstein(x, sort_target(y, **self.options), backend=backend)

    def loss_and_gradient(self, name="reference", double=False):
        x = (self.x.double() if double else self.x).detach().requires_grad_()
        loss = self.loss(name, x, double)
        return loss.detach(), torch.autograd.grad(loss.sum(), x)[0]

    @property
    def backends(self):
        return BACKENDS[:2] if self.y.dtype == torch.float64 else BACKENDS


def filled(kind, shape, generator):
    values = torch.rand(shape, generator=generator)
    if kind == "dead channels":
        values[:, ::2] = 0
    if kind == "constant":
        values = values[..., :1, :1].expand(shape).clone()
    if kind == "ties":
        values = (values * 3).round() / 2
    if kind == "one pixel":
        values = torch.zeros(shape)
        values[..., shape[-2] // 2, shape[-1] // 2] = 1
    if kind == "zero":
        values = torch.zeros(shape)
    if kind == "wide":
        values = (values - 0.5) * 10.0 ** torch.randint(-3, 4, shape[1:2], generator=generator).view(-1, 1, 1)
    return values


LAYOUTS = {
    "contiguous": lambda x: x,
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.mT.contiguous().mT,
    "every other": lambda x: torch.stack([x, torch.full_like(x, torch.nan)], -1)[..., 0],
    "expanded": lambda x: x[:1].expand(len(x), -1, -1, -1),
    "inside": lambda x: torch.nn.functional.pad(x, (1, 2, 3, 1), value=torch.nan)[..., 3:-1, 1:-2],
}
KINDS = ("random", "random", "wide", "dead channels", "constant", "ties", "one pixel", "zero", "equal")


@st.composite
def pairs(draw, kinds=KINDS, dtypes=(torch.float32, torch.float32, torch.bfloat16, torch.float16, torch.float64)):
    batch, channels, height, width = (draw(st.integers(1, most)) for most in (3, 4, 9, 9))
    of_target = draw(st.sampled_from([1, batch]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    kind, other = draw(st.sampled_from(kinds)), draw(st.sampled_from(kinds[:-1]))
    dtype = draw(st.sampled_from(dtypes))
    y = filled(other, (of_target, channels, height, width), generator)
    if kind == "equal":
        x = y.expand(batch, -1, -1, -1)
    else:
        x = filled(kind, (batch, channels, height, width), generator)
    x, y = (LAYOUTS[draw(st.sampled_from(list(LAYOUTS)))](t.to(dtype)) for t in (x, y))
    slicing = draw(st.sampled_from(["channel", "channel", "flat", "patch"]))
    amplitude, phase = draw(st.sampled_from([(1.0, 1.0), (0.3, 2.0), (1.0, 0.0), (0.0, 1.0)]))
    options = {
        "slicing": slicing,
        "p": draw(st.sampled_from([1, 1, 2])),
        "domain": draw(st.sampled_from(["frequency", "frequency", "feature"])),
        "amplitude_weight": amplitude,
        "phase_weight": phase,
        "fft_norm": draw(st.sampled_from(["backward", "ortho", "forward"])),
        "patch_size": draw(st.integers(1, min(3, height, width))),
        "num_projections": draw(st.integers(1, 4)),
    }
    if slicing == "flat":
        del options["num_projections"]
    return Pair(x, y, options, generic=kind == other == "random")


def lists_and_errors(maps, config, directions, rounding):
    """By part: the list of every sample and direction, and how far each value may be off if every coefficient of a channel is off by
    `rounding` of its largest; [B, K, n] float64."""
    if config.domain == "feature":
        parts = [(maps, rounding * maps.abs())]
    else:
        z = torch.fft.fft2(maps, norm=config.fft_norm)
        size = z.abs()
        off = rounding * size.amax((-2, -1), keepdim=True) * torch.ones_like(size)
        turn = (2 * off / size).nan_to_num(0.0).clamp(max=2 * torch.pi)
        mirrored = [-torch.arange(n) % n == torch.arange(n) for n in maps.shape[-2:]]
        alone = mirrored[0].unsqueeze(-1) & mirrored[1]  # real on either side: their angle is 0 or +π, never -π
        on_cut = (z.real < 0) & (z.imag.abs() <= off) & ~alone
        turn = turn.masked_fill((size <= 2 * off) & (off > 0) | on_cut, 2 * torch.pi)
        every = {"amplitude": (size, off), "phase": (z.angle(), turn)}
        parts = [every[part] for part in config.parts]
    if config.slicing == "flat":
        return [tuple(t.flatten(1).unsqueeze(1) for t in part) for part in parts]
    filters = directions.double().unflatten(1, (maps.shape[1], -1))
    filters = filters.unflatten(-1, (round(filters.shape[-1] ** 0.5), -1))
    found = []
    for values, off in parts:
        off = off + rounding * values.abs()
        found.append([torch.conv2d(v, f).flatten(2) for v, f in ((values, filters), (off, filters.abs()))])
    return found


def slack(x, y, target, rounding=4e-7):
    """[N], how far rounding may move the distance of x to y: a change of one value of a list by d moves W1 by at most d/n."""
    config, total = target.config, 0
    sides = [lists_and_errors(maps.double(), config, target.projections, rounding) for maps in (x, y)]
    for weight, (values, off), (fixed, fixed_off) in zip(config.part_weights, *sides, strict=True):
        error = off + fixed_off if len(off) == len(fixed_off) else off + fixed_off.mean((1, 2), keepdim=True)
        moved = error.mean((1, 2))
        if config.p == 2:
            furthest = values.abs().amax((1, 2)) + fixed.abs().amax((1, 2))
            moved = 2 * furthest * moved + error.square().mean((1, 2))
        total = total + weight * moved
    return total


@bounded
@given(pairs())
def test_loss_of_any_maps(pair):
    want = pair.loss(double=True)
    allowed = 1e-5 * want + 1e-9 + slack(pair.x, pair.y, sort_target(pair.y, **pair.options))
    before = pair.x.clone(), pair.y.clone()
    for name in pair.backends:
        got = pair.loss(name)
        assert got.dtype == (torch.float64 if pair.x.dtype == torch.float64 else torch.float32)
        assert ((got - want).abs() <= allowed).all(), name
    assert torch.equal(pair.x, before[0])
    assert torch.equal(pair.y, before[1])


@bounded
@given(pairs(dtypes=(torch.float32,)))
def test_gradient_of_any_maps(pair):
    """Brightening x by t is convex in t, so φ(t) >= φ(0) + t·<g, x> for every subgradient g, ties or not; phases do not change."""
    at_zero, true = pair.loss_and_gradient(double=True)
    allowed = 1e-9 + 4 * slack(pair.x, pair.y, sort_target(pair.y, **pair.options))
    _, single = pair.loss_and_gradient()
    for name in pair.backends:
        _, gradient = pair.loss_and_gradient(name)
        assert gradient.isfinite().all()
        assert gradient.shape == pair.x.shape
        along = (gradient.double() * pair.x).sum((1, 2, 3))
        norms = gradient.double().flatten(1).norm(dim=1) * pair.x.double().flatten(1).norm(dim=1)
        for t in (0.5, -0.5, 0.01, -0.01):
            moved = pair.loss(x=pair.x.double() * (1 + t), double=True)
            assert (moved >= at_zero + t * along - allowed - 1e-5 * abs(t) * norms).all(), (name, t)
        if pair.options["domain"] == "frequency":
            dead = pair.x.flatten(2).abs().amax(-1) == 0
            assert not gradient[dead].any()
        if pair.generic:
            size = torch.fft.fft2(pair.x.double()).abs()
            worst = 1e-6 * size.amax() / size.amin() if pair.options["domain"] == "frequency" else 1e-6
            error, of_reference = ((g - true).norm() for g in (gradient, single))
            assert error <= 2 * of_reference + worst * true.norm(), name


@settings(bounded, max_examples=40)
@given(pairs(dtypes=(torch.bfloat16, torch.float16)))
def test_half_precision_is_float32_rounded_at_the_end(pair):
    for name in pair.backends:
        loss, gradient = pair.loss_and_gradient(name)
        want, full = dataclasses.replace(pair, x=pair.x.float(), y=pair.y.float()).loss_and_gradient(name)
        assert gradient.dtype == pair.x.dtype
        torch.testing.assert_close(loss, want, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(gradient, full.to(pair.x.dtype), rtol=0.02, atol=1e-3 * full.abs().max().item())


@pytest.mark.filterwarnings("error")
@bounded
@given(
    pair=pairs(kinds=("random", "random", "dead channels", "ties"), dtypes=(torch.float32,)),
    value=st.sampled_from([torch.nan, torch.inf, -torch.inf]),
    in_target=st.booleans(),
    place=st.floats(0, 0.999),
)
def test_nan_and_infinity_stay_in_their_sample(pair, value, in_target, place):
    clean = pair.loss(double=True)
    maps = {"x": pair.x.contiguous().clone(), "y": pair.y.contiguous().clone()}
    side = maps["y" if in_target else "x"]
    index = int(place * side.numel())
    side.view(-1)[index] = value
    sample = index // side[0].numel()
    pair = dataclasses.replace(pair, **maps)
    want = pair.loss(double=True)
    hit = torch.full((len(pair.x),), True) if len(side) == 1 else torch.arange(len(pair.x)) == sample
    assert want[~hit].equal(clean[~hit])
    if value != value:
        assert want[hit].isnan().all()
    for name in BACKENDS:
        got, gradient = pair.loss_and_gradient(name)
        assert got.isfinite().equal(want.isfinite()), name
        assert got[hit].isnan().all() or value == value, name
        assert gradient[~hit].isfinite().all(), name


@settings(bounded, max_examples=60)
@given(pairs(kinds=("dead channels", "ties", "one pixel", "zero"), dtypes=(torch.float32,)))
def test_minus_zero_is_zero(pair):
    signed = dataclasses.replace(pair, x=torch.where(pair.x == 0, -0.0, pair.x))
    for name in BACKENDS:
        torch.testing.assert_close(signed.loss(name), pair.loss(name), rtol=1e-6, atol=1e-7)


def test_the_slack_of_rounding_is_small():
    """Else the tests above would allow anything."""
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.rand(1, 3, 8, 9, generator=generator) for _ in range(2))
    for options in ({"phase_weight": 0.0}, {"amplitude_weight": 0.0}, {"domain": "feature"}):
        target = sort_target(y, num_projections=4, **options)
        assert slack(x, y, target) < 3e-4 * sliced_wasserstein(x, target)


VIDEO_LAYOUTS = {
    "contiguous": lambda v: v,
    "channels last": lambda v: v.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3),
    "frames inside": lambda v: v.permute(0, 2, 1, 3, 4).contiguous().permute(0, 2, 1, 3, 4),
    "every other": lambda v: torch.stack([v, torch.full_like(v, torch.nan)], -1)[..., 0],
    "expanded": lambda v: v[:1].expand(len(v), -1, -1, -1, -1),
}


@st.composite
def clips(draw):
    """-> video, condition or None, keywords of the call, keywords of the loss."""
    batch, length, height, width = (
        draw(st.integers(1, 2)),
        draw(st.integers(2, 5)),
        *draw(st.tuples(*[st.integers(4, 9)] * 2)),
    )
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    video = torch.rand(batch, length, 3, height, width, generator=generator)
    kind = draw(st.sampled_from(["random", "random", "one colour", "black", "still"]))
    if kind == "one colour":
        video = video[..., :1, :1].expand_as(video)
    if kind == "black":
        video = torch.zeros_like(video)
    if kind == "still":
        video = video[:, :1].expand_as(video)
    index = draw(st.none() | st.lists(st.integers(0, length - 1), min_size=1, max_size=4))
    condition, call = None, {"reduction": draw(st.sampled_from(["mean", "sum", "none"]))}
    if index is not None:
        video = video[:, index]
        call |= {"frame_index": index, "num_frames": length}
    if (index is not None and 0 not in index) or draw(st.booleans()):
        condition = torch.rand(draw(st.sampled_from([1, batch])), 3, height, width, generator=generator)
    video = video.to(
        draw(st.sampled_from([torch.float32, torch.float32, torch.bfloat16, torch.float16, torch.float64]))
    )
    video = VIDEO_LAYOUTS[draw(st.sampled_from(list(VIDEO_LAYOUTS)))](video)
    options = {
        "num_projections": draw(st.integers(1, 4)),
        "chunk_frames": draw(st.sampled_from([None, 1, 2, 3])),
        "slicing": draw(st.sampled_from(["channel", "channel", "flat", "patch"])),
        "condition_frame": 0,
    }
    if options["slicing"] == "flat":
        del options["num_projections"]
    return video, condition, call, options


@settings(bounded, max_examples=60)
@given(case=clips())
def test_any_video(make_loss, case):
    video, condition, call, options = case
    exact, single = make_loss(torch.float64), make_loss(torch.float32)
    others = [i for i in call.get("frame_index", range(video.shape[1])) if i]
    if not others:
        with pytest.raises(ValueError, match="expected a frame other than the condition's own"):
            exact(backend="reference", **options)(video, condition, **call)
        return
    oracle = exact(backend="reference", **{**options, "chunk_frames": 1})
    image = None if condition is None else condition.double()
    want = oracle(video.double().contiguous(), image, **call)
    fixed = image if image is not None else video[:, call.get("frame_index", [0]).index(0)].double()
    for name in BACKENDS:
        leaf = video.detach().requires_grad_()
        with backend_of(name) as backend:
            loss = single(backend=backend, **options)
            got = loss(leaf, condition, **call)
        allowed = allowed_of(loss, exact, video, fixed, call)
        assert got.dtype == torch.float32
        assert got.shape == want.shape
        assert ((got - want).abs() <= 1e-4 * want.abs() + allowed).all(), name
        (gradient,) = torch.autograd.grad(got.sum(), leaf)
        assert gradient.dtype == video.dtype
        # the slope of a phase where hardly any light is may exceed float16's range
        assert gradient.isfinite().all() or video.dtype == torch.float16
        own = [t for t, i in enumerate(call.get("frame_index", range(video.shape[1]))) if i == 0]
        assert not gradient[:, own].any()


@pytest.fixture(scope="module")
def make_loss(two_layers):
    """make_loss(dtype)(**options) -> a VCDLoss over two small convolutions in `dtype`."""
    import vcd_fast

    def of(dtype):
        extractor = copy.deepcopy(two_layers).to(dtype)
        return lambda **options: vcd_fast.VCDLoss(
            extractor=extractor, layers=("one", "two"), **{"patch_size": 1, **options}
        )

    return of


def allowed_of(loss, exact, video, fixed, call):
    """What the rounding of the extractor and of the distance may do to any of the numbers of a call."""
    extractor = exact(num_projections=1).extractor
    index = call.get("frame_index", range(video.shape[1]))
    frames = torch.stack([video[:, t].double() for t, i in enumerate(index) if i], 1)
    total = torch.zeros(frames.shape[:2], dtype=torch.float64)
    config = loss.config.slicing_config
    assert isinstance(config, SlicingConfig)
    target = loss.prepare(fixed.float())
    for k in range(frames.shape[1]):
        x, y = extractor(frames[:, k]), extractor(fixed)
        for layer, side in target.layers.items():
            total[:, k] += slack(x[layer], y[layer], side, rounding=1e-5)
    return {"mean": total.mean, "sum": total.sum, "none": lambda: total}[call["reduction"]]() + 1e-6
