import errno
import json
import os
import resource

import pytest

from vcd_fast.training import durable, log
from vcd_fast.training.log import RunLog


def write(folder, first, last):
    run = RunLog(folder, first, tensorboard=False)
    for step in range(first, last):
        run.write("train", step, reward=-float(step), seconds={"rollout": 0.5})
    run.close()


def test_lines_come_back(tmp_path):
    write(tmp_path, 0, 3)
    assert [line["step"] for line in log.read(tmp_path / "log.jsonl")] == [0, 1, 2]


def test_a_resumed_run_repeats_its_steps_without_leaving_double_lines(tmp_path):
    write(tmp_path, 0, 5)
    write(tmp_path, 3, 6)
    lines = log.read(tmp_path / "log.jsonl")
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4, 5]


def test_a_line_cut_off_by_a_crash_is_dropped_and_the_log_stays_readable(tmp_path):
    write(tmp_path, 0, 3)
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"kind": "train", "step": 3, "rew')
    write(tmp_path, 3, 4)
    text = (tmp_path / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in text] == [0, 1, 2, 3]


def test_a_line_is_on_disk_when_write_returns(tmp_path, monkeypatch):
    run, synced = RunLog(tmp_path, 0, tensorboard=False), []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append((tmp_path / "log.jsonl").read_text()))
    run.write("train", 0, reward=1.0)
    assert json.loads(synced[0])["reward"] == 1.0
    run.close()


@pytest.fixture
def full_disk():
    """full_disk(size): files of this process cannot grow beyond it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_costs_no_step_that_was_done(tmp_path, full_disk):
    run = RunLog(tmp_path, 0, tensorboard=False)
    run.write("train", 0, reward=1.0)
    size = (tmp_path / "log.jsonl").stat().st_size
    full_disk(2 * size + size // 2)
    run.write("train", 1, reward=1.0)
    with pytest.raises(OSError, match=r"log\.jsonl") as error:
        run.write("train", 2, reward=1.0)
    assert error.value.errno == errno.EFBIG
    run.close()
    assert (tmp_path / "log.jsonl").stat().st_size == 2 * size + size // 2  # the line was cut
    assert [line["step"] for line in log.read(tmp_path / "log.jsonl")] == [0, 1]
    full_disk(resource.RLIM_INFINITY)
    write(tmp_path, 2, 4)
    assert [line["step"] for line in log.read(tmp_path / "log.jsonl")] == [0, 1, 2, 3]


def test_a_full_disk_while_a_run_goes_on_leaves_the_log_as_it_was(tmp_path, full_disk):
    write(tmp_path, 0, 5)
    before = (tmp_path / "log.jsonl").read_bytes()
    full_disk(len(before) // 2)
    with pytest.raises(OSError, match=r"log\.jsonl"):
        RunLog(tmp_path, 4, tensorboard=False)
    full_disk(resource.RLIM_INFINITY)
    assert (tmp_path / "log.jsonl").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["log.jsonl"]


def test_the_shortened_log_is_on_disk_before_it_takes_the_place_of_the_long_one(tmp_path, monkeypatch):
    write(tmp_path, 0, 5)
    events = []
    for module, name in ((durable, "sync"), (os, "replace")):
        original = getattr(module, name)

        def recorded(path, *rest, name=name, original=original):
            events.append((name, path.name))
            return original(path, *rest)

        monkeypatch.setattr(module, name, recorded)
    RunLog(tmp_path, 3, tensorboard=False).close()
    assert events == [("sync", ".log.jsonl.tmp"), ("replace", ".log.jsonl.tmp"), ("sync", tmp_path.name)]


def test_a_line_altered_in_the_middle_is_refused_not_dropped_with_all_after_it(tmp_path):
    write(tmp_path, 0, 3)
    path = tmp_path / "log.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + b"\xff" + lines[1] + lines[2])
    with pytest.raises(ValueError, match=r"log\.jsonl: line 2 of 3 was altered"):
        RunLog(tmp_path, 3, tensorboard=False)
    assert path.read_bytes().count(b"\n") == 3


def test_tensorboard_events_on_request(tmp_path):
    run = RunLog(tmp_path, 0, tensorboard=True)
    run.write("train", 0, reward=1.0, seconds={"decode": 0.5})
    run.close()
    assert list((tmp_path / "tensorboard").glob("events.*"))
