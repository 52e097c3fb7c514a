"""Where the numbers of a tool's JSON come from."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def provenance() -> dict[str, Any]:
    """When, which command, commit, machine and versions."""
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))  # `benchmarks` is in no wheel, and a script's own folder comes first
    from benchmarks import machine

    return {
        "when": machine.now(),
        "command": " ".join(["python", *sys.argv]),
        "commit": machine.commit(),
        "machine": {"cpu": machine.cpu_model(), "cores": machine.cores()},
        "versions": machine.versions(),
    }
