"""Rows: one JSON object per case and provider, everything that reports are made of. Files are lists of them, a row a line."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks.cases import Case

SCHEMA = 1
RESULTS = Path(__file__).parent / "results"
Row = dict[str, object]

FIELDS: dict[str, tuple[type, ...]] = {
    "schema": (int,),
    "run": (str,),
    "time": (str,),
    "kind": (str,),
    "mode": (str,),
    "reading": (str,),
    "layer": (str, type(None)),
    "height": (int,),
    "width": (int,),
    "frames": (int,),
    "num_projections": (int,),
    "dtype": (str,),
    "provider": (str,),
    "device": (str,),
    "weights": (str,),
    "threads": (int,),
    "load_average": (float, type(None)),
    "seconds": (dict, type(None)),
    "rounds": (int,),
    "clock": (str, type(None)),
    "peak_bytes": (int, type(None)),
    "meter": (str, type(None)),
    "floor_bytes": (int, type(None)),
    "accuracy": (dict, type(None)),
    "machine": (dict,),
    "versions": (dict,),
    "commit": (str,),
}
"""Name and type of every field.

run: the same for all rows of one run. time: ISO 8601, UTC. seconds: {"p20", "p50", "p80"} of `rounds` rounds, null where only memory
was measured. peak_bytes: above the inputs, null where it was not measured. floor_bytes: what any implementation has to move, see
`estimate.floor_bytes`. accuracy: see `gate.Accuracy`. load_average: of the machine when the run began, over one minute.
"""
QUANTILES = ("p20", "p50", "p80")
MACHINE = ("slug", "cpu", "cores", "gpu", "memory_bytes", "copy_bytes_per_second")


def case_fields(case: Case) -> Row:
    return {
        "kind": case.kind,
        "mode": case.mode,
        "reading": case.reading,
        "layer": case.layer,
        "height": case.size[0],
        "width": case.size[1],
        "frames": case.frames,
        "num_projections": case.num_projections,
        "dtype": case.dtype,
    }


def check(row: object, where: str) -> Row:
    """The row itself.

    Raises:
        ValueError: it is no row of this schema; the message says what is wrong.
    """
    if not isinstance(row, dict):
        raise ValueError(f"{where}: expected a JSON object, got {type(row).__name__}")
    problems = [f"{name} is missing" for name in FIELDS if name not in row]
    problems += [f"{name} is unknown" for name in row if name not in FIELDS]
    for name, types in FIELDS.items():
        value = row.get(name)
        if name in row and (not isinstance(value, types) or isinstance(value, bool)):
            problems.append(f"{name}: expected {' or '.join(t.__name__ for t in types)}, got {value!r:.60}")
    if row.get("schema") not in (None, SCHEMA):
        problems.append(f"schema: expected {SCHEMA}, got {row['schema']!r}")
    if isinstance(row.get("machine"), dict):
        problems += [f"machine.{name} is missing" for name in MACHINE if name not in row["machine"]]
    if isinstance(seconds := row.get("seconds"), dict):
        values = [seconds.get(name) for name in QUANTILES]
        if not all(isinstance(v, float) and v > 0 for v in values) or sorted(values) != values:
            problems.append(f"seconds: expected p20 <= p50 <= p80, all above 0, got {seconds}")
        if not isinstance(row.get("rounds"), int) or row["rounds"] < 1:
            problems.append(f"rounds: expected at least 1 where seconds are given, got {row.get('rounds')!r}")
    if problems:
        raise ValueError(f"{where}: not a row of a benchmark: {'; '.join(problems)}")
    return row


def load(paths: Iterable[Path]) -> list[Row]:
    """All rows of some files, in order.

    Raises:
        OSError, ValueError: a file cannot be read, is no JSON list, or has a row that is none; the message names file and row.
    """
    found = []
    for path in paths:
        try:
            content = json.loads(Path(path).read_text())
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: expected a JSON list of rows: {error}") from error
        if not isinstance(content, list):
            raise ValueError(f"{path}: expected a JSON list of rows, got {type(content).__name__}")
        found += [check(row, f"{path}, row {i}") for i, row in enumerate(content, 1)]
    return found


def append(path: Path, new: Sequence[Row]) -> None:
    """Add rows to a file, or begin it. The file is replaced as a whole: readers and crashes see the old one or the new one."""
    for row in new:
        check(row, "new row")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [*(load([path]) if path.exists() else []), *new]
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        draft.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def identity(row: Row) -> tuple:
    """What two rows have in common that measure the same thing on the same machine."""
    return (
        *(row[name] for name in ("kind", "mode", "reading", "layer", "height", "width", "frames", "num_projections")),
        *(row[name] for name in ("dtype", "provider", "device", "weights", "threads")),
        row["machine"]["slug"],
    )


def newest(rows: Iterable[Row]) -> list[Row]:
    """One row for everything measured: times and peaks may come from different rows, each from the latest that has it."""
    found: dict[tuple, Row] = {}
    for row in sorted(rows, key=lambda row: row["time"]):
        old = found.get(identity(row))
        if old is None:
            found[identity(row)] = dict(row)
            continue
        kept = {}
        if row["seconds"] is None:
            kept |= {name: old[name] for name in ("seconds", "rounds", "clock", "accuracy")}
        if row["peak_bytes"] is None:
            kept |= {name: old[name] for name in ("peak_bytes", "meter")}
        found[identity(row)] = {**row, **kept}
    return list(found.values())
