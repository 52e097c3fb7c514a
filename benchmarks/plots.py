"""Plots of one machine's rows."""

from __future__ import annotations

import io
import os
import textwrap
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FuncFormatter, NullFormatter

from benchmarks.cases import CHANNELS, LABELS
from benchmarks.lookup import Results, median, provenance, say_bytes, say_seconds
from benchmarks.rows import Row
from benchmarks.targets import memory_line

COLOURS = {
    "eager": "#8c8c8c",
    "compile": "#bdbdbd",
    "published": "#c49a6c",
    "vgg19": "#e3d2b8",
    "reference": "#9ecae1",
    "simd": "#2171b5",
    "triton": "#08306b",
    "triton_count": "#41ab5d",
    "triton_merge": "#78c679",
    "triton_tf32x3": "#807dba",
}
MARKERS = {"eager": "o", "compile": "s", "published": "D", "vgg19": "P", "reference": "v", "simd": "^", "triton": "*"}
TARGET_COLOUR, FLOOR_COLOUR = "#d94801", "#000000"
SPEED_TARGET = {"cpu": 10, "cuda": 8}
MEMORY_TARGET = {"cpu": 20, "cuda": 40}


def _finish(figure: Figure, title: str, results: Results, rows: Sequence[Row], path: Path) -> Path:
    note = textwrap.fill(provenance(results, list(rows)), int(15 * figure.get_figwidth()))
    figure.suptitle(f"{title}\n", fontsize=12)
    figure.text(0.5, 0.975, note, fontsize=7, color="#555555", ha="center", va="top")
    FigureCanvasAgg(figure)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=140)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        draft.write_bytes(content.getvalue())
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)
    return path


def _legend(figure: Figure, every: Iterable[Axes]) -> None:
    """One for all axes, below them."""
    handles: dict[str, object] = {}
    for axes in every:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    figure.legend(
        handles.values(),
        handles.keys(),
        loc="outside lower center",
        ncols=4 if figure.get_figwidth() > 10 else 2,
        fontsize=8,
        frameon=False,
    )


def _scale(axes: Axes, say: Callable[[float], str]) -> None:
    """A logarithmic axis that says its units, with room above for what bars are labelled."""
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.set_ylim(low / 1.3, high * 2.2)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: say(value)))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(axis="y", which="major", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _short(text: str) -> str:
    """What a bar is labelled: two digits of a number and its unit, without the space between."""
    number, unit = text.split()
    value = float(number)
    return f"{value:.0f}{unit}" if value >= 9.95 else f"{value:.1f}{unit}"


def _bars(axes: Axes, table: dict[str, list[float | None]], say: Callable[[float], str]) -> None:
    """Groups of bars, one for each layer; `table` has a value for each, or None, by provider."""
    width = 0.84 / len(table)
    for i, (provider, values) in enumerate(table.items()):
        at = [x - 0.42 + (i + 0.5) * width for x, value in enumerate(values) if value is not None]
        heights = [value for value in values if value is not None]
        axes.bar(at, heights, width * 0.94, color=COLOURS[provider], label=LABELS[provider])
        for x, height in zip(at, heights, strict=True):
            axes.annotate(
                _short(say(height)),
                (x, height),
                (0, 2),
                textcoords="offset points",
                ha="center",
                va="bottom",
                fontsize=6,
                rotation=90,
                path_effects=[withStroke(linewidth=2.5, foreground="white")],
                zorder=4,
            )
    axes.set_xticks(range(len(next(iter(table.values())))))


def _across(axes: Axes, values: Sequence[float | None], colour: str, style: str, label: str) -> None:
    """A short line across each group at its value."""
    for x, value in enumerate(values):
        if value is not None:
            axes.plot(
                [x - 0.45, x + 0.45],
                [value, value],
                color=colour,
                linestyle=style,
                linewidth=1.3,
                label=label if x == 0 else None,
            )


def layers_plot(results: Results, folder: Path) -> Path | None:
    """Time and peak memory of every layer, forward and backward: bars beside the plain formula's, the floor and the target marked."""
    wanted = {"kind": "layer", "mode": "both", "reading": "vcd"}
    rows = [row for row in results.where(**wanted) if row["seconds"]]
    if not rows:
        return None
    projections = sorted({row["num_projections"] for row in rows})
    size = max({(row["height"], row["width"]) for row in rows}, key=lambda size: size[0] * size[1])
    rows = [row for row in rows if (row["height"], row["width"]) == size]
    names = [name for name in LABELS if name in {row["provider"] for row in rows}]
    layers = [name for name in CHANNELS if name in {row["layer"] for row in rows}]
    figure = Figure(figsize=(1.6 + 6.2 * len(projections), 9), layout="constrained")
    grid = figure.subplots(2, len(projections), squeeze=False)
    speed = SPEED_TARGET[results.device]
    for column, k in enumerate(projections):
        found = {(row["provider"], row["layer"]): row for row in rows if row["num_projections"] == k}
        times = {n: [median(found[n, l]) if (n, l) in found else None for l in layers] for n in names}
        peaks = {n: [found[n, l]["peak_bytes"] if (n, l) in found else None for l in layers] for n in names}
        for axes, table, say in ((grid[0][column], times, say_seconds), (grid[1][column], peaks, say_bytes)):
            table = {name: values for name, values in table.items() if any(v is not None for v in values)}
            if not table:
                axes.set_axis_off()
                axes.text(0.5, 0.5, "peaks not measured here", ha="center", transform=axes.transAxes, color="#777777")
                continue
            _bars(axes, table, say)
            if say is say_seconds:
                if "eager" in table:
                    goal = [None if v is None else v / speed for v in table["eager"]]
                    _across(axes, goal, TARGET_COLOUR, "--", f"to reach: eager / {speed}")
                bandwidth = results.machine["copy_bytes_per_second"]
                floors = [
                    next(
                        (
                            r["floor_bytes"] / bandwidth
                            for (_, l), r in found.items()
                            if l == layer and r["floor_bytes"]
                        ),
                        None,
                    )
                    for layer in layers
                ]
                _across(axes, floors, FLOOR_COLOUR, "-", f"floor: least bytes at {bandwidth / 1e9:.0f} GB/s")
            axes.set_xticklabels(layers)
            _scale(axes, say)
            axes.set_title(f"{'time' if say is say_seconds else 'peak memory'}, K = {k}", fontsize=10)
    _legend(figure, grid.flat)
    title = f"Sliced distance of one {size[0]}×{size[1]} frame's features, forward and backward"
    return _finish(figure, title, results, rows, folder / f"layers-{_slug(results)}.png")


def scaling_plot(results: Results, folder: Path) -> Path | None:
    """Time and peak memory of the whole loss against the number of frames."""
    rows = [
        row
        for row in results.where(kind="video", mode="both", num_projections=256, dtype="float32")
        if row["reading"] == "vcd" or row["provider"] == "published"
    ]
    if not rows:
        k = max((row["num_projections"] for row in results.where(kind="video", mode="both")), default=None)
        rows = results.where(kind="video", mode="both", num_projections=k, dtype="float32", reading="vcd")
    if not rows:
        return None
    sizes = sorted({(row["height"], row["width"]) for row in rows})
    names = [name for name in LABELS if name in {row["provider"] for row in rows}]
    figure = Figure(figsize=(1.6 + 5.6 * len(sizes), 9), layout="constrained")
    grid = figure.subplots(2, len(sizes), squeeze=False)
    for column, size in enumerate(sizes):
        here = [row for row in rows if (row["height"], row["width"]) == size]
        for provider in names:
            own = sorted((row for row in here if row["provider"] == provider), key=lambda row: row["frames"])
            for axes, points in (
                (grid[0][column], [(r["frames"], median(r)) for r in own if r["seconds"]]),
                (grid[1][column], [(r["frames"], r["peak_bytes"]) for r in own if r["peak_bytes"] is not None]),
            ):
                if points:
                    axes.plot(
                        *zip(*points, strict=True),
                        marker=MARKERS[provider],
                        markersize=6,
                        color=COLOURS[provider],
                        label=LABELS[provider],
                    )
        most = max(row["frames"] for row in here)
        line = memory_line(results) if size == (272, 368) else None
        if line is not None:
            axes, beyond = grid[1][column], [max(line.frames), most]
            share = MEMORY_TARGET[results.device]
            if most > max(line.frames):
                label = f"eager PyTorch, from its slope over {', '.join(map(str, line.frames))} frames"
                axes.plot(beyond, [line.at(n) for n in beyond], color=COLOURS["eager"], linestyle=":", label=label)
            axes.plot(
                [24],
                [line.slope * 24 / share],
                marker="_",
                markersize=16,
                markeredgewidth=2,
                color=TARGET_COLOUR,
                linestyle="none",
                label=f"to stay below: 1/{share} at 24 frames",
            )
        for axes, say, what in ((grid[0][column], say_seconds, "time"), (grid[1][column], say_bytes, "peak memory")):
            axes.set_xscale("log")
            ticks = sorted({row["frames"] for row in here})
            axes.set_xticks(ticks, [str(n) for n in ticks])
            axes.minorticks_off()
            axes.set_xlabel("frames")
            axes.set_title(f"{what}, {size[0]}×{size[1]}", fontsize=10)
            if axes.lines:
                _scale(axes, say)
    _legend(figure, grid.flat)
    title = f"Whole loss, from pixels to their gradient, K = {rows[0]['num_projections']}"
    return _finish(figure, title, results, rows, folder / f"frames-{_slug(results)}.png")


def _slug(results: Results) -> str:
    return f"{results.machine['slug']}-{results.rows[-1]['threads']}t"


def draw(results: Results, folder: Path) -> list[Path]:
    """All plots there are rows for."""
    return [path for path in (layers_plot(results, folder), scaling_plot(results, folder)) if path is not None]
