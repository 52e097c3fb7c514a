"""The table of the README, from rows alone."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.cases import CHANNELS, LABELS, OURS
from benchmarks.lookup import (
    Results,
    median,
    provenance,
    say_bytes,
    say_seconds,
    say_times,
)
from benchmarks.rows import Row

BEGIN, END = "<!-- benchmark table: begin -->", "<!-- benchmark table: end -->"
NUM_PROJECTIONS = 256
BUSY = 0.5
"""load average above which a machine was not idle"""


def _cell(row: Row | None) -> str:
    if row is None or (row["seconds"] is None and row["peak_bytes"] is None):
        return ""
    parts = [say_seconds(median(row)) if row["seconds"] else "—"]
    parts += [say_bytes(row["peak_bytes"])] if row["peak_bytes"] is not None else []
    return ", ".join(parts)


def _markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
    rule = ["---"] + ["---:"] * (len(head) - 1)
    return ["| " + " | ".join(cells) + " |" for cells in (head, rule, *lines)]


def _faster(rows: Mapping[str, Row]) -> str:
    """Eager PyTorch's time over that of the fastest of ours; rows by provider."""
    plain = rows.get("eager")
    ours = [median(rows[name]) for name in OURS if name in rows and rows[name]["seconds"]]
    if plain is None or plain["seconds"] is None or not ours:
        return ""
    return say_times(median(plain) / min(ours))


def _layers(results: Results) -> tuple[list[str], list[Row]]:
    wanted = {"kind": "layer", "mode": "both", "reading": "vcd", "num_projections": NUM_PROJECTIONS}
    found = results.where(**wanted)
    lines: list[str] = []
    for height, width in sorted({(row["height"], row["width"]) for row in found}):
        here = {**wanted, "height": height, "width": width}
        names = results.providers(**here)
        body = []
        for layer in CHANNELS:
            rows = {row["provider"]: row for row in results.where(**here, layer=layer)}
            if rows:
                body.append([layer, *(_cell(rows.get(name)) for name in names), _faster(rows)])
        sums = {name: results.all_layers(name, NUM_PROJECTIONS) for name in names}
        seconds = {name: sum(map(median, rows)) for name, rows in sums.items() if rows}
        ours = [seconds[name] for name in OURS if name in seconds]
        ratio = say_times(seconds["eager"] / min(ours)) if "eager" in seconds and ours else ""
        body.append(["all five", *(say_seconds(seconds[name]) if name in seconds else "" for name in names), ratio])
        lines.append(
            f"Features of one {height}×{width} frame, one layer at a time, forward and backward, K = {NUM_PROJECTIONS}:"
        )
        lines += ["", *_markdown(["time, peak memory", *(LABELS[name] for name in names), "faster"], body), ""]
    return lines, found


def _size(row: Row) -> tuple[int, int, int]:
    return row["height"], row["width"], row["frames"]


def _videos(results: Results) -> tuple[list[str], list[Row]]:
    wanted = {"kind": "video", "mode": "both", "num_projections": NUM_PROJECTIONS, "dtype": "float32"}
    found = [row for row in results.where(**wanted) if row["reading"] == "vcd" or row["provider"] == "published"]
    if not found:
        return [], []
    names = [name for name in LABELS if name in {row["provider"] for row in found}]
    body = []
    for height, width, frames in sorted(set(map(_size, found))):
        rows = {row["provider"]: row for row in found if _size(row) == (height, width, frames)}
        name = f"{height}×{width}, {frames} frame{'s' * (frames > 1)}"
        body.append([name, *(_cell(rows.get(name)) for name in names), _faster(rows)])
    title = f"The whole loss, from pixels to their gradient, K = {NUM_PROJECTIONS}:"
    return [title, "", *_markdown(["time, peak memory", *(LABELS[n] for n in names), "faster"], body), ""], found


def section(results: Results) -> list[str]:
    """The tables of one machine and what they were measured on; nothing if it has no rows for them."""
    (layers, layer_rows), (videos, video_rows) = _layers(results), _videos(results)
    rows = layer_rows + video_rows
    if not rows:
        return []
    notes = [
        f"{provenance(results, rows)}.",
        "Medians, and peak memory above the inputs. "
        + "*Faster* is eager PyTorch's time over that of the fastest backend of vcd_fast. Features alone are compared with a condition "
        + "prepared beforehand where a provider can do so; the whole loss includes it. FDL as published is another loss (5×5 patches, "
        + "other layers), timed as what people run today.",
    ]
    loads = [row["load_average"] for row in rows if row["load_average"] is not None]
    if loads and max(loads) > BUSY:
        notes.append(f"The machine was busy when a run began (load average {max(loads):.1f}): times are too long.")
    return [*layers, *videos, *notes, ""]


def document(machines: Sequence[Results]) -> str:
    """Everything between the markers."""
    lines = [line for results in machines for line in section(results)]
    if not lines:
        raise ValueError(
            f"no rows of forward and backward with K = {NUM_PROJECTIONS}: nothing for the table; run pytest benchmarks/ --benchmark-only"
        )
    return "\n".join(lines).rstrip() + "\n"


def write(readme: Path, machines: Sequence[Results]) -> None:
    """Replace what stands between the markers of a file.

    Raises:
        OSError, ValueError: it cannot be read or written, lacks the markers, or there is nothing to put there.
    """
    text = readme.read_text()
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(
            f"{readme}: expected one line {BEGIN} and after it one line {END}; add them where the table is to stand"
        )
    head, tail = text[: text.index(BEGIN) + len(BEGIN)], text[text.index(END) :]
    draft = readme.with_name(f".{readme.name}.{os.getpid()}")
    try:
        draft.write_text(f"{head}\n{document(machines)}{tail}")
        os.replace(draft, readme)
    finally:
        draft.unlink(missing_ok=True)
