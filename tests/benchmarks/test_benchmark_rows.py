"""Rows on disk: what is accepted, what is kept, what counts."""

import json

import pytest

from benchmarks import rows
from benchmarks.cases import SIZE, Case, selection

CASE = Case("layer", "both", SIZE, 256, layer="relu3_1")


def test_rows_are_added_and_come_back(tmp_path, make_row):
    path = tmp_path / "new folder" / "results.json"
    first, second = make_row(CASE, "eager", 0.5), make_row(CASE, "simd", 0.05, 123)
    rows.append(path, [first])
    rows.append(path, [second])
    assert rows.load([path]) == [first, second]
    assert len(path.read_text().splitlines()) == 4  # a row a line
    assert [file.name for file in path.parent.iterdir()] == ["results.json"]


def test_a_write_that_fails_leaves_the_old_file(tmp_path, make_row, monkeypatch):
    path = tmp_path / "results.json"
    rows.append(path, [make_row(CASE, "eager", 0.5)])
    before = path.read_text()

    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="no space"):
        rows.append(path, [make_row(CASE, "simd", 0.05)])
    assert path.read_text() == before
    assert [file.name for file in tmp_path.iterdir()] == ["results.json"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seconds": {"p20": 0.2, "p50": 0.1, "p80": 0.3}}, "p20 <= p50 <= p80"),
        ({"seconds": {"p20": 0.1, "p50": float("nan"), "p80": 0.3}}, "p20 <= p50 <= p80"),
        ({"rounds": 0}, "rounds: expected at least 1"),
        ({"frames": "24"}, "frames: expected int, got '24'"),
        ({"peak_bytes": 1.5}, "peak_bytes: expected int or NoneType, got 1.5"),
        ({"schema": 7}, "schema: expected 1, got 7"),
        ({"machine": {"slug": "x"}}, "machine.cpu is missing"),
        ({"speed": 3}, "speed is unknown"),
    ],
)
def test_what_is_no_row_is_refused_and_named(tmp_path, make_row, change, message):
    path = tmp_path / "results.json"
    path.write_text(json.dumps([make_row(CASE, "eager", 0.5), {**make_row(CASE, "eager", 0.5), **change}]))
    with pytest.raises(ValueError, match=r"results\.json, row 2") as caught:
        rows.load([path])
    assert message in str(caught.value)
    with pytest.raises(ValueError, match="new row"):
        rows.append(tmp_path / "other.json", [{**make_row(CASE, "eager", 0.5), **change}])
    assert not (tmp_path / "other.json").exists()


@pytest.mark.parametrize("content", ["{}", "[", "\xff", '"rows"'])
def test_a_damaged_file_is_refused(tmp_path, content):
    path = tmp_path / "results.json"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match=r"results\.json: expected a JSON list of rows"):
        rows.load([path])


def test_the_newest_row_counts_and_keeps_what_it_did_not_measure(make_row):
    old = make_row(CASE, "simd", 0.5, 100, time="2026-01-01T00:00:00+00:00")
    peak = make_row(CASE, "simd", None, 200, time="2026-01-03T00:00:00+00:00")
    other = make_row(CASE, "simd", 0.9, 300, threads=1)
    found = {row["threads"]: row for row in rows.newest([peak, other, old])}
    assert found[1] == other
    assert found[2]["seconds"]["p50"] == 0.5
    assert found[2]["peak_bytes"] == 200
    assert found[2]["time"] == peak["time"]


def test_selections_have_no_case_twice_and_the_short_ones_are_part_of_the_full_one():
    quick, subset, full = (selection(level) for level in ("quick", "subset", "full"))
    for chosen in (quick, subset, full):
        names = [measurement.name for measurement in chosen]
        assert len(set(names)) == len(names)
    assert set(subset) < set(full)
    timed = [m for m in full if m.case.kind == "video" and not m.case.memory_only and m.provider == "simd"]
    assert {(m.case.size, m.case.frames, m.case.num_projections) for m in timed if m.case.reading == "vcd"} == {
        (size, frames, k) for size in ((272, 368), (480, 832)) for frames in (1, 8, 24, 49) for k in (32, 256)
    }
    assert {m.provider for m in full} >= {"eager", "compile", "published", "reference", "simd", "triton", "vgg19"}
