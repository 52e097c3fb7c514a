"""What amplitude and phase tell apart: `python -m examples.tiny_i2v.study.parts --docs docs`.

The distance of two readings, part by part and layer by layer, of a blurred copy to its photograph and of another photograph to it.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from examples.tiny_i2v.photos import HELD_OUT
from examples.tiny_i2v.provenance import provenance
from examples.tiny_i2v.sample import held_out_scenes
from examples.tiny_i2v.study.report import between
from vcd_fast import VGG19Features
from vcd_fast.distance import sliced_wasserstein

BLUR = 5
"""pixels, the side of the square each is the mean of"""
WEIGHTS = {"amplitude": (1.0, 0.0), "phase": (0.0, 1.0)}


def distances(extractor: VGG19Features, pictures: Tensor) -> list[dict[str, object]]:
    """Means over pictures [B, 3, H, W] in [0, 1], against blurred copies and against each other."""
    kernel = torch.full((3, 1, BLUR, BLUR), 1 / BLUR**2)
    blurred = F.conv2d(F.pad(pictures, (BLUR // 2,) * 4, mode="reflect"), kernel, groups=3)
    given, soft, others = extractor(pictures), extractor(blurred), extractor(pictures.roll(1, 0))
    found = []
    for layer, features in given.items():
        row: dict[str, object] = {"layer": layer}
        for part, (amplitude, phase) in WEIGHTS.items():
            for name, side in (("blurred", soft), ("other", others)):
                terms = sliced_wasserstein(
                    side[layer], features, num_projections=64, amplitude_weight=amplitude, phase_weight=phase
                )
                row[f"{part} {name}"] = float(terms.mean())
        found.append(row)
    return found


def table(rows: list[dict[str, object]]) -> str:
    names = [name for name in rows[0] if name != "layer"]
    heads = {"blurred": "a blurred copy", "other": "another photograph"}
    titles = [f"{part}: {heads[kind]}" for part, kind in (name.split() for name in names)]
    lines = ["| | " + " | ".join(titles) + " |", "| --- |" + " ---: |" * len(names)]
    lines += [f"| {row['layer']} | " + " | ".join(f"{row[name]:.3g}" for name in names) + " |" for row in rows]
    return "\n".join(lines)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--docs", type=Path, required=True, help="folder of does-it-work.md and data/")
    parser.add_argument("--vgg19", default="random", help="VGG19 weights: random, imagenet or a file")
    options = parser.parse_args()

    pictures = torch.stack([scene.true[0] for scene in held_out_scenes(len(HELD_OUT), seed=7)])
    rows = distances(VGG19Features(options.vgg19), pictures)
    record = provenance("python -m examples.tiny_i2v.study.parts") | {"vgg19": options.vgg19, "rows": rows}
    path = options.docs / "data" / "study-parts.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    page = options.docs / "does-it-work.md"
    page.write_text(between(page.read_text(), "<!-- parts -->", "<!-- /parts -->", table(rows)))
    print(table(rows))


if __name__ == "__main__":
    main()
