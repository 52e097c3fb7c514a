#!/usr/bin/env python3
"""Everything this project wants to know from a GPU, in calls of a few minutes each: call it again until nothing is left.

    python tools/gpu_session.py --dry-run                                  # the plan; needs no GPU
    python tools/gpu_session.py --output runs/gpu                          # as much as 8 minutes hold
    python tools/gpu_session.py --output runs/gpu --parts sizes kernels --again
    python tools/gpu_session.py --output runs/gpu --bundle session.tar.gz  # besides, all of FOLDER in one file, after every part

Every part writes FOLDER/PART.json and FOLDER/PART.log. A part that is complete is skipped; one that was stopped by the clock goes on from what it
had. Exit code: 0 nothing is left, 1 a part failed, 2 there is no GPU, 75 fine so far and something is left. See docs/gpu-session.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TOOLS = ROOT / "tools"
PYTHON = sys.executable
COMPLETE, PARTIAL, FAILED, NOT_AVAILABLE = "complete", "partial", "failed", "not available"
MORE, UNAVAILABLE = 75, 69
"""exit codes of a part: something is left; this machine cannot do it"""
LEAST = 1.0
"""minutes that have to be left for a part that goes on later"""
GRACE = 45.0
"""seconds before its end in which a part begins nothing new"""
SIZES = "tests/kernels/test_gpu_sizes.py"
SWEEP = ("200", "1000", "4000", "10000", "30000", "100000", "300000", "1000000")
"""lengths of rows that the table of methods is about"""


@dataclasses.dataclass(frozen=True)
class Part:
    """One thing to find out.

    Attributes:
        minutes: what it is expected to take, a guess until a GPU has been seen.
        command: folder of the session -> what is run in the root of the checkout. It ends with 0, `MORE`, `UNAVAILABLE` or something else.
        goes_on: whether it keeps what it has found when it is stopped.
    """

    name: str
    what: str
    minutes: float
    command: Callable[[Path], list[str]]
    goes_on: bool = False


def _pytest(*words: str) -> list[str]:
    return [PYTHON, "-m", "pytest", "-p", "gpu_resume", "-v", "-p", "no:cacheprovider", *words]


def _parallel() -> list[str]:
    return ["-n", "4"] if importlib.util.find_spec("xdist") else []


def _tool(name: str, *words: str) -> list[str]:
    return [PYTHON, str(TOOLS / name), *words]


PARTS = (
    Part(
        "correctness",
        "tests of the kernels, compiled instead of interpreted",
        6,
        lambda folder: _pytest("tests/kernels", f"--ignore={SIZES}", *_parallel()),
        goes_on=True,
    ),
    Part("sizes", "tests marked gpu: real sizes", 6, lambda folder: _pytest("-m", "gpu", SIZES), goes_on=True),
    Part(
        "kernels",
        "time of every kernel on the rows of VGG19's layers",
        4,
        lambda folder: _tool("time_kernels.py", "--json", str(folder / "kernels.rows.json")),
    ),
    Part(
        "benchmarks",
        "the suite's subset, which holds the targets",
        8,
        lambda folder: _benchmarks(folder / "benchmarks.rows.json", "--minutes", "999"),
        goes_on=True,
    ),
    Part(
        "training-wan",
        "Wan 1.3B, 25 frames of 272×368, random weights",
        7,
        lambda folder: _tool("gpu_training.py", "wan", str(folder / "training-wan.rows.json")),
        goes_on=True,
    ),
    Part(
        "training-opensora",
        "Open-Sora XL/2, 51 frames of (276, 368), random weights",
        7,
        lambda folder: _tool("gpu_training.py", "opensora", str(folder / "training-opensora.rows.json")),
        goes_on=True,
    ),
    Part(
        "lengths",
        "which method is fastest for which length of row",
        4,
        lambda folder: _tool("time_kernels.py", "--lengths", *SWEEP, "--json", str(folder / "lengths.rows.json")),
    ),
    Part(
        "sanitizer",
        "every kernel under memcheck and racecheck",
        5,
        lambda folder: _tool("gpu_parts.py", "sanitizer", str(folder / "sanitizer.rows.json")),
    ),
    Part(
        "benchmarks-full",
        "all of the suite",
        90,
        lambda folder: _benchmarks(folder / "benchmarks-full.rows.json", "--full"),
        goes_on=True,
    ),
)


def _benchmarks(rows: Path, *words: str) -> list[str]:
    return _pytest("benchmarks/", "--benchmark-only", "--device", "cuda", "--results", str(rows), *words)


# --- running -----------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Session:
    """A call: where its files are, when it ends, what it runs on."""

    folder: Path
    ends: float
    """`time.time()` at which a part under way is stopped"""
    facts: dict[str, Any]
    """machine, versions, commit"""

    def file(self, part: Part, ending: str) -> Path:
        return self.folder / f"{part.name}.{ending}"

    def record(self, part: Part) -> dict[str, Any] | None:
        """What earlier calls wrote.

        Raises:
            ValueError: it is no JSON.
        """
        path = self.file(part, "json")
        if not path.is_file():
            return None
        try:
            return json.loads(path.read_text())
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}: expected JSON; delete it to run the part again ({error})") from None

    def forget(self, part: Part) -> None:
        for ending in ("json", "log", "done", "rows.json"):
            self.file(part, ending).unlink(missing_ok=True)

    def run(self, part: Part) -> dict[str, Any]:
        """Run a part until it ends or the call's time is over, and write its record."""
        before, started = self.record(part) or {}, time.time()
        progress = self._progress(part)
        code = self._execute(part)
        status, reason = self._judge(part, code, progress)
        record = {
            "part": part.name,
            "what": part.what,
            "status": status,
            "reason": reason,
            "seconds": round(before.get("seconds", 0.0) + time.time() - started, 1),
            "calls": before.get("calls", 0) + 1,
            "when": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "command": part.command(self.folder),
            "tests": self._tests(part),
            "rows": self.file(part, "rows.json").name if self.file(part, "rows.json").is_file() else None,
            **self.facts,
        }
        name_commit(self.file(part, "rows.json"), self.facts["commit"])
        write_json(self.file(part, "json"), record)
        return record

    def _execute(self, part: Part) -> int | None:
        """The exit code; None: stopped."""
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(TOOLS), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep),
            "PYTHONSAFEPATH": "1",  # the root of the checkout stays off the path of `python -m pytest`
            "PYTHONUNBUFFERED": "1",
            "HF_HUB_OFFLINE": "1",
            "GPU_SESSION_DONE": str(self.file(part, "done")),
            "GPU_SESSION_UNTIL": str(self.ends - GRACE),
        }
        with self.file(part, "log").open("ab") as log:
            command = part.command(self.folder)
            log.write(f"$ {' '.join(command)}\n".encode())
            log.flush()
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
            try:
                return process.wait(timeout=max(0.0, self.ends - time.time()))
            except subprocess.TimeoutExpired:
                return None
            finally:
                if process.returncode is None:
                    stop(process)

    def _judge(self, part: Part, code: int | None, before: int) -> tuple[str, str | None]:
        if code == 0:
            return COMPLETE, None
        if code == UNAVAILABLE:
            return NOT_AVAILABLE, f"see {self.file(part, 'log').name}"
        if code == MORE:
            return PARTIAL, "call again for the rest"
        if code is not None:
            return FAILED, f"it ended with {code}; see {self.file(part, 'log').name}"
        if part.goes_on and self._progress(part) > before:
            return PARTIAL, "stopped by the clock; call again for the rest"
        return FAILED, "the time was over before it had anything; call again with more --minutes, or this part first"

    def _progress(self, part: Part) -> int:
        files = (self.file(part, ending) for ending in ("done", "rows.json"))
        return sum(path.stat().st_size for path in files if path.is_file())

    def _tests(self, part: Part) -> dict[str, int] | None:
        path = self.file(part, "done")
        return dict(Counter(line.split(" ")[0] for line in path.read_text().splitlines())) if path.is_file() else None


def stop(process: subprocess.Popen) -> None:
    """End a part and what it started: it leads a process group of its own."""
    for number, seconds in ((signal.SIGTERM, 5), (signal.SIGKILL, 5)):
        try:
            os.killpg(process.pid, number)
            process.wait(timeout=seconds)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue


def name_commit(rows: Path, commit: str) -> None:
    """A tree that came without git leaves "unknown" in the rows of benchmarks; the caller of the session knows better."""
    if rows.is_file() and commit != "unknown":
        content = json.loads(rows.read_text())
        if isinstance(content, list) and any(row.get("commit") == "unknown" for row in content):
            named = [{**row, "commit": commit} if row.get("commit") == "unknown" else row for row in content]
            write_text(rows, "[\n" + ",\n".join(json.dumps(row) for row in named) + "\n]\n")


def write_json(path: Path, content: object) -> None:
    write_text(path, json.dumps(content, indent=1) + "\n")


def write_text(path: Path, text: str) -> None:
    draft = path.with_name(path.name + ".part")
    draft.write_text(text)
    os.replace(draft, path)


def bundle(folder: Path, target: Path) -> None:
    """All files of `folder` in one."""
    draft = target.with_name(target.name + ".part")
    with tarfile.open(draft, "w:gz") as archive:
        for path in sorted(folder.iterdir()):
            if path.is_file():
                archive.add(path, arcname=path.name)
    os.replace(draft, target)


# --- the command -------------------------------------------------------------------------------------------------------------------


def has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def facts(folder: Path, commit: str | None) -> dict[str, Any]:
    """Machine, versions and commit, asked in a process of their own: a CUDA context here would take memory from every part."""
    path = folder / "machine.json"
    subprocess.run(_tool("gpu_parts.py", "machine", str(path)), cwd=ROOT, check=True)
    found = json.loads(path.read_text())
    if commit and found["commit"] == "unknown":
        found["commit"] = commit
        write_json(path, found)
    return found


def plan(parts: Sequence[Part], folder: Path) -> list[str]:
    session, lines = Session(folder, 0.0, {}), []
    for part in parts:
        record = session.record(part)
        state = f", {record['status']}" if record else ""
        more = ", goes on where it was stopped" if part.goes_on else ""
        lines.append(f"{part.name}: {part.what} (about {part.minutes:g} min{more}{state})")
        lines.append(f"    {' '.join(part.command(folder))}")
    return lines


def table(parts: Sequence[Part], records: dict[str, dict[str, Any] | None]) -> list[str]:
    lines = [f"{'part':<18} {'status':<14} {'seconds':>8}  "]
    for part in parts:
        record = records.get(part.name) or {"status": "not begun", "seconds": 0.0, "reason": None}
        counts = ", ".join(f"{count} {outcome}" for outcome, count in (record.get("tests") or {}).items())
        remarks = "; ".join(filter(None, [counts, record["reason"]]))
        lines.append(f"{part.name:<18} {record['status']:<14} {record['seconds']:>8.1f}  {remarks}".rstrip())
    return lines


def run_parts(session: Session, parts: Sequence[Part], again: bool, bundled: Path | None) -> dict[str, Any]:
    """Run what is not complete, as far as the time goes; what is there of every part."""
    if again:
        for part in parts:
            session.forget(part)
    records = {part.name: session.record(part) for part in parts}
    begun = False
    for part in parts:
        if (records[part.name] or {}).get("status") in (COMPLETE, NOT_AVAILABLE):
            continue
        left = (session.ends - time.time()) / 60
        if left < (LEAST if part.goes_on else part.minutes) and begun:
            continue
        begun = True
        print(f"{part.name}: {part.what}, {left:.1f} min left ...", flush=True)
        records[part.name] = session.run(part)
        if bundled:
            bundle(session.folder, bundled)
    return records


def main(words: Sequence[str] | None = None, parts: Sequence[Part] = PARTS) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [part.name for part in parts]
    parser.add_argument("--output", type=Path, default=Path("runs/gpu"), metavar="FOLDER", help="default runs/gpu")
    parser.add_argument("--parts", nargs="+", choices=names, default=names, metavar="PART", help=", ".join(names))
    parser.add_argument("--minutes", type=float, default=8.0, help="of this call (default 8)")
    parser.add_argument("--again", action="store_true", help="forget what earlier calls found out about these parts")
    parser.add_argument("--bundle", type=Path, metavar="FILE", help="a .tar.gz of FOLDER, written after every part")
    parser.add_argument("--commit", help="of this tree, where it comes without git")
    parser.add_argument("--dry-run", action="store_true", help="print what would be run, and nothing else")
    chosen = parser.parse_args(words)
    wanted, folder = [part for part in parts if part.name in chosen.parts], chosen.output.absolute()
    ends = time.time() + 60 * chosen.minutes
    try:
        if chosen.dry_run:
            print("\n".join(plan(wanted, folder)))
            return 0
        if chosen.minutes <= 0:
            raise ValueError(f"minutes: expected more than 0, got {chosen.minutes:g}")
        if not has_gpu():
            print("gpu_session: there is no GPU that PyTorch can use; --dry-run prints the plan", file=sys.stderr)
            return 2
        folder.mkdir(parents=True, exist_ok=True)
        session = Session(folder, ends, facts(folder, chosen.commit))
        records = run_parts(session, wanted, chosen.again, chosen.bundle)
    except (ValueError, OSError, ImportError, subprocess.CalledProcessError) as error:
        print(f"gpu_session: {error}", file=sys.stderr)
        return 1
    print("\n".join(table(wanted, records)))
    states = {(record or {}).get("status") for record in records.values()}
    return 1 if FAILED in states else 0 if states <= {COMPLETE, NOT_AVAILABLE} else MORE


if __name__ == "__main__":
    sys.exit(main())
