"""The photographs clips are cut from: the repository's own and those scikit-image brings along, some of them held out of all training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from vcd_fast.media import read_image

PICTURES = Path(__file__).resolve().parents[1] / "pictures"
TRAINING = (
    "astronaut.jpg",
    "cat.jpg",
    "galaxies.jpg",
    "photographer.jpg",
    "rocket.jpg",
    "brick.png",
    "grass.png",
    "ihc.png",
    "moon.png",
    "motorcycle_left.png",
    "retina.jpg",
)
HELD_OUT = ("coffee.jpg", "raccoon.jpg", "coins.png", "clock_motion.png")
"""coffee and raccoon are those held out in `examples/pictures/metadata.jsonl`"""


def of_the_repository(names: Sequence[str]) -> tuple[str, ...]:
    """Those that need no scikit-image."""
    return tuple(name for name in names if (PICTURES / name).is_file())


def read_photo(name: str) -> Tensor:
    """[3, H, W] float32 in [0, 1], from `examples/pictures` or from scikit-image's bundled data.

    Raises:
        ImportError: it is one of scikit-image's, and that is not installed.
        FileNotFoundError: nobody has it.
    """
    if (PICTURES / name).is_file():
        return read_image(PICTURES / name)
    try:
        import skimage.data
    except ImportError as error:
        raise ImportError(f'{name} comes with scikit-image: pip install scikit-image (the extra "examples")') from error
    path = Path(skimage.data.__file__).parent / name
    if not path.is_file():
        raise FileNotFoundError(f"{name} is neither in {PICTURES} nor in {path.parent}")
    return read_image(path)


def pyramid(photo: Tensor, levels: int = 5) -> list[Tensor]:
    """The photo at 1, 1/2, 1/4, ... of its size, each the mean of four pixels of the one before."""
    found = [photo]
    while len(found) < levels and min(found[-1].shape[-2:]) >= 2:
        found.append(torch.nn.functional.avg_pool2d(found[-1], 2))
    return found
