"""LoRA weights on disk: one form in memory, three formats in files.

| format    | files                                           | keys                                            | read by            |
| diffusers | pytorch_lora_weights.safetensors                | transformer.blocks.0.attn1.to_q.lora_A.weight   | load_lora_weights  |
| peft      | adapter_model.safetensors, adapter_config.json  | base_model.model.blocks.0.attn1.to_q.lora_A...  | PeftModel          |
| comfy     | NAME.safetensors                                | diffusion_model.blocks.0.self_attn.q.lora_A...  | ComfyUI            |

The scale of a LoRA is alpha / rank. Diffusers files carry alpha in the metadata entry `lora_adapter_metadata` (without it every
loader takes alpha = rank), peft in `adapter_config.json`, comfy in a scalar `.alpha` beside every pair of matrices.
"""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vcd_fast.models.base import FAMILIES, family

Format = Literal["diffusers", "peft", "comfy"]
FORMATS = ("diffusers", "peft", "comfy")
DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
PEFT_FILE, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
METADATA = "lora_adapter_metadata"
FAMILY = "vcd_fast_family"
PREFIXES: dict[str, str] = {"diffusers": "transformer.", "peft": "base_model.model.", "comfy": "diffusion_model."}
A, B = ".lora_A.weight", ".lora_B.weight"


@dataclasses.dataclass(frozen=True)
class LoRAWeights:
    """The pairs of matrices of a LoRA by the name of the module they belong to."""

    tensors: dict[str, Tensor]
    """`<module>.lora_A.weight` [rank, in] and `<module>.lora_B.weight` [out, rank]"""
    alpha: dict[str, float]
    """by module; what is added to the module's output is alpha / rank * B A x"""
    family: str | None = None
    targets: tuple[str, ...] = ()
    """suffixes of module names that name exactly these modules, if known"""

    @property
    def modules(self) -> list[str]:
        return sorted(key.removesuffix(A) for key in self.tensors if key.endswith(A))

    def rank(self, module: str) -> int:
        return self.tensors[module + A].shape[0]

    def config(self) -> dict[str, Any]:
        """What PEFT's `LoraConfig` needs to rebuild it: the commonest rank and alpha, and patterns for modules that differ."""
        ranks = {module: self.rank(module) for module in self.modules}
        rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, self.alpha))
        return {
            "r": rank,
            "lora_alpha": _whole(alpha),
            "target_modules": sorted(self.targets or self.modules),
            "rank_pattern": {module: value for module, value in ranks.items() if value != rank},
            "alpha_pattern": {module: _whole(value) for module, value in self.alpha.items() if value != alpha},
            "lora_dropout": 0.0,
            "bias": "none",
            "use_rslora": False,
            "use_dora": False,
        }


def write_lora(path: str | os.PathLike[str], weights: LoRAWeights, format: Format = "diffusers") -> Path:
    """Write `weights` and return the file they are in; nothing half-written is left.

    `path` is a folder, or for diffusers and comfy a file that ends in `.safetensors`. The files' dtypes are the tensors'.

    Raises:
        ValueError: unknown format, or one that the family does not have.
        OSError: the file cannot be written.
    """
    if format not in FORMATS:
        raise ValueError(f"format: expected one of {', '.join(FORMATS)}, got {format!r}")
    path = Path(path)
    tensors = {key: value.detach().cpu().contiguous() for key, value in weights.tensors.items()}
    metadata = {"format": "pt", **({FAMILY: weights.family} if weights.family else {})}
    named = path.suffix == ".safetensors"
    if format == "peft":
        if named:
            raise ValueError(f"path: the peft format is a folder of two files, got the file name {path}")
        config = {**weights.config(), "peft_type": "LORA", "task_type": None, "base_model_name_or_path": None}
        _replace(path / PEFT_CONFIG, lambda partial: partial.write_text(json.dumps(config, indent=2, sort_keys=True)))
        return _save(path / PEFT_FILE, {PREFIXES["peft"] + key: value for key, value in tensors.items()}, metadata)
    if format == "comfy":
        to_comfy = _comfy_names(weights.family)
        renamed = {}
        for module in weights.modules:
            name = PREFIXES["comfy"] + to_comfy(module)
            renamed[name + A], renamed[name + B] = tensors[module + A], tensors[module + B]
            renamed[name + ".alpha"] = torch.tensor(float(weights.alpha[module]))
        return _save(path if named else path / "lora_comfy.safetensors", renamed, metadata)
    config = {PREFIXES["diffusers"] + key: value for key, value in weights.config().items()}
    metadata[METADATA] = json.dumps(config, indent=2, sort_keys=True)
    prefixed = {PREFIXES["diffusers"] + key: value for key, value in tensors.items()}
    return _save(path if named else path / DIFFUSERS_FILE, prefixed, metadata)


def read_lora(path: str | os.PathLike[str], family_name: str | None = None) -> LoRAWeights:
    """Read a LoRA of any of the three formats: a file, or the folder that holds one.

    Args:
        family_name: of the model, where the file does not say; needed for comfy files of other tools.

    Raises:
        FileNotFoundError: there is no LoRA at `path`.
        ValueError: not a LoRA, or of a format that is not known; the message shows its keys.
    """
    file = _find(Path(path))
    try:
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata() or {}
            raw = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118  (not a dict)
    except SafetensorError as error:
        raise ValueError(f"{file}: not a whole safetensors file ({error})") from error
    written_for = metadata.get(FAMILY)
    if family_name and written_for and family_name != written_for:
        raise ValueError(f"{file}: this LoRA is for {written_for}, not for {family_name}")
    family_name = family_name or written_for
    format = next((f for f, prefix in PREFIXES.items() if raw and all(key.startswith(prefix) for key in raw)), None)
    if format is None:
        raise ValueError(
            f"{file}: expected LoRA keys that start with {', '.join(PREFIXES.values())}; got {', '.join(sorted(raw)[:3]) or 'no tensors'}"
        )
    stripped = {key.removeprefix(PREFIXES[format]): value for key, value in raw.items()}
    if format == "comfy":
        return _from_comfy(file, stripped, family_name)
    config = _config(file, format, metadata)
    modules = _pairs(file, stripped)
    default = config.get("lora_alpha")
    if default is None:
        warnings.warn(f"{file} does not say what alpha is; alpha = rank is assumed, as diffusers does", stacklevel=2)
    patterns = config.get("alpha_pattern") or {}
    alpha = {
        module: float(_pattern(patterns, module) or (stripped[module + A].shape[0] if default is None else default))
        for module in modules
    }
    if config.get("use_dora") or config.get("use_rslora"):
        raise ValueError(f"{file}: DoRA and rank-stabilised LoRA are not supported")
    targets = config.get("target_modules") or ()
    return LoRAWeights(stripped, alpha, family_name, tuple(sorted(targets)) if not isinstance(targets, str) else ())


def export_lora(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    format: Format | str,
    *,
    family_name: str | None = None,
    dtype: torch.dtype | None = None,
) -> Path:
    """Convert the LoRA at `source`, of whichever format, to `format` at `target`; returns the file of weights.

    `format` may also be one that the family alone has, a key of its `LORA_FORMATS` (Open-Sora: `vader`). `dtype` casts the matrices (None: as they are). Arguments and errors as of `read_lora` and `write_lora`.
    """
    weights = read_lora(source, family_name)
    if dtype is not None:
        weights = dataclasses.replace(weights, tensors={k: v.to(dtype) for k, v in weights.tensors.items()})
    own = getattr(family(weights.family), "LORA_FORMATS", {}) if weights.family else {}
    if format in own:
        return own[format](target, weights)
    return write_lora(target, weights, format)


def _find(path: Path) -> Path:
    if path.is_file():
        return path
    for name in (DIFFUSERS_FILE, PEFT_FILE):
        if (path / name).is_file():
            return path / name
    if not path.exists():
        raise FileNotFoundError(f"lora: no such file or folder: {path}")
    others = sorted(path.glob("*.safetensors"))
    if len(others) == 1:
        return others[0]
    raise FileNotFoundError(
        f"lora: {path} holds neither {DIFFUSERS_FILE} nor {PEFT_FILE}, and {len(others)} other .safetensors files; name the file"
    )


def _config(file: Path, format: str, metadata: Mapping[str, str]) -> dict[str, Any]:
    try:
        if format == "peft":
            path = file.parent / PEFT_CONFIG
            if not path.is_file():
                raise FileNotFoundError(f"lora: {path} is missing; it holds the rank and alpha of {file.name}")
            return json.loads(path.read_text())
        packed = json.loads(metadata.get(METADATA, "{}"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{file}: its description is not JSON: {error}") from error
    return {key.removeprefix(PREFIXES["diffusers"]): value for key, value in packed.items()}


def _pairs(file: Path, tensors: Mapping[str, Tensor]) -> list[str]:
    modules = {key.removesuffix(A).removesuffix(B) for key in tensors}
    wrong = [key for key in tensors if not key.endswith((A, B))]
    halves = [module for module in modules if module + A not in tensors or module + B not in tensors]
    if wrong or halves:
        raise ValueError(f"{file}: expected pairs *{A}, *{B}; got {', '.join(sorted(wrong or halves)[:3])}")
    for module in modules:
        a, b = tensors[module + A], tensors[module + B]
        if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
            raise ValueError(
                f"{file}: expected A [rank, in] and B [out, rank] of {module}, got {list(a.shape)} and {list(b.shape)}"
            )
    return sorted(modules)


def _from_comfy(file: Path, tensors: Mapping[str, Tensor], family_name: str | None) -> LoRAWeights:
    to_model = _comfy_names(family_name, back=True)
    found, alpha = {}, {}
    for key, value in tensors.items():
        module, dot, kind = key.partition(".lora_")
        if dot:
            found[f"{to_model(module)}.lora_{kind.replace('down', 'A').replace('up', 'B')}"] = value
        elif key.endswith(".alpha"):
            alpha[to_model(key.removesuffix(".alpha"))] = float(value)
        else:
            raise ValueError(f"{file}: expected lora_A, lora_B and alpha only, got {key}")
    modules = _pairs(file, found)
    return LoRAWeights(found, {m: alpha.get(m, float(found[m + A].shape[0])) for m in modules}, family_name)


def _comfy_names(family_name: str | None, back: bool = False) -> Callable[[str], str]:
    if family_name is None:
        raise ValueError(f"family: this file does not say which model it is for; name one of {', '.join(FAMILIES)}")
    wanted = "model_module_name" if back else "comfy_module_name"
    convert = getattr(family(family_name), wanted, None)
    if convert is None:
        raise ValueError(f"format: there is no comfy format for {family_name}; use diffusers or peft")
    return convert


def _pattern(patterns: Mapping[str, float], module: str) -> float | None:
    return next((value for name, value in patterns.items() if module == name or module.endswith(f".{name}")), None)


def _whole(value: float) -> float | int:
    return int(value) if float(value).is_integer() else float(value)


def _save(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> Path:
    return _replace(path, lambda partial: save_file(tensors, partial, metadata=metadata))


def _replace(path: Path, write: Callable[[Path], Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".partial")
    os.close(handle)
    try:
        write(Path(name))
        os.chmod(name, 0o666 & ~_umask())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    return path


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
