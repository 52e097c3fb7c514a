import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


@pytest.fixture(scope="session")
def two_ranks():
    """Runs a worker script of this folder on two CPU ranks, with no compiler on the path; returns what it printed after RESULT."""

    def run(script: str, *arguments: str, timeout: int = 300):
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "CC": "/nonexistent",
            "CXX": "/nonexistent",
            "HF_HUB_OFFLINE": "1",
        }
        launcher = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(free_port())]
        command = [sys.executable, *launcher, str(HERE / script), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment, cwd=ROOT)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
        return json.loads(done.stdout.split("RESULT ", 1)[1].splitlines()[0])

    return run
