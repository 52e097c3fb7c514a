"""What the processes of a run send each other: counted on two of them, and reckoned for real models and many GPUs.

    python tools/scaling_table.py             # the tables of docs/scaling.md, from docs/data/scaling.json
    python tools/scaling_table.py --measure   # counts and times on this machine's CPU first, with one process and with two

Counted is what an optimizer step of the tiny Wan model passes to collectives, for every ZeRO stage. In units of the bytes of all weights, of the
blocks' weights and of the LoRA the counts are the same for a model of any size, which is how the tables for real ones come about.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from provenance import ROOT, provenance
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vcd_fast.config import compose
from vcd_fast.devices import free_port
from vcd_fast.models.base import family
from vcd_fast.models.lora import add_lora

SMALL = {
    "model": {"height": 32, "width": 32, "num_frames": 5, "guidance_scale": 3},
    "lora": {"rank": 4, "alpha": 4},
    "reward": {"num_projections": 4, "frames_per_step": 1},
    "training": {"device": "cpu", "max_train_steps": 4, "sample_every": 0, "checkpoint_every": 0},
}
STEPS = (2, 4)
"""sampling steps of the two runs at ZeRO-3; the difference is what a step without gradient costs"""
CASES = {
    **{f"zero {stage}": {"training": {"zero": stage}, "rollout": {"sampling_steps": STEPS[0]}} for stage in range(4)},
    "zero 0, two micro-steps": {"training": {"zero": 0, "gradient_accumulation": 2}},
    "zero 2, two micro-steps": {"training": {"zero": 2, "gradient_accumulation": 2}},
    "zero 3, more steps": {"training": {"zero": 3}, "rollout": {"sampling_steps": STEPS[1]}},
}
MODELS = {"Wan 2.1 1.3B": ("wan", "1.3b"), "Wan 2.1 14B": ("wan", "14b-480p")}
LINKS = {
    "NVLink, 300 GB/s": 300e9,
    "InfiniBand, 50 GB/s per GPU": 50e9,
    "Ethernet, 12.5 GB/s per machine of 8": 12.5e9 / 8,
}
"""bytes per second that a GPU can receive while all others do the same"""
TERAFLOPS = 400e12
"""what a GPU of the H100 class does of bfloat16 in practice"""
BACKWARD, RECOMPUTED = 1, 1
"""forwards that a backward costs whose weights are frozen, and the recomputation before it"""
RECEIVED = {"allreduce": 2, "reduce_scatter_base": 1}
"""by a ring of n processes, per (n - 1) / n bytes; broadcasts and flags of a few bytes are left out"""


class Collectives(TorchDispatchMode):
    """Bytes passed to collectives, the larger of what goes in and what comes out, by kind."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func.namespace == "c10d":
            kind = func._schema.name.split("::")[1].strip("_")
            self.calls[kind] += 1
            self.bytes[kind] += max(sum(t.nbytes for t in tree_leaves(part) if isinstance(t, Tensor)) for part in args)
        return func(*args, **(kwargs or {}))


# --- on the CPU --------------------------------------------------------------------------------------------------------------------


def work(folder: str) -> None:
    """A process of the measurement; rank 0 prints one JSON line."""
    import torch.distributed as dist

    from vcd_fast.training import engine as engines
    from vcd_fast.training.loop import Run

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    engines.init_distributed(torch.device("cpu"))
    found = {}
    for name, overlay in CASES.items():
        output = {"training": {"output": f"{folder}/{dist.get_world_size()}-{name}", "cache": f"{folder}/encodings"}}
        data = {"data": {"pictures": str(ROOT / "examples" / "pictures")}}
        run = Run(compose("wan", "tiny", SMALL, overlay, output, data), torch.device("cpu"), [])
        run._train_step()  # buckets and the optimizer's state are made
        seconds = []
        for _ in range(2):
            dist.barrier()
            wall, cpu = time.perf_counter(), time.process_time()
            run._train_step()
            seconds.append((time.process_time() - cpu, time.perf_counter() - wall))
        with Collectives() as counted:
            run._train_step()
        base = [p for p in run.model.transformer.parameters() if not p.requires_grad]
        found[name] = {
            "bytes": dict(counted.bytes),
            "calls": dict(counted.calls),
            "cpu_seconds": min(seconds)[0],
            "wall_seconds": min(wall for _, wall in seconds),
            "base_bytes": sum(getattr(p, "ds_numel", p.numel()) * p.element_size() for p in base),
            "lora_bytes": sum(getattr(p, "ds_numel", p.numel()) * p.element_size() for p in run.parameters.values()),
        }
    if dist.get_rank() == 0:
        print("RESULT " + json.dumps(found), flush=True)
    dist.barrier()
    dist.destroy_process_group()


def measure() -> dict[str, Any]:
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for ranks in (1, 2):
            launcher = [
                "-m",
                "torch.distributed.run",
                "--nproc_per_node",
                str(ranks),
                "--master_port",
                str(free_port()),
            ]
            command = [sys.executable, *launcher, str(Path(__file__)), "--work", folder]
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
            done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
            if done.returncode:
                sys.exit(done.stdout[-2000:] + done.stderr[-4000:])
            found[str(ranks)] = json.loads(done.stdout.split("RESULT ", 1)[1].splitlines()[0])
    return {"processes": found, "load": os.getloadavg()[0]}


def multiples(counted: dict[str, Any]) -> dict[str, float]:
    """What a process receives, times n / (n - 1), in units of bytes of the LoRA, of all weights or of the blocks' weights."""
    low = counted["zero 3"]
    weights, lora = low["base_bytes"] + low["lora_bytes"], low["lora_bytes"]
    tiny = family("wan").shaped_model(compose("wan", "tiny", SMALL, {"data": {"pictures": "pictures"}}).model)
    blocks = sum(p.nbytes for p in tiny.blocks.parameters())

    def gradients(name: str) -> float:
        return sum(RECEIVED.get(kind, 0) * size for kind, size in counted[name]["bytes"].items()) / lora

    def gathered(name: str) -> int:
        return counted[name]["bytes"].get("allgather_base", 0)

    per_forward = (gathered("zero 3, more steps") - gathered("zero 3")) / (2 * (STEPS[1] - STEPS[0])) / weights
    per_backward = (gathered("zero 3") - 2 * STEPS[0] * per_forward * weights) / 2 / blocks
    found = {f"gradients, {name}": gradients(name) for name in counted if name != "zero 3, more steps"}
    found |= {f"new values, zero {stage}": gathered(f"zero {stage}") / lora for stage in range(3)}
    return {**found, "weights, zero 3, per forward": per_forward, "blocks, zero 3, per backward": per_backward}


# --- reckoned ----------------------------------------------------------------------------------------------------------------------


def sizes(family_name: str, preset: str) -> dict[str, float]:
    """Bytes of the weights and FLOPs of a forward, from configurations alone."""
    config = compose(family_name, preset, {"data": {"pictures": "pictures"}})
    model = family(family_name).shaped_model(config.model)
    base = sum(p.nbytes for p in model.transformer.parameters())
    blocks = sum(p.nbytes for p in model.blocks.parameters())
    numbers = sum(p.numel() for p in model.blocks.parameters())
    lora = sum(p.numel() for p in add_lora(model, config.lora, seed=0).values())
    frames, height, width = config.model.latent_shape
    tokens, dim = frames * height * width // 4, model.blocks[0].attn1.to_q.in_features
    return {
        "base_bytes": base,
        "block_bytes": blocks,
        "lora_bytes": 4 * lora,
        "forward_flops": 2 * numbers * tokens + 4 * len(model.blocks) * tokens**2 * dim,
        "sampling_steps": config.rollout.sampling_steps,
    }


def reckon(found: dict[str, Any]) -> list[dict[str, Any]]:
    """Bytes that a GPU receives per update and per clip (one clip per GPU and update), for every model, stage and number of GPUs."""
    units, rows = found["multiples"], []
    for name, where in MODELS.items():
        size = sizes(*where)
        weights, forwards = size["base_bytes"] + size["lora_bytes"], 2 * size["sampling_steps"]
        flops = size["forward_flops"] * (forwards + 2 * (RECOMPUTED + BACKWARD))
        for stage, gpus in itertools.product((0, 2, 3), (8, 64)):
            share = (gpus - 1) / gpus
            update = units[f"gradients, zero {stage}"] + units.get(f"new values, zero {stage}", 0)
            clip = 0.0
            if stage == 3:
                clip = forwards * units["weights, zero 3, per forward"] * weights
                clip += 2 * units["blocks, zero 3, per backward"] * size["block_bytes"]
            update, clip = update * size["lora_bytes"] * share, clip * share
            row = {"model": name, "stage": "1, 2" if stage == 2 else str(stage), "gpus": gpus}
            row["weights"] = size["base_bytes"] / (gpus if stage == 3 else 1)
            row |= {"per_update": update, "per_clip": clip, "compute": flops / TERAFLOPS}
            rows.append({**row, "seconds": {link: (update + clip) / speed for link, speed in LINKS.items()}})
    return rows


# --- what is shown -----------------------------------------------------------------------------------------------------------------


def tables(found: dict[str, Any]) -> str:
    units = found["multiples"]
    one, two = (found["processes"][ranks] for ranks in ("1", "2"))
    rows = {
        "for gradients, in units of the LoRA's bytes": [f"{units[f'gradients, zero {s}']:.2f}" for s in range(4)],
        "the same with two micro-steps": [
            f"{units[key]:.2f}" if (key := f"gradients, zero {s}, two micro-steps") in units else "-" for s in range(4)
        ],
        "for new values, in units of the LoRA's bytes": [
            *(f"{units[f'new values, zero {s}']:.2f}" for s in range(3)),
            "0",
        ],
        "per forward, in units of all weights": ["0", "0", "0", f"{units['weights, zero 3, per forward']:.2f}"],
        "per backward, in units of the blocks' weights": [
            "0",
            "0",
            "0",
            f"{units['blocks, zero 3, per backward']:.2f}",
        ],
        "CPU seconds per step and process, one process → two": [
            f"{one[f'zero {s}']['cpu_seconds']:.2f} → {two[f'zero {s}']['cpu_seconds']:.2f}" for s in range(4)
        ],
    }
    lines = [
        "| received, times n / (n - 1) | " + " | ".join(f"ZeRO-{s}" for s in range(4)) + " |",
        "| --- |" + " ---: |" * 4,
    ]
    lines += [f"| {name} | " + " | ".join(cells) + " |" for name, cells in rows.items()]
    head = "| model | ZeRO | GPUs | weights per GPU | received per update | received per clip | arithmetic per clip | "
    more = [head + " | ".join(LINKS) + " |", "| --- | ---: |" + " ---: |" * (5 + len(LINKS))]
    for row in reckon(found):
        cells = [
            row["model"],
            row["stage"],
            str(row["gpus"]),
            f"{row['weights'] / 1e9:.2f} GB",
            f"{row['per_update'] / 1e9:.2f} GB",
        ]
        cells += [
            f"{row['per_clip'] / 1e9:,.0f} GB",
            f"{row['compute']:.1f} s",
            *(f"{s:,.2f} s" for s in row["seconds"].values()),
        ]
        more.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n\n" + "\n".join(more)


START, END = "<!-- counted and reckoned -->", "<!-- end -->"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--measure", action="store_true", help="count and time first")
    parser.add_argument("--data", type=Path, default=ROOT / "docs" / "data" / "scaling.json")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "scaling.md", help="its tables are rewritten")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        work(arguments.work)
        return
    if arguments.measure:
        arguments.data.write_text(json.dumps(measure() | provenance(), indent=1) + "\n")
    found = json.loads(arguments.data.read_text())
    found["multiples"] = multiples(found["processes"]["2"])
    text = tables(found)
    before, rest = arguments.page.read_text().split(START)
    arguments.page.write_text(f"{before}{START}\n{text}\n{END}{rest.split(END)[1]}")
    print(text)


if __name__ == "__main__":
    main()
