"""How files are looked at before they are read, and how they are replaced."""

from __future__ import annotations

import contextlib
import io
import os
import uuid
from pathlib import Path

PathLike = str | os.PathLike[str]


def require_content(path: Path, file: io.BufferedReader) -> None:
    """Raise ValueError if the open `file` has no bytes."""
    if os.fstat(file.fileno()).st_size == 0:
        raise ValueError(f"{path}: the file is empty (0 bytes)")


def replace_file(path: Path, content: io.BytesIO) -> None:
    """Make `content` the file `path`, or raise OSError naming `path` and leave things as they were."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(content.getbuffer())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):  # the first error is the one to hear of
            temporary.unlink()
        if isinstance(error, OSError):
            # a failed write() knows no name, and the temporary one says nothing to a user
            named = path if path.parent.is_dir() else path.parent
            raise OSError(error.errno, error.strerror, str(named)) from error
        raise
