"""The CPU backend against the reference: values, gradients, batches, readings; and how it behaves among threads and compilers."""

import threading

import numpy as np
import pytest
import torch

from vcd_fast import sliced_wasserstein, sort_target
from vcd_fast.distance.backends import compiled, polar, ranked, reference, rows, simd
from vcd_fast.distance.bins import half_spectrum
from vcd_fast.distance.spectrum import half_plane_sizes

SHAPES = [(1, 1), (1, 2), (2, 1), (2, 2), (1, 5), (6, 1), (3, 3), (4, 4), (5, 6), (6, 5), (9, 8), (33, 40)]


def random_maps(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(2, *shape, generator=generator, dtype=dtype)


def with_gradient(x, target, backend):
    x = x.clone().requires_grad_()
    loss = sliced_wasserstein(x, target, backend=backend)
    return loss.detach(), torch.autograd.grad(loss.sum(), x)[0]


def check_accuracy(x, y, **options):
    """The accuracy rule: a gradient no further from float64 than twice the float32 reference's, a loss within 1e-5."""
    want, gradient = with_gradient(x.double(), sort_target(y.double(), **options), "reference")
    target = sort_target(y, **options)
    _, from_reference = with_gradient(x, target, "reference")
    loss, from_simd = with_gradient(x, target, "simd")
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), want, rtol=1e-5, atol=1e-6)
    scale, error, allowed = (float(t.norm()) for t in (gradient, from_simd - gradient, from_reference - gradient))
    assert error <= 2 * allowed + 1e-6 * scale
    if scale > 0:
        cosine, of_reference = (float((g * gradient).sum() / g.norm() / scale) for g in (from_simd, from_reference))
        assert cosine >= min(0.9999, of_reference - 1e-4)


@pytest.fixture(autouse=True)
def _nothing_is_left_to_the_reference(monkeypatch):
    monkeypatch.setattr(simd, "SMALL_ROW", 0)
    monkeypatch.setattr(simd, "SMALL_PROBLEM", 0)


@pytest.fixture(params=[compiled, ranked], ids=["numba", "without numba"])
def _with_and_without_numba(request, monkeypatch):
    monkeypatch.setattr(rows, "COMPILED_VALUES", 1)
    monkeypatch.setattr(rows, "implementation", lambda: request.param)


@pytest.mark.usefixtures("_with_and_without_numba")
@pytest.mark.parametrize("chunk", [300, 1 << 22])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("slicing", ["channel", "flat", "patch"])
def test_every_parity_and_reading(monkeypatch, shape, slicing, chunk):
    monkeypatch.setattr(simd, "CHUNK_VALUES", chunk)
    x, y = random_maps(2, 3, *shape)
    for options in (
        {"p": 1},
        {"p": 2, "fft_norm": "ortho"},
        {"amplitude_weight": 0.0},
        {"phase_weight": 0.25, "domain": "feature"},
    ):
        check_accuracy(x, y, slicing=slicing, patch_size=min(2, *shape), num_projections=7, **options)


@pytest.mark.parametrize(
    "name",
    [
        "swd_even",
        "swd_odd",
        "swd_odd_even",
        "swd_single_row",
        "swd_dead_channels",
        "swd_wide",
        "swd_patch5",
        "swd_patch3_odd",
    ],
)
@pytest.mark.parametrize("part", ["amplitude", "phase"])
def test_published_values_and_gradients(golden, name, part):
    tensors = golden(name)
    options = {"amplitude_weight": float(part == "amplitude"), "phase_weight": float(part == "phase")}
    if "patch" in name:
        options |= {"slicing": "patch", "patch_size": tensors["projections"].shape[-1]}
    loss, gradient = with_gradient(tensors["x"], sort_target(tensors["y"], tensors["projections"], **options), "simd")
    torch.testing.assert_close(loss.double(), tensors[part], rtol=1e-6, atol=0)
    want = tensors[f"grad_{part}"]
    assert (gradient - want).norm() <= 3e-5 * want.norm()


@pytest.mark.parametrize("layer", ["relu1_1", "relu3_1", "relu5_1"])
def test_vgg_features(vgg, layer):
    """Sparse maps, some channels dead, of a picture that moved and changed."""
    generator = torch.Generator().manual_seed(0)
    still = torch.nn.functional.interpolate(
        torch.rand(1, 3, 12, 16, generator=generator), (72, 96), mode="bicubic"
    ).clamp(0, 1)
    moved = (still.roll((2, 3), (-2, -1)) * 0.97 + 0.02 * torch.rand(still.shape, generator=generator)).clamp(0, 1)
    x, y = vgg(moved)[layer], vgg(still)[layer]
    if layer != "relu1_1":  # almost empty channels have bins whose phase is the rounding of an FFT
        x, y = (t + 1e-3 * torch.rand(t.shape, generator=generator) for t in (x, y))
    check_accuracy(x, y, num_projections=24)


@pytest.mark.parametrize("group", [1, 1000, 1 << 22])
@pytest.mark.parametrize("shape", [(4, 5), (40, 55)], ids=str)
def test_batches_against_their_own_targets(monkeypatch, group, shape):
    """Six maps, two of each target's: each as if it were alone, however they are grouped."""
    monkeypatch.setattr(simd, "CHUNK_VALUES", group)
    x, _ = random_maps(6, 3, *shape)
    y, _ = random_maps(3, 3, *shape, seed=4)
    target = sort_target(y, num_projections=5)
    terms, gradient = simd.sliced_terms(x, target, True)
    for i in range(6):
        alone, piece = simd.sliced_terms(x[i : i + 1], target[i // 2 : i // 2 + 1], True)
        torch.testing.assert_close(terms[i : i + 1], alone, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(gradient[i : i + 1], piece, rtol=1e-3, atol=1e-3 * piece.abs().max().item())


@pytest.mark.parametrize("chunk", [5000, 1 << 22])
def test_one_side_on_the_branch_cut(monkeypatch, chunk):
    """Maps with one active pixel have phases that are not odd; the other side's are."""
    monkeypatch.setattr(simd, "CHUNK_VALUES", chunk)
    x, y = random_maps(1, 2, 32, 64)  # powers of two: and shifts by half the width: the FFT is exact
    sparse = torch.zeros_like(x)
    sparse[:, :, 3, 32] = 1
    pairs = [(sparse, y), (x, sparse)]
    if (
        chunk > 5000
    ):  # equal lists are equal to the last digit only if all directions are projected at once, as the target's
        pairs.append((sparse, sparse.roll(32, -1)))
    for a, b in pairs:
        check_accuracy(a, b, num_projections=6)


@pytest.mark.parametrize("shape", [(12, 10), (80, 96)], ids=str)
def test_equal_maps_are_at_distance_zero(shape):
    """To the rounding of the projections, which may depend on how many are computed at once."""
    x, _ = random_maps(2, 8, *shape)
    loss, gradient = with_gradient(x, sort_target(x, num_projections=16), "simd")
    amplitude = torch.fft.fft2(x).abs().mean()
    assert (loss < 1e-6 * amplitude).all()
    assert gradient.isfinite().all()


def test_no_gradient_unless_wanted(monkeypatch):
    wanted = []
    inner = simd.sliced_terms
    monkeypatch.setattr(simd, "sliced_terms", lambda *args: wanted.append(args[2]) or inner(*args))
    x, y = random_maps(1, 3, 8, 8)
    assert not sliced_wasserstein(x, y, backend="simd").requires_grad
    with torch.no_grad():
        sliced_wasserstein(x.clone().requires_grad_(), y, backend="simd")
    with torch.inference_mode():
        sliced_wasserstein(x, y, backend="simd")
    assert wanted == [False, False, False]
    assert sliced_wasserstein(x.clone().requires_grad_(), y, backend="simd").requires_grad
    assert wanted[-1] is True


def test_any_upstream_gradient_and_twice():
    x, y = random_maps(3, 3, 9, 8)
    x.requires_grad_()
    loss = sliced_wasserstein(x, y, num_projections=5, backend="simd")
    (every,) = torch.autograd.grad(loss, x, torch.ones(3), retain_graph=True)
    (some,) = torch.autograd.grad(
        loss, x, torch.tensor([[0.0, -2.0, 0.0, 9.0, 0.5, 9.0]]).view(3, 2)[:, 1], retain_graph=True
    )
    torch.testing.assert_close(some, every * torch.tensor([-2.0, 9.0, 9.0])[:, None, None, None])
    (expanded,) = torch.autograd.grad(loss, x, torch.tensor(3.0).expand(3))
    torch.testing.assert_close(expanded, 3 * every)


def test_second_derivative_is_refused():
    x, y = random_maps(1, 3, 6, 6)
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(sliced_wasserstein(x, y, backend="simd").sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="has no second derivative"):
        gradient.sum().backward()


def test_inputs_are_left_alone():
    x, y = random_maps(2, 3, 9, 8)
    for options in ({}, {"slicing": "flat"}, {"domain": "feature"}, {"domain": "feature", "slicing": "flat"}):
        before, target = x.clone(), sort_target(y, num_projections=4, **options)
        lists = [part.representatives.clone() for part in target.parts]
        with_gradient(x, target, "simd")
        assert torch.equal(x, before)
        assert all(torch.equal(part.representatives, old) for part, old in zip(target.parts, lists, strict=True))


def test_strides_do_not_matter():
    x, y = random_maps(2, 3, 12, 9)
    target = sort_target(y, num_projections=4)
    want = with_gradient(x, target, "simd")
    for other in (x.contiguous(memory_format=torch.channels_last), torch.stack([x, x], -1).flatten(-2)[..., ::2]):
        got = with_gradient(other, target, "simd")
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_gradient_has_the_dtype_of_x(dtype):
    x, y = random_maps(1, 3, 8, 8)
    loss, gradient = with_gradient(x.to(dtype), sort_target(y), "simd")
    assert (loss.dtype, gradient.dtype) == (torch.float32, dtype)


def test_threads_change_nothing(monkeypatch):
    monkeypatch.setattr(rows, "THREADED_VALUES", 0)
    x, y = random_maps(1, 8, 60, 70)
    target = sort_target(y, num_projections=40)
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            started = []
            with monkeypatch.context() as patch:
                inner = rows.ThreadPoolExecutor
                patch.setattr(
                    rows, "ThreadPoolExecutor", lambda n, inner=inner, started=started: started.append(n) or inner(n)
                )
                results.append(simd.sliced_terms(x, target, True))
            assert started == ([] if threads == 1 else [threads] * 2)
    finally:
        torch.set_num_threads(before)
    for terms, gradient in results[1:]:
        torch.testing.assert_close(terms, results[0][0], rtol=1e-6, atol=0)
        torch.testing.assert_close(gradient, results[0][1], rtol=1e-4, atol=1e-6)


def test_from_several_threads_at_once():
    x, y = random_maps(2, 6, 50, 60)
    target = sort_target(y, num_projections=12)
    want = with_gradient(x, target, "simd")
    results = []
    threads = [threading.Thread(target=lambda: results.append(with_gradient(x, target, "simd"))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    for got in results:
        assert torch.equal(got[0], want[0])
        assert torch.equal(got[1], want[1])


def test_an_error_in_a_thread_reaches_the_caller(monkeypatch):
    monkeypatch.setattr(rows, "THREADED_VALUES", 0)

    def fail(*args):
        raise MemoryError("of a thread")

    monkeypatch.setattr(rows.implementation(), "compare", fail)
    x, y = random_maps(1, 3, 40, 40)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with pytest.raises(MemoryError, match="of a thread"):
            simd.sliced_terms(x, sort_target(y), False)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("shape", [(1, 1), (1, 4), (5, 1), (6, 6), (6, 7), (7, 6), (7, 7)], ids=str)
def test_polar_is_the_spectrum_and_its_derivative(monkeypatch, shape):
    monkeypatch.setattr(polar, "BLOCK_BINS", 20)
    x, _ = random_maps(2, 5, *shape)
    x[0, 1] = 0
    x[1, 2] = 0
    x[1, 2, 0, -1] = -1
    m, s = half_plane_sizes(*shape)
    found = polar.to_polar(x, "ortho", True)
    z = half_spectrum(x, "ortho")
    assert torch.equal(found.z, z)
    assert torch.equal(found.amplitude, z.abs())
    torch.testing.assert_close(found.phase, z.angle(), rtol=1e-6, atol=0)
    x.requires_grad_()
    z = half_spectrum(x, "ortho")
    upstream = [torch.randn(2, 5, m + s, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    (want,) = torch.autograd.grad((upstream[0] * z.abs()).sum() + (upstream[1] * z.angle()).sum(), x)
    got = polar.from_polar(found, *(u.clone() for u in upstream), *shape, "ortho")
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3 * want.abs().max().item())
    (want,) = torch.autograd.grad((upstream[1] * half_spectrum(x, "ortho").angle()).sum(), x)
    got = polar.from_polar(found, None, upstream[1].clone(), *shape, "ortho")
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3 * want.abs().max().item())


def test_choice_of_backend(monkeypatch):
    called = []
    inner = simd.sliced_terms
    monkeypatch.setattr(simd, "sliced_terms", lambda *args: called.append("simd") or inner(*args))
    monkeypatch.setattr(reference, "sliced_terms", lambda *args: called.append("reference") or torch.zeros(1, 2))
    monkeypatch.delenv("VCD_FAST_BACKEND", raising=False)
    x, y = random_maps(1, 3, 6, 6)
    sliced_wasserstein(x, y)
    sliced_wasserstein(x.double(), y.double())
    sliced_wasserstein(x, y, backend="reference")
    monkeypatch.setenv("VCD_FAST_BACKEND", "reference")
    sliced_wasserstein(x, y)
    sliced_wasserstein(x, y, backend="simd")
    assert called == ["simd", "reference", "reference", "reference", "simd"]
    monkeypatch.setattr(simd, "SMALL_PROBLEM", 1 << 15)
    sliced_wasserstein(x, y, backend="simd")
    assert called[5:] == ["reference"]
    with pytest.raises(
        ValueError, match=r"'simd' cannot run: it computes in torch\.float32, and the target is torch\.float64"
    ):
        sliced_wasserstein(x.double(), y.double(), backend="simd")


@pytest.mark.parametrize("shape", [(4, 5), (9, 8)], ids=str)
def test_small_maps_are_the_references(monkeypatch, shape):
    """Where the reference is faster it computes, with the same result and the same bounds."""
    x, y = random_maps(6, 3, *shape)
    target = sort_target(y[:2], num_projections=5, amplitude_weight=0.5)
    want = simd.sliced_terms(x, target, True)
    monkeypatch.setattr(simd, "SMALL_ROW", 128)
    monkeypatch.setattr(simd, "CHUNK_VALUES", 800)
    packed = []
    with torch.autograd.graph.saved_tensors_hooks(packed.append, lambda _: None):
        got = simd.sliced_terms(x, target, True)
    assert not packed
    torch.testing.assert_close(got, want)
    assert simd.sliced_terms(x, target, False)[1] is None


def test_memory_does_not_depend_on_directions_or_maps(monkeypatch):
    """The largest array of projected values is a chunk's."""
    monkeypatch.setattr(simd, "CHUNK_VALUES", 1 << 16)
    sizes = []
    inner = simd._project
    monkeypatch.setattr(simd, "_project", lambda *args: sizes.append(inner(*args)) or sizes[-1])
    for maps, directions in ((1, 8), (1, 200), (7, 64)):
        x, _ = random_maps(maps, 4, 40, 50)
        simd.sliced_terms(x, sort_target(x, num_projections=directions), True)
    assert max(v.numel() for v in sizes) <= 1 << 16
    assert sum(v.numel() for v in sizes) == 2 * (8 + 200 + 7 * 64) * polar.padded(40 * 50 // 2 + 2)


def test_result_of_a_large_row_is_reproducible():
    x, y = random_maps(1, 4, 150, 160)
    target = sort_target(y, num_projections=16)
    first, second = (simd.sliced_terms(x, target, True) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    assert np.isfinite(first[1].numpy()).all()


@pytest.mark.parametrize(
    "options", [{}, {"slicing": "flat", "p": 2, "phase_weight": 0.5}, {"domain": "feature", "seed": 3}], ids=str
)
@pytest.mark.parametrize("small", [False, True])
def test_compiled_whole(monkeypatch, options, small):
    """fullgraph: one operator, no break; the reference, where it computes, is traced."""
    if small:
        monkeypatch.setattr(simd, "SMALL_PROBLEM", 1 << 30)
    x, y = random_maps(2, 3, 24, 18)
    target = sort_target(y, **({"num_projections": 5} if "slicing" not in options else {}), **options)

    def reward(x):
        return (sliced_wasserstein(x * 2, target) * torch.tensor([1.0, -3.0])).sum()

    x.requires_grad_()
    want = reward(x)
    (gradient,) = torch.autograd.grad(want, x)
    torch._dynamo.reset()
    got = torch.compile(reward, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(got, want)
    (compiled,) = torch.autograd.grad(got, x)
    assert (compiled - gradient).norm() <= 0.01 * gradient.norm()
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(reward, fullgraph=True, backend="aot_eager")(x), want.detach())


@pytest.mark.parametrize(
    "options", [{}, {"slicing": "flat"}, {"slicing": "patch", "p": 2}, {"domain": "feature"}], ids=str
)
def test_operator(options):
    x, y = random_maps(2, 3, 70, 66)
    target = (
        sort_target(y, **options)
        if "slicing" in options and options["slicing"] == "flat"
        else sort_target(y, num_projections=4, **options)
    )
    packed = simd._packed(target)
    again = simd._unpacked(*packed[:2], packed[2].split(), packed[3])
    assert again.config == target.config
    assert [part.form for part in again.parts] == [part.form for part in target.parts]
    for wanted in (True, False):
        torch.library.opcheck(simd.simd_sliced_terms, (x, *packed, wanted))
    terms, gradient = simd.simd_sliced_terms(x, *packed, True)
    want = simd.sliced_terms(x, target, True)
    torch.testing.assert_close((terms, gradient), want)
