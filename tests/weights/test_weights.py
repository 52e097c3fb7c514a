import os
import pickle
import sys

import huggingface_hub
import pytest
import torch
from safetensors.torch import save_file

from vcd_fast import VGG19Features, weights
from vcd_fast.weights import HubFile, UrlFile, read_tensors, recipe_tensor, require, resolve

SHAPES = {"features.0.weight": (64, 3, 3, 3), "features.0.bias": (64,)}
LAYERS = ("relu1_1",)


@pytest.fixture
def state():
    return {key: recipe_tensor(key, shape) for key, shape in SHAPES.items()}


@pytest.fixture
def bare(monkeypatch, tmp_path):
    """A machine without network, caches or variables."""

    def refuse(*args, **kwargs):
        raise ConnectionError("no route to host")

    monkeypatch.delenv("VCD_FAST_VGG19", raising=False)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    monkeypatch.setattr("urllib.request.urlopen", refuse)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    return tmp_path


def same(features, state):
    return all(torch.equal(value, state[key]) for key, value in features.state_dict().items())


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_path(bare, state, suffix):
    path = bare / f"vgg{suffix}"
    more = {**state, "classifier.0.weight": torch.zeros(1)}
    save_file(more, path) if suffix == ".safetensors" else torch.save(more, path)
    features = VGG19Features(path, layers=LAYERS)
    assert same(features, state)
    assert features.weight_file.source == "path"
    assert features.weight_file.sha256 == weights.file_sha256(path)
    assert same(VGG19Features(str(path), layers=LAYERS), state)


def test_a_file_in_pytorchs_first_format(bare, state):
    torch.save(state, bare / "old.pth", _use_new_zipfile_serialization=False)
    assert same(VGG19Features(bare / "old.pth", layers=LAYERS), state)
    whole = (bare / "old.pth").read_bytes()
    (bare / "old.pth").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"old\.pth: "):
        VGG19Features(bare / "old.pth", layers=LAYERS)


def test_the_environment_names_a_file(bare, state, monkeypatch):
    save_file(state, bare / "v.safetensors")
    monkeypatch.setenv("VCD_FAST_VGG19", str(bare / "v.safetensors"))
    features = VGG19Features(layers=LAYERS)
    assert same(features, state)
    assert features.weight_file.source == "variable VCD_FAST_VGG19"


def test_half_precision_files_become_float32(bare, state):
    save_file({key: value.half() for key, value in state.items()}, bare / "v.safetensors")
    features = VGG19Features(bare / "v.safetensors", layers=LAYERS)
    assert {p.dtype for p in features.parameters()} == {torch.float32}


def test_nothing_anywhere_says_which_file_to_put_where(bare):
    with pytest.raises(FileNotFoundError) as caught:
        VGG19Features()
    message = str(caught.value)
    assert "https://huggingface.co/timm/vgg19.tv_in1k/resolve/" in message
    assert "https://download.pytorch.org/models/vgg19-dcbb9e9d.pth" in message
    assert "VCD_FAST_VGG19=/path/to/file" in message
    assert message.count("no route to host") == 2


def test_random_is_never_a_fallback(bare, recwarn):
    with pytest.raises(FileNotFoundError):
        VGG19Features("imagenet")
    assert not recwarn.list


@pytest.mark.parametrize("where", ["argument", "variable"])
@pytest.mark.parametrize("what", ["nothing there", "a folder"])
def test_a_named_file_that_is_missing_is_an_error_not_a_download(bare, monkeypatch, where, what):
    path = bare if what == "a folder" else bare / "gone.pth"
    if where == "variable":
        monkeypatch.setenv("VCD_FAST_VGG19", str(path))
    name = "environment variable VCD_FAST_VGG19" if where == "variable" else r"weights of VGG19 \(ImageNet\)"
    with pytest.raises(FileNotFoundError, match=rf"{name}: expected a file of weights .*\({what}\)"):
        VGG19Features("imagenet" if where == "variable" else path)


def test_looking_without_downloading(bare, monkeypatch):
    def urlopen(*args, **kwargs):
        raise AssertionError("nothing may be asked for")

    monkeypatch.setattr("urllib.request.urlopen", urlopen)
    with pytest.raises(FileNotFoundError) as caught:
        resolve("VGG19", weights.VGG19_SOURCES, variable="VCD_FAST_VGG19", download=False)
    assert "weights of VGG19: not on this machine\nFetch one of these files" in str(caught.value)
    assert "VCD_FAST_VGG19=/path/to/file" in str(caught.value)


def test_missing_and_misshapen_tensors_are_listed(bare):
    save_file({"features.0.weight": torch.zeros(64, 3, 5, 5)}, bare / "v.safetensors")
    with pytest.raises(ValueError, match="not the weights that are needed") as caught:
        VGG19Features(bare / "v.safetensors", layers=LAYERS)
    assert "features.0.weight: expected shape (64, 3, 3, 3), got (64, 3, 5, 5)" in str(caught.value)
    assert "features.0.bias: missing" in str(caught.value)
    with pytest.raises(ValueError, match=r"x: expected floating-point numbers, got torch.int64"):
        require({"x": torch.zeros(2, dtype=torch.int64)}, {"x": (2,)}, "file")


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("kept", [0, 100, 3000])
def test_a_truncated_file_is_named(bare, state, suffix, kept):
    path = bare / f"vgg{suffix}"
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=str(path)):
        VGG19Features(path, layers=LAYERS)


def test_a_pickle_that_runs_code_is_not_run(bare):
    class Touch:
        def __reduce__(self):
            return os.mkdir, (str(bare / "ran"),)

    torch.save({"features.0.weight": Touch()}, bare / "v.pth")
    with pytest.raises(ValueError, match="expected a file of tensors only"):
        read_tensors(bare / "v.pth")
    (bare / "w.pth").write_bytes(pickle.dumps(Touch(), protocol=2))
    with pytest.raises(ValueError, match=r"w\.pth"):
        read_tensors(bare / "w.pth")
    assert not (bare / "ran").exists()


@pytest.mark.parametrize("content", [[1, 2], {"a": 3}], ids=["list", "numbers"])
def test_a_file_of_something_else(bare, content):
    torch.save(content, bare / "v.pth")
    with pytest.raises(ValueError, match="expected a dictionary of tensors"):
        read_tensors(bare / "v.pth")


def test_reading_part_of_a_file(bare, state):
    save_file({**state, "classifier.6.bias": torch.zeros(3)}, bare / "v.safetensors")
    assert set(read_tensors(bare / "v.safetensors", "features.")) == set(SHAPES)
    assert len(read_tensors(bare / "v.safetensors")) == 3


class Served:
    """What urlopen returns for some bytes."""

    def __init__(self, content):
        self.content = content
        self.headers = {"Content-Length": str(len(content))}

    def __enter__(self):
        return self

    def __exit__(self, *args):
        return False

    def read(self, size):
        piece, self.content = self.content[:size], self.content[size:]
        return piece


@pytest.fixture
def published(bare, state, monkeypatch):
    """A URL that serves VGG19's file, its hash, and how often it was asked."""
    torch.save(state, bare / "original")
    content = (bare / "original").read_bytes()
    asked = []

    def urlopen(url, timeout):
        asked.append(url)
        return Served(content)

    monkeypatch.setattr("urllib.request.urlopen", urlopen)
    return UrlFile("https://example.org/models/vgg.pth", weights.file_sha256(bare / "original")[:8]), asked


def test_a_download_is_checked_cached_and_used_again(bare, published):
    source, asked = published
    first = resolve("VGG", [source], variable="VCD_FAST_VGG19")
    assert first.path == bare / "hub" / "checkpoints" / "vgg.pth"
    assert first.source == "url https://example.org/models/vgg.pth"
    assert first.sha256.startswith(source.sha256)
    assert resolve("VGG", [source], variable="VCD_FAST_VGG19") == first
    assert len(asked) == 1
    assert [p.name for p in first.path.parent.iterdir()] == ["vgg.pth"]


def test_a_download_with_the_wrong_hash_leaves_nothing(bare, published):
    source, _ = published
    wrong = UrlFile(source.url, "00000000")
    with pytest.raises(FileNotFoundError, match="expected SHA-256 00000000"):
        resolve("VGG", [wrong], variable="VCD_FAST_VGG19")
    assert not list((bare / "hub" / "checkpoints").iterdir())


def test_an_interrupted_download_leaves_nothing(bare, published, monkeypatch):
    source, _ = published

    def broken(self, size):
        raise ConnectionResetError("peer went away")

    monkeypatch.setattr(Served, "read", broken)
    with pytest.raises(FileNotFoundError, match="peer went away"):
        resolve("VGG", [source], variable="VCD_FAST_VGG19")
    assert not list((bare / "hub" / "checkpoints").iterdir())


def test_a_damaged_cache_is_named_not_used(bare, published):
    source, asked = published
    path = resolve("VGG", [source], variable="VCD_FAST_VGG19").path
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"vgg\.pth: expected SHA-256 .* the file is damaged; delete it and try again"):
        resolve("VGG", [source], variable="VCD_FAST_VGG19")
    assert len(asked) == 1


def test_the_cached_hub_copy_is_preferred_to_any_download(bare, state, monkeypatch, published):
    _, asked = published
    save_file(state, bare / "model.safetensors")
    calls = []

    def hf_hub_download(repository, filename, revision, local_files_only):
        calls.append((repository, filename, revision, local_files_only))
        return str(bare / "model.safetensors")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hf_hub_download)
    digest = weights.file_sha256(bare / "model.safetensors")
    monkeypatch.setattr(weights, "VGG19_SOURCES", (HubFile("timm/vgg19.tv_in1k", "model.safetensors", "abc", digest),))
    features = VGG19Features(layers=LAYERS)
    assert same(features, state)
    assert features.weight_file.source == "hub timm/vgg19.tv_in1k"
    assert calls == [("timm/vgg19.tv_in1k", "model.safetensors", "abc", True)]
    assert not asked


def test_published_sources_are_pinned():
    hub, url = weights.VGG19_SOURCES
    assert len(hub.revision) == 40
    assert len(hub.sha256) == 64
    assert url.sha256 in url.url


def test_recipe_depends_on_the_name_alone():
    torch.manual_seed(3)
    first = recipe_tensor("features.5.weight", (128, 64, 3, 3))
    assert torch.equal(first, recipe_tensor("features.5.weight", (128, 64, 3, 3)))
    assert first.std().item() == pytest.approx((2 / 576) ** 0.5, rel=0.01)
    assert recipe_tensor("features.5.bias", (4096,)).std().item() == pytest.approx(0.01, rel=0.05)


@pytest.mark.skipif(
    sys.platform == "win32" or os.geteuid() == 0, reason="root and Windows read files without permission"
)
def test_a_file_without_permission_is_named(bare, state):
    path = bare / "v.safetensors"
    save_file(state, path)
    path.chmod(0)
    with pytest.raises(PermissionError):
        VGG19Features(path, layers=LAYERS)
