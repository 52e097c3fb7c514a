"""Where the parts of Open-Sora are on this machine, what is missing, and the commands that bring it here."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from vcd_fast.models.hub import (
    TOKENIZER_FILES,
    WEIGHTS,
    Missing,
    cached_snapshot,
    download_command,
    download_snapshot,
    local_folder,
    no_weights,
    shards,
)
from vcd_fast.models.opensora.settings import TEXT_ENCODER, TINY, TRANSFORMER, VAE, ModelSettings


class Part(NamedTuple):
    """A model that Open-Sora is made of."""

    name: str
    published: str
    size: str
    setting: str


TRANSFORMER_PART = Part("transformer", TRANSFORMER, "4.8 GB", "weights")
VAE_PART = Part("vae", VAE, "1.6 GB", "vae_weights")
TEXT_ENCODER_PART = Part("text_encoder", TEXT_ENCODER, "19 GB", "text_encoder_weights")
TOKENIZER_PART = Part("tokenizer", TEXT_ENCODER, "1 MB", "text_encoder_weights")
PARTS = (TRANSFORMER_PART, VAE_PART, TEXT_ENCODER_PART, TOKENIZER_PART)


def resolve(settings: ModelSettings, part: Part) -> Path:
    """The folder on this machine with the files of `part`; a hub name that is not in the local cache is downloaded.

    Raises:
        ValueError: no weights were named.
        FileNotFoundError: a folder that is not there or lacks files.
        OSError: a hub name that can neither be found here nor downloaded.
    """
    source, revision = source_of(settings, part)
    if isinstance(source, Path):
        problem = _problem(source, part)
        if problem:
            raise FileNotFoundError(
                f"model.{part.setting}: {problem}. Get the published files with\n    "
                + download_command(part.published, folder=str(source))
            )
        return source
    return _cached(source, revision, part) or _downloaded(source, revision, part)


def missing_weights(settings: ModelSettings) -> list[Missing]:
    """What `settings` needs and this machine does not have: nothing is downloaded.

    Raises:
        ValueError: no weights were named.
    """
    if settings.weights == TINY:
        return []
    found = []
    for part in PARTS:
        source, revision = source_of(settings, part)
        if isinstance(source, Path):
            if _problem(source, part):
                command = download_command(part.published, folder=str(source))
                found.append(Missing(f"{part.name} in {source}", part.size, command))
        elif _cached(source, revision, part) is None:
            found.append(Missing(f"{part.name} ({source})", part.size, download_command(source, revision)))
    return found


def source_of(settings: ModelSettings, part: Part) -> tuple[Path | str, str | None]:
    """A local folder, or a hub name with the revision that was asked for.

    Raises:
        ValueError: no weights were named, or a file.
        FileNotFoundError: a folder that is not there.
    """
    if settings.weights is None:
        raise ValueError(
            f"model.weights: expected a folder or hub name of Open-Sora 1.2's transformer ({TRANSFORMER}), or {TINY} to try things "
            "with random weights; got nothing. The presets are --preset 240p and --preset tiny"
        )
    weights = _folder("weights", settings.weights)
    whole = isinstance(weights, Path) and (weights / "transformer").is_dir()
    if part is TRANSFORMER_PART:
        return (weights / "transformer" if whole else weights), settings.revision
    named = settings.vae_weights if part is VAE_PART else settings.text_encoder_weights
    if named is not None:
        folder = _folder(part.setting, named)
        inside = isinstance(folder, Path) and (folder / part.name).is_dir()
        return (folder / part.name if inside else folder), None
    if whole and (weights / part.name).is_dir():
        return weights / part.name, None
    return part.published, None


def _folder(setting: str, value: str) -> Path | str:
    """A folder as a path, a hub name as it is."""
    return local_folder(value, setting, "that holds config.json and weights") or value


def _problem(folder: Path, part: Part) -> str | None:
    """What `folder` lacks, in words; None if it is complete."""
    if not folder.is_dir():
        return f"{folder} is not there"
    if part is TOKENIZER_PART:
        if not any((folder / name).is_file() for name in TOKENIZER_FILES):
            return f"{folder} holds no tokenizer ({', '.join(TOKENIZER_FILES)})"
        return None
    if not (folder / "config.json").is_file():
        return f"{folder} has no config.json"
    try:
        weight_files(folder)
    except OSError as error:
        return str(error)
    return None


def weight_files(folder: Path) -> list[Path]:
    """The files that hold a model's weights: those of an index, or the only one; safetensors before `.bin`.

    Raises:
        FileNotFoundError: none, several without an index, or shards of an index that are not there.
        ValueError: an index that is not JSON.
    """
    for ending in WEIGHTS:
        indexed = shards(folder, ending)
        if indexed:
            return indexed
        files = sorted(folder.glob("*" + ending))
        if len(files) > 1:
            raise FileNotFoundError(
                f"{folder} holds {len(files)} files *{ending} and no index that says which belong together: "
                f"{', '.join(file.name for file in files[:3])}"
            )
        if files:
            return files
    raise no_weights(folder)


def _cached(name: str, revision: str | None, part: Part) -> Path | None:
    """The snapshot in the hub's local cache, if it is complete."""
    folder = cached_snapshot(name, revision)
    return None if folder is None or _problem(folder, part) else folder


def _downloaded(name: str, revision: str | None, part: Part) -> Path:
    for weights in ([],) if part is TOKENIZER_PART else (["*.safetensors"], ["*.bin"]):
        folder = download_snapshot(
            name,
            revision,
            ["*.json", *TOKENIZER_FILES, *weights],
            setting=part.setting,
            what=f"the {part.name} of {name} ({part.size}) is",
            command=download_command(name, revision, folder="FOLDER"),
        )
        problem = _problem(folder, part)
        if problem is None:
            return folder
    raise FileNotFoundError(
        f"model.{part.setting}: {name} is not what was expected, or not all of it is here: {problem}. Fetch it with\n"
        f"    {download_command(name, revision)}"
    )
