"""The session on a GPU, without one: its plan, what it does again and what not; and which packages a wheelhouse takes."""

import contextlib
import importlib.util
import io
import json
import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
TOOLS = ROOT / "tools"
FACTS = {"machine": {"gpu": "Some GPU"}, "versions": {}, "commit": "0123456789ab"}


@pytest.fixture(scope="module")
def load():
    """load(name) -> a tool as a module; its siblings can be imported by it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [*sys.path, str(TOOLS)])

        def get(name):
            spec = importlib.util.spec_from_file_location(name, TOOLS / f"{name}.py")
            module = importlib.util.module_from_spec(spec)
            patch.setitem(sys.modules, name, module)
            spec.loader.exec_module(module)
            return module

        yield get


@pytest.fixture(scope="module")
def session(load):
    return load("gpu_session")


@pytest.fixture(scope="module")
def parts_tool(load):
    return load("gpu_parts")


@pytest.fixture(scope="module")
def training(load, parts_tool):
    return load("gpu_training")


@pytest.fixture(scope="module")
def wheelhouse(load):
    return load("wheelhouse")


def part(session, name, code, goes_on=False):
    """A part that is a line of Python; `folder` is known to it."""
    return session.Part(
        name,
        f"what {name} finds",
        0.01,
        lambda folder: [sys.executable, "-c", f"folder = {str(folder)!r}\n{code}"],
        goes_on,
    )


@pytest.fixture
def call(session, tmp_path, monkeypatch):
    """call(parts, *words) -> exit code and what was printed, as if there were a GPU."""
    monkeypatch.setattr(session, "has_gpu", lambda: True)
    monkeypatch.setattr(session, "facts", lambda folder, commit: FACTS)

    def run(parts, *words):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            code = session.main(["--output", str(tmp_path / "gpu"), *words], parts)
        return code, printed.getvalue()

    return run


def record(tmp_path, name):
    return json.loads((tmp_path / "gpu" / f"{name}.json").read_text())


COUNTS = "open(folder + '/runs', 'a').write('x')"


class TestPlan:
    def test_dry_run_prints_every_part_and_runs_nothing(self, session, tmp_path, capsys):
        assert session.main(["--output", str(tmp_path / "gpu"), "--dry-run"]) == 0
        printed = capsys.readouterr().out
        for each in session.PARTS:
            assert f"\n{each.name}: " in f"\n{printed}"
            assert f"about {each.minutes:g} min" in printed
        assert not (tmp_path / "gpu").exists()

    def test_only_the_parts_asked_for(self, session, capsys):
        session.main(["--dry-run", "--parts", "kernels"])
        assert "time_kernels.py --json" in capsys.readouterr().out
        with pytest.raises(SystemExit):
            session.main(["--dry-run", "--parts", "nothing"])

    def test_scripts_and_tests_of_the_plan_exist(self, session, tmp_path):
        for each in session.PARTS:
            words = each.command(tmp_path)
            named = [w.removeprefix("--ignore=") for w in words if w.endswith((".py", "tests/kernels", "benchmarks/"))]
            assert named, each.name
            assert all((ROOT / name).exists() for name in named)

    def test_every_test_marked_gpu_is_in_a_part(self):
        marked = [path for path in (ROOT / "tests").rglob("test_*.py") if "mark.gpu" in path.read_text()]
        marked.remove(Path(__file__))
        assert {path.relative_to(ROOT).as_posix() for path in marked} == {"tests/kernels/test_gpu_sizes.py"}

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
    def test_without_a_gpu_it_refuses(self, session, tmp_path, capsys):
        assert session.main(["--output", str(tmp_path / "gpu")]) == 2
        assert "there is no GPU that PyTorch can use" in capsys.readouterr().err
        assert not (tmp_path / "gpu").exists()


class TestResume:
    def test_a_complete_part_is_skipped_unless_again(self, session, call, tmp_path):
        parts = [part(session, "counts", COUNTS)]
        for words, runs in (((), "x"), ((), "x"), (("--again",), "xx")):
            code, printed = call(parts, *words)
            assert (code, (tmp_path / "gpu" / "runs").read_text()) == (0, runs)
            assert "counts             complete" in printed
        found = record(tmp_path, "counts")
        assert (found["status"], found["calls"], found["commit"]) == ("complete", 1, FACTS["commit"])
        assert found["machine"] == FACTS["machine"]

    def test_a_failed_part_is_run_again_and_the_others_too(self, session, call, tmp_path):
        code = f"{COUNTS}\nraise SystemExit(0 if len(open(folder + '/runs').read()) > 1 else 3)"
        parts = [part(session, "fails_once", code), part(session, "fine", "print('hello')")]
        code, _ = call(parts)
        assert code == 1
        assert "ended with 3" in record(tmp_path, "fails_once")["reason"]
        assert record(tmp_path, "fine")["status"] == "complete"
        assert "hello" in (tmp_path / "gpu" / "fine.log").read_text()
        assert call(parts)[0] == 0
        assert record(tmp_path, "fails_once")["calls"] == 2

    def test_what_is_left_is_not_a_failure(self, session, call, tmp_path):
        parts = [
            part(session, "more", "raise SystemExit(75)", goes_on=True),
            part(session, "no", "raise SystemExit(69)"),
        ]
        assert call(parts)[0] == session.MORE
        assert [record(tmp_path, name)["status"] for name in ("more", "no")] == ["partial", "not available"]

    def test_the_clock_stops_a_part_and_what_it_started(self, session, call, tmp_path):
        """Twice the same: one has something to show for it and can go on, the other has not."""
        child = (
            "import subprocess, sys, time\nsubprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        )
        sleeps = f"{child}open(folder + '/%s.done', 'w').write('passed one\\n')\ntime.sleep(60)"
        for name, goes_on, status, exit_code in (("on", True, "partial", 75), ("off", False, "failed", 1)):
            started = time.monotonic()
            code, _ = call([part(session, name, sleeps % name, goes_on)], "--minutes", "0.02")
            assert (code, record(tmp_path, name)["status"]) == (exit_code, status)
            assert time.monotonic() - started < 8
        assert record(tmp_path, "on")["tests"] == {"passed": 1}

    def test_without_time_nothing_more_is_begun(self, session, call, tmp_path):
        parts = [part(session, "first", "import time; time.sleep(0.3)"), part(session, "second", "")]
        assert call(parts, "--minutes", "0.012")[0] == session.MORE
        assert not (tmp_path / "gpu" / "second.json").exists()
        assert call(parts)[0] == 0

    def test_one_file_to_carry(self, session, call, tmp_path):
        call([part(session, "counts", COUNTS)], "--bundle", str(tmp_path / "all.tar.gz"))
        with tarfile.open(tmp_path / "all.tar.gz") as archive:
            assert {"counts.json", "counts.log", "runs"} <= set(archive.getnames())

    def test_rows_without_a_commit_get_it(self, session, call, tmp_path):
        row = 'open(folder + \'/rows.rows.json\', \'w\').write(\'[{"commit": "unknown"}, {"commit": "abc"}]\')'
        call([part(session, "rows", row)])
        rows = json.loads((tmp_path / "gpu" / "rows.rows.json").read_text())
        assert [r["commit"] for r in rows] == [FACTS["commit"], "abc"]

    def test_a_damaged_record_is_named(self, session, call, tmp_path, capsys):
        (tmp_path / "gpu").mkdir()
        (tmp_path / "gpu" / "counts.json").write_text("{")
        assert call([part(session, "counts", COUNTS)])[0] == 1
        assert "counts.json: expected JSON" in capsys.readouterr().err


TESTS = """
import pytest, pathlib
def test_a(): pass
def test_b(): pytest.skip("not here")
def test_c(): assert pathlib.Path(__file__).with_name("fixed").exists()
@pytest.fixture
def broken():
    yield
    assert pathlib.Path(__file__).with_name("fixed").exists()
def test_d(broken): pass
"""


def test_pytest_goes_on_where_it_was_stopped(tmp_path):
    (tmp_path / "test_some.py").write_text(TESTS)
    done = tmp_path / "some.done"

    def run(seconds):
        environment = {
            **os.environ,
            "PYTHONPATH": str(TOOLS),
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
            "GPU_SESSION_DONE": str(done),
            "GPU_SESSION_UNTIL": str(time.time() + seconds),
        }
        command = [sys.executable, "-m", "pytest", "-q", "-p", "gpu_resume", "-p", "no:cacheprovider", "--rootdir", "."]
        result = subprocess.run([*command, "."], cwd=tmp_path, env=environment, capture_output=True, text=True)
        lines = done.read_text().splitlines() if done.exists() else []
        return result.returncode, [line.replace("test_some.py::test_", "") for line in lines], result.stdout

    assert run(-1)[:2] == (75, [])
    code, lines, _ = run(60)
    assert (code, lines) == (1, ["passed a", "skipped b"]), "what failed, even in its teardown, is not finished"
    (tmp_path / "fixed").touch()
    code, lines, printed = run(60)
    assert (code, lines) == (0, ["passed a", "skipped b", "passed c", "passed d"])
    assert "2 passed, 2 deselected" in printed


class TestParts:
    def test_kernels_run(self, parts_tool):
        """Without the comparisons of rows, which have a test of their own: they take the interpreter long."""
        device = "cuda" if torch.cuda.is_available() else "cpu"
        ran = parts_tool.every_kernel(device, lengths=(), shapes=((3, 4, 5),), methods=("sort",))
        assert ran == ["project (3, 4, 5)", "spectrum_gradient (3, 4, 5)", "distance by sort"]

    @pytest.mark.parametrize(
        ("check", "code", "output", "status"),
        [
            ("memcheck", 0, "========= ERROR SUMMARY: 0 errors", "clean"),
            ("memcheck", 9, "Invalid __global__ read\n========= ERROR SUMMARY: 2 errors", "found"),
            ("racecheck", 0, "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)", "clean"),
            ("racecheck", 0, "========= RACECHECK SUMMARY: 3 hazards displayed (3 errors, 0 warnings)", "found"),
            ("racecheck", 0, "everything went well", "not available"),
            ("memcheck", 255, "Error: device not supported", "not available"),
            ("memcheck", 1, "Traceback\n========= ERROR SUMMARY: 0 errors", "failed"),
        ],
    )
    def test_only_the_sanitizers_summary_makes_it_clean(self, parts_tool, check, code, output, status):
        assert parts_tool.judge(check, code, output)["status"] == status


@pytest.mark.filterwarnings("ignore:.*random:UserWarning")
class TestTraining:
    """What is measured at full size on a GPU, on the tiny model and the CPU."""

    def test_every_row_is_a_configuration_that_exists(self, training):
        for name in training.PRESETS:
            rows = training.rows_of(name)
            configs = [training.config_of(name, row) for row in rows.values()]
            assert len({json.dumps(config.as_dict()) for config in configs}) == len(rows), "no row is that of another"
            assert configs[0].rollout.step_cache == "none"
            assert configs[1].rollout.step_cache == "teacache"
            assert all(config.reward.vgg19 == "random" for config in configs)
            assert (configs[0].model.height, configs[0].model.num_frames) in ((272, 25), (276, 51))

    def test_random_weights_have_the_shapes_and_dtypes_of_loaded_ones(self, training):
        from vcd_fast.models.base import family

        config = training.config_of("opensora", training.Row({"model": {"vae_dtype": "bfloat16"}}), "tiny")
        model = training.random_model(config, torch.device("cpu"))
        like = family("opensora").load_model(config.model)
        for real, loaded in ((model.transformer, like.transformer), (model.vae, like.vae)):
            kinds = [{n: (t.shape, t.dtype) for n, t in part.state_dict().items()} for part in (real, loaded)]
            assert kinds[0] == kinds[1]
        torch.testing.assert_close(model.transformer.rope.freqs, like.transformer.rope.freqs)

    def test_steps_of_the_tiny_model(self, training, monkeypatch):
        """Everything but DeepSpeed's engine, whose import takes longer than the steps."""
        small = {
            "model": {"height": 32, "width": 32, "num_frames": 5, "guidance_scale": 2},
            "rollout": {"sampling_steps": 2},
            "reward": {"num_projections": 4},
        }
        made = []

        class Engine:
            def __init__(self, transformer, parameters, settings, dtype):
                self.transformer, self.parameters, self.moved = transformer, parameters, 0
                self.optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate)
                made.append(self)

            def __call__(self, *arguments, **keywords):
                return self.transformer(*arguments, **keywords)

            def backward(self, loss, scale_wrt_gas):
                loss.backward()

            def step(self):
                before = [p.detach().clone() for p in self.parameters]
                self.optimizer.step()
                self.optimizer.zero_grad()
                self.moved += any(not torch.equal(a, b) for a, b in zip(before, self.parameters, strict=True))

            def was_step_applied(self):
                return True

        engines = SimpleNamespace(
            init_distributed=lambda device: None, build=Engine, all_agree=lambda flag, device: flag
        )
        monkeypatch.setitem(sys.modules, "vcd_fast.training.engine", engines)
        monkeypatch.setattr(sys.modules["vcd_fast.training"], "engine", engines, raising=False)
        config = training.config_of("wan", training.Row({}), "tiny", small)
        found = training.measure(config, 3, torch.device("cpu"))
        assert list(found["phase_seconds"]) == ["rollout", "decode", "reward", "backward", "optimizer"]
        assert all(seconds > 0 for seconds in found["phase_seconds"].values())
        assert (found["steps"], found["computed_steps"], made[0].moved) == (3, 2, 3)

    def test_estimates_are_added_to_rows(self, training, monkeypatch):
        counted = SimpleNamespace(
            needed=9,
            phases=[SimpleNamespace(name=name, total=total) for name, total in (("encode", 99), ("decode", 4))],
        )
        monkeypatch.setattr(training, "estimate", lambda config: counted)
        row = {"row": "teacache", "phase_seconds": {"decode": 1.0}, "peak_bytes": 5}
        found = training.beside_estimate("wan", row)
        assert (found["estimate_bytes"], found["measured_over_estimate"]) == ({"decode": 4}, 1.25)
        assert training.beside_estimate("wan", {"row": "preset", "error": "no"}) == {"row": "preset", "error": "no"}

    def test_rows_that_are_there_are_not_measured_again(self, training, tmp_path, monkeypatch):
        """One that fails is noted; the others are made all the same; without time nothing is begun."""
        path, ran = tmp_path / "rows.json", []

        def run(command):
            ran.append(command[-1])
            if command[-1] == "teacache":
                return SimpleNamespace(returncode=1)
            training.write(path, [*training.read_rows(path), {"row": command[-1]}])
            return SimpleNamespace(returncode=0)

        monkeypatch.setattr(training.subprocess, "run", run)
        assert training.run_all("wan", path, until=0.0) == training.MORE
        training.write(path, [{"row": "preset"}])
        assert training.run_all("wan", path, float("inf")) == 1
        assert ran == list(training.rows_of("wan"))[1:]
        assert [row["row"] for row in training.read_rows(path) if "error" in row] == ["teacache"]
        assert training.run_all("wan", path, float("inf")) == 1
        assert len(ran) == len(training.rows_of("wan")) - 1


class TestWheelhouse:
    TARGET = ("3.12", "x86_64", ("manylinux_2_28_x86_64",))
    OWN = (
        "torch>=2.8",
        "numpy>=1.26",
        'diffusers>=0.42; extra == "train"',
        'pytest>=8; extra == "test"',
        'ruff>=0.8; extra == "test"',
        'triton>=3.4; sys_platform == "linux" and extra == "test"',
        'pywin32>=1; sys_platform == "win32" and extra == "train"',
        'scipy>=1.11; extra == "eval"',
    )
    NEEDS: ClassVar = {
        "diffusers": ('tomli; python_version < "3.11"', "requests[socks]>=2", "numpy"),
        "requests": ("urllib3>=2", 'PySocks>=1.5; extra == "socks"', 'chardet; extra == "other"'),
        "pytest": ('exceptiongroup; python_version < "3.11"', "pluggy"),
    }

    @pytest.fixture
    def gathered(self, wheelhouse):
        """gathered(purpose, have, gone=(), **options) -> what was found, and what was downloaded in which order."""
        environment = wheelhouse.Target(*self.TARGET).environment()
        pins = {"diffusers": "0.42.1", "requests": "2.34.2", "pytest": "9.2.0", "pluggy": "1.7.0", "urllib3": "1.0"}

        def gather(purpose, have, gone=(), **options):
            asked = []

            def fetch(wanted, requirement):
                asked.append(wanted)
                if requirement.name in gone:
                    raise wheelhouse.Unavailable("no wheel")
                needs = self.NEEDS.get(requirement.name, ())
                return wheelhouse.Wheel(requirement.name, "1", Path(requirement.name), needs)

            wanted = options.pop("wanted", None) or wheelhouse.roots(self.OWN, purpose, environment)
            return wheelhouse.gather(wanted, pins, have, environment, fetch, **options), asked

        return gather

    def test_extras_markers_and_pins(self, gathered):
        found, asked = gathered("all", {"torch": None, "triton": None, "numpy": None})
        assert asked == [
            "diffusers==0.42.1",
            "pytest==9.2.0",
            "ruff>=0.8",
            "requests==2.34.2",
            "pluggy==1.7.0",
            "urllib3==1.0",
            "PySocks>=1.5",
        ]
        assert "ruff is not in constraints.txt: the newest that fits is taken" in found.notes
        assert "constraints.txt has urllib3 1.0, but >=2 is asked for" in found.notes

    def test_a_small_one_for_the_distance(self, gathered):
        assert gathered("distance", {"torch": None})[1] == ["numpy>=1.26", "pytest==9.2.0", "pluggy==1.7.0"]

    def test_what_is_there_but_too_old_is_said(self, gathered):
        found, asked = gathered("distance", {"torch": "2.7.0", "numpy": "2.4.6", "pytest": "9.0"})
        assert (asked, found.notes) == ([], ["torch 2.7.0 is there, but torch>=2.8 is asked for"])

    def test_what_cannot_be_had_is_said_and_the_rest_taken(self, gathered):
        found, _ = gathered("training", {"torch": None, "numpy": None}, gone=("requests",))
        assert found.missing == {"requests": "no wheel"}
        assert list(found.wheels) == ["diffusers"]

    def test_only_what_is_named(self, gathered):
        assert gathered("all", {}, wanted=[Requirement("diffusers")], follow=False)[1] == ["diffusers==0.42.1"]

    def test_the_real_constraints_pin_what_setup_asks_for(self, wheelhouse):
        pins = wheelhouse.read_pins((ROOT / "constraints.txt").read_text())
        assert pins["diffusers"] == "0.42.1"
        assert {"huggingface-hub", "markupsafe", *wheelhouse.DISTANCE_TOOLS} <= set(pins)
        assert not [name for name in wheelhouse.DISTANCE_TOOLS if f'"{name}>=' not in (ROOT / "setup.py").read_text()]

    def test_tags_of_a_glibc(self, wheelhouse):
        tags = wheelhouse.platform_tags("x86_64", 17)
        assert tags[:2] == ("manylinux_2_17_x86_64", "manylinux2014_x86_64")
        assert {"manylinux1_x86_64", "linux_x86_64"} <= set(tags)
        assert "manylinux_2_28_x86_64" not in tags

    def test_other_folders_are_left_alone(self, wheelhouse, tmp_path, capsys):
        (tmp_path / "thesis.tex").touch()
        assert wheelhouse.main([str(tmp_path)]) == 2
        assert "holds other things" in capsys.readouterr().err
        assert (tmp_path / "thesis.tex").exists()

    def test_manifest_and_report(self, wheelhouse, tmp_path):
        path = tmp_path / "rich-15.0.0-py3-none-any.whl"
        path.write_bytes(b"abc")
        found = wheelhouse.Gathered({"rich": wheelhouse.Wheel("rich", "15.0.0", path, ())}, {"gone": "why"})
        content = wheelhouse.manifest(found, wheelhouse.Target(*self.TARGET), "0123")
        (entry,) = content["wheels"]
        assert (entry["bytes"], entry["sha256"][:8], content["bytes"]) == (3, "ba7816bf", 3)
        lines = wheelhouse.report(content, tmp_path)
        assert "could not be had: gone: why" in lines
        assert lines[-1].startswith("on the other machine: pip install --no-index --no-deps --find-links")
