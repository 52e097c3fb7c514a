"""Tune and judge every arm: `python -m examples.tiny_i2v.study.run --output runs/study`. Goes on where it stopped; then `study.report`.

Each arm is tuned by the trainer as a user would, from the committed model, with each training seed; then the base and every LoRA animate
the same held-out scenes from the same noises.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch

from examples.tiny_i2v.build import MODEL
from examples.tiny_i2v.sample import Scene, animate, encode, held_out_scenes, settings
from examples.tiny_i2v.study.arms import ARMS, BASE, BY_NAME, MOTIONS, Arm
from examples.tiny_i2v.study.metrics import Metrics
from examples.tiny_i2v.study.pictures import write_pictures
from vcd_fast.models import wan
from vcd_fast.models.base import Condition
from vcd_fast.models.lora import load_lora

ROOT = Path(__file__).resolve().parents[3]


def tune(arm: Arm, seed: int, steps: int, pictures: Path, folder: Path, extra: list[str]) -> float:
    """Tune a LoRA with the trainer, or go on with it; seconds it took, 0 if it was there.

    Raises:
        RuntimeError: the trainer failed; with what it said.
    """
    if (folder / "summary.json").is_file():
        return 0.0
    command = [sys.executable, str(ROOT / "vcd_fast" / "train.py"), "--model", "wan", "--preset", "tiny-i2v"]
    command += ["--pictures", str(pictures), "--output", str(folder), "--resume", "auto", "--seed", str(seed)]
    command += ["--max-train-steps", str(steps), "--sample-every", "0", *arm.options, *extra]
    began = time.monotonic()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-3000:]}")
    return time.monotonic() - began


def judge(
    model: object, scenes: list[Scene], conditions: list[Condition], noises: int, metrics: Metrics
) -> list[dict[str, object]]:
    """A row per scene and noise."""
    pairs = [(index, noise) for index in range(len(scenes)) for noise in range(noises)]
    videos = animate(model, [conditions[index] for index, _ in pairs], [1000 * index + noise for index, noise in pairs])
    rows = []
    for (index, noise), video in zip(pairs, videos, strict=True):
        scene = scenes[index]
        about = {"photo": scene.photo, "asked": scene.motion.name, "scene": index, "noise": noise}
        rows.append(about | metrics(scene, video))
    return rows


def write_rows(path: Path, rows: list[dict[str, object]]) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text("".join(json.dumps(row) + "\n" for row in rows))
    os.replace(partial, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--arms", nargs="+", default=[arm.name for arm in ARMS], choices=[arm.name for arm in ARMS])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of training")
    parser.add_argument("--steps", type=int, default=100, help="of training")
    parser.add_argument("--pictures", type=int, default=66, help="tuned on")
    parser.add_argument("--scenes", type=int, default=36, help="judged; all motions of all held-out photographs are 36")
    parser.add_argument("--noises", type=int, default=5, help="per scene")
    parser.add_argument(
        "--vgg19", default="random", help="VGG19 weights for tuning and judging: random, imagenet or a file"
    )
    parser.add_argument("--trainer", nargs=argparse.REMAINDER, default=[], help="more options of the trainer, last")
    options = parser.parse_args()

    torch.manual_seed(0)
    options.output.mkdir(parents=True, exist_ok=True)
    pictures = write_pictures(options.output / "pictures", options.pictures)
    scenes = held_out_scenes(options.scenes, seed=7, motions=MOTIONS)
    chosen = settings(MODEL)
    conditions = encode(chosen, scenes)
    metrics = Metrics(options.vgg19)

    for name, seed in [(BASE.name, 0), *((name, seed) for seed in options.seeds for name in options.arms)]:
        path = options.output / f"{name}-{seed}.jsonl"
        if path.is_file():
            continue
        arm, folder, spent = BY_NAME[name], options.output / "runs" / f"{name}-{seed}", 0.0
        model = wan.load_model(chosen)
        if arm is not BASE:
            extra = ["--vgg19", options.vgg19, *options.trainer]
            spent = tune(arm, seed, options.steps, pictures, folder, extra)
            load_lora(model, folder / "lora")
        began = time.monotonic()
        rows = judge(model, scenes, conditions, options.noises, metrics)
        write_rows(path, [{"arm": name, "seed": seed, **row} for row in rows])
        mean = {
            key: round(sum(row[key] for row in rows) / len(rows), 3) for key in ("vcd", "psnr", "flicker", "motion")
        }
        print(f"{name}-{seed}: tuned in {spent:.0f} s, judged in {time.monotonic() - began:.0f} s, {mean}", flush=True)


if __name__ == "__main__":
    main()
