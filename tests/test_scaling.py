"""docs/scaling.md says what was counted, and the counts are those of the algorithms."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def tool():
    sys.path.insert(0, str(ROOT / "tools"))
    spec = importlib.util.spec_from_file_location("scaling_table", ROOT / "tools" / "scaling_table.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.path.remove(str(ROOT / "tools"))


@pytest.fixture(scope="module")
def counted(tool):
    found = json.loads((ROOT / "docs" / "data" / "scaling.json").read_text())
    found["multiples"] = tool.multiples(found["processes"]["2"])
    return found


def test_the_page_shows_the_data(tool, counted):
    assert tool.tables(counted) in (ROOT / "docs" / "scaling.md").read_text()


def test_counts_are_those_of_the_algorithms(counted):
    units = counted["multiples"]
    expected = {"gradients, zero 0": 2, "gradients, zero 1": 2, "gradients, zero 2": 2, "gradients, zero 3": 1}
    expected |= {"new values, zero 0": 0, "new values, zero 1": 1, "new values, zero 2": 1}
    expected |= {"gradients, zero 0, two micro-steps": 2, "gradients, zero 2, two micro-steps": 4}
    expected |= {"weights, zero 3, per forward": 1}
    assert {name: units[name] for name in expected} == pytest.approx(expected, abs=0.02)


def test_alone_a_process_sends_nothing_of_size(counted):
    for name, case in counted["processes"]["1"].items():
        sent = {kind: size for kind, size in case["bytes"].items() if kind != "allgather_base"}
        assert "3" in name or sum(sent.values()) <= sum(counted["processes"]["2"][name]["bytes"].values())


def test_reckoned_for_real_models(tool, counted):
    rows = {(row["model"], row["stage"], row["gpus"]): row for row in tool.reckon(counted)}
    small, large = (rows[name, "3", 8] for name in tool.MODELS)
    assert small["weights"] == pytest.approx(1.5644e9 * 2 / 8, rel=0.01)
    # 60 forwards and two backwards, bfloat16, seven of eight parts from others
    assert large["per_clip"] == pytest.approx(62 * 16.39e9 * 2 * 7 / 8, rel=0.03)
    assert rows["Wan 2.1 14B", "0", 8]["per_update"] == pytest.approx(2 * 104.9e6 * 4 * 7 / 8, rel=0.01)
