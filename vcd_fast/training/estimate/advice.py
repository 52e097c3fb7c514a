"""What to turn on to fit a GPU, in the order of what it costs."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from pydantic import ValidationError

from vcd_fast.training.estimate.estimate import GIB, Estimate, estimate
from vcd_fast.training.settings import RunConfig

BUDGETS = (12, 16, 24, 48, 80)
"""GB that GPUs come with (as makers count: 2^30 bytes)"""
WORTH = 0.01
"""least part of the memory needed that an option has to save to be advised"""


@dataclasses.dataclass(frozen=True)
class Option:
    section: str
    key: str
    value: Any
    costs: str
    without: Any = None
    """a value of the setting that asks for as little already"""
    exact: bool = True
    """whether the gradient stays that of the same model and reward, rounding apart"""
    alone: bool = False
    """only where there is one GPU"""

    @property
    def flag(self) -> str:
        """As on the command line of a run."""
        name = self.key.replace("_", "-")
        return f"--{name}" if self.value is True else f"--{name} {self.value}"

    def applied(self, config: RunConfig) -> RunConfig | None:
        """`config` with it, None where it has it or knows no such setting."""
        settings = getattr(config, self.section)
        if self.key not in type(settings).model_fields or getattr(settings, self.key) in (self.value, self.without):
            return None
        if self.key == "chunk_frames" and config.reward.frames_per_step == 1:
            return None
        changes = {self.key: self.value}
        if self.key == "batch_size":
            changes["gradient_accumulation"] = settings.batch_size * settings.gradient_accumulation
        try:
            changed = type(settings).model_validate({**settings.model_dump(), **changes})
        except ValidationError:  # does not go together with another setting
            return None
        changed = dataclasses.replace(config, **{self.section: changed})
        return changed if _allowed(changed) else None


OPTIONS = (
    Option("model", "frozen_conv", True, "nothing"),
    Option("training", "zero", 0, "nothing on one GPU", alone=True),
    Option("reward", "chunk_frames", 1, "a little speed"),
    Option("rollout", "checkpointing", "block", "one more forward per differentiated step", "both"),
    Option("training", "batch_size", 1, "speed; gradients are accumulated instead, and the same"),
    Option("rollout", "checkpointing", "both", "one more forward per differentiated step than `block`"),
    Option("model", "guidance_passes", "separate", "a little speed"),
    Option("model", "decode_checkpointing", "resnet", "one more decode in its backward"),
    Option("rollout", "offload", "decode", "time for copies between GPU and CPU, and memory of the CPU", "both"),
    Option("model", "vae_dtype", "bfloat16", "rounding in the decode"),
    Option(
        "model",
        "guidance_gradient",
        "conditional",
        "a known bias: no gradient of the unconditional branch",
        exact=False,
    ),
    Option("model", "decode_context", "truncated", "a known bias: no gradient through earlier latents", exact=False),
    Option(
        "model", "quantization", "nf4", "another base model, its weights rounded to 4 bits (bitsandbytes)", exact=False
    ),
    Option("reward", "frames_per_step", 1, "noisier gradients", exact=False),
)
"""exact ones first, then one that rounds, then those that leave a part of the gradient out or change the base model"""
LAST_RESORT = "fewer --num-frames, a smaller --height and --width, or --zero 3 on several GPUs"


def _allowed(config: RunConfig) -> bool:
    """What a run would refuse is not advised: `check_step_cache`, and what `vcd_fast.config` checks over several sections."""
    rollout, sharded = config.rollout, config.training.zero == 3
    cached_steps = rollout.step_cache != "none" and rollout.plan().checkpoint_steps
    return not (sharded and (cached_steps or rollout.plan().offload_window or config.model.quantization != "none"))


@dataclasses.dataclass(frozen=True)
class Fit:
    """How a run gets into a GPU's memory."""

    budget: int
    """GB"""
    options: tuple[Option, ...]
    estimate: Estimate
    """with them"""

    @property
    def fits(self) -> bool:
        return self.estimate.needed <= self.budget * GIB


def fits(config: RunConfig, gpus: int = 1, budgets: Sequence[int] = BUDGETS) -> list[Fit]:
    """For every budget the first options of `OPTIONS`, of those that help, with which the run fits; or all of them, where it does not."""
    taken: list[Option] = []
    start, found = config, estimate(config, gpus)
    stages = [((), found)]
    helpful = _helpful(config, found, gpus)
    while stages[-1][1].needed > min(budgets) * GIB and (step := next(helpful, None)) is not None:
        taken.append(step[0])
        stages.append((tuple(taken), step[1]))
    result = []
    for budget in sorted(budgets, reverse=True):
        stage = next((stage for stage in stages if stage[1].needed <= budget * GIB), stages[-1])
        result.append(_spared(start, Fit(budget, *stage), gpus))
    return sorted(result, key=lambda fit: fit.budget)


def _spared(config: RunConfig, fit: Fit, gpus: int) -> Fit:
    """Without what is not exact and, given what was taken after it, not needed."""
    for option in fit.options:
        if option.exact or not fit.fits:
            continue
        fewer = tuple(each for each in fit.options if each is not option)
        changed = config
        for each in fewer:
            changed = each.applied(changed) or changed
        without = Fit(fit.budget, fewer, estimate(changed, gpus))
        fit = without if without.fits else fit
    return fit


def next_option(config: RunConfig, gpus: int, phase: str | None) -> tuple[Option, Estimate] | None:
    """The first option that lowers what `phase` takes (None: the peak), and the estimate with it."""
    before = estimate(config, gpus)
    for option in _offered(gpus):
        changed = option.applied(config)
        if changed is not None:
            after = estimate(changed, gpus)
            if _of(after, phase) < (1 - WORTH) * _of(before, phase):
                return option, after
    return None


def _offered(gpus: int) -> list[Option]:
    return [option for option in OPTIONS if gpus == 1 or not option.alone]


def _of(found: Estimate, phase: str | None) -> int:
    at = None if phase is None else found.phase(phase)
    return found.needed if at is None else at.total


def _helpful(config: RunConfig, found: Estimate, gpus: int) -> Iterator[tuple[Option, Estimate]]:
    """Options that lower the largest phase of a step, one on top of the other."""
    for option in _offered(gpus):
        changed = option.applied(config)
        if changed is None:
            continue
        after = estimate(changed, gpus)
        if after.step_peak.total < (1 - WORTH) * found.step_peak.total:
            config, found = changed, after
            yield option, after
