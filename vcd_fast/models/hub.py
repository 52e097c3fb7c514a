"""Files of models on the Hugging Face hub and in folders, and what a user is told where they are not there."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

WEIGHTS = (".safetensors", ".bin")
"""what files of weights end in, in order of preference"""
TOKENIZER_FILES = ("tokenizer.json", "spiece.model", "tokenizer_config.json")
SAMPLE_BYTES = 1 << 20


class Missing(NamedTuple):
    """A part of a model that is not on this machine."""

    what: str
    size: str
    """of the download"""
    command: str
    """what fetches it"""


def local_folder(value: str, setting: str, expected: str) -> Path | None:
    """The folder that `value` names, or None if it can only be a name on the hub.

    Args:
        setting: what the user set to `value`. expected: the kind of folder; both for messages.

    Raises:
        ValueError: a file.
        FileNotFoundError: neither a folder nor of the form OWNER/NAME.
    """
    folder = Path(value).expanduser()
    if folder.is_dir():
        return folder
    if folder.is_file():
        raise ValueError(f"model.{setting}: expected the folder {expected}, got the file {folder}")
    if folder.is_absolute() or value.startswith((".", "~")) or value.count("/") != 1:
        raise FileNotFoundError(f"model.{setting}: no such folder: {value}")
    return None


def cached_snapshot(name: str, revision: str | None) -> Path | None:
    """The folder of the repository `name` in the hub's local cache, complete or not; None if there is none."""
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(huggingface_hub.snapshot_download(name, revision=revision, local_files_only=True))
    except LocalEntryNotFoundError:
        return None


def download_snapshot(
    name: str, revision: str | None, patterns: Sequence[str], *, setting: str, what: str, command: str
) -> Path:
    """The folder of the repository `name` in the hub's local cache, with the files of `patterns` brought up to date.

    Args:
        setting: what the user set to `name`. what: the files in words, with their verb, "the VAE of NAME is". command: fetches them
            into FOLDER. All for messages.

    Raises:
        OSError: there is no such repository, or it cannot be reached.
    """
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

    try:
        return Path(huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=list(patterns)))
    except RepositoryNotFoundError as error:
        raise OSError(
            f"model.{setting}: the hub has no public repository {name!r} (and there is no such folder)"
        ) from error
    except (HfHubHTTPError, OSError) as error:
        raise OSError(
            f"model.{setting}: {what} not on this machine and could not be downloaded ({type(error).__name__}). "
            f"On a machine with network run\n    {command}\nand set model.{setting} to that folder."
        ) from error


def fetch_config(name: str, filename: str, revision: str | None, setting: str) -> Path:
    """A configuration of the hub's repository `name`, a few kilobytes, from the local cache or downloaded.

    Raises:
        OSError: it is neither here nor can it be downloaded.
    """
    import huggingface_hub

    try:
        return Path(huggingface_hub.hf_hub_download(name, filename, revision=revision))
    except OSError as error:
        raise OSError(
            f"model.{setting}: {filename} of {name} is not on this machine and could not be downloaded "
            f"({type(error).__name__}); name a local folder instead"
        ) from error


def download_command(
    name: str, revision: str | None = None, patterns: Sequence[str] = (), folder: str | None = None
) -> str:
    """What to type to get a repository, or the files of `patterns`, into `folder` (None: the hub's cache)."""
    words = [f"hf download {name}"]
    words += [f"--revision {revision}"] if revision else []
    words += [
        f"--include '{pattern}'" for pattern in patterns
    ]  # one option each: further words would be names of files
    words += [f"--local-dir {folder}"] if folder else []
    return " ".join(words)


def shards(folder: Path, ending: str) -> list[Path] | None:
    """The weight files that an index in `folder` names, None without an index.

    Args:
        ending: one of `WEIGHTS`.

    Raises:
        FileNotFoundError: some are not there.
        ValueError: an index that is not JSON.
    """
    indexes = sorted(folder.glob(f"*{ending}.index.json"))
    if not indexes:
        return None
    names = sorted(set(read_json(indexes[0]).get("weight_map", {}).values()))
    absent = [name for name in names if not (folder / name).is_file()]
    if absent or not names:
        raise FileNotFoundError(f"{folder} lacks {', '.join(absent) or 'weights'}, which {indexes[0].name} names")
    return [folder / name for name in names]


def no_weights(folder: Path) -> FileNotFoundError:
    return FileNotFoundError(f"{folder} holds no weights ({' or '.join('*' + ending for ending in WEIGHTS)})")


def read_json(path: Path) -> dict:
    """
    Raises:
        ValueError: not JSON, or not an object.
    """
    try:
        content = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: expected JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


def content_digest(folders: Mapping[str, Path]) -> str:
    """Names the files of `folders` by content in milliseconds: small files whole, of large ones the size and the first and last MiB.

    Args:
        folders: by a name that goes into the digest; where they stand does not.
    """
    digest = sha256()
    for name, folder in folders.items():
        for path in sorted(folder.rglob("*")):
            if not path.is_file():
                continue
            size = path.stat().st_size
            digest.update(f"{name}/{path.relative_to(folder).as_posix()}:{size}\n".encode())
            with path.open("rb") as file:
                digest.update(file.read(SAMPLE_BYTES))
                if size > 2 * SAMPLE_BYTES:
                    file.seek(-SAMPLE_BYTES, 2)
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()
