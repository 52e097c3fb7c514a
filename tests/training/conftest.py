import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vcd_fast.media import write_image

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def run_worker(script: str, arguments: tuple[str, ...], ranks: int, timeout: int):
    """No compiler can be found on the way: nothing may need one."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "CC": "/nonexistent",
        "CXX": "/nonexistent",
        "HF_HUB_OFFLINE": "1",
    }
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(ranks), "--master_port", str(free_port())]
    command = [sys.executable, *launcher, str(HERE / script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return json.loads(done.stdout.split("RESULT ", 1)[1].splitlines()[0])


@pytest.fixture(scope="session")
def two_ranks():
    """Runs a worker script of this folder on two CPU ranks; returns what it printed after RESULT."""
    return lambda script, *arguments, timeout=900: run_worker(script, arguments, 2, timeout)


@pytest.fixture(scope="session")
def one_rank():
    return lambda script, *arguments, timeout=900: run_worker(script, arguments, 1, timeout)


@pytest.fixture(scope="session")
def small_pictures(tmp_path_factory) -> Path:
    """Four smooth random pictures with prompts, one of them held out."""
    folder = tmp_path_factory.mktemp("pictures")
    rows = []
    for index in range(4):
        coarse = torch.rand(1, 3, 4, 5, generator=torch.Generator().manual_seed(index))
        picture = torch.nn.functional.interpolate(coarse, (64, 80), mode="bicubic").clamp(0, 1)[0]
        write_image(folder / f"{index}.png", picture)
        rows.append({"image": f"{index}.png", "prompt": f"the cat runs {'slowly ' * index}", "held_out": index == 3})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


SMALL_RUN = """
model: {height: 32, width: 32, num_frames: 5, guidance_scale: 2}
lora: {rank: 2, alpha: 2}
rollout: {sampling_steps: 2}
reward: {num_projections: 4, frames_per_step: 1}
training: {max_train_steps: 6, checkpoint_every: 2, sample_every: 0, device: cpu}
"""


@pytest.fixture(scope="session")
def small_run(small_pictures, tmp_path_factory) -> list[str]:
    """Options of the quickest run there is: seconds, most of them imports."""
    folder = tmp_path_factory.mktemp("small-run")
    (folder / "small.yaml").write_text(SMALL_RUN)
    options = {"--model": "wan", "--preset": "tiny", "--config": folder / "small.yaml", "--pictures": small_pictures}
    options["--cache"] = folder / "encodings"
    return [str(word) for pair in options.items() for word in pair]


@pytest.fixture(scope="session")
def start_training():
    """Starts the entry script as a user would; returns the process."""

    def start(*options: str, **environment: str) -> subprocess.Popen:
        command = [sys.executable, str(ROOT / "vcd_fast" / "train.py"), *map(str, options)]
        quiet = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1", **environment}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(command, env=quiet, cwd=ROOT, **pipes)

    return start


@pytest.fixture(scope="session")
def training(start_training):
    """Runs the entry script to its end: (exit code, stdout, stderr)."""

    def run(*options: str, timeout: int = 300, **environment: str) -> tuple[int, str, str]:
        process = start_training(*options, **environment)
        try:
            out, err = process.communicate(timeout=timeout)
        finally:
            process.kill()
        return process.returncode, out, err

    return run
