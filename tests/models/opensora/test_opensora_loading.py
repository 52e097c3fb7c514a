"""Weights from folders of either layout, strictly; what is missing, and what a user is told."""

from __future__ import annotations

import json
import os
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from vcd_fast.models.base import family
from vcd_fast.models.opensora import tiny
from vcd_fast.models.opensora.files import missing_weights
from vcd_fast.models.opensora.loading import load_text_encoder, load_transformer, load_vae
from vcd_fast.models.opensora.settings import ModelSettings
from vcd_fast.rollout import generate

package = family("opensora")
PUBLISHED_TRANSFORMER = {
    "_name_or_path": "pretrained/OpenSora-STDiT-v3",
    "architectures": ["STDiT3"],
    "caption_channels": 32,
    "class_dropout_prob": 0.1,
    "depth": 2,
    "drop_path": 0.0,
    "enable_flash_attn": True,
    "enable_layernorm_kernel": True,
    "hidden_size": 64,
    "in_channels": 4,
    "input_size": [None, None, None],
    "input_sq_size": 512,
    "mlp_ratio": 4.0,
    "model_max_length": 300,
    "model_type": "STDiT3",
    "num_heads": 4,
    "patch_size": [1, 2, 2],
    "pred_sigma": True,
    "qk_norm": True,
    "torch_dtype": "float32",
}


@pytest.fixture
def published(tmp_path) -> Path:
    """The toy transformer in a folder laid out as the published one: transformers' names, no diffusers."""
    folder = tmp_path / "published"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(PUBLISHED_TRANSFORMER))
    save_file(tiny.tiny_transformer().state_dict(), folder / "model.safetensors")
    return folder


@pytest.fixture
def pipeline(tmp_path) -> Path:
    """All parts of the toy pipeline in sub-folders."""
    folder = tmp_path / "pipeline"
    tiny.tiny_transformer().save_pretrained(folder / "transformer")
    tiny.tiny_vae().save_pretrained(folder / "vae")
    tiny.tiny_text_encoder().save_pretrained(folder / "text_encoder")
    tiny.tiny_tokenizer().save_pretrained(folder / "tokenizer")
    return folder


def equal(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> bool:
    return found.keys() == wanted.keys() and all(torch.equal(found[key], wanted[key]) for key in wanted)


def as_bin(folder: Path, legacy: bool = False) -> Path:
    path = folder / "pytorch_model.bin"
    torch.save(load_file(folder / "model.safetensors"), path, _use_new_zipfile_serialization=not legacy)
    (folder / "model.safetensors").unlink()
    return path


# --- what loads --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["safetensors", "bin", "legacy bin"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_published_layouts(layout, dtype, published):
    if layout != "safetensors":
        as_bin(published, legacy=layout == "legacy bin")
    model = load_transformer(published, dtype)
    wanted = {key: value.to(dtype) for key, value in tiny.tiny_transformer().state_dict().items()}
    assert equal(model.state_dict(), wanted)
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_shards_with_an_index(published):
    state = load_file(published / "model.safetensors")
    (published / "model.safetensors").unlink()
    names = sorted(state)
    shards = {"a.bin": names[::2], "b.bin": names[1::2]}
    for shard, keys in shards.items():
        torch.save({key: state[key] for key in keys}, published / shard)
    index = {"weight_map": {key: shard for shard, keys in shards.items() for key in keys}}
    (published / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert equal(load_transformer(published, torch.float32).state_dict(), state)
    (published / "b.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks b.bin, which pytorch_model.bin.index.json names"):
        load_transformer(published, torch.float32)


def test_frequencies_of_rope_may_be_absent(published):
    state = load_file(published / "model.safetensors")
    del state["rope.freqs"]
    save_file(state, published / "model.safetensors")
    loaded = load_transformer(published, torch.float32)
    assert torch.equal(loaded.rope.freqs, tiny.tiny_transformer().rope.freqs)


def test_published_layout_of_the_vae(tmp_path):
    """The published configuration names classes and repositories of the original code; sizes are the classes' own."""
    vae = tiny.tiny_vae()
    save_file(vae.state_dict(), tmp_path / "model.safetensors")
    published = {
        "architectures": ["VideoAutoencoderPipeline"],
        "cal_loss": False,
        "freeze_vae_2d": False,
        "micro_frame_size": 17,
        "model_type": "VideoAutoencoderPipeline",
        "scale": [3.85, 2.32, 2.33, 3.06],
        "shift": [-0.1, 0.34, 0.27, 0.98],
        "vae_2d": {"from_pretrained": "PixArt-alpha/pixart_sigma_sdxlvae_T5_diffusers", "type": "VideoAutoencoderKL"},
        "vae_temporal": {"from_pretrained": None, "type": "VAE_Temporal_SD"},
    }
    config = tmp_path / "config.json"
    config.write_text(json.dumps(published))
    with pytest.raises(ValueError, match=r"not the weights of the OpenSoraVAE .*Tensors missing: .*of another shape"):
        load_vae(tmp_path, torch.float32)  # the toy's weights are not of the published size
    sizes = {key: value for key, value in vae.config.items() if not key.startswith(("_", "latent_s"))}
    config.write_text(json.dumps({**published, **sizes}))
    assert equal(load_vae(tmp_path, torch.float32).state_dict(), vae.state_dict())


def test_a_folder_with_all_parts_is_the_model(pipeline):
    """Encoder and model from a folder equal those that are made in memory: text, picture, video."""
    size = {"height": 36, "width": 48, "num_frames": 17, "dtype": "float32"}
    image = torch.rand(1, 3, 36, 48, generator=torch.Generator().manual_seed(0))
    results = []
    for weights in (str(pipeline), "tiny-random"):
        settings = ModelSettings(weights=weights, **size)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="model.weights=tiny-random", category=UserWarning)
            encoder, model = package.load_encoder(settings), package.load_model(settings)
            condition = encoder.encode(image, ["a cat"], ["ugly"], 36, 48, 17)
        video = generate(model, condition, [torch.Generator().manual_seed(0)], 2, frames=[0, 7])
        results.append((condition, video, encoder.fingerprint))
    (loaded, video, fingerprint), (made, same, other) = results
    assert torch.equal(loaded.text, made.text)
    assert torch.equal(loaded.negative_text, made.negative_text)
    assert torch.equal(loaded.image_latents, made.image_latents)
    assert torch.equal(video, same)
    assert fingerprint != other, "other weights, other encodings"
    assert missing_weights(ModelSettings(weights=str(pipeline), **size)) == []


def test_one_encoder_in_memory_at_a_time(pipeline, monkeypatch):
    settings = ModelSettings(weights=str(pipeline), height=36, width=48, num_frames=17)
    alive = []

    def text_encoder(folder: Path, dtype: torch.dtype) -> torch.nn.Module:
        model = load_text_encoder(folder, dtype)
        alive.append(weakref.ref(model))
        return model

    def vae(folder: Path, dtype: torch.dtype) -> torch.nn.Module:
        assert alive[0]() is None, "T5 is freed before the VAE is loaded"
        return load_vae(folder, dtype)

    monkeypatch.setattr("vcd_fast.models.opensora.encoder.load_text_encoder", text_encoder)
    monkeypatch.setattr("vcd_fast.models.opensora.encoder.load_vae", vae)
    package.load_encoder(settings).encode(torch.zeros(1, 3, 36, 48), ["a cat"], [""], 36, 48, 17)
    assert len(alive) == 1


def test_parts_may_stand_in_folders_of_their_own(pipeline, tmp_path):
    parts = tmp_path / "parts"
    parts.mkdir()
    for name in ("vae", "transformer"):
        os.rename(pipeline / name, parts / name)
    settings = ModelSettings(
        weights=str(parts / "transformer"), vae_weights=str(parts / "vae"), text_encoder_weights=str(pipeline)
    )
    assert missing_weights(settings) == []
    package.load_model(settings)
    before = package.load_encoder(settings).fingerprint
    (pipeline / "tokenizer" / "tokenizer_config.json").write_text("{}")
    assert package.load_encoder(settings).fingerprint != before, "a changed file is another encoder"


@pytest.mark.parametrize("change", ["missing", "decoder"])
def test_text_encoder_is_strict_too(change, pipeline):
    folder = pipeline / "text_encoder"
    state = load_file(folder / "model.safetensors")
    if change == "missing":
        del state["encoder.block.1.layer.0.SelfAttention.q.weight"]
    else:
        state["decoder.final_layer_norm.weight"] = torch.zeros(32)  # a whole T5 holds its encoder
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    if change == "missing":
        with pytest.raises(ValueError, match=r"tensors are missing: encoder.block.1.layer.0.SelfAttention.q.weight"):
            load_text_encoder(folder, torch.float32)
    else:
        loaded = load_text_encoder(folder, torch.float32)
        assert torch.equal(loaded.state_dict()["shared.weight"], state["shared.weight"])


def test_text_encoder_from_shards_of_torch(pipeline):
    """The published T5 comes in two files of torch.save's format."""
    folder = pipeline / "text_encoder"
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(state)
    halves = {"pytorch_model-00001-of-00002.bin": names[:9], "pytorch_model-00002-of-00002.bin": names[9:]}
    for file, keys in halves.items():
        torch.save({key: state[key] for key in keys}, folder / file)
    index = {"metadata": {}, "weight_map": {key: file for file, keys in halves.items() for key in keys}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    loaded = load_text_encoder(folder, torch.bfloat16).state_dict()
    assert all(torch.equal(loaded[key], value.bfloat16()) for key, value in state.items())


# --- what does not -----------------------------------------------------------------------------------------------------------------


def rewritten(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        state = load_file(folder / "model.safetensors")
        change(state)
        save_file(state, folder / "model.safetensors")

    return apply


def without_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def other_config(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"_class_name": "WanTransformer3DModel"}))


def not_json(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def two_files(folder: Path) -> None:
    (folder / "other.safetensors").write_bytes((folder / "model.safetensors").read_bytes())


def truncated(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", 200_000)


def truncated_bin(folder: Path) -> None:
    os.truncate(as_bin(folder), 200_000)


def truncated_legacy_bin(folder: Path) -> None:
    os.truncate(as_bin(folder, legacy=True), 200_000)


def overwritten(folder: Path) -> None:
    (folder / "model.safetensors").write_text("<html>404</html>")


def not_a_dictionary(folder: Path) -> None:
    torch.save([torch.zeros(1)], as_bin(folder))


def dictionary_of_dictionaries(folder: Path) -> None:
    torch.save({"state_dict": {"x": torch.zeros(1)}}, as_bin(folder))


class Evil:
    def __reduce__(self) -> tuple:
        return (os.mkdir, ("/tmp/vcd_fast_evil_was_run",))


def with_code(folder: Path) -> None:
    torch.save({"x": Evil()}, as_bin(folder))


@pytest.mark.parametrize(
    ("damage", "kind", "message"),
    [
        (rewritten(lambda s: s.pop("x_embedder.proj.bias")), ValueError, r"Tensors missing: x_embedder.proj.bias\."),
        (
            rewritten(lambda s: [s.pop(k) for k in list(s) if "temporal" in k]),
            ValueError,
            r"Tensors missing: temporal_blocks.0.scale_shift_table, .* and \d+ more\.",
        ),
        (rewritten(lambda s: s.update(extra=torch.zeros(1))), ValueError, r"Tensors unexpected: extra\."),
        (
            rewritten(lambda s: s.update({"x_embedder.proj.bias": torch.zeros(3)})),
            ValueError,
            r"Tensors of another shape: x_embedder.proj.bias \[3\] instead of \[64\]\.",
        ),
        (rewritten(lambda s: s["rope.freqs"].mul_(2)), ValueError, r"rope.freqs is not 10000\^\(-2i/16\)"),
        (without_config, FileNotFoundError, r"config.json is missing"),
        (other_config, ValueError, r"expected the configuration of a STDiT3, got WanTransformer3DModel"),
        (not_json, ValueError, r"config.json: expected JSON"),
        (without_weights, FileNotFoundError, r"holds no weights \(\*.safetensors or \*.bin\)"),
        (two_files, FileNotFoundError, r"holds 2 files \*.safetensors and no index"),
        (truncated, ValueError, r"model.safetensors: damaged or incomplete"),
        (truncated_bin, ValueError, r"pytorch_model.bin: damaged or incomplete"),
        (truncated_legacy_bin, ValueError, r"pytorch_model.bin: damaged or incomplete"),
        (overwritten, ValueError, r"model.safetensors: damaged or incomplete"),
        (not_a_dictionary, ValueError, r"expected a dictionary of tensors"),
        (dictionary_of_dictionaries, ValueError, r"expected a dictionary of tensors"),
        (with_code, ValueError, r"pytorch_model.bin: damaged or incomplete"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_files_that_are_not_the_weights(damage, kind, message, published):
    damage(published)
    with pytest.raises(kind, match=message):
        load_transformer(published, torch.float32)
    assert not os.path.exists("/tmp/vcd_fast_evil_was_run")


def test_nothing_named_is_an_error_that_says_what_to_do():
    for load in (package.load_encoder, package.load_model, package.missing_weights):
        with pytest.raises(ValueError, match=r"model.weights: expected .*--preset 240p and --preset tiny"):
            load(ModelSettings())


def test_folders_that_are_not_there(tmp_path, published):
    with pytest.raises(FileNotFoundError, match=r"model\.weights: no such folder: \./nowhere"):
        package.load_model(ModelSettings(weights="./nowhere"))
    with pytest.raises(ValueError, match=r"model\.vae_weights: expected the folder .*, got the file"):
        package.load_model(ModelSettings(weights=str(published), vae_weights=str(published / "config.json")))
    (tmp_path / "config.json").write_text("{}")
    settings = ModelSettings(weights=str(published), vae_weights=str(tmp_path))
    expected = r"model\.vae_weights: .* holds no weights.*\n +hf download hpcai-tech/OpenSora-VAE"
    with pytest.raises(FileNotFoundError, match=expected):
        package.load_model(settings)


def test_hub_names_without_network(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    settings = ModelSettings(weights="hpcai-tech/OpenSora-STDiT-v3", revision="main")
    with pytest.raises(
        OSError, match=r"transformer of hpcai-tech/OpenSora-STDiT-v3 \(4.8 GB\) is not on this machine"
    ) as found:
        package.load_model(settings)
    assert "hf download hpcai-tech/OpenSora-STDiT-v3 --revision main --local-dir FOLDER" in str(found.value)
    missing = package.missing_weights(settings)
    assert [entry.what.split()[0] for entry in missing] == ["transformer", "vae", "text_encoder", "tokenizer"]
    assert [entry.size for entry in missing] == ["4.8 GB", "1.6 GB", "19 GB", "1 MB"]
    assert missing[2].command == "hf download DeepFloyd/t5-v1_1-xxl"
    assert package.missing_weights(ModelSettings(weights="tiny-random")) == []


def test_hub_names_in_the_local_cache(monkeypatch, tmp_path, published):
    """A complete snapshot is used without network; one without weights counts as missing."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    repository = tmp_path / "hub" / "models--someone--stdit"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.parent.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    os.rename(published, snapshot)
    settings = ModelSettings(weights="someone/stdit")
    assert "transformer" not in str(package.missing_weights(settings))
    (snapshot / "model.safetensors").unlink()
    assert package.missing_weights(settings)[0].what == "transformer (someone/stdit)"
    with pytest.raises(FileNotFoundError, match=r"holds no weights .*\n +hf download someone/stdit"):
        package.load_model(settings)
