"""The model from configurations alone: shapes without weights, network or memory."""

from __future__ import annotations

import json
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch

from vcd_fast.models import opensora as package
from vcd_fast.models.lora import LoRASettings, add_lora
from vcd_fast.models.opensora import tiny
from vcd_fast.models.opensora.settings import TRANSFORMER, VAE, ModelSettings

TOY = {"hidden_size": 64, "depth": 2, "num_heads": 4, "caption_channels": 32}


@pytest.fixture
def offline(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


def shapes(module: torch.nn.Module) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in module.state_dict().items()}


def test_the_tiny_model_has_the_shapes_of_the_loaded_one():
    settings = ModelSettings(weights="tiny-random", dtype="bfloat16", vae_dtype="float16")
    meta = package.load_meta(settings)
    with pytest.warns(UserWarning, match="random"):
        loaded = package.load_model(settings)
    assert meta.device.type == "meta"
    for found, wanted in ((meta.transformer, loaded.transformer), (meta.vae, loaded.vae)):
        assert shapes(found) == shapes(wanted)
        assert all(value.is_meta for value in found.state_dict().values())
        assert [p.dtype for p in found.parameters()] == [p.dtype for p in wanted.parameters()]


def test_the_published_models_need_no_file(offline, golden):
    meta = package.load_meta(ModelSettings(weights=TRANSFORMER))
    published = golden("stdit3_xl2_keys").meta["shapes"]
    assert {name: list(shape) for name, shape in shapes(meta.transformer).items()} == published
    trained = add_lora(meta, LoRASettings(rank=16, alpha=8), seed=0)
    assert sum(p.numel() for p in trained.values()) > 1_000_000
    assert all(p.is_meta for p in trained.values())


def test_a_folder_needs_its_configuration_only(offline, tmp_path):
    folder = tmp_path / "transformer"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"architectures": ["STDiT3"], "drop_path": 0.0, **TOY}))
    meta = package.load_meta(ModelSettings(weights=str(folder), vae_weights=VAE))
    assert shapes(meta.transformer) == shapes(tiny.tiny_transformer())
    assert meta.vae.config.block_out_channels == (128, 256, 512, 512)

    tiny.tiny_vae().save_config(tmp_path / "vae")
    meta = package.load_meta(ModelSettings(weights=str(tmp_path)))
    assert shapes(meta.transformer) == shapes(tiny.tiny_transformer())
    assert tuple(meta.vae.config.block_out_channels) == (8, 16, 32, 32)


@pytest.mark.parametrize(
    ("weights", "kind", "message"),
    [
        (None, ValueError, r"model\.weights: expected .*--preset 240p and --preset tiny"),
        ("./nowhere", FileNotFoundError, r"model\.weights: no such folder: \./nowhere"),
        ("EMPTY", FileNotFoundError, r"config\.json is missing; it describes the model"),
        ("OTHER", ValueError, r"expected the configuration of a STDiT3, got WanTransformer3DModel"),
        (
            "someone/stdit",
            OSError,
            r"model\.weights: config\.json of someone/stdit is not on this machine and could not be .*local folder",
        ),
    ],
)
def test_what_cannot_be_described(weights, kind, message, offline, tmp_path):
    folders = {"EMPTY": tmp_path / "empty", "OTHER": tmp_path / "other"}
    for folder in folders.values():
        folder.mkdir()
    (folders["OTHER"] / "config.json").write_text(json.dumps({"_class_name": "WanTransformer3DModel"}))
    weights = str(folders[weights]) if weights in folders else weights
    with pytest.raises(kind, match=message):
        package.load_meta(ModelSettings(weights=weights))


def test_a_revision_is_looked_up(offline):
    with pytest.raises(OSError, match=r"config.json of hpcai-tech/OpenSora-STDiT-v3 is not on this machine"):
        package.load_meta(ModelSettings(weights=TRANSFORMER, revision="0.1"))


def test_configurations_in_the_local_cache(offline, tmp_path):
    repository = Path(tmp_path) / "hub" / "models--someone--stdit"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    (snapshot / "config.json").write_text(json.dumps(TOY))
    meta = package.load_meta(ModelSettings(weights="someone/stdit"))
    assert shapes(meta.transformer) == shapes(tiny.tiny_transformer())
