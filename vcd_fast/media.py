"""Pictures and videos between disk and tensors: float32 in [0, 1], channels first, frames first.

Everything that reads applies what a viewer would apply (EXIF orientation, a video's display rotation, transparency) and refuses
files that are empty, cut short or no picture or video at all. Everything that writes appears under its name whole or not at all.
Embedded colour profiles are ignored.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
import re
import struct
import uuid
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor
from torch.nn import functional

PathLike = str | os.PathLike[str]

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm")
VIDEO_SUFFIXES = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".gif", ".mpg", ".mpeg", ".ts", ".flv", ".wmv")

_WRITE_FORMATS = {
    ".png": {"format": "PNG"},
    ".jpg": {"format": "JPEG", "quality": 95, "subsampling": 0},
    ".jpeg": {"format": "JPEG", "quality": 95, "subsampling": 0},
    ".webp": {"format": "WEBP", "lossless": True},
}
# Raised by Pillow's decoders on damaged files, one or the other depending on the format and on where the damage is.
_DAMAGED_PICTURE = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)
_BT709, _LIMITED_RANGE = 1, 1


# ---------------------------------------------------------------------------------------------------------------- pictures


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
        _require_content(path, file)
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
    return _to_float(torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1))


def write_image(path: PathLike, image: Tensor) -> None:
    """Write `image` [3, H, W], floating point in [0, 1], as PNG, JPEG (quality 95) or lossless WebP by the suffix of `path`.

    Raises:
        TypeError, ValueError: not a tensor of that kind, shape or range, or an unknown suffix.
        OSError: the folder is missing or cannot be written, or the disk is full; `path` is then as it was before.
    """
    path = Path(path)
    if path.suffix.lower() not in _WRITE_FORMATS:
        raise ValueError(f"path: expected a suffix among {', '.join(_WRITE_FORMATS)}, got {str(path)!r}")
    _require(image, "image", "3HW")
    buffer = io.BytesIO()
    pixels = np.ascontiguousarray(_to_uint8(image).permute(1, 2, 0).numpy())
    Image.fromarray(pixels).save(buffer, **_WRITE_FORMATS[path.suffix.lower()])
    _replace(path, buffer)


def resize_crop(image: Tensor, height: int, width: int) -> Tensor:
    """Scale to cover `height` x `width`, then cut the centre: [..., 3, H, W] -> [..., 3, height, width], same dtype.

    Antialiased bicubic, clamped to [0, 1], differentiable. A picture of the wanted size comes back unchanged; a smaller one is
    enlarged, so a caller who does not want that checks first.

    Raises:
        TypeError, ValueError: not floating point, not three channels, or a size below one.
    """
    _require(image, "image", "...3HW", in_range=False)
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


# ------------------------------------------------------------------------------------------------------------------ videos


def read_video(path: PathLike, max_frames: int | None = None) -> tuple[Tensor, float | None]:
    """Read a video file, or a folder of numbered pictures: ([T, 3, H, W] float32 in [0, 1], frames per second or None).

    A file's display rotation is applied (as upright as a player shows it) and its average frame rate returned. A folder's pictures
    are read in the order of the numbers in their names and have no frame rate. `max_frames` stops after that many frames.

    Raises:
        OSError: missing, or not permitted to be read.
        ValueError: empty, no video, cut short or damaged, without frames, frames of different sizes, or a folder whose pictures
            are not numbered or numbered twice.
    """
    path = Path(path)
    if max_frames is not None and (isinstance(max_frames, bool) or not isinstance(max_frames, int) or max_frames < 1):
        raise ValueError(f"max_frames: expected a positive whole number or None, got {max_frames!r}")
    if path.is_dir():
        files = numbered_frames(path)[:max_frames]
        first = read_image(files[0])
        video = torch.empty(len(files), *first.shape)
        for index, file in enumerate(files):
            frame = read_image(file) if index else first
            if frame.shape != first.shape:
                raise ValueError(
                    f"{file}: expected the size of {files[0].name}, {_size(first)}, got {_size(frame)} (height x width)"
                )
            video[index] = frame
        return video, None
    with open(path, "rb") as file:
        _require_content(path, file)
    frames, fps = _decode(path, max_frames)
    return _to_float(torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2)), fps


def numbered_frames(folder: PathLike) -> list[Path]:
    """The pictures of a folder in the order of the numbers in their names (`frame_9` before `frame_10`).

    Raises:
        ValueError: no pictures, a picture without a number in its name, or two that differ only in padding or format.
    """
    folder = Path(folder)
    found: dict[tuple[str | int, ...], Path] = {}
    for file in sorted(folder.iterdir()):
        if file.name.startswith(".") or file.suffix.lower() not in IMAGE_SUFFIXES or not file.is_file():
            continue
        parts = re.split(r"([0-9]+)", file.stem)
        if len(parts) == 1:
            raise ValueError(f"{file}: expected frames with a number in their names, as in frame_000.png")
        key = tuple(int(part) if part.isdigit() else part for part in parts)
        if key in found:
            raise ValueError(f"{folder}: {found[key].name} and {file.name} are the same frame; remove one of them")
        found[key] = file
    if not found:
        raise ValueError(
            f"{folder}: expected a folder of numbered frames, found no picture ({', '.join(IMAGE_SUFFIXES)})"
        )
    return [found[key] for key in sorted(found)]


def _decode(path: Path, max_frames: int | None) -> tuple[list[np.ndarray], float | None]:
    """Decoded frames [H, W, 3] uint8, upright, and the average frame rate."""
    frames: list[np.ndarray] = []
    try:
        with av.open(f"file:{path}") as container:  # the prefix keeps a colon in a name from being taken for a protocol
            name = container.format.name
            # FFmpeg also opens single pictures and plain text as videos of a kind
            if not container.streams.video or name.endswith("_pipe") or name in ("image2", "tty"):
                raise ValueError(f"{path}: expected a video, found a file without a video stream ({name})")
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            fps = float(stream.average_rate) if stream.average_rate else None
            for packet in container.demux(stream):
                if packet.is_corrupt:
                    raise ValueError(f"{path}: the video is cut short or damaged after {len(frames)} frames")
                for frame in packet.decode():
                    if frame.is_corrupt:
                        raise ValueError(f"{path}: the video is cut short or damaged at frame {len(frames)}")
                    pixels = np.rot90(frame.to_ndarray(format="rgb24"), k=round(frame.rotation / 90))
                    if frames and pixels.shape != frames[0].shape:
                        raise ValueError(f"{path}: the size of the frames changes at frame {len(frames)}")
                    frames.append(pixels)
                    if len(frames) == max_frames:
                        return frames, fps
    except av.error.FFmpegError as error:
        what = f"is cut short or damaged after {len(frames)} frames" if frames else "is damaged or not a video"
        raise ValueError(f"{path}: the file {what}: {error.strerror}") from error
    if not frames:
        raise ValueError(f"{path}: the video has no frames")
    return frames, fps


def write_video(path: PathLike, video: Tensor, fps: float, crf: int = 10) -> None:
    """Write `video` [T, 3, H, W], floating point in [0, 1], as H.264 (yuv420p, BT.709, limited range) in an MP4 file.

    `fps` is the true frame rate, fractional ones included; `crf` is x264's quality, 0 (lossless but for the chroma) to 51.

    Raises:
        TypeError, ValueError: not a tensor of that kind, shape or range; an odd height or width (4:2:0 needs even ones); another
            suffix than .mp4; `fps` or `crf` out of range.
        OSError: the folder is missing or cannot be written, or the disk is full; `path` is then as it was before.
        ImportError: PyAV was built without x264.
    """
    path = Path(path)
    if path.suffix.lower() != ".mp4":
        raise ValueError(f"path: expected the suffix .mp4, got {str(path)!r}")
    _require(video, "video", "T3HW")
    height, width = video.shape[-2:]
    if height % 2 or width % 2:
        raise ValueError(f"video: expected an even height and width, got {height} x {width}; crop it with resize_crop")
    if not math.isfinite(fps) or not 0.01 <= fps <= 1000:
        raise ValueError(f"fps: expected frames per second from 0.01 to 1000, got {fps!r}")
    if isinstance(crf, bool) or not isinstance(crf, int) or not 0 <= crf <= 51:
        raise ValueError(f"crf: expected a whole number from 0 to 51, got {crf!r}")
    try:
        codec = av.Codec("libx264", "w").name
    except av.codec.codec.UnknownCodecError:
        raise ImportError("this PyAV has no libx264; install PyAV's wheel from PyPI: pip install -U av") from None
    # Encoded in memory: FFmpeg reports a full disk late and without a name, Python's own write does not.
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream(codec, rate=Fraction(fps).limit_denominator(1001))
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.options = {"crf": str(crf)}
        context = stream.codec_context
        context.colorspace = context.color_primaries = context.color_trc = _BT709
        context.color_range = _LIMITED_RANGE
        for image in video:
            rgb = np.ascontiguousarray(_to_uint8(image).permute(1, 2, 0).numpy())
            frame = av.VideoFrame.from_ndarray(rgb, format="rgb24")
            frame = frame.reformat(format="yuv420p", dst_colorspace="ITU709", dst_color_range="MPEG")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    _replace(path, buffer)


# ------------------------------------------------------------------------------------------------------------ frame strips


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
        _require(video, f"rows[{index}]", "T3HW")
        if video.shape[-2:] != rows[0][1].shape[-2:]:
            raise ValueError(f"rows[{index}]: expected frames of {_size(rows[0][1])} as in row 0, got {_size(video)}")
    if image is not None:
        _require(image, "image", "3HW")

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
        small = _to_uint8(resize_crop(picture.detach().float(), cell_height, cell_width))
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
    return _to_float(torch.from_numpy(np.array(sheet)).permute(2, 0, 1))


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


# ----------------------------------------------------------------------------------------------------------- shared checks


def _require(tensor: Tensor, name: str, layout: str, in_range: bool = True) -> None:
    """Raise unless `tensor` is floating point, of the layout ("3HW", "T3HW" or "...3HW") and, if asked, in [0, 1]."""
    shape = f"[{', '.join(layout.replace('...', '…'))}]".replace("…", "...")
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a tensor {shape}, got {type(tensor).__name__}")
    if not tensor.is_floating_point():
        raise TypeError(f"{name}: expected floating point in [0, 1], got {tensor.dtype}; divide 8-bit values by 255")
    dims = tensor.dim()
    if (dims < 3 if layout.startswith("...") else dims != len(layout)) or tensor.shape[-3] != 3 or not tensor.numel():
        raise ValueError(f"{name}: expected the shape {shape}, nothing empty, got {list(tensor.shape)}")
    if in_range:
        low, high = (value.item() for value in torch.aminmax(tensor.detach().float()))
        # the slack is half a step of 8 bits: what rounding to 8 bits forgives. Negated, so that NaN fails too.
        if not (low >= -0.5 / 255 and high <= 1 + 0.5 / 255):
            raise ValueError(f"{name}: expected values in [0, 1], got {low:.4g} to {high:.4g}")


def _size(tensor: Tensor) -> str:
    return f"{tensor.shape[-2]} x {tensor.shape[-1]}"


def _to_uint8(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().float().clamp(0, 1).mul(255).round().to(torch.uint8)


def _to_float(pixels: Tensor) -> Tensor:
    return pixels.contiguous().float().div_(255)


def _require_content(path: Path, file: io.BufferedReader) -> None:
    if os.fstat(file.fileno()).st_size == 0:
        raise ValueError(f"{path}: the file is empty (0 bytes)")


@contextlib.contextmanager
def _temporary_beside(path: Path) -> Iterator[Path]:
    """A name in the folder of `path` for what will replace it; gone afterwards, whatever happens."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        yield temporary
    except OSError as error:
        # a failed write() knows no name, and the temporary one says nothing to a user
        missing = not path.parent.is_dir()
        raise OSError(error.errno, error.strerror, str(path.parent if missing else path)) from error
    finally:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()


def _replace(path: Path, content: io.BytesIO) -> None:
    with _temporary_beside(path) as temporary:
        with open(temporary, "xb") as file:
            file.write(content.getbuffer())
        os.replace(temporary, path)
