"""Encodings on disk: every picture and prompt is encoded once, whichever run and rank needs it next."""

from __future__ import annotations

import logging
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vcd_fast.models.base import Condition, Encoder

logger = logging.getLogger(__name__)

VERSION = 1
POLL_SECONDS = 0.2


class EncodingItem(NamedTuple):
    """What one clip is generated from, before encoding."""

    image: Tensor
    """[3, H, W] float32 in [0, 1]"""
    prompt: str
    negative_prompt: str = ""


class CachedConditions(Sequence[Condition]):
    """Conditions of batch size one in files, read when they are asked for."""

    def __init__(self, condition_type: type[Condition], paths: Sequence[Path]) -> None:
        self.condition_type = condition_type
        self.paths = list(paths)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Condition:
        path = self.paths[index]
        try:
            return self.condition_type.load(path)
        except (SafetensorError, OSError) as error:
            raise OSError(
                f"{path}: this cached encoding cannot be read ({error}); delete it and start again"
            ) from error


def encode_all(
    encoder: Encoder,
    items: Sequence[EncodingItem],
    folder: str | os.PathLike[str],
    height: int,
    width: int,
    num_frames: int,
    *,
    batch_size: int = 64,
    on_progress: Callable[[int, int], None] | None = None,
) -> CachedConditions:
    """The condition of every item, from `folder` where it is there, else from `encoder`, which is not asked if all are.

    Several processes may do this at once in one folder, with the same items or with shares of them: each item is encoded by one of them, and
    every process returns when all of its items are there. Files are written whole or not at all; one that cannot be read is written
    anew, with a notice.

    Args:
        batch_size: items per call of `encoder.encode`, which loads its weights anew; their encodings are in memory together.
        on_progress: called with (items there, items in all).

    Raises:
        OSError: the folder cannot be written.
    """
    folder = Path(folder)
    locks = folder / ".locks"
    locks.mkdir(parents=True, exist_ok=True)
    keys = [encoding_key(item, height, width, num_frames, encoder.fingerprint) for item in items]
    paths = [folder / f"{key}.safetensors" for key in keys]
    conditions = CachedConditions(encoder.condition_type, paths)
    missing = {key: item for key, item, path in zip(keys, items, paths, strict=True) if not _whole(path)}

    def report() -> None:
        if on_progress is not None:
            on_progress(sum(key not in missing for key in keys), len(keys))

    report()
    while missing:
        taken: dict[str, FileLock] = {}
        try:
            for key in list(missing):
                lock = FileLock(locks / f"{key}.lock")
                try:
                    lock.acquire(blocking=False)
                except Timeout:
                    continue  # another process is at it
                if _whole(folder / f"{key}.safetensors"):
                    lock.release()
                    del missing[key]
                    continue
                taken[key] = lock
                if len(taken) == batch_size:
                    break
            if taken:
                _encode(encoder, {key: missing[key] for key in taken}, folder, height, width, num_frames)
        finally:
            for lock in taken.values():
                lock.release()
        for key in taken:
            del missing[key]
        report()
        if missing and not taken:
            time.sleep(POLL_SECONDS)
    return conditions


def encoding_key(item: EncodingItem, height: int, width: int, num_frames: int, fingerprint: str) -> str:
    """Names an encoding: everything it depends on, hashed."""
    digest = sha256()
    for part in (
        VERSION,
        fingerprint,
        height,
        width,
        num_frames,
        list(item.image.shape),
        item.prompt,
        item.negative_prompt,
    ):
        encoded = str(part).encode()
        digest.update(len(encoded).to_bytes(8, "little") + encoded)
    digest.update(item.image.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
    return digest.hexdigest()


def _encode(
    encoder: Encoder, items: dict[str, EncodingItem], folder: Path, height: int, width: int, num_frames: int
) -> None:
    values = list(items.values())
    images = torch.stack([item.image for item in values])
    prompts, negative_prompts = [item.prompt for item in values], [item.negative_prompt for item in values]
    encoded = encoder.encode(images, prompts, negative_prompts, height, width, num_frames)
    for key, condition in zip(items, encoded.split(), strict=True):
        handle, partial = tempfile.mkstemp(dir=folder, prefix=f".{key}.", suffix=".partial")
        os.close(handle)
        try:
            condition.save(partial)
            os.replace(partial, folder / f"{key}.safetensors")
        except BaseException:
            Path(partial).unlink(missing_ok=True)
            raise


def _whole(path: Path) -> bool:
    """Whether the file is there, with a header that is right about its length."""
    if not path.exists():
        return False
    try:
        with safe_open(path, framework="pt") as file:
            return bool(file.keys())
    except (SafetensorError, OSError) as error:
        logger.warning("%s is damaged and will be encoded again (%s)", path, error)
        return False
