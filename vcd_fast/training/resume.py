"""What a run goes on from, the same on all ranks."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist

from vcd_fast.training import checkpoint as checkpoints
from vcd_fast.training.checkpoint import Checkpoint


def choose(output: Path, resume: str, device: torch.device) -> Checkpoint | None:
    """`checkpoint.choose` on every rank, after rank 0 has put back what a kill left under another name. Collective.

    Raises:
        ValueError: as `checkpoint.choose`; or ranks that see different checkpoints, which would train different LoRAs.
    """
    if dist.get_rank() == 0:
        checkpoints.put_back(output)
    dist.barrier()
    found = checkpoints.choose(output, resume)
    step = -1 if found is None else found.step
    ends = torch.tensor([step, -step], device=device)
    dist.all_reduce(ends, op=dist.ReduceOp.MAX)
    latest, earliest = ends[0].item(), -ends[1].item()
    if latest != earliest:
        seen = "none" if earliest < 0 else f"that of step {earliest}"
        raise ValueError(
            f"output: expected a folder that all processes share, got {output}, where some find the checkpoint of step {latest} and others "
            f"{seen}; put --output (or --resume) on a file system that every machine mounts"
        )
    return found
