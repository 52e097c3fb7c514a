"""Where the parts of a Wan pipeline are on this machine, what is missing, and the commands that bring it here."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vcd_fast.models.hub import (
    TOKENIZER_FILES,
    WEIGHTS,
    Missing,
    cached_snapshot,
    download_command,
    download_snapshot,
    local_folder,
    no_weights,
    read_json,
    shards,
)
from vcd_fast.models.wan.settings import TINY, TINY_I2V, TINY_NAMES, ModelSettings

KNOWN = "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers"
MODEL_PARTS = ("transformer", "vae")
TEXT_PARTS = ("tokenizer", "text_encoder")
IMAGE_PARTS = ("image_encoder", "image_processor")
SIZES = {
    "vae": "0.5 GB",
    "tokenizer": "20 MB",
    "text_encoder": "22.7 GB",
    "image_encoder": "1.3 GB",
    "image_processor": "1 kB",
}
"""the same for all of Wan 2.1 image-to-video"""
TRANSFORMER_SIZES = {
    "weizhou03/Wan2.1-Fun-1.3B-InP-Diffusers": "3.1 GB",
    KNOWN: "66 GB",
    "Wan-AI/Wan2.1-I2V-14B-720P-Diffusers": "66 GB",
}


def encoder_parts(image_encoder: bool) -> list[str]:
    """The sub-folders of a pipeline that encoding a prompt and a picture needs."""
    return [*TEXT_PARTS, "vae", *(IMAGE_PARTS if image_encoder else ())]


def folder_of(settings: ModelSettings) -> Path | None:
    """The folder that `settings.weights` names, or None if it is a name on the hub.

    Raises:
        ValueError: no weights were named, or they are a file.
        FileNotFoundError: a folder that is not there.
    """
    if settings.weights is None:
        raise ValueError(
            "model.weights: expected a folder or hub name of a Wan I2V pipeline in diffusers layout "
            f"(for example {KNOWN}), {TINY_I2V} for the small one that comes with vcd_fast, or {TINY} to try things with random "
            "weights; got nothing"
        )
    if settings.weights == TINY_I2V:
        return bundled_model()
    return local_folder(settings.weights, "weights", "of a pipeline in diffusers layout")


def bundled_model() -> Path:
    """The folder of `tiny-i2v`: in the package of a wheel, beside its scripts in a checkout.

    Raises:
        FileNotFoundError: in neither.
    """
    package = Path(__file__).resolve().parents[2]
    places = (package / "tiny_i2v", package.parent / "examples" / "tiny_i2v" / "model")
    for folder in places:
        if (folder / "model_index.json").is_file():
            return folder
    raise FileNotFoundError(
        f"model.weights: {TINY_I2V} is in neither of {', '.join(map(str, places))}; install vcd_fast again"
    )


def resolve(settings: ModelSettings, parts: Sequence[str]) -> Path:
    """The folder on this machine that holds the sub-folders `parts` of the pipeline `settings.weights`.

    A folder is used as it is. A hub name is looked up in the local cache and downloaded (only `parts`) where it is not there.

    Raises:
        ValueError: no weights were named, or they are a file.
        FileNotFoundError: a folder that lacks one of the parts, or files of it.
        OSError: a hub name that can neither be found here nor downloaded.
    """
    named, name, revision = folder_of(settings), settings.weights, settings.revision
    folder = named or _snapshot(name, revision, parts)
    for part in parts:
        problem = _problem(folder, part)
        if problem is not None:
            how = "" if named else f". Fetch it with\n    {download_command(name, revision, [f'{part}/*'])}"
            raise FileNotFoundError(f"model.weights: {problem}{how}")
    return folder


def missing_weights(settings: ModelSettings) -> list[Missing]:
    """What `settings` needs and this machine does not have: nothing is downloaded.

    Raises:
        ValueError: no weights were named, or they are a file.
        FileNotFoundError: a folder that is not there.
    """
    if settings.weights in TINY_NAMES:
        return []
    named, name, revision = folder_of(settings), settings.weights, settings.revision
    folder = named or cached_snapshot(name, revision)
    found = []
    for part in (*MODEL_PARTS, *TEXT_PARTS, *(IMAGE_PARTS if _takes_image_states(folder) else ())):
        if folder is not None and _problem(folder, part) is None:
            continue
        size = SIZES.get(part) or TRANSFORMER_SIZES.get(name, "size not known")
        if named is not None:
            command = download_command("NAME", patterns=[f"{part}/*"], folder=str(folder))
            found.append(Missing(f"{part} in {folder}", size, command))
        else:
            found.append(Missing(f"{part} ({name})", size, download_command(name, revision, [f"{part}/*"])))
    return found


def _takes_image_states(folder: Path | None) -> bool:
    """As its configuration says; where there is none, as all published Wan 2.1 I2V models do."""
    if folder is None or not (folder / "transformer" / "config.json").is_file():
        return True
    return read_config(folder, "transformer").get("image_dim") is not None


def _snapshot(name: str, revision: str | None, parts: Sequence[str]) -> Path:
    found = cached_snapshot(name, revision)
    if found is not None and not any(_problem(found, part) for part in parts):
        return found
    patterns = ["model_index.json", *(f"{part}/*" for part in parts)]
    return download_snapshot(
        name,
        revision,
        patterns,
        setting="weights",
        what=f"{', '.join(parts)} of {name} are",
        command=download_command(name, revision, patterns, folder="FOLDER"),
    )


def _problem(folder: Path, part: str) -> str | None:
    """What `folder` lacks of `part`, in words; None if it is complete."""
    place = folder / part
    if not place.is_dir():
        present = sorted(path.name for path in folder.iterdir() if path.is_dir())
        return (
            f"{folder} has no folder {part!r}; a pipeline in diffusers layout has it. It holds: "
            f"{', '.join(present) or 'no folders'}. Download the missing part with "
            f"`{download_command('NAME', patterns=[f'{part}/*'], folder=str(folder))}`."
        )
    if not any(place.iterdir()):
        return f"{place} is empty"
    if part == "tokenizer":
        there = any((place / name).is_file() for name in TOKENIZER_FILES)
        return None if there else f"{place} holds no tokenizer ({', '.join(TOKENIZER_FILES)})"
    if part == "image_processor":
        path = place / "preprocessor_config.json"
        return None if path.is_file() else f"{path} is missing"
    if not (place / "config.json").is_file():
        return _without_config(place / "config.json", part)
    try:
        there = any(shards(place, ending) or any(place.glob("*" + ending)) for ending in WEIGHTS)
    except OSError as error:
        return str(error)
    return None if there else str(no_weights(place))


def read_config(folder: Path, part: str) -> dict:
    """`config.json` of a part.

    Raises:
        FileNotFoundError, ValueError: it is missing, or not JSON.
    """
    path = folder / part / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"model.weights: {_without_config(path, part)}")
    return read_json(path)


def config_or(settings: ModelSettings, part: str, published: dict) -> dict:
    """`config.json` of a part where it is on this machine in a folder that was named, else that of the published models."""
    folder = folder_of(settings)
    if folder is None or not (folder / part / "config.json").is_file():
        return published
    return read_config(folder, part)


def _without_config(path: Path, part: str) -> str:
    return f"{path} is missing; it describes the {part}"
