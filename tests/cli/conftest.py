import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vcd_fast.media import write_image

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def vcd():
    """Runs `vcd WORDS` as a user would: (exit code, stdout, stderr)."""

    def run(*words: object, cwd: Path = ROOT, timeout: int = 300, **environment: str) -> tuple[int, str, str]:
        quiet = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "120", **environment}
        command = [sys.executable, "-m", "vcd_fast.cli.main", *map(str, words)]
        done = subprocess.run(command, cwd=cwd, env=quiet, capture_output=True, text=True, timeout=timeout)
        return done.returncode, done.stdout, done.stderr

    return run


@pytest.fixture(scope="session")
def picture(tmp_path_factory) -> Path:
    coarse = torch.rand(1, 3, 4, 6, generator=torch.Generator().manual_seed(0))
    path = tmp_path_factory.mktemp("picture") / "picture.png"
    write_image(path, torch.nn.functional.interpolate(coarse, (64, 96), mode="bicubic").clamp(0, 1)[0])
    return path
