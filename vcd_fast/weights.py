"""Files of model weights: where they are, whether they are whole, and what to say when they are not.

Nothing is unpickled: `.pth` files are read with `weights_only=True`, everything else is safetensors. A download has its SHA-256
checked before it takes its final name, and again whenever the cached copy is used.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import urllib.error
import urllib.request
import warnings
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

VGG19_VARIABLE = "VCD_FAST_VGG19"
CHUNK = 1 << 22


@dataclasses.dataclass(frozen=True)
class WeightFile:
    """A file of weights that exists, and where it came from."""

    path: Path | None
    """None for weights that are made up (`random`)"""
    source: str
    """one of `path`, `variable NAME`, `hub REPOSITORY`, `url URL`, `random`"""
    sha256: str


@dataclasses.dataclass(frozen=True)
class HubFile:
    """A file of a Hugging Face repository at one commit, downloaded into huggingface_hub's cache."""

    repository: str
    filename: str
    revision: str
    sha256: str

    def __str__(self) -> str:
        return f"hub {self.repository}"

    @property
    def where(self) -> str:
        return f"https://huggingface.co/{self.repository}/resolve/{self.revision}/{self.filename}"

    def fetch(self, download: bool) -> Path:
        from huggingface_hub import constants, hf_hub_download, hf_hub_url

        if download and not constants.HF_HUB_OFFLINE:
            _reach(hf_hub_url(self.repository, self.filename, revision=self.revision))
        return Path(
            hf_hub_download(self.repository, self.filename, revision=self.revision, local_files_only=not download)
        )


@dataclasses.dataclass(frozen=True)
class UrlFile:
    """A file at a URL, downloaded into PyTorch's cache (`torch.hub.get_dir()/checkpoints`) under its own name."""

    url: str
    sha256: str
    """the hash or a beginning of it (torchvision publishes eight digits)"""

    def __str__(self) -> str:
        return f"url {self.url}"

    @property
    def where(self) -> str:
        return self.url

    def fetch(self, download: bool) -> Path:
        path = Path(torch.hub.get_dir()) / "checkpoints" / self.url.rsplit("/", 1)[1]
        if path.is_file():
            return path
        if not download:
            raise FileNotFoundError(f"not in the cache: {path}")
        _download(self.url, path, self.sha256)
        return path


VGG19_SOURCES = (
    HubFile(
        "timm/vgg19.tv_in1k",
        "model.safetensors",
        "128d4708565b3a414bcbb9bbad440b2fe37b9f18",
        "11aea017b543ff59233749d8f1cf544cda749378f5790d2fedab841fb86b7669",
    ),
    UrlFile("https://download.pytorch.org/models/vgg19-dcbb9e9d.pth", "dcbb9e9d"),
)


def file_sha256(path: str | Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _reach(url: str) -> None:
    """Raise OSError unless a server answers for `url`: huggingface_hub takes half a minute of retries to find that out."""
    try:
        urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=10).close()
    except urllib.error.HTTPError:
        return  # it answered; what it thinks of the request is huggingface_hub's affair


def _download(url: str, path: Path, sha256: str) -> None:
    """`url` -> `path` through a temporary name, refused unless its SHA-256 begins with `sha256`."""
    from huggingface_hub.utils import tqdm

    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.part")
    digest = hashlib.sha256()
    try:
        with urllib.request.urlopen(url, timeout=30) as response, open(partial, "wb") as file:
            length = response.headers.get("Content-Length")
            total = int(length) if length else None
            with tqdm(total=total, unit="B", unit_scale=True, desc=path.name) as bar:
                while chunk := response.read(CHUNK):
                    file.write(chunk)
                    digest.update(chunk)
                    bar.update(len(chunk))
        if not digest.hexdigest().startswith(sha256):
            raise ValueError(f"{url}: expected SHA-256 {sha256}…, got {digest.hexdigest()}")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def local_file(path: str | Path, argument: str) -> Path:
    """`path` as an existing file.

    Raises:
        FileNotFoundError: there is none; the message names `argument`.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        what = "a folder" if path.is_dir() else "nothing there"
        raise FileNotFoundError(f"{argument}: expected a file of weights (.safetensors or .pth), got {path} ({what})")
    return path


def resolve(
    name: str,
    sources: Sequence[HubFile | UrlFile],
    *,
    variable: str,
    path: str | Path | None = None,
    download: bool = True,
) -> WeightFile:
    """Find the weights called `name`: `path`, else the file `variable` names, else a cached copy, else a download.

    Args:
        name: what a person calls them, for messages.
        sources: where they are published, in order of preference.
        variable: environment variable that may name a file.
        path: a file given explicitly.
        download: whether to fetch what is not here.

    Returns:
        The file and its SHA-256. A file of the user's own is taken as it is; a published one is checked.

    Raises:
        FileNotFoundError: a named file is missing, or nothing is cached and nothing can be downloaded. The message says which
            file to put where.
        ValueError: a cached or downloaded file has the wrong hash.
    """
    if path is not None:
        file = local_file(path, f"weights of {name}")
        return WeightFile(file, "path", file_sha256(file))
    if os.environ.get(variable):
        file = local_file(os.environ[variable], f"environment variable {variable}")
        return WeightFile(file, f"variable {variable}", file_sha256(file))
    reasons = []
    for from_network in (False, True) if download else (False,):
        for source in sources:
            try:
                file = source.fetch(from_network)
            except Exception as error:  # whatever a network client raises ends in the one message below
                if from_network:
                    first_line = str(error).strip().splitlines()[0] if str(error).strip() else ""
                    reasons.append(f"  {source.where}: {type(error).__name__}: {first_line}")
                continue
            digest = file_sha256(file)
            if not digest.startswith(source.sha256):
                raise ValueError(
                    f"{file}: expected SHA-256 {source.sha256}, got {digest}: the file is damaged; delete it and try again"
                )
            return WeightFile(file, str(source), digest)
    published = "\n".join(f"  {source.where}" for source in sources)
    raise FileNotFoundError(
        f"weights of {name}: not on this machine"
        + (", and downloading failed:\n" + "\n".join(reasons) if download else "")
        + f"\nFetch one of these files on a machine with a network:\n{published}\n"
        f"and name it here by its path or in the environment: {variable}=/path/to/file"
    )


def read_tensors(path: str | Path, prefix: str = "") -> dict[str, Tensor]:
    """The tensors of a `.safetensors`, `.pth`, `.pt` or `.bin` file whose names start with `prefix`, on the CPU.

    Raises:
        ValueError: the file is damaged, holds no state dict or needs unpickling of more than tensors.
    """
    path = Path(path)
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                return {key: file.get_tensor(key) for key in file.keys() if key.startswith(prefix)}  # noqa: SIM118
        # torchvision's oldest files, VGG19 among them, are not in the zip format that can be mapped
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except FileNotFoundError:
        raise
    except (SafetensorError, RuntimeError, EOFError, OSError) as error:
        raise ValueError(f"{path}: damaged or not a file of weights ({error})") from error
    except Exception as error:  # pickle.UnpicklingError and whatever a foreign pickle provokes
        raise ValueError(
            f"{path}: expected a file of tensors only (safetensors, or a .pth that torch.load reads with weights_only=True), "
            f"got {type(error).__name__}: {str(error).splitlines()[0]}"
        ) from error
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path}: expected a dictionary of tensors, got {type(state).__name__}")
    return {key: value for key, value in state.items() if key.startswith(prefix)}


def require(tensors: Mapping[str, Tensor], shapes: Mapping[str, Sequence[int]], where: str | Path) -> dict[str, Tensor]:
    """The tensors named in `shapes`, each of the shape it names there.

    Raises:
        ValueError: some are missing or differ in shape; all of them are listed.
    """
    problems = []
    for key, shape in shapes.items():
        if key not in tensors:
            problems.append(f"  {key}: missing")
        elif tuple(tensors[key].shape) != tuple(shape):
            problems.append(f"  {key}: expected shape {tuple(shape)}, got {tuple(tensors[key].shape)}")
        elif not tensors[key].is_floating_point():
            problems.append(f"  {key}: expected floating-point numbers, got {tensors[key].dtype}")
    if problems:
        raise ValueError(f"{where}: not the weights that are needed:\n" + "\n".join(problems))
    return {key: tensors[key] for key in shapes}


def recipe_tensor(key: str, shape: Sequence[int]) -> Tensor:
    """Random weights that depend on nothing but their name: He-normal for matrices and filters, N(0, 0.01²) for vectors."""
    values = torch.randn(tuple(shape), generator=torch.Generator().manual_seed(zlib.crc32(key.encode())))
    if len(shape) == 1:
        return values * 0.01
    fan_in = torch.Size(shape[1:]).numel()
    return values * (2 / fan_in) ** 0.5


def load_vgg19(weights: str | Path, shapes: Mapping[str, Sequence[int]]) -> tuple[dict[str, Tensor], WeightFile]:
    """VGG19's convolutions.

    Args:
        weights: "imagenet" (the file `VCD_FAST_VGG19` names, else the published ones), a path, or "random".
        shapes: names (as in torchvision, `features.0.weight`) and shapes of the tensors wanted.

    Returns:
        float32 tensors on the CPU, and where they came from.

    Raises:
        FileNotFoundError, ValueError: see `resolve`, `read_tensors`, `require`.
    """
    if weights == "random":
        warnings.warn(
            "VGG19 has random weights, as asked for by weights='random': its distances are not the published ones",
            stacklevel=3,
        )
        tensors = {key: recipe_tensor(key, shape) for key, shape in shapes.items()}
        digest = hashlib.sha256()
        for key, value in tensors.items():
            digest.update(key.encode() + value.numpy().tobytes())
        return tensors, WeightFile(None, "random", digest.hexdigest())
    path = None if weights == "imagenet" else weights
    file = resolve("VGG19 (ImageNet)", VGG19_SOURCES, variable=VGG19_VARIABLE, path=path)
    tensors = require(read_tensors(file.path, "features."), shapes, file.path)
    return {key: value.to(torch.float32) for key, value in tensors.items()}, file
