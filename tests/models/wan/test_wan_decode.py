import pytest
import torch

from vcd_fast.models.wan.decode import WanDecoder, chunk_of_frame, denormalise
from vcd_fast.models.wan.tiny import tiny_vae


@pytest.fixture(scope="module")
def vae():
    """As it comes, not patched."""
    return tiny_vae().requires_grad_(False)


@pytest.fixture(scope="module")
def decoder(vae):
    return WanDecoder(vae, frozen_conv=False)


@pytest.fixture(scope="module")
def latents():
    return torch.randn(2, 16, 3, 2, 4, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def weights():
    """What frames are summed up with: a loss that sees every pixel."""
    return torch.randn(2, 9, 3, 16, 32, generator=torch.Generator().manual_seed(1))


def stock_decode(vae, latents):
    pixels = vae.decode(denormalise(latents.to(vae.dtype), vae.config), return_dict=False)[0]
    return (pixels.float() * 0.5 + 0.5).transpose(1, 2)


def gradient(decode, latents, weights, frames, **options):
    z = latents.clone().requires_grad_()
    video = decode(z, frames, **options)
    return torch.autograd.grad((video * weights[:, frames]).sum(), z)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_vae_decode_bit_for_bit(latents, dtype):
    vae = tiny_vae().requires_grad_(False).to(dtype)
    expected = stock_decode(vae, latents)
    assert expected.shape == (2, 9, 3, 16, 32)
    for frozen_conv in (False, True):
        found = WanDecoder(vae, frozen_conv=frozen_conv)(latents)
        assert found.dtype == torch.float32
        assert torch.equal(found, expected)
        assert 0 <= found.min() < found.max() <= 1


@pytest.mark.parametrize("checkpointing", ["chunk", "resnet"])
def test_a_vae_that_puts_patches_into_channels(latents, weights, checkpointing):
    """As the small trained model's: two halvings of size and one of 2 x 2 pixels to a channel, shortcuts around the blocks."""
    from diffusers import AutoencoderKLWan

    torch.manual_seed(0)
    vae = AutoencoderKLWan(
        base_dim=16, z_dim=16, dim_mult=[1, 1, 1], num_res_blocks=1, temperal_downsample=[True, True], is_residual=True,
        in_channels=12, out_channels=12, patch_size=2,
    ).requires_grad_(False)  # fmt: skip
    expected = stock_decode(vae, latents)
    assert expected.shape == (2, 9, 3, 16, 32)
    stock = gradient(lambda z, frames: stock_decode(vae, z), latents, weights, list(range(9)))
    decoder = WanDecoder(vae, checkpointing=checkpointing)
    assert torch.equal(decoder(latents), expected)
    assert torch.equal(decoder(latents, [0, 6]), expected[:, [0, 6]])
    torch.testing.assert_close(gradient(decoder, latents, weights, list(range(9))), stock, atol=1e-4, rtol=1e-4)


def test_clamped_pixels_have_no_gradient_as_in_vae_decode(latents, weights):
    """These random weights never leave [-1, 1] by themselves."""
    vae = tiny_vae().requires_grad_(False)
    vae.decoder.conv_out.weight.mul_(6)
    decoder, frames = WanDecoder(vae), list(range(9))
    video = decoder(latents)
    assert torch.equal(video, stock_decode(vae, latents))
    assert 0.05 < ((video == 0) | (video == 1)).float().mean() < 0.95
    stock = gradient(lambda z, frames: stock_decode(vae, z), latents, weights, frames)
    assert torch.equal(gradient(decoder, latents, weights, frames), stock)


def test_denormalises_as_the_stock_pipeline(vae, latents):
    std = 1.0 / torch.tensor(vae.config.latents_std).view(1, 16, 1, 1, 1)
    mean = torch.tensor(vae.config.latents_mean).view(1, 16, 1, 1, 1)
    assert torch.equal(denormalise(latents, vae.config), latents / std + mean)


@pytest.mark.parametrize("frames", [[0], [1], [4], [5], [0, 8], [2, 3, 6], list(range(9))])
def test_any_frames(decoder, vae, latents, frames):
    assert torch.equal(decoder(latents, frames), stock_decode(vae, latents)[:, frames])


def test_only_the_latents_needed_are_decoded(decoder, latents, monkeypatch):
    counted = []
    forward = decoder.vae.decoder.forward
    monkeypatch.setattr(decoder.vae.decoder, "forward", lambda *a, **k: counted.append(1) or forward(*a, **k))
    for frames, chunks in ([0], 1), ([4], 2), ([1, 2], 2), ([5], 3):
        counted.clear()
        with torch.no_grad():
            decoder(latents, frames)
        assert len(counted) == chunks
    assert [chunk_of_frame(frame) for frame in range(9)] == [0, 1, 1, 1, 1, 2, 2, 2, 2]


@pytest.mark.parametrize("frozen_conv", [False, True])
@pytest.mark.parametrize("checkpointing", ["chunk", "resnet"])
@pytest.mark.parametrize("frames", [[3], [0, 7], list(range(9))])
def test_gradient_is_the_same_bit_for_bit_however_it_is_computed(
    vae, decoder, latents, weights, frames, checkpointing, frozen_conv
):
    expected = gradient(decoder, latents, weights, frames, checkpoint=False)
    other = WanDecoder(tiny_vae().requires_grad_(False), checkpointing=checkpointing, frozen_conv=frozen_conv)
    for checkpoint in (True, False):
        assert torch.equal(gradient(other, latents, weights, frames, checkpoint=checkpoint), expected)
    stock = gradient(lambda z, frames: stock_decode(vae, z)[:, frames], latents, weights, frames)
    if len(frames) == 9:
        assert torch.equal(expected, stock)
    else:  # the stock decode adds zeros of the chunks that are not looked at, in another memory layout
        assert torch.allclose(expected, stock, rtol=1e-4, atol=1e-5)
        assert bool((stock[:, :, chunk_of_frame(frames[-1]) + 1 :] == 0).all())


def test_gradient_is_that_of_finite_differences(decoder, latents, weights):
    frames = [0, 2, 7]
    exact = gradient(decoder, latents, weights, frames)
    # Half of it along the gradient: a random direction alone is nearly orthogonal to it, and rounding would decide.
    direction = torch.randn(latents.shape, generator=torch.Generator().manual_seed(2))
    direction = direction / direction.norm() + exact / exact.norm()
    with torch.no_grad():
        ends = [(decoder(latents + e * direction, frames).double() * weights[:, frames]).sum() for e in (0.03, -0.03)]
    assert float((exact * direction).sum()) == pytest.approx(float(ends[0] - ends[1]) / 0.06, rel=2e-3)


def test_truncated_has_the_same_pixels_and_the_gradient_of_its_own_chunk(vae, decoder, latents, weights):
    truncated = WanDecoder(vae, context="truncated", frozen_conv=False)
    frames = [6]
    assert torch.equal(truncated(latents, frames), decoder(latents, frames))
    exact, cut = (gradient(decode, latents, weights, frames) for decode in (decoder, truncated))
    assert bool((cut[:, :, :2] == 0).all())
    assert bool((exact[:, :, :2] != 0).any())
    assert torch.equal(cut[:, :, 2], exact[:, :, 2])


def test_truncated_over_several_chunks_adds_up(vae, latents, weights):
    truncated = WanDecoder(vae, context="truncated", frozen_conv=False)
    both = gradient(truncated, latents, weights, [2, 6])
    parts = [gradient(truncated, latents, weights, [frame]) for frame in (2, 6)]
    assert torch.allclose(both, parts[0] + parts[1])
    assert all(bool((part != 0).any()) for part in parts)


def test_no_gradient_no_graph(decoder, latents):
    with torch.no_grad():
        assert not decoder(latents.clone().requires_grad_(), [3]).requires_grad
    assert not decoder(latents, [3]).requires_grad


def test_what_is_kept_for_the_backward(saved_bytes, latents):
    """Chunks keep caches only; what a chunk recomputes shrinks with residual blocks and frozen convolutions."""

    def kept(checkpoint, **options):
        vae = tiny_vae().requires_grad_(False)
        decoder = WanDecoder(vae, **options)
        z = latents.clone().requires_grad_()
        with saved_bytes(vae.parameters()) as saved:
            decoder(z, [8], checkpoint=checkpoint)
        return saved.total

    plain = kept(False, frozen_conv=False)
    assert kept(False, frozen_conv=True) < 0.75 * plain
    assert kept(True, frozen_conv=False) < 0.35 * plain
    assert kept(False, frozen_conv=False, checkpointing="resnet") < 0.6 * plain


def test_memory_of_the_published_vae():
    """25 frames of 368x272 in float32, counted on the meta device, in GiB; 39 without any of it."""
    from diffusers import AutoencoderKLWan

    def kept(latent_frames, frame, checkpoint, frozen_conv):
        with torch.device("meta"):
            vae = AutoencoderKLWan().requires_grad_(False)
            latents = torch.empty(1, 16, latent_frames, 34, 46, requires_grad=True)
        weights = {id(p) for p in vae.parameters()}
        sizes, alive = {}, []

        def pack(tensor):
            if id(tensor) not in weights:
                base = tensor if tensor._base is None else tensor._base
                alive.append(base)  # so that no other tensor gets its id
                sizes[id(base)] = base.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            WanDecoder(vae, frozen_conv=frozen_conv)(latents, [frame], checkpoint=checkpoint)
        return sum(sizes.values()) / 2**30

    assert kept(7, 24, True, False) == pytest.approx(4.84, rel=0.02)  # the caches between seven chunks
    first = {frozen: kept(1, 0, False, frozen) for frozen in (False, True)}
    chunk = {frozen: kept(2, 4, False, frozen) - first[frozen] for frozen in (False, True)}
    assert chunk[False] == pytest.approx(6.13, rel=0.02)
    assert chunk[True] == pytest.approx(3.16, rel=0.02)


def test_autocast_outside_does_not_reach_the_decoder(decoder, latents):
    expected = decoder(latents, [3])
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(decoder(latents, [3]), expected)


@pytest.mark.parametrize("frames", [[], [3, 2], [2, 2], [-1], [9]])
def test_frames_are_checked(decoder, latents, frames):
    with pytest.raises(ValueError, match=r"frames: expected ascending, distinct positions in 0\.\.8"):
        decoder(latents, frames)
