"""What of a Wan pipeline is missing, and the command that fetches it."""

from __future__ import annotations

import json
import shlex
import shutil

import pytest
import torch

from vcd_fast.models.base import family
from vcd_fast.models.wan import fill_time_embedding, load_encoder, load_meta, load_model, missing_weights
from vcd_fast.models.wan.loading import TRANSFORMER_SIZES

PARTS = ["transformer", "vae", "tokenizer", "text_encoder", "image_encoder", "image_processor"]
FUN = "weizhou03/Wan2.1-Fun-1.3B-InP-Diffusers"


@pytest.fixture
def offline(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))


@pytest.fixture
def folder(pipeline_folder, tmp_path):
    return shutil.copytree(pipeline_folder, tmp_path / "pipeline")


def cached(folder, tmp_path, name):
    """A pipeline where the hub's cache would have it."""
    repository = tmp_path / "hub" / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    return shutil.copytree(folder, repository / "snapshots" / ("0" * 40))


def test_nothing_is_missing_where_everything_is(settings, pipeline_folder):
    assert missing_weights(settings(weights=str(pipeline_folder))) == []
    assert missing_weights(settings(weights="tiny-random")) == []


def test_a_hub_name_that_is_not_here(settings, offline):
    found = missing_weights(settings(weights=FUN, revision="v1"))
    assert [entry.what for entry in found] == [f"{part} ({FUN})" for part in PARTS]
    assert [entry.size for entry in found[:4]] == ["3.1 GB", "0.5 GB", "20 MB", "22.7 GB"]
    assert found[0].command == f"hf download {FUN} --revision v1 --include 'transformer/*'"
    assert missing_weights(settings(weights="some-one/else"))[0].size == "size not known"


def test_sizes_are_known_for_the_presets():
    from vcd_fast.config import load_preset, preset_names

    names = {load_preset("wan", name)["model"]["weights"] for name in preset_names("wan")}
    assert names - {"tiny-random", "tiny-i2v"} == set(TRANSFORMER_SIZES)


@pytest.mark.parametrize(
    ("remove", "parts"),
    [
        (["vae"], ["vae"]),
        (["tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json"], ["tokenizer"]),
        (["text_encoder/config.json", "image_processor/preprocessor_config.json"], ["text_encoder", "image_processor"]),
        (["image_encoder/model.safetensors"], ["image_encoder"]),
    ],
)
def test_a_folder_that_lacks_something(settings, folder, remove, parts):
    for name in remove:
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    found = missing_weights(settings(weights=str(folder)))
    assert [entry.what for entry in found] == [f"{part} in {folder}" for part in parts]
    assert shlex.split(found[0].command)[2:] == ["NAME", "--include", f"{parts[0]}/*", "--local-dir", str(folder)]
    with pytest.raises(FileNotFoundError, match=r"^model\.weights: "):
        load_encoder(settings(weights=str(folder)))


def test_models_without_image_encoder_need_none(settings, folder):
    shutil.rmtree(folder / "image_encoder")
    path = folder / "transformer" / "config.json"
    config = json.loads(path.read_text()) | {"image_dim": None, "added_kv_proj_dim": None}
    path.write_text(json.dumps(config))
    assert missing_weights(settings(weights=str(folder))) == []


def test_a_lost_shard_is_named_before_anything_is_loaded(settings, folder):
    index = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    (folder / "transformer" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "transformer" / "one.safetensors").touch()
    with pytest.raises(FileNotFoundError, match=r"lacks two\.safetensors, which diffusion_pytorch_model"):
        load_model(settings(weights=str(folder)))


def test_the_hub_s_cache_is_used_without_network(settings, folder, tmp_path, offline, make_model):
    snapshot = cached(folder, tmp_path, "some-one/wan")
    assert missing_weights(settings(weights="some-one/wan")) == []
    found, wanted = make_model(weights="some-one/wan"), make_model(weights=str(folder))
    pairs = zip(found.transformer.parameters(), wanted.transformer.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    next((snapshot / "vae").glob("*.safetensors")).unlink()
    assert [entry.what for entry in missing_weights(settings(weights="some-one/wan"))] == ["vae (some-one/wan)"]
    with pytest.raises(OSError, match=r"vae holds no weights .*\n +hf download some-one/wan --include 'vae/\*'"):
        load_model(settings(weights="some-one/wan"))


def test_the_meta_model_needs_one_configuration(settings, pipeline_folder, tmp_path, offline):
    place = tmp_path / "only" / "transformer"
    place.mkdir(parents=True)
    shutil.copy(pipeline_folder / "transformer" / "config.json", place)
    meta = load_meta(settings(weights=str(tmp_path / "only")))
    tiny = load_meta(settings(weights="tiny-random"))
    assert meta.device.type == "meta"
    shapes = {name: value.shape for name, value in meta.transformer.state_dict().items()}
    assert shapes == {name: value.shape for name, value in tiny.transformer.state_dict().items()}
    cached(tmp_path / "only", tmp_path, "some-one/wan")
    assert load_meta(settings(weights="some-one/wan")).transformer.config == meta.transformer.config
    with pytest.raises(OSError, match=r"transformer/config\.json of some-one/other is not on this machine"):
        load_meta(settings(weights="some-one/other"))
    with pytest.raises(ValueError, match=r"model\.weights: expected a folder or hub name"):
        load_meta(settings(weights=None))


@pytest.mark.parametrize("where", ["folder", "cache"])
def test_the_time_embedding_is_read_alone(settings, folder, tmp_path, offline, make_model, where):
    weights = str(folder)
    if where == "cache":
        cached(folder, tmp_path, "some-one/wan")
        weights = "some-one/wan"
    transformer = load_meta(settings(weights=weights)).transformer
    assert fill_time_embedding(transformer, settings(weights=weights))
    wanted = make_model(weights=weights).transformer.condition_embedder
    filled = transformer.condition_embedder
    assert torch.equal(filled.time_proj.weight, wanted.time_proj.weight.float())
    timestep = torch.tensor([[0.5] * 256])
    assert torch.equal(filled.time_embedder(timestep), wanted.time_embedder(timestep))
    assert filled.text_embedder.linear_1.weight.is_meta, "nothing else is"


def test_a_time_embedding_that_is_not_here(settings, folder, tmp_path, offline):
    transformer = load_meta(settings()).transformer
    assert not fill_time_embedding(transformer, settings(weights="some-one/other"))
    for path in (folder / "transformer").glob("*.safetensors"):
        path.unlink()
    assert not fill_time_embedding(transformer, settings(weights=str(folder)))
    assert all(value.is_meta for value in transformer.state_dict().values())


def test_the_family_offers_it():
    assert family("wan").missing_weights is missing_weights
