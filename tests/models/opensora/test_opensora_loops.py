"""Sampling with Open-Sora against the loops of the original code and of VADER."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor, nn

from vcd_fast.models.base import Schedule, Step
from vcd_fast.models.lora import LoRASettings, add_lora, lora_disabled
from vcd_fast.models.opensora.adapter import OpenSoraI2V
from vcd_fast.models.opensora.condition import OpenSoraCondition
from vcd_fast.models.opensora.schedule import OpenSoraState, active_frames, flow_schedule
from vcd_fast.models.opensora.settings import ModelSettings
from vcd_fast.models.opensora.tiny import tiny_vae
from vcd_fast.models.opensora.transformer import STDiT3
from vcd_fast.rollout import Plan, rollout

GOLDEN = {
    "hidden_size": 64,
    "depth": 2,
    "num_heads": 4,
    "caption_channels": 32,
    "model_max_length": 12,
    "input_sq_size": 64,
}
SAMPLER_TOLERANCE = 1e-6


def model_of(transformer: STDiT3, **changes) -> OpenSoraI2V:
    settings = {"weights": "tiny-random", "height": 36, "width": 48, "num_frames": 17, "dtype": "float32"}
    return OpenSoraI2V(transformer, tiny_vae(), ModelSettings(**{**settings, **changes}))


class Recorder:
    """Stands for the network in the goldens' loops: v = 0.1 z + sin(t/1000) + 0.05 mean(y), 0.02 more on frames that condition."""

    def __init__(self, network: nn.Module | None = None) -> None:
        self.network = network
        self.latents: list[Tensor] = []
        self.frames: list[Tensor] = []

    def __call__(self, **inputs) -> tuple[Tensor]:
        x, frames = inputs["hidden_states"], inputs["frame_mask"]
        self.latents.append(x)
        self.frames.append(frames)
        if self.network is not None:
            return self.network(**inputs)
        t, y = inputs["timestep"], inputs["encoder_hidden_states"]
        v = 0.1 * x + (torch.sin(t / 1000) + 0.05 * y.mean(dim=(1, 2))).view(-1, 1, 1, 1, 1)
        v = v + 0.02 * (~frames).float()[:, None, :, None, None]
        return (torch.cat((v, torch.full_like(v, 1e6)), dim=1),)


def state_of(latents: Tensor, edit: Tensor | None, schedule: Schedule, noise: Tensor | None) -> OpenSoraState:
    """`noise[i]` is what the original drew in step i; a frame uses that of the step in which it becomes active."""
    if edit is None:
        edit = torch.ones(latents.shape[0], latents.shape[2])
    state = OpenSoraState(latents, edit, edit == 1)
    if noise is None:
        return state
    needed = torch.zeros_like(latents)
    taken = state.generated
    for step in schedule:
        active = active_frames(state, step)
        fresh = (active & ~taken)[:, None, :, None, None]
        needed, taken = torch.where(fresh, noise[step.index], needed), active
    return dataclasses.replace(state, noise=needed)


@pytest.mark.parametrize("name", ["nomask", "allones", "i2v", "i2v_edit", "i2v30"])
def test_loops_of_the_original_with_a_known_network(name, golden, error):
    case = golden("rflow_loop_fake")
    of = {key.removeprefix(f"{name}."): value for key, value in case.tensors.items() if key.startswith(f"{name}.")}
    meta = case.meta["meta"][name]
    model = model_of(STDiT3(**{**GOLDEN, "caption_channels": 6}), guidance_scale=meta["guidance"])
    model.transformer.y_embedder.y_embedding = case.tensors["text.null"][0, 0]
    text, mask = case.tensors["text.y"][:2, 0], case.tensors["text.mask"][:2].bool()
    condition = OpenSoraCondition(torch.zeros(2, 4, 1, 3, 4), text, mask)
    schedule = flow_schedule(meta["steps"], *case.meta["size"], case.meta["num_frames"])
    assert torch.equal(torch.tensor([step.timestep for step in schedule]), of["t"][:, 0])

    network = Recorder()
    state = state_of(of["z_init"], of.get("mask"), schedule, of.get("noise"))
    out = rollout(model, condition, state, schedule, Plan(), forward=network)
    assert error(out, of["out"]) <= SAMPLER_TOLERANCE
    for index, seen in enumerate(of["model_in"]):
        assert error(network.latents[index], seen) <= SAMPLER_TOLERANCE
    if "x_mask" in of:
        assert torch.equal(torch.stack(network.frames), of["x_mask"].bool())
    if name.startswith("i2v") and "edit" not in name:
        assert torch.equal(out[:, :, 0], of["z_init"][:, :, 0]), "the conditioning frame stays as it is, bit for bit"


def test_the_first_time_of_small_clips(golden, error):
    """The original starts small clips at 1000.0001, where no frame counts as generated. Its rule is kept, its first time is not."""
    case = golden("rflow_loop_quirk")
    tensors, meta = case.tensors, case.meta["meta"]
    schedule = flow_schedule(meta["steps"], *meta["size"], meta["num_frames"])
    assert tensors["t"][0, 0] > 1000
    assert schedule[0].timestep == 1000
    assert torch.equal(torch.tensor([step.timestep for step in schedule])[1:], tensors["t"][1:, 0])

    model = model_of(STDiT3(**{**GOLDEN, "caption_channels": 6}), guidance_scale=meta["guidance"])
    model.transformer.y_embedder.y_embedding = tensors["text.null"][0, 0]
    condition = OpenSoraCondition(torch.zeros(2, 4, 1, 3, 4), tensors["text.y"][:2, 0], tensors["text.mask"][:2].bool())
    times = tensors["t"][:, 0].tolist()
    steps = [
        Step(i, t, t / 1000, (t - end) / 1000) for i, (t, end) in enumerate(zip(times, [*times[1:], 0.0], strict=True))
    ]
    network = Recorder()
    state = state_of(tensors["z_init"], tensors["mask"], Schedule(tuple(steps)), tensors["noise"])
    out = rollout(model, condition, state, Schedule(tuple(steps)), Plan(), forward=network)
    assert torch.equal(torch.stack(network.frames), tensors["x_mask"].bool())
    assert error(out, tensors["out"]) <= SAMPLER_TOLERANCE

    clamped = Recorder()
    rollout(model, condition, state, schedule, Plan(), forward=clamped)
    assert all(frames[:, 1:].all() and not frames[:, 0].any() for frames in clamped.frames)


@pytest.mark.parametrize("passes", ["joint", "separate"])
@pytest.mark.parametrize("name", ["t2v", "i2v"])
def test_loops_of_the_original_with_the_real_network(name, passes, golden, recipe, error):
    case = golden("rflow_loop_stdit3")
    of = {key.removeprefix(f"{name}."): value for key, value in case.tensors.items() if key.startswith(f"{name}.")}
    size, frames = case.meta["size"], case.meta["num_frames"]
    model = model_of(recipe(STDiT3(**GOLDEN)), height=size[0], width=size[1], num_frames=frames, guidance_passes=passes)
    condition = OpenSoraCondition(
        torch.zeros(2, 4, 1, 5, 6), case.tensors["text.y"][:, 0], case.tensors["text.mask"].bool()
    )
    schedule = flow_schedule(case.meta["steps"], *size, frames)
    network = Recorder(model.transformer)
    state = state_of(of["z_init"], of.get("mask"), schedule, None)
    with torch.no_grad():
        out = rollout(model, condition, state, schedule, Plan(), forward=network)
    assert error(out, of["out"]) <= 1e-5
    if passes == "joint":
        for seen, expected in zip(network.latents, of["model_in"], strict=True):
            assert error(seen, expected) <= 1e-5


@pytest.mark.parametrize("checkpointing", ["none", "block", "both"])
@pytest.mark.parametrize("window", ["last", "full"])
def test_gradients_of_a_lora_are_those_of_vader(window, checkpointing, golden, recipe, lora_weight, error):
    case = golden("vader_lora_lastback")
    tensors, meta = case.tensors, case.meta
    size, frames = meta["size"], meta["num_frames"]
    model = model_of(recipe(STDiT3(**GOLDEN)), height=size[0], width=size[1], num_frames=frames)
    parameters = add_lora(model, LoRASettings(rank=meta["lora_rank"], alpha=meta["lora_alpha"]), seed=0)
    with torch.no_grad():
        for key, parameter in parameters.items():
            parameter.copy_(lora_weight(key, parameter.shape))
    condition = OpenSoraCondition(torch.zeros(2, 4, 1, 5, 6), tensors["text.y"][:, 0], tensors["text.mask"].bool())
    schedule = flow_schedule(meta["steps"], *size, frames)
    state = state_of(tensors["z_init"], tensors["mask"], schedule, None)
    if checkpointing == "none" and window == "last":
        with lora_disabled(model), torch.no_grad():
            out = rollout(model, condition, state, schedule, Plan())
        assert error(out, tensors["base_nolora_out"]) <= 1e-5

    plan = (
        Plan("last", 1, checkpointing=checkpointing) if window == "last" else Plan("all", checkpointing=checkpointing)
    )
    out = rollout(model, condition, state, schedule, plan)
    assert error(out.detach(), tensors["out"]) <= 1e-5
    loss = (out * tensors["loss_tensor"]).sum()
    assert loss.item() == pytest.approx(meta["loss_value"], rel=1e-4)
    loss.backward()
    norms = meta[f"norms_{window}"]
    assert len(norms) == len(parameters) == meta["n_lora_grads"]
    for key, parameter in parameters.items():
        assert parameter.grad.norm().item() == pytest.approx(norms[key], rel=1e-3), key
        stored = tensors.get(f"grad_{window}.{key}")
        if stored is not None:
            assert error(parameter.grad, stored) <= 1e-4, key
