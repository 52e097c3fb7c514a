"""Finding rows, and saying numbers."""

from __future__ import annotations

from collections.abc import Iterable

from benchmarks.cases import CHANNELS, LABELS
from benchmarks.rows import Row, newest


class Results:
    """The newest rows of one machine."""

    def __init__(self, rows: Iterable[Row]) -> None:
        self.rows = newest(rows)

    @property
    def machine(self) -> dict[str, object]:
        return self.rows[-1]["machine"]

    @property
    def device(self) -> str:
        return self.rows[-1]["device"]

    def where(self, **wanted: object) -> list[Row]:
        """Rows whose fields are all as asked for; a tuple names alternatives."""
        return [
            row
            for row in self.rows
            if all(row[k] in v if isinstance(v, tuple) else row[k] == v for k, v in wanted.items())
        ]

    def one(self, **wanted: object) -> Row | None:
        found = self.where(**wanted)
        return found[-1] if found else None

    def providers(self, **wanted: object) -> list[str]:
        """Of these rows, in the order of `LABELS`."""
        there = {row["provider"] for row in self.where(**wanted)}
        return [name for name in LABELS if name in there]

    def all_layers(self, provider: str, num_projections: int, mode: str = "both") -> list[Row] | None:
        """A row with a time for every layer of VCD at one size, or None where one is missing."""
        found = self.where(
            kind="layer", provider=provider, num_projections=num_projections, mode=mode, reading="vcd", dtype="float32"
        )
        by_size: dict[tuple, dict[str, Row]] = {}
        for row in found:
            if row["seconds"] is not None:
                by_size.setdefault((row["height"], row["width"]), {})[row["layer"]] = row
        complete = [layers for layers in by_size.values() if set(layers) == set(CHANNELS)]
        return [complete[-1][name] for name in CHANNELS] if complete else None


def by_machine(rows: Iterable[Row]) -> list[Results]:
    """Rows of each machine, weights and number of threads apart, in the order of their names."""
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        groups.setdefault((row["machine"]["slug"], row["device"], row["threads"], row["weights"]), []).append(row)
    return [Results(groups[key]) for key in sorted(groups)]


def median(row: Row) -> float:
    return row["seconds"]["p50"]


def say_seconds(seconds: float) -> str:
    """To three digits: 9.01 s, 412 ms, 87.0 µs."""
    for unit, scale in (("s", 1.0), ("ms", 1e3), ("µs", 1e6)):
        if seconds * scale >= 0.9995 or unit == "µs":
            return f"{_three_digits(seconds * scale)} {unit}"
    raise AssertionError("the last unit is always taken")


def say_bytes(count: int) -> str:
    """Decimal: 1.52 GB, 31.4 MB, 12.0 kB."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count / scale >= 0.9995 or unit == "kB":
            return f"{_three_digits(count / scale)} {unit}"
    raise AssertionError("the last unit is always taken")


def say_times(ratio: float) -> str:
    return f"{_three_digits(ratio)}×"


def _three_digits(value: float) -> str:
    decimals = 0 if value >= 99.95 else 1 if value >= 9.995 else 2
    return f"{value:.{decimals}f}"


def provenance(results: Results, rows: list[Row]) -> str:
    """Machine, versions and commit of rows, as one line."""
    machine = results.machine
    hardware = f"{machine['cpu']}, {machine['cores']} cores" + (f", {machine['gpu']}" if machine["gpu"] else "")
    versions = "; ".join(sorted({", ".join(f"{k} {v}" for k, v in row["versions"].items()) for row in rows}))
    commits = ", ".join(sorted({row["commit"] for row in rows}))
    days = sorted({row["time"][:10] for row in rows})
    when = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
    weights = ", ".join(sorted({row["weights"] for row in rows}))
    return f"{hardware}; {rows[-1]['threads']} threads; {versions}; commit {commits}; {when}; VGG19 weights: {weights}"
