import json

from vcd_fast.training import log
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


def test_a_line_is_on_disk_before_the_log_is_closed(tmp_path):
    run = RunLog(tmp_path, 0, tensorboard=False)
    run.write("train", 0, reward=1.0)
    assert json.loads((tmp_path / "log.jsonl").read_text())["reward"] == 1.0
    run.close()


def test_tensorboard_events_on_request(tmp_path):
    run = RunLog(tmp_path, 0, tensorboard=True)
    run.write("train", 0, reward=1.0, seconds={"decode": 0.5})
    run.close()
    assert list((tmp_path / "tensorboard").glob("events.*"))
