"""The time embedding of Wan's transformer alone: a few MB out of gigabytes, for what depends on the timestep only."""

from __future__ import annotations

from pathlib import Path

from safetensors import safe_open
from torch import nn

from vcd_fast.models.wan import tiny
from vcd_fast.models.wan.settings import TINY, TINY_NAMES, ModelSettings

PREFIXES = ("condition_embedder.time_embedder.", "condition_embedder.time_proj.")


def fill_time_embedding(transformer: nn.Module, settings: ModelSettings) -> bool:
    """Give a transformer on the meta device the time embedding of `settings.weights`, in float32.

    Only this machine is looked at.

    Returns:
        whether the weights are here.
    """
    wanted = {name for name in transformer.state_dict() if name.startswith(PREFIXES)}
    if settings.weights in TINY_NAMES:
        found = tiny.tiny_transformer(image_encoder=settings.weights == TINY).state_dict()
        tensors = {name: found[name] for name in wanted}
    else:
        folder = _local_folder(settings)
        tensors = {} if folder is None else _read(folder / "transformer", wanted)
    if tensors.keys() != wanted:
        return False
    transformer.load_state_dict({name: value.float() for name, value in tensors.items()}, strict=False, assign=True)
    return True


def _local_folder(settings: ModelSettings) -> Path | None:
    weights = settings.weights or ""
    folder = Path(weights).expanduser()
    if folder.is_dir():
        return folder
    if folder.is_absolute() or weights.count("/") != 1:
        return None
    import huggingface_hub
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(huggingface_hub.snapshot_download(weights, revision=settings.revision, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        return None


def _read(folder: Path, wanted: set[str]) -> dict:
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            tensors |= {name: file.get_tensor(name) for name in wanted.intersection(file.keys())}
    return tensors
