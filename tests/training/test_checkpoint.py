import dataclasses
import json
import os
import resource
import subprocess
import sys

import pytest
import torch

from vcd_fast.config import compose
from vcd_fast.training import checkpoint as checkpoints
from vcd_fast.training.checkpoint import Checkpoint


def make(step: int) -> Checkpoint:
    generator = torch.Generator().manual_seed(step)
    lora = {"blocks.0.to_q.lora_A.weight": torch.randn(2, 6, generator=generator)}
    moments = {
        f"{m}.{name}": torch.randn(2, 6, generator=generator) for name in lora for m in ("exp_avg", "exp_avg_sq")
    }
    return Checkpoint(step, step, lora, moments, {"bad_in_a_row": 0})


def test_round_trip(tmp_path):
    written = make(20)
    folder = checkpoints.save(tmp_path, written, keep=2)
    read = checkpoints.load(folder)
    assert (read.step, read.updates, read.extra) == (20, 20, {"bad_in_a_row": 0})
    for mine, theirs in ((written.lora, read.lora), (written.moments, read.moments)):
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_only_the_newest_are_kept_and_no_temporary_remains(tmp_path):
    for step in (10, 20, 30):
        checkpoints.save(tmp_path, make(step), keep=2)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir() if path.name.startswith(".")] == []
    assert [path.name for path in checkpoints.list_complete(tmp_path)] == ["step-00000020", "step-00000030"]


def test_auto_takes_the_newest_complete_one(tmp_path):
    assert checkpoints.choose(tmp_path, "auto") is None
    checkpoints.save(tmp_path, make(10), keep=3)
    newest = checkpoints.save(tmp_path, make(20), keep=3)
    (newest / ".complete").unlink()
    assert checkpoints.choose(tmp_path, "auto").step == 10


def test_an_altered_file_is_refused_and_the_one_before_offered(tmp_path):
    earlier = checkpoints.save(tmp_path, make(10), keep=3)
    newest = checkpoints.save(tmp_path, make(20), keep=3)
    path = newest / "lora.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"lora\.safetensors .* differs") as error:
        checkpoints.choose(tmp_path, "auto")
    assert str(earlier) in str(error.value)
    assert checkpoints.choose(tmp_path, str(earlier)).step == 10


def cut(path, keep=0.7):
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content))])


DAMAGES = {
    "lora cut": lambda folder: cut(folder / "lora.safetensors"),
    "moments cut": lambda folder: cut(folder / "moments.safetensors"),
    "moments empty": lambda folder: cut(folder / "moments.safetensors", 0),
    "lora missing": lambda folder: (folder / "lora.safetensors").unlink(),
    "state cut": lambda folder: cut(folder / "state.json"),
    "state empty": lambda folder: cut(folder / "state.json", 0),
    "state no text": lambda folder: (folder / "state.json").write_bytes(b"\xff\xfe"),
    "state no object": lambda folder: (folder / "state.json").write_text("[1]"),
    "step altered": lambda folder: alter(folder, '"step": 20', '"step": 21'),
    "counter altered": lambda folder: alter(folder, '"bad_in_a_row": 0', '"bad_in_a_row": 1'),
    "hash altered": lambda folder: alter(folder, '"state.json"', '"state.jsom"'),
}


def alter(folder, before, after):
    text = (folder / "state.json").read_text()
    assert before in text
    (folder / "state.json").write_text(text.replace(before, after))


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_refused_and_the_one_before_offered(tmp_path, damage):
    earlier = checkpoints.save(tmp_path, make(10), keep=3)
    newest = checkpoints.save(tmp_path, make(20), keep=3)
    DAMAGES[damage](newest)
    with pytest.raises(ValueError, match=r"resume: .*step-00000020.*--resume .*step-00000010"):
        checkpoints.choose(tmp_path, "auto")
    assert checkpoints.choose(tmp_path, str(earlier)).step == 10


def test_a_checkpoint_of_before_the_state_had_a_hash_is_read(tmp_path):
    folder = checkpoints.save(tmp_path, make(10), keep=3)
    state = json.loads((folder / "state.json").read_text())
    del state["sha256"]["state.json"]
    (folder / "state.json").write_text(json.dumps(state))
    assert checkpoints.load(folder).step == 10


def test_never_refuses_a_folder_in_use(tmp_path):
    assert checkpoints.choose(tmp_path, "never") is None
    checkpoints.save(tmp_path, make(10), keep=3)
    with pytest.raises(ValueError, match="already holds a run"):
        checkpoints.choose(tmp_path, "never")


def configured(**overlay):
    base = {"model": {"num_frames": 5}, "data": {"pictures": "p"}}
    return compose("wan", "tiny", base, overlay).as_dict()


class TestChangedSettings:
    @pytest.mark.parametrize(
        ("section", "key", "value"), [("lora", "alpha", 64), ("lora", "rank", 8), ("model", "weights", "elsewhere")]
    )
    def test_what_the_lora_is_about_may_not_change(self, section, key, value):
        checkpoint = dataclasses.replace(make(10), extra={"config": configured()})
        with pytest.raises(ValueError, match=rf"resume: .*{section}\.{key}: .* -> {value}"):
            checkpoints.changes(checkpoint, configured(**{section: {key: value}}))

    def test_what_else_decides_numbers_is_listed(self):
        checkpoint = dataclasses.replace(make(10), extra={"config": configured()})
        changed = configured(training={"learning_rate": 1.0, "output": "elsewhere", "max_train_steps": 900})
        assert checkpoints.changes(checkpoint, changed) == ["training.learning_rate: 0.02 -> 1.0"]
        assert checkpoints.changes(checkpoint, configured()) == []


def test_a_run_that_goes_on_from_an_earlier_checkpoint_forgets_the_later_ones(tmp_path):
    """Otherwise the old step 30 would be the newest for ever, and be what --resume auto takes."""
    for step in (10, 20, 30):
        checkpoints.save(tmp_path, make(step), keep=3)
    (tmp_path / "checkpoints" / ".step-00000040.tmp").mkdir()
    checkpoints.forget_after(tmp_path, 10)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000010"]


def test_a_checkpoint_of_the_same_step_is_replaced(tmp_path):
    checkpoints.save(tmp_path, make(10), keep=3)
    checkpoints.save(tmp_path, dataclasses.replace(make(10), updates=7), keep=3)
    assert checkpoints.choose(tmp_path, "auto").updates == 7


class Killed(BaseException):
    """Stands for SIGKILL."""


def kill_at(monkeypatch, module, name, call):
    """The n-th call of a function ends the process: nothing is cleaned up, either."""
    original, calls = getattr(module, name), []

    def function(*arguments, **options):
        calls.append(arguments)
        if len(calls) < call:
            return original(*arguments, **options)
        monkeypatch.setattr(checkpoints.shutil, "rmtree", lambda *a, **k: None)
        monkeypatch.setattr(checkpoints, "put_back", lambda output: None)
        raise Killed

    monkeypatch.setattr(module, name, function)


MOMENTS = [(checkpoints, "save_file", 1), (checkpoints, "save_file", 2), (checkpoints, "_hash_of_state", 1)]
MOMENTS += [(checkpoints, "sync", 1), (checkpoints, "sync", 4), (os, "rename", 1), (checkpoints, "sync", 5)]
CASES = [(moment, 20) for moment in MOMENTS] + [(moment, 10) for moment in [*MOMENTS, (os, "rename", 2)]]


@pytest.mark.parametrize(("moment", "step"), CASES, ids=lambda v: "-".join(map(str, v[1:])) if type(v) is tuple else v)
def test_killed_anywhere_while_saving_a_whole_checkpoint_remains(tmp_path, monkeypatch, moment, step):
    """With keep=1, where removing the old one too early would leave nothing; step 10 replaces the one of step 10."""
    checkpoints.save(tmp_path, make(10), keep=1)
    kill_at(monkeypatch, *moment)
    with pytest.raises(Killed):
        checkpoints.save(tmp_path, dataclasses.replace(make(step), updates=7), keep=1)
    monkeypatch.undo()
    checkpoints.put_back(tmp_path)
    found = checkpoints.choose(tmp_path, "auto")
    assert (found.step, found.updates) in {(10, 10), (step, 7)}
    checkpoints.forget_after(tmp_path, found.step)
    assert not [path.name for path in (tmp_path / "checkpoints").iterdir() if path.name.startswith(".")]


def test_everything_is_on_the_disk_before_it_has_its_name_and_the_old_goes_last(tmp_path, monkeypatch):
    checkpoints.save(tmp_path, make(10), keep=1)
    events = []
    for module, name in ((checkpoints, "sync"), (os, "rename"), (checkpoints, "_remove")):
        original = getattr(module, name)

        def recorded(path, *rest, name=name, original=original):
            events.append((name, path.name))
            return original(path, *rest)

        monkeypatch.setattr(module, name, recorded)
    checkpoints.save(tmp_path, make(20), keep=1)
    files = {("sync", name) for name in (*checkpoints.FILES, "state.json")}
    assert set(events[:3]) == files
    assert events[3:] == [
        ("sync", ".step-00000020.tmp"),
        ("rename", ".step-00000020.tmp"),
        ("sync", "checkpoints"),
        ("_remove", "step-00000010"),
    ]


FULL_DISK = """
import resource, sys
from pathlib import Path
import torch
from vcd_fast.config import compose
from vcd_fast.training import checkpoint as c
def make(step, n): return c.Checkpoint(step, step, {"a": torch.zeros(n)}, {"exp_avg.a": torch.zeros(n)}, {})
folder = Path(sys.argv[1])
c.save(folder, make(10, 100), keep=1)
resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
try:
    c.save(folder, make(20, 100000), keep=1)
except OSError as error:
    print("refused", "step-00000020" in str(error))
print(sorted(p.name for p in (folder / "checkpoints").iterdir()))
"""


def test_a_full_disk_leaves_the_old_checkpoint_and_nothing_else(tmp_path):
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[1] == resource.RLIM_INFINITY
    done = subprocess.run([sys.executable, "-c", FULL_DISK, str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["refused True", "['step-00000010']"]
