"""A run from its configuration to a LoRA, top to bottom."""

from __future__ import annotations

import math
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from vcd_fast.data import PictureFolder
from vcd_fast.devices import pick_device
from vcd_fast.models import lora
from vcd_fast.models.base import family
from vcd_fast.models.encoding_cache import EncodingItem, encode_all
from vcd_fast.rewards.vcd import VCDReward
from vcd_fast.rollout.step_cache.build import build_step_cache, check_step_cache, describe_step_cache
from vcd_fast.rollout.step_cache.drift import measure_drift
from vcd_fast.training import checkpoint as checkpoints
from vcd_fast.training import engine as engines
from vcd_fast.training import record, resume
from vcd_fast.training.log import RunLog
from vcd_fast.training.memory import peak_memory_gib, reset_peak_memory
from vcd_fast.training.optimizer_state import (
    discard_gradients,
    gather_moments,
    gather_parameters,
    restore_moments,
    set_learning_rate,
)
from vcd_fast.training.out_of_memory import explain, is_out_of_memory
from vcd_fast.training.progress import Reporter
from vcd_fast.training.randomness import indexed_generator, indexed_seed
from vcd_fast.training.samples import BASE, HeldOut, HeldOutClip
from vcd_fast.training.settings import RunConfig
from vcd_fast.training.step import Batch, PhaseClock, micro_step


class TooManyBadSteps(ValueError):
    """Rewards or gradients were not finite for too many steps in a row."""


class OutOfMemory(ValueError):
    """The GPU, or the machine, was too small for the settings."""


class Stopped(Exception):
    """A signal asked for the end; all ranks raise it at the same point."""


def train(config: RunConfig, command: Sequence[str] = ()) -> dict[str, Any]:
    """Train, or go on training, one LoRA. Every rank of the launcher calls it.

    Args:
        config: the run.
        command: the command line, for the record.

    Returns:
        the summary that is also written to `OUTPUT/summary.json`.

    Raises:
        ValueError, OSError: something its user has to change; see the messages.
    """
    device = pick_device(config.training.device)
    engines.init_distributed(device)
    clock = PhaseClock(device)
    try:
        return Run(config, device, list(command), clock).train()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(explain(error, config, clock.current, device, dist.get_world_size())) from error
    finally:
        dist.destroy_process_group()


class Run:
    """What is alive while a run trains."""

    def __init__(self, config: RunConfig, device: torch.device, command: list[str], clock: PhaseClock | None = None):
        self.config = config
        self.device = device
        self.clock = clock or PhaseClock(device)
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.settings = config.training
        self.output = Path(self.settings.output)
        self.reporter = Reporter(enabled=self.rank == 0)
        self.stop = StopRequest()

        # What can be wrong is found before anything large is loaded or written.
        size = config.model.height, config.model.width
        family(config.family).missing_weights(config.model)  # raises where they are named wrongly or not at all
        self.pictures = PictureFolder(config.data, *size)
        resumed = resume.choose(self.output, self.settings.resume, self.device)
        changes = checkpoints.changes(resumed, config.as_dict()) if resumed is not None else []
        if resumed is not None and resumed.step > self.settings.max_train_steps:
            raise ValueError(
                f"max_train_steps: expected at least {resumed.step}, where the run in {self.output} stands, got "
                f"{self.settings.max_train_steps}; choose another --output to start a new one"
            )
        self.reward = VCDReward(config.reward, device)
        if config.rollout.step_cache != "none":
            meta = family(config.family).load_meta(config.model)
            check_step_cache(meta, config.rollout, sharded=self.settings.zero == 3)
        with self.clock.phase("encode"):
            self._encode()

        with self.clock.phase("load"):
            self.model = family(config.family).load_model(config.model, device)
        # Before a LoRA is added and weights are sharded. Ranks compute a step if one of them has to.
        self.cache = build_step_cache(
            self.model, config.rollout, lambda flag: not engines.all_agree(not flag, self.device)
        )
        if self.cache is not None:
            self.reporter.say(f"step cache: {describe_step_cache(self.cache, self.model, config.rollout)}")
        self.parameters = lora.add_lora(self.model, config.lora, indexed_seed(self.settings.seed, "lora"))
        if resumed is not None:
            with torch.no_grad():
                for name, parameter in self.parameters.items():
                    parameter.copy_(resumed.lora[name])
        self.schedule = self.model.schedule(config.rollout.sampling_steps, *size, config.model.num_frames)
        self.plan = config.rollout.plan()
        dtype = getattr(torch, config.model.dtype)
        self.engine = engines.build(self.model.transformer, list(self.parameters.values()), self.settings, dtype)
        self.step, self.updates, self.bad_in_a_row = 0, 0, 0
        if resumed is not None:
            self.step, self.updates = resumed.step, resumed.updates
            restore_moments(self.engine, self.parameters, resumed.moments, self.updates)
            self.reporter.say(f"resumed from step {self.step} of {self.output}")
            if resumed.extra["data_hash"] != self.pictures.data_hash:
                self.reporter.say("note: pictures or prompts have changed since that checkpoint was written")
            if changes:
                self.reporter.say(f"note: changed since then: {'; '.join(changes)}")
        self.held_out = HeldOut(
            self._held_out_clips(), self.model, self.reward, config.rollout.sampling_steps, self.output
        )
        self._on_first_rank(lambda: self._open_folder(command))

    # --- before the first step -------------------------------------------------------------------------------------------------

    def _open_folder(self, command: list[str]) -> None:
        facts = {"data_hash": self.pictures.data_hash, "first_step": self.step}
        record.write_record(self.output, self.config, command, self.world, **facts)
        checkpoints.forget_after(self.output, self.step)
        self.log = RunLog(self.output, self.step, self.settings.tensorboard)

    def _encode(self) -> None:
        """Encode prompts and pictures once; ranks share the work, the results lie on disk, the encoders are gone afterwards."""
        model = self.config.model
        items = [
            EncodingItem(self.pictures.image(index), sample.prompt, sample.negative_prompt or model.negative_prompt)
            for index, sample in enumerate(self.pictures.samples)
        ]
        encoder = family(self.config.family).load_encoder(model, self.device)
        folder = Path(self.settings.cache or self.output / "encodings")
        arguments = (folder, model.height, model.width, model.num_frames)
        with self.reporter.bar("encoding", len(items)):
            encode_all(encoder, items[self.rank :: self.world], *arguments, on_progress=self._advance)
        dist.barrier()
        self.conditions = encode_all(encoder, items, *arguments)
        reset_peak_memory(self.device)  # what counts from here on is training

    def _held_out_clips(self) -> list[HeldOutClip]:
        indices = self.pictures.held_out[: self.settings.sample_pictures]
        if self.settings.overfit:
            indices = [self._overfit_index]
        clips = []
        for index in indices:
            for k in range(self.settings.sample_seeds):
                seed = indexed_seed(self.settings.seed, "held out", index, k)
                if self.settings.overfit:
                    seed = indexed_seed(self.settings.seed, "noise", 0)
                name = f"{self.pictures.samples[index].name}-{k}"
                clips.append(HeldOutClip(name, self.conditions[index], self.pictures.image(index), seed))
        return clips[:1] if self.settings.overfit else clips

    @property
    def _overfit_index(self) -> int:
        return self.pictures.training[0]

    # --- the loop --------------------------------------------------------------------------------------------------------------

    def train(self) -> dict[str, Any]:
        total, every = self.settings.max_train_steps, self.settings.checkpoint_every
        started = time.perf_counter()
        with self.stop, self.reporter.bar("training", total, self.step):
            try:
                if self.step > 0 and not engines.all_agree(self.held_out.has(BASE), self.device):
                    with lora.lora_disabled(self.model):  # resumed from another run's checkpoint
                        self._evaluate(BASE, step=0)
                while True:
                    if self._sample_due():
                        tuned = self._evaluate(BASE if self.step == 0 else f"step-{self.step:06d}", self.step)
                    if self.step == total:
                        break
                    self._train_step()
                    if self.step == total or (every and self.step % every == 0):
                        self._checkpoint()
            except Stopped:
                self._checkpoint()
                self.reporter.say(
                    f"stopped by {self.stop.name} after step {self.step}; the same command goes on from there"
                )
                return {"step": self.step, "stopped": True}
        return self._finish(tuned, time.perf_counter() - started)

    def _stop_if_asked(self) -> None:
        """Collective."""
        if not engines.all_agree(not self.stop.requested, self.device):
            raise Stopped

    def _sample_due(self) -> bool:
        every = self.settings.sample_every
        return self.step in (0, self.settings.max_train_steps) or bool(every and self.step % every == 0)

    def _train_step(self) -> None:
        clock = self.clock
        clock.seconds.clear()
        set_learning_rate(self.engine, self._learning_rate())
        accumulated, finite, rewards, metrics = False, True, [], {}
        for micro in range(self.settings.gradient_accumulation):
            try:
                self._stop_if_asked()  # before every micro-step: a launcher waits half a minute for the end, a step may take longer
            except Stopped:
                if accumulated:
                    discard_gradients(self.engine, self.parameters)
                raise
            done = micro_step(
                self.model,
                self.engine,
                lambda loss: self.engine.backward(loss, scale_wrt_gas=False),
                self.schedule,
                self.plan,
                self.reward,
                self._batch(micro),
                scale=1 / self.settings.gradient_accumulation,
                agree=lambda flag: engines.all_agree(flag, self.device),
                clock=clock,
                cache=self.cache,
            )
            rewards.append(done.reward.float().mean())
            metrics = {
                name: metrics.get(name, 0.0) + value / self.settings.gradient_accumulation
                for name, value in done.metrics.items()
            }
            finite = done.finite
            if not finite:
                break
            accumulated = True
        applied, norm = False, math.nan
        if accumulated and not finite:
            discard_gradients(self.engine, self.parameters)
        elif accumulated:
            with clock.phase("optimizer"):
                self.engine.step()
            applied, norm = self.engine.was_step_applied(), float(self.engine.get_global_grad_norm())
        self._account(applied, norm, torch.stack(rewards).mean(), metrics, clock)

    def _account(
        self, applied: bool, norm: float, reward: torch.Tensor, metrics: dict[str, float], clock: PhaseClock
    ) -> None:
        """Count, log and show a step; give up after too many bad ones."""
        reward = engines.mean_over_ranks(reward, self.device).item()
        metrics = {
            name: engines.mean_over_ranks(torch.tensor(value), self.device).item() for name, value in metrics.items()
        }
        self.updates += applied
        self.bad_in_a_row = 0 if applied else self.bad_in_a_row + 1
        memory = peak_memory_gib(self.device)
        if self.rank == 0:
            self.log.write(
                "train",
                self.step,
                reward=reward,
                grad_norm=norm,
                applied=applied,
                learning_rate=self._learning_rate(),
                seconds={name: round(value, 4) for name, value in clock.seconds.items()},
                memory_gib=round(memory, 3),
                **metrics,
            )
        self.step += 1
        shown = {"reward": f"{reward:.4f}", "grad norm": f"{norm:.3g}", "memory": f"{memory:.2f} GiB"}
        shown["seconds"] = ", ".join(f"{name} {value:.2f}" for name, value in clock.seconds.items())
        if not applied:
            shown["skipped"] = "reward or gradient not finite"
        self.reporter.step(self.step, self.settings.max_train_steps, shown)
        if self.bad_in_a_row >= self.settings.max_bad_steps:
            raise TooManyBadSteps(
                f"max_bad_steps: reward or gradient was not finite in {self.bad_in_a_row} steps in a row, up to step {self.step}; "
                "no weight was touched by them. Lower --learning-rate, and go on from an earlier checkpoint with "
                f"--resume {self.output / checkpoints.FOLDER}/step-..., or start again with another --output"
            )

    def _batch(self, micro: int) -> Batch:
        """The clips of a micro-step on this rank, from the indices of the run alone."""
        seed, size = self.settings.seed, self.settings.batch_size
        first = ((self.step * self.settings.gradient_accumulation + micro) * self.world + self.rank) * size
        positions = range(first, first + size)
        if self.settings.overfit:
            indices, noise = [self._overfit_index] * size, [0] * size
        else:
            indices, noise = [self.pictures.order(seed, p) for p in positions], list(positions)
        condition = type(self.conditions[0]).collate([self.conditions[i] for i in indices])
        return Batch(
            condition=condition.to(self.device),
            image=torch.stack([self.pictures.image(i) for i in indices]).to(self.device),
            prompts=[self.pictures.samples[i].prompt for i in indices],
            noise=[indexed_generator(seed, "noise", n) for n in noise],
            frames=[indexed_generator(seed, "frames", p) for p in positions],
            # the same on all ranks, which under ZeRO-3 have to run the same number of forwards, and so in all micro-steps
            window=indexed_generator(seed, "window", self.step),
            step=self.step,
        )

    def _learning_rate(self) -> float:
        warmup = self.settings.warmup_steps
        return self.settings.learning_rate * (min(1.0, (self.step + 1) / warmup) if warmup else 1.0)

    # --- what is written -------------------------------------------------------------------------------------------------------

    def _evaluate(self, name: str, step: int) -> dict[str, float]:
        if not self.held_out.clips:
            return {}
        bar = self.reporter.bar(f"held-out clips, {name}", len(self.held_out.clips))
        with bar, self.clock.phase("samples"):
            distances = self.held_out.evaluate(name, self.engine, self._after_clip)
        mean = _mean(distances)
        if self.rank == 0:
            self.log.write("held_out", step, vcd=mean, clips=distances)
        self.reporter.say(f"held-out VCD after {step} steps: {mean:.4f} ({len(distances)} clips, same noise)")
        self._measure_drift(step)
        return distances

    def _measure_drift(self, step: int) -> None:
        """How far the step cache takes the first held-out clip from what is sampled without it. Collective."""
        if self.cache is None:
            return
        clip, steps = self.held_out.clips[0], len(self.schedule)
        fixed = () if self.plan.draws else self.plan.computed(self.plan.steps(steps))
        drift = measure_drift(
            self.model,
            clip.condition.to(self.device),
            [clip.noise_seed],
            steps,
            self.cache,
            forward=self.engine,
            compute_at=fixed,
        )
        if self.rank == 0:
            self.log.write("step_cache", step, drift=drift.latents, computed=drift.computed, steps=drift.steps)
        self.reporter.say(
            f"step cache: {drift.computed} of {drift.steps} steps end {100 * drift.latents:.2g} % from the full rollout"
        )

    def _checkpoint(self) -> None:
        state = checkpoints.Checkpoint(
            step=self.step,
            updates=self.updates,
            lora=gather_parameters(self.engine, self.parameters),
            moments=gather_moments(self.engine, self.parameters),
            extra={"data_hash": self.pictures.data_hash, "config": self.config.as_dict()},
        )
        self._on_first_rank(lambda: checkpoints.save(self.output, state, self.settings.keep_checkpoints))

    def _finish(self, tuned: dict[str, float], seconds: float) -> dict[str, Any]:
        """The LoRA, the plot and the summary."""
        weights = gather_parameters(self.engine, self.parameters)
        summary: dict[str, Any] = {}

        def write() -> None:
            self.log.close()
            lora.save_lora(self.model, self.output / record.LORA_FOLDER, weights)
            summary.update(
                step=self.step,
                updates=self.updates,
                skipped=self.step - self.updates,
                held_out_vcd_before=record.held_out_at(self.output, 0),
                held_out_vcd_after=tuned,
                seconds=round(seconds, 1),
                peak_memory_gib=round(peak_memory_gib(self.device), 3),
                largest_lora_value=max(value.abs().max().item() for value in weights.values()),
            )
            record.write_summary(self.output, summary)
            record.plot_run(self.output)

        self._on_first_rank(write)
        if self.rank == 0:
            before, after = summary["held_out_vcd_before"], summary["held_out_vcd_after"]
            if before and after:
                self.reporter.say(f"held-out VCD, same noise: {_mean(before):.4f} before, {_mean(after):.4f} after")
            else:
                self.reporter.say("no picture is held out, so there is no held-out VCD")
            places = {"LoRA": record.LORA_FOLDER, "log": "log.jsonl", "plot": "reward.png", "samples": "samples"}
            for name, place in places.items():
                self.reporter.say(f"{name:<8} {self.output / place}")
        return summary

    def _on_first_rank(self, action: Callable[[], object]) -> None:
        """Run on rank 0 what may fail there; the other ranks learn of it instead of waiting for ever."""
        failure: Exception | None = None
        if self.rank == 0:
            try:
                action()
            except Exception as error:
                failure = error
        if not engines.all_agree(failure is None, self.device):
            if failure is not None:
                raise failure
            sys.exit(1)

    def _after_clip(self, done: int, total: int) -> None:
        self._advance(done, total)
        self._stop_if_asked()

    def _advance(self, done: int, total: int) -> None:
        self.reporter.advance(done)


def _mean(distances: dict[str, float]) -> float:
    return sum(distances.values()) / len(distances)


class StopRequest:
    """SIGTERM and SIGINT ask for a checkpoint and an orderly end after the current step; a second SIGINT ends at once."""

    def __init__(self) -> None:
        self.requested = False
        self.name = "a signal on another rank"

    def __enter__(self) -> StopRequest:
        self._before = {number: signal.signal(number, self._handle) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: object) -> None:
        if number == signal.SIGINT and self.name == "SIGINT":
            raise KeyboardInterrupt
        if not self.requested:
            self.requested, self.name = True, signal.Signals(number).name
