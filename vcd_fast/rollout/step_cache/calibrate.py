"""Fit the step cache's polynomial: how much a model's output changes from step to step, given how much its modulation does.

As TeaCache fitted the published ones: full rollouts over some pictures and prompts, and a polynomial of degree 4 by least squares.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers.hooks.hooks import BaseState, HookRegistry, ModelHook, StateManager
from torch import Tensor, nn

from vcd_fast.models.base import Condition, I2VModel
from vcd_fast.rollout.plan import Plan
from vcd_fast.rollout.sampler import rollout
from vcd_fast.rollout.step_cache.coefficients import ENDS
from vcd_fast.rollout.step_cache.indicators import Indicator, Mode, indicator_for, named_arguments, relative_distance
from vcd_fast.rollout.step_cache.policy import Rule, skip_map

DEGREE = 4
HOOK = "vcd_fast_step_cache_observer"


class Observation(NamedTuple):
    """A step and the one before it."""

    step: int
    input: float
    """relative distance of the indicator"""
    output: float
    """relative distance of the network's output"""


@dataclasses.dataclass(frozen=True)
class Fit:
    coefficients: tuple[float, ...]
    """highest power first"""
    r_squared: float
    """of the polynomial on what it was fitted to; 1 explains all"""
    input_range: tuple[float, float]
    observations: int

    def facts(self) -> dict[str, Any]:
        """What is written beside the coefficients."""
        return {"r_squared": self.r_squared, "input_range": list(self.input_range), "observations": self.observations}


@torch.no_grad()
def observe(
    model: I2VModel, condition: Condition, seeds: Sequence[int], sampling_steps: int, mode: Mode
) -> list[Observation]:
    """Distances along full rollouts of a batch of clips, in every branch of guidance.

    Args:
        condition: batch of B.
        seeds: of the noise, one per clip.
    """
    settings = model.settings
    schedule = model.schedule(sampling_steps, settings.height, settings.width, settings.num_frames)
    state = model.initial(condition, [torch.Generator().manual_seed(seed) for seed in seeds])
    with _observed(model.transformer, mode) as found:
        rollout(model, condition, state, schedule, Plan())
    return found


def fit(observations: Sequence[Observation], mode: Mode) -> Fit:
    """A polynomial of degree 4 through the steps that may be skipped.

    Raises:
        ValueError: fewer than 5 different input distances among them.
    """
    used = fitted(observations, mode)
    x, y = np.array([each.input for each in used]), np.array([each.output for each in used])
    if len(np.unique(x)) <= DEGREE:
        raise ValueError(
            f"observations: expected at least {DEGREE + 1} different distances to fit a polynomial of degree {DEGREE}, got "
            f"{len(np.unique(x))}; sample at least {DEGREE + 1 + sum(ENDS[mode])} steps"
        )
    coefficients = np.polyfit(x, y, DEGREE)
    residual = y - np.polyval(coefficients, x)
    spread = float(((y - y.mean()) ** 2).sum())
    r_squared = 1 - float((residual**2).sum()) / spread if spread else 1.0
    return Fit(tuple(map(float, coefficients)), r_squared, (float(x.min()), float(x.max())), len(used))


def fitted(observations: Sequence[Observation], mode: Mode) -> list[Observation]:
    """Those of steps that are not always computed."""
    first, last = ENDS[mode]
    end = max((each.step for each in observations), default=0) + 1 - last
    return [each for each in observations if first <= each.step < end]


def threshold_table(
    found: Fit, observations: Sequence[Observation], mode: Mode, thresholds: Sequence[float] | None = None
) -> list[tuple[float, float]]:
    """(threshold, mean steps computed) over the observed rollouts; by default thresholds in multiples of the typical estimate."""
    runs: list[list[float]] = []
    for each in observations:
        if each.step == 1:
            runs.append([0.0])
        runs[-1].append(each.input)
    first, last = ENDS[mode]
    if thresholds is None:
        rule = Rule(found.coefficients, 1.0, first, last)
        typical = float(np.median([abs(rule.estimate(each.input)) for each in observations if each.step >= first]))
        thresholds = [float(f"{typical * factor:.2g}") for factor in (0.5, 1.5, 2.5, 4.0, 6.0)]
    rows = []
    for threshold in thresholds:
        rule = Rule(found.coefficients, threshold, first, last)
        rows.append((threshold, float(np.mean([sum(skip_map(rule, run)) for run in runs]))))
    return rows


@contextlib.contextmanager
def _observed(transformer: nn.Module, mode: Mode) -> Iterator[list[Observation]]:
    found: list[Observation] = []
    registry = HookRegistry.check_if_exists_or_initialize(transformer)
    branches: dict[str, list[Observation]] = {}
    registry.register_hook(_Observer(indicator_for(transformer, mode), branches), HOOK)
    try:
        yield found
        for branch in branches.values():
            found += branch
    finally:
        registry.remove_hook(HOOK, recurse=False)


class _Last(BaseState):
    """What a branch of guidance saw in its last step."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.indicator: Tensor | None = None
        self.output: Tensor | None = None


class _Observer(ModelHook):
    _is_stateful = True

    def __init__(self, indicator: Indicator, branches: dict[str, list[Observation]]) -> None:
        super().__init__()
        self.indicator, self.branches = indicator, branches
        self.state_manager = StateManager(_Last)

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        arguments = named_arguments(module, args, kwargs)
        indicator = self.indicator(module, arguments)
        result = self.fn_ref.original_forward(*args, **kwargs)
        # Open-Sora's output has a second half, which no sampler uses.
        output = result[0][:, : arguments["hidden_states"].shape[1]].float()
        last, context = self.state_manager.get_state(), self.state_manager.context
        if last.output is not None:
            distances = relative_distance(indicator, last.indicator), relative_distance(output, last.output)
            self.branches.setdefault(context.name, []).append(Observation(context.step_index, *distances))
        last.indicator, last.output = indicator, output
        return result

    def reset_state(self, module: nn.Module) -> nn.Module:
        self.state_manager.reset()
        return module
