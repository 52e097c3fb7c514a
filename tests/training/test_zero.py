"""Two CPU ranks give the weights that one process gives with the same total batch, whatever is sharded or recomputed."""

import itertools
import json

import pytest
import torch

STAGES = (1, 2, 3)
CHECKPOINTING = ("none", "both")
CASES = {
    f"zero{stage}-{checkpointing}": {"training": {"zero": stage}, "rollout": {"checkpointing": checkpointing}}
    for stage, checkpointing in itertools.product(STAGES, CHECKPOINTING)
}
# The number of backward passes per step is the plan's here: the accumulation has to be right, too.
SPACED = {
    f"zero{stage}-spaced": {"training": {"zero": stage}, "rollout": {"backprop": "spaced:2"}} for stage in (0, 2, 3)
}


@pytest.fixture(scope="module")
def weights(two_ranks, one_rank, small_pictures, tmp_path_factory):
    folder = tmp_path_factory.mktemp("zero")
    reference = {"plain": {}, "spaced": {"rollout": {"backprop": "spaced:2"}}}
    single = one_rank("zero_worker.py", str(folder), str(small_pictures), json.dumps(reference))
    double = two_ranks(
        "zero_worker.py", str(folder), str(small_pictures), json.dumps({"zero0-none": {}, **CASES, **SPACED})
    )
    return single, double


def largest_difference(a, b):
    assert a.keys() == b.keys()
    return max((torch.tensor(a[name]) - torch.tensor(b[name])).abs().max().item() for name in a)


@pytest.mark.parametrize("case", ["zero0-none", *CASES])
def test_two_ranks_equal_one_process(weights, case):
    single, double = weights
    assert largest_difference(single["plain"], double[case]) < 1e-6


@pytest.mark.parametrize("case", list(SPACED))
def test_several_backward_passes_per_step(weights, case):
    single, double = weights
    assert largest_difference(single["spaced"], double[case]) < 1e-6


def test_the_comparison_can_fail(weights):
    single, _ = weights
    assert largest_difference(single["plain"], single["spaced"]) > 1e-5
