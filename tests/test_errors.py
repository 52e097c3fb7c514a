import os
import subprocess
import sys

import pytest

from vcd_fast.errors import describe, reported_to_user


def test_errors_a_user_can_cause_become_one_line_and_exit_code_one(capsys):
    with pytest.raises(SystemExit) as stop, reported_to_user():
        raise ValueError("rank: expected a positive number, got 0")
    assert stop.value.code == 1
    assert capsys.readouterr().err.splitlines()[0] == "error: rank: expected a positive number, got 0"


def test_other_errors_keep_their_traceback():
    with pytest.raises(ZeroDivisionError), reported_to_user():
        _ = 1 / 0


def test_a_variable_brings_the_traceback_back(monkeypatch):
    monkeypatch.setenv("VCD_FAST_TRACEBACK", "1")
    with pytest.raises(ValueError, match="why"), reported_to_user():
        raise ValueError("why")


def test_operating_system_errors_name_the_file():
    assert describe(PermissionError(13, "Permission denied", "/some/file")) == "Permission denied: /some/file"
    assert describe(KeyError()) == "KeyError"


@pytest.mark.parametrize(
    ("package", "words", "extra"),
    [("typer", ["--help"], "cli"), ("diffusers", ["train", "--model", "wan", "--preset", "tiny"], "train")],
)
def test_a_package_that_is_not_installed_is_named_with_its_extra(tmp_path, package, words, extra):
    (tmp_path / f"{package}.py").write_text(
        f"raise ModuleNotFoundError(\"No module named '{package}'\", name='{package}')"
    )
    command = [sys.executable, "-m", "vcd_fast.cli.main", *words]
    if package == "diffusers":
        command += ["--pictures", "examples/pictures", "--output", str(tmp_path / "run")]
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": str(tmp_path)}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1
    assert f"error: {package} is not installed; this command needs pip install 'vcd_fast[{extra}]'" in done.stderr
    assert "Traceback" not in done.stderr
