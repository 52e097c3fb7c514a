"""The whole path through the kernels against the reference backend and FDL's published values."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from vcd_fast.distance.backends import reference, triton_fused
from vcd_fast.distance.backends.triton_fused import sliced_terms, triton_sliced_terms, unavailable, unsupported
from vcd_fast.distance.config import SlicingConfig
from vcd_fast.distance.target import sort_target

ROOT = Path(__file__).parents[2]


def maps(samples, targets, channels, height, width, device, seed=0):
    """Maps like those behind a ReLU, and targets they are near to."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randn(targets, channels, height, width, generator=generator)
    x = y.repeat_interleave(samples // targets, 0)
    x = (x + 0.3 * torch.randn(x.shape, generator=generator) + 0.05).relu()
    return x.to(device), y.relu().to(device)


def by_reference(x, y, dtype, **options):
    """Terms and the gradient of their weighted sum by the reference backend, in `dtype`."""
    x = x.to(dtype).requires_grad_()
    target = sort_target(y.to(dtype), **options)
    terms = reference.sliced_terms(x, target)
    total = sum(weight * terms[:, i] for i, weight in enumerate(target.config.part_weights))
    (gradient,) = torch.autograd.grad(total.sum(), x)
    return terms.detach(), gradient


def assert_accurate(x, y, terms, gradient, **options):
    """The rule for a backend: terms within 1e-5, gradient within twice the float32 error of the reference, same direction."""
    true_terms, true_gradient = by_reference(x, y, torch.float64, **options)
    _, single = by_reference(x, y, torch.float32, **options)
    torch.testing.assert_close(terms.double(), true_terms, rtol=1e-5, atol=1e-7)
    norm = true_gradient.norm()
    error, allowed = (gradient - true_gradient).norm() / norm, (single - true_gradient).norm() / norm
    assert error <= 2 * allowed + 1e-6
    assert torch.cosine_similarity(gradient.flatten().double(), true_gradient.flatten(), 0) > 0.9999


@pytest.mark.parametrize("method", ["auto", "rows", "merge", "count", "sort"])
@pytest.mark.parametrize(("height", "width"), [(12, 14), (9, 11)])
def test_agrees_with_the_reference(method, height, width, device):
    x, y = maps(1, 1, 5, height, width, device)
    options = {"num_projections": 4, "phase_weight": 0.7}
    terms, gradient = sliced_terms(x, sort_target(y, **options), True, method=method)
    assert_accurate(x, y, terms, gradient, **options)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 2), (2, 2), (3, 1), (1, 12), (2, 5)])
def test_the_smallest_maps(height, width, device):
    x, y = maps(2, 1, 3, height, width, device)
    x, y = x + 0.1, y + 0.2
    count = 1 if height == width == 1 else 3
    terms, gradient = sliced_terms(x, sort_target(y, num_projections=count), True)
    true_terms, true_gradient = by_reference(x, y, torch.float64, num_projections=count)
    torch.testing.assert_close(terms.double(), true_terms, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient.double(), true_gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("options", [
    {"p": 2}, {"fft_norm": "ortho"}, {"fft_norm": "forward"}, {"amplitude_weight": 0.0}, {"phase_weight": 0.0}
])  # fmt: skip
def test_options(options, device):
    x, y = maps(1, 1, 4, 6, 7, device)
    options = {"num_projections": 3, **options}
    terms, gradient = sliced_terms(x, sort_target(y, **options), True)
    assert terms.shape == (1, 1 if 0.0 in options.values() else 2)
    assert_accurate(x, y, terms, gradient, **options)


@pytest.mark.parametrize(
    "name", ["swd_even", "swd_odd", "swd_odd_even", "swd_single_row", "swd_dead_channels", "swd_wide"]
)
def test_published_values_and_gradients(name, device):
    if name == "swd_wide" and device.type == "cpu":
        pytest.skip("takes minutes in the interpreter; runs on a GPU")
    golden = {
        key: tensor.to(device) for key, tensor in load_file(ROOT / f"tests/goldens/distance/{name}.safetensors").items()
    }
    if name == "swd_even" and device.type == "cpu":  # one of two samples: the interpreter is slow
        golden = {key: tensor if key == "projections" else tensor[:1] for key, tensor in golden.items()}
    target = sort_target(golden["y"], golden["projections"])
    terms, gradient = sliced_terms(golden["x"], target, True, method="rows" if name == "swd_odd" else "auto")
    for i, part in enumerate(("amplitude", "phase")):
        torch.testing.assert_close(terms[:, i].double(), golden[part], rtol=1e-5, atol=1e-7)
    true = golden["grad_amplitude"] + golden["grad_phase"]
    assert torch.cosine_similarity(gradient.flatten().double(), true.flatten(), 0) > 0.9999
    assert (gradient - true).norm() / true.norm() < 1e-2


@pytest.mark.parametrize("chunk", [60, 200, 700])
def test_chunks_change_nothing(chunk, monkeypatch, device):
    """Two targets, three frames each, in groups of frames and chunks of directions of every kind."""
    x, y = maps(6, 2, 3, 5, 6, device)
    target = sort_target(y, num_projections=5)
    whole = sliced_terms(x, target, True)
    monkeypatch.setattr(triton_fused, "CHUNK_VALUES", chunk)
    terms, gradient = sliced_terms(x, target, True)
    torch.testing.assert_close(terms, whole[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient, whole[1], rtol=1e-4, atol=1e-7)
    assert_accurate(x, y, terms, gradient, num_projections=5)


def test_groups_cover_every_sample_once():
    for samples, targets, size in (
        (6, 2, 10),
        (6, 6, 1),
        (24, 1, 10**9),
        (70000, 1, 0),
        (8, 4, 3 * 2**20),
        (5, 5, 2**21),
    ):
        seen = []
        for some, owners in triton_fused._groups(samples, targets, size):
            frames = samples // targets
            assert {i // frames for i in range(some.start, some.stop)} == set(range(owners.start, owners.stop))
            assert (some.stop - some.start) % (owners.stop - owners.start) == 0
            seen += range(some.start, some.stop)
        assert seen == list(range(samples))


def test_no_gradient_wanted(device, monkeypatch):
    from vcd_fast.kernels import spectrum_gradient

    monkeypatch.setattr(spectrum_gradient, "spectrum_bwd", None)
    x, y = maps(1, 1, 3, 5, 6, device)
    target = sort_target(y, num_projections=3)
    terms, gradient = sliced_terms(x, target, False)
    assert gradient is None
    torch.testing.assert_close(
        terms.double(), by_reference(x, y, torch.float64, num_projections=3)[0], rtol=1e-5, atol=0
    )


def test_equal_maps_are_at_distance_zero(device):
    _, y = maps(1, 1, 4, 6, 8, device)
    terms, gradient = sliced_terms(y, sort_target(y, num_projections=4), True)
    assert terms.abs().max() < 1e-5
    assert gradient.isfinite().all()


@pytest.mark.parametrize("fill", [0.0, 0.5])
def test_constant_maps_and_dead_channels(fill, device):
    x, y = maps(1, 1, 4, 6, 8, device)
    x = torch.full_like(x, fill)
    y[:, 1:3] = 0
    terms, gradient = sliced_terms(x, sort_target(y, num_projections=4), True)
    torch.testing.assert_close(
        terms.double(), by_reference(x, y, torch.float64, num_projections=4)[0], rtol=1e-5, atol=1e-6
    )
    assert gradient.isfinite().all()


def test_bins_on_the_branch_cut(device):
    """One active pixel: every bin has its phase from the pixel's place alone, many of them exactly +pi."""
    _, y = maps(1, 1, 3, 6, 8, device)
    x = torch.zeros_like(y)
    x[:, :, 3, 4] = 1.0
    x[:, 1] += y[:, 1]
    for a, b in ((x, y), (y, x), (x, x.roll(1, -1))):
        terms, gradient = sliced_terms(a, sort_target(b, num_projections=4), True)
        want, _ = by_reference(a, b, torch.float32, num_projections=4)
        torch.testing.assert_close(terms, want, rtol=1e-4, atol=1e-5)
        assert gradient.isfinite().all()


def test_nan_gives_nan_for_its_sample_alone(device):
    x, y = maps(2, 1, 3, 5, 6, device)
    x[1, 2, 3, 3] = math.nan
    terms, gradient = sliced_terms(x, sort_target(y, num_projections=3), True)
    assert terms[0].isfinite().all()
    assert terms[1].isnan().all()
    assert gradient[0].isfinite().all()


def test_any_strides_and_nothing_is_overwritten(device):
    x, y = maps(2, 1, 4, 6, 7, device)
    target = sort_target(y, num_projections=3)
    want = sliced_terms(x, target, True)
    before = x.clone()
    for strided in (
        x.to(memory_format=torch.channels_last),
        x.transpose(2, 3).contiguous().transpose(2, 3),
        x.repeat(2, 1, 1, 1)[::2][:2],
    ):
        if strided.shape != x.shape or not torch.equal(strided, x):
            continue
        assert torch.equal(sliced_terms(strided, target, True)[0], want[0])
    assert torch.equal(x, before)
    expanded = x[:1].expand(2, -1, -1, -1)
    terms, gradient = sliced_terms(expanded, target, True)
    assert torch.equal(terms[0], terms[1])
    assert torch.equal(gradient[0], gradient[1])


def test_the_same_numbers_every_time(device):
    x, y = maps(1, 1, 4, 9, 8, device)
    target = sort_target(y, num_projections=3)
    first, second = (sliced_terms(x, target, True, method="count") for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


def arguments(x, target, with_gradient=True):
    lists = [tensor for part in target.parts for tensor in part[:2]]
    return (x, target.projections, lists, [1, 2], [0, 1], [1.0, 0.5], 1, "backward", with_gradient, "auto", "ieee")


@pytest.mark.parametrize("with_gradient", [True, False])
def test_opcheck(with_gradient, device):
    x, y = maps(1, 1, 2, 4, 5, device)
    torch.library.opcheck(triton_sliced_terms, arguments(x, sort_target(y, num_projections=2), with_gradient))


def test_compiles_as_one_graph(device):
    x, y = maps(1, 1, 2, 4, 5, device)
    target = sort_target(y, num_projections=2)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def doubled(x):
        terms, gradient = triton_sliced_terms(*arguments(x * 1.0, target))
        return 2 * terms, gradient + 1

    terms, gradient = doubled(x)
    want = triton_sliced_terms(*arguments(x, target))
    torch.testing.assert_close(terms, 2 * want[0])
    torch.testing.assert_close(gradient, want[1] + 1)


def test_why_the_kernels_cannot_run(monkeypatch, device):
    assert unavailable(device) is None
    assert "the tensors are on meta" in unavailable(torch.device("meta"))
    import triton

    from vcd_fast.kernels import launch

    with monkeypatch.context() as patch:
        patch.setattr(triton, "__version__", "3.3.1")
        assert unavailable(device) == "triton 3.3.1 is older than 3.4"
    with monkeypatch.context() as patch:
        patch.setattr(launch, "interpreted", lambda: False)
        assert "VCD_FAST_INTERPRET=1" in unavailable(torch.device("cpu"))
    with monkeypatch.context() as patch:
        patch.setattr(launch, "interpreted", lambda: True)
        assert "TRITON_INTERPRET=1 is set" in unavailable(torch.device("cuda"))
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "triton", None)
        assert "triton cannot be imported" in unavailable(device)


@pytest.mark.parametrize(("options", "word"), [
    ({"slicing": "flat"}, "slicing='flat'"), ({"slicing": "patch", "patch_size": 2}, "slicing='patch'"),
    ({"domain": "feature"}, "domain='feature'"),
])  # fmt: skip
def test_what_the_kernels_do_not_compute_is_said(options, word, device):
    x, y = maps(1, 1, 2, 4, 5, device)
    config = SlicingConfig(num_projections=2, **options)
    target = sort_target(y, config=config)
    assert word in unsupported(target)
    with pytest.raises(ValueError, match="backend 'triton' cannot run: the kernels compute the channel reading"):
        sliced_terms(x, target, True)
    with pytest.raises(ValueError, match=r"compute in torch\.float32, and the target is torch\.float64"):
        sliced_terms(x.double(), sort_target(y.double(), num_projections=2), True)
    with pytest.raises(TypeError, match=r"x must be torch\.float32, got torch\.float16"):
        sliced_terms(x.half(), sort_target(y, num_projections=2), True)


def test_environment_chooses_method_and_precision(monkeypatch, device):
    x, y = maps(1, 1, 2, 4, 5, device)
    target = sort_target(y, num_projections=2)
    monkeypatch.setenv("VCD_FAST_TRITON_METHOD", "radix")
    with pytest.raises(ValueError, match="method must be one of"):
        sliced_terms(x, target, True)
    monkeypatch.setenv("VCD_FAST_TRITON_METHOD", "merge")
    monkeypatch.setenv("VCD_FAST_TRITON_PRECISION", "fp8")
    with pytest.raises(ValueError, match="precision must be one of"):
        sliced_terms(x, target, True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for machines without a GPU")
@pytest.mark.parametrize("variable", ["VCD_FAST_INTERPRET", None])
def test_a_process_of_its_own(variable):
    """With the variable the kernels run on the CPU; without it they say why not. Neither import touches triton."""
    program = """
import sys, torch, vcd_fast
assert "triton" not in sys.modules, "imported by vcd_fast"
from vcd_fast.distance.backends.triton_fused import sliced_terms
from vcd_fast.distance.target import sort_target
x = torch.rand(1, 2, 2, 3)
print(sliced_terms(x, sort_target(x.flip(3), num_projections=1), False)[0].isfinite().all().item())
"""
    environment = {
        key: value for key, value in os.environ.items() if key not in ("TRITON_INTERPRET", "VCD_FAST_INTERPRET")
    }
    if variable:
        environment[variable] = "1"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment, cwd=ROOT, check=False
    )
    if variable:
        assert done.stdout == "True\n", done.stderr
    else:
        assert "backend 'triton' cannot run: the tensors are on the CPU" in done.stderr
