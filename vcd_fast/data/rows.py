"""The rows of a data set as they are written down: metadata.jsonl, else metadata.csv, else text files beside the pictures.

Nothing is raised for a bad row: what is wrong with it goes to a list, so that a user hears of everything at once.
"""

from __future__ import annotations

import csv
import dataclasses
import difflib
import io
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from vcd_fast.media import IMAGE_SUFFIXES, VIDEO_SUFFIXES

JSONL, CSV = "metadata.jsonl", "metadata.csv"

ALIASES = {
    "image": ("image", "image_path", "image_file"),
    "video": ("video", "video_path", "video_file"),
    "file": ("file_name", "filename", "file", "path"),
    "prompt": ("prompt", "text", "caption"),
    "negative_prompt": ("negative_prompt",),
    "held_out": ("held_out",),
    "split": ("split",),
}
KNOWN = [alias for aliases in ALIASES.values() for alias in aliases]
SPLITS = {
    **dict.fromkeys(("train", "training"), False),
    **dict.fromkeys(("held_out", "validation", "val", "test", "eval"), True),
}
BOOLEANS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


class Problem(NamedTuple):
    where: str
    what: str


@dataclasses.dataclass(frozen=True)
class Row:
    """One row, its path not yet looked at."""

    where: str
    """what to call the row in a message"""
    file: str
    """relative to the folder"""
    prompt: str
    negative_prompt: str | None
    held_out: bool | None
    """None: the row does not say"""


def read_rows(folder: Path, problems: list[Problem]) -> list[Row]:
    """The rows of the first source there is, in their order; text files beside pictures in the order of the pictures' names."""
    for name, parse in ((JSONL, _json_lines), (CSV, _csv_lines)):
        if (folder / name).is_file():
            text = _read_text(folder, name, problems)
            entries = parse(text, name, problems) if text is not None else ()
            rows = [_row(where, entry, problems) for where, entry in entries]
            return [row for row in rows if row is not None]
    return _text_files(folder, problems)


def _read_text(folder: Path, name: str, problems: list[Problem]) -> str | None:
    if not (folder / name).resolve().is_relative_to(folder.resolve()):
        problems.append(Problem(name, "leads out of the folder by a symbolic link"))
        return None
    try:
        return (folder / name).read_text(encoding="utf-8-sig")  # spreadsheets like to write a byte order mark
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        what = f"expected UTF-8 text, found byte {error.object[error.start]:#04x}"
        problems.append(Problem(f"{name}, line {line}", what))
    except OSError as error:
        problems.append(Problem(name, str(error.strerror)))
    return None


def _json_lines(text: str, name: str, problems: list[Problem]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for number, line in enumerate(text.split("\n"), start=1):
        where = f"{name}, line {number}"
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            problems.append(Problem(where, f"not JSON: {error.msg} at column {error.colno}"))
            continue
        if not isinstance(entry, dict):
            problems.append(Problem(where, f'expected {{"image": ..., "prompt": ...}}, got {_short(line)}'))
            continue
        yield where, entry


def _csv_lines(text: str, name: str, problems: list[Problem]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    while True:
        try:
            entry = next(reader, None)
        except csv.Error as error:
            problems.append(Problem(f"{name}, line {reader.line_num}", f"not CSV: {error}"))
            return
        if entry is None:
            return
        where = f"{name}, line {reader.line_num}"
        if None in entry or None in entry.values():
            problems.append(Problem(where, f"expected {len(reader.fieldnames or ())} columns as in the first line"))
            continue
        yield where, {key.strip(): value for key, value in entry.items() if value.strip()}


def _text_files(folder: Path, problems: list[Problem]) -> list[Row]:
    rows = []
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or path.suffix.lower() not in IMAGE_SUFFIXES + VIDEO_SUFFIXES:
            continue
        beside = path.with_suffix(".txt")
        if not beside.is_file():
            problems.append(Problem(path.name, f"no prompt: expected {beside.name} beside it, or a {JSONL}"))
        elif (text := _read_text(folder, beside.name, problems)) is not None:
            if text.strip():
                rows.append(Row(path.name, path.name, " ".join(text.split()), None, None))
            else:
                problems.append(Problem(beside.name, "the prompt is empty"))
    return rows


def _row(where: str, entry: Mapping[str, Any], problems: list[Problem]) -> Row | None:
    """The row an entry stands for, or None and the reasons."""
    found: list[str] = []
    values: dict[str, Any] = {}
    for meaning, aliases in ALIASES.items():
        given = [alias for alias in aliases if entry.get(alias) is not None]
        if len(given) > 1 and any(entry[alias] != entry[given[0]] for alias in given):
            found.append(f"{' and '.join(given)} say different things; keep one")
        if given:
            values[meaning] = entry[given[0]]
    for key in entry:
        close = difflib.get_close_matches(key, KNOWN, n=1, cutoff=0.85)
        if close and key not in KNOWN:
            found.append(f"unknown key {key!r}; did you mean {close[0]!r}?")

    # a data set made for training on videos has both; the picture is the condition
    file = values.get("image", values.get("file", values.get("video")))
    if file is None:
        found.append(f"no picture: expected a key image, file_name or video, got {_keys(entry)}")
    elif not isinstance(file, str) or not file.strip():
        found.append(f"the picture: expected a path relative to the folder, got {_short(file)}")
    prompt = values.get("prompt")
    if prompt is None:
        found.append(f"no prompt: expected a key prompt, text or caption, got {_keys(entry)}")
    elif not isinstance(prompt, str):
        found.append(f"the prompt: expected text, got {_short(prompt)}")
    elif not prompt.strip():
        found.append("the prompt is empty")
    negative = values.get("negative_prompt")
    if negative is not None and not isinstance(negative, str):
        found.append(f"negative_prompt: expected text, got {_short(negative)}")

    held_out = None
    if "split" in values:
        held_out = SPLITS.get(str(values["split"]).strip().lower().replace("-", "_"))
        if held_out is None:
            found.append(f"split: expected one of {', '.join(SPLITS)}, got {_short(values['split'])}")
    if "held_out" in values:
        flag = BOOLEANS.get(str(values["held_out"]).strip().lower())
        if flag is None:
            found.append(f"held_out: expected true or false, got {_short(values['held_out'])}")
        elif held_out not in (None, flag):
            found.append("split and held_out say different things; keep one")
        held_out = flag

    problems += [Problem(where, what) for what in found]
    if found:
        return None
    return Row(where, file.strip(), prompt.strip(), (negative or "").strip() or None, held_out)


def _keys(entry: Mapping[str, Any]) -> str:
    return ", ".join(map(str, entry)) or "no keys"


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
