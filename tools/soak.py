"""Disturb a run again and again, resume it each time, and see whether it ends as if nothing had happened.

    make soak                                  # 300 steps on two processes, 20 disturbances
    python tools/soak.py --steps 12 --every 3 --disturbances 3 --ranks 1

A tiny run is trained twice, undisturbed and disturbed at random moments: while it starts, in a step, while a checkpoint is written.

- `kill`: SIGKILL to all processes.
- `kill one`: SIGKILL to one process of several; the others end by themselves or on the SIGTERM a launcher then sends.
- `terminate`: SIGTERM to all processes, as a cluster's scheduler sends it.
- `full disk`: RLIMIT_FSIZE of the running first process is lowered from outside. To the process that is a disk that is full from some byte on:
  a write is cut in the middle, the next one fails. It works at any moment, needs no root and no file system of its own, and nothing in the
  run knows of it. Unlike a full disk it counts file by file, and the number of the error is EFBIG and not ENOSPC.

After every disturbance all checkpoints must pass their hashes, the newest must be no older than the last one that was due, and the log must hold
every step the run said it had done, with the numbers of the undisturbed run. At the end LoRA, moments and log must be those of the undisturbed
run, bit for bit. Where that does not hold: exit code 1 and a message. Linux only.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib
import json
import os
import random
import re
import resource
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch
from provenance import ROOT, provenance
from safetensors.torch import load_file

from vcd_fast import train
from vcd_fast.devices import free_port
from vcd_fast.training import checkpoint as checkpoints
from vcd_fast.training import log

PLACES = {
    "kill": ("step", "checkpoint", "start"),
    "kill one": ("step", "checkpoint", "start"),
    "terminate": ("step", "start"),
    "full disk": ("log", "checkpoint"),
}
# The smallest video there is, and a LoRA of a rank that makes checkpoints large enough to be cut.
SETTINGS = (
    "--height 16 --width 16 --num-frames 5 --decode-context truncated --guidance-scale 1 --sampling-steps 2 --rank 64 --alpha 64 --learning-rate 1e-3 "
    "--frames-per-step 1 --num-projections 4 --sample-pictures 1 --sample-every 100 --checkpointing none --device cpu"
)
LORA = Path("lora") / "pytorch_lora_weights.safetensors"
MEASURED = ("seconds", "memory_gib")
"""what a log says about the machine and not about the run"""
IMPORTED = (
    "vcd_fast.training.loop",
    "vcd_fast.models.wan.encoder",
    "diffusers.models.transformers.transformer_wan",
    "diffusers.models.autoencoders.autoencoder_kl_wan",
    "matplotlib.backends.backend_agg",
    "av",
)
"""before anything is forked, so that every start need not"""
PATIENCE = 300.0
"""seconds a run may be silent"""


class Failed(Exception):
    """A promise was not kept."""


class Attempt:
    """The processes of one start, with what a launcher does: if one fails, the others are told to end.

    They are forked from this one, which has imported everything and runs no thread: a start takes a second or two.
    """

    def __init__(self, options: list[str], ranks: int) -> None:
        self.started = time.monotonic()
        shared = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1"}
        shared |= {"MASTER_PORT": str(free_port())}
        self.codes: list[int | None] = [None] * ranks
        self._heard = 0, self.started
        self._pids, self._pipes, self._said = [], [], [b""] * ranks
        sys.stdout.flush()
        for rank in range(ranks):
            ours, theirs = os.pipe()
            pid = os.fork()
            if pid == 0:
                _train(options, {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}, theirs)
            os.close(theirs)
            os.set_blocking(ours, False)
            self._pids.append(pid)
            self._pipes.append(ours)

    @property
    def pid(self) -> int:
        """Of the first process."""
        return self._pids[0]

    @property
    def ranks(self) -> int:
        return len(self._pids)

    @property
    def said(self) -> list[str]:
        """What each process has printed."""
        for rank, pipe in enumerate(self._pipes):
            try:
                while pipe is not None and (read := os.read(pipe, 1 << 16)):
                    self._said[rank] += read
            except BlockingIOError:
                continue
        return [text.decode(errors="replace") for text in self._said]

    @property
    def step(self) -> int:
        """Steps done, in the run's own count, as far as the first process of this start has said."""
        return max(map(int, re.findall(r"^step (\d+)/", self.said[0], re.MULTILINE)), default=0)

    @property
    def resumed_from(self) -> int:
        return max(map(int, re.findall(r"^resumed from step (\d+)", self.said[0], re.MULTILINE)), default=0)

    @property
    def ended(self) -> list[bool]:
        for rank, pid in enumerate(self._pids):
            if self.codes[rank] is None:
                found, status = os.waitpid(pid, os.WNOHANG)
                self.codes[rank] = os.waitstatus_to_exitcode(status) if found else None
        return [code is not None for code in self.codes]

    def send(self, number: int, rank: int | None = None) -> None:
        for index, ended in enumerate(self.ended):
            if not ended and rank in (None, index):
                os.kill(self._pids[index], number)

    def until(self, condition: Callable[[], bool]) -> bool:
        """Wait; False if the run was finished first."""
        while not condition():
            if any(self.ended):
                if any(self.wait()):
                    raise Failed(f"ended before it was disturbed:\n{self.tail()}")
                return False
            self._be_patient()
        return True

    def wait(self) -> list[int]:
        """Exit codes, once all processes have ended."""
        told = False
        while not all(self.ended):
            if not told and any(self.codes):
                self.send(signal.SIGTERM)
                told = True
            self._be_patient()
        return [code for code in self.codes if code is not None]

    def _be_patient(self) -> None:
        said = sum(map(len, self.said))  # also empties the pipes: full ones would stop the processes
        if said != self._heard[0]:
            self._heard = said, time.monotonic()
        if time.monotonic() > self._heard[1] + PATIENCE:
            raise Failed(f"nothing was said for {PATIENCE:.0f} s:\n{self.tail()}")
        time.sleep(0.002)

    def close(self) -> None:
        """Whatever happens, nothing is left running."""
        self.send(signal.SIGKILL)
        while not all(self.ended):
            time.sleep(0.005)
        _ = self.said
        for pipe in self._pipes:
            os.close(pipe)
        self._pipes = []

    def tail(self) -> str:
        return "\n".join("\n".join(text.splitlines()[-15:]) for text in self.said)


def _train(options: list[str], environment: dict[str, str], output: int) -> NoReturn:
    """A process of a run, as the entry script would be one."""
    code = 1
    try:
        os.environ.update(environment)
        for descriptor in (1, 2):
            os.dup2(output, descriptor)
        sys.stdout.reconfigure(line_buffering=True)
        train.main(options)
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


class Soak:
    """The two runs, below `work`."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.random = random.Random(arguments.seed)
        self.calm, self.rough = arguments.work / "undisturbed", arguments.work / "disturbed"
        for folder in (self.calm, self.rough):
            shutil.rmtree(folder, ignore_errors=True)
        self.seconds_to_start = self.seconds_per_step = 0.0
        self.expected: list[dict[str, Any]] = []

    def run(self) -> dict[str, Any]:
        """Raises `Failed`."""
        started, count = time.monotonic(), self.arguments.disturbances
        self._undisturbed()
        drawn = [self.arguments.kinds[index % len(self.arguments.kinds)] for index in range(count)]
        self.random.shuffle(drawn)
        steps = sorted(self.random.sample(range(1, self.arguments.steps), count))
        disturbances = []
        for kind, step in zip(drawn, steps, strict=True):
            found = self._disturbed(kind, self.random.choice(PLACES[kind]), step)
            disturbances.append(found)
            words = "  ".join(f"{name} {value}" for name, value in found.items())
            print(f"{len(disturbances):3d}/{count}  {words}", flush=True)
        with contextlib.closing(self._start(self.rough)) as last:
            if any(last.wait()):
                raise Failed(f"the last start did not finish:\n{last.tail()}")
        return {
            "settings": SETTINGS,
            **{name: getattr(self.arguments, name) for name in ("steps", "every", "ranks", "seed")},
            "disturbances": disturbances,
            "identical": self._identical(),
            "seconds": round(time.monotonic() - started),
            "seconds_per_start": round(self.seconds_to_start, 2),
            "seconds_per_step": round(self.seconds_per_step, 3),
        }

    def _start(self, output: Path) -> Attempt:
        ranks = self.arguments.ranks
        words = ["--model", "wan", "--preset", "tiny", "--pictures", ROOT / "examples" / "pictures", *SETTINGS.split()]
        words += ["--max-train-steps", self.arguments.steps, "--checkpoint-every", self.arguments.every]
        words += ["--zero", 2 if ranks > 1 else 0, "--cache", self.arguments.work / "encodings", "--output", output]
        return Attempt([str(word) for word in words], ranks)

    def _undisturbed(self) -> None:
        with contextlib.closing(self._start(self.calm)) as attempt:
            attempt.until(lambda: attempt.step >= 1)
            self.seconds_to_start = time.monotonic() - attempt.started
            if any(attempt.wait()):
                raise Failed(f"the undisturbed run failed:\n{attempt.tail()}")
        lines = [line for line in log.read(self.calm / "log.jsonl") if line["kind"] == "train"]
        self.seconds_per_step = sum(sum(line["seconds"].values()) for line in lines) / len(lines)
        self.expected = _without_measured(self.calm)

    def _disturbed(self, kind: str, place: str, step: int) -> dict[str, Any]:
        """Start, disturb once `step` steps of the whole run are done, see how it ends and what it leaves."""
        with contextlib.closing(self._start(self.rough)) as attempt:
            reached = self._reach(attempt, kind, place, step)
            if kind == "full disk":
                self._fill_disk(attempt, place)
            elif kind == "kill one":
                attempt.send(signal.SIGKILL, self.random.randrange(attempt.ranks))
            else:
                attempt.send(signal.SIGKILL if kind == "kill" else signal.SIGTERM)
            codes = attempt.wait()
            if reached and kind == "full disk" and (codes[0] != 1 or "error: " not in attempt.said[0]):
                raise Failed(f"a full disk ended with {codes}:\n{attempt.tail()}")
            if reached and kind == "terminate" and place == "step" and any(codes):
                raise Failed(f"SIGTERM in a step ended with {codes}:\n{attempt.tail()}")
            found = {"kind": kind, "place": place if reached else "after the end", "resumed_from": attempt.resumed_from}
            return {**found, "exit_codes": codes, **self._inspect(attempt)}

    def _reach(self, attempt: Attempt, kind: str, place: str, step: int) -> bool:
        """Wait for the moment; False if the run was finished before."""
        if place == "start":
            delay = self.random.uniform(0, 1.1) * self.seconds_to_start
            return attempt.until(lambda: time.monotonic() > attempt.started + delay)
        if place == "checkpoint" and kind != "full disk":
            return attempt.until(lambda: self._writes_checkpoint(step))
        reached = attempt.until(lambda: attempt.step >= step)
        if place == "step":
            time.sleep(self.random.uniform(0, 1.5) * self.seconds_per_step)
        return reached

    def _writes_checkpoint(self, step: int) -> bool:
        folders = (self.rough / checkpoints.FOLDER).glob(".step-*.tmp")
        return any(int(folder.name[len(".step-") : -len(".tmp")]) >= step for folder in folders)

    def _fill_disk(self, attempt: Attempt, place: str) -> None:
        """The next line of the log, or one of the tensors of the next checkpoint, does not fit."""
        written = (self.rough / "log.jsonl").stat().st_size
        per_line = (self.calm / "log.jsonl").stat().st_size // self.arguments.steps
        low, high = written + 1, written + 3 * per_line
        if place == "checkpoint":
            tensors = [path.stat().st_size for path in checkpoints.list_complete(self.calm)[-1].glob("*.safetensors")]
            low, high = written + (self.arguments.every + 3) * per_line, max(tensors)
        limit = self.random.randrange(low, max(high, low + 1))
        if any(attempt.ended):
            return
        hard = resource.prlimit(attempt.pid, resource.RLIMIT_FSIZE)[1]
        resource.prlimit(attempt.pid, resource.RLIMIT_FSIZE, (limit, hard))

    def _inspect(self, attempt: Attempt) -> dict[str, Any]:
        """What must hold wherever a run was stopped."""
        lines = []
        if (self.rough / "log.jsonl").exists():
            lines = [line for line in _without_measured(self.rough) if line["kind"] == "train"]
        steps = len(lines)
        if lines != [line for line in self.expected if line["kind"] == "train"][:steps]:
            raise Failed("the log differs from the undisturbed one")
        if attempt.step > steps:
            raise Failed(f"step {attempt.step} was said to be done, and the log ends after {steps}")
        complete = checkpoints.list_complete(self.rough)
        newest = max((checkpoints.load(folder).step for folder in complete), default=0)
        due = (
            max(0, steps - 1) // self.arguments.every * self.arguments.every
        )  # done before the last step that was logged began
        if newest < due:
            raise Failed(f"the log has {steps} steps, and the newest checkpoint is that of step {newest}")
        return {"logged": steps, "checkpoint": newest}

    def _identical(self) -> dict[str, Any]:
        """What is the same in both runs; all of it has to be."""
        runs = self.calm, self.rough
        last = [checkpoints.list_complete(run)[-1] for run in runs]
        pairs = {
            "LoRA": [_digest(run / LORA) for run in runs],
            **{
                f"{name} of the last checkpoint": [_digest(folder / name) for folder in last]
                for name in checkpoints.FILES
            },
            "log": [self.expected, _without_measured(self.rough)],
        }
        for name, (calm, rough) in pairs.items():
            if calm != rough:
                raise Failed(f"{name}: differs between {self.calm} and {self.rough}")
        return {
            "log lines": len(self.expected),
            **{f"SHA-256 of {name}": pair[0] for name, pair in pairs.items() if name != "log"},
        }


def _without_measured(run: Path) -> list[dict[str, Any]]:
    return [
        {name: value for name, value in line.items() if name not in MEASURED} for line in log.read(run / "log.jsonl")
    ]


def _digest(path: Path) -> str:
    """SHA-256 of the tensors: the metadata of a safetensors file comes in any order."""
    digest = hashlib.sha256()
    for name, tensor in sorted(load_file(path).items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)} ".encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300, help="optimizer steps of the run")
    parser.add_argument("--every", type=int, default=20, help="steps between checkpoints")
    parser.add_argument("--disturbances", type=int, default=20)
    parser.add_argument("--ranks", type=int, default=2, help="processes of the run")
    parser.add_argument("--kinds", nargs="+", choices=PLACES, help="of disturbances (default: all that can be)")
    parser.add_argument("--seed", type=int, default=0, help="of the kinds, places and moments of the disturbances")
    parser.add_argument("--work", type=Path, default=Path("runs/soak"), help="folder of the two runs; emptied")
    parser.add_argument("--report", type=Path, help="JSON of what happened (default: WORK/soak.json)")
    arguments = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "400"}
    torch.set_num_threads(1)
    for name in IMPORTED:
        importlib.import_module(name)
    arguments.work = arguments.work.resolve()
    if not 0 < arguments.disturbances < arguments.steps:
        parser.error("--disturbances: expected between 1 and --steps - 1")
    arguments.kinds = arguments.kinds or [kind for kind in PLACES if arguments.ranks > 1 or kind != "kill one"]
    source = provenance()  # now: what is imported is what runs to the end
    try:
        report = Soak(arguments).run() | source
    except Failed as error:
        sys.exit(f"error: {error}")
    path = arguments.report or arguments.work / "soak.json"
    path.write_text(json.dumps(report, indent=1) + "\n")
    print(
        f"identical to the undisturbed run after {arguments.disturbances} disturbances, {report['seconds']} s; {path}"
    )


if __name__ == "__main__":
    main()
