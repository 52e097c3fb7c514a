"""How good the model is, on photographs held out of its training: `python -m examples.tiny_i2v.check` writes `model/figures.json`."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from examples.tiny_i2v.build import MODEL
from examples.tiny_i2v.clips import FRAMES, HEIGHT, MOTIONS, WIDTH, scene
from examples.tiny_i2v.measure import amount, measure, shows, warp
from examples.tiny_i2v.photos import HELD_OUT, TRAINING, read_photo
from examples.tiny_i2v.provenance import provenance
from examples.tiny_i2v.sample import GUIDANCE, SAMPLING_STEPS, Scene, animate, encode, held_out_scenes, settings
from vcd_fast.media import frame_strip, write_image
from vcd_fast.models import wan


def decibels(squared_error: float) -> float:
    return -10 * math.log10(max(squared_error, 1e-12))


@torch.no_grad()
def reconstruction(vae: torch.nn.Module, seed: int = 1, photos: Sequence[str] = HELD_OUT) -> dict[str, float]:
    """PSNR in dB of clips of the whole photograph through the VAE: a pan, a zoom, stillness."""
    found = {}
    for name in photos:
        photo, generator, errors = read_photo(name), torch.Generator().manual_seed(seed), []
        for motion in ("pan_left", "zoom_in", "still"):
            clip, _ = scene(photo, MOTIONS[motion], generator, whole=True)
            video = clip.transpose(0, 1)[None]
            decoded = vae.decode(vae.encode(video * 2 - 1).latent_dist.mode()).sample / 2 + 0.5
            errors.append((decoded - video).square().mean().item())
        found[name] = decibels(sum(errors) / len(errors))
    return found


def fidelity(video: Tensor) -> list[float]:
    """PSNR in dB of every frame against the first one moved to where it was registered, where that is known."""
    found = []
    for frame, pose in zip(video, measure(video).poses, strict=True):
        moved, inside = warp(video[0], pose)
        found.append(decibels(float((inside * (frame - moved).square()).sum() / (3 * inside.sum()).clamp_min(1))))
    return found


def judge(scenes: list[Scene], videos: Tensor) -> dict[str, object]:
    """Figures of `videos` [B, FRAMES, 3, H, W], one per scene."""
    right, amounts, first, faithful = defaultdict(list), defaultdict(list), [], []
    for given, video in zip(scenes, videos, strict=True):
        found = measure(video, given.cutout)
        right[given.motion.name].append(shows(found, given.motion))
        amounts[given.motion.name].append(amount(found, given.motion))
        first.append(decibels(float((video[0] - given.true[0]).square().mean())))
        if given.motion.name == "still":
            faithful.append(fidelity(video))
    everything = [value for values in right.values() for value in values]
    return {
        "samples": len(scenes),
        "motion_shown": sum(everything) / len(everything),
        "motion_shown_by_kind": {name: sum(values) / len(values) for name, values in right.items()},
        "motion_amount_by_kind": {name: sorted(values)[len(values) // 2] for name, values in amounts.items()},
        "first_frame_psnr": sum(first) / len(first),
        "first_frame_psnr_min": min(first),
        "still_psnr_by_frame": [sum(row[i] for row in faithful) / len(faithful) for i in range(FRAMES)]
        if faithful
        else [],
    }


def card(figures: dict, about: dict) -> str:
    """The model card."""
    made, vae = figures["generated"], figures["vae_psnr"]
    kinds = "".join(
        f"| {MOTIONS[name].prompts[0]} | {share:.0%} | {made['motion_amount_by_kind'][name]:.2f} |\n"
        for name, share in made["motion_shown_by_kind"].items()
    )
    hours = {part: f"{entry['steps']} steps, {entry['hours']} h" for part, entry in about["training"].items()}
    return f"""---
license: apache-2.0
library_name: diffusers
pipeline_tag: image-to-video
---

# tiny-i2v

A Wan image-to-video pipeline of {about["parameters"]:,} weights: {WIDTH} x {HEIGHT} pixels, {FRAMES} frames, {figures["sampling_steps"]} sampling steps, guidance {figures["guidance_scale"]:g}.
Made by the scripts of `examples/tiny_i2v`; for experiments with the Video Consistency Distance, for nothing else.

    from diffusers import WanImageToVideoPipeline
    pipeline = WanImageToVideoPipeline.from_pretrained("examples/tiny_i2v/model")

**Data**: clips made from {len(TRAINING)} photographs in the public domain or under CC0 (`examples/pictures/SOURCES.md`; others come with
scikit-image), moved as the prompt says. **Training**, on a CPU: VAE {hours["vae"]}; transformer and text encoder {hours["transformer"]}.
**Held out**: {", ".join(vae)}.

What follows was written by `{figures["command"]}`; all of it is in `figures.json`. On held-out photographs:

| VAE reconstruction, PSNR of clips | dB |
| --- | --- |
{"".join(f"| {name} | {value:.1f} |{chr(10)}" for name, value in vae.items())}
First frame against the picture: {made["first_frame_psnr"]:.1f} dB (worst of {made["samples"]}: {made["first_frame_psnr_min"]:.1f}). The motion named is the motion measured in
**{made["motion_shown"]:.0%}** of {made["samples"]} videos ({figures["true_clips"]["motion_shown"]:.0%} of the true clips pass the same measurement):

| prompt | shown | amount / asked, median |
| --- | --- | --- |
{kinds}
It drifts: of a still picture, the frames lie {", ".join(f"{value:.1f}" for value in made["still_psnr_by_frame"][1:])} dB from the first, one after the other.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--samples", type=int, default=200)
    parser.add_argument("--sampling-steps", type=int, default=SAMPLING_STEPS)
    parser.add_argument("--guidance", type=float, default=GUIDANCE)
    options = parser.parse_args()

    from diffusers import AutoencoderKLWan

    scenes = held_out_scenes(options.samples)
    chosen = settings(options.model, options.guidance)
    conditions = encode(chosen, scenes)
    model = wan.load_model(chosen)
    videos = animate(model, conditions, range(len(scenes)), sampling_steps=options.sampling_steps, report=print)
    vae = AutoencoderKLWan.from_pretrained(options.model, subfolder="vae", local_files_only=True)
    figures = {
        **provenance(" ".join(["python -m examples.tiny_i2v.check", *sys.argv[1:]])),
        "sampling_steps": options.sampling_steps,
        "guidance_scale": options.guidance,
        "vae_psnr": reconstruction(vae),
        # what the measurement itself says of the true clips
        "true_clips": judge(scenes, torch.stack([given.true for given in scenes])),
        "generated": judge(scenes, videos),
    }
    path = options.model / "figures.json"
    path.write_text(json.dumps(figures, indent=1) + "\n")
    about = json.loads((options.model / "training.json").read_text())
    (options.model / "README.md").write_text(card(figures, about))
    rows = [(given.prompt, video) for given, video in zip(scenes[:15], videos[:15], strict=True)]
    write_image(options.model.parent / "samples.jpg", frame_strip(rows))
    print(path.read_text())


if __name__ == "__main__":
    main()
