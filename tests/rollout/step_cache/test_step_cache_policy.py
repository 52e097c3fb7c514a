"""Decisions against the published implementation's, which was run on synthetic inputs."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from vcd_fast.rollout.step_cache.coefficients import ENDS, PUBLISHED
from vcd_fast.rollout.step_cache.indicators import relative_distance
from vcd_fast.rollout.step_cache.policy import Rule, describe_map, skip_map

CASES = json.loads((Path(__file__).parents[2] / "goldens" / "teacache" / "teacache.json").read_text())["cases"]


def inputs(recipe, num_steps):
    """What is compared, step by step, as the golden file describes it."""
    kind, shape = recipe["kind"], recipe["shape"]
    if kind == "sinusoid":
        sigma = np.linspace(1, 0, num_steps + 1)[:-1]
        sigma = recipe["shift"] * sigma / (1 + (recipe["shift"] - 1) * sigma)
        half = shape[-1] // 2
        frequencies = np.exp(-math.log(100) * np.arange(half) / half)
        angles = recipe["w"] * sigma[:, None] * frequencies
        rows = np.concatenate([np.cos(angles), np.sin(angles)], axis=1)
        return [torch.tensor(row.reshape(shape), dtype=torch.float32) for row in rows]
    state = np.random.RandomState(recipe["seed"])
    start, noise = state.standard_normal(shape), state.standard_normal(shape)
    found, c = [], 0.0
    for k in range(num_steps):
        if kind == "linear":
            c = recipe["a"] * k
        elif k:
            c += recipe["b"] + recipe["a"] * 0.5 * (1 + math.cos(2 * math.pi * k / recipe["period"]))
        value = np.cos(c) * start + np.sin(c) * noise if kind == "rotate" else start + c * noise
        found.append(torch.tensor(value, dtype=torch.float32))
    return found


def distances_of(case):
    seen = inputs(case["recipe"], case["num_steps"])
    return [0.0, *(relative_distance(*pair) for pair in zip(seen[1:], seen[:-1], strict=True))]


@pytest.mark.parametrize("case", CASES, ids=[case["id"] for case in CASES])
def test_decisions_are_those_of_the_reference(case):
    mode = "ret" if case["variant"] == "ret" else "non-ret"
    published = PUBLISHED[case["model"], mode]
    assert published.values == pytest.approx(tuple(case["coefficients"]), rel=1e-12)
    assert ENDS[mode] == (case["forced_first_steps"], case["forced_last_steps"])
    rule = Rule(published.values, case["threshold"], *ENDS[mode])
    distances = distances_of(case)
    assert list(skip_map(rule, distances)) == case["compute"]
    assert sum(case["compute"]) == case["n_compute"]
    for distance, known, rescaled in zip(distances, case["rel_l1"], case["rescaled"], strict=True):
        if known is not None:
            assert distance == pytest.approx(known, rel=1e-4, abs=1e-5)
            assert rule.estimate(known) == pytest.approx(rescaled, rel=1e-4, abs=1e-5)


def test_every_model_and_both_modes_are_among_the_cases():
    modes = {(case["model"], "ret" if case["variant"] == "ret" else "non-ret") for case in CASES}
    assert modes == {
        key for key in PUBLISHED if key[0] != "wan2.1-fun-1.3b"
    }  # that one has another model's coefficients
    assert len(CASES) == 141


def test_a_step_that_has_to_be_computed_starts_the_sum_anew():
    rule = Rule((1.0, 0.0), 1.0, first=1, last=0)
    assert skip_map(rule, [0.4] * 8) == (True, False, False, True, False, False, True, False)
    assert skip_map(rule, [0.4] * 8, compute_at=[2]) == (True, False, True, False, False, True, False, False)


def test_estimates_may_be_negative_and_a_distance_that_is_no_number_computes():
    rule = Rule((-1.0, 0.0), 0.1, first=1, last=0)
    assert skip_map(rule, [0.0, 1.0, 1.0, math.nan, 1.0]) == (True, False, False, True, False)


def test_a_line_for_the_user():
    assert describe_map((True, False, False, True)) == "C..C: 2 of 4 steps computed, 50 % of the block forwards saved"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"coefficients": ()}, "coefficients: expected finite"),
        ({"coefficients": (math.nan,)}, "coefficients: expected finite"),
        ({"threshold": 0.0}, "threshold: expected a finite number above 0"),
        ({"threshold": math.inf}, "threshold: expected a finite number above 0"),
        ({"first": 0}, "first, last: expected at least 1 and 0"),
        ({"last": -1}, "first, last: expected at least 1 and 0"),
    ],
)
def test_rules_that_are_none(changes, message):
    with pytest.raises(ValueError, match=message):
        Rule(**{"coefficients": (1.0,), "threshold": 1.0, **changes})
