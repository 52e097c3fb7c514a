"""What runs of the presets take, from their configurations: the tables of docs/memory.md.

python tools/memory_table.py             # the tables, from docs/data/memory.json
python tools/memory_table.py --count     # counts anew first, some minutes on a laptop
"""

from __future__ import annotations

import argparse
import json
import os
from importlib.metadata import version
from pathlib import Path
from typing import Any

from provenance import ROOT, provenance

from vcd_fast.config import compose
from vcd_fast.training.estimate import BUDGETS, GIB, estimate, fits

DATA = ROOT / "docs" / "data" / "memory.json"
PAGE = ROOT / "docs" / "memory.md"
START, END = "<!-- estimated, GiB -->", "<!-- end -->"
ALL_STEPS = {"rollout": {"backprop": "all"}}
RUNS: dict[str, tuple[str, str, dict, int]] = {
    "Wan 1.3B, `1.3b`": ("wan", "1.3b", {}, 1),
    "Wan 1.3B, `12gb`": ("wan", "12gb", {}, 1),
    "Wan 1.3B, `12gb`, `--backprop all`": ("wan", "12gb", ALL_STEPS, 1),
    "Wan 1.3B, `24gb`": ("wan", "24gb", {}, 1),
    "Wan 1.3B, `80gb`": ("wan", "80gb", {}, 1),
    "Wan 14B, `14b-480p`": ("wan", "14b-480p", {}, 1),
    "Wan 14B, `14b-480p`, 4 GPUs": ("wan", "14b-480p", {}, 4),
    "Open-Sora, `240p`": ("opensora", "240p", {}, 1),
    "Open-Sora, `12gb`": ("opensora", "12gb", {}, 1),
    "Open-Sora, `24gb`": ("opensora", "24gb", {}, 1),
    "Open-Sora, `80gb`": ("opensora", "80gb", {}, 1),
}
ADVISED = ("Wan 1.3B, `1.3b`", "Wan 14B, `14b-480p`", "Open-Sora, `240p`")
PACKAGES = ("torch", "diffusers", "transformers", "peft")
"""what the numbers depend on"""
PHASES = ("encode", "load", "rollout", "decode", "reward", "backward", "optimizer", "samples")


def count() -> dict[str, Any]:
    """Every run's estimate, and for some of them how they fit each budget."""
    runs, advice = {}, {}
    for name, (family, preset, changes, gpus) in RUNS.items():
        config = compose(family, preset, {"data": {"pictures": "."}}, changes)
        runs[name] = {
            "family": family,
            "preset": preset,
            "changes": changes,
            "gpus": gpus,
            **estimate(config, gpus).as_dict(),
        }
        if name in ADVISED:
            advice[name] = {
                str(fit.budget): {
                    "fits": fit.fits,
                    "flags": [o.flag for o in fit.options],
                    "needed_bytes": fit.estimate.needed,
                }
                for fit in fits(config, gpus)
            }
    made = {**provenance(), "packages": {name: version(name) for name in PACKAGES}}
    return {"provenance": made, "runs": runs, "advice": advice}


def tables(data: dict[str, Any]) -> str:
    """Markdown between the marks of the page."""
    lines = [f"| run | {' | '.join(PHASES)} | needed |", f"| --- | {'---: | ' * len(PHASES)}---: |"]
    for name, run in data["runs"].items():
        cells = [f"{run['phases'][p]['bytes'] / GIB:.1f}" if p in run["phases"] else "" for p in PHASES]
        lines.append(f"| {name} | {' | '.join(cells)} | {run['needed_bytes'] / GIB:.1f} |")
    lines += ["", f"| to fit | {' | '.join(data['advice'])} |", f"| --- |{' --- |' * len(data['advice'])}"]
    for budget in map(str, BUDGETS):
        cells = []
        for found in data["advice"].values():
            fit = found[budget]
            flags = ", ".join(f"`{flag}`" for flag in fit["flags"]) or "as it is"
            cells.append(f"{flags} ({fit['needed_bytes'] / GIB:.1f})" if fit["fits"] else "does not")
        lines.append(f"| {budget} GB | {' | '.join(cells)} |")
    made = data["provenance"]
    versions = ", ".join(f"{name} {number}" for name, number in made["packages"].items())
    return "\n".join([*lines, "", f"Counted at commit {str(made['commit'])[:9]} with {versions}."])


def with_tables(page: str, data: dict[str, Any]) -> str:
    before, rest = page.split(START)
    return f"{before}{START}\n{tables(data)}\n{END}{rest.split(END, 1)[1]}"


def write(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", action="store_true", help="count anew")
    if parser.parse_args().count:
        write(DATA, json.dumps(count(), indent=1) + "\n")
    write(PAGE, with_tables(PAGE.read_text(), json.loads(DATA.read_text())))
    print(f"{PAGE}: tables written")


if __name__ == "__main__":
    main()
