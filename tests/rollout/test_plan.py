import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from vcd_fast.rollout.plan import Plan, RolloutSettings, parse_backprop


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_defaults_are_the_paper_s():
    settings = RolloutSettings()
    assert settings.sampling_steps == 30
    assert settings.plan() == Plan("last", 1, stop_input_gradient=False, checkpointing="block")
    assert settings.plan().steps(30) == (29,)


@pytest.mark.parametrize(
    ("text", "parsed"),
    [("last:1", ("last", 1)), ("random:12", ("random", 12)), ("spaced:3", ("spaced", 3)), ("all", ("all", None))],
)
def test_parse(text, parsed):
    assert parse_backprop(text) == parsed


@pytest.mark.parametrize(
    "text",
    ["", "last", "last:", "last:0", "last:-1", "last:1.5", "first:2", "all:3", " last:1", "last:1 ", "spaced:03"],
)
def test_bad_strings_say_what_is_allowed(text):
    with pytest.raises(
        ValueError, match=r"rollout.backprop: expected last:K .*random:K .*spaced:K .*all, with K >= 1; got"
    ):
        parse_backprop(text)
    with pytest.raises(ValidationError, match=r"rollout\.backprop"):
        RolloutSettings(backprop=text)


def test_settings_that_contradict_each_other():
    with pytest.raises(ValidationError, match="last:5 wants 5 of only 4 sampling_steps"):
        RolloutSettings(sampling_steps=4, backprop="last:5")
    with pytest.raises(ValidationError, match="stop_input_gradient: spaced:K is defined with it"):
        RolloutSettings(backprop="spaced:2", stop_input_gradient=False)
    for wrong in ({"sampling_steps": 0}, {"checkpointing": "blocks"}, {"steps": 3}):
        with pytest.raises(ValidationError):
            RolloutSettings(**wrong)


def test_input_gradient_is_stopped_for_spaced_or_on_request():
    assert RolloutSettings(backprop="spaced:2").plan().stop_input_gradient
    assert RolloutSettings(backprop="last:2", stop_input_gradient=True).plan().stop_input_gradient
    assert not RolloutSettings(backprop="random:2").plan().stop_input_gradient


@pytest.mark.parametrize(
    ("checkpointing", "blocks", "steps"),
    [("none", False, False), ("block", True, False), ("step", False, True), ("both", True, True)],
)
def test_checkpointing(checkpointing, blocks, steps):
    plan = Plan(checkpointing=checkpointing)
    assert (plan.checkpoint_blocks, plan.checkpoint_steps) == (blocks, steps)


@given(sampling_steps=st.integers(1, 60), data=st.data(), seed=st.integers(0, 1000))
def test_chosen_steps(sampling_steps, data, seed):
    count = data.draw(st.integers(1, sampling_steps))
    assert Plan("last", count).steps(sampling_steps) == tuple(range(sampling_steps))[-count:]
    assert Plan("all", None).steps(sampling_steps) == tuple(range(sampling_steps))
    for kind in ("random", "spaced"):
        steps = Plan(kind, count).steps(sampling_steps, generator(seed))
        assert len(steps) == len(set(steps)) == count
        assert list(steps) == sorted(steps)
        assert 0 <= steps[0] <= steps[-1] < sampling_steps
        assert steps == Plan(kind, count).steps(sampling_steps, generator(seed))
    assert {b - a for a, b in itertools.pairwise(steps)} <= {sampling_steps // count}


@pytest.mark.parametrize("kind", ["random", "spaced"])
@pytest.mark.parametrize(("count", "sampling_steps"), [(1, 4), (2, 5), (3, 10), (4, 4)])
def test_every_step_can_be_chosen(kind, count, sampling_steps):
    seen = {step for seed in range(200) for step in Plan(kind, count).steps(sampling_steps, generator(seed))}
    assert seen == set(range(sampling_steps))


def test_random_steps_are_uniform():
    counts = torch.zeros(6)
    drawn = generator()
    for _ in range(3000):
        counts[list(Plan("random", 2).steps(6, drawn))] += 1
    assert (counts / 3000).allclose(torch.full((6,), 1 / 3), atol=0.04)


def test_drawing_needs_a_generator_and_enough_steps():
    assert Plan("random", 2).draws
    assert not Plan("last", 2).draws
    with pytest.raises(ValueError, match="generator: random:2 draws steps and needs one"):
        Plan("random", 2).steps(4)
    with pytest.raises(ValueError, match="last:5: expected 1 to 4 of 4 sampling steps"):
        Plan("last", 5).steps(4)
