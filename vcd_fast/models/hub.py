"""Files of models on the Hugging Face hub and in folders, and what a user is told where they are not there."""

from __future__ import annotations

import json
from pathlib import Path


def read_json(path: Path) -> dict:
    """
    Raises:
        ValueError: not JSON, or not an object.
    """
    try:
        content = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: expected JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


def fetch_config(name: str, filename: str, revision: str | None, setting: str) -> Path:
    """A configuration of the hub's repository `name`, a few kilobytes, from the local cache or downloaded.

    Args:
        setting: what the user set to `name`, for messages.

    Raises:
        OSError: it is neither here nor can it be downloaded.
    """
    import huggingface_hub

    try:
        return Path(huggingface_hub.hf_hub_download(name, filename, revision=revision))
    except OSError as error:
        raise OSError(
            f"model.{setting}: {filename} of {name} is not on this machine and could not be downloaded "
            f"({type(error).__name__}); name a local folder instead"
        ) from error
