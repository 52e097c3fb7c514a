"""What is counted on the meta device is what a run of the same models takes."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

from vcd_fast.config import compose
from vcd_fast.models.base import family
from vcd_fast.models.lora import add_lora
from vcd_fast.rewards.base import RewardOutput
from vcd_fast.rollout.sampler import run
from vcd_fast.training.estimate import GIB, OPTIONS, estimate, fits, next_option
from vcd_fast.training.estimate.resident import resident
from vcd_fast.training.estimate.simulate import Watch, count_window, follow
from vcd_fast.training.estimate.stand_ins import FLOAT32, LOWER
from vcd_fast.training.estimate.tracker import MemoryTracker, SavedTensors
from vcd_fast.training.step import Batch, micro_step

pytestmark = pytest.mark.filterwarnings("ignore:.*random:UserWarning")

DATA = {"data": {"pictures": "."}}
CASES = {
    "wan": ("wan", {}),
    "wan-whole-bfloat16": (
        "wan",
        {
            "rollout": {"checkpointing": "none"},
            "model": {"dtype": "bfloat16", "vae_dtype": "bfloat16", "decode_checkpointing": "resnet"},
        },
    ),
    "wan-steps": ("wan", {"rollout": {"checkpointing": "both", "backprop": "last:2"}, "model": {"frozen_conv": False}}),
    "opensora": ("opensora", {"model": {"dtype": "bfloat16"}}),
    "opensora-spaced": ("opensora", {"rollout": {"backprop": "spaced:2"}, "model": {"guidance_passes": "separate"}}),
}


def configured(name, preset, changes):
    return compose(name, preset, DATA, {"reward": {"frames_per_step": 2}}, changes)


class Bright:
    """A reward without a network, which looks at the frames that the estimate takes for the most expensive ones."""

    def frames_wanted(self, num_frames, generator):
        last = num_frames - 1
        return torch.tensor([last - last // 2, last])

    def __call__(self, inputs):
        return RewardOutput(inputs.video.flatten(1).square().sum(1), {})


class Real:
    """A model on the CPU and what a step of it needs."""

    def __init__(self, config, chosen):
        package = family(config.family)
        self.config, self.model = config, package.load_model(config.model)
        self.parameters = list(add_lora(self.model, config.lora, seed=0).values())
        for parameter in self.parameters:
            parameter.grad = torch.zeros_like(parameter)
        shapes = package.shaped_condition(package.shaped_model(config.model), 1)
        tensors = {name: torch.randn(value.shape).to(value.dtype) for name, value in shapes._tensors().items()}
        image = torch.rand(1, 3, config.model.height, config.model.width)
        draws = [torch.Generator()]
        self.batch = Batch(dataclasses.replace(shapes, **tensors), image, [""], draws, draws, torch.Generator(), 0)
        size = config.model.height, config.model.width, config.model.num_frames
        self.schedule = self.model.schedule(chosen + 1, *size)
        self.plan = dataclasses.replace(config.rollout.plan(), kind="last", count=chosen)
        self.weights = [t for m in (self.model.transformer, self.model.vae) for t in (*m.parameters(), *m.buffers())]

    def forward(self, **inputs):
        dtype = getattr(torch, self.config.model.dtype)
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):  # what the engine does
            return self.model.transformer(**inputs)

    def follow(self) -> Watch:
        watch = Watch(self.model)
        inputs = [*self.batch.condition._tensors().values(), self.batch.image, *(p.grad for p in self.parameters)]
        watch.tracker.ignore([*self.weights, *inputs])
        forward = watch.forward(self.forward)
        with watch.tracker:
            arguments = (self.model, forward, torch.Tensor.backward, self.schedule, self.plan, Bright(), self.batch)
            micro_step(*arguments, scale=1.0, agree=lambda flag: flag, clock=watch.clock)
        return watch

    def saved(self) -> tuple[dict[str, int], int]:
        """Bytes that autograd's own hooks are handed, by half of the step; and those of a clip's latents."""
        model, condition = self.model, self.batch.condition
        window, decode = SavedTensors(self.weights), SavedTensors(self.weights)
        with window.counting():
            state = model.initial(condition, self.batch.noise)
            rollout = run(model, condition, state, self.schedule, self.plan, forward=self.forward)
        leaf = rollout.latents.requires_grad_()
        with decode.counting():
            video = model.decode(leaf, Bright().frames_wanted(self.config.model.num_frames, None).tolist())
        assert video.requires_grad
        decode.add(video)  # results are kept, too
        return {"window": window.nbytes, "decode": decode.nbytes}, leaf.nbytes


@pytest.mark.parametrize("case", CASES)
def test_estimates_are_what_a_run_takes(case):
    name, changes = CASES[case]
    config = configured(name, "tiny", changes)
    chosen = 2 if config.rollout.backprop == "last:2" else 1
    counted = follow(config, chosen=chosen, device="cpu")
    real = Real(config, chosen)
    seen = real.follow().tracker.peaks
    for phase in ("rollout", "decode", "backward"):
        wanted = sum(seen[phase].values())
        assert sum(counted.peaks[phase].values()) == pytest.approx(wanted, rel=0.05), phase
    saved, latents = real.saved()
    assert counted.saved["decode"] == pytest.approx(saved["decode"], rel=0.05)
    # beside what autograd is handed, the latents on the way are alive: a few thousand numbers, here as much as a tensor of a block
    assert 0.95 * saved["window"] <= counted.saved["window"] <= 1.05 * saved["window"] + 3 * latents


def test_a_tracker_sees_what_lives_and_what_is_gone():
    tracker = MemoryTracker()
    weight = torch.zeros(64, 64, requires_grad=True)
    tracker.ignore([weight])
    with tracker:
        with tracker.phase("first"):
            x = torch.zeros(16, 64)
            y = (x @ weight).exp()  # one of the two is gone
            y.view(-1)
        with tracker.phase("second"):
            y.sum().backward()
    row = 16 * 64 * 4
    assert tracker.peaks["first"] == {"tensors": 3 * row}
    assert sum(tracker.peaks["second"].values()) >= 64 * 64 * 4 + 2 * row
    del x, y
    assert tracker.alive["tensors"] == weight.grad.nbytes


def test_more_steps_are_extrapolated_exactly():
    config = configured("wan", "tiny", {"rollout": {"backprop": "all", "sampling_steps": 5}})
    counted, direct = count_window(config), follow(config, chosen=5, judged=False)
    for phase in ("rollout", "backward"):
        assert sum(counted.peaks[phase].values()) == pytest.approx(sum(direct.peaks[phase].values()), rel=0.01)
    assert counted.saved["window"] == pytest.approx(direct.saved["window"], rel=0.01)


def test_more_blocks_are_extrapolated_exactly():
    config = compose("wan", "1.3b", DATA)
    counted, direct = count_window(config), follow(config, judged=False)
    assert counted.lora == direct.lora == 23_592_960
    for phase in ("rollout", "backward"):
        assert sum(counted.peaks[phase].values()) == pytest.approx(sum(direct.peaks[phase].values()), rel=0.005)


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_autocast_knows_the_operators_as_pytorch_does(device):
    key = {"cuda": "AutocastCUDA", "cpu": "AutocastCPU"}[device]

    def registered(name):
        overloads = (f"aten::{name}", f"aten::{name}.Tensor_Scalar", f"aten::{name}.input")
        return any(torch._C._dispatch_has_kernel_for_dispatch_key(op, key) for op in overloads if _exists(op))

    assert {name for name in LOWER | FLOAT32["cuda"] if registered(name)} >= LOWER - {"mv", "addmv"} | FLOAT32[device]
    assert not any(registered(name) for name in FLOAT32["cuda"] - FLOAT32[device])


def _exists(operator):
    name, _, overload = operator.partition(".")
    return bool(torch._C._jit_get_operation(name)[0]) and overload in torch._C._jit_get_operation(name)[1]


def test_the_published_models_are_known_without_their_files():
    counts = {}
    for preset in ("1.3b", "14b-480p"):
        transformer = family("wan").shaped_model(compose("wan", preset, DATA).model).transformer
        counts[preset] = sum(parameter.numel() for parameter in transformer.parameters())
    assert counts == {"1.3b": 1_564_428_608, "14b-480p": 16_394_878_784}
    assert family("wan").encoder_bytes(compose("wan", "1.3b", DATA).model)["text encoder"] / GIB == pytest.approx(
        10.58, abs=0.02
    )


# --- what the estimates say --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "gigabytes"), [*itertools.product(("wan", "opensora"), (12, 24, 80))])
def test_presets_fit_what_they_are_named_after(name, gigabytes):
    found = estimate(compose(name, f"{gigabytes}gb", DATA))
    assert found.needed <= gigabytes * GIB
    assert found.needed > 0.5 * gigabytes * GIB, "there would be room for something better"


def test_the_paper_s_settings():
    wan = estimate(compose("wan", "12gb", DATA))
    assert all(phase.total < 12e9 for phase in wan.phases)
    assert all(phase.total < 14e9 for phase in estimate(compose("opensora", "240p", DATA)).phases)
    every = estimate(compose("wan", "12gb", DATA, {"rollout": {"backprop": "all"}}))
    assert wan.step_peak.total < every.step_peak.total < wan.step_peak.total + 2e9
    assert every.phase("backward").total < wan.phase("backward").total + 2e9
    assert estimate(compose("wan", "14b-480p", DATA)).needed < 80e9


def test_gpus_divide_what_they_divide():
    def at(stage, gpus):
        config = configured("wan", "tiny", {"training": {"zero": stage}})
        return resident(config, 3072, gpus)

    alone = at(0, 1)
    assert (alone.lora, alone.gradients, alone.optimizer) == (4 * 3072, 4 * 3072, 8 * 3072)
    assert at(0, 4) == alone
    assert at(1, 4).optimizer == 3 * 3072
    assert at(1, 4).transformer == alone.transformer
    assert at(2, 4).gradients == at(1, 4).gradients - 3 * 3072
    assert at(3, 4).transformer == alone.transformer // 4
    assert at(3, 4).gathered > alone.transformer
    assert at(3, 1).gathered == 0
    with pytest.raises(ValueError, match="gpus: expected at least 1, got 0"):
        estimate(configured("wan", "tiny", {}), 0)


def test_advice_goes_as_far_as_it_has_to():
    config = configured("wan", "tiny", {"rollout": {"checkpointing": "none"}})
    assert [(fit.fits, fit.options) for fit in fits(config)] == [(True, ())] * 5
    option, after = next_option(config, 1, "backward")
    assert option.flag == "--checkpointing block"
    assert after.phase("backward").total < estimate(config).phase("backward").total
    (small,) = fits(config, budgets=[0])
    assert not small.fits
    flags = [taken.flag for taken in small.options]
    assert flags == [option.flag for option in OPTIONS if option.flag in flags]
    assert flags[0] == "--checkpointing block"
    assert "--vae-dtype bfloat16" in flags


def test_quantized_weights_are_counted_as_they_are():
    sizes = {
        kind: resident(configured("wan", "tiny", {"model": {"quantization": kind}}), 3072, 1)
        for kind in ("none", "int8", "nf4")
    }
    assert sizes["none"].transformer > sizes["int8"].transformer > sizes["nf4"].transformer
    transformer = family("wan").shaped_model(configured("wan", "tiny", {}).model).transformer
    linear = sum(m.weight.numel() for m in transformer.blocks.modules() if isinstance(m, torch.nn.Linear))
    assert sizes["none"].transformer - sizes["int8"].transformer == 3 * linear
    assert sizes["none"].transformer - sizes["nf4"].transformer == pytest.approx((4 - 0.516) * linear, rel=1e-3)


def test_options_that_exclude_each_other_are_not_advised():
    config = configured("wan", "tiny", {"rollout": {"offload": "window"}})
    found = next_option(config, 1, "rollout")
    assert found is None or found[0].value not in ("step", "both")


def test_offloading_leaves_no_graph_on_the_gpu():
    config = configured("wan", "tiny", {})
    offloaded = configured("wan", "tiny", {"rollout": {"offload": "both"}})
    before, after = estimate(config), estimate(offloaded)
    assert after.saved["window"] < 0.3 * before.saved["window"]
    assert after.saved["decode"] < 0.3 * before.saved["decode"]
