"""The step cache as diffusers hooks: skipped steps add the blocks' last effect to the tokens instead of running the blocks.

Gradients stay right because nothing is decided where it could be decided twice. A hook on the whole transformer decides before any block
runs, outside every checkpointed region, once per step and branch, and keeps the decision; a forward that is recomputed in the
backward finds it. Hooks on the blocks look only at the forward that is under way. A block that its own checkpoint recomputes finds none
and runs as it is.

    cache = apply_step_cache(pipe.transformer, StepCacheConfig(num_inference_steps=50))
    pipe(..., num_inference_steps=50)
    remove_step_cache(pipe.transformer)
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, Literal

import torch
from diffusers.hooks.hooks import BaseState, HookRegistry, ModelHook, StateManager
from torch import Tensor, nn

from vcd_fast.rollout.step_cache.coefficients import ENDS, Coefficients, find
from vcd_fast.rollout.step_cache.indicators import Indicator, Mode, indicator_for, named_arguments, relative_distance
from vcd_fast.rollout.step_cache.policy import Rule, describe_map, skip_map

ROOT_HOOK, BLOCK_HOOK = "vcd_fast_step_cache", "vcd_fast_step_cache_block"
Residual = Literal["in-graph", "detached"]


@dataclasses.dataclass(frozen=True)
class StepCacheConfig:
    """How `apply_step_cache` caches.

    Args:
        num_inference_steps: steps of a video, which stock pipelines do not tell their transformer. Not needed where `StepCache.begin`
            is called or every `cache_context` names it.
        threshold: skip while the estimated change stays below; None: what was published with the coefficients.
        coefficients: None: those published for the model; the name of a published set; a file of `vcd calibrate`; or numbers, highest
            power first.
        mode: what is compared, see `indicators`; None: `ret` where it was published.
        first, last: steps at both ends that are always computed; None: 5 and 0 (`ret`), 1 and 1 (`non-ret`).
        residual: a skipped step passes its gradient on to the step whose effect it repeats (`in-graph`, the exact gradient of the cached
            sampler) or does not (`detached`).
        agree: called with every decision that is not forced, returns the one to follow; all-reduces it where ranks could differ.
    """

    num_inference_steps: int | None = None
    threshold: float | None = None
    coefficients: str | Sequence[float] | None = None
    mode: Mode | None = None
    first: int | None = None
    last: int | None = None
    residual: Residual = "in-graph"
    agree: Callable[[bool], bool] | None = None

    def rule(self, transformer: nn.Module, weights: str | None = None) -> tuple[Rule, Coefficients]:
        """The rule for a transformer. Errors as of `coefficients.find`, and a ValueError where a threshold has to be chosen."""
        if self.coefficients is None or isinstance(self.coefficients, str):
            found = find(transformer, self.mode, self.coefficients, weights)
        else:
            found = Coefficients(
                "given", tuple(map(float, self.coefficients)), self.mode or "non-ret", "given as numbers"
            )
        threshold = found.threshold if self.threshold is None else self.threshold
        if threshold is None:
            raise ValueError(
                f"threshold: no default was published for the step cache coefficients {found.name} ({found.mode}); choose one "
                "(rollout.cache_threshold): a larger one skips more steps. `vcd calibrate` prints what thresholds skip"
            )
        first, last = ENDS[found.mode]
        first = first if self.first is None else self.first
        last = last if self.last is None else self.last
        return Rule(found.values, threshold, first, last), found


def apply_step_cache(transformer: nn.Module, config: StepCacheConfig, weights: str | None = None) -> StepCache:
    """Cache steps of `transformer` (Wan's or Open-Sora's), until `remove_step_cache`.

    Args:
        weights: name of the weights where the transformer does not know it, to find published coefficients.

    Raises:
        ValueError: another cache is enabled; a model or settings that the cache does not know (see `coefficients.find`).
    """
    if getattr(transformer, "_cache_config", None) is not None:
        raise ValueError(f"transformer: a cache is enabled already ({type(transformer._cache_config).__name__})")
    rule, coefficients = config.rule(transformer, weights)
    cache = StepCache(transformer, config, rule, coefficients)
    HookRegistry.check_if_exists_or_initialize(transformer).register_hook(_RootHook(cache), ROOT_HOOK)
    for index, block in enumerate(cache.indicator.blocks):
        ends = index == 0, index == len(cache.indicator.blocks) - 1
        HookRegistry.check_if_exists_or_initialize(block).register_hook(_BlockHook(cache, *ends), BLOCK_HOOK)
    transformer._diffusers_hook.invalidate_child_registries_cache()
    transformer._cache_config = config
    return cache


def remove_step_cache(transformer: nn.Module) -> None:
    """Undo `apply_step_cache`.

    Raises:
        ValueError: it was not applied.
    """
    if not isinstance(getattr(transformer, "_cache_config", None), StepCacheConfig):
        raise ValueError("transformer: no step cache was applied to it")
    registry = transformer._diffusers_hook
    registry.remove_hook(ROOT_HOOK, recurse=False)
    registry.remove_hook(BLOCK_HOOK, recurse=True)
    registry.invalidate_child_registries_cache()
    transformer._cache_config = None


class StepCache:
    """An applied cache.

    In stock pipelines it needs no attention. A sampler with gradients calls `begin` before every video and `end` after the backward.
    """

    def __init__(self, transformer: nn.Module, config: StepCacheConfig, rule: Rule, coefficients: Coefficients) -> None:
        self.config = config
        self.rule = rule
        self.coefficients = coefficients
        self.indicator: Indicator = indicator_for(transformer, coefficients.mode)
        self.active = True
        """whether steps are cached at all"""
        self._transformer = transformer
        self._states = StateManager(_Branch)
        self._call: _Call | None = None
        self._video: _Video | None = None
        self._distances: dict[tuple[float, ...], tuple[float, ...]] = {}

    def distances(self, timesteps: Sequence[float]) -> tuple[float, ...] | None:
        """Of every step from the one before (the first is 0), or None for a model whose distances depend on the latents.

        Kept: what a later change of weights does to them is not looked at. So call it before weights are sharded over ranks.
        """
        if not self.indicator.timestep_only:
            return None
        key = tuple(timesteps)
        if key not in self._distances:
            seen = [self.indicator.at(self._transformer, t) for t in timesteps]
            pairs = zip(seen[1:], seen[:-1], strict=True)
            self._distances[key] = (0.0, *(relative_distance(*pair) for pair in pairs))
        return self._distances[key]

    def plan(self, timesteps: Sequence[float], compute_at: Collection[int] = ()) -> tuple[bool, ...] | None:
        """For every step whether it is computed; None where that depends on the latents."""
        distances = self.distances(timesteps)
        return None if distances is None else skip_map(self.rule, distances, compute_at)

    def begin(
        self, timesteps: Sequence[float], compute_at: Collection[int] = (), recomputed_from: int | None = None
    ) -> None:
        """Start a video, forget the one before, and switch the cache on.

        Args:
            timesteps: of all steps of the video.
            compute_at: steps that are computed whatever the rule says; among them the first one that carries gradients.
            recomputed_from: the first step that a backward may run again; earlier ones are not kept for it.

        Raises:
            ValueError: steps that carry gradients and none of them computed.
        """
        known = self.plan(timesteps, compute_at)
        if recomputed_from is not None:
            window = range(recomputed_from, len(timesteps))
            certain = [step in compute_at or self.rule.is_forced(step, len(timesteps)) for step in window]
            if not any(certain if known is None else known[recomputed_from:]):
                raise ValueError(
                    f"step cache: none of the steps {recomputed_from}..{len(timesteps) - 1} that carry gradients is computed, so there would "
                    "be no gradient; name the first of them in compute_at"
                )
        self._states.reset()
        self._video = _Video(len(timesteps), frozenset(compute_at), recomputed_from, self.distances(timesteps))
        self.active = True

    def end(self) -> None:
        """Forget the video and switch the cache off. After the backward: a step that is recomputed later would be decided anew."""
        self._states.reset()
        self._video = None
        self.active = False

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Every step is computed within it."""
        before, self.active = self.active, False
        try:
            yield
        finally:
            self.active = before

    @property
    def decisions(self) -> tuple[bool, ...]:
        """For the steps of the present video so far whether they were computed (in the branch that ran first)."""
        for branch in self._states._state_cache.values():
            return tuple(branch.steps[index].compute for index in sorted(branch.steps))
        return ()

    def describe(self, timesteps: Sequence[float], compute_at: Collection[int] = ()) -> str:
        """The plan, where it is known, and by which rule, in a line."""
        plan = self.plan(timesteps, compute_at)
        rule = f"threshold {self.rule.threshold:g}, {self.coefficients.name} ({self.coefficients.mode})"
        if plan is None:
            ends = f"the first {self.rule.first} and last {self.rule.last} of {len(timesteps)} steps computed"
            return f"decided step by step, as the latents say; {ends}; {rule}"
        return f"{describe_map(plan)}; {rule}"


@dataclasses.dataclass(frozen=True)
class _Video:
    num_steps: int
    compute_at: frozenset[int]
    recomputed_from: int | None
    distances: tuple[float, ...] | None


@dataclasses.dataclass(frozen=True)
class _Step:
    """What was decided; for a skipped step that may be run again, with which residual."""

    compute: bool
    residual: Tensor | None


class _Branch(BaseState):
    """One branch of guidance of one video."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.steps: dict[int, _Step] = {}
        self.accumulated = 0.0
        self.indicator: Tensor | None = None
        self.timestep: float | None = None
        self.residual: Tensor | None = None
        self.computed_with_gradients = False


@dataclasses.dataclass
class _Call:
    """A forward of the transformer that is under way."""

    residual: Tensor | None
    """None: compute"""
    tokens_in: Tensor | None = None
    tokens_out: Tensor | None = None


class _RootHook(ModelHook):
    _is_stateful = True

    def __init__(self, cache: StepCache) -> None:
        super().__init__()
        self.cache = cache
        self.state_manager = cache._states  # found by diffusers, which sets its context

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        cache = self.cache
        if not cache.active or self.state_manager._context is None:
            return self.fn_ref.original_forward(*args, **kwargs)
        branch = self.state_manager.get_state()
        arguments = named_arguments(module, args, kwargs)
        index = self._index(branch, arguments)
        known = branch.steps.get(index)
        if known is None:
            compute = self._decide(module, branch, index, arguments)
            call = _Call(None if compute else branch.residual)
        else:
            call = self._repeated(known, index)
        cache._call = call
        try:
            output = self.fn_ref.original_forward(*args, **kwargs)
        finally:
            cache._call = None
        if known is None:
            self._keep(branch, index, call)
        return output

    def _index(self, branch: _Branch, arguments: dict[str, Any]) -> int:
        """Which step this is. Pipelines that do not say are counted: timesteps fall within a video."""
        given = self.state_manager.context.step_index
        if given is not None:
            starts_again = given == 0 and branch.steps and self.cache._video is None and not torch.is_grad_enabled()
            if starts_again:
                branch.reset()
            return int(given)
        if torch.is_grad_enabled():
            raise ValueError("cache_context: expected step_index where gradients are computed, got none")
        timestep = float(arguments["timestep"].flatten()[0])
        if branch.timestep is not None and timestep >= branch.timestep:
            branch.reset()
        branch.timestep = timestep
        return len(branch.steps)

    def _num_steps(self) -> int:
        video, context = self.cache._video, self.state_manager.context
        if video is not None:
            return video.num_steps
        found = context.num_inference_steps or self.cache.config.num_inference_steps
        if found is None:
            raise ValueError("num_inference_steps: the step cache was not told how many steps a video has")
        return int(found)

    def _decide(self, module: nn.Module, branch: _Branch, index: int, arguments: dict[str, Any]) -> bool:
        cache, rule, video, total = self.cache, self.cache.rule, self.cache._video, self._num_steps()
        if index >= total:
            raise ValueError(f"num_inference_steps: the step cache was told {total} steps, and there are more")
        known = None if video is None else video.distances
        previous = branch.indicator
        if known is None:
            branch.indicator = cache.indicator(module, arguments)
        # without an effect to repeat there is nothing to decide
        forced = rule.is_forced(index, total) or branch.residual is None
        if forced or (video is not None and index in video.compute_at):
            compute, branch.accumulated = True, 0.0
        else:
            distance = relative_distance(branch.indicator, previous) if known is None else known[index]
            compute, branch.accumulated = rule.decide(branch.accumulated, distance)
            if cache.config.agree is not None:
                compute = cache.config.agree(compute)
                branch.accumulated = 0.0 if compute else branch.accumulated
        if not compute and torch.is_grad_enabled() and not branch.computed_with_gradients:
            raise ValueError(
                f"step cache: step {index} builds a graph and repeats the effect of a step that built none, so its gradient would be "
                "missing; the first step with gradients has to be computed: name it in StepCache.begin(compute_at=...)"
            )
        return compute

    def _repeated(self, known: _Step, index: int) -> _Call:
        if not known.compute and known.residual is None:
            raise RuntimeError(f"step cache: step {index} is run a second time, and what it repeats was not kept")
        return _Call(known.residual)

    def _keep(self, branch: _Branch, index: int, call: _Call) -> None:
        video, gradients = self.cache._video, torch.is_grad_enabled()
        if video is None:
            again = gradients
        else:
            again = video.recomputed_from is not None and index >= video.recomputed_from
        branch.steps[index] = _Step(call.residual is None, call.residual if again else None)
        if call.residual is None:
            residual = call.tokens_out - call.tokens_in
            branch.residual = residual if self.cache.config.residual == "in-graph" else residual.detach()
            branch.computed_with_gradients |= gradients

    def reset_state(self, module: nn.Module) -> nn.Module:
        self.state_manager.reset()
        return module


class _BlockHook(ModelHook):
    def __init__(self, cache: StepCache, is_first: bool, is_last: bool) -> None:
        super().__init__()
        self.cache, self.is_first, self.is_last = cache, is_first, is_last

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        call = self.cache._call
        if call is None:
            return self.fn_ref.original_forward(*args, **kwargs)
        tokens = args[0] if args else kwargs["hidden_states"]
        if call.residual is not None:
            return tokens + call.residual if self.is_first else tokens
        if self.is_first:
            call.tokens_in = tokens
        output = self.fn_ref.original_forward(*args, **kwargs)
        if self.is_last:
            call.tokens_out = output
        return output
