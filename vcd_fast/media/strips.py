"""Sheets of frames to compare clips by."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from vcd_fast.media.checks import require, size_of, to_float, to_uint8
from vcd_fast.media.images import resize_crop


def frame_strip(rows: Sequence[tuple[str, Tensor]], image: Tensor | None = None, columns: int = 6) -> Tensor:
    """One picture to compare clips by: a labelled row per clip, at most `columns` evenly spaced frames in each.

    The first and the last frame are always among them; every frame carries its 0-based number. `image`, the conditioning picture,
    stands first in every row. Small frames are enlarged and large ones reduced until captions and pictures fit each other.

    Args:
        rows: (label, video [T, 3, H, W] floating point in [0, 1]), all of one H and W; T may differ.
        image: [3, H', W'] floating point in [0, 1] or None; brought to the frames' size.
        columns: frames per row, at least 2.

    Returns:
        [3, h, w] float32 in [0, 1].

    Raises:
        TypeError, ValueError: no rows, or one of them not as above.
    """
    if isinstance(columns, bool) or not isinstance(columns, int) or columns < 2:
        raise ValueError(f"columns: expected a whole number of at least 2, got {columns!r}")
    if not rows:
        raise ValueError("rows: expected at least one (label, video), got none")
    for index, (label, video) in enumerate(rows):
        if not isinstance(label, str):
            raise TypeError(
                f"rows[{index}]: expected (label, video) with a string as label, got {type(label).__name__}"
            )
        require(video, f"rows[{index}]", "T3HW")
        if video.shape[-2:] != rows[0][1].shape[-2:]:
            raise ValueError(
                f"rows[{index}]: expected frames of {size_of(rows[0][1])} as in row 0, got {size_of(video)}"
            )
    if image is not None:
        require(image, "image", "3HW")

    height, width = rows[0][1].shape[-2:]
    scale = min(max(1.0, 208 / max(height, width)), 320 / max(height, width))
    cell_height, cell_width = max(1, round(height * scale)), max(1, round(width * scale))
    text = _font("DejaVuSans-Bold.ttf", 17), _font("DejaVuSans.ttf", 14)
    margin, gap, label_height, caption_height = 16, 6, 28, 24
    lead = cell_width + 3 * gap if image is not None else 0
    shown = [_spaced(len(video), columns) for _, video in rows]
    # too narrow a sheet would cut every label off
    total_width = max(360, 2 * margin + lead + max(map(len, shown)) * (cell_width + gap) - gap)
    row_height = label_height + cell_height + caption_height
    sheet = Image.new("RGB", (total_width, 2 * margin + len(rows) * row_height + (len(rows) - 1) * gap), "white")
    draw = ImageDraw.Draw(sheet)

    def cell(picture: Tensor, caption: str, left: int, top: int) -> None:
        small = to_uint8(resize_crop(picture.detach().float(), cell_height, cell_width))
        sheet.paste(Image.fromarray(np.ascontiguousarray(small.permute(1, 2, 0).numpy())), (left, top))
        at = (left + cell_width // 2, top + cell_height + caption_height // 2)
        caption = next((c for c in (caption, caption.split()[-1]) if draw.textlength(c, text[1]) <= cell_width), "")
        draw.text(at, caption, font=text[1], fill="#444444", anchor="mm")

    for row, ((label, video), frames) in enumerate(zip(rows, shown, strict=True)):
        top = margin + row * (row_height + gap)
        label = _shortened(" ".join(label.split()), draw, text[0], total_width - 2 * margin)
        draw.text((margin, top + label_height // 2 - 3), label, font=text[0], fill="#111111", anchor="lm")
        top += label_height
        if image is not None:
            cell(image, "image", margin, top)
            line = margin + cell_width + 3 * gap // 2
            draw.line([(line, top), (line, top + cell_height - 1)], fill="#bbbbbb", width=2)
        for column, frame in enumerate(frames):
            cell(video[frame], f"frame {frame}", margin + lead + column * (cell_width + gap), top)
    return to_float(torch.from_numpy(np.array(sheet)).permute(2, 0, 1))


def _spaced(count: int, columns: int) -> list[int]:
    """At most `columns` evenly spaced positions of 0..count-1, both ends included."""
    if count <= columns:
        return list(range(count))
    return [round(i * (count - 1) / (columns - 1)) for i in range(columns)]


def _shortened(text: str, draw: ImageDraw.ImageDraw, font: ImageFont.FreeTypeFont, width: int) -> str:
    if draw.textlength(text, font) <= width:
        return text
    while text and draw.textlength(f"{text}…", font) > width:
        text = text[:-1]
    return f"{text.rstrip()}…"


def _font(name: str, size: int) -> ImageFont.FreeTypeFont:
    import matplotlib  # brings DejaVu, which covers more scripts than Pillow's own font

    return ImageFont.truetype(os.path.join(matplotlib.get_data_path(), "fonts", "ttf", name), size)
