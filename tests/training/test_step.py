"""The three phases of a micro-step, without an engine: what reaches the LoRA is the derivative of the reward."""

import dataclasses
import math

import pytest
import torch

from vcd_fast.models.base import Schedule
from vcd_fast.models.lora import LoRASettings, add_lora
from vcd_fast.models.wan import ModelSettings, load_encoder, load_model
from vcd_fast.rewards.base import RewardInput, RewardOutput
from vcd_fast.rewards.vcd import VCDReward, VCDRewardSettings
from vcd_fast.rollout import offload
from vcd_fast.rollout.plan import RolloutSettings
from vcd_fast.training.randomness import indexed_generator
from vcd_fast.training.step import Batch, PhaseClock, micro_step

pytestmark = pytest.mark.filterwarnings("ignore:.*random:UserWarning")

SIZE = {"height": 32, "width": 48, "num_frames": 5}
STEPS = 3


@dataclasses.dataclass
class Setting:
    model: object
    parameters: dict
    condition: object
    image: torch.Tensor
    reward: VCDReward
    schedule: Schedule


@pytest.fixture(scope="module")
def setting():
    # Amplitudes alone: a phase jumps where it passes pi, which a finite difference sees and a derivative rightly does not.
    rewarded = VCDRewardSettings(distance="vcd_amp", vgg19="random", num_projections=32, frames_per_step=2)
    settings = ModelSettings(weights="tiny-random", dtype="float32", guidance_scale=2.0, **SIZE)
    model, reward = load_model(settings), VCDReward(rewarded)
    coarse = torch.rand(1, 3, 4, 6, generator=torch.Generator().manual_seed(0))
    image = torch.nn.functional.interpolate(coarse, (32, 48), mode="bicubic").clamp(0, 1)
    condition = load_encoder(settings).encode(image, ["a cat runs"], [""], *SIZE.values())
    parameters = add_lora(model, LoRASettings(rank=4, alpha=4), seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():  # at B = 0 half of the gradient vanishes
        for name, parameter in parameters.items():
            if "lora_B" in name:
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    schedule = model.schedule(STEPS, SIZE["height"], SIZE["width"], SIZE["num_frames"])
    return Setting(model, parameters, condition, image, reward, schedule)


def batch(setting, step=0):
    generators = {"frames": [indexed_generator(0, "frames", step)], "window": indexed_generator(0, "window", step)}
    noise = [indexed_generator(0, "noise", step)]
    return Batch(setting.condition, setting.image, ["a cat runs"], noise, step=step, **generators)


def run(setting, *, reward=None, backprop="all", agree=lambda flag: flag, scale=1.0, **rollout):
    for parameter in setting.parameters.values():
        parameter.grad = None
    calls = []

    def backward(loss):
        calls.append(loss.item())
        loss.backward()

    plan = RolloutSettings(sampling_steps=STEPS, backprop=backprop, **rollout).plan()
    clock = PhaseClock(torch.device("cpu"))
    done = micro_step(
        setting.model,
        setting.model.transformer,
        backward,
        setting.schedule,
        plan,
        reward or setting.reward,
        batch(setting),
        scale=scale,
        agree=agree,
        clock=clock,
    )
    gradients = {name: None if p.grad is None else p.grad.clone() for name, p in setting.parameters.items()}
    return done, gradients, calls


def test_the_gradient_is_the_derivative_of_the_reward(setting):
    """Pixels to LoRA, sampler, decoder, VGG19, FFT and sort between: directional derivatives within 2 % of finite differences."""
    done, gradients, _ = run(setting)
    assert done.finite
    assert all(gradient.abs().max() > 0 for gradient in gradients.values())
    generator = torch.Generator().manual_seed(7)
    direction = {name: torch.randn(p.shape, generator=generator) for name, p in setting.parameters.items()}
    # along the gradient, so that what is measured is large against rounding, and a random part, so that it is not only that
    direction = {n: g / g.norm() + 0.1 * direction[n] / direction[n].norm() for n, g in gradients.items()}
    analytic = sum((gradients[name] * direction[name]).sum() for name in gradients).item()
    epsilon, values = 1e-3, []
    for sign in (1, -1):
        with torch.no_grad():
            for name, parameter in setting.parameters.items():
                parameter.add_(direction[name], alpha=sign * epsilon)
        values.append(-run(setting, backprop="last:1")[0].reward.item())
        with torch.no_grad():
            for name, parameter in setting.parameters.items():
                parameter.sub_(direction[name], alpha=sign * epsilon)
    numeric = (values[0] - values[1]) / (2 * epsilon)
    assert analytic == pytest.approx(numeric, rel=0.02)


def test_scale_is_a_factor(setting):
    whole, half = run(setting)[1], run(setting, scale=0.5)[1]
    for name in whole:
        torch.testing.assert_close(half[name], whole[name] / 2, rtol=1e-4, atol=1e-9)


def test_spaced_plans_make_several_backward_passes(setting):
    assert len(run(setting, backprop="last:2")[2]) == 1
    assert len(run(setting, backprop="spaced:2")[2]) == 2


@pytest.mark.parametrize("where", ["window", "decode", "both"])
def test_what_is_offloaded_comes_back_as_it_was(setting, where, monkeypatch):
    copies, original = [], offload._to_host
    monkeypatch.setattr(offload, "_to_host", lambda tensor: copies.append(tensor.shape) or original(tensor))
    expected = run(setting)[1]
    assert not copies
    found = run(setting, offload=where)[1]
    assert copies
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    in_pixels = any(shape[-2:] == (32, 48) for shape in copies)  # inputs of the decoder's last layers, or its caches
    assert in_pixels == (where != "window")


class BrokenReward(VCDReward):
    """Finite value or not, gradient or not."""

    def __init__(self, value: float, slope: float):
        self.settings = VCDRewardSettings(vgg19="random")
        self.value, self.slope = value, slope

    def __call__(self, inputs: RewardInput) -> RewardOutput:
        flat = inputs.video.mean(dim=(1, 2, 3, 4))
        return RewardOutput(torch.full_like(flat, self.value) + self.slope * (flat - flat.detach()), {})


@pytest.mark.parametrize(("value", "slope"), [(math.nan, 1.0), (math.inf, 1.0), (0.0, math.nan)])
class TestNotFinite:
    def test_nothing_is_propagated(self, setting, value, slope):
        done, gradients, calls = run(setting, reward=BrokenReward(value, slope))
        assert not done.finite
        assert not calls
        assert all(gradient is None for gradient in gradients.values())


def test_another_rank_may_be_the_one_that_is_not_finite(setting):
    done, gradients, _ = run(setting, agree=lambda flag: False)
    assert not done.finite
    assert all(gradient is None for gradient in gradients.values())
