"""Memory that runs out ends a run with the phase, the figures and the next thing to try."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vcd_fast.config import compose
from vcd_fast.training.out_of_memory import explain, is_out_of_memory

HERE = Path(__file__).parent
CPU_MESSAGE = (
    "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 4000000000000 bytes. "
    "Error code 12 (Cannot allocate memory)"
)


def tiny(**rollout):
    return compose("wan", "tiny", {"data": {"pictures": "."}, "rollout": rollout})


def test_a_run_that_runs_out_of_memory_says_where_and_what_next(small_run, tmp_path):
    command = [sys.executable, str(HERE / "out_of_memory_worker.py"), *small_run, "--output", str(tmp_path / "run")]
    command += ["--checkpointing", "none"]
    quiet = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=quiet, cwd=HERE.parents[1])
    assert "MESSAGE" in done.stdout, done.stderr[-3000:]
    message = done.stdout.split("MESSAGE\n")[1]
    assert message.startswith("out of memory in the decode (CUDA out of memory. Tried to allocate 2.00 GiB.")
    assert re.search(
        r"The process had taken \d+\.\d\d GiB at most, .*; the estimate for this phase is \d+\.\d\d GiB", message
    )
    assert re.search(r"next, turn on --[\w-]+ .*\(costs: .*\): the estimate is then", message)


def test_errors_of_allocators_are_told_from_others():
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert is_out_of_memory(RuntimeError(CPU_MESSAGE))
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("shapes do not match"))
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60)
    assert is_out_of_memory(caught.value)


def test_the_message_names_the_cpu_s_error_too():
    text = explain(RuntimeError(CPU_MESSAGE), tiny(checkpointing="none"), "backward", torch.device("cpu"), 1)
    assert text.startswith("out of memory in the backward ([enforce fail at alloc_cpu")
    assert "next, turn on --checkpointing block (costs: one more forward per differentiated step)" in text


def test_where_nothing_is_left_to_turn_on():
    text = explain(MemoryError(), tiny(checkpointing="both"), "optimizer", torch.device("cpu"), 1)
    assert "what there is to turn on is on; what is left: fewer --num-frames" in text
    text = explain(MemoryError(), tiny(), "encode", torch.device("cpu"), 1)
    assert "while prompts and pictures were encoded (MemoryError)" in text
    assert "--cache" in text
