"""What the options against memory save, counted on the tiny models: tensors kept for the backward, and the peak of all that is alive.

    python tools/measure_memory.py            # docs/data/activations.json, docs/activations.png and the tables of docs/activations.md

Counted are bytes of distinct tensors, weights, their gradients and inputs apart, on real runs of the code of training: `kept` when the forward is done, `peak`
at the worst moment of forward and backward. With offloading, tensors in the CPU's memory do not count, and their copies that come back do.
Small models of the real classes with random weights: the numbers show how memory grows, not how much a real model takes; `vcd estimate` counts that.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from matplotlib.figure import Figure
from provenance import ROOT, provenance
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from vcd_fast.models.lora import LoRASettings, add_lora
from vcd_fast.models.wan import ModelSettings, load_encoder, load_model
from vcd_fast.rollout import offload
from vcd_fast.rollout.plan import RolloutSettings
from vcd_fast.rollout.sampler import run
from vcd_fast.training.estimate.tracker import MemoryTracker

STEPS = 6
WINDOW_SIZE = {"height": 64, "width": 96, "num_frames": 9}
DECODE_SIZE = {"height": 32, "width": 32}
FRAMES = (5, 9, 13, 17, 21, 25)
WINDOWS = {
    "none": {"checkpointing": "none"},
    "block": {"checkpointing": "block"},
    "none, offloaded": {"checkpointing": "none", "offload": "window"},
    "block, offloaded": {"checkpointing": "block", "offload": "window"},
    "step": {"checkpointing": "step"},
    "both": {"checkpointing": "both"},
    "spaced:K, none": {"checkpointing": "none", "plan": "spaced"},
    "spaced:K, both": {"checkpointing": "both", "plan": "spaced"},
}
"""how the graph of K differentiated steps is kept, `last:K` where nothing else is said"""
PLAIN = "nothing recomputed"
DECODES = {
    PLAIN + ", PyTorch's convolutions": {"frozen_conv": False, "checkpoint": False},
    PLAIN + ", frozen convolutions": {"checkpoint": False},
    "chunk": {},
    "chunk, resnet": {"decode_checkpointing": "resnet"},
    "chunk, offloaded": {"offload": True},
    "chunk, resnet, offloaded": {"decode_checkpointing": "resnet", "offload": True},
    "chunk, truncated, last frame": {"decode_context": "truncated", "last": True},
}
"""how the graph of a clip's decode is kept; all frames are differentiated where nothing else is said"""


class Meter:
    """Counts one forward and backward."""

    def __init__(self, module: nn.Module, inputs: list[Tensor]) -> None:
        self.tracker = MemoryTracker()
        tensors = [*module.parameters(), *module.buffers()]
        self.tracker.ignore([*inputs, *tensors, *(p.grad for p in tensors if p.grad is not None)])
        self.kept = 0

    @contextlib.contextmanager
    def counting(self) -> Iterator[None]:
        with self.tracker, self.tracker.phase("all"):
            yield

    def keep(self) -> None:
        """The forward is done."""
        gc.collect()
        self.kept = sum(self.tracker.alive.values())

    @property
    def found(self) -> dict[str, int]:
        return {"kept": self.kept, "peak": sum(self.tracker.peaks["all"].values())}


@contextlib.contextmanager
def other_memory() -> Iterator[None]:
    """The CPU's memory as a GPU sees it: elsewhere. What comes back is a new tensor."""
    original = offload._to_host

    def to_host(tensor: Tensor) -> Tensor:
        with _disable_current_modes():
            return original(tensor)

    with (
        mock.patch.object(offload, "_to_host", to_host),
        mock.patch.object(offload, "_to_device", lambda device, tensor: tensor.clone()),
    ):
        yield


def wan(**settings: Any) -> Any:
    return load_model(ModelSettings(weights="tiny-random", dtype="float32", **settings))


def windows(guidance_scale: float) -> tuple[Callable[[int, dict[str, Any]], dict[str, int]], Any]:
    """A function that counts the window of K steps under a row of `WINDOWS`, and the model."""
    model = wan(**WINDOW_SIZE, guidance_scale=guidance_scale)
    parameters = list(add_lora(model, LoRASettings(rank=4, alpha=4), seed=1).values())
    image = torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    condition = load_encoder(model.settings).encode(image, ["a cat runs"], ["still"], *WINDOW_SIZE.values())
    schedule = model.schedule(STEPS, *WINDOW_SIZE.values())
    state = model.initial(condition, [torch.Generator().manual_seed(0)])
    gradient = torch.randn(state.latents.shape, generator=torch.Generator().manual_seed(1))

    inputs = [state.latents, gradient, *condition._tensors().values()]

    def count(k: int, options: dict[str, Any]) -> dict[str, int]:
        options = dict(options)
        backprop = f"{options.pop('plan', 'last')}:{k}"
        plan = RolloutSettings(sampling_steps=STEPS, backprop=backprop, **options).plan()
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        meter, kept = Meter(model.transformer, inputs), []
        with meter.counting():
            rollout = run(model, condition, state, schedule, plan, generator=torch.Generator().manual_seed(3))
            meter.keep()
            for surrogate in rollout.surrogates(gradient):
                gc.collect()
                kept.append(sum(meter.tracker.alive.values()))
                surrogate.backward()
        if plan.stop_input_gradient:  # the graphs come one at a time
            meter.kept = max(kept)
        return meter.found | {"gradient": float(sum(p.grad.double().norm() ** 2 for p in parameters) ** 0.5)}

    return count, model


def decode(frames: int, options: dict[str, Any]) -> dict[str, int]:
    """Counts the decode of a clip of `frames` frames."""
    options = dict(options)
    offloads, last, recompute = (
        options.pop("offload", False),
        options.pop("last", False),
        options.pop("checkpoint", True),
    )
    model = wan(**DECODE_SIZE, num_frames=frames, **options)
    shape = (1, 16, (frames - 1) // 4 + 1, DECODE_SIZE["height"] // 8, DECODE_SIZE["width"] // 8)
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(0)).requires_grad_(True)
    meter = Meter(model.vae, [latents])
    with meter.counting():
        with offload.offloaded(model.vae, offloads):
            video = model.decode(latents, [frames - 1] if last else None, checkpoint=recompute)
        meter.keep()
        meter.kept -= video.nbytes  # the result itself
        video.backward(torch.ones_like(video))
    return meter.found | {"gradient": float(latents.grad.double().norm())}


def measure() -> dict[str, Any]:
    found: dict[str, Any] = {"window": {}, "guidance": {}, "decode": {}}
    with warnings.catch_warnings(), other_memory():
        warnings.filterwarnings("ignore", message="model.weights=tiny-random")
        count, _ = windows(guidance_scale=5)
        for name, options in WINDOWS.items():
            found["window"][name] = {str(k): count(k, options) for k in range(1, STEPS + 1)}
            print(name, [entry["kept"] for entry in found["window"][name].values()], flush=True)
        single, _ = windows(guidance_scale=1)
        for name in ("none", "block", "step", "both"):
            pair = {"one branch": single(1, WINDOWS[name]), "two branches": found["window"][name]["1"]}
            found["guidance"][name] = {branches: entry["peak"] for branches, entry in pair.items()}
        for name, options in DECODES.items():
            found["decode"][name] = {str(frames): decode(frames, options) for frames in FRAMES}
            print(name, [entry["kept"] for entry in found["decode"][name].values()], flush=True)
    return found


# --- what is shown -----------------------------------------------------------------------------------------------------------------


def plot(found: dict[str, Any], path: Path) -> None:
    figure = Figure(figsize=(13, 8), layout="constrained")
    axes = figure.subplots(2, 2)
    for row, (part, label) in enumerate((("window", "differentiated steps K"), ("decode", "frames of the clip"))):
        for column, quantity in enumerate(("kept", "peak")):
            axis = axes[row][column]
            for index, (name, entries) in enumerate(found[part].items()):
                values = [entry[quantity] / 2**20 for entry in entries.values()]
                style = "--" if "offloaded" in name else ":" if "spaced" in name or "truncated" in name else "-"
                axis.plot([int(x) for x in entries], values, style, marker="osv^DPX*"[index], ms=5, lw=1.4, label=name)
            title = {"kept": "kept for the backward", "peak": "peak of forward and backward"}[quantity]
            axis.set(title=f"{part}: {title}", xlabel=label, ylabel="MiB on the device", ylim=(0, None))
            axis.set_xticks([int(x) for x in next(iter(found[part].values()))])
            axis.grid(alpha=0.25)
        axes[row][1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1.02, 0.5))
    figure.suptitle("Tiny Wan model: memory against the length of the gradient and of the clip", fontsize=11)
    figure.savefig(path, dpi=110)


def tables(found: dict[str, Any]) -> str:
    """Markdown of the two tables, kilobytes."""
    parts = []
    for part, head, ends in (("window", "checkpointing, K differentiated steps", "K = "), ("decode", "decode", "")):
        columns = list(next(iter(found[part].values())))
        low, high = columns[0], columns[-1]
        unit = "" if ends else " frames"
        lines = [
            f"| {head} | kept, {ends}{low}{unit} | kept, {ends}{high}{unit} | peak, {ends}{low}{unit} | peak, {ends}{high}{unit} |"
        ]
        lines.append("| --- | ---: | ---: | ---: | ---: |")
        for name, entries in found[part].items():
            cells = [f"{entries[x][quantity] / 1024:,.0f}" for quantity in ("kept", "peak") for x in (low, high)]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
        parts.append("\n".join(lines))
    lines = ["| peak of one step, checkpointing | one branch | two branches of guidance |", "| --- | ---: | ---: |"]
    for name, pair in found["guidance"].items():
        lines.append(f"| {name} | " + " | ".join(f"{value / 1024:,.0f}" for value in pair.values()) + " |")
    return "\n\n".join([*parts, "\n".join(lines)])


START, END = "<!-- measured, kB -->", "<!-- end -->"


def write_tables(page: Path, text: str) -> None:
    before, rest = page.read_text().split(START)
    page.write_text(f"{before}{START}\n{text}\n{END}{rest.split(END)[1]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "data" / "activations.json")
    parser.add_argument("--plot", type=Path, default=ROOT / "docs" / "activations.png")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "activations.md", help="its tables are rewritten")
    parser.add_argument("--from-json", action="store_true", help="measure nothing, only draw and write again")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if not arguments.from_json:
        arguments.output.write_text(json.dumps(measure() | provenance(), indent=1) + "\n")
    found = json.loads(arguments.output.read_text())
    plot(found, arguments.plot)
    write_tables(arguments.page, tables(found))


if __name__ == "__main__":
    main()
