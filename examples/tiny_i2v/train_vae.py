"""Train the VAE: `python -m examples.tiny_i2v.train_vae --output runs/tiny_i2v` (step 1 of 3, see README.md). Goes on where it stopped.

L1 and squared error of the pixels, with noise on the latents in place of a posterior's: the Wan pipeline only ever uses the mode. The last
two channels are asked to say where in the picture they are: Wan's transformer knows how far apart two places are, not where they
are, and to zoom and to rotate is to move every place in another way.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from examples.tiny_i2v.clips import MOTIONS, recolour, scene
from examples.tiny_i2v.muon import MuonAndAdamW
from examples.tiny_i2v.photos import HELD_OUT, TRAINING, read_photo
from examples.tiny_i2v.state import Average, Log, copy_into, load_state, save_state

STEPS = 6500
STAGES = ((0.34, 1, 8), (0.77, 5, 2), (1.0, 9, 2))
"""until which part of the steps, frames, clips of a step. Pictures first, then the two kinds of chunk there are, then whole clips"""
NOISE = 0.1
"""standard deviation of what is added to latents in training, in units of theirs"""
CONFIG = {
    "base_dim": 24,
    "decoder_base_dim": 24,
    "z_dim": 34,
    "dim_mult": [1, 2, 2],
    "num_res_blocks": 1,
    "temperal_downsample": [True, True],
    "is_residual": True,
    "in_channels": 12,
    "out_channels": 12,
    "patch_size": 2,
    "scale_factor_spatial": 8,
    "scale_factor_temporal": 4,
}


def new_vae() -> nn.Module:
    """Float32 `AutoencoderKLWan` of Wan's compression, 8 in space and 4 in time, that costs a CPU little: two pixels to a channel first."""
    from diffusers import AutoencoderKLWan

    return AutoencoderKLWan(**CONFIG, latents_mean=[0.0] * CONFIG["z_dim"], latents_std=[1.0] * CONFIG["z_dim"])


def places(latents: Tensor) -> Tensor:
    """What the last two channels of latents [B, C, f, h, w] shall be: x and y in (-1, 1), times the deviation of all latents."""
    y, x = (torch.arange(size, device=latents.device).add(0.5) / size * 2 - 1 for size in latents.shape[-2:])
    where = torch.stack(torch.meshgrid(y, x, indexing="ij")[::-1])[:, None]
    return latents.detach().std() * where.expand(len(latents), -1, latents.shape[2], -1, -1)


def load_vae(folder: Path) -> nn.Module:
    """The averaged weights of a training, for use.

    Raises:
        FileNotFoundError: there is none in `folder`.
    """
    path = folder / "vae.pt"
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: expected what `python -m examples.tiny_i2v.train_vae --output {folder}` writes"
        )
    vae = new_vae()
    copy_into(vae, torch.load(path, weights_only=True)["average"])
    return vae.eval().requires_grad_(False)


def batch_of_clips(photos: list[Tensor], size: int, generator: torch.Generator, frames: int) -> Tensor:
    """[size, 3, frames, H, W] in [-1, 1]: random motions of random photographs in random colours."""
    clips = []
    for _ in range(size):
        which = torch.randint(len(photos), (2,), generator=generator).tolist()
        motion = list(MOTIONS.values())[int(torch.randint(len(MOTIONS), (), generator=generator))]
        clip, _ = scene(photos[which[0]], motion, generator, piece_from=photos[which[1]], frames=frames)
        clips.append(recolour(clip, generator))
    return torch.stack(clips).transpose(1, 2) * 2 - 1


def reconstruct(vae: nn.Module, video: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The decoded clip, and the latents it was decoded from (before noise)."""
    latents = vae.encode(video).latent_dist.mean
    noised = latents if noise is None else latents + noise * latents.detach().std()
    return vae.decode(noised).sample, latents


@contextmanager
def pictures_as_planes() -> Iterator[None]:
    """Within the block a causal convolution of a first frame is one of the plane: what it has of the past is zeros, a third of the work."""
    from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d

    whole = WanCausalConv3d.forward

    def forward(self: nn.Module, x: Tensor, cache_x: Tensor | None = None) -> Tensor:
        if x.shape[2] != 1 or cache_x is not None or self.stride != (1, 1, 1):
            return whole(self, x, cache_x)
        across, _, down, *_ = self._padding
        return F.conv2d(x[:, :, 0], self.weight[:, :, -1], self.bias, padding=(down, across))[:, :, None]

    WanCausalConv3d.forward = forward
    try:
        yield
    finally:
        WanCausalConv3d.forward = whole


@torch.no_grad()
def psnr(vae: nn.Module, names: tuple[str, ...], frames: int, seed: int = 1) -> dict[str, float]:
    """dB over a pan, a zoom and a still clip of each photograph."""
    found = {}
    for name in names:
        photo, generator, errors = read_photo(name), torch.Generator().manual_seed(seed), []
        for motion in ("pan_left", "zoom_in", "still"):
            clip, _ = scene(photo, MOTIONS[motion], generator, whole=True, frames=frames)
            video = clip.transpose(0, 1)[None] * 2 - 1
            errors.append(((reconstruct(vae, video)[0] - video) / 2).square().mean().item())
        found[name] = -10 * math.log10(sum(errors) / len(errors))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="folder of checkpoints and logs")
    parser.add_argument("--steps", type=int, default=STEPS, help="of training; the learning rate falls to 0 by then")
    parser.add_argument("--learning-rate", type=float, default=0.02, help="of Muon; AdamW's is a tenth")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    torch.manual_seed(options.seed)
    photos = [read_photo(name) for name in TRAINING]
    vae = new_vae().train()
    is_kernel = {name: tensor.dim() >= 4 and "gamma" not in name for name, tensor in vae.named_parameters()}
    optimizer = MuonAndAdamW(vae, is_kernel, options.learning_rate, 0.1 * options.learning_rate)
    average = Average(vae, 0.998)
    path = options.output / "vae.pt"
    step, spent = load_state(path, vae, optimizer, average)
    log = Log(options.output / "vae.jsonl")
    print(f"{sum(p.numel() for p in vae.parameters()):,} parameters, from step {step}")
    began = time.monotonic() - spent
    while step < options.steps:
        generator = torch.Generator().manual_seed((options.seed << 32) + step)
        done = step / options.steps
        rate = min(1.0, (step + 1) / 50, (1 - done) / 0.25)  # constant, then straight down
        frames, clips = next((frames, clips) for end, frames, clips in STAGES if done < end)
        video = batch_of_clips(photos, clips, generator, frames)
        noise = torch.randn(clips, CONFIG["z_dim"], (frames - 1) // 4 + 1, *(size // 8 for size in video.shape[-2:]))
        with torch.autocast("cpu", torch.bfloat16), pictures_as_planes():
            decoded, latents = reconstruct(vae, video, NOISE * noise)
        error = decoded.float() - video
        misplaced = (latents[:, -2:].float() - places(latents.float())).square().mean()
        loss = (
            error.abs().mean() + 2 * error.square().mean() + 1e-4 * latents.float().square().mean() + 0.01 * misplaced
        )
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step(rate)
        average.update(vae)
        step += 1
        spent = time.monotonic() - began
        if step % 50 == 0:
            log.write(step=step, seconds=spent, loss=loss.item(), mse=error.square().mean().item(), rate=rate)
        if step % 500 == 0 or step == options.steps:
            save_state(path, vae, optimizer, average, step, spent)
            with average.of(vae):
                held_out = psnr(vae, HELD_OUT, frames)
            log.write(step=step, seconds=spent, psnr=held_out, mean=sum(held_out.values()) / len(held_out))


if __name__ == "__main__":
    main()
