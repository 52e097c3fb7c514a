"""Write examples/pictures from the photographs that scikit-image and an older SciPy bring along.

    pip install scikit-image pillow
    python tools/make_example_pictures.py                       # fetches SciPy's wheel from PyPI (36 MB) for one picture
    python tools/make_example_pictures.py --scipy-wheel scipy-1.11.4-*.whl

SciPy's wheel is only unzipped, never installed: from 1.12 on SciPy no longer contains the picture. The pictures depend on the version
of Pillow's JPEG encoder in their last bits; those in the repository are the ones to use.
"""

from __future__ import annotations

import argparse
import bz2
import io
import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import skimage.data
from PIL import Image

FOLDER = Path(__file__).resolve().parents[1] / "examples" / "pictures"
SIZE = (640, 480)
QUALITY = 88
SCIPY = "1.11.4"
CC0 = "CC0 1.0"
PUBLIC_DOMAIN = "public domain"


class Picture(NamedTuple):
    name: str
    original: str
    """function of skimage.data, or "face" for SciPy's"""
    crop: tuple[int, int, int, int]
    """left, top, right, bottom in the original; 4:3"""
    author: str
    licence: str
    source: str
    prompt: str
    held_out: bool = False


PICTURES = (
    Picture(
        "astronaut",
        "astronaut",
        (0, 0, 512, 384),
        "NASA",
        PUBLIC_DOMAIN,
        "https://flic.kr/p/r9qvLn (portrait of Eileen Collins), by way of scikit-image",
        "An astronaut in an orange space suit smiles at us while the camera zooms in.",
    ),
    Picture(
        "cat",
        "chelsea",
        (51, 0, 451, 300),
        "Stefan van der Walt",
        CC0,
        "scikit-image, `chelsea`",
        "A ginger tabby cat blinks and twitches its whiskers while the camera pans slowly to the left.",
    ),
    Picture(
        "coffee",
        "coffee",
        (0, 0, 533, 400),
        "Rachel Michetti (courtesy of Pikolo Espresso Bar)",
        CC0,
        "scikit-image, `coffee`",
        "A red cup of espresso on a wooden table; the camera pans slowly to the right.",
        held_out=True,
    ),
    Picture(
        "galaxies",
        "hubble_deep_field",
        (180, 196, 820, 676),
        "NASA, ESA (Hubble eXtreme Deep Field)",
        PUBLIC_DOMAIN,
        "http://hubblesite.org/newscenter/archive/releases/2012/37/image/a/, by way of scikit-image",
        "Deep space full of distant galaxies; the camera slowly zooms in.",
    ),
    Picture(
        "photographer",
        "camera",
        (0, 30, 512, 414),
        "Lav Varshney",
        CC0,
        "scikit-image, `camera`",
        "Black-and-white footage of a man who leans towards his camera on a tripod while the camera pans slowly to the right.",
    ),
    Picture(
        "raccoon",
        "face",
        (0, 0, 1024, 768),
        "not named; published on public-domain-image.com",
        PUBLIC_DOMAIN,
        "raccoon-procyon-lotor.jpg of http://www.public-domain-image.com, by way of SciPy's `face`",
        "A raccoon lies among green leaves and sniffs while the camera zooms in.",
        held_out=True,
    ),
    Picture(
        "rocket",
        "rocket",
        (36, 0, 605, 427),
        "SpaceX",
        f"{PUBLIC_DOMAIN} (released by SpaceX)",
        "https://www.flickr.com/photos/spacexphotos/16511594820, by way of scikit-image",
        "A rocket on its launch pad at dusk while the camera pans up.",
    ),
)


def scipy_face(wheel: Path | None) -> Image.Image:
    """The raccoon: 1024 x 768 RGB values, compressed by bzip2."""
    with tempfile.TemporaryDirectory() as folder:
        if wheel is None:
            fetch = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--dest", folder]
            fetch += ["--python-version=3.11", "--platform=manylinux2014_x86_64", f"scipy=={SCIPY}"]
            subprocess.run(fetch, check=True)
            (wheel,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            values = bz2.decompress(archive.read("scipy/misc/face.dat"))
    return Image.fromarray(np.frombuffer(values, np.uint8).reshape(768, 1024, 3))


def original(picture: Picture, wheel: Path | None) -> Image.Image:
    if picture.original == "face":
        return scipy_face(wheel)
    return Image.fromarray(getattr(skimage.data, picture.original)()).convert("RGB")


def write(picture: Picture, image: Image.Image) -> str:
    """Crop, resize and write a picture; returns its row of SOURCES.md."""
    left, top = picture.crop[:2]
    cut = image.crop(picture.crop)
    buffer = io.BytesIO()
    cut.resize(SIZE, Image.Resampling.LANCZOS).save(buffer, "JPEG", quality=QUALITY, optimize=True, progressive=True)
    (FOLDER / f"{picture.name}.jpg").write_bytes(buffer.getvalue())
    scale = SIZE[0] / cut.width
    change = f"{cut.width} x {cut.height} at ({left}, {top}) of {image.width} x {image.height}, scaled by {scale:.3g}"
    return f"| `{picture.name}.jpg` | {picture.author} | {picture.licence} | {picture.source} | {change} |"


def main() -> None:
    parser = argparse.ArgumentParser(description="Write examples/pictures.")
    parser.add_argument("--scipy-wheel", type=Path, help=f"a wheel of SciPy {SCIPY}; default: fetch it from PyPI")
    wheel = parser.parse_args().scipy_wheel
    FOLDER.mkdir(parents=True, exist_ok=True)
    rows = [write(picture, original(picture, wheel)) for picture in PICTURES]
    sources = [
        "# Where the pictures come from",
        "",
        "All are in the public domain or under CC0, as stated by the packages that bundle them (the docstrings of `skimage.data` and",
        f"of `scipy.misc.face` in SciPy {SCIPY}). They were cropped to 4:3, scaled to {SIZE[0]} x {SIZE[1]} and saved as JPEG by",
        "`tools/make_example_pictures.py`. The prompts in `metadata.jsonl` were written for this project.",
        "",
        "| File | Author | Licence | Source | Crop (width x height at left, top) |",
        "|---|---|---|---|---|",
        *rows,
        "",
    ]
    (FOLDER / "SOURCES.md").write_text("\n".join(sources))
    lines = [
        json.dumps(
            {
                "image": f"{picture.name}.jpg",
                "prompt": picture.prompt,
                **({"held_out": True} if picture.held_out else {}),
            }
        )
        for picture in PICTURES
    ]
    (FOLDER / "metadata.jsonl").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
