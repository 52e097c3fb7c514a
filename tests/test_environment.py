"""docs/environment.md names the environment variables that the code reads, all of them and no others."""

import re
from collections import Counter
from pathlib import Path

from vcd_fast.distance.backends import BACKENDS
from vcd_fast.kernels.config import METHODS, PRECISIONS

ROOT = Path(__file__).parents[1]
ROWS = dict(re.findall(r"^\| `(VCD_FAST_\w+)` \| ([^|]*) \|", (ROOT / "docs" / "environment.md").read_text(), re.M))


def test_the_page_names_what_the_code_reads():
    sources = [path for folder in ("vcd_fast", "kernels") for path in (ROOT / folder).rglob("*.py")]
    found = Counter(name for path in sources for name in re.findall(r"VCD_FAST_[A-Z0-9_]+", path.read_text()))
    assert len(sources) > 80
    assert set(ROWS) == set(found)


def test_the_page_names_the_values_they_take():
    for name, values in {
        "VCD_FAST_BACKEND": BACKENDS,
        "VCD_FAST_TRITON_METHOD": METHODS,
        "VCD_FAST_TRITON_PRECISION": PRECISIONS,
    }.items():
        assert re.findall(r"`(\w+)`", ROWS[name]) == list(values)
