"""What `sliced_wasserstein` keeps, how often it runs, and in which precision: among autocast, hooks, checkpoints and threads."""

import threading

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from vcd_fast import sliced_wasserstein, sort_target
from vcd_fast.distance import precision, sliced
from vcd_fast.distance.backends import ranked, rows, simd


@pytest.fixture(autouse=True)
def _nothing_is_left_to_the_reference(monkeypatch):
    monkeypatch.setattr(simd, "SMALL_ROW", 0)
    monkeypatch.setattr(simd, "SMALL_PROBLEM", 0)


def maps(*shape, seed=0):
    return torch.rand(2, *shape, generator=torch.Generator().manual_seed(seed))


def gradient_of(x, target, backend, upstream=None):
    x = x.detach().requires_grad_()
    loss = sliced_wasserstein(x, target, backend=backend)
    return loss, torch.autograd.grad(loss, x, torch.ones_like(loss) if upstream is None else upstream)[0]


@pytest.fixture
def runs(monkeypatch):
    """How often the CPU backend ran, with or without the gradient."""
    counted = []
    inner = simd.sliced_terms
    monkeypatch.setattr(simd, "sliced_terms", lambda *args: counted.append(args[2]) or inner(*args))
    return counted


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nothing_is_kept_but_the_gradient_in_float32(dtype):
    x, y = maps(2, 3, 12, 9)
    x, kept = x.to(dtype).requires_grad_(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        loss = sliced_wasserstein(x, sort_target(y, num_projections=40), backend="simd")
    large = [t for t in kept if t.numel() > len(x)]
    assert [(t.shape, t.dtype) for t in large] == [(x.shape, torch.float32)]
    loss.sum().backward()
    assert x.grad.dtype == dtype


@pytest.mark.parametrize("backend", ["reference", "simd"])
@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_autocast_and_half_inputs_reach_neither_transform_nor_sum(monkeypatch, backend, autocast, dtype):
    x, y = maps(2, 4, 11, 8)
    target = sort_target(y.to(dtype), num_projections=5)
    want, gradient = gradient_of(x.to(dtype), target, backend)
    transformed = []
    inner = torch.fft.rfft2
    monkeypatch.setattr(torch.fft, "rfft2", lambda t, **options: transformed.append(t.dtype) or inner(t, **options))
    x = x.to(dtype).requires_grad_()
    with torch.autocast("cpu", dtype=autocast):
        again = sort_target(y.to(dtype), num_projections=5)
        got = sliced_wasserstein(x, again, backend=backend)
        if backend == "simd":  # PyTorch's own backward belongs outside
            (under_autocast,) = torch.autograd.grad(got.sum(), x)
    if backend == "reference":
        (under_autocast,) = torch.autograd.grad(got.sum(), x)
    assert set(transformed) == {torch.float32}
    assert got.dtype == again.dtype == torch.float32
    assert torch.equal(got, want)
    assert torch.equal(under_autocast, gradient)
    for part, other in zip(target.parts, again.parts, strict=True):
        assert torch.equal(part.representatives, other.representatives)


def test_a_gradient_too_small_for_half_precision_is_scaled_before_it_is_rounded():
    x, y = maps(1, 2, 32, 32)
    target = sort_target(y, num_projections=8, fft_norm="forward", phase_weight=0.0, amplitude_weight=1e-4)
    _, small = gradient_of(x.half(), target, "simd")
    assert not small.any(), "float16 has nothing below 3e-8"
    upstream = torch.tensor([65536.0])
    _, scaled = gradient_of(x.half(), target, "simd", upstream)
    _, want = gradient_of(x.half().float(), target, "simd", upstream)
    torch.testing.assert_close(scaled.float(), want, rtol=1e-3, atol=6e-8)
    assert scaled.count_nonzero() > 0.9 * scaled.numel()


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_runs_it_twice_not_more(runs, use_reentrant):
    x, y = maps(1, 3, 10, 9)
    target = sort_target(y, num_projections=4)
    _, want = gradient_of(x, target, "simd")
    runs.clear()
    x.requires_grad_()
    checkpoint(lambda x: sliced_wasserstein(x * 1.0, target), x, use_reentrant=use_reentrant).sum().backward()
    assert runs == [not use_reentrant, True]
    assert torch.equal(x.grad, want)


def test_offloading_runs_it_once(runs):
    x, y = maps(1, 3, 10, 9)
    target = sort_target(y, num_projections=4)
    _, want = gradient_of(x, target, "simd")
    runs.clear()
    x.requires_grad_()
    with torch.autograd.graph.save_on_cpu():
        loss = sliced_wasserstein(x, target)
    loss.sum().backward()
    assert runs == [True]
    assert torch.equal(x.grad, want)


@pytest.mark.parametrize("backend", ["reference", "simd"])
def test_upstream_gradients_of_any_kind(backend):
    x, y = maps(3, 3, 9, 8)
    x.requires_grad_()
    loss = sliced_wasserstein(x, y, num_projections=5, backend=backend)
    (every,) = torch.autograd.grad(loss, x, torch.ones(3), retain_graph=True)
    for upstream in (
        torch.tensor([-2.0, 0.0, 1e4]),
        torch.arange(6.0).view(3, 2)[:, 1],
        torch.tensor(3.0).expand(3),
        torch.arange(3.0).flip(0),
    ):
        (got,) = torch.autograd.grad(loss, x, upstream, retain_graph=True)
        want = every * upstream.view(3, 1, 1, 1)
        assert (got - want).norm() <= 1e-5 * want.norm()
    loss.sum().backward()
    assert torch.equal(x.grad, every), "what was kept is not written to"


def test_its_gradient_has_no_derivative_inside_another_program():
    """`create_graph` on the way to something else is no error: only the second derivative itself is."""
    x, y = maps(1, 3, 6, 6)
    x.requires_grad_()
    scale = torch.tensor(2.0, requires_grad=True)
    loss = (sliced_wasserstein(x, y, num_projections=3, backend="simd") * scale).sum()
    gradient, of_scale = torch.autograd.grad(loss, (x, scale), create_graph=True)
    assert gradient.isfinite().all()
    of_scale.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="has no second derivative: its gradient is computed in the forward"):
        gradient.sum().backward()


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("elsewhere", [False, True])
def test_as_many_threads_as_pytorch_may_use_whoever_calls(monkeypatch, count, elsewhere):
    """A barrier that opens for `count` threads at once: with fewer it would not open, and more are counted."""
    barrier, seen = threading.Barrier(count, timeout=20), set()
    inner = ranked.compare

    def compare(*args):
        seen.add(threading.get_ident())
        barrier.wait()
        return inner(*args)

    monkeypatch.setattr(rows, "THREADED_VALUES", 0)
    monkeypatch.setattr(rows, "implementation", lambda: ranked)
    monkeypatch.setattr(ranked, "compare", compare)
    x, y = maps(1, 3, 30, 40)
    target = sort_target(y, num_projections=16, phase_weight=0.0)
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        if elsewhere:
            caller = threading.Thread(target=simd.sliced_terms, args=(x, target, False))
            caller.start()
            caller.join()
        else:
            simd.sliced_terms(x, target, False)
    finally:
        torch.set_num_threads(before)
    assert not barrier.broken
    assert len(seen) == count


@pytest.mark.parametrize("backend", ["reference", "simd"])
@pytest.mark.parametrize("options", [{}, {"slicing": "patch", "patch_size": 3}, {"domain": "feature"}], ids=str)
def test_products_are_exact_where_the_program_lets_them_be_rounded(backend, options):
    x, y = maps(2, 40, 16, 17)
    want = gradient_of(x, sort_target(y, num_projections=32, **options), backend)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        got = gradient_of(x, sort_target(y, num_projections=32, **options), backend)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    torch.testing.assert_close(got[0], want[0], rtol=1e-5, atol=1e-6)
    assert (got[1] - want[1]).norm() <= 1e-2 * want[1].norm()


def test_which_products_may_be_rounded():
    x = torch.rand(1, 1, 4, 4)
    before = torch.get_float32_matmul_precision()
    try:
        for name, may in (("highest", False), ("high", True), ("medium", True)):
            torch.set_float32_matmul_precision(name)
            assert precision.may_round(x, "matmul") is may
            assert not precision.may_round(x.double(), "matmul")
            assert not precision.may_round(x.to("meta"), "matmul")
            a, b = maps(50, 60)[0], maps(60, 70)[1]
            assert torch.equal(precision.exact_matmul(a, b), (a.double() @ b.double()).float() if may else a @ b)
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_convolution_a_shift_at_a_time(monkeypatch, size):
    """As on a GPU, where convolutions round by default."""
    monkeypatch.setattr(precision, "may_round", lambda x, operation: x.dtype == torch.float32)
    plane = torch.rand(2, 3, 6, 7, requires_grad=True)
    filters = torch.rand(4, 3, size, size)
    got, want = precision.exact_conv2d(plane, filters), torch.conv2d(plane, filters)
    torch.testing.assert_close(got, want)
    upstream = torch.rand(want.shape)
    (gradient,) = torch.autograd.grad(got, plane, upstream)
    torch.testing.assert_close(gradient, torch.autograd.grad(want, plane, upstream)[0])
    torch.testing.assert_close(precision.exact_conv_transpose2d(upstream, filters), gradient)


def test_weighted_sum_of_terms():
    x, y = maps(2, 3, 7, 8)
    target = sort_target(y, num_projections=4, amplitude_weight=0.25, phase_weight=3.0)
    total, terms = sliced.sliced_terms(x, target)
    torch.testing.assert_close(total, terms @ torch.tensor([0.25, 3.0]))
