"""Where the parts of a Wan pipeline are on this machine, and which commands bring them here."""

from __future__ import annotations

import json
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path

from vcd_fast.models.wan.settings import TINY, ModelSettings

KNOWN = "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers"
SAMPLE_BYTES = 1 << 20


def resolve(settings: ModelSettings, parts: Sequence[str]) -> Path:
    """The folder on this machine that holds the sub-folders `parts` of the pipeline `settings.weights`.

    A folder is used as it is. A hub name is looked up in the local cache and downloaded (only `parts`) where it is not there.

    Raises:
        ValueError: no weights were named, or they are a file.
        FileNotFoundError: a folder that lacks one of the parts.
        OSError: a hub name that can neither be found here nor downloaded.
    """
    weights = settings.weights
    if weights is None:
        raise ValueError(
            "model.weights: expected a folder or hub name of a Wan I2V pipeline in diffusers layout "
            f"(for example {KNOWN}), or {TINY} to try things with random weights; got nothing"
        )
    folder = Path(weights).expanduser()
    if folder.is_file():
        raise ValueError(f"model.weights: expected the folder of a pipeline in diffusers layout, got the file {folder}")
    if folder.is_dir():
        return _checked(folder, parts)
    if folder.is_absolute() or weights.startswith((".", "~")) or weights.count("/") != 1:
        raise FileNotFoundError(f"model.weights: no such folder: {weights}")
    return _checked(_snapshot(weights, settings.revision, parts), parts)


def _snapshot(name: str, revision: str | None, parts: Sequence[str]) -> Path:
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    patterns = ["model_index.json", *(f"{part}/*" for part in parts)]
    try:
        found = Path(
            huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=patterns, local_files_only=True)
        )
        if all((found / part).is_dir() for part in parts):
            return found
    except LocalEntryNotFoundError:
        pass  # not in the cache: download it
    command = f"hf download {name} " + (f"--revision {revision} " if revision else "") + "--include 'model_index.json' "
    command += " ".join(f"'{part}/*'" for part in parts)
    try:
        return Path(huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=patterns))
    except RepositoryNotFoundError as error:
        raise OSError(
            f"model.weights: the hub has no public repository {name!r} (and there is no such folder)"
        ) from error
    except (HfHubHTTPError, OSError) as error:
        raise OSError(
            f"model.weights: {', '.join(parts)} of {name} are not on this machine and could not be downloaded "
            f"({type(error).__name__}). On a machine with network run\n    {command} --local-dir FOLDER\n"
            "and set model.weights to that folder."
        ) from error


def _checked(folder: Path, parts: Sequence[str]) -> Path:
    for part in parts:
        if not (folder / part).is_dir():
            present = sorted(path.name for path in folder.iterdir() if path.is_dir())
            raise FileNotFoundError(
                f"model.weights: {folder} has no folder {part!r}; a pipeline in diffusers layout has it. It holds: "
                f"{', '.join(present) or 'no folders'}. Download the missing part with "
                f"`hf download NAME --include '{part}/*' --local-dir {folder}`."
            )
        if not any((folder / part).iterdir()):
            raise FileNotFoundError(f"model.weights: {folder / part} is empty")
    return folder


def read_config(folder: Path, part: str) -> dict:
    """`config.json` of a part.

    Raises:
        FileNotFoundError, ValueError: it is missing, or not JSON.
    """
    path = folder / part / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"model.weights: {path} is missing; it describes the {part}")
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"model.weights: {path} is not JSON: {error}") from error


def content_digest(folder: Path, parts: Sequence[str]) -> str:
    """Names `parts` by content in milliseconds: small files whole, of large ones the size and the first and last MiB."""
    digest = sha256()
    for part in parts:
        for path in sorted((folder / part).rglob("*")):
            if not path.is_file():
                continue
            size = path.stat().st_size
            digest.update(f"{part}/{path.relative_to(folder / part).as_posix()}:{size}\n".encode())
            with path.open("rb") as file:
                digest.update(file.read(SAMPLE_BYTES))
                if size > 2 * SAMPLE_BYTES:
                    file.seek(-SAMPLE_BYTES, 2)
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()
