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
from torch import Tensor

from examples.tiny_i2v.build import MODEL
from examples.tiny_i2v.photos import HELD_OUT, TRAINING, of_the_repository
from examples.tiny_i2v.provenance import provenance
from examples.tiny_i2v.sample import GUIDANCE, Scene, animate, encode, held_out_scenes, settings
from examples.tiny_i2v.study.arms import ARMS, BASE, BY_NAME, MOTIONS, Arm
from examples.tiny_i2v.study.metrics import Metrics
from examples.tiny_i2v.study.pictures import write_pictures
from vcd_fast.models import wan
from vcd_fast.models.base import Condition
from vcd_fast.models.lora import load_lora

ROOT = Path(__file__).resolve().parents[3]
CALIBRATED_ON = 36
"""pictures"""
SHOWN = (0, 1, 5, 6)
"""scenes whose first video is kept for the strips: two pans, a zoom, a rotation"""


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


def calibrate(pictures: Path, path: Path) -> Path:
    """The step cache's polynomial of the model that is tuned, which none was published for, fitted to the pictures tuned on.

    Raises:
        RuntimeError: `vcd calibrate` failed; with what it said.
    """
    if not path.is_file():
        command = [sys.executable, "-m", "vcd_fast.cli.main", "calibrate", str(pictures), "--output", str(path)]
        command += [
            "--model",
            "wan",
            "--preset",
            "tiny-i2v",
            "--limit",
            str(CALIBRATED_ON),
            "--plot",
            str(path.with_suffix(".png")),
        ]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-3000:]}")
    return path


def judge(
    model: object, scenes: list[Scene], conditions: list[Condition], noises: int, metrics: Metrics
) -> tuple[list[dict[str, object]], dict[int, Tensor]]:
    """A row per scene and noise; the videos of the scenes in `SHOWN`, as uint8."""
    pairs = [(index, noise) for index in range(len(scenes)) for noise in range(noises)]
    videos = animate(model, [conditions[index] for index, _ in pairs], [1000 * index + noise for index, noise in pairs])
    rows, kept = [], {}
    for (index, noise), video in zip(pairs, videos, strict=True):
        scene = scenes[index]
        about = {"photo": scene.photo, "asked": scene.motion.name, "scene": index, "noise": noise}
        rows.append(about | metrics(scene, video))
        if index in SHOWN and noise == 0:
            kept[index] = (255 * video).round().to(torch.uint8)
    return rows, kept


def write_rows(path: Path, rows: list[dict[str, object]]) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text("".join(json.dumps(row) + "\n" for row in rows))
    os.replace(partial, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--arms", nargs="+", default=[arm.name for arm in ARMS], choices=[arm.name for arm in ARMS])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of training")
    parser.add_argument("--steps", type=int, default=60, help="of training")
    parser.add_argument("--pictures", type=int, default=66, help="tuned on")
    parser.add_argument(
        "--scenes", type=int, default=18, help="judged; with 18 every motion comes twice, of two held-out photographs"
    )
    parser.add_argument("--noises", type=int, default=5, help="per scene")
    parser.add_argument("--guidance", type=float, default=GUIDANCE, help="of sampling, in tuning and judging")
    parser.add_argument(
        "--vgg19", default="random", help="VGG19 weights for tuning and judging: random, imagenet or a file"
    )
    parser.add_argument("--trainer", nargs=argparse.REMAINDER, default=[], help="more options of the trainer, last")
    parser.add_argument(
        "--photos",
        choices=["all", "repository"],
        default="all",
        help="repository: only those that need no scikit-image",
    )
    options = parser.parse_args()

    about = provenance(" ".join(["python -m examples.tiny_i2v.study.run", *sys.argv[1:]]))
    torch.manual_seed(0)
    options.output.mkdir(parents=True, exist_ok=True)
    training, held_out = TRAINING, HELD_OUT
    if options.photos == "repository":
        training, held_out = of_the_repository(TRAINING), of_the_repository(HELD_OUT)
    pictures = write_pictures(options.output / "pictures", options.pictures, photos=training)
    scenes = held_out_scenes(options.scenes, seed=7, motions=MOTIONS, photos=held_out)
    true = {
        i: {"prompt": scenes[i].prompt, "video": (255 * scenes[i].true).round().to(torch.uint8)}
        for i in SHOWN
        if i < len(scenes)
    }
    torch.save(true, options.output / "true.pt")
    chosen = settings(MODEL, options.guidance)
    conditions = encode(chosen, scenes)
    metrics = Metrics(options.vgg19)

    for name, seed in [(BASE.name, 0), *((name, seed) for seed in options.seeds for name in options.arms)]:
        path = options.output / f"{name}-{seed}.jsonl"
        if path.is_file():
            continue
        arm, folder, spent = BY_NAME[name], options.output / "runs" / f"{name}-{seed}", 0.0
        model = wan.load_model(chosen)
        if arm is not BASE:
            extra = ["--vgg19", options.vgg19, "--guidance-scale", str(options.guidance), *options.trainer]
            if "--step-cache" in arm.options:
                extra += ["--cache-coefficients", str(calibrate(pictures, options.output / "step_cache.json"))]
            spent = tune(arm, seed, options.steps, pictures, folder, extra)
            load_lora(model, folder / "lora")
        began = time.monotonic()
        rows, videos = judge(model, scenes, conditions, options.noises, metrics)
        torch.save(videos, options.output / f"{name}-{seed}.pt")
        seconds = {"tuning": round(spent), "judging": round(time.monotonic() - began)}
        path.with_suffix(".json").write_text(json.dumps(about | {"seconds": seconds}) + "\n")
        write_rows(path, [{"arm": name, "seed": seed, **row} for row in rows])
        mean = {
            key: round(sum(row[key] for row in rows) / len(rows), 3) for key in ("vcd", "psnr", "flicker", "motion")
        }
        print(f"{name}-{seed}: tuned in {seconds['tuning']} s, judged in {seconds['judging']} s, {mean}", flush=True)


if __name__ == "__main__":
    main()
