import pytest
import torch

from vcd_fast.training.randomness import indexed_generator, indexed_seed


def test_every_argument_matters_and_nothing_else():
    seeds = {
        indexed_seed(s, purpose, *i) for s in (0, 1) for purpose in ("noise", "frames") for i in ((0,), (1,), (0, 0))
    }
    assert len(seeds) == 12
    torch.manual_seed(5)
    assert indexed_seed(0, "noise", 3) == indexed_seed(0, "noise", 3)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_indices_are_not_concatenated():
    assert indexed_seed(0, "noise", 1, 23) != indexed_seed(0, "noise", 12, 3)


@pytest.mark.parametrize("position", [0, 7, 10**9])
def test_generators_draw_the_same_again(position):
    first, second = (torch.randn(4, generator=indexed_generator(3, "noise", position)) for _ in range(2))
    assert torch.equal(first, second)
