"""Where the parts of Open-Sora are on this machine, what is missing, and the commands that bring it here."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

from vcd_fast.models.hub import read_json
from vcd_fast.models.opensora.settings import TEXT_ENCODER, TINY, TRANSFORMER, VAE, ModelSettings

INDEXES = ("*.safetensors.index.json", "*.bin.index.json")
WEIGHTS = ("*.safetensors", "*.bin")
SAMPLE_BYTES = 1 << 20


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
TOKENIZER_FILES = ("tokenizer.json", "spiece.model", "tokenizer_config.json")
PARTS = (TRANSFORMER_PART, VAE_PART, TEXT_ENCODER_PART, TOKENIZER_PART)


class Missing(NamedTuple):
    what: str
    size: str
    command: str


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
                f"model.{part.setting}: {problem}. Get the published files with\n    {_command(part, str(source))}"
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
                found.append(Missing(f"{part.name} in {source}", part.size, _command(part, str(source))))
        elif _cached(source, revision, part) is None:
            found.append(Missing(f"{part.name} ({source})", part.size, _command(part, None, source, revision)))
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
    folder = Path(value).expanduser()
    if folder.is_dir():
        return folder
    if folder.is_file():
        raise ValueError(
            f"model.{setting}: expected the folder that holds config.json and weights, got the file {folder}"
        )
    if folder.is_absolute() or value.startswith((".", "~")) or value.count("/") != 1:
        raise FileNotFoundError(f"model.{setting}: no such folder: {value}")
    return value


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
    for index_pattern, pattern in zip(INDEXES, WEIGHTS, strict=True):
        indexes = sorted(folder.glob(index_pattern))
        if indexes:
            shards = sorted(set(read_json(indexes[0]).get("weight_map", {}).values()))
            absent = [name for name in shards if not (folder / name).is_file()]
            if absent or not shards:
                raise FileNotFoundError(
                    f"{folder} lacks {', '.join(absent) or 'weights'}, which {indexes[0].name} names"
                )
            return [folder / name for name in shards]
        files = sorted(folder.glob(pattern))
        if len(files) > 1:
            raise FileNotFoundError(
                f"{folder} holds {len(files)} files {pattern} and no index that says which belong together: "
                f"{', '.join(file.name for file in files[:3])}"
            )
        if files:
            return files
    raise FileNotFoundError(f"{folder} holds no weights ({' or '.join(WEIGHTS)})")


def _cached(name: str, revision: str | None, part: Part) -> Path | None:
    """The snapshot in the hub's local cache, if it is complete."""
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = Path(huggingface_hub.snapshot_download(name, revision=revision, local_files_only=True))
    except LocalEntryNotFoundError:
        return None
    return None if _problem(folder, part) else folder


def _downloaded(name: str, revision: str | None, part: Part) -> Path:
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

    patterns = ["*.json", *TOKENIZER_FILES]
    try:
        for weights in ([],) if part is TOKENIZER_PART else (["*.safetensors"], ["*.bin"]):
            folder = Path(
                huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=[*patterns, *weights])
            )
            problem = _problem(folder, part)
            if problem is None:
                return folder
    except RepositoryNotFoundError as error:
        raise OSError(
            f"model.{part.setting}: the hub has no public repository {name!r} (and there is no such folder)"
        ) from error
    except (HfHubHTTPError, OSError) as error:
        raise OSError(
            f"model.{part.setting}: the {part.name} of {name} ({part.size}) is not on this machine and could not be downloaded "
            f"({type(error).__name__}). On a machine with network run\n    {_command(part, 'FOLDER', name, revision)}\n"
            f"and set model.{part.setting} to that folder."
        ) from error
    raise FileNotFoundError(f"model.{part.setting}: {name} is not what was expected: {problem}")


def _command(part: Part, folder: str | None, name: str | None = None, revision: str | None = None) -> str:
    command = f"hf download {name or part.published}" + (f" --revision {revision}" if revision else "")
    return command + (f" --local-dir {folder}" if folder else "")


def content_digest(folders: Sequence[Path]) -> str:
    """Names the files of `folders` by content in milliseconds: of large ones the size and the first and last MiB."""
    digest = sha256()
    for folder in folders:
        for path in sorted(folder.iterdir()):
            if not path.is_file():
                continue
            size = path.stat().st_size
            digest.update(f"{path.name}:{size}\n".encode())
            with path.open("rb") as file:
                digest.update(file.read(SAMPLE_BYTES))
                if size > 2 * SAMPLE_BYTES:
                    file.seek(-SAMPLE_BYTES, 2)
                    digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()
