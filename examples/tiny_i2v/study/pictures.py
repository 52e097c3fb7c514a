"""Pictures to tune on: first frames of scenes of the training photographs, with the motion's prompt, as the trainer reads them.

`python -m examples.tiny_i2v.study.pictures` writes those of `make train`, from this repository's photographs alone.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch

from examples.tiny_i2v.clips import MOTIONS, scene
from examples.tiny_i2v.photos import HELD_OUT, TRAINING, of_the_repository, read_photo
from examples.tiny_i2v.sample import CONTRAST, Scene, held_out_scenes
from examples.tiny_i2v.study import arms
from vcd_fast.media import write_image

SHOWN = ("pan_left", "zoom_out")
"""what becomes of the held-out pictures of `make train`: the motion the base does best, and one it distorts a picture in"""
FOLDER = Path(__file__).resolve().parents[1] / "pictures"


def write_pictures(
    folder: Path, count: int, seed: int = 1, photos: Sequence[str] = TRAINING, held_out: Sequence[Scene] = ()
) -> Path:
    """`count` pictures and metadata.jsonl, if the folder is not there yet.

    Held out are the first frames of the scenes `held_out`, which come on top, or else the last picture; the others are of `photos`.
    """
    if folder.is_dir():
        return folder
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    rows = []
    for index in range(count):
        generator = torch.Generator().manual_seed((seed << 32) + index)
        motion = MOTIONS[arms.MOTIONS[index % len(arms.MOTIONS)]]
        photo = read_photo(photos[index % len(photos)])
        picture = torch.zeros(1, 2)
        while picture.std() < CONTRAST:
            picture = scene(photo, motion, generator, frames=1)[0][0]
        write_image(partial / f"{index:03d}.png", picture)
        # the trainer wants something held out; what the study reports comes from other photographs
        last = not held_out and index == count - 1
        rows.append({"image": f"{index:03d}.png", "prompt": motion.prompts[0], "held_out": last})
    for index, given in enumerate(held_out, count):
        write_image(partial / f"{index:03d}.png", given.true[0])
        rows.append({"image": f"{index:03d}.png", "prompt": given.prompt, "held_out": True})
    (partial / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    os.replace(partial, folder)
    return folder


def main() -> None:
    photos = of_the_repository(HELD_OUT)
    held_out = held_out_scenes(len(photos), seed=7, motions=SHOWN, photos=photos)
    print(write_pictures(FOLDER, 20, photos=of_the_repository(TRAINING), held_out=held_out))


if __name__ == "__main__":
    main()
