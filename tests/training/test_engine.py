import math

import pytest
import torch

from vcd_fast.training.engine import GuardedAdamW


@pytest.fixture(scope="module")
def engine_facts(two_ranks):
    return two_ranks("engine_worker.py")


@pytest.mark.parametrize("stage", ["0", "1", "2", "3"])
class TestZeRO:
    def test_two_ranks_equal_one_process_with_the_same_batch(self, engine_facts, stage):
        assert engine_facts[stage]["largest_difference_to_one_process"] < 1e-6

    def test_a_gradient_that_is_not_finite_touches_nothing(self, engine_facts, stage):
        assert engine_facts[stage]["bad_step_applied"] is False
        assert engine_facts[stage]["bad_step_left_everything"] is True

    def test_whole_tensors_go_back_bit_for_bit(self, engine_facts, stage):
        assert engine_facts[stage]["restored"] is True
        assert engine_facts[stage]["resumed_equals_undisturbed"] is True


def test_guarded_adamw_is_adamw_with_clipping():
    torch.manual_seed(0)
    start, gradient = torch.randn(5), torch.randn(5)
    mine, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    guarded, plain = GuardedAdamW([mine], 0.1, lr=0.1), torch.optim.AdamW([theirs], lr=0.1)
    mine.grad, theirs.grad = gradient.clone(), gradient.clone()
    torch.nn.utils.clip_grad_norm_([theirs], 0.1)
    guarded.step()
    plain.step()
    assert torch.equal(mine, theirs)
    assert not guarded.overflow
    assert guarded._global_grad_norm == pytest.approx(gradient.norm().item())


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_guarded_adamw_leaves_weights_and_state_alone(value):
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = GuardedAdamW([parameter], 1.0, lr=0.1)
    parameter.grad = torch.tensor([1.0, value, 1.0])
    optimizer.step()
    assert optimizer.overflow
    assert torch.equal(parameter.detach(), torch.ones(3))
    assert not optimizer.state
