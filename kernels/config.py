"""Block sizes and warps of every kernel: one table, keyed by architecture and row length; and which method a row length takes.

The first entry of a list is what is launched. With VCD_FAST_AUTOTUNE=1 the whole list is timed once per kernel, size bucket and
architecture, on the device, and the fastest is kept for the life of the process; `chosen()` says what was launched, `describe(m)` what
would be. The choices below rest on registers and spills of ahead-of-time compilation and on bytes moved; none has been timed.

Warps are written for 32 threads; where a wave has 64 (AMD gfx9) half as many are launched.
"""

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

LONGEST_SHORT_ROW = 4096  # sorted by one program
LONGEST_PROJECTED_ROW = (
    128  # sorted by one program for 16 directions at once, with the projection; its block includes single values
)
METHODS = ("auto", "project", "rows", "merge", "count", "sort")
PRECISIONS = ("ieee", "tf32x3", "tf32")
AUTOTUNE_VARIABLE = "VCD_FAST_AUTOTUNE"


@dataclass(frozen=True)
class ProjectConfig:
    """Tile of `project`: directions × bins, `block_c` channels at a time."""

    block_k: int
    block_j: int
    block_c: int
    warps: int
    stages: int = 2


@dataclass(frozen=True)
class GradientConfig:
    """Tile of `spectrum_gradient`: channels × bins, `block_k` directions at a time."""

    block_c: int
    block_j: int
    block_k: int
    warps: int
    stages: int = 2


@dataclass(frozen=True)
class RowsConfig:
    """`rows` and `project_rows`: a power of two that holds the row; the latter takes `block_r` directions, `block_c` channels at a time."""

    block: int
    warps: int
    block_r: int = 16
    block_c: int = 16


@dataclass(frozen=True)
class MergeConfig:
    """Tile sort of `sort_block` values, then merge passes that write `merge_block` values each."""

    sort_block: int
    sort_warps: int
    merge_block: int
    merge_warps: int


@dataclass(frozen=True)
class SortConfig:
    """Tile of the comparison that follows torch.sort."""

    block: int
    warps: int


@dataclass(frozen=True)
class CountConfig:
    """2**log_bins bins; tiles of `block` values; the scan goes through `scan_block` bins at a time. `merge` orders what straddles."""

    log_bins: int
    block: int
    warps: int
    scan_block: int
    scan_warps: int
    merge: MergeConfig


_PROJECT = {
    "default": [ProjectConfig(64, 32, 16, 4), ProjectConfig(64, 64, 16, 8), ProjectConfig(128, 32, 16, 8)],
    "interpreter": [ProjectConfig(16, 32, 16, 4)],
}
_GRADIENT = {
    "default": [GradientConfig(64, 32, 16, 8), GradientConfig(64, 64, 16, 8), GradientConfig(32, 64, 16, 4)],
    "interpreter": [GradientConfig(16, 32, 16, 4)],
}
_ROW_WARPS = {16: 1, 32: 1, 64: 1, 128: 1, 256: 2, 512: 4, 1024: 8, 2048: 8, 4096: 16}
_MERGE = {
    "default": [MergeConfig(2048, 8, 1024, 8), MergeConfig(4096, 16, 1024, 8), MergeConfig(1024, 8, 1024, 8)],
    "interpreter": [MergeConfig(64, 4, 64, 4)],
}
_SORT = {
    "default": [SortConfig(1024, 8), SortConfig(1024, 4), SortConfig(2048, 8)],
    "interpreter": [SortConfig(64, 4)],
}
# What a row of up to so many representatives takes for |x - y| and, where that is different, for its square.
_METHOD = {
    "default": [
        (LONGEST_PROJECTED_ROW - 4, "project", "project"),
        (LONGEST_SHORT_ROW, "rows", "rows"),
        (None, "count", "merge"),
    ],
}


def _entry(table: dict[str, list], architecture: str) -> list:
    return table.get(architecture, table["default"])


def _power_of_two(value: int, smallest: int) -> int:
    return max(smallest, 1 << (value - 1).bit_length() if value > 1 else 1)


def project_candidates(m: int, architecture: str) -> list[ProjectConfig]:
    return _entry(_PROJECT, architecture)


def gradient_candidates(m: int, architecture: str) -> list[GradientConfig]:
    return _entry(_GRADIENT, architecture)


def rows_candidates(m: int, architecture: str) -> list[RowsConfig]:
    """For rows of m representatives, m <= 4096; ValueError beyond."""
    if m > LONGEST_SHORT_ROW:
        raise ValueError(
            f"a row of {m} values is too long for one program, which takes {LONGEST_SHORT_ROW}; use 'merge' or 'count'"
        )
    block = _power_of_two(m, 16)
    warps = _ROW_WARPS[block]
    return [RowsConfig(block, w) for w in dict.fromkeys((warps, max(1, warps // 2), min(16, warps * 2)))]


def project_rows_candidates(m: int, architecture: str) -> list[RowsConfig]:
    """For rows of m representatives and their single values together; ValueError beyond 128 together."""
    block = _power_of_two(m + 4, 16)
    if block > LONGEST_PROJECTED_ROW:
        raise ValueError(
            f"a row of {m} values is too long to be projected where it is sorted, which holds {LONGEST_PROJECTED_ROW}; use 'rows'"
        )
    return [RowsConfig(block, warps) for warps in ((8, 4) if block > 64 else (4,))]


def merge_candidates(m: int, architecture: str) -> list[MergeConfig]:
    return _entry(_MERGE, architecture)


def sort_candidates(m: int, architecture: str) -> list[SortConfig]:
    return _entry(_SORT, architecture)


def count_candidates(m: int, architecture: str) -> list[CountConfig]:
    """About one bin per two values: fewer leave more to order, more cost their scan (17 bytes a bin). What is left to order is short."""
    if architecture == "interpreter":
        return [CountConfig(8, 64, 4, 128, 4, MergeConfig(64, 4, 64, 4))]
    log_bins = min(16, max(12, (m - 1).bit_length() - 1))
    return [
        CountConfig(bits, 1024, 8, 512, 4, MergeConfig(1024, 8, 1024, 8))
        for bits in dict.fromkeys((log_bins, min(16, log_bins + 1), log_bins - 1))
    ]


_CANDIDATES: dict[str, Callable[[int, str], list]] = {
    "project": project_candidates,
    "spectrum_gradient": gradient_candidates,
    "rows": rows_candidates,
    "project_rows": project_rows_candidates,
    "merge": merge_candidates,
    "count": count_candidates,
    "sort": sort_candidates,
}
_CHOSEN: dict[tuple[str, int, str], object] = {}


def resolve_method(method: str, m: int, power: int, architecture: str) -> str:
    """The method rows of m representatives take on `architecture`: 'project', 'rows', 'merge', 'count' or 'sort'.

    'auto' asks the table, which goes by what fits on chip and by bytes moved (see `bytes_per_value`). Raises ValueError for an unknown
    method and for one that cannot do it: 'count' knows signs, not the matched values that the cost |x - y|² needs.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}; got {method!r}")
    if method == "count" and power != 1:
        raise ValueError(f"method 'count' computes p = 1 only, got p = {power}; use 'merge'")
    if method != "auto":
        return method
    longest = next(row for row in _entry(_METHOD, architecture) if row[0] is None or m <= row[0])
    return longest[power]


def bytes_per_value(method: str, m: int, architecture: str = "default") -> float:
    """Memory traffic per representative from projected values to signs, by arithmetic: reads and writes, cached or not, no atomics.

    'count' leaves out what straddles, which costs as much as 'merge' per ordered value.
    """
    if method == "project":
        return 4 + 1
    if method == "rows":
        return 4 + 4 + 1
    if method == "merge":
        c = merge_candidates(m, architecture)[0]
        passes = max(0, (max(m - 1, 0) // c.sort_block).bit_length() - 1)
        return (4 + 8) + passes * (2 * 8 + 8) + (2 * 8 + 4 + 1)
    if method == "count":
        bins = 1 << count_candidates(m, architecture)[0].log_bins
        return 4 + 4 + 1 + 1 + (4 + 4 + 1) + bins / max(m, 1) * (2 * 4 + 2 * 4 + 1)
    if method == "sort":
        return 168 + 12 + 4 + 1
    raise ValueError(f"method must be one of {', '.join(METHODS[1:])}; got {method!r}")


def waves(warps: int, architecture: str) -> int:
    """Warps to launch for `warps` of 32 threads."""
    return max(1, warps // 2) if architecture.startswith("gfx9") else warps


def adapted(candidate, architecture: str):
    """A table entry with its warps counted in waves of `architecture`."""
    fields = {name: waves(value, architecture) for name, value in asdict(candidate).items() if name.endswith("warps")}
    if isinstance(candidate, CountConfig):
        fields["merge"] = adapted(candidate.merge, architecture)
    return replace(candidate, **fields)


def candidates(operation: str, m: int, architecture: str) -> list:
    """What `choose` chooses from; the first is the default."""
    return [adapted(c, architecture) for c in _CANDIDATES[operation](m, architecture)]


def bucket(m: int) -> int:
    """Row lengths that share a choice: the next power of two."""
    return _power_of_two(m, 16)


def measured_ms(launch: Callable[[], None]) -> float:
    """Median milliseconds of a launch on the current device, cache flushed before each."""
    from triton.testing import do_bench

    return do_bench(launch, return_mode="median")


def choose(operation: str, m: int, architecture: str, run: Callable[[object], None]):
    """The configuration to launch `operation` with for rows of m representatives.

    run: launches with a configuration; called to time the candidates when autotuning is switched on, any number of times.
    """
    key = (operation, bucket(m), architecture)
    found = _CHOSEN.get(key)
    if found is None:
        options = candidates(operation, m, architecture)
        if len(options) > 1 and os.environ.get(AUTOTUNE_VARIABLE, "0") not in ("", "0"):
            found = min(options, key=lambda option: measured_ms(lambda: run(option)))
        else:
            found = options[0]
        _CHOSEN[key] = found
    return found


def chosen() -> str:
    """What this process has launched so far, a line per kernel, size bucket and architecture."""
    return "\n".join(
        f"{name} m<={size} {architecture}: {value}" for (name, size, architecture), value in _CHOSEN.items()
    )


def forget() -> None:
    """Drop every choice, so that the table or the next timing decides again."""
    _CHOSEN.clear()


def describe(m: int, architecture: str, power: int = 1) -> str:
    """Method, configurations and reckoned traffic for rows of m representatives, without launching anything."""
    method = resolve_method("auto", m, power, architecture)
    steps = [*(["project_rows"] if method == "project" else ["project", method]), "spectrum_gradient"]
    lines = [
        f"rows of {m} on {architecture}: {method}, {bytes_per_value(method, m):.0f} bytes a value (reckoned, not measured)"
    ]
    return "\n".join([*lines, *(f"  {name}: {candidates(name, m, architecture)[0]}" for name in steps)])
