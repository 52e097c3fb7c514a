"""A short `make soak`: what is not tested one by one elsewhere, on two processes."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_one_of_two_processes_killed_and_a_full_disk_leave_no_trace(tmp_path):
    words = ["--ranks", 2, "--steps", 6, "--every", 2, "--disturbances", 2, "--kinds", "kill one", "full disk"]
    command = [sys.executable, ROOT / "tools" / "soak.py", *words, "--work", tmp_path]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=600, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "soak.json").read_text())
    ends = {one["kind"]: one["exit_codes"] for one in report["disturbances"]}
    assert ends["full disk"][0] == 1
    assert -9 in ends["kill one"]
    assert report["identical"]["log lines"] == 8


COMPARISON = """
import argparse, json, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import soak
line = {"kind": "train", "step": 0, "reward": 1.0, "seconds": {"rollout": 1.0}}
for name, reward in (("same", 1.0), ("other", 1.5)):
    run = soak.Soak(argparse.Namespace(work=Path(sys.argv[2]) / name, seed=0, every=2))
    for folder, value in ((run.calm, 1.0), (run.rough, reward)):
        folder.mkdir(parents=True)
        (folder / "log.jsonl").write_text(json.dumps({**line, "reward": value}) + "\\n")
    run.expected = soak._without_measured(run.calm)
    try:
        print(run._inspect(argparse.Namespace(step=1)))
    except soak.Failed as error:
        print(error)
"""


def test_a_difference_is_found(tmp_path):
    """The comparison after a disturbance, on a log in which one number is another."""
    command = [sys.executable, "-c", COMPARISON, str(ROOT / "tools"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.stdout.splitlines() == [
        "{'logged': 1, 'checkpoint': 0}",
        "the log differs from the undisturbed one",
    ], done.stderr
