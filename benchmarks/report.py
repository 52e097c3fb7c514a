"""Plots, the README's table and the state of the targets, from rows alone.

    python -m benchmarks.report [FILES] [--readme README.md] [--targets] [--output FOLDER]

FILES are results of runs, by default all of benchmarks/results/*.json. Of several rows for the same thing the newest counts.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks import plots, table, targets
from benchmarks.lookup import Results, by_machine, provenance
from benchmarks.rows import RESULTS, load


def say_targets(machines: list[Results]) -> tuple[list[str], bool]:
    """Lines for people, and whether none of the targets is missed."""
    lines, fine = [], True
    for results in machines:
        lines.append(provenance(results, results.rows))
        for target in targets.targets(results):
            lines.append(f"  {target.verdict:>14}  {target.name}: {target.measured}, expected {target.expected}")
            fine &= target.verdict != targets.FAIL
    if all(results.device != "cuda" for results in machines):
        target = targets.no_gpu()
        lines.append(f"  {target.verdict:>14}  {target.name}: {target.measured}")
    return lines, fine


def main(arguments: list[str] | None = None) -> int:
    """0: done; 1: a target is missed; 2: nothing could be reported."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", type=Path, help="results (default: all of benchmarks/results/*.json)")
    parser.add_argument("--readme", type=Path, help="write the table between the markers of this file")
    parser.add_argument(
        "--targets", action="store_true", help="print what was to be reached and what was; draws nothing"
    )
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the plots (default benchmarks/results)")
    chosen = parser.parse_args(arguments)
    files = chosen.files or sorted(RESULTS.glob("*.json"))
    try:
        if not files:
            raise ValueError(f"no results in {RESULTS}: run pytest benchmarks/ --benchmark-only, or name files")
        machines = by_machine(load(files))
        if not machines:
            raise ValueError(f"no rows in {', '.join(map(str, files))}")
        if chosen.targets:
            lines, fine = say_targets(machines)
            print("\n".join(lines))
            return 0 if fine else 1
        if chosen.readme:
            table.write(chosen.readme, machines)
            print(chosen.readme)
        for results in machines:
            for path in plots.draw(results, chosen.output):
                print(path)
    except (OSError, ValueError) as error:
        print(f"benchmarks.report: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
