"""How a command ends when its user, not the code, has to act: one message, exit code 1, no traceback."""

from __future__ import annotations

import contextlib
import os
import sys
import time
import warnings
from collections.abc import Iterator

TRACEBACK_VARIABLE = "VCD_FAST_TRACEBACK"
EXTRAS = {
    **dict.fromkeys(("av", "PIL", "rich", "typer", "matplotlib"), "cli"),
    **dict.fromkeys(
        ("diffusers", "transformers", "peft", "deepspeed", "pydantic", "yaml", "filelock", "ftfy"), "train"
    ),
    **dict.fromkeys(("triton", "xformers"), "gpu"),
    "scipy": "eval",
}
"""the extra of setup.py that brings a package"""
USER_ERRORS = (ValueError, TypeError, OSError, ImportError)


def describe(error: BaseException) -> str:
    """The message of `error` in one line of the form a person can act on."""
    if isinstance(error, ModuleNotFoundError) and error.name in EXTRAS:
        return f"{error.name} is not installed; this command needs pip install 'vcd_fast[{EXTRAS[error.name]}]'"
    if isinstance(error, OSError) and error.strerror:
        where = f": {error.filename}" if error.filename else ""
        return f"{error.strerror}{where}"
    return str(error) or type(error).__name__


def _one_line(message: Warning | str, category: type[Warning], *place: object) -> str:
    return f"warning: {message}\n" if issubclass(category, UserWarning) else f"{category.__name__}: {message}\n"


@contextlib.contextmanager
def reported_to_user() -> Iterator[None]:
    """Print errors a user can cause as one message on stderr and exit with 1; `VCD_FAST_TRACEBACK=1` shows the traceback."""
    warnings.formatwarning = _one_line
    warnings.filterwarnings("once", category=UserWarning)
    try:
        yield
    except USER_ERRORS as error:
        if os.environ.get(TRACEBACK_VARIABLE) == "1":
            raise
        if int(os.environ.get("RANK", 0)) > 0:
            # All ranks usually meet the same error; the launcher ends the others as soon as rank 0 has reported it.
            time.sleep(5)
        print(f"error: {describe(error)}", file=sys.stderr)
        print(f"(set {TRACEBACK_VARIABLE}=1 to see where this came from)", file=sys.stderr)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None
