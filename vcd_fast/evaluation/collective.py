"""Two processes on this machine that add up their tensors: what `--num_gpus 2` stands on."""

from __future__ import annotations

import multiprocessing
import time
import traceback
from datetime import timedelta
from multiprocessing.connection import Connection, wait

from vcd_fast.devices import free_port

RANKS = 2


def check_all_reduce(timeout: float = 60.0) -> float:
    """Start two CPU processes that meet at a free TCP port and run one all_reduce over gloo.

    Returns:
        the seconds it took, most of them the start of the processes.

    Raises:
        RuntimeError: they could not meet, or got a wrong sum; the message says how far they came.
    """
    started = time.monotonic()
    port = free_port()
    context = multiprocessing.get_context("spawn")
    pipes = [context.Pipe(duplex=False) for _ in range(RANKS)]
    processes = [
        context.Process(target=_rank, args=(rank, port, timeout, sender), daemon=True)
        for rank, (_, sender) in enumerate(pipes)
    ]
    try:
        for process, (_, sender) in zip(processes, pipes, strict=True):
            process.start()
            sender.close()  # so that the end of the process ends the pipe
        for rank, message in _messages([receiver for receiver, _ in pipes], started + timeout).items():
            if message != "ok":
                raise RuntimeError(f"rank {rank} of {RANKS}: {message}")
    finally:
        for process in processes:
            if process.pid is not None:
                process.join(timeout=1)
                process.kill()
    return time.monotonic() - started


def _messages(receivers: list[Connection], deadline: float) -> dict[int, str]:
    """What every rank says, in words where it says nothing."""
    found: dict[int, str] = {}
    open_ones = dict(zip(receivers, range(len(receivers)), strict=True))
    while open_ones:
        ready = wait(list(open_ones), timeout=max(0.0, deadline - time.monotonic()))
        for receiver in ready:
            rank = open_ones.pop(receiver)
            try:
                found[rank] = receiver.recv()
            except EOFError:
                found[rank] = "the process ended without a word"
        failed = any(message != "ok" for message in found.values())  # then the other one waits for it in vain
        if failed or not ready:
            found.update(dict.fromkeys(open_ones.values(), "ok" if failed else "no answer in time"))
            break
    return dict(sorted(found.items()))


def _rank(rank: int, port: int, timeout: float, sender: Connection) -> None:
    try:
        import torch
        import torch.distributed as dist

        torch.set_num_threads(1)
        dist.init_process_group(
            "gloo",
            init_method=f"tcp://127.0.0.1:{port}",
            rank=rank,
            world_size=RANKS,
            timeout=timedelta(seconds=timeout),
        )
        values = torch.arange(4.0) + rank
        dist.all_reduce(values)
        wanted = sum(torch.arange(4.0) + each for each in range(RANKS))
        right = torch.equal(values, wanted)
        dist.barrier()
        dist.destroy_process_group()
        sender.send("ok" if right else f"expected the sum {wanted.tolist()}, got {values.tolist()}")
    except Exception as error:
        sender.send("".join(traceback.format_exception_only(error)).strip())
