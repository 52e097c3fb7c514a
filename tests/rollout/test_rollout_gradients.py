"""From pixels to LoRA: gradients are those of finite differences."""

import pytest
import torch

from vcd_fast.models.lora import lora_parameters
from vcd_fast.rollout.sampler import rollout, run

FRAMES = [0, 3, 7]


@pytest.fixture(scope="module")
def start(model, condition):
    return condition, model.initial(condition, [torch.Generator().manual_seed(0)]), model.schedule(4, 32, 32, 9)


@pytest.fixture(scope="module")
def weights():
    return torch.randn(1, len(FRAMES), 3, 32, 32, generator=torch.Generator().manual_seed(4))


def loss_of(video, weights):
    """Not linear in the pixels, and seen by every one of them."""
    return ((video + 0.1 * weights) ** 2 * (1 + 0.2 * weights)).double().sum()


@pytest.mark.parametrize(("backprop", "checkpointing"), [("all", "both"), ("all", "none")])
def test_directional_derivative_from_pixels_to_lora(model, start, weights, plan, backprop, checkpointing):
    """The whole chain, in the three phases of training, against central differences within 2 %."""
    condition, state, schedule = start
    parameters = lora_parameters(model)

    result = run(model, condition, state, schedule, plan(backprop, checkpointing=checkpointing))
    latents = result.latents.requires_grad_()
    (gradient,) = torch.autograd.grad(loss_of(model.decode(latents, FRAMES), weights), latents)
    for surrogate in result.surrogates(gradient):
        surrogate.backward()
    found = {name: p.grad.clone() for name, p in parameters.items()}
    model.transformer.zero_grad(set_to_none=True)
    assert all(bool((value != 0).any()) for value in found.values())

    generator = torch.Generator().manual_seed(6)
    for _ in range(2):
        # Half along the gradient, so that the derivative stands out of float32's rounding.
        norm = torch.cat([g.flatten() for g in found.values()]).norm()
        noise = {name: torch.randn(g.shape, generator=generator) for name, g in found.items()}
        size = torch.cat([n.flatten() for n in noise.values()]).norm()
        direction = {name: found[name] / norm + noise[name] / size for name in found}
        expected = sum(float((found[name] * direction[name]).sum()) for name in found)
        ends = []
        for sign in (1, -1):
            with torch.no_grad():
                for name, parameter in parameters.items():
                    parameter.add_(direction[name], alpha=sign * 0.02)
                moved = rollout(model, condition, state, schedule, plan(backprop))
                ends.append(float(loss_of(model.decode(moved, FRAMES), weights)))
                for name, parameter in parameters.items():
                    parameter.sub_(direction[name], alpha=sign * 0.02)
        assert (ends[0] - ends[1]) / 0.04 == pytest.approx(expected, rel=0.02)


def test_directional_derivative_of_the_last_step_alone(model, start, weights, plan):
    """last:1 is the exact gradient of the last step's own map: x_{N-1} held fixed, finite differences see only it."""
    condition, state, schedule = start
    parameters = lora_parameters(model)
    with torch.no_grad():
        for step in list(schedule)[:-1]:
            state = model.advance(state, model.velocity(state, step, condition), step)
    last = type(schedule)((schedule[-1],))

    def loss():
        moved = model.advance(state, model.velocity(state, last[0], condition), last[0])
        return loss_of(model.decode(moved.latents, FRAMES), weights)

    condition, begin, schedule = start
    result = run(model, condition, begin, schedule, plan("last:1"))
    latents = result.latents.requires_grad_()
    (gradient,) = torch.autograd.grad(loss_of(model.decode(latents, FRAMES), weights), latents)
    for surrogate in result.surrogates(gradient):
        surrogate.backward()
    found = {name: p.grad.clone() for name, p in parameters.items()}
    model.transformer.zero_grad(set_to_none=True)
    norm = torch.cat([g.flatten() for g in found.values()]).norm()
    ends = []
    for sign in (1, -1):
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.add_(found[name] / norm, alpha=sign * 0.02)
            ends.append(float(loss()))
            for name, parameter in parameters.items():
                parameter.sub_(found[name] / norm, alpha=sign * 0.02)
    assert (ends[0] - ends[1]) / 0.04 == pytest.approx(float(norm), rel=0.02)


@pytest.mark.parametrize(
    "settings",
    [
        {"decode_context": "truncated"},
        {"decode_checkpointing": "resnet"},
        {"frozen_conv": False},
        {"guidance_gradient": "conditional"},
    ],
)
def test_every_option_of_the_model_reaches_the_lora(make_model, start, weights, plan, settings):
    condition, state, schedule = start
    reference, other = make_model(), make_model(**settings)
    found = []
    for model in (reference, other):
        video = model.decode(rollout(model, condition, state, schedule, plan("last:2")), FRAMES)
        loss_of(video, weights).backward()
        found.append((video.detach(), {name: p.grad for name, p in lora_parameters(model).items()}))
    assert torch.equal(found[0][0], found[1][0])
    assert all(bool((g != 0).any()) for g in found[1][1].values())
    exact = "decode_context" not in settings and "guidance_gradient" not in settings
    assert all(torch.equal(g, found[1][1][name]) for name, g in found[0][1].items()) == exact
