"""Checkpoints that are there whole or not at all.

`OUTPUT/checkpoints/step-00000020/` holds `lora.safetensors`, `moments.safetensors`, `state.json` (the step, counters, SHA-256 of the
two files and of itself) and, written last, `.complete`. It is filled under a temporary name, brought to the disk and renamed; older
ones are removed only after that.
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

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from vcd_fast.training.durable import naming, sync

FOLDER = "checkpoints"
FILES = ("lora.safetensors", "moments.safetensors")
STATE = "state.json"
_NAME = re.compile(r"step-(\d{8})")
_ASIDE = ".replaced"


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
    """Write a checkpoint in place of one of the same step, then remove all but the newest `keep`.

    Raises:
        OSError: could not be written (disk full, no permission); nothing half-written stays.
    """
    parent = output / FOLDER
    final = parent / f"step-{checkpoint.step:08d}"
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
        state["sha256"][STATE] = _hash_of_state(state)
        with naming(final):
            (temporary / STATE).write_text(json.dumps(state, indent=1))
            for path in temporary.iterdir():
                sync(path)
            (temporary / ".complete").touch()
            sync(temporary)
        _put_in_place(temporary, final)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if not isinstance(error, SafetensorError):
            raise
        # safetensors reports a full disk as an error of its own
        raise OSError(f"checkpoint {final} could not be written: {error}") from error
    for old in list_complete(output)[:-keep]:
        _remove(old)
    return final


def _put_in_place(temporary: Path, final: Path) -> None:
    """One of the same step is put aside until the new one has its name, and not removed before."""
    aside = final.with_name(f".{final.name}{_ASIDE}")
    try:
        if final.exists():
            os.rename(final, aside)
        os.rename(temporary, final)
        sync(final.parent)
    finally:
        put_back(final.parent.parent)


def put_back(output: Path) -> None:
    """Finish or undo a replacement that was interrupted, so that a complete checkpoint is never under another name.

    Before `choose`, on one rank, with the others waiting: they have to see the same.
    """
    for aside in (output / FOLDER).glob(f".step-*{_ASIDE}"):
        final = aside.with_name(aside.name[1 : -len(_ASIDE)])
        if final.exists():
            _remove(aside)
        else:
            os.rename(aside, final)


def forget_after(output: Path, step: int) -> None:
    """Remove checkpoints later than `step`, and what a killed process left half-written: a run that goes on from `step` writes its
    own, and the newest must be its newest."""
    for folder in list_complete(output):
        if int(_NAME.fullmatch(folder.name)[1]) > step:
            _remove(folder)
    for leftover in (output / FOLDER).glob(".step-*.tmp"):
        shutil.rmtree(leftover)


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
        state = json.loads((folder / STATE).read_text())
        written = state["sha256"]
        altered = [name for name in FILES if _sha256(folder / name) != written[name]]
        # Checkpoints of before this hash was kept have just the other two.
        if set(written) != set(FILES) and written.get(STATE) != _hash_of_state(state):
            altered.append(STATE)
        step, updates = state.pop("step"), state.pop("updates")
    except (OSError, LookupError, TypeError, AttributeError, ValueError) as error:
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


FIXED = ("family", "model.weights", "model.revision", "lora.rank", "lora.alpha", "lora.targets")
"""what a LoRA is about: a run cannot go on with another"""
INCIDENTAL = (
    "preset",
    "training.output",
    "training.resume",
    "training.cache",
    "training.device",
    "training.max_train_steps",
)


def changes(checkpoint: Checkpoint, config: Mapping[str, Any]) -> list[str]:
    """What is configured differently now, as `key: before -> now`; keys that decide no number are left out.

    Raises:
        ValueError: what the LoRA is about has changed.
    """
    before, now = _flat(checkpoint.extra["config"]), _flat(config)
    differing = [key for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key)]
    texts = {key: f"{key}: {before.get(key)} -> {now.get(key)}" for key in differing if key not in INCIDENTAL}
    fixed = [texts[key] for key in FIXED if key in texts]
    if fixed:
        raise ValueError(
            f"resume: the run to go on with was started with other settings ({'; '.join(fixed)}); "
            "choose another --output to start a new one, or the old settings"
        )
    return list(texts.values())


def _flat(config: Mapping[str, Any]) -> dict[str, Any]:
    flat = {}
    for name, value in config.items():
        flat.update(
            {f"{name}.{key}": entry for key, entry in value.items()} if isinstance(value, Mapping) else {name: value}
        )
    return flat


def _offer(folder: Path) -> str:
    earlier = [path for path in list_complete(folder.parent.parent) if path.name < folder.name]
    return f"Go on from the one before it with --resume {earlier[-1]}" if earlier else "There is no earlier one."


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _hash_of_state(state: Mapping[str, Any]) -> str:
    """Of what `state.json` says, its own hash apart; the same before it is written and after it is read."""
    hashes = {name: state["sha256"][name] for name in FILES}
    text = json.dumps({**state, "sha256": hashes}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _remove(folder: Path) -> None:
    """First no longer a checkpoint, then gone."""
    (folder / ".complete").unlink(missing_ok=True)
    shutil.rmtree(folder)
