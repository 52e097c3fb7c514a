import gc
import shutil
import weakref

import pytest
import torch
from torch.nn import functional as F

from vcd_fast.models.wan import load_encoder
from vcd_fast.models.wan.condition import WanCondition
from vcd_fast.models.wan.encoder import WanEncoder, clean_prompt

HEIGHT, WIDTH, FRAMES = 32, 48, 9
PROMPTS = ["a cat runs", "the red boat on the sea turns slowly"]


@pytest.mark.parametrize("image_encoder", [True, False])
def test_equals_the_stock_pipeline(stock, encode, pictures, image_encoder):
    weights = "tiny-random" if image_encoder else "tiny-random-no-image-encoder"
    found = encode(weights)
    pipe = stock(image_encoder)
    prompts, negative = pipe.encode_prompt(PROMPTS, ["still", "still"], True, max_sequence_length=512)
    assert torch.allclose(found.prompt_embeds, prompts, atol=1e-6)
    assert torch.allclose(found.negative_prompt_embeds, negative, atol=1e-6)
    for index, image in enumerate(pictures[0]):
        pixels = pipe.video_processor.preprocess(image, height=HEIGHT, width=WIDTH)
        _, latents = pipe.prepare_latents(pixels, 1, 16, HEIGHT, WIDTH, FRAMES, torch.float32, "cpu", torch.Generator())
        assert torch.equal(found.latents[index : index + 1], latents)
        if image_encoder:
            assert torch.equal(found.image_embeds[index : index + 1], pipe.encode_image(image, "cpu"))
    if not image_encoder:
        assert found.image_embeds is None


def test_prompts_end_in_zeros_and_survive_a_file(condition, tmp_path):
    lengths = (condition.prompt_embeds != 0).any(2).sum(1).tolist()
    assert lengths == [4, 9]  # words and </s>
    condition.save(tmp_path / "condition.safetensors")
    assert (tmp_path / "condition.safetensors").stat().st_size < condition.prompt_embeds.nbytes
    read = WanCondition.load(tmp_path / "condition.safetensors")
    for name, value in condition._tensors().items():
        assert torch.equal(getattr(read, name), value), name


def test_a_condition_of_an_empty_prompt_survives_a_file(condition, tmp_path):
    empty = WanCondition(
        torch.zeros_like(condition.prompt_embeds), condition.negative_prompt_embeds, condition.latents, None
    )
    empty.save(tmp_path / "condition.safetensors")
    assert torch.equal(WanCondition.load(tmp_path / "condition.safetensors").prompt_embeds, empty.prompt_embeds)


def test_a_sample_does_not_depend_on_its_batch(condition, encode, pictures):
    alone = encode(images=pictures[1][1:], prompts=PROMPTS[1:])
    for name, value in condition._tensors().items():
        assert torch.equal(getattr(alone, name), value[1:]), name
    joined = WanCondition.collate(condition.split())
    for name, value in condition._tensors().items():
        assert torch.equal(getattr(joined, name), value), name


def test_mask_marks_the_first_latent_frame(condition):
    mask = condition.latents[:, :4]
    assert bool((mask[:, :, 0] == 1).all())
    assert bool((mask[:, :, 1:] == 0).all())


def test_squash_shows_the_whole_picture_to_clip(condition, encode, pictures):
    # The crop drops the left and right edges of a 48x32 picture; the squash does not.
    edged = pictures[1].clone()
    edged[:, :, :, :4] = 0
    crop, squash = encode(images=edged), encode(images=edged, clip_preprocess="squash")
    assert torch.equal(crop.image_embeds, condition.image_embeds)
    assert not torch.allclose(squash.image_embeds, encode(clip_preprocess="squash").image_embeds)
    assert torch.equal(squash.latents, crop.latents)


def test_squash_is_bicubic_interpolation_of_the_whole_picture(encode, pictures, stock):
    pipe = stock(True)
    processor = pipe.image_processor
    scaled = F.interpolate(pictures[1], size=(32, 32), mode="bicubic", align_corners=False)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (processor.image_mean, processor.image_std))
    states = pipe.image_encoder((scaled - mean) / std, output_hidden_states=True).hidden_states[-2]
    assert torch.allclose(encode(clip_preprocess="squash").image_embeds, states, atol=1e-5)


def test_one_sub_model_at_a_time(settings, quiet, pictures, monkeypatch):
    alive, most, loaded = [], [], []
    load = WanEncoder._load

    def counted(self, part):
        gc.collect()
        most.append(sum(reference() is not None for reference in alive))
        model = load(self, part)
        alive.append(weakref.ref(model))
        loaded.append(part)
        return model

    monkeypatch.setattr(WanEncoder, "_load", counted)
    encoder = load_encoder(settings())
    assert loaded == []
    quiet(encoder.encode, pictures[1], PROMPTS, ["", ""], HEIGHT, WIDTH, FRAMES)
    gc.collect()
    assert sorted(loaded) == ["image_encoder", "text_encoder", "vae"]
    assert most == [0, 0, 0]
    assert not any(reference() is not None for reference in alive)


def test_random_weights_are_announced(settings, pictures):
    with pytest.warns(UserWarning, match="these weights are random"):
        load_encoder(settings()).encode(pictures[1][:1], ["a"], [""], HEIGHT, WIDTH, FRAMES)


def test_a_folder_gives_what_the_same_weights_in_code_give(pipeline_folder, encode, condition):
    found = encode(str(pipeline_folder))
    for name, value in condition._tensors().items():
        assert torch.equal(getattr(found, name), value), name


def test_fingerprint_follows_weights_and_choices(settings, pipeline_folder, tmp_path):
    base = load_encoder(settings(weights=str(pipeline_folder))).fingerprint
    assert load_encoder(settings(weights=str(pipeline_folder), guidance_scale=3)).fingerprint == base
    copied = tmp_path / "elsewhere"
    shutil.copytree(pipeline_folder, copied)
    assert load_encoder(settings(weights=str(copied))).fingerprint == base
    others = {
        load_encoder(settings(weights=str(pipeline_folder), clip_preprocess="squash")).fingerprint,
        load_encoder(settings(weights=str(pipeline_folder), vae_dtype="bfloat16")).fingerprint,
        load_encoder(settings(weights=str(pipeline_folder), dtype="bfloat16")).fingerprint,
    }
    file = next((copied / "text_encoder").glob("*.safetensors"))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    others.add(load_encoder(settings(weights=str(copied))).fingerprint)
    assert len(others) == 4
    assert base not in others


@pytest.mark.parametrize("part", ["text_encoder", "tokenizer", "vae", "image_encoder", "image_processor"])
def test_a_missing_part_is_named(settings, pipeline_folder, tmp_path, part):
    folder = tmp_path / "pipeline"
    shutil.copytree(pipeline_folder, folder)
    shutil.rmtree(folder / part)
    with pytest.raises(FileNotFoundError, match=f"no folder '{part}'.*hf download NAME --include '{part}/\\*'"):
        load_encoder(settings(weights=str(folder)))


def test_weights_that_are_not_there(settings, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"model.weights: expected a folder or hub name .*tiny-random"):
        load_encoder(settings(weights=None))
    with pytest.raises(FileNotFoundError, match=r"no such folder: ./nowhere"):
        load_encoder(settings(weights="./nowhere"))
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="got the file"):
        load_encoder(settings(weights=str(tmp_path / "file")))


def test_a_hub_name_without_network_says_what_to_run(settings, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(OSError, match=r"transformer of some-one/Wan-I2V are not on this machine") as caught:
        load_encoder(settings(weights="some-one/Wan-I2V", revision="v1"))
    assert "hf download some-one/Wan-I2V --revision v1" in str(caught.value)
    assert "'transformer/*'" in str(caught.value)


def test_a_broken_config_is_named(settings, pipeline_folder, tmp_path):
    folder = tmp_path / "pipeline"
    shutil.copytree(pipeline_folder, folder)
    (folder / "transformer" / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json: expected JSON"):
        load_encoder(settings(weights=str(folder)))
    (folder / "transformer" / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"config.json is missing"):
        load_encoder(settings(weights=str(folder)))


def test_inputs_are_checked(settings, pictures):
    encoder = load_encoder(settings())
    with pytest.raises(ValueError, match=r"images: expected \[B, 3, 64, 48\], got \[2, 3, 32, 48\]"):
        encoder.encode(pictures[1], PROMPTS, ["", ""], 64, WIDTH, FRAMES)
    with pytest.raises(
        ValueError, match="prompts: expected one prompt and one negative prompt for each of 2 images, got 1"
    ):
        encoder.encode(pictures[1], PROMPTS[:1], [""], HEIGHT, WIDTH, FRAMES)


def test_prompts_are_cleaned_as_wan_does():
    assert clean_prompt("  a\n cat&amp;amp;dog\t\u2019s  ") == "a cat&dog 's"
