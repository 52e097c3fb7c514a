"""A folder of pictures to tune on: first frames of scenes of the training photographs, with the motion's prompt, as the trainer reads them."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch

from examples.tiny_i2v.clips import MOTIONS, scene
from examples.tiny_i2v.photos import TRAINING, read_photo
from examples.tiny_i2v.sample import CONTRAST
from examples.tiny_i2v.study import arms
from vcd_fast.media import write_image


def write_pictures(folder: Path, count: int, seed: int = 1, photos: Sequence[str] = TRAINING) -> Path:
    """`count` pictures and metadata.jsonl, if the folder is not there yet; none of a photograph that is held out."""
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
        # the trainer wants something held out; what is reported comes from other photographs
        rows.append({"image": f"{index:03d}.png", "prompt": motion.prompts[0], "held_out": index == count - 1})
    (partial / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    os.replace(partial, folder)
    return folder
