"""`vcd doctor` from outside, and what it says of machines that lack something."""

from __future__ import annotations

import importlib.metadata
import json
import multiprocessing
import socket
import sys
import time
from types import SimpleNamespace

import pytest
import torch

from vcd_fast.evaluation import collective, doctor, machine
from vcd_fast.models.opensora.settings import ModelSettings as OpenSora
from vcd_fast.models.wan.settings import ModelSettings as Wan

STATUSES = {"ok", "note", "problem"}


@pytest.fixture
def nowhere(tmp_path, monkeypatch):
    """A hub's cache and a PyTorch cache with nothing in them, and no network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "torch"))
    monkeypatch.delenv("VCD_FAST_VGG19", raising=False)
    return tmp_path


def by_status(findings, status):
    return [finding for finding in findings if finding.status == status]


# --- from outside ------------------------------------------------------------------------------------------------------------------


def test_a_healthy_machine(vcd, tmp_path):
    started = time.monotonic()
    words = ("doctor", "--model", "wan", "--preset", "tiny", "--json", tmp_path / "doctor.json")
    code, out, err = vcd(*words, HF_HOME=str(tmp_path / "hf"))
    print(f"{time.monotonic() - started:.1f} s")
    assert code == 0, out + err
    for text in ("reference runs on cpu", "weights tiny-random: nothing is missing", "gloo: all_reduce is right"):
        assert text in out
    assert "nothing stands in the way" in out
    written = json.loads((tmp_path / "doctor.json").read_text())
    assert written["healthy"] is True
    assert written["versions"]["torch"] == torch.__version__
    assert {finding["status"] for finding in written["findings"]} <= STATUSES
    checks = [finding["check"] for finding in written["findings"]]
    assert {"versions", "video", "device", "distance", "VGG19", "wan", "disk", "ports", "collective"} == set(checks)


def test_missing_weights_are_a_problem_with_a_command(vcd, tmp_path):
    """Where nothing is named, those of the paper are looked for."""
    words = ("doctor", "--model", "opensora", "--no-collective", "--json", tmp_path / "doctor.json")
    code, out, _ = vcd(*words, HF_HOME=str(tmp_path / "hf"))
    assert code == 1
    assert "missing: vae (hpcai-tech/OpenSora-VAE-v1.2), 1.6 GB" in out
    assert out.count("hf download DeepFloyd/t5-v1_1-xxl\n") == 1, "once for encoder and tokenizer"
    assert "4 problems" in out
    assert "all_reduce" not in out
    assert json.loads((tmp_path / "doctor.json").read_text())["healthy"] is False


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--preset", "tiny"), "model: expected wan or opensora with --preset or --weights, got none"),
        (("--model", "wan", "--preset", "huge"), "preset: expected one of"),
        (("--json", "nowhere/doctor.json"), "json: expected a file in an existing folder"),
    ],
)
def test_mistakes(words, message, monkeypatch, capsys):
    from vcd_fast.cli.main import main

    monkeypatch.setattr(sys, "argv", ["vcd", "doctor", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1
    assert message in capsys.readouterr().err


# --- one check at a time -----------------------------------------------------------------------------------------------------------


class TestVersions:
    def test_what_is_here(self):
        found = doctor.check_versions(model_named=True)
        assert by_status(found, "problem") == []
        assert f"torch {torch.__version__}" in found[0].found

    @pytest.mark.parametrize(
        ("package", "named", "status"),
        [
            ("numpy", False, "problem"),
            ("diffusers", False, "note"),
            ("diffusers", True, "problem"),
            ("triton", True, None),
        ],
    )
    def test_what_is_missing(self, package, named, status, monkeypatch):
        """Packages for GPUs are not asked for where there is no GPU."""
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        real = importlib.metadata.version

        def version(name):
            if name == package:
                raise importlib.metadata.PackageNotFoundError(name)
            return real(name)

        monkeypatch.setattr(importlib.metadata, "version", version)
        said = [finding for finding in doctor.check_versions(named) if f"{package} is not installed" in finding.found]
        assert [finding.status for finding in said] == ([] if status is None else [status])
        assert all(finding.advice.startswith("pip install -e ") for finding in said)

    def test_what_is_too_old(self, monkeypatch):
        real = importlib.metadata.version
        monkeypatch.setattr(importlib.metadata, "version", lambda name: "2.0.1" if name == "torch" else real(name))
        (problem,) = by_status(doctor.check_versions(False), "problem")
        assert "torch 2.0.1 is not >=2.8" in problem.found

    def test_a_checkout_that_is_not_installed(self, monkeypatch):
        def requires(name):
            raise importlib.metadata.PackageNotFoundError(name)

        monkeypatch.setattr(importlib.metadata, "requires", requires)
        assert "is not installed here" in doctor.check_versions(False)[-1].found


def test_a_pyav_that_cannot_write(monkeypatch):
    assert doctor.check_video_writing(True)[0].status == "ok"
    import av

    def codec(name, mode):
        raise av.codec.codec.UnknownCodecError(name)

    monkeypatch.setattr(av, "Codec", codec)
    assert [doctor.check_video_writing(named)[0].status for named in (False, True)] == ["note", "problem"]


class TestDevices:
    def test_no_gpu_is_a_note_with_a_reason(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        gpu, cpu = doctor.check_devices()
        assert (gpu.status, cpu.status) == ("note", "ok")
        assert "no GPU that PyTorch can use: " in gpu.found
        assert "cores" in cpu.found

    def test_reasons(self, monkeypatch):
        monkeypatch.setattr(torch.version, "cuda", None)
        monkeypatch.setattr(torch.version, "hip", None)
        assert "is built without CUDA" in machine.why_no_gpu()
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
        assert machine.why_no_gpu() == "CUDA_VISIBLE_DEVICES='' hides them"
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES")

        def init():
            raise RuntimeError("Found no NVIDIA driver on your system.\nMore lines.")

        monkeypatch.setattr(torch.cuda, "init", init)
        assert machine.why_no_gpu() == "Found no NVIDIA driver on your system."

    def test_gpus_with_memory_and_driver(self, monkeypatch, tmp_path):
        program = tmp_path / "nvidia-smi"
        program.write_text("#!/bin/sh\necho 570.86.15\necho 570.86.15\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
        monkeypatch.setattr(torch.version, "hip", None)
        monkeypatch.setattr(torch.version, "cuda", "12.8")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (70 << 30, 80 << 30))
        properties = SimpleNamespace(name="NVIDIA H100", major=9, minor=0)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
        first, second, _ = doctor.check_devices()
        assert first.status == second.status == "ok"
        assert first.found == (
            "GPU 0: NVIDIA H100, 80.0 GiB of memory, 70.0 GiB free, CUDA 12.8, compute capability 9.0, driver 570.86.15"
        )
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        assert "there is one, with driver 570.86.15" in doctor.check_devices()[0].found
        assert "pytorch.org" in doctor.check_devices()[0].advice


class TestBackends:
    def test_the_reference_always_runs_and_others_say_why_not(self):
        found = doctor.check_backends()
        assert [finding.found.split()[0] for finding in found] == ["reference", "simd", "triton"]
        assert found[0].status == "ok"
        assert by_status(found, "problem") == []
        assert all(finding.found.split(": ", 1)[1] for finding in by_status(found, "note"))

    def test_a_backend_that_is_wrong_or_broken(self, monkeypatch):
        from vcd_fast import distance

        real = distance.sliced_wasserstein

        def broken(x, y, *, backend, **options):
            if backend == "triton":
                raise OSError("no C compiler\nlong story")
            return real(x, y, backend="reference", **options) * (1.01 if backend == "simd" else 1)

        monkeypatch.setattr(distance, "sliced_wasserstein", broken)
        _, simd, triton = doctor.check_backends()
        assert simd.status == "problem"
        assert "wrong by 0.01 of the reference" in simd.found
        assert (triton.status, triton.found) == ("note", "triton cannot run here: no C compiler")


class TestVGG19:
    def test_absent(self, nowhere):
        (found,) = doctor.check_vgg19()
        assert found.status == "note"
        assert "timm/vgg19.tv_in1k" in found.advice
        assert not (nowhere / "torch").exists(), "nothing is downloaded"

    def test_named_by_the_variable(self, nowhere, monkeypatch):
        (nowhere / "vgg19.safetensors").write_bytes(b"abc")
        monkeypatch.setenv("VCD_FAST_VGG19", str(nowhere / "vgg19.safetensors"))
        (found,) = doctor.check_vgg19()
        assert found.status == "ok"
        assert "SHA-256 ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad" in found.found
        monkeypatch.setenv("VCD_FAST_VGG19", str(nowhere / "other"))
        assert doctor.check_vgg19()[0].status == "problem"

    def test_damaged_in_the_cache(self, nowhere):
        folder = nowhere / "torch" / "checkpoints"
        folder.mkdir(parents=True)
        (folder / "vgg19-dcbb9e9d.pth").write_bytes(b"half a file")
        (found,) = doctor.check_vgg19()
        assert found.status == "problem"
        assert "the file is damaged; delete it" in found.found


class TestModel:
    @pytest.mark.parametrize(("name", "settings"), [("wan", Wan), ("opensora", OpenSora)])
    def test_nothing_named_and_nothing_there(self, name, settings, nowhere):
        for weights, text in ((None, "model.weights: expected a folder or hub name"), ("./x", "no such folder: ./x")):
            (found,), size = doctor.check_model(name, settings(weights=weights))
            assert (found.check, found.status, size) == (name, "problem", 0)
            assert text in found.found

    def test_a_download_that_does_not_fit(self, nowhere, monkeypatch):
        found, size = doctor.check_model("wan", Wan(weights="Wan-AI/Wan2.1-I2V-14B-480P-Diffusers"))
        assert len(by_status(found, "problem")) == len(found) == 6
        assert all(finding.advice.startswith("hf download Wan-AI/") for finding in found)
        assert size == pytest.approx(90.5e9, rel=0.01)
        assert doctor.check_disk()[1].status != "problem"
        monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: SimpleNamespace(free=50 << 30))
        here, cache = doctor.check_disk(size)
        assert here.status == "ok"
        assert cache.status == "problem"
        assert "50.0 GiB free in" in cache.found
        assert "84.3 GiB are needed" in cache.found

    def test_a_size_that_is_not_known_counts_nothing(self, nowhere):
        _, size = doctor.check_model("wan", Wan(weights="some-one/else"))
        assert size == pytest.approx(24.5e9, rel=0.01)


def test_little_space_is_said(monkeypatch, nowhere):
    for free, status in ((50 << 30, "ok"), (5 << 30, "note"), (100 << 20, "problem")):
        monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path, free=free: SimpleNamespace(free=free))
        assert doctor.check_disk()[0].status == status


def test_a_taken_port_is_said(monkeypatch):
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        monkeypatch.setattr(doctor, "LAUNCHER_PORT", server.getsockname()[1])
        free, taken = doctor.check_ports()
    assert (free.status, taken.status) == ("ok", "note")
    assert "--master_port" in taken.advice
    assert len(doctor.check_ports()) == 1


class TestCollective:
    def test_a_failure_is_a_problem(self, monkeypatch):
        def fail():
            raise RuntimeError("rank 1 of 2: connection refused")

        monkeypatch.setattr(doctor, "check_all_reduce", fail)
        (found,) = doctor.check_collective()
        assert found.status == "problem"
        assert "rank 1 of 2: connection refused" in found.found
        assert not doctor.is_healthy([found])

    def test_processes_that_do_not_answer_are_ended(self):
        before = set(multiprocessing.active_children())
        with pytest.raises(RuntimeError, match="rank 0 of 2: no answer in time"):
            collective.check_all_reduce(timeout=0.01)
        deadline = time.monotonic() + 10
        while set(multiprocessing.active_children()) - before and time.monotonic() < deadline:
            time.sleep(0.05)
        assert set(multiprocessing.active_children()) <= before

    def test_what_ranks_say(self):
        def pipes():
            return zip(*[multiprocessing.Pipe(duplex=False) for _ in range(2)], strict=True)

        soon = time.monotonic() + 5
        (first, second), (say, also) = pipes()
        say.send("ok")
        also.send("ok")
        assert collective._messages([first, second], soon) == {0: "ok", 1: "ok"}

        (first, second), (say, also) = pipes()
        also.close()  # a process that was killed; the other would wait for it
        assert collective._messages([first, second], soon) == {0: "ok", 1: "the process ended without a word"}
        say.close()

        (first, second), (say, also) = pipes()
        say.send("ok")
        assert collective._messages([first, second], time.monotonic() + 0.1) == {0: "ok", 1: "no answer in time"}
        also.close()
