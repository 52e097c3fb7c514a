"""The step cache as the section `rollout` of a run asks for it."""

from __future__ import annotations

from collections.abc import Callable

from vcd_fast.models.base import I2VModel
from vcd_fast.rollout.plan import RolloutSettings
from vcd_fast.rollout.step_cache.hooks import StepCache, StepCacheConfig, apply_step_cache


def build_step_cache(
    model: I2VModel, settings: RolloutSettings, agree: Callable[[bool], bool] | None = None
) -> StepCache | None:
    """Apply the cache to `model.transformer`, switched off until a rollout begins; None without one.

    Call it before an engine shards the weights: where decisions are a function of the timesteps they are made here, once, from
    weights that are whole, so that they are the same on all ranks and for every LoRA.

    Args:
        agree: see `StepCacheConfig`.

    Raises:
        ValueError, OSError: a model or settings that the cache does not know.
    """
    if settings.step_cache == "none":
        return None
    cache = apply_step_cache(model.transformer, _config(settings, agree), model.settings.weights)
    cache.distances(timesteps_of(model, settings.sampling_steps))
    cache.end()
    return cache


def _config(settings: RolloutSettings, agree: Callable[[bool], bool] | None = None) -> StepCacheConfig:
    return StepCacheConfig(
        threshold=settings.cache_threshold,
        coefficients=settings.cache_coefficients,
        mode=settings.cache_mode,
        residual=settings.cache_residual,
        agree=agree,
    )


def timesteps_of(model: I2VModel, sampling_steps: int) -> list[float]:
    """The timesteps of a clip of the size in `model.settings`."""
    size = model.settings
    return [step.timestep for step in model.schedule(sampling_steps, size.height, size.width, size.num_frames)]


def check_step_cache(model: I2VModel, settings: RolloutSettings, sharded: bool = False) -> None:
    """Raise what `build_step_cache` would, but for a model on the meta device.

    Args:
        sharded: the weights are, over ranks (ZeRO-3). When whole steps are recomputed, PyTorch compares the tensors it saves with those of
            the first time. ZeRO-3 foresees which weights are needed next; skipped steps upset that, and then the saved shapes differ.
    """
    if settings.step_cache != "none":
        if sharded and settings.plan().checkpoint_steps:
            raise ValueError(
                f"rollout.checkpointing: with step_cache={settings.step_cache} and ZeRO stage 3 expected block or none, got "
                f"{settings.checkpointing}; `step` and `both` work with the cache at ZeRO stages 0 to 2"
            )
        _config(settings).rule(model.transformer, model.settings.weights)


def describe_step_cache(cache: StepCache, model: I2VModel, settings: RolloutSettings) -> str:
    """The plan of a training rollout in a line."""
    plan, timesteps = settings.plan(), timesteps_of(model, settings.sampling_steps)
    if plan.draws:
        return f"{cache.describe(timesteps)}; drawn steps are computed, too"
    return cache.describe(timesteps, plan.computed(plan.steps(len(timesteps))))
