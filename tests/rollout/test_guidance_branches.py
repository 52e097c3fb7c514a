"""Branches of guidance: with steps checkpointed the backward recomputes one, walks it, and lets go of it before the other."""

import pytest
import torch

from vcd_fast.rollout.sampler import rollout

SAMPLING_STEPS = 3


@pytest.mark.parametrize("settings", [{}, {"guidance_gradient": "conditional"}])
def test_one_graph_at_a_time(make_model, condition, plan, settings):
    model = make_model(**settings)
    events = []

    def see(block, arguments, output):
        if output.requires_grad:
            events.append("forward")
            output.register_hook(lambda gradient: events.append("backward"))

    schedule = model.schedule(SAMPLING_STEPS, 32, 32, 9)
    state = model.initial(condition, [torch.Generator().manual_seed(0)])
    model.blocks[0].register_forward_hook(see)
    latents = rollout(model, condition, state, schedule, plan("last:2", checkpointing="step"))
    branches = 1 if settings else 2
    assert events == ["forward"] * branches * 2
    events.clear()
    latents.sum().backward()
    assert events == ["forward", "backward"] * branches * 2  # each of the two steps


def test_no_guidance_no_second_branch(make_model, condition):
    model = make_model(guidance_scale=1)
    state, calls = model.initial(condition, [torch.Generator().manual_seed(0)]), []
    step = model.schedule(SAMPLING_STEPS, 32, 32, 9)[0]

    def count(branch, latents):
        calls.append(latents)
        return branch(latents)

    with torch.no_grad():
        counted = model.velocity(state, step, condition, branchwise=count)
        assert torch.equal(counted, model.velocity(state, step, condition))
    assert [latents is state.latents for latents in calls] == [True]
