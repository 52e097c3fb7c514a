"""docs/memory.md says what its data say, and its data what the code does."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from vcd_fast.config import compose
from vcd_fast.training.estimate import estimate

ROOT = Path(__file__).parents[1]


@pytest.fixture
def tool(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tools")
    spec = importlib.util.spec_from_file_location("memory_table", ROOT / "tools" / "memory_table.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_tables_are_those_of_the_data(tool):
    page, data = tool.PAGE.read_text(), json.loads(tool.DATA.read_text())
    assert tool.with_tables(page, data) == page
    assert list(data["runs"]) == list(tool.RUNS)


def test_the_data_are_those_of_the_code(tool):
    name = "Open-Sora, `240p`"
    family, preset, changes, gpus = tool.RUNS[name]
    found = estimate(compose(family, preset, {"data": {"pictures": "."}}, changes), gpus)
    said = json.loads(tool.DATA.read_text())["runs"][name]["phases"]
    assert {phase.name for phase in found.phases} == set(said)
    for phase in found.phases:
        assert phase.total == pytest.approx(said[phase.name]["bytes"], rel=0.02), phase.name
