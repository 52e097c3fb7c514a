"""A folder of pictures, checked as a whole before anything is done with it."""

from __future__ import annotations

import collections
import dataclasses
import functools
import hashlib
import io
import json
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import track
from rich.table import Table
from rich.text import Text
from torch import Tensor

from vcd_fast.data.rows import CSV, JSONL, Problem, Row, read_rows
from vcd_fast.data.settings import DataSettings
from vcd_fast.media import VIDEO_SUFFIXES, numbered_frames, read_image, read_video, resize_crop

_CACHED_PICTURES = 16
_LISTED_PROBLEMS = 100


@dataclasses.dataclass(frozen=True)
class Sample:
    """A picture and what is asked of it."""

    index: int
    """position in the data set; what randomness is keyed by"""
    name: str
    """unique in the data set and fit for file names"""
    prompt: str
    negative_prompt: str | None
    path: Path


@dataclasses.dataclass(frozen=True)
class _Content:
    digest: str
    """SHA-256 of the file's bytes"""
    height: int
    width: int


class PictureFolder:
    """Pictures and prompts of a folder: what is trained on, what is held out, and in which order.

    Attributes:
        samples: every sample, in the order of the metadata (or of the pictures' names).
        training, held_out: indices into `samples`.
        data_hash: SHA-256 over pictures, prompts and the split; the folder's place and the files' names do not enter.
    """

    samples: tuple[Sample, ...]
    training: tuple[int, ...]
    held_out: tuple[int, ...]
    data_hash: str

    def __init__(self, settings: DataSettings, height: int, width: int) -> None:
        """Read the metadata and decode every picture once, for a video of `height` x `width` pixels.

        Raises:
            OSError: the folder is missing or no folder.
            ValueError: anything is wrong with any row or picture; one message with a table of everything that is.
        """
        self.height, self.width = height, width
        folder = Path(settings.pictures)
        try:
            os.listdir(folder)
        except OSError as error:  # missing, no folder, forbidden
            raise type(error)(f"pictures: expected a folder of pictures, got {folder}: {error.strerror}") from error
        problems: list[Problem] = []
        rows = read_rows(folder, problems)
        all_rows_read = not problems
        if not rows and not problems:
            problems.append(Problem("the folder", f"no samples: expected {JSONL}, {CSV}, or pictures with text files"))

        located = [(row, path) for row in rows if (path := _locate(folder, row, problems)) is not None]
        contents = _inspect_all([path for _, path in located])
        entries: list[tuple[Row, Path, _Content]] = []
        hint = ""
        for (row, path), content in zip(located, contents, strict=True):
            if isinstance(content, str):
                problems.append(Problem(row.where, f"{row.file}: {content}"))
                continue
            entries.append((row, path, content))
            if not settings.enlarge and (content.height < height or content.width < width):
                size = f"{content.height} x {content.width} pixels (height x width)"
                problems.append(Problem(row.where, f"{row.file}: {size}, the video has {height} x {width}"))
                hint = "where pictures are smaller than the video, choose a smaller height and width, or set enlarge"
        # what a row that could not be read says of the split is unknown, and nothing is said about it then
        if all_rows_read:
            problems += _split_problems(settings.held_out, [row.held_out for row in rows])
        held_out = _split(settings.held_out, [(row, content) for row, _, content in entries])
        if not problems and all(held_out):
            problems.append(Problem("held_out", "no sample is left for training"))
        _find_repetitions([(row, content) for row, _, content in entries], held_out, problems)
        if problems:
            raise ValueError(_report(folder, problems, hint))

        names = _unique_names([row.file for row, _, _ in entries])
        self.samples = tuple(
            Sample(index, names[index], row.prompt, row.negative_prompt, path)
            for index, (row, path, _) in enumerate(entries)
        )
        self.training = tuple(index for index, out in enumerate(held_out) if not out)
        self.held_out = tuple(index for index, out in enumerate(held_out) if out)
        identity = [
            (content.digest, row.prompt, row.negative_prompt, out)
            for (row, _, content), out in zip(entries, held_out, strict=True)
        ]
        self.data_hash = hashlib.sha256(json.dumps(identity).encode()).hexdigest()
        self._resized = functools.lru_cache(maxsize=_CACHED_PICTURES)(self._resize)
        self._permutation = functools.lru_cache(maxsize=4)(self._permute)

    def __len__(self) -> int:
        return len(self.samples)

    def image(self, index: int, height: int | None = None, width: int | None = None) -> Tensor:
        """The picture of sample `index`, scaled and centre-cropped to the video's size or another: [3, height, width] float32 in
        [0, 1]. Read when asked for; the last few are kept."""
        return self._resized(index, height or self.height, width or self.width).clone()

    def order(self, seed: int, position: int) -> int:
        """The training sample at a position of an endless sequence: every pass takes each sample once, in an order of its own.

        A pure function of `seed` and `position` (from 0), the same on every machine: whoever resumes carries nothing along.

        Raises:
            ValueError: `position` is negative.
        """
        if position < 0:
            raise ValueError(f"position: expected a whole number from 0, got {position}")
        epoch, place = divmod(position, len(self.training))
        return self._permutation(seed, epoch)[place]

    def _permute(self, seed: int, epoch: int) -> list[int]:
        # hashes rather than a generator: no library's version can change them
        return sorted(self.training, key=lambda index: hashlib.sha256(f"{seed}/{epoch}/{index}".encode()).digest())

    def _resize(self, index: int, height: int, width: int) -> Tensor:
        return resize_crop(_read_condition(self.samples[index].path), height, width)


def _read_condition(path: Path) -> Tensor:
    if path.suffix.lower() in VIDEO_SUFFIXES:
        return read_video(path, max_frames=1)[0][0]
    return read_image(path)


def _locate(folder: Path, row: Row, problems: list[Problem]) -> Path | None:
    """The file of a row, a folder's first frame, or None and the reason."""
    try:
        if Path(row.file).is_absolute():
            raise ValueError("expected a path relative to the folder, got an absolute one")
        path = folder / row.file
        if path.is_dir() and path.resolve().is_relative_to(folder.resolve()):
            path = numbered_frames(path)[0]
        # a data set from elsewhere must not reach for other files of this machine
        if not path.resolve().is_relative_to(folder.resolve()):
            raise ValueError(
                "leads out of the folder" + ("" if ".." in Path(row.file).parts else " by a symbolic link")
            )
        if path.is_file():
            return path
        problems.append(Problem(row.where, f"{row.file}: {'not a file' if path.exists() else 'no such file'}"))
    except OSError as error:
        problems.append(Problem(row.where, f"{row.file}: {error.strerror or error}"))
    except (ValueError, RuntimeError) as error:  # a symbolic link to itself is a RuntimeError before Python 3.13
        problems.append(Problem(row.where, f"{row.file}: {str(error).removeprefix(f'{folder / row.file}: ')}"))
    return None


def _inspect_all(paths: Sequence[Path]) -> list[_Content | str]:
    """Content of every file, or what is the matter with it."""
    hidden = len(paths) < 64 or os.environ.get("LOCAL_RANK", "0") != "0"
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        results: Iterable[_Content | str] = pool.map(_inspect, paths)
        console = Console(stderr=True)
        return list(track(results, "checking pictures", len(paths), console=console, transient=True, disable=hidden))


def _inspect(path: Path) -> _Content | str:
    digest = hashlib.sha256()
    try:
        image = _read_condition(path)
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError as error:
        return str(error.strerror or error)
    except ValueError as error:
        return str(error).removeprefix(f"{path}: ")
    return _Content(digest.hexdigest(), *image.shape[-2:])


def _split_problems(fraction: float | None, marks: Sequence[bool | None]) -> list[Problem]:
    marked = any(mark is not None for mark in marks)
    what = None
    if fraction is not None and marked:
        what = "the metadata marks what is held out, and a fraction is set; use one of them"
    elif fraction is None and marks and not any(marks):
        what = 'no sample is held out: mark rows with "held_out": true, or set held_out to a fraction (0 for none)'
    return [Problem("held_out", what)] if what else []


def _split(fraction: float | None, entries: Sequence[tuple[Row, _Content]]) -> list[bool]:
    """Whether each entry is held out."""
    if fraction is None:
        return [bool(row.held_out) for row, _ in entries]
    if fraction == 0:
        return [False] * len(entries)
    # by content, so that neither the order nor new pictures decide anew about old ones
    ranked = sorted({content.digest for _, content in entries}, key=lambda d: hashlib.sha256(d.encode()).digest())
    chosen = set(ranked[: max(1, round(fraction * len(ranked)))])
    return [content.digest in chosen for _, content in entries]


def _find_repetitions(
    entries: Sequence[tuple[Row, _Content]], held_out: Sequence[bool], problems: list[Problem]
) -> None:
    """One picture may have several prompts, but not the same one twice, and not on both sides of the split."""
    by_content: dict[str, list[int]] = collections.defaultdict(list)
    for index, (_, content) in enumerate(entries):
        by_content[content.digest].append(index)
    for group in by_content.values():
        for place, index in enumerate(group):
            row = entries[index][0]
            for earlier in group[:place]:
                other = entries[earlier][0]
                if held_out[index] != held_out[earlier]:
                    what = "the same picture is held out" if held_out[earlier] else "the same picture is trained on"
                elif (row.prompt, row.negative_prompt) == (other.prompt, other.negative_prompt):
                    what = "the same picture and prompt stand"
                else:
                    continue
                problems.append(Problem(row.where, f"{row.file}: {what} at {other.where} ({other.file})"))
                break


def _unique_names(files: Sequence[str]) -> list[str]:
    names: list[str] = []
    taken: set[str] = set()
    for file in files:
        stem = "_".join(part for part in Path(file).with_suffix("").parts if part not in (".", ".."))
        name, count = stem, 1
        while name in taken:
            count += 1
            name = f"{stem}_{count}"
        taken.add(name)
        names.append(name)
    return names


def _report(folder: Path, problems: Sequence[Problem], hint: str) -> str:
    def place(problem: Problem) -> tuple[str, int]:
        file, _, line = problem.where.partition(", line ")
        return file, int(line) if line.isdecimal() else 0

    problems = sorted(problems, key=place)
    table = Table("where", "what is wrong", box=SIMPLE_HEAD, pad_edge=False)
    for problem in problems[:_LISTED_PROBLEMS]:
        table.add_row(Text(problem.where, overflow="fold"), Text(problem.what, overflow="fold"))
    text = io.StringIO()
    Console(file=text, width=120, color_system=None).print(table)
    lines = [f"{folder}: {len(problems)} problem{'s' if len(problems) > 1 else ''}"]
    lines += [line.rstrip() for line in text.getvalue().splitlines() if line.strip()]
    if len(problems) > _LISTED_PROBLEMS:
        lines.append(f"and {len(problems) - _LISTED_PROBLEMS} more")
    return "\n".join([*lines, *([hint] if hint else [])])
