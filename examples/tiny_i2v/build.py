"""Put the trained parts together: `python -m examples.tiny_i2v.build --output runs/tiny_i2v` (step 3 of 3) writes `examples/tiny_i2v/model`.

A folder as `WanImageToVideoPipeline.save_pretrained` writes it; transformer and VAE in bfloat16 but for what Wan keeps in float32.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from torch import nn

from examples.tiny_i2v.state import copy_into
from examples.tiny_i2v.train_transformer import SHIFT, Model, statistics
from examples.tiny_i2v.train_vae import load_vae
from vcd_fast.evaluation.machine import versions
from vcd_fast.models.wan.adapter import cast_keeping_float32

MODEL = Path(__file__).resolve().parent / "model"
LIMIT = 10_000_000
"""bytes of the whole folder"""


def assemble(folder: Path) -> object:
    """The float32 pipeline of what was trained in `folder`."""
    from diffusers import FlowMatchEulerDiscreteScheduler, WanImageToVideoPipeline

    vae = load_vae(folder)
    mean, std = statistics(torch.load(folder / "clips.pt", weights_only=True)["latents"])
    vae.register_to_config(latents_mean=mean.tolist(), latents_std=std.tolist())
    model = Model()
    copy_into(model, torch.load(folder / "transformer.pt", weights_only=True)["average"])
    model.eval().requires_grad_(False)
    return WanImageToVideoPipeline(
        tokenizer=model.tokenizer,
        text_encoder=model.text_encoder,
        image_encoder=None,
        image_processor=None,
        transformer=model.transformer,
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
    )


def parameters(pipeline: object) -> int:
    return sum(
        p.numel() for part in pipeline.components.values() if isinstance(part, nn.Module) for p in part.parameters()
    )


def training(folder: Path) -> dict[str, dict[str, float]]:
    """Steps and hours of each of the two trainings, from the last line of its log that has them."""
    found = {}
    for part in ("vae", "transformer"):
        lines = [json.loads(line) for line in (folder / f"{part}.jsonl").read_text().splitlines()]
        last = [line for line in lines if "step" in line][-1]
        found[part] = {"steps": last["step"], "hours": round(last["seconds"] / 3600, 2)}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="folder the trainings wrote to")
    parser.add_argument("--model", type=Path, default=MODEL, help="folder to write")
    options = parser.parse_args()

    pipeline = assemble(options.output)
    count = parameters(pipeline)
    for part in (pipeline.transformer, pipeline.vae):
        cast_keeping_float32(part, torch.bfloat16)
    partial = options.model.with_name(options.model.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    pipeline.save_pretrained(partial)
    about = {"parameters": count, "versions": versions(), "training": training(options.output)}
    (partial / "training.json").write_text(json.dumps(about, indent=1) + "\n")
    size = sum(path.stat().st_size for path in partial.rglob("*") if path.is_file())
    if size > LIMIT:
        shutil.rmtree(partial)
        raise ValueError(f"expected a folder of at most {LIMIT:,} bytes, got {size:,}")
    shutil.rmtree(options.model, ignore_errors=True)
    partial.rename(options.model)
    print(f"{options.model}: {count:,} parameters, {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
