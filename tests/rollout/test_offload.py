"""Saved tensors on the CPU: the same numbers, and nothing but weights left behind."""

import pytest
import torch

from vcd_fast.models.lora import lora_parameters
from vcd_fast.rollout import offload
from vcd_fast.rollout.offload import offloaded
from vcd_fast.rollout.plan import RolloutSettings
from vcd_fast.rollout.sampler import run

SAMPLING_STEPS = 4


@pytest.fixture(scope="module")
def start(model, condition):
    schedule = model.schedule(SAMPLING_STEPS, 32, 32, 9)
    return condition, model.initial(condition, [torch.Generator().manual_seed(0)]), schedule


@pytest.fixture(scope="module")
def weights():
    return torch.randn(1, 16, 3, 4, 4, generator=torch.Generator().manual_seed(5))


@pytest.fixture
def moved(monkeypatch):
    """What goes to the CPU, by storage."""
    seen = {}
    original = offload._to_host

    def record(tensor):
        seen[tensor.untyped_storage()._cdata] = tensor.nbytes
        return original(tensor)

    monkeypatch.setattr(offload, "_to_host", record)
    return seen


def gradients(model, start, weights, plan):
    condition, state, schedule = start
    rolled = run(model, condition, state, schedule, plan, generator=torch.Generator().manual_seed(7))
    for surrogate in rolled.surrogates(weights):
        surrogate.backward()
    found = {name: p.grad.clone() for name, p in lora_parameters(model).items()}
    model.transformer.zero_grad(set_to_none=True)
    return found


@pytest.mark.parametrize("checkpointing", ["none", "block"])
@pytest.mark.parametrize("backprop", ["last:2", "spaced:2"])
def test_the_window_offloaded_changes_no_bit(model, start, plan, weights, moved, backprop, checkpointing):
    expected = gradients(model, start, weights, plan(backprop, checkpointing=checkpointing))
    assert not moved
    found = gradients(model, start, weights, plan(backprop, checkpointing=checkpointing, offload="window"))
    assert moved
    assert all(torch.equal(value, found[name]) for name, value in expected.items())
    assert any(bool(value.any()) for value in expected.values())


@pytest.mark.parametrize("changes", [{}, {"decode_checkpointing": "resnet"}, {"decode_context": "truncated"}])
def test_the_decode_offloaded_changes_no_bit(make_model, moved, changes):
    model = make_model(lora=False, **changes)
    latents = torch.randn(1, 16, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    found = []
    for enabled in (False, True):
        leaf = latents.clone().requires_grad_(True)
        with offloaded(model.vae, enabled):
            video = model.decode(leaf, [0, 3, 6])
        assert bool(moved) == enabled
        (video**2).sum().backward()
        found.append((video.detach(), leaf.grad))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


def test_weights_stay_where_they_are(moved):
    layer = torch.nn.Sequential(torch.nn.Linear(4, 3, bias=False), torch.nn.Tanh(), torch.nn.Linear(3, 2, bias=False))
    own = {parameter.untyped_storage()._cdata for parameter in layer.parameters()}
    x = torch.randn(5, 4, requires_grad=True)
    with offloaded(layer):
        layer(x).sum().backward()
    assert moved
    assert not own & set(moved)


def test_a_tensor_that_is_saved_twice_goes_once_and_a_changed_one_again(monkeypatch):
    copies = []
    original = offload._to_host
    monkeypatch.setattr(offload, "_to_host", lambda tensor: copies.append(tensor.clone()) or original(tensor))
    x, w = torch.randn(4), torch.randn(4, requires_grad=True)
    with offloaded(torch.nn.Identity()):
        total = (w * x).sum() + (w * x).sum()
        assert len(copies) == 1
        x.mul_(2)
        total = total + (w * x).sum()
        assert len(copies) == 2
    total.backward()
    assert torch.allclose(w.grad, 2 * copies[0] + copies[1])


def test_addresses_that_are_used_again_are_other_tensors(moved):
    """Every tensor is gone before the next one is made, so storages follow each other at the same places."""
    w = torch.randn(1000, requires_grad=True)
    total, expected = 0.0, 0.0
    with offloaded(torch.nn.Identity()):
        for scale in range(20):
            x = torch.full((1000,), float(scale))
            total = total + (w * x).sum()
            del x
            expected += scale
    total.backward()
    assert torch.equal(w.grad, torch.full((1000,), expected))


def test_expanded_tensors_survive(moved):
    x = torch.randn(3, 1, requires_grad=True)
    y = torch.randn(3, 1).expand(3, 4)
    with offloaded(torch.nn.Identity()):
        product = x.expand(3, 4) * y
    product.sum().backward()
    assert torch.equal(x.grad, y.sum(1, keepdim=True))
    assert moved


@pytest.mark.parametrize("checkpointing", ["step", "both"])
@pytest.mark.parametrize("offload", ["window", "both"])
def test_a_window_of_which_only_latents_are_kept_is_not_offloaded(checkpointing, offload):
    with pytest.raises(ValueError, match=f"rollout.offload: {offload} moves what steps keep"):
        RolloutSettings(checkpointing=checkpointing, offload=offload)
    RolloutSettings(checkpointing=checkpointing, offload="decode")
