"""Threshold sweep of the step cache on the tiny Wan model: steps computed, drift, reward and gradient against the full sampler.

    python tools/step_cache_sweep.py --output docs/step-cache.json

The model's weights are random and fixed by a seed: the numbers show how the quantities go together, not how good a threshold is for a real model.
Coefficients are calibrated first, on the same clips. Writes JSON and prints the table as Markdown.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import warnings
from pathlib import Path

import torch
from torch import Tensor

from vcd_fast.models.lora import LoRASettings, add_lora, lora_parameters
from vcd_fast.models.wan import ModelSettings, load_encoder, load_model
from vcd_fast.rewards.base import RewardInput
from vcd_fast.rewards.vcd import VCDReward, VCDRewardSettings
from vcd_fast.rollout.plan import Plan
from vcd_fast.rollout.sampler import run
from vcd_fast.rollout.step_cache import StepCacheConfig, apply_step_cache, remove_step_cache
from vcd_fast.rollout.step_cache.calibrate import fit, observe
from vcd_fast.rollout.step_cache.drift import relative_difference

SIZE = {"height": 64, "width": 96, "num_frames": 9}
PROMPTS = ("a cat runs", "the red boat on the sea turns slowly")
THRESHOLDS = (0.1, 0.3, 0.5, 0.8, 1.2, 2.0)
MODE = "ret"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("docs/step-cache.json"))
    parser.add_argument("--steps", type=int, default=30, help="sampling steps")
    parser.add_argument("--backprop", type=int, default=5, help="last steps that carry gradients")
    options = parser.parse_args()
    torch.manual_seed(0)
    warnings.filterwarnings("ignore", message="model.weights=tiny-random")

    settings = ModelSettings(weights="tiny-random", dtype="float32", **SIZE)
    model, clips = make_model(settings), make_clips(settings)
    observations = [
        o for i, (_, condition) in enumerate(clips) for o in observe(model, condition, [i], options.steps, MODE)
    ]
    found = fit(observations, MODE)
    reward = VCDReward(VCDRewardSettings(num_projections=64, frames_per_step=8, vgg19="random"), torch.device("cpu"))

    full = measure(model, clips, reward, options, None)
    rows = []
    for threshold in THRESHOLDS:
        for residual in ("in-graph", "detached"):
            config = StepCacheConfig(coefficients=found.coefficients, mode=MODE, threshold=threshold, residual=residual)
            cache = apply_step_cache(model.transformer, config)
            cached = measure(model, clips, reward, options, cache)
            remove_step_cache(model.transformer)
            rows.append({"threshold": threshold, "residual": residual, **compare(cached, full)})
            print(rows[-1], flush=True)
    content = {
        "model": "tiny-random Wan, LoRA of rank 4 that is not zero",
        "clips": len(clips),
        **SIZE,
        "sampling_steps": options.steps,
        "backprop": f"last:{options.backprop}",
        "mode": MODE,
        "calibration": {"coefficients": found.coefficients, **found.facts()},
        "reward_full": sum(full["reward"]) / len(clips),
        "torch": torch.__version__,
        "machine": platform.machine(),
        "rows": rows,
    }
    temporary = options.output.with_name(f".{options.output.name}.tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(temporary, options.output)
    print(table(content))


def make_model(settings: ModelSettings):
    """The gradient of a LoRA that has just been added is zero in half of its matrices: this one has been moved."""
    model = load_model(settings)
    add_lora(model, LoRASettings(rank=4, alpha=4), seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in lora_parameters(model).values():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


def make_clips(settings: ModelSettings) -> list:
    """(image [1, 3, H, W], condition) of smooth random pictures."""
    encoder, clips = load_encoder(settings), []
    for index, prompt in enumerate(PROMPTS):
        coarse = torch.rand(1, 3, 4, 6, generator=torch.Generator().manual_seed(index))
        size = settings.height, settings.width
        image = torch.nn.functional.interpolate(coarse, size, mode="bicubic").clamp(0, 1)
        clips.append((image, encoder.encode(image, [prompt], [""], *size, settings.num_frames)))
    return clips


def measure(model, clips, reward, options, cache) -> dict[str, list]:
    """Per clip: latents, reward, gradient of the reward with respect to the LoRA as one vector, steps computed."""
    settings, results = model.settings, {"latents": [], "reward": [], "gradient": [], "computed": []}
    schedule = model.schedule(options.steps, settings.height, settings.width, settings.num_frames)
    plan = Plan("last", options.backprop, checkpointing="none")
    for index, (image, condition) in enumerate(clips):
        state = model.initial(condition, [torch.Generator().manual_seed(index)])
        result = run(model, condition, state, schedule, plan, cache=cache)
        latents = result.latents.requires_grad_()
        video = model.decode(latents, list(range(1, settings.num_frames)))
        given = RewardInput(
            video=video,
            frame_index=torch.arange(1, settings.num_frames),
            num_frames=settings.num_frames,
            image=image,
            prompt=[PROMPTS[index]],
            fps=settings.fps,
            step=0,
            generator=torch.Generator().manual_seed(0),
        )
        value = reward(given).reward.mean()
        (gradient,) = torch.autograd.grad(value, latents)
        for term in result.surrogates(gradient):
            term.backward()
        results["computed"].append(sum(result.computed) if cache is not None else options.steps)
        result.close()
        results["latents"].append(latents.detach())
        results["reward"].append(value.item())
        results["gradient"].append(torch.cat([p.grad.flatten() for p in lora_parameters(model).values()]))
        model.transformer.zero_grad(set_to_none=True)
    return results


def compare(cached: dict[str, list], full: dict[str, list]) -> dict[str, float]:
    def mean(values) -> float:
        values = list(values)
        return float(sum(values) / len(values))

    def cosine(a: Tensor, b: Tensor) -> float:
        return float(torch.nn.functional.cosine_similarity(a.double(), b.double(), dim=0))

    def pairs(name: str):
        return zip(cached[name], full[name], strict=True)

    return {
        "computed": mean(cached["computed"]),
        "drift": mean(relative_difference(*pair) for pair in pairs("latents")),
        "reward": mean(cached["reward"]),
        "reward_difference": mean(abs(a - b) / abs(b) for a, b in pairs("reward")),
        "gradient_cosine": mean(cosine(*pair) for pair in pairs("gradient")),
        "gradient_norm_ratio": mean(float(a.norm() / b.norm()) for a, b in pairs("gradient")),
    }


def table(content: dict) -> str:
    steps = content["sampling_steps"]
    lines = [
        f"| threshold | residual | computed of {steps} | drift | reward difference | gradient cosine | gradient norm |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {row['threshold']:g} | {row['residual']} | {row['computed']:g} | {100 * row['drift']:.2f} % | {100 * row['reward_difference']:.4f} % | "
        f"{row['gradient_cosine']:.4f} | {row['gradient_norm_ratio']:.3f} |"
        for row in content["rows"]
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
