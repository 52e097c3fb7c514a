"""Weights into models, strictly: every tensor of the model is in the file and every tensor of the file in the model.

The original code loads leniently, and a wrong file then gives noise instead of an error. Two layouts are read: the published ones, and
what `save_pretrained` of the classes here writes.
"""

from __future__ import annotations

import inspect
import pickle
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from vcd_fast.models.hub import read_json
from vcd_fast.models.opensora.embeddings import rope_frequencies
from vcd_fast.models.opensora.files import weight_files
from vcd_fast.models.opensora.transformer import STDiT3
from vcd_fast.models.opensora.vae import OpenSoraVAE

SHOWN = 10
ROPE = "rope.freqs"


def load_transformer(folder: Path, dtype: torch.dtype) -> STDiT3:
    """STDiT3 from `config.json` and weights; only `rope.freqs`, which is a formula, may be absent from the file.

    Memory: the weights once, in `dtype`, and one tensor of the file.

    Raises:
        ValueError: a configuration of another model; missing, unexpected, misshapen or damaged tensors, listed.
        FileNotFoundError: no configuration or weights.
    """
    model = empty_transformer(folder)
    frequencies = rope_frequencies(model.head_dim)
    loaded = _fill(model, folder, dtype, may_be_absent={ROPE: frequencies})
    if not torch.allclose(loaded.rope.freqs.float(), frequencies, rtol=1e-2, atol=0):
        raise ValueError(f"{folder}: {ROPE} is not 10000^(-2i/{model.head_dim}); this is another model")
    return loaded


def load_vae(folder: Path, dtype: torch.dtype) -> OpenSoraVAE:
    """The VAE from `config.json` and weights, spatial part included. Errors as of `load_transformer`."""
    return _fill(empty_vae(folder), folder, dtype, may_be_absent={})


def empty_transformer(folder: Path) -> STDiT3:
    """STDiT3 on the meta device, from `config.json` alone.

    Raises:
        ValueError: a configuration of another model.
        FileNotFoundError: none.
    """
    config = _config(folder, ("STDiT3", "STDiT3-XL/2"))
    with torch.device("meta"):
        return STDiT3(**_known(STDiT3, config))


def empty_vae(folder: Path) -> OpenSoraVAE:
    """The VAE on the meta device. Errors as of `empty_transformer`."""
    config = _config(folder, ("OpenSoraVAE", "VideoAutoencoderPipeline", "OpenSoraVAE_V1_2"))
    with torch.device("meta"):
        return OpenSoraVAE(**_known(OpenSoraVAE, config))


def load_text_encoder(folder: Path, dtype: torch.dtype) -> nn.Module:
    """T5's encoder, by transformers; tensors that the file lacks are an error instead of random.

    Raises:
        ValueError: a configuration of another model, missing or damaged tensors.
    """
    from transformers import T5EncoderModel
    from transformers.utils import logging

    _config(folder, ("t5", "T5EncoderModel", "T5Model", "T5ForConditionalGeneration"))
    bar = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with _readable(folder):
            model, report = T5EncoderModel.from_pretrained(
                folder, dtype=dtype, local_files_only=True, output_loading_info=True
            )
    finally:
        if bar:
            logging.enable_progress_bar()
    missing = sorted(report["missing_keys"])
    if missing:
        raise ValueError(f"{folder}: tensors are missing: {_listed(missing)}")
    return model


def load_tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def _config(folder: Path, names: tuple[str, ...]) -> dict:
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; it describes the model")
    config = read_json(path)
    found = [config.get("_class_name"), config.get("model_type"), *(config.get("architectures") or [])]
    found = [str(name) for name in found if name]
    if found and not set(found) & set(names):  # one without a name is left to the check of the tensors
        raise ValueError(f"{path}: expected the configuration of a {names[0]}, got {', '.join(found)}")
    return config


def _known(kind: type[nn.Module], config: dict) -> dict:
    """The entries that `kind` is made from; the published files also hold settings of speed and training."""
    return {name: config[name] for name in inspect.signature(kind.__init__).parameters if name in config}


def _fill(model: nn.Module, folder: Path, dtype: torch.dtype, may_be_absent: dict[str, Tensor]) -> nn.Module:
    """Give a model on the meta device its tensors."""
    wanted = {name: tensor.shape for name, tensor in model.state_dict().items()}
    loaded: dict[str, Tensor] = {}
    unexpected, misshapen = [], []
    for name, tensor in _tensors(folder):
        if name not in wanted:
            unexpected.append(name)
        elif tensor.shape != wanted[name]:
            misshapen.append(f"{name} {list(tensor.shape)} instead of {list(wanted[name])}")
        else:
            loaded[name] = tensor.to(dtype)
    for name, value in may_be_absent.items():
        loaded.setdefault(name, value.to(dtype))
    missing = [name for name in wanted if name not in loaded and not any(m.startswith(f"{name} ") for m in misshapen)]
    problems = {"missing": missing, "unexpected": unexpected, "of another shape": misshapen}
    if any(problems.values()):
        raise ValueError(
            f"{folder}: these are not the weights of the {type(model).__name__} that its config.json describes. "
            + " ".join(f"Tensors {what}: {_listed(names)}." for what, names in problems.items() if names)
        )
    model.load_state_dict(loaded, assign=True)
    return model.eval().requires_grad_(False)


def _tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the files in `folder`, one in memory at a time."""
    for path in weight_files(folder):
        with _readable(path):
            if path.suffix == ".safetensors":
                with safe_open(path, framework="pt") as file:
                    for name in file.keys():  # noqa: SIM118  (not a dict)
                        yield name, file.get_tensor(name)
            else:
                state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
                if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
                    raise ValueError(f"{path}: expected a dictionary of tensors, as torch.save writes a state dict")
                yield from state.items()


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Say which file is damaged, and what to do."""
    try:
        yield
    except (SafetensorError, pickle.UnpicklingError, EOFError, RuntimeError) as error:
        first = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(f"{path}: damaged or incomplete ({first}); delete it and download it again") from error


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
