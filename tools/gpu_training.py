#!/usr/bin/env python3
"""Steps of training at full size with random weights: seconds and peak memory of every phase, and what `vcd estimate` says of them.

    python tools/gpu_training.py wan runs/gpu/wan.json           # every row that the file lacks, each in a process of its own
    python tools/gpu_training.py wan rows.json --row teacache    # one of them
    python tools/gpu_training.py opensora rows.json --list
    python tools/gpu_training.py wan rows.json --estimate        # afterwards, on any machine: adds the estimates

The model is made of its published shape with the random weights its classes begin with, the condition is noise, and nothing but the rows is
written. What runs is the trainer's own step (`vcd_fast.training.step`, the DeepSpeed engine). Rewards mean nothing. How many steps the cache
skips depends on weights, so with these it says nothing about a trained model; seconds per computed step do. GPU_SESSION_UNTIL: seconds since
1970 after which no row is begun; exit code 75 where some are left.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from gpu_parts import use_tree, write

use_tree()

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from vcd_fast.config import compose  # noqa: E402
from vcd_fast.models import lora  # noqa: E402
from vcd_fast.models.base import Condition, I2VModel, family  # noqa: E402
from vcd_fast.rewards.vcd import VCDReward  # noqa: E402
from vcd_fast.rollout.step_cache.build import build_step_cache  # noqa: E402
from vcd_fast.training.estimate import estimate  # noqa: E402
from vcd_fast.training.randomness import indexed_generator, indexed_seed  # noqa: E402
from vcd_fast.training.settings import RunConfig  # noqa: E402
from vcd_fast.training.step import Batch, PhaseClock, micro_step  # noqa: E402

MORE = 75
STEPS, FEW = 30, 4
PRESETS = {"wan": "1.3b", "opensora": "240p"}
FIXED = {
    "reward": {"vgg19": "random"},
    "data": {"pictures": "."},
    "training": {"gradient_accumulation": 1, "learning_rate": 1e-5},
}
"""over the preset: nothing is downloaded, and a step is one clip"""


@dataclasses.dataclass(frozen=True)
class Row:
    """What differs from the preset without step cache, and for how many steps."""

    overlay: dict[str, dict[str, Any]]
    steps: int = FEW


def rows_of(family_name: str) -> dict[str, Row]:
    """The rows, the most telling first: with and without the step cache for 30 steps, then every option against memory for a few."""
    both = {
        "preset": Row({}, STEPS),
        "teacache": Row({"rollout": {"step_cache": "teacache"}}, STEPS),
        "checkpointing none": Row({"rollout": {"checkpointing": "none"}}),
        "checkpointing step": Row({"rollout": {"checkpointing": "step"}}),
        "checkpointing both": Row({"rollout": {"checkpointing": "both"}}),
        "offload both": Row({"rollout": {"offload": "both"}}),
        "frozen_conv off": Row({"model": {"frozen_conv": False}}),
        "vae bfloat16": Row({"model": {"vae_dtype": "bfloat16"}}),
        "guidance_gradient conditional": Row({"model": {"guidance_gradient": "conditional"}}),
        "frames_per_step 8": Row({"reward": {"frames_per_step": 8}}),
        "frames_per_step 8, chunk_frames 1": Row({"reward": {"frames_per_step": 8, "chunk_frames": 1}}),
    }
    own = {
        "wan": {
            "decode_checkpointing resnet": Row({"model": {"decode_checkpointing": "resnet"}}),
            "decode_context truncated": Row({"model": {"decode_context": "truncated"}}),
        },
        "opensora": {"guidance_passes separate": Row({"model": {"guidance_passes": "separate"}})},
    }
    return {**both, **own[family_name]}


def config_of(family_name: str, row: Row, preset: str | None = None, *more: dict[str, dict[str, Any]]) -> RunConfig:
    without_cache = {"rollout": {"step_cache": "none"}}
    return compose(family_name, preset or PRESETS[family_name], FIXED, without_cache, row.overlay, *more)


# --- a model, a clip, a clock ------------------------------------------------------------------------------------------------------


def random_model(config: RunConfig, device: torch.device) -> I2VModel:
    """The model of `config` on `device`, in the shapes and dtypes that loading it gives, with the weights its classes begin with.

    It is made once on the meta device for its configuration and dtypes, then anew on `device`: tensors that are computed and not
    loaded (positions, say) then have their values.
    """
    shaped = family(config.family).shaped_model(config.model)
    torch.manual_seed(indexed_seed(config.training.seed, "random weights"))
    with torch.device(device):
        parts = [type(part).from_config(part.config) for part in (shaped.transformer, shaped.vae)]
    model = type(shaped)(*parts, config.model).to(device)
    for real, like in ((model.transformer, shaped.transformer), (model.vae, shaped.vae)):
        wanted = dict([*like.named_parameters(), *like.named_buffers()])
        for name, tensor in [*real.named_parameters(), *real.named_buffers()]:
            tensor.data = tensor.data.to(wanted[name].dtype)
    return model


def random_condition(model: I2VModel, device: torch.device, seed: int) -> Condition:
    """Noise in the shapes and dtypes of a clip's condition."""
    shaped, generator = family(model.family).shaped_condition(model, 1), torch.Generator(device).manual_seed(seed)

    def values(like: Tensor) -> Tensor:
        if not like.is_floating_point():
            return torch.ones(like.shape, dtype=like.dtype, device=device)
        return torch.randn(like.shape, generator=generator, device=device).to(like.dtype)

    return dataclasses.replace(shaped, **{name: values(tensor) for name, tensor in shaped._tensors().items()})


class MemoryClock(PhaseClock):
    """Seconds of every phase, and the allocator's peak in it (on a CPU: none)."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.peaks: dict[str, int] = {}

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        on_gpu = self._device.type == "cuda"
        if on_gpu:
            torch.cuda.synchronize(self._device)
            torch.cuda.reset_peak_memory_stats(self._device)
        with super().phase(name):
            yield
        if on_gpu:
            self.peaks[name] = max(self.peaks.get(name, 0), torch.cuda.max_memory_allocated(self._device))


# --- measuring ---------------------------------------------------------------------------------------------------------------------


def measure(config: RunConfig, steps: int, device: torch.device) -> dict[str, Any]:
    """`steps` optimizer steps of one clip each; the first, which compiles and chooses kernels, is kept apart.

    Raises:
        ValueError: a reward or gradient that is not finite, or an optimizer step that was not applied.
    """
    from vcd_fast.training import engine as engines

    if steps < 2:
        raise ValueError(f"steps: expected at least 2, got {steps}")
    settings, size = config.training, config.model
    engines.init_distributed(device)
    reward, model = VCDReward(config.reward, device), random_model(config, device)
    cache = build_step_cache(model, config.rollout)
    parameters = lora.add_lora(model, config.lora, indexed_seed(settings.seed, "lora"))
    schedule = model.schedule(config.rollout.sampling_steps, size.height, size.width, size.num_frames)
    engine = engines.build(model.transformer, list(parameters.values()), settings, getattr(torch, size.dtype))
    clock, every, computed = MemoryClock(device), [], []
    for step in range(steps):
        clock.seconds.clear()
        done = micro_step(
            model,
            engine,
            lambda loss: engine.backward(loss, scale_wrt_gas=False),
            schedule,
            config.rollout.plan(),
            reward,
            _batch(config, model, device, step),
            scale=1.0,
            agree=lambda flag: engines.all_agree(flag, device),
            clock=clock,
            cache=cache,
        )
        with clock.phase("optimizer"):
            if done.finite:
                engine.step()
        if not (done.finite and engine.was_step_applied()):
            raise ValueError(f"step {step}: expected a finite reward and gradient, got reward {done.reward.tolist()}")
        every.append(dict(clock.seconds))
        computed.append(done.metrics.get("computed_steps", float(config.rollout.sampling_steps)))
        print(f"step {step}: {sum(every[-1].values()):.2f} s", flush=True)
    return {
        "steps": steps,
        "first_step_seconds": sum(every[0].values()),
        "seconds": statistics.median(sum(each.values()) for each in every[1:]),
        "phase_seconds": {name: statistics.median(each[name] for each in every[1:]) for name in every[0]},
        "computed_steps": statistics.mean(computed),
        "sampling_steps": config.rollout.sampling_steps,
        "phase_peak_bytes": clock.peaks,
        "reserved_bytes": torch.cuda.max_memory_reserved(device) if device.type == "cuda" else None,
    }


def _batch(config: RunConfig, model: I2VModel, device: torch.device, step: int) -> Batch:
    seed, size = config.training.seed, config.model
    picture = torch.rand(1, 3, size.height, size.width, generator=indexed_generator(seed, "picture", step))
    return Batch(
        condition=random_condition(model, device, indexed_seed(seed, "condition", step)),
        image=picture.to(device),
        prompts=[""],
        noise=[indexed_generator(seed, "noise", step)],
        frames=[indexed_generator(seed, "frames", step)],
        window=indexed_generator(seed, "window", step),
        step=step,
    )


def beside_estimate(family_name: str, row: dict[str, Any]) -> dict[str, Any]:
    """Add what `vcd estimate` counts for the phases of a step, and measured over counted: 1.15 is 15 % more than it said."""
    if "error" in row:
        return row
    counted = estimate(config_of(family_name, rows_of(family_name)[row["row"]]))
    phases = {phase.name: phase.total for phase in counted.phases if phase.name in row["phase_seconds"]}
    return {
        **row,
        "estimate_bytes": phases,
        "estimate_needed_bytes": counted.needed,
        "measured_over_estimate": row["peak_bytes"] / max(phases.values()),
    }


def one(family_name: str, name: str, steps: int | None) -> dict[str, Any]:
    row = rows_of(family_name)[name]
    config = config_of(family_name, row)
    found = measure(config, steps or row.steps, torch.device("cuda"))
    peak = max(found["phase_peak_bytes"].values())
    return {"row": name, "preset": config.preset, **found, "peak_bytes": peak, "config": config.as_dict()}


def read_rows(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text()) if path.is_file() else []


def run_all(family_name: str, path: Path, until: float) -> int:
    """Every row that `path` lacks. One that fails, for want of memory say, is noted with its error and not tried again."""
    for name in rows_of(family_name):
        if name in {row["row"] for row in read_rows(path)}:
            continue
        if time.time() > until:
            return MORE
        print(f"{family_name}, {name}", flush=True)
        command = [sys.executable, __file__, family_name, str(path), "--row", name]
        code = subprocess.run(command).returncode
        if code:
            write(path, [*read_rows(path), {"row": name, "error": f"it ended with {code}; see the log"}])
    failed = [row["row"] for row in read_rows(path) if "error" in row]
    if failed:
        print(f"no figures for: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", choices=PRESETS)
    parser.add_argument("rows", type=Path, help="JSON that rows are added to")
    parser.add_argument("--row", help="only this one; see --list")
    parser.add_argument("--steps", type=int, help="of --row, instead of its own")
    parser.add_argument("--list", action="store_true", help="print the rows and their steps")
    parser.add_argument(
        "--estimate", action="store_true", help="add the estimates to the rows that are there; needs no GPU"
    )
    chosen = parser.parse_args(words)
    known = rows_of(chosen.family)
    if chosen.list:
        print("\n".join(f"{name}: {row.steps} steps, {row.overlay or 'as the preset'}" for name, row in known.items()))
        return 0
    if chosen.row is not None and chosen.row not in known:
        print(f"gpu_training: row: expected one of {', '.join(known)}, got {chosen.row!r}", file=sys.stderr)
        return 2
    if chosen.estimate:
        rows = [beside_estimate(chosen.family, row) for row in read_rows(chosen.rows)]
        write(chosen.rows, rows)
        print("\n".join(f"{r['row']}: {r.get('measured_over_estimate', 'no figures')}" for r in rows))
        return 0
    if not torch.cuda.is_available():
        print("gpu_training: there is no GPU that PyTorch can use", file=sys.stderr)
        return 2
    if chosen.row is None:
        return run_all(chosen.family, chosen.rows, float(os.environ.get("GPU_SESSION_UNTIL", "inf")))
    found = one(chosen.family, chosen.row, chosen.steps)
    write(chosen.rows, [row for row in read_rows(chosen.rows) if row["row"] != chosen.row] + [found])
    return 0


if __name__ == "__main__":
    sys.exit(main())
