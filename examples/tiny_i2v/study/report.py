"""The study's table, figure and strips from its rows: `python -m examples.tiny_i2v.study.report --output runs/study --docs docs`."""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.nn import functional as F

from examples.tiny_i2v.provenance import provenance
from examples.tiny_i2v.sample import GUIDANCE
from examples.tiny_i2v.study.arms import ARMS, BASE, BY_NAME
from examples.tiny_i2v.study.metrics import HIGHER_IS_BETTER
from examples.tiny_i2v.study.statistics import clustered, sign_flip_p, within
from vcd_fast.media import frame_strip, write_image

HEADINGS = {
    "vcd": "VCD ↓", "psnr": "PSNR to the moved picture, dB ↑", "features": "features' cosine ↑", "flicker": "flicker ↓",
    "motion": "motion / asked", "shown": "motion named shown", "sharpness": "sharpness / picture",
}  # fmt: skip

STRIPS = (BASE.name, "vcd", "vcd_l2")

Rows = list[dict[str, object]]


def read_rows(folder: Path) -> dict[str, Rows]:
    """Arm -> rows of all of its training seeds.

    Raises:
        FileNotFoundError: no base in `folder`.
    """
    found: dict[str, Rows] = defaultdict(list)
    for path in sorted(folder.glob("*-*.jsonl")):
        for line in path.read_text().splitlines():
            row = json.loads(line)
            found[row["arm"]].append(row)
    if BASE.name not in found:
        raise FileNotFoundError(
            f"{folder} holds no rows of the base model; python -m examples.tiny_i2v.study.run writes them"
        )
    return {arm.name: found[arm.name] for arm in (BASE, *ARMS) if arm.name in found}


def made_by(folder: Path) -> dict[str, dict[str, object]]:
    """Command, commit and seconds of every arm and training seed."""
    found = {}
    for path in sorted(folder.glob("*-*.jsonl")):
        said = json.loads(path.with_suffix(".json").read_text())
        found[path.stem] = {key: said[key] for key in ("command", "commit", "seconds")}
    return found


def values_of(rows: Rows, metric: str) -> tuple[list[float], list[int]]:
    """The values and their clusters, the scenes. Motion asked of a still picture is none, so still ones say nothing about how much."""
    kept = [row for row in rows if metric != "motion" or row["asked"] != "still"]
    return [row[metric] for row in kept], [row["scene"] for row in kept]


def by_group(values: Sequence[float], groups: Sequence[int]) -> list[float]:
    """The mean of every group (scene, training seed), in the groups' order."""
    found = defaultdict(list)
    for value, group in zip(values, groups, strict=True):
        found[group].append(value)
    return [sum(found[group]) / len(found[group]) for group in sorted(found)]


def summary(arms: dict[str, Rows]) -> dict[str, dict[str, object]]:
    """Arm -> metric -> mean, interval, mean of every training seed; and against the base (paired by scene): difference, its interval, p,
    and half the width of the interval either mean has with the scenes' own levels taken out ("within")."""
    base = {(row["scene"], row["noise"]): row for row in arms[BASE.name]}
    found = {}
    for name, rows in arms.items():
        found[name] = {"samples": len(rows), "seeds": len({row["seed"] for row in rows})}
        for metric in HIGHER_IS_BETTER:
            values, scenes = values_of(rows, metric)
            entry = dict(zip(("mean", "low", "high"), clustered(values, scenes), strict=True))
            entry["by_seed"] = by_group(values, [row["seed"] for row in rows if row["scene"] in set(scenes)])
            if name != BASE.name:
                kept = [row for row in rows if row["scene"] in set(scenes)]
                differences = [row[metric] - base[row["scene"], row["noise"]][metric] for row in kept]
                entry["difference"] = dict(zip(("mean", "low", "high"), clustered(differences, scenes), strict=True))
                entry["p"] = sign_flip_p(by_group(differences, scenes))
                entry["within"] = within(by_group(values, scenes), by_group(*values_of(arms[BASE.name], metric)))
            found[name][metric] = entry
    return found


def table(figures: dict[str, dict[str, object]]) -> str:
    """Markdown: means with 95 % intervals; bold where a paired test against the base has p < 0.01."""
    lines = [
        "| | seeds × videos | " + " | ".join(HEADINGS.values()) + " |",
        "| --- | ---: |" + " ---: |" * len(HEADINGS),
    ]
    for name, entry in figures.items():
        cells = [f"{entry['seeds']} × {entry['samples'] // entry['seeds']}"]
        for metric in HEADINGS:
            value = entry[metric]
            text = f"{value['mean']:.3g} [{value['low']:.3g}, {value['high']:.3g}]"
            cells.append(f"**{text}**" if value.get("p", 1) < 0.01 else text)
        lines.append(f"| {BY_NAME[name].says} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def difference_table(figures: dict[str, dict[str, object]]) -> str:
    """Markdown: paired differences to the base with 95 % intervals; motion as the part of the base's that is left."""
    lines = [
        "| against the base | " + " | ".join(HEADINGS.values()) + " | motion kept |",
        "| --- |" + " ---: |" * (len(HEADINGS) + 1),
    ]
    base = figures[BASE.name]["motion"]["mean"]
    for name, entry in figures.items():
        if name == BASE.name:
            continue
        cells = []
        for metric in HEADINGS:
            value = entry[metric]["difference"]
            text = f"{value['mean']:+.2g} [{value['low']:+.2g}, {value['high']:+.2g}]"
            cells.append(f"**{text}**" if entry[metric]["p"] < 0.01 else text)
        lines.append(
            f"| {BY_NAME[name].says} | " + " | ".join([*cells, f"{entry['motion']['mean'] / base:.0%}"]) + " |"
        )
    return "\n".join(lines)


def short_table(figures: dict[str, dict[str, object]]) -> str:
    """Markdown: base and VCD alone, scenes' own levels taken out of the intervals, and their paired difference."""
    shown = ("psnr", "features", "flicker", "motion")
    base, tuned = figures[BASE.name], figures["vcd"]
    lines = ["| | " + " | ".join(HEADINGS[metric] for metric in shown) + " |", "| --- |" + " ---: |" * len(shown)]
    for label, entry in (("base", base), ("tuned with VCD", tuned)):
        cells = [f"{entry[metric]['mean']:.3g} ± {tuned[metric]['within']:.2g}" for metric in shown]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    differences = (tuned[metric]["difference"] for metric in shown)
    cells = (f"{value['mean']:+.2g} [{value['low']:+.2g}, {value['high']:+.2g}]" for value in differences)
    return "\n".join([*lines, "| paired difference, 95 % | " + " | ".join(cells) + " |"])


def guidance_table(found: dict[str, dict[str, dict[str, object]]]) -> str:
    """Markdown: the base at several strengths of guidance, and what VCD changes there (paired, with 95 % intervals)."""
    shown = ("vcd", "psnr", "features", "flicker", "motion", "sharpness")
    lines = [
        "| guidance | | " + " | ".join(HEADINGS[metric] for metric in shown) + " |",
        "| ---: | --- |" + " ---: |" * len(shown),
    ]
    for guidance, figures in sorted(found.items(), key=lambda item: float(item[0])):
        base, tuned = figures[BASE.name], figures["vcd"]
        lines.append(
            f"| {guidance} | not tuned | " + " | ".join(f"{base[metric]['mean']:.3g}" for metric in shown) + " |"
        )
        cells = []
        for metric in shown:
            value = tuned[metric]["difference"]
            text = f"{value['mean']:+.2g} [{value['low']:+.2g}, {value['high']:+.2g}]"
            cells.append(f"**{text}**" if tuned[metric]["p"] < 0.01 else text)
        lines.append("| | VCD changes | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def figure(figures: dict[str, dict[str, object]], path: Path) -> None:
    """Every arm's paired difference to the base, which is the line at 0, with its interval; green where it is better."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = ("vcd", "psnr", "features", "flicker", "motion", "sharpness")
    names = [name for name in figures if name != BASE.name]
    drawing = Figure(figsize=(13, 0.34 * len(names) + 1.4), layout="constrained")
    FigureCanvasAgg(drawing)
    axes = drawing.subplots(1, len(shown), sharey=True)
    for axis, metric in zip(axes, shown, strict=True):
        axis.axvline(0, color="#566270", linewidth=1)
        for row, name in enumerate(names):
            value = figures[name][metric]["difference"]
            certain = value["low"] > 0 or value["high"] < 0
            better = (value["mean"] > 0) == HIGHER_IS_BETTER[metric]
            neutral = not certain or metric in ("motion", "sharpness")
            colour = "#8894a0" if neutral else "#1a7f4b" if better else "#c4501b"
            axis.plot([value["low"], value["high"]], [row, row], color=colour, linewidth=2)
            axis.plot(value["mean"], row, "o", color=colour, markersize=5)
        axis.set_title(HEADINGS[metric].replace(" to the moved picture", ""), fontsize=9)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_yticks(range(len(names)), [BY_NAME[name].says for name in names])
    axes[0].invert_yaxis()
    drawing.supxlabel("difference to the base, same scenes and noises; 95 % intervals over scenes", fontsize=9)
    drawing.savefig(path, dpi=130)


def strips(folder: Path, path: Path, arms: Sequence[str] = STRIPS) -> None:
    """The same scene from the same noise by several arms (their first training seed), beside the true clip, scene after scene."""
    found = {
        name: torch.load(sorted(folder.glob(f"{name}-*.pt"))[0]) for name in arms if any(folder.glob(f"{name}-*.pt"))
    }
    pieces = []
    for index in sorted(found[BASE.name]):
        true = torch.load(folder / "true.pt")[index]
        rows = [(f"{true['prompt']}: true clip", true["video"])]
        rows += [(BY_NAME[name].says, videos[index]) for name, videos in found.items()]
        pieces.append(frame_strip([(label, video / 255) for label, video in rows]))
    width = max(piece.shape[-1] for piece in pieces)
    write_image(path, torch.cat([F.pad(piece, (0, width - piece.shape[-1], 0, 12), value=1.0) for piece in pieces], 1))


def between(text: str, start: str, end: str, content: str) -> str:
    """`text` with `content` in place of what stands between two markers, if they are there."""
    if start not in text:
        return text
    return f"{text.split(start)[0]}{start}\n{content}\n{end}{text.split(end)[1]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="folder study.run wrote to")
    parser.add_argument(
        "--docs", type=Path, required=True, help="folder of does-it-work.md; its table, data/study.json and study.png"
    )
    parser.add_argument(
        "--guidance",
        nargs="*",
        default=[],
        metavar="G=FOLDER",
        help="studies of base and VCD at other strengths of guidance",
    )
    parser.add_argument("--readme", type=Path, help="file to write the short table to, between its markers")
    options = parser.parse_args()

    figures = summary(read_rows(options.output))
    others = dict(word.split("=", 1) for word in options.guidance)
    by_guidance = {strength: summary(read_rows(Path(folder))) for strength, folder in others.items()}
    if by_guidance:
        by_guidance[f"{GUIDANCE:g}"] = {name: figures[name] for name in (BASE.name, "vcd")}
    (options.docs / "data").mkdir(parents=True, exist_ok=True)
    runs = {"preset's guidance": made_by(options.output)}
    runs |= {f"guidance {strength}": made_by(Path(folder)) for strength, folder in others.items()}
    record = provenance(" ".join(["python -m examples.tiny_i2v.study.report", *sys.argv[1:]])) | {"runs": runs}
    record |= {"arms": figures, "guidance": by_guidance}
    (options.docs / "data" / "study.json").write_text(json.dumps(record, indent=1) + "\n")
    figure(figures, options.docs / "study.png")
    strips(options.output, options.docs / "study-strips.jpg")
    parts = {"study": f"{table(figures)}\n\n{difference_table(figures)}"}
    if by_guidance:
        parts["guidance"] = guidance_table(by_guidance)
    for page in (options.docs / "does-it-work.md", options.readme):
        if page is not None and page.is_file():
            text = page.read_text()
            for name, content in {**parts, "study in short": short_table(figures)}.items():
                text = between(text, f"<!-- {name} -->", f"<!-- /{name} -->", content)
            page.write_text(text)
    print("\n\n".join(parts.values()))


if __name__ == "__main__":
    main()
