"""What a run would do, before anything large is loaded."""

from __future__ import annotations

import os
from pathlib import Path

from vcd_fast.data import PictureFolder
from vcd_fast.models.base import I2VModel, family
from vcd_fast.models.lora import add_lora
from vcd_fast.rollout.step_cache.build import build_step_cache, check_step_cache, describe_step_cache
from vcd_fast.training.checkpoint import changes, choose
from vcd_fast.training.randomness import indexed_generator
from vcd_fast.training.settings import RunConfig


def describe(config: RunConfig) -> str:
    """The resolved plan as text: data, steps, gradient window, frames decoded, batch, parameters trained.

    The transformer is built on the meta device: no weights are needed, and none are read but those that a step cache's plan is a
    function of, if they are here.

    Raises:
        ValueError, OSError: what would stop the run at its start.
    """
    model, rollout, training = config.model, config.rollout, config.training
    pictures = PictureFolder(config.data, model.height, model.width)
    meta = family(config.family).load_meta(model)
    step_cache = _step_cache(config, meta)
    trained = sum(parameter.numel() for parameter in add_lora(meta, config.lora, seed=0).values())
    total = sum(parameter.numel() for parameter in meta.transformer.parameters()) - trained
    schedule = meta.schedule(rollout.sampling_steps, model.height, model.width, model.num_frames)
    plan = rollout.plan()
    window = plan.steps(len(schedule), indexed_generator(training.seed, "window", 0))
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    per_step = training.batch_size * training.gradient_accumulation * ranks
    resumed = choose(Path(training.output), training.resume)
    changed = changes(resumed, config.as_dict()) if resumed is not None else []
    if config.reward.vgg19 not in ("imagenet", "random") and not Path(config.reward.vgg19).is_file():
        raise FileNotFoundError(f"vgg19: expected imagenet, random or a file, got {config.reward.vgg19}")
    branches = 1 if model.guidance_scale == 1 else 2
    rows = {
        "model": f"{config.family}, preset {config.preset}, weights {model.weights}, {model.dtype}",
        "video": f"{model.num_frames} frames of {model.width}x{model.height}, {model.fps:g} fps",
        "pictures": f"{len(pictures.training)} for training, {len(pictures.held_out)} held out, in {config.data.pictures}",
        "sampling": f"{len(schedule)} steps, guidance {model.guidance_scale:g} ({branches} forward{'s' * (branches > 1)} per step)",
        "gradients": f"{rollout.backprop}: steps {_ranges(window)} of 0..{len(schedule) - 1}"
        + (" in the first optimizer step, drawn anew in each" if plan.draws else "")
        + f"; timesteps {', '.join(f'{schedule[i].timestep:.1f}' for i in window[:6])}{', ...' if len(window) > 6 else ''}",
        "step cache": step_cache,
        "checkpointing": rollout.checkpointing,
        "reward": f"-VCD ({config.reward.distance}) of {', '.join(config.reward.config.layers)}, {config.reward.num_projections} directions, "
        f"{config.reward.frames_per_step} of frames 1..{model.num_frames - 1} decoded per clip and step",
        "trained": f"{trained:,} LoRA parameters (rank {config.lora.rank}, alpha {config.lora.alpha:g}) on {total:,} frozen ones",
        "batch": f"{training.batch_size} per device x {training.gradient_accumulation} accumulated x {ranks} devices = {per_step} clips",
        "optimizer": f"AdamW, learning rate {training.learning_rate:g}, clipped at {training.max_grad_norm:g}, ZeRO {training.zero}",
        "steps": f"{training.max_train_steps} optimizer steps, {training.max_train_steps * per_step} clips, "
        f"{training.max_train_steps * per_step / len(pictures.training):.1f} passes over the pictures",
        "output": f"{training.output}"
        + (f", going on from step {resumed.step}" if resumed is not None else ", from the start")
        + (f"; changed since then: {'; '.join(changed)}" if changed else ""),
    }
    width = max(map(len, rows))
    return "\n".join(f"{name:<{width}}  {text}" for name, text in rows.items())


def _step_cache(config: RunConfig, meta: I2VModel) -> str:
    """Which steps the rollout computes. Of the weights only the time embedding is read, if they are on this machine."""
    if config.rollout.step_cache == "none":
        return "none"
    check_step_cache(meta, config.rollout, sharded=config.training.zero == 3)
    fill = getattr(family(config.family), "fill_time_embedding", None)
    if fill is not None and not fill(meta.transformer, config.model):
        return "teacache; the plan depends on the weights, which are not on this machine"
    return describe_step_cache(build_step_cache(meta, config.rollout), meta, config.rollout)


def _ranges(steps: tuple[int, ...]) -> str:
    """(27, 28, 29) -> "27..29"; others one by one."""
    if len(steps) > 2 and steps == tuple(range(steps[0], steps[-1] + 1)):
        return f"{steps[0]}..{steps[-1]}"
    return ", ".join(map(str, steps))
