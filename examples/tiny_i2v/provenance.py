"""Where figures come from: what is written beside them."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path

from vcd_fast.evaluation.machine import versions


def provenance(command: str) -> dict[str, object]:
    """The command, the commit the checkout is at, machine and versions."""
    done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent)
    machine = {"architecture": platform.machine(), "cores": os.cpu_count()}
    return {"command": command, "commit": done.stdout.strip() or None, "machine": machine, "versions": versions()}
