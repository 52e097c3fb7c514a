"""From noise to latents with gradients: a float32 Euler loop over plain numbers, and the backward of it in pieces.

`rollout` is the pure function. `run` is its form for training, where the reward's gradient is computed on a detached copy of the final
latents first and comes back through `Rollout.surrogates`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from vcd_fast.models.base import Condition, I2VModel, Schedule, State, Step
from vcd_fast.rollout.offload import offloaded
from vcd_fast.rollout.plan import Plan

if TYPE_CHECKING:
    from vcd_fast.rollout.step_cache.hooks import StepCache

Forward = Callable[..., object]
OnStep = Callable[[int, int], None]


def rollout(
    model: I2VModel,
    condition: Condition,
    state: State,
    schedule: Schedule,
    plan: Plan,
    *,
    forward: Forward | None = None,
    generator: torch.Generator | None = None,
    on_step: OnStep | None = None,
    cache: StepCache | None = None,
) -> Tensor:
    """Latents x_N [B, C, f, h, w] float32 after the last step, with the graph that `plan` asks for.

    Args:
        state: where to start, from `model.initial`; not changed.
        forward: stands in for `model.transformer`, as a training engine's wrapper does.
        generator: draws the steps of `random:K` and `spaced:K` plans.
        on_step: called with (steps done, steps in all) after every step.
        cache: applied to `model.transformer`; skips steps. Where a graph was built, call its `end` after the backward, not before.

    Under `torch.no_grad()` no step builds a graph and nothing is drawn from `generator`.

    Raises:
        ValueError: a plan that wants more steps than `schedule` has, or draws and got no generator.
    """
    chosen = plan.steps(len(schedule), generator) if torch.is_grad_enabled() else ()
    _begin(cache, schedule, plan, chosen)
    latents = _sample(model, condition, state, schedule, plan, chosen, forward, on_step)
    if cache is not None and not chosen:
        cache.end()
    return latents


def run(
    model: I2VModel,
    condition: Condition,
    state: State,
    schedule: Schedule,
    plan: Plan,
    *,
    forward: Forward | None = None,
    generator: torch.Generator | None = None,
    on_step: OnStep | None = None,
    cache: StepCache | None = None,
) -> Rollout:
    """Sample and keep what the backward needs; arguments and errors as of `rollout`.

    A plan that stops the input gradient (`spaced:K`) samples without any graph and gives K terms, each of which runs its step once
    more: memory does not depend on K. Any other plan gives one term. With checkpointing `step` or `both` only latents are kept for
    it, so that the memory of the window and of the reward do not add up; with `none` or `block` the graph of the window stays while
    the reward is computed, which saves one forward per chosen step. With a cache, call `Rollout.close` after the last backward.
    """
    chosen = plan.steps(len(schedule), generator)
    _begin(cache, schedule, plan, chosen)
    if not plan.stop_input_gradient:
        with torch.enable_grad():
            latents = _sample(model, condition, state, schedule, plan, chosen, forward, on_step)
        return Rollout(latents.detach(), chosen, 1, lambda gradient: iter([(latents * gradient).sum()]), cache)
    passed: list[_Passed] = []
    with torch.no_grad():
        for step in schedule:
            velocity = model.velocity(state, step, condition, forward)
            if step.index >= chosen[0]:
                passed.append(_Passed(step, state, velocity))
            state = model.advance(state, velocity, step)
            if on_step is not None:
                on_step(step.index + 1, len(schedule))

    def terms(gradient: Tensor) -> Iterator[Tensor]:
        for at in reversed(passed):
            gradient, of_velocity = _through_update(model, at, gradient)
            if at.step.index in chosen:
                with torch.enable_grad():
                    velocity = _differentiated(model, at.state, at.step, condition, plan, forward)
                    term = (velocity * of_velocity).sum()
                yield term

    return Rollout(state.latents, chosen, len(chosen), terms, cache)


@dataclasses.dataclass(frozen=True)
class Rollout:
    """Final latents, and the way from their gradient to that of the parameters."""

    latents: Tensor
    """x_N [B, C, f, h, w] float32, detached"""
    steps: tuple[int, ...]
    """the differentiated steps, ascending"""
    num_surrogates: int
    """how many terms `surrogates` gives"""
    _terms: Callable[[Tensor], Iterator[Tensor]]
    _cache: StepCache | None = None

    @property
    def computed(self) -> tuple[bool, ...]:
        """For every step whether a step cache let it be computed; empty without one, and after `close`."""
        return () if self._cache is None else self._cache.decisions

    def close(self) -> None:
        """Let go of what the step cache keeps for the backward."""
        if self._cache is not None:
            self._cache.end()

    def surrogates(self, gradient: Tensor) -> Iterator[Tensor]:
        """Scalars whose backwards, one after the other, add up to the derivative of <x_N, gradient>.

        Call backward on each before the next one is taken, which is when its graph is made; once only. Their values mean nothing.

        Args:
            gradient: of the loss with respect to `latents`, of their shape.

        Raises:
            ValueError: a gradient of another shape.
        """
        if gradient.shape != self.latents.shape:
            raise ValueError(f"gradient: expected {list(self.latents.shape)}, got {list(gradient.shape)}")
        return self._terms(gradient.detach())


def _begin(cache: StepCache | None, schedule: Schedule, plan: Plan, chosen: Sequence[int]) -> None:
    if cache is not None:
        timesteps = [step.timestep for step in schedule]
        cache.begin(timesteps, plan.computed(chosen), chosen[0] if chosen else None)


class _Passed(NamedTuple):
    """A step that was taken: where from, and how fast."""

    step: Step
    state: State
    velocity: Tensor


def _sample(
    model: I2VModel,
    condition: Condition,
    state: State,
    schedule: Schedule,
    plan: Plan,
    chosen: Collection[int],
    forward: Forward | None,
    on_step: OnStep | None,
) -> Tensor:
    for step in schedule:
        if step.index in chosen:
            velocity = _differentiated(model, state, step, condition, plan, forward)
        else:
            with torch.no_grad():
                velocity = model.velocity(state, step, condition, forward)
        # Never under no_grad: the linear update is the way by which steps chosen earlier reach the end.
        state = model.advance(state, velocity, step)
        if on_step is not None:
            on_step(step.index + 1, len(schedule))
    return state.latents


def _differentiated(
    model: I2VModel, state: State, step: Step, condition: Condition, plan: Plan, forward: Forward | None
) -> Tensor:
    """The velocity with its graph, checkpointed as planned."""
    if plan.stop_input_gradient:
        state = dataclasses.replace(state, latents=state.latents.detach())
    if not plan.checkpoint_steps:
        with model.block_checkpointing(plan.checkpoint_blocks), offloaded(model.transformer, plan.offload_window):
            return model.velocity(state, step, condition, forward)

    def recomputed(branch: Callable[[Tensor], Tensor], latents: Tensor) -> Tensor:
        def run(latents: Tensor) -> Tensor:
            # Inside, so that a branch that is recomputed checkpoints its blocks as it did the first time.
            with model.block_checkpointing(plan.checkpoint_blocks):
                return branch(latents)

        return checkpoint(run, latents, use_reentrant=False, preserve_rng_state=False)

    # Branch by branch: a backward that recomputes a whole step would hold the graphs of both.
    return model.velocity(state, step, condition, forward, recomputed)


def _through_update(model: I2VModel, at: _Passed, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient with respect to latents and velocity of an update, given that of its result."""
    with torch.enable_grad():
        latents, velocity = (tensor.detach().requires_grad_() for tensor in (at.state.latents, at.velocity))
        after = model.advance(dataclasses.replace(at.state, latents=latents), velocity, at.step).latents
        of_latents, of_velocity = torch.autograd.grad(after, (latents, velocity), gradient)
    return of_latents, of_velocity
