"""The plain formulas against published values, and the gate: right answers pass, wrong ones do not."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from benchmarks import gate, inputs, plain, providers
from benchmarks.accuracy import Accuracy
from benchmarks.cases import QUICK_SIZE, SIZE, Case
from benchmarks.operations import operation

CPU = torch.device("cpu")
GOLDENS = Path(__file__).parents[1] / "goldens" / "distance"
LAYER = Case("layer", "both", QUICK_SIZE, 8, layer="relu3_1")
PATCHES = Case("layer", "both", QUICK_SIZE, 8, "fdl", layer="relu3_1")
VIDEO = Case("video", "both", (32, 48), 8)


@pytest.mark.parametrize("name", ["swd_patch5", "swd_patch3_odd", "swd_even", "swd_odd_even", "swd_wide"])
def test_plain_formula_gives_the_published_values_and_gradients(name):
    golden = load_file(GOLDENS / f"{name}.safetensors")
    filters = golden["projections"].double()
    filters = filters if filters.ndim == 4 else filters[..., None, None]
    x = golden["x"].double().requires_grad_()
    value = plain.sliced_wasserstein(x, golden["y"].double(), filters)
    torch.testing.assert_close(value, golden["amplitude"] + golden["phase"], rtol=1e-12, atol=0)
    (gradient,) = torch.autograd.grad(value.sum(), x)
    want = golden["grad_amplitude"] + golden["grad_phase"]
    assert (gradient - want).norm() <= 1e-11 * want.norm()


@pytest.mark.parametrize(
    ("case", "provider"),
    [
        (LAYER, "eager"),
        (LAYER, "reference"),
        (LAYER, "simd"),
        (PATCHES, "published"),
        (PATCHES, "simd"),
        (VIDEO, "eager"),
        (VIDEO, "simd"),
    ],
    ids=lambda value: value.name if isinstance(value, Case) else value,
)
def test_providers_agree(case, provider):
    if reason := providers.why_not(provider, case, CPU):
        pytest.skip(reason)
    found = gate.accuracy(provider, case, CPU, "random")
    assert found.problems() == []
    assert found.cosine > 0.9999
    assert found.reference_gradient_error > 0  # float32 is compared with float64, not with itself


def test_plain_formula_and_reference_agree_in_float64():
    answers = [
        gate._answer(name, gate.gate_case(LAYER), CPU, "random", torch.float64) for name in ("eager", "reference")
    ]
    for plain_one, ours in zip(*answers, strict=True):
        assert gate.relative_error(plain_one, ours) < 1e-11


@pytest.mark.parametrize("mistake", ["phase dropped", "self-conjugate bins dropped", "gradient halved", "NaN"])
def test_a_wrong_answer_is_not_timed(mistake, monkeypatch):
    right = providers.layer_workload

    def wrong(provider, case, given):
        work = right("reference", case, given)
        if provider != "wrong":
            return work

        def loss(_):
            z = torch.fft.rfft2(work.variable), torch.fft.rfft2(given.y)
            parts = (torch.abs,) if mistake == "phase dropped" else (torch.abs, torch.angle)
            if mistake == "self-conjugate bins dropped":
                z = [value[..., 1:-1] for value in z]
            total = 0.0
            for part in parts:
                a, b = ((given.filters.flatten(1) @ part(value).flatten(2)).sort(-1).values for value in z)
                total = total + (a - b).abs().mean()
            return total * math.nan if mistake == "NaN" else total

        if mistake == "gradient halved":

            def loss(target):
                value = work.loss(target)
                return (value + value.detach()) / 2

        return providers.Workload(work.variable, work.prepare, loss)

    monkeypatch.setattr(providers, "layer_workload", wrong)
    gate._accuracy.cache_clear()
    assert gate.accuracy("wrong", LAYER, CPU, "random").problems()
    gate._accuracy.cache_clear()


def test_bounds():
    good = Accuracy("x", 1e-6, 4e-3, 0.99999, 1e-7, 2.1e-3, 1e-3)
    assert good.problems() == []
    assert len(Accuracy("x", 2e-5, 5e-3, 0.9998, 1e-7, 2.1e-3, 1e-3).problems()) == 3
    assert Accuracy("x", 1e-6, 1e-3, 0.99999, 1e-7, 1e-6, 1e-3).problems() == []  # one swapped pair
    assert len(Accuracy("x", 1e-3, 0.1, 0.99, 1e-3, 0.06, 1e-3).problems("float32")) == 2
    assert Accuracy("x", 1e-3, 0.1, 0.99, 1e-3, 0.06, 1e-3).problems("bfloat16") == []


def test_the_gate_takes_the_whole_map_and_fewer_directions():
    found = gate.gate_case(Case("layer", "no_grad", SIZE, 256, layer="relu1_1"))
    assert (found.mode, found.size, found.num_projections) == ("both", SIZE, 16)
    found = gate.gate_case(Case("video", "both", SIZE, 32, frames=24))
    assert (found.frames, found.size, found.num_projections) == (1, (144, 192), 32)


@pytest.mark.parametrize("size", [(6, 8), (5, 8), (5, 7), (1, 4), (4, 1)])
def test_the_impulse_makes_self_conjugate_bins_positive(size):
    maps = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0)).relu()
    spectrum = torch.fft.fft2(maps + gate.offset(maps)).real
    rows = [0] if size[0] % 2 else [0, size[0] // 2]
    columns = [0] if size[1] % 2 else [0, size[1] // 2]
    assert all((spectrum[..., i, j] > 0).all() for i in rows for j in columns)


@pytest.mark.parametrize("mode", ["both", "no_grad", "forward", "backward", "prepare"])
def test_rounds_can_be_repeated(mode):
    work = providers.workload("reference", LAYER, CPU, "random")
    step = operation(work, mode)
    for _ in range(2):
        step.before()
        step.run()
        assert (work.variable.grad is not None) == (mode in ("both", "backward"))


def test_the_clip_moves():
    video = inputs.clip(3, (32, 48), CPU)
    assert video.shape == (1, 4, 3, 32, 48)
    assert 0 <= video.min() < video.max() <= 1
    moved = video[0, 0, :, inputs.STEP[0] :, inputs.STEP[1] :], video[0, 1, :, : -inputs.STEP[0], : -inputs.STEP[1]]
    assert (moved[0] - moved[1]).abs().mean() < 0.01 < (video[0, 0] - video[0, 1]).abs().mean()
