"""How files are looked at before they are read, and how they are replaced."""

from __future__ import annotations

import contextlib
import io
import os
import uuid
from collections.abc import Iterator
from pathlib import Path

PathLike = str | os.PathLike[str]


def require_content(path: Path, file: io.BufferedReader) -> None:
    """Raise ValueError if the open `file` has no bytes."""
    if os.fstat(file.fileno()).st_size == 0:
        raise ValueError(f"{path}: the file is empty (0 bytes)")


@contextlib.contextmanager
def _temporary_beside(path: Path) -> Iterator[Path]:
    """A name in the folder of `path` for what will replace it; gone afterwards, whatever happens."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        yield temporary
    except OSError as error:
        # a failed write() knows no name, and the temporary one says nothing to a user
        missing = not path.parent.is_dir()
        raise OSError(error.errno, error.strerror, str(path.parent if missing else path)) from error
    finally:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()


def replace_file(path: Path, content: io.BytesIO) -> None:
    """Make `content` the file `path`, or raise OSError naming `path` and leave things as they were."""
    with _temporary_beside(path) as temporary:
        with open(temporary, "xb") as file:
            file.write(content.getbuffer())
        os.replace(temporary, path)
