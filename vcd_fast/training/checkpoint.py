"""Checkpoints that are there whole or not at all.

`OUTPUT/checkpoints/step-00000020/` holds `lora.safetensors`, `moments.safetensors`, `state.json` (the step, counters, SHA-256 of the
two files) and, written last, `.complete`. It is filled under a temporary name and renamed; older ones are removed only after that.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

FOLDER = "checkpoints"
FILES = ("lora.safetensors", "moments.safetensors")
_NAME = re.compile(r"step-(\d{8})")


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """What a run goes on from."""

    step: int
    """optimizer steps done, skipped ones included: the index of the next step"""
    updates: int
    """optimizer steps that changed the weights"""
    lora: dict[str, Tensor]
    moments: dict[str, Tensor]
    extra: dict[str, Any]
    """counters and fingerprints, as JSON"""


def save(output: Path, checkpoint: Checkpoint, keep: int) -> Path:
    """Write a checkpoint, then remove all but the newest `keep`.

    Raises:
        OSError: could not be written (disk full, no permission); nothing half-written stays.
    """
    parent = output / FOLDER
    final = parent / f"step-{checkpoint.step:08d}"
    if (final / ".complete").exists():  # written by the run this one was resumed from
        return final
    temporary = parent / f".{final.name}.tmp"
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        for name, tensors in zip(FILES, (checkpoint.lora, checkpoint.moments), strict=True):
            save_file({key: value.contiguous() for key, value in tensors.items()}, temporary / name)
        state = {
            "step": checkpoint.step,
            "updates": checkpoint.updates,
            "sha256": {name: _sha256(temporary / name) for name in FILES},
            **checkpoint.extra,
        }
        (temporary / "state.json").write_text(json.dumps(state, indent=1))
        for path in temporary.iterdir():
            _sync(path)
        (temporary / ".complete").touch()
        shutil.rmtree(final, ignore_errors=True)
        os.rename(temporary, final)
        _sync(parent)
    except Exception as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError):
            raise
        # safetensors reports a full disk as an error of its own
        raise OSError(f"checkpoint {final} could not be written: {error}") from error
    for old in list_complete(output)[:-keep]:
        shutil.rmtree(old)
    return final


def list_complete(output: Path) -> list[Path]:
    """Folders of the complete checkpoints of a run, oldest first."""
    if not (output / FOLDER).is_dir():
        return []
    found = [
        path for path in (output / FOLDER).iterdir() if _NAME.fullmatch(path.name) and (path / ".complete").exists()
    ]
    return sorted(found, key=lambda path: path.name)


def load(folder: Path) -> Checkpoint:
    """Read a checkpoint and verify its hashes.

    Raises:
        ValueError: not a checkpoint, incomplete, or altered; the message offers the one before it.
    """
    if not (folder / ".complete").exists():
        raise ValueError(f"resume: expected the folder of a complete checkpoint, got {folder}")
    try:
        state = json.loads((folder / "state.json").read_text())
        altered = [name for name in FILES if _sha256(folder / name) != state["sha256"][name]]
        step, updates = state.pop("step"), state.pop("updates")
    except (OSError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"resume: checkpoint {folder} cannot be read ({error!r}). {_offer(folder)}") from error
    if altered:
        raise ValueError(f"resume: {', '.join(altered)} in {folder} differs from what was written. {_offer(folder)}")
    state.pop("sha256")
    return Checkpoint(step, updates, load_file(folder / FILES[0]), load_file(folder / FILES[1]), state)


def choose(output: Path, resume: str) -> Checkpoint | None:
    """What `--resume` asks for: `auto` the newest complete checkpoint in `output` or None, `never` None, else that folder.

    Raises:
        ValueError: see `load`; or `never` where a run already stands.
    """
    complete = list_complete(output)
    if resume == "auto":
        return load(complete[-1]) if complete else None
    if resume == "never":
        if complete or (output / "log.jsonl").exists():
            raise ValueError(
                f"resume: {output} already holds a run; choose another --output, or --resume auto to go on with it"
            )
        return None
    return load(Path(resume))


def check_matches(checkpoint: Checkpoint, lora: Mapping[str, Tensor]) -> None:
    """Raises ValueError where a checkpoint's LoRA does not fit the one configured now."""
    stored = {name: tuple(value.shape) for name, value in checkpoint.lora.items()}
    wanted = {name: tuple(value.shape) for name, value in lora.items()}
    if stored != wanted:
        names = sorted(name for name in stored.keys() | wanted.keys() if stored.get(name) != wanted.get(name))
        raise ValueError(
            f"resume: the checkpoint's LoRA differs from the configured one in {len(names)} tensors (first: {names[0]}, "
            f"stored {stored.get(names[0])}, configured {wanted.get(names[0])}); keep rank and targets, or choose another --output"
        )


def _offer(folder: Path) -> str:
    earlier = [path for path in list_complete(folder.parent.parent) if path.name < folder.name]
    return f"Go on from the one before it with --resume {earlier[-1]}" if earlier else "There is no earlier one."


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _sync(path: Path) -> None:
    """Have the disk hold it before anything relies on it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
