"""Plots, table and targets from rows that a test made up."""

import re
import struct

import pytest

from benchmarks import report, rows, table
from benchmarks.cases import SIZE, Case
from benchmarks.lookup import by_machine, say_bytes, say_seconds
from benchmarks.targets import line_through, targets


def verdicts(found):
    (results,) = by_machine(found)
    return {target.name: (target.verdict, target.measured) for target in targets(results)}


def only(found, words):
    (name,) = (name for name in found if words in name)
    return found[name]


def test_targets_that_are_reached(run_rows):
    found = verdicts(run_rows())
    assert only(found, "five layers, one frame") == ("pass", "12.5× (5.00 s / 400 ms)")
    assert only(found, "is right")[0] == "pass"
    assert only(found, "whole loss, 24 frames") == ("pass", "6.67× (10.0 s / 1.50 s a frame)")
    verdict, said = only(found, "would keep")
    assert verdict == "pass"
    assert (
        said == "1/32.0 (750 MB of 24.0 GB, 1.00 GB a frame over 1, 2, 3 frames)"
    )  # its slope, not its peak at one frame
    assert only(found, "against 4") == ("pass", "+1.4% (740 MB, 750 MB)")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"simd_layer": 0.101}, "five layers, one frame"),
        ({"simd_frame": 2.01}, "whole loss, 24 frames"),
        ({"simd_peak": 1_210_000_000, "simd_peak_4": 1_200_000_000}, "would keep"),
        ({"simd_peak_4": 600_000_000}, "against 4"),
    ],
)
def test_a_target_that_is_missed_fails_alone(run_rows, change, words):
    found = verdicts(run_rows(**change))
    assert [name for name, (verdict, _) in found.items() if verdict == "FAIL"] == [n for n in found if words in n]


def test_a_wrong_gradient_fails_its_target(run_rows):
    made = run_rows()
    wrong = next(row for row in made if row["provider"] == "simd" and row["layer"] == "relu2_1")
    wrong["accuracy"] = {**wrong["accuracy"], "gradient_error": 0.02, "cosine": 0.9998}
    assert only(verdicts(made), "is right")[0] == "FAIL"


def test_what_has_no_rows_is_not_measured(run_rows):
    made = [row for row in run_rows() if row["layer"] != "relu4_1" and row["frames"] not in (2, 3, 4)]
    found = verdicts(made)
    assert only(found, "five layers, one frame") == ("not measured", "no rows of eager")
    assert only(found, "would keep") == ("not measured", "no rows of eager over two numbers of frames")
    assert only(found, "against 4") == ("not measured", "no rows of simd, 4 frames")


def test_rows_of_another_number_of_threads_are_not_mixed_in(run_rows):
    made = run_rows()
    alone = [{**row, "threads": 1, "seconds": None, "rounds": 0} for row in made if row["provider"] == "simd"]
    assert len(by_machine(made + alone)) == 2
    first, second = by_machine(made + alone)
    assert {row["threads"] for row in first.rows} == {1}
    assert only({t.name: t for t in targets(second)}, "five layers, one frame").verdict == "pass"


def test_gpu_targets(make_row):
    on_gpu = {
        "device": "cuda",
        "machine": {**make_row(Case("video", "both", SIZE, 256), "eager")["machine"], "gpu": "Some GPU"},
    }
    made = []
    for dtype, slow in (("float32", 1.4), ("bfloat16", 3.1)):
        case = Case("video", "both", SIZE, 256, frames=8, dtype=dtype)
        made += [make_row(case, "triton", slow, 10**9, **on_gpu), make_row(case, "vgg19", 1.0, 10**9, **on_gpu)]
    found = verdicts(made)
    assert only(found, "VGG19 alone in float32") == ("pass", "1.40× (8 frames)")
    assert only(found, "VGG19 alone in bfloat16") == ("FAIL", "3.10× (8 frames)")
    assert only(found, "would keep")[0] == "not measured"


def test_line_through_points():
    line = line_through([(1, 12), (2, 14), (3, 16)])
    assert line.frames == (1, 2, 3)
    assert line.slope == pytest.approx(2)
    assert line.at(0) == pytest.approx(10)
    assert line_through([(2, 1), (2, 3)]) is None


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(9.0123, "9.01 s"), (99.97, "100 s"), (0.41234, "412 ms"), (0.9996, "1.00 s"), (8.7e-5, "87.0 µs")],
)
def test_saying_seconds(seconds, said):
    assert say_seconds(seconds) == said


def test_saying_bytes():
    assert [say_bytes(n) for n in (1_520_000_000, 31_400_000, 12_000, 10)] == [
        "1.52 GB",
        "31.4 MB",
        "12.0 kB",
        "0.01 kB",
    ]


@pytest.fixture
def results(tmp_path, run_rows):
    path = tmp_path / "results.json"
    rows.append(path, run_rows())
    return path


def test_table_has_numbers_of_the_rows_and_says_where_they_come_from(tmp_path, results):
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n\n{table.BEGIN}\nold 77.7×\n{table.END}\n\nafter\n")
    assert report.main([str(results), "--output", str(tmp_path), "--readme", str(readme)]) == 0
    text = readme.read_text()
    assert text.startswith(f"before\n\n{table.BEGIN}\n")
    assert text.endswith(f"{table.END}\n\nafter\n")
    assert "old" not in text
    assert "| relu3_1 | 1.00 s, 1.00 GB | 80.0 ms, 100 MB | 12.5× |" in text
    assert "| all five | 5.00 s | 400 ms | 12.5× |" in text
    assert "| 272×368, 24 frames |  | 36.0 s, 750 MB |  |" in text
    assert "| 272×368, 2 frames | —, 2.70 GB |  |  |" in text
    for said in (
        "Some CPU, 2 cores",
        "2 threads",
        "torch 2.13.0",
        "commit 0123456789ab",
        "2026-01-02",
        "weights: random",
    ):
        assert said in text
    assert "busy" not in text
    table.write(readme, by_machine(rows.load([results])))
    assert readme.read_text() == text


def test_table_says_that_the_machine_was_busy(run_rows):
    made = [{**row, "load_average": 3.2} for row in run_rows()]
    assert "busy when a run began (load average 3.2)" in table.document(by_machine(made))


@pytest.mark.parametrize(
    "text", ["no markers", f"{table.END}\n{table.BEGIN}", f"{table.BEGIN}\n{table.BEGIN}\n{table.END}"]
)
def test_a_file_without_its_markers_is_left_alone(tmp_path, results, capsys, text):
    readme = tmp_path / "README.md"
    readme.write_text(text)
    assert report.main([str(results), "--output", str(tmp_path), "--readme", str(readme)]) == 2
    assert readme.read_text() == text
    assert "README.md: expected one line <!-- benchmark table: begin -->" in capsys.readouterr().err


def test_plots_are_drawn_from_rows(tmp_path, results, capsys):
    assert report.main([str(results), "--output", str(tmp_path / "plots")]) == 0
    said = capsys.readouterr().out.split()
    names = {path.name for path in (tmp_path / "plots").iterdir()}
    assert names == {"layers-some-cpu-2-cores-2t.png", "frames-some-cpu-2-cores-2t.png"}
    assert {re.sub(".*/", "", path) for path in said} == names
    for path in (tmp_path / "plots").iterdir():
        content = path.read_bytes()
        assert content[:8] == b"\x89PNG\r\n\x1a\n"
        width, height = struct.unpack(">II", content[16:24])
        assert width > 900
        assert height > 900
        assert len(content) > 20_000


def test_targets_from_the_command_line(results, capsys):
    assert report.main([str(results), "--targets"]) == 0
    said = capsys.readouterr().out
    assert "pass  five layers, one frame, K=256: simd against eager PyTorch: 12.5×" in said
    assert "not measured  everything on a GPU" in said


def test_a_missed_target_is_the_exit_code(tmp_path, run_rows, capsys):
    path = tmp_path / "slow.json"
    rows.append(path, run_rows(simd_layer=0.9))
    assert report.main([str(path), "--targets"]) == 1
    assert "FAIL  five layers, one frame" in capsys.readouterr().out


def test_no_results_are_an_error(tmp_path, capsys):
    assert report.main([str(tmp_path / "none.json")]) == 2
    assert "none.json" in capsys.readouterr().err
