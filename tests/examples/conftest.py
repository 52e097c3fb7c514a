"""The examples' modules, which are not installed."""

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

if (
    "examples" not in sys.modules
):  # without the checkout's root on sys.path, where other folders would become importable too
    spec = importlib.util.spec_from_file_location(
        "examples", ROOT / "examples" / "__init__.py", submodule_search_locations=[str(ROOT / "examples")]
    )
    sys.modules["examples"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["examples"])
