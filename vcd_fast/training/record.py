"""What a run folder says about where its numbers come from, and the picture of how it went."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import math
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch
import yaml
from matplotlib.figure import Figure

from vcd_fast.training import log
from vcd_fast.training.settings import RunConfig
from vcd_fast.version import __version__

LORA_FOLDER = "lora"
PACKAGES = ("torch", "triton", "diffusers", "transformers", "peft", "deepspeed", "safetensors", "numpy")


def write_record(output: Path, config: RunConfig, command: list[str], world_size: int, **facts: Any) -> None:
    """`config.yaml`, from which the run can be repeated, and `run.json`: versions, machine, commit, command, hashes."""
    output.mkdir(parents=True, exist_ok=True)
    _write(output / "config.yaml", yaml.safe_dump(config.as_dict(), sort_keys=False))
    entry = {
        "started": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": command,
        "config": config.as_dict(),
        "world_size": world_size,
        "vcd_fast": __version__,
        "commit": _commit(),
        "python": platform.python_version(),
        "machine": platform.platform(),
        "cpus": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "packages": {name: _version(name) for name in PACKAGES},
        **facts,
    }
    path = output / "run.json"
    starts = json.loads(path.read_text())["starts"] if path.exists() else []
    _write(path, json.dumps({"starts": [*starts, entry]}, indent=1))


def write_summary(output: Path, summary: dict[str, Any]) -> None:
    _write(output / "summary.json", json.dumps(log.json_safe(summary), indent=1, allow_nan=False))


def held_out_at(output: Path, step: int) -> dict[str, float]:
    """The held-out distances logged at `step`, by clip; none if no picture is held out."""
    lines = log.read(output / "log.jsonl")
    clips = next((line["clips"] for line in lines if line["kind"] == "held_out" and line["step"] == step), {})
    return {name: math.nan if value is None else value for name, value in clips.items()}


def plot_run(output: Path) -> Path:
    """`reward.png`: reward per step, held-out distance and gradient norm, from `log.jsonl` alone."""
    lines = log.read(output / "log.jsonl")
    train = [line for line in lines if line["kind"] == "train"]
    held_out = [line for line in lines if line["kind"] == "held_out"]
    figure = Figure(figsize=(14, 3.8), layout="constrained")
    axes = figure.subplots(1, 3)
    steps = [line["step"] + 1 for line in train]
    axes[0].plot(steps, [line["reward"] for line in train], ".-", lw=0.8, ms=4)
    axes[0].set(title="reward, training clips (larger is better)", xlabel="optimizer step", ylabel="reward")
    for name in sorted({name for line in held_out for name in line["clips"]}):
        points = [(line["step"], line["clips"][name]) for line in held_out if name in line["clips"]]
        axes[1].plot(*zip(*sorted(points), strict=True), "o-", ms=4, lw=1, label=name)
    if held_out:
        axes[1].legend(fontsize=7)
    axes[1].set(title="VCD, held-out clips (smaller is better)", xlabel="optimizer step", ylabel="VCD")
    axes[2].plot(steps, [line["grad_norm"] for line in train], ".-", lw=0.8, ms=4, color="tab:gray")
    axes[2].set(title="gradient norm before clipping", xlabel="optimizer step", yscale="log")
    path = output / "reward.png"
    temporary = path.with_suffix(".tmp.png")
    figure.savefig(temporary, dpi=120)
    os.replace(temporary, path)
    return path


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_text(text)
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from error


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of the checkout this file stands in, or None for an installed package."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None
