"""Pictures."""

from __future__ import annotations

import io
import struct
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn import functional

from vcd_fast.media.checks import require, to_float, to_uint8
from vcd_fast.media.files import PathLike, replace_file, require_content

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm")

_WRITE_FORMATS = {
    ".png": {"format": "PNG"},
    ".jpg": {"format": "JPEG", "quality": 95, "subsampling": 0},
    ".jpeg": {"format": "JPEG", "quality": 95, "subsampling": 0},
    ".webp": {"format": "WEBP", "lossless": True},
}
# Raised by Pillow's decoders on damaged files, one or the other depending on the format and on where the damage is.
_DAMAGED_PICTURE = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)


def read_image(path: PathLike) -> Tensor:
    """Read a picture: [3, H, W] float32 in [0, 1].

    EXIF orientation is applied, transparency composited on white, 16-bit grey kept at full precision, and palette, grey and CMYK
    pictures converted to RGB. Of an animation the first frame is read.

    Raises:
        OSError: the file is missing, a folder, or not permitted to be read.
        ValueError: the file is empty, no picture, cut short, or of a kind that has no [0, 1] range (floating point).
    """
    path = Path(path)
    with open(path, "rb") as file:
        require_content(path, file)
        try:
            with Image.open(file) as picture:
                return _picture_to_tensor(ImageOps.exif_transpose(picture))
        except Image.UnidentifiedImageError:
            raise ValueError(f"{path}: expected a picture, found a file of another or unknown format") from None
        except _DAMAGED_PICTURE as error:
            raise ValueError(f"{path}: the picture cannot be read: {error}") from error


def _picture_to_tensor(picture: Image.Image) -> Tensor:
    transparency = picture.info.get("transparency")
    if picture.mode.startswith("I"):  # "I;16" and its byte orders; "I" where Pillow widened 16 bits
        grey = np.asarray(picture).astype(np.float32)
        if grey.min() < 0 or grey.max() > 65535:
            raise ValueError(f"expected 8 or 16 bits per channel, got values from {grey.min():g} to {grey.max():g}")
        if isinstance(transparency, int):
            grey[grey == transparency] = 65535
        return torch.from_numpy(grey / 65535).expand(3, -1, -1).contiguous()
    if picture.mode == "F":
        raise ValueError("expected 8 or 16 bits per channel, got floating-point values; convert it to PNG first")
    if transparency is not None or picture.mode in ("RGBA", "LA", "PA", "RGBa", "La"):
        rgba = torch.from_numpy(np.array(picture.convert("RGBA"))).permute(2, 0, 1).float() / 255
        return rgba[:3] * rgba[3:] + (1 - rgba[3:])
    return to_float(torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1))


def write_image(path: PathLike, image: Tensor) -> None:
    """Write `image` [3, H, W], floating point in [0, 1], as PNG, JPEG (quality 95) or lossless WebP by the suffix of `path`.

    Raises:
        TypeError, ValueError: not a tensor of that kind, shape or range, or an unknown suffix.
        OSError: the folder is missing or cannot be written, or the disk is full; `path` is then as it was before.
    """
    path = Path(path)
    if path.suffix.lower() not in _WRITE_FORMATS:
        raise ValueError(f"path: expected a suffix among {', '.join(_WRITE_FORMATS)}, got {str(path)!r}")
    require(image, "image", "3HW")
    buffer = io.BytesIO()
    pixels = np.ascontiguousarray(to_uint8(image).permute(1, 2, 0).numpy())
    Image.fromarray(pixels).save(buffer, **_WRITE_FORMATS[path.suffix.lower()])
    replace_file(path, buffer)


def resize_crop(image: Tensor, height: int, width: int) -> Tensor:
    """Scale to cover `height` x `width`, then cut the centre: [..., 3, H, W] -> [..., 3, height, width], same dtype.

    Antialiased bicubic, clamped to [0, 1], differentiable. A picture of the wanted size comes back unchanged; a smaller one is
    enlarged, so a caller who does not want that checks first.

    Raises:
        TypeError, ValueError: not floating point, not three channels, or a size below one.
    """
    require(image, "image", "...3HW", in_range=False)
    for name, size in (("height", height), ("width", width)):
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(f"{name}: expected a positive whole number of pixels, got {size!r}")
    old_height, old_width = image.shape[-2:]
    if (old_height, old_width) == (height, width):
        return image
    scale = max(height / old_height, width / old_width)
    size = (max(height, round(old_height * scale)), max(width, round(old_width * scale)))
    flat = image.reshape(-1, *image.shape[-3:])
    # half precision has no antialiased kernel everywhere
    work = flat if flat.dtype in (torch.float32, torch.float64) else flat.float()
    work = functional.interpolate(work, size=size, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    work = work[..., top : top + height, left : left + width]
    return work.to(image.dtype).reshape(*image.shape[:-2], height, width)
