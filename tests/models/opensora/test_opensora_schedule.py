"""Times, noising and the placing of conditioning frames, against numbers of the original code."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from vcd_fast.models.base import Step
from vcd_fast.models.opensora.conditioning import Placement, _start, parse_strategy, place
from vcd_fast.models.opensora.schedule import (
    OpenSoraState,
    active_frames,
    add_noise,
    advanced,
    flow_schedule,
    network_input,
    shift_ratio,
    shifted,
)

SIZES = ["272x368x51", "276x368x51", "240x426x51", "480x854x102", "512x512x1", "144x256x17"]


@pytest.mark.parametrize("steps", [4, 30])
@pytest.mark.parametrize("size", SIZES)
def test_timesteps_are_bit_for_bit_those_of_the_original(size, steps, golden):
    case = golden("rflow_timesteps")
    height, width, frames = map(int, size.split("x"))
    name = f"{size}.float32.steps{steps}.shift"
    schedule = flow_schedule(steps, height, width, frames)
    assert torch.equal(torch.tensor([step.timestep for step in schedule]), case.tensors[name])
    assert shift_ratio(height, width, frames).item() == case.meta["meta"][name]["ratio"]
    assert [step.index for step in schedule] == list(range(steps))
    assert sum(step.dt for step in schedule) == pytest.approx(1, abs=1e-6)
    assert all(step.sigma == pytest.approx(step.timestep / 1000) for step in schedule)


def test_default_setting_ends_with_a_step_that_gradients_pass():
    schedule = flow_schedule(30, 276, 368, 51)
    assert schedule[0].timestep == 1000
    assert schedule[29].dt == pytest.approx(0.0767, abs=1e-4)


def test_shift_of_training_times(golden):
    tensors = golden("rflow_timesteps").tensors
    for scale in (1.0, 0.5):
        found = shifted(tensors["train.t"], shift_ratio(272, 368, 51) * scale)
        torch.testing.assert_close(found, tensors[f"train.out_scale{scale:g}"], rtol=1e-6, atol=0)


def test_noising_and_the_sign_of_the_velocity(golden):
    """The original's training loss of a known network: mean over generated frames of (v - (x - noise))^2."""
    tensors = golden("rflow_timesteps").tensors
    x, noise = tensors["addnoise.x0"], tensors["addnoise.noise"]
    sigma = (tensors["addnoise.t"] / 1000).view(-1, 1, 1, 1, 1)
    torch.testing.assert_close(add_noise(x, noise, sigma), tensors["addnoise.out"], rtol=1e-6, atol=1e-6)

    mask, times = tensors["loss.mask"].bool(), tensors["loss.t"]
    generated = mask[:, None, :, None, None]
    noisy = torch.where(generated, add_noise(x, noise, (times / 1000).view(-1, 1, 1, 1, 1)), x)
    network = 0.3 * noisy + (times / 1000).view(-1, 1, 1, 1, 1)
    errors = (network - (x - noise)).square().mean(dim=(1, 3, 4))
    torch.testing.assert_close((errors * mask).sum(1) / mask.sum(1), tensors["loss.out"], rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("arguments", "message"), [((0, 276, 368, 51), "sampling_steps"), ((30, 276, 368, 16), "num_frames")]
)
def test_schedules_that_cannot_be(arguments, message):
    with pytest.raises(ValueError, match=f"{message}: expected"):
        flow_schedule(*arguments)


# --- placing references ------------------------------------------------------------------------------------------------------------


def test_strategies_place_references_as_in_the_original(golden):
    case = golden("mask_strategy")
    references = [case.tensors[name][None] for name in ("ref0", "ref1")]
    checked = 0
    for name, expected in case.meta["meta"].items():
        placements = parse_strategy(expected["strategy"])
        assert [list(placement) for placement in placements] == expected["parsed"]
        _, align, loop = name.split(".")
        if loop != "loop0":  # a second loop is not offered
            continue
        empty = case.tensors["s0.alignNone.loop0.z"]
        latents, edit = place(empty, references, placements, None if align == "alignNone" else 5)
        assert torch.equal(latents, case.tensors[f"{name}.z"]), name
        assert torch.equal(edit, case.tensors[f"{name}.mask"]), name
        assert edit[0].tolist() == expected["mask"]
        checked += 1
    assert checked == 20


def test_alignment_of_starts(golden):
    for key, expected in golden("mask_strategy").meta["nearest"].items():
        value, align, frames = map(int, key.split(","))
        if value < frames:  # a start behind the clip is an error here
            assert _start(value, frames, align) == expected, key


def test_placements_leave_their_input_alone():
    latents = torch.zeros(2, 4, 15, 2, 3)
    place(latents, [torch.ones(2, 4, 1, 2, 3)], [Placement()])
    assert not latents.any()


@pytest.mark.parametrize("text", ["x", "0,0,0,0,1,0,7", "0,0.5", "0,0,0,0,0", "0,0,0,0,1,1.5"])
def test_strategies_that_cannot_be_read(text):
    with pytest.raises(ValueError, match="mask_strategy: expected"):
        parse_strategy(text)


@pytest.mark.parametrize("text", ["0,1", "0,0,0,15", "0,0,-2"])
def test_placements_outside_of_clip_and_references(text):
    with pytest.raises(ValueError, match="mask_strategy: expected"):
        place(torch.zeros(1, 4, 15, 2, 3), [torch.zeros(1, 4, 1, 2, 3)], parse_strategy(text))


# --- the rule of the state ---------------------------------------------------------------------------------------------------------


def state_of(edit: list[float], noise: bool = True) -> OpenSoraState:
    generator = torch.Generator().manual_seed(0)
    shape = (1, 4, len(edit), 2, 2)
    ratios = torch.tensor([edit])
    return OpenSoraState(
        torch.randn(shape, generator=generator),
        ratios,
        ratios == 1,
        torch.randn(shape, generator=generator) if noise else None,
    )


def step_at(timestep: float) -> Step:
    return Step(0, timestep, timestep / 1000, 0.25)


def test_a_frame_is_noised_once_and_generated_from_then_on():
    state = state_of([0.0, 0.4, 1.0])
    velocity = torch.ones_like(state.latents)
    early = advanced(state, velocity, step_at(700))
    assert active_frames(state, step_at(700)).tolist() == [[False, False, True]]
    assert torch.equal(early.latents[:, :, :2], state.latents[:, :, :2])
    assert torch.equal(early.latents[:, :, 2], state.latents[:, :, 2] + 0.25)

    noised = network_input(early, step_at(300))
    assert torch.equal(noised[:, :, 1], 0.7 * state.latents[:, :, 1] + 0.3 * state.noise[:, :, 1])
    assert torch.equal(noised[:, :, 2], early.latents[:, :, 2])
    later = advanced(early, velocity, step_at(300))
    assert torch.equal(later.latents[:, :, 1], noised[:, :, 1] + 0.25)
    assert torch.equal(network_input(later, step_at(100)), later.latents), "not a second time"
    assert torch.equal(later.latents[:, :, 0], state.latents[:, :, 0])


def test_frames_that_are_kept_take_no_gradient():
    state = state_of([0.0, 1.0], noise=False)
    velocity = torch.zeros_like(state.latents).requires_grad_()
    advanced(state, velocity, step_at(500)).latents.sum().backward()
    assert not velocity.grad[:, :, 0].any()
    assert torch.equal(velocity.grad[:, :, 1], torch.full((1, 4, 2, 2), 0.25))


def test_state_is_not_changed():
    state = state_of([0.0, 0.4, 1.0])
    before = {f.name: getattr(state, f.name).clone() for f in dataclasses.fields(state)}
    advanced(state, torch.ones_like(state.latents), step_at(300))
    after: dict[str, Tensor] = {name: getattr(state, name) for name in before}
    assert all(torch.equal(before[name], after[name]) for name in before)
