"""The table of configurations: complete, printable, tuned only on request."""

import pytest
import torch

from vcd_fast.kernels import config, launch

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942", "interpreter")
OPERATIONS = ("project", "spectrum_gradient", "rows", "merge", "count", "sort")


@pytest.fixture(autouse=True)
def _fresh_choices():
    config.forget()
    yield
    config.forget()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("m", [0, 1, 95, 780, 3128, 4096, 50048, 400000])
def test_every_row_length_has_a_method_and_configurations(architecture, m):
    for power in (1, 2):
        method = config.resolve_method("auto", m, power, architecture)
        assert method in config.METHODS[1:]
        assert power == 1 or method != "count"
        text = config.describe(m, architecture, power)
        assert method in text
        assert "not measured" in text
    for operation in OPERATIONS:
        if operation == "rows" and m > 4096:
            continue
        found = config.candidates(operation, m, architecture)
        assert found
        threads = 64 if architecture.startswith("gfx9") else 32
        for candidate in found:
            for name in vars(candidate):
                if name.endswith("warps"):
                    assert 1 <= getattr(candidate, name) * threads <= 1024


def test_short_rows_stay_on_chip_and_long_rows_are_counted():
    found = [config.resolve_method("auto", m, 1, "sm_90") for m in (124, 125, 4096, 4097)]
    assert found == ["project", "rows", "rows", "count"]
    assert config.resolve_method("auto", 50048, 2, "sm_90") == "merge"
    assert config.resolve_method("merge", 10, 1, "sm_90") == "merge"


def test_reckoned_traffic_orders_the_methods():
    assert config.bytes_per_value("rows", 3128) == 9
    count, merge = (config.bytes_per_value(method, 50048) for method in ("count", "merge"))
    assert count < merge < config.bytes_per_value("sort", 50048)


def test_bad_methods_are_named():
    with pytest.raises(ValueError, match="method must be one of auto, project, rows, merge, count, sort; got 'radix'"):
        config.resolve_method("radix", 10, 1, "sm_90")
    with pytest.raises(ValueError, match="method 'count' computes p = 1 only, got p = 2"):
        config.resolve_method("count", 10, 2, "sm_90")
    with pytest.raises(ValueError, match="too long to be projected where it is sorted"):
        config.candidates("project_rows", 500, "sm_90")


def test_the_first_entry_is_launched_and_remembered():
    launched = []
    first = config.choose("merge", 50000, "sm_90", launched.append)
    assert first == config.candidates("merge", 50000, "sm_90")[0]
    assert not launched, "nothing is timed unless asked for"
    assert config.choose("merge", 40000, "sm_90", launched.append) is first, "one choice per power of two"
    assert "merge m<=65536 sm_90: MergeConfig(" in config.chosen()


def test_autotuning_keeps_the_fastest(monkeypatch):
    monkeypatch.setenv(config.AUTOTUNE_VARIABLE, "1")
    slow_first = config.candidates("merge", 50000, "sm_90")
    launched = []

    def measured(launch_once):
        launch_once()
        return -len(launched)  # the last one is the fastest

    monkeypatch.setattr(config, "measured_ms", measured)
    assert config.choose("merge", 50000, "sm_90", launched.append) == slow_first[-1]
    assert launched == slow_first
    config.choose("merge", 50000, "sm_90", launched.append)
    assert len(launched) == len(slow_first), "timed once"


def test_architecture_names(device):
    assert launch.architecture(torch.device("cpu")) == "interpreter"
    if device.type == "cuda":
        assert launch.architecture(device).startswith(("sm_", "gfx"))


def test_waves_of_64_threads_halve_the_warps():
    nvidia, amd = (config.candidates("count", 50000, name)[0] for name in ("sm_90", "gfx942"))
    assert amd.warps == nvidia.warps // 2
    assert amd.merge.merge_warps == nvidia.merge.merge_warps // 2


def test_samples_too_large_for_32_bit_offsets_are_refused():
    with pytest.raises(ValueError, match=r"z may hold at most 2\*\*31 - 1 elements a sample, got 65536 x 32768"):
        launch.checked_extent("z", 65536, 32768)


def test_a_cpu_tensor_needs_the_interpreter(monkeypatch):
    monkeypatch.setattr(launch, "interpreted", lambda: False)
    with pytest.raises(ValueError, match="Triton kernels need tensors on a CUDA or ROCm device, got cpu"):
        launch.guard(torch.zeros(1))
