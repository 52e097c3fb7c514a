"""Open-Sora's VAE against numbers of the original code; chosen frames against all of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vcd_fast.models.opensora.temporal_vae import TemporalVAE, sampled
from vcd_fast.models.opensora.vae import SPATIAL_SCALE, OpenSoraVAE, chunks, latent_frames

TEMPORAL = {"filters": 16, "num_groups": 4}
TINY = {
    "block_out_channels": (8, 16, 32, 32),
    "norm_num_groups": 4,
    "temporal_filters": 16,
    "temporal_num_groups": 4,
}
TOLERANCE = 2e-5


@pytest.fixture(scope="module")
def vae(recipe) -> OpenSoraVAE:
    return recipe(OpenSoraVAE(**TINY)).requires_grad_(False)


@pytest.fixture(scope="module")
def temporal_vae(recipe) -> TemporalVAE:
    return recipe(TemporalVAE(**TEMPORAL)).requires_grad_(False)


@pytest.fixture(scope="module")
def case(golden):
    return golden("vae_pipeline_small")


def test_weights_are_those_of_the_goldens(vae, golden):
    keys = golden("vae_pipeline_small_keys").meta
    state = vae.state_dict()
    assert {k: list(v.shape) for k, v in state.items()} == keys["shapes"]
    for key, (total, first) in keys["fingerprints"].items():
        assert state[key].double().sum().item() == pytest.approx(total, rel=1e-4, abs=1e-4), key
        assert state[key].flatten()[:4].tolist() == pytest.approx(first, rel=1e-5), key


@pytest.mark.parametrize("name", ["t1", "t6", "t16", "t17", "t34", "t51"])
def test_temporal_vae(name, golden, temporal_vae, error):
    case = golden("vae_temporal_small")
    model = temporal_vae
    of = {key.removeprefix(f"{name}."): value for key, value in case.tensors.items() if key.startswith(f"{name}.")}
    with torch.no_grad():
        mean, logvar = model.encode(of["enc.x"])
        frames = model.decode(of["dec.z"], case.meta["cases"][name]["num_frames"])
    assert error(mean, of["enc.mean"]) <= TOLERANCE
    assert error(logvar, of["enc.logvar"]) <= TOLERANCE
    assert error(torch.exp(logvar / 2), of["enc.std"]) <= TOLERANCE
    assert error(frames, of["dec.out"]) <= TOLERANCE


def test_temporal_gradient(golden, temporal_vae, error):
    tensors = golden("vae_temporal_small").tensors
    latents = tensors["grad.z"].clone().requires_grad_()
    frames = temporal_vae.decode(latents, 17)
    assert error(frames, tensors["grad.out"]) <= TOLERANCE
    (frames * tensors["grad.seed_tensor"]).sum().backward()
    assert error(latents.grad, tensors["grad.dz"]) <= 1e-4


def test_temporal_vae_of_the_published_width(golden, recipe, error):
    tensors = golden("vae_temporal_realwidth").tensors
    with torch.device("meta"):
        model = TemporalVAE()
    recipe(model)
    with torch.no_grad():
        mean, logvar = model.encode(tensors["enc.x"])
        frames = model.decode(tensors["dec.z"], 17)
    assert error(mean, tensors["enc.mean"]) <= TOLERANCE
    assert error(logvar, tensors["enc.logvar"]) <= TOLERANCE
    assert error(frames, tensors["dec.out"]) <= TOLERANCE


@pytest.mark.parametrize("name", ["f1", "f17", "f34", "f40", "f51"])
def test_encode_and_decode(name, vae, case, error):
    of = {key.removeprefix(f"{name}."): value for key, value in case.tensors.items() if key.startswith(f"{name}.")}
    meta = case.meta["cases"][name]
    with torch.no_grad():
        assert error(vae.encode(of["x"]), of["z_norm_mode"]) <= TOLERANCE
        generator = torch.Generator().manual_seed(meta["seed"])
        assert error(vae.encode(of["x"], sample=True, generator=generator), of["encode_seeded"]) <= TOLERANCE
        decoded = vae.decode(of["dec.z"], meta["num_frames"])
    assert list(decoded.shape) == meta["decoded_shape"]
    assert error(decoded, of["dec.out"]) <= TOLERANCE
    z = of["dec.z"] * vae.scale + vae.shift
    with torch.no_grad():
        parts = [
            vae.temporal_vae.decode(z[:, :, chunk.first_latent :][:, :, : chunk.latents], chunk.frames)
            for chunk in chunks(meta["num_frames"])
        ]
    assert error(torch.cat(parts, dim=2), of["dec.xz"]) <= TOLERANCE


def test_a_latent_frame_decoded_alone(vae, case, error):
    """What VADER shows its rewards: a latent frame of the clip as if it were an image's."""
    latents = case.tensors["vader.z"]
    with torch.no_grad():
        assert error(vae.decode(latents[:, :, 7:8], 1), case.tensors["vader.single_latent_7"]) <= TOLERANCE
    with pytest.raises(ValueError, match="expected 2 latent frames for num_frames=8, got 8"):
        vae.decode(latents[:, :, 0:15:2], 8)  # the original returns 31 frames


def test_stages_of_encode(vae, case, error):
    tensors = case.tensors
    with torch.no_grad():
        posterior = vae.spatial.encode(tensors["f17.x"][0].transpose(0, 1)).latent_dist
        assert error(posterior.mean, tensors["f17.spatial_mean"]) <= TOLERANCE
        assert error(posterior.logvar, tensors["f17.spatial_logvar"]) <= TOLERANCE
        clip = posterior.mean.transpose(0, 1)[None] * SPATIAL_SCALE
        assert error(clip, tensors["f17.xz_mode"]) <= TOLERANCE
        mean, logvar = vae.temporal_vae.encode(clip)
    assert error(mean, tensors["f17.temporal_mean"]) <= TOLERANCE
    assert error(logvar, tensors["f17.temporal_logvar"]) <= TOLERANCE


@pytest.mark.parametrize("checkpoint", [True, False])
def test_gradient_of_chosen_frames(checkpoint, vae, case, error):
    tensors = case.tensors
    latents = tensors["grad.z"].clone().requires_grad_()
    frames = vae.decode(latents, 22, tensors["grad.frame_idx"].tolist(), checkpoint=checkpoint)
    assert error(frames, tensors["grad.frames"]) <= TOLERANCE
    (frames * tensors["grad.seed_tensor"]).sum().backward()
    assert error(latents.grad, tensors["grad.dz"]) <= 1e-4


def test_chosen_frames_equal_decoding_all_and_selecting(vae):
    latents = torch.randn(2, 4, 12, 2, 3, generator=torch.Generator().manual_seed(0))
    wanted = [1, 16, 39]
    seed = torch.randn(2, 3, len(wanted), 16, 24, generator=torch.Generator().manual_seed(1))

    def run(decode) -> tuple[Tensor, Tensor]:
        leaf = latents.clone().requires_grad_()
        frames = decode(leaf)
        (frames * seed).sum().backward()
        return frames.detach(), leaf.grad

    chosen = run(lambda z: vae.decode(z, 40, wanted))
    everything = run(lambda z: vae.decode(z, 40, checkpoint=False)[:, :, wanted])
    assert torch.equal(chosen[0], everything[0])
    torch.testing.assert_close(chosen[1], everything[1], rtol=1e-5, atol=1e-5 * everything[1].abs().max().item())
    assert chosen[1][:, :, 5:10].eq(0).all(), "no frame of the second chunk was asked for"
    assert chosen[1][:, :, 10:].ne(0).all(), "a frame depends on every latent of its chunk"


def test_only_the_chunks_and_frames_asked_for_are_decoded(vae, monkeypatch):
    counts = {"chunks": [], "frames": 0}
    decode, image = TemporalVAE.decode, OpenSoraVAE._decode_image
    monkeypatch.setattr(
        TemporalVAE, "decode", lambda self, z, n: counts["chunks"].append((z.shape[2], n)) or decode(self, z, n)
    )

    def count(self, z):
        counts["frames"] += len(z)
        return image(self, z)

    monkeypatch.setattr(OpenSoraVAE, "_decode_image", count)
    with torch.no_grad():
        vae.decode(torch.zeros(1, 4, 12, 2, 2), 40, [18, 20, 39])
    assert counts == {"chunks": [(5, 17), (2, 6)], "frames": 3}


def test_checkpointing_keeps_one_unit_at_a_time(vae):
    latents = torch.randn(1, 4, 10, 2, 2, requires_grad=True)

    def kept(frames: list[int], checkpoint: bool) -> int:
        storages: dict[int, int] = {}
        skip = {tensor.untyped_storage().data_ptr() for tensor in vae.state_dict().values()}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in skip:
                storages[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
            return tensor

        alive: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            vae.decode(latents, 34, frames, checkpoint=checkpoint)
        return sum(storages.values())

    one, many = kept([1], True), kept([1, 2, 3, 18], True)
    assert many < kept([1], False) / 20
    assert many - one <= 5 * 4 * 17 * 2 * 2 * 4, "a further frame keeps little more than its latents"


def test_sampling_reads_the_generator():
    mean, logvar = torch.zeros(3), torch.zeros(3)
    first, again = (sampled(mean, logvar, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, sampled(mean, logvar, torch.Generator().manual_seed(4)))


def test_latent_frames_of_the_original(golden):
    table = golden("vae_latent_size").meta
    assert len(table) > 80
    for name, (frames, _height, _width) in table.items():
        assert latent_frames(int(name.split("x")[0])) == frames, name


def test_chunks_cover_a_clip():
    assert chunks(40) == [(0, 17, 0, 5), (17, 17, 5, 5), (34, 6, 10, 2)]
    assert sum(chunk.latents for chunk in chunks(51)) == latent_frames(51) == 15


def test_published_keys(golden):
    keys = golden("vae_v1_2_keys").meta
    with torch.device("meta"):
        model = OpenSoraVAE()
    assert {k: list(v.shape) for k, v in model.state_dict().items()} == keys["shapes"]
    assert sum(p.numel() for p in model.parameters()) == keys["n_params"]


@pytest.mark.parametrize("num_frames", [0, 50, 52, 68])
def test_latents_that_do_not_belong_to_num_frames(num_frames, vae):
    with pytest.raises(ValueError, match=r"latents: expected \d+ latent frames for num_frames=\d+, got 15"):
        vae.decode(torch.zeros(1, 4, 15, 2, 2), num_frames)


@pytest.mark.parametrize("frames", [[], [3, 3], [4, 2], [-1], [17]])
def test_frames_out_of_range_or_order(frames, vae):
    with pytest.raises(ValueError, match=r"frames: expected ascending positions in 0\.\.16"):
        vae.decode(torch.zeros(1, 4, 5, 2, 2), 17, frames)


@pytest.mark.parametrize("shape", [(1, 3, 16, 16), (1, 4, 1, 16, 16), (1, 3, 1, 7, 16)])
def test_pixels_of_a_wrong_shape(shape, vae):
    with pytest.raises(ValueError, match=r"pixels: expected \[B, 3, T, H, W\]"):
        vae.encode(torch.zeros(shape))


def test_latents_of_a_wrong_shape(vae):
    with pytest.raises(ValueError, match=r"latents: expected \[B, 4, t, h, w\], got \(4, 5, 2, 2\)"):
        vae.decode(torch.zeros(4, 5, 2, 2), 17)


def test_configurations_that_cannot_be():
    with pytest.raises(ValueError, match="block_out_channels: expected 4 levels"):
        OpenSoraVAE(**{**TINY, "block_out_channels": (8, 16)})
    with pytest.raises(ValueError, match="latent_scale: expected 4 values"):
        OpenSoraVAE(**TINY, latent_scale=(1.0, 2.0))
