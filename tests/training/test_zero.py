"""Two CPU ranks give the weights that one process gives with the same total batch, whatever is sharded or recomputed."""

import itertools
import json

import pytest
import torch

from vcd_fast.models.wan.tiny import tiny_transformer
from vcd_fast.rollout.step_cache.coefficients import save

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
# A step cache that skips the second of three steps, and gradients through all.
CACHED = {"backprop": "all", "step_cache": "teacache", "cache_threshold": 1e3}
CACHED_STAGES = {1: "block", 2: "both"}


@pytest.fixture(scope="module")
def weights(two_ranks, one_rank, small_pictures, tmp_path_factory):
    folder = tmp_path_factory.mktemp("zero")
    fit = save(folder / "fit.json", tiny_transformer(), (1.0, 0.0), "non-ret", {})
    cached = {"rollout": {**CACHED, "cache_coefficients": str(fit), "checkpointing": "none"}}
    cases = {"zero0-none": {}, **CASES, **SPACED}
    for stage, checkpointing in CACHED_STAGES.items():
        rollout = {**cached["rollout"], "checkpointing": checkpointing}
        cases[f"zero{stage}-cached"] = {"rollout": rollout, "training": {"zero": stage}}
    reference = {"plain": {}, "batch": {}, "spaced": {"rollout": {"backprop": "spaced:2"}}, "cached": cached}
    single = one_rank("zero_worker.py", str(folder), str(small_pictures), json.dumps(reference))
    double = two_ranks("zero_worker.py", str(folder), str(small_pictures), json.dumps(cases))
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


@pytest.mark.parametrize("stage", CACHED_STAGES)
def test_a_step_cache(weights, stage):
    single, double = weights
    assert largest_difference(single["cached"], double[f"zero{stage}-cached"]) < 1e-6


def test_a_batch_of_two_is_two_micro_steps_is_two_ranks(weights):
    single, _ = weights
    assert largest_difference(single["plain"], single["batch"]) < 1e-6


def test_the_comparison_can_fail(weights):
    single, _ = weights
    assert largest_difference(single["plain"], single["cached"]) > 1e-5
    assert largest_difference(single["plain"], single["spaced"]) > 1e-5
