"""The time embedding of Wan's transformer alone: a few MB out of gigabytes, for what depends on the timestep only."""

from __future__ import annotations

from pathlib import Path

from safetensors import safe_open
from torch import nn

from vcd_fast.models.hub import cached_snapshot
from vcd_fast.models.wan import tiny
from vcd_fast.models.wan.loading import folder_of
from vcd_fast.models.wan.settings import TINY, TINY_NAMES, ModelSettings

PREFIXES = ("condition_embedder.time_embedder.", "condition_embedder.time_proj.")


def fill_time_embedding(transformer: nn.Module, settings: ModelSettings) -> bool:
    """Give a transformer on the meta device the time embedding of `settings.weights`, in float32.

    Only this machine is looked at.

    Returns:
        whether the weights are here.

    Raises:
        ValueError, FileNotFoundError: no weights were named, or a folder that is not there.
    """
    wanted = {name for name in transformer.state_dict() if name.startswith(PREFIXES)}
    if settings.weights in TINY_NAMES:
        found = tiny.tiny_transformer(image_encoder=settings.weights == TINY).state_dict()
        tensors = {name: found[name] for name in wanted}
    else:
        folder = folder_of(settings) or cached_snapshot(settings.weights, settings.revision)
        tensors = {} if folder is None else _read(folder / "transformer", wanted)
    if tensors.keys() != wanted:
        return False
    transformer.load_state_dict({name: value.float() for name, value in tensors.items()}, strict=False, assign=True)
    return True


def _read(folder: Path, wanted: set[str]) -> dict:
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            tensors |= {name: file.get_tensor(name) for name in wanted.intersection(file.keys())}
    return tensors
