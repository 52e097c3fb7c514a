"""Video files and folders of frames."""

from __future__ import annotations

import io
import math
import os
import re
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
from torch import Tensor

from vcd_fast.media.checks import require, size_of, to_float, to_uint8
from vcd_fast.media.files import PathLike, replace_file, require_content
from vcd_fast.media.images import IMAGE_SUFFIXES, read_image

VIDEO_SUFFIXES = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".gif", ".mpg", ".mpeg", ".ts", ".flv", ".wmv")

_BT709, _LIMITED_RANGE = 1, 1


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
                    f"{file}: expected the size of {files[0].name}, {size_of(first)}, got {size_of(frame)} (height x width)"
                )
            video[index] = frame
        return video, None
    with open(path, "rb") as file:
        require_content(path, file)
        declared, actual = _declared_size(file.read(128)), os.fstat(file.fileno()).st_size
        if declared > actual:
            raise ValueError(f"{path}: the video is cut short: it has {actual} bytes and was to have {declared}")
    frames, fps = _decode(path, max_frames)
    return to_float(torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2)), fps


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


def _declared_size(start: bytes) -> int:
    """How long a file that begins with `start` says it is, 0 if it does not say.

    FFmpeg ends Matroska, WebM and AVI files silently where they are cut off; the size their first element declares gives them away.
    """
    if start[:4] == b"RIFF":
        return 8 + int.from_bytes(start[4:8], "little")
    if start[:4] != b"\x1a\x45\xdf\xa3":
        return 0
    header_end = sum(_ebml_size(start, 4))
    if start[header_end : header_end + 4] != b"\x18\x53\x80\x67":
        return 0
    begin, size = _ebml_size(start, header_end + 4)
    return begin + size if size else 0


def _ebml_size(data: bytes, at: int) -> tuple[int, int]:
    """Where the content of the EBML element whose size field stands at `at` begins, and its size (0 if unknown)."""
    field = data[at : at + 8]
    length = 9 - field[0].bit_length() if field and field[0] else 0
    if not 0 < length <= len(field):
        return at, 0
    size = int.from_bytes(field[:length], "big") - (1 << 7 * length)
    return at + length, 0 if size == (1 << 7 * length) - 1 else size


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
            # FFmpeg would patch damaged pictures up from their neighbours, and a distance would be measured on the patches
            stream.codec_context.options = {"err_detect": "explode"}
            fps = float(stream.average_rate) if stream.average_rate else None
            for packet in container.demux(stream):
                if packet.is_corrupt:
                    raise ValueError(f"{path}: the video is cut short or damaged after {len(frames)} frames")
                for frame in packet.decode():
                    if frame.is_corrupt:
                        raise ValueError(f"{path}: the video is cut short or damaged at frame {len(frames)}")
                    pixels = np.rot90(_rgb(frame), k=round(frame.rotation / 90))
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


def _rgb(frame: av.VideoFrame) -> np.ndarray:
    """[H, W, 3] uint8. FFmpeg's direct way from 4:2:0 to RGB repeats chroma pixels; by way of 4:4:4 it interpolates (+1 dB)."""
    components = frame.format.components
    if len(components) == 3 and components[1].is_chroma and components[1].width < frame.width:
        frame = frame.reformat(format="yuv444p", interpolation="BICUBIC")
    return frame.to_ndarray(format="rgb24")


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
    require(video, "video", "T3HW")
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
            rgb = np.ascontiguousarray(to_uint8(image).permute(1, 2, 0).numpy())
            frame = av.VideoFrame.from_ndarray(rgb, format="rgb24")
            frame = frame.reformat(format="yuv420p", dst_colorspace="ITU709", dst_color_range="MPEG")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    replace_file(path, buffer)
