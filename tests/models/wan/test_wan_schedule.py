import numpy as np
import pytest
import torch

from vcd_fast.models.wan.schedule import flow_schedule


@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0])
@pytest.mark.parametrize("sampling_steps", [1, 2, 7, 30, 50])
def test_equals_the_stock_scheduler_given_the_same_sigmas(shift, sampling_steps):
    from diffusers import FlowMatchEulerDiscreteScheduler

    stock = FlowMatchEulerDiscreteScheduler(shift=shift)
    stock.set_timesteps(sigmas=np.linspace(1, 0, sampling_steps + 1)[:-1])
    schedule = flow_schedule(sampling_steps, shift)
    assert [step.index for step in schedule] == list(range(sampling_steps))
    assert [step.sigma for step in schedule] == stock.sigmas[:-1].tolist()
    assert [step.timestep for step in schedule] == stock.timesteps.tolist()
    x, velocities = torch.randn(3, 5), torch.randn(sampling_steps, 3, 5)
    y = x
    for step, t in zip(schedule, stock.timesteps, strict=True):
        x = x + step.dt * velocities[step.index]
        y = stock.step(velocities[step.index], t, y, return_dict=False)[0]
    assert torch.equal(x, y)


def test_last_step_is_not_degenerate():
    # Wan's own sampler ends 0.1765, 0.0938, 0 (shift 3, 30 steps); diffusers' default ends 0.1043, 0.0089, 0.
    steps = flow_schedule(30, 3.0)
    assert steps[-1].sigma == pytest.approx(0.0938, abs=1e-4)
    assert steps[-2].sigma == pytest.approx(0.1765, abs=1e-4)
    assert sum(step.dt for step in steps) == pytest.approx(-1, abs=1e-6)


def test_no_steps_is_an_error():
    with pytest.raises(ValueError, match="sampling_steps: expected at least 1, got 0"):
        flow_schedule(0, 3.0)
