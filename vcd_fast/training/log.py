"""What a run writes down: one JSON object per line, always; TensorBoard events beside it if asked for."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from vcd_fast.training.durable import naming, replace_text, sync


class RunLog:
    """`OUTPUT/log.jsonl`. A line is on disk before the next step starts.

    Lines are `{"kind": "train" | "held_out" | "step_cache", "step": int, ...}`: `train` for what optimizer step number `step` (from 0) did,
    `held_out` and `step_cache` (drift) for the weights after `step` steps. A run that goes on from step s first removes the lines of s and later, which it
    writes again, so the log reads as if nothing had happened.
    """

    def __init__(self, output: Path, first_step: int, tensorboard: bool):
        self.path = output / "log.jsonl"
        _keep_before(self.path, first_step)
        # Unbuffered: what a full disk did not take is not tried again when the process ends.
        self._file = self.path.open("ab", buffering=0)
        sync(output)
        self._tensorboard = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._tensorboard = SummaryWriter(str(output / "tensorboard"), purge_step=first_step)

    def write(self, kind: str, step: int, **values: Any) -> None:
        """Append a line and have the disk hold it.

        Raises:
            OSError: it cannot; part of the line may be there, which `read` and a run that goes on leave out.
        """
        line = memoryview(_line({"kind": kind, "step": step, **values}).encode())
        with naming(self.path):
            while line:
                line = line[self._file.write(line) :]
            os.fsync(self._file.fileno())
        if self._tensorboard is not None:
            for name, value in _flat(values):
                self._tensorboard.add_scalar(f"{kind}/{name}", value, step)

    def close(self) -> None:
        self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a log; a last line cut off by a crash is left out.

    Raises:
        ValueError: another line is not JSON.
    """
    texts = path.read_text(errors="replace").splitlines()
    lines = []
    for number, text in enumerate(texts, 1):
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            if number < len(texts):
                raise ValueError(
                    f"{path}: line {number} of {len(texts)} was altered, it is no JSON. Repair it, or remove the line"
                ) from None
    return lines


def _keep_before(path: Path, step: int) -> None:
    if path.exists():
        replace_text(path, "".join(_line(line) for line in read(path) if line["step"] < step))


def _line(values: dict[str, Any]) -> str:
    return json.dumps(json_safe(values), allow_nan=False) + "\n"


def json_safe(value: Any) -> Any:
    """JSON knows no NaN and no infinity: null stands for them."""
    if isinstance(value, dict):
        return {name: json_safe(entry) for name, entry in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _flat(values: dict[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    found = []
    for name, value in values.items():
        if isinstance(value, dict):
            found += _flat(value, f"{prefix}{name}/")
        elif isinstance(value, int | float):
            found.append((prefix + name, float(value)))
    return found
