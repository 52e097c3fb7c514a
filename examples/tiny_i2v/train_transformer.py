"""Train the transformer and the text encoder: `python -m examples.tiny_i2v.train_transformer --output runs/tiny_i2v` (step 2 of 3).

Flow matching on latents of clips encoded beforehand, noise levels shifted by 3 as Wan samples them. Goes on where it stopped.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from examples.tiny_i2v.clips import MOTIONS, draw_prompt, recolour, scene
from examples.tiny_i2v.muon import MuonAndAdamW
from examples.tiny_i2v.photos import TRAINING, read_photo
from examples.tiny_i2v.state import Average, Log, load_state, save_state
from examples.tiny_i2v.text import attend_to_short_text, encode_prompts, new_text_encoder, new_tokenizer
from examples.tiny_i2v.train_vae import CONFIG, load_vae

SHIFT = 3.0
DROPPED_PROMPTS = 0.1
"""of the prompts are empty in training, for classifier-free guidance"""
HEADS, HEAD_DIM, LAYERS, FFN = 6, 32, 4, 512
OFTEN = {"drift": 4.0, "zoom": 2.0, "rotate": 2.0}
"""how much oftener than others clips are drawn whose motion is harder to learn"""


class Clips(NamedTuple):
    """Encoded training clips."""

    latents: Tensor
    """[N, C, f, h, w], not normalised"""
    condition: Tensor
    """[N, C, f, h, w] of the first frame followed by grey, as the Wan pipeline encodes it"""
    motion: Tensor
    """[N] position in MOTIONS"""


def new_transformer() -> nn.Module:
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        in_channels=2 * CONFIG["z_dim"] + 4,
        out_channels=CONFIG["z_dim"],
        text_dim=48,
        freq_dim=256,
        ffn_dim=FFN,
        num_layers=LAYERS,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=64,
        image_dim=None,
        added_kv_proj_dim=None,
    )


class Model(nn.Module):
    """Transformer and text encoder, which are trained together."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer = new_transformer()
        self.text_encoder = new_text_encoder()
        self.tokenizer = new_tokenizer()

    def forward(self, noised: Tensor, condition: Tensor, sigma: Tensor, prompts: list[str]) -> Tensor:
        """noised [B, C, f, h, w], condition [B, C + 4, f, h, w], sigma [B] in (0, 1] -> velocity [B, C, f, h, w]"""
        return self.transformer(
            hidden_states=torch.cat([noised, condition], dim=1),
            timestep=1000 * sigma,
            encoder_hidden_states=encode_prompts(self.text_encoder, self.tokenizer, prompts),
            return_dict=False,
        )[0]


@torch.no_grad()
def encode_clips(vae: nn.Module, first: int, count: int, seed: int, report: Log, size: int = 15) -> Clips:
    """Clips `first` to `count` - 1, the motions in turn; `size` at a time. Clip i depends on the seed and i alone."""
    photos = [read_photo(name) for name in TRAINING]
    motions = list(MOTIONS.values())
    latents, conditions = [], []
    for start in range(first, count, size):
        clips = []
        for index in range(start, min(count, start + size)):
            generator = torch.Generator().manual_seed((seed << 40) + (1 << 39) + index)
            which = torch.randint(len(photos), (2,), generator=generator).tolist()
            motion = motions[index % len(motions)]
            clip, _ = scene(photos[which[0]], motion, generator, piece_from=photos[which[1]])
            clips.append(recolour(clip, generator))
        video = torch.stack(clips).transpose(1, 2) * 2 - 1
        latents.append(vae.encode(video).latent_dist.mode())
        video[:, :, 1:] = 0
        conditions.append(vae.encode(video).latent_dist.mode())
        if (start - first) // size % 20 == 0:
            report.write(encoded=start + len(clips))
    motion = torch.arange(first, count) % len(motions)
    return Clips(torch.cat(latents), torch.cat(conditions), motion)


def clips_of(path: Path, vae: nn.Module, count: int, seed: int, log: Log) -> Clips:
    """`count` clips or more: from the file as far as they are there, the others made and written to it."""
    parts = [Clips(**torch.load(path, weights_only=True))] if path.is_file() else []
    there = len(parts[0].motion) if parts else 0
    if there >= count:
        return parts[0]
    parts.append(encode_clips(vae, there, count, seed, log))
    clips = Clips(*(torch.cat(values) for values in zip(*parts, strict=True)))
    torch.save(clips._asdict(), path.with_suffix(".partial"))
    os.replace(path.with_suffix(".partial"), path)
    return clips


def matrices(model: Model) -> dict[str, bool]:
    """Which parameters are Muon's: the linear layers within blocks. What reads inputs or writes outputs is better left to AdamW."""
    return {
        name: tensor.dim() == 2 and ".blocks." in name and "scale_shift_table" not in name
        for name, tensor in model.named_parameters()
    }


def statistics(latents: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of every channel, [C] each: `latents_mean` and `latents_std` of the VAE's configuration."""
    return latents.mean((0, 2, 3, 4)), latents.std((0, 2, 3, 4))


def with_mask(condition: Tensor) -> Tensor:
    """[B, C, f, h, w] -> [B, C + 4, f, h, w]: four channels in front that are 1 in the first latent frame."""
    mask = torch.zeros_like(condition[:, :4])
    mask[:, :, 0] = 1
    return torch.cat([mask, condition], dim=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="folder train_vae wrote to")
    parser.add_argument("--clips", type=int, default=4500)
    parser.add_argument("--steps", type=int, default=8000)
    parser.add_argument("--batch-size", type=int, default=20)
    parser.add_argument("--learning-rate", type=float, default=0.02, help="of Muon; AdamW's is a tenth")
    parser.add_argument("--restart", type=int, default=0, help="step the learning rate rises at and falls from")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    torch.manual_seed(options.seed)
    log = Log(options.output / "transformer.jsonl")
    clips = clips_of(options.output / "clips.pt", load_vae(options.output), options.clips, options.seed, log)
    mean, std = (value.view(1, -1, 1, 1, 1) for value in statistics(clips.latents))
    latents, condition = (clips.latents - mean) / std, with_mask((clips.condition - mean) / std)

    model = Model().train()
    attend_to_short_text(model.transformer)
    optimizer = MuonAndAdamW(model, matrices(model), options.learning_rate, 0.1 * options.learning_rate)
    average = Average(model, 0.999)
    path = options.output / "transformer.pt"
    step, spent = load_state(path, model, optimizer, average)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, from step {step}")
    began, recent, motions = time.monotonic() - spent, [], list(MOTIONS.values())
    share = torch.tensor([OFTEN.get(name.split("_")[0], 1.0) for name in MOTIONS])[clips.motion]
    while step < options.steps:
        generator = torch.Generator().manual_seed((options.seed << 32) + step)
        done = (step - options.restart) / (options.steps - options.restart)
        rate = min(1.0, (step - options.restart + 1) / 100) * 0.5 * (1 + math.cos(math.pi * done))
        picked = torch.multinomial(share, options.batch_size, replacement=True, generator=generator)
        uniform = (
            torch.rand(options.batch_size, generator=generator) + torch.arange(options.batch_size)
        ) / options.batch_size
        sigma = SHIFT * uniform / (1 + (SHIFT - 1) * uniform)
        noise = torch.randn(latents[picked].shape, generator=generator)
        level = sigma.view(-1, 1, 1, 1, 1)
        prompts = [draw_prompt(motions[index], generator) for index in clips.motion[picked].tolist()]
        dropped = torch.rand(options.batch_size, generator=generator) < DROPPED_PROMPTS
        prompts = ["" if drop else prompt for prompt, drop in zip(prompts, dropped.tolist(), strict=True)]
        velocity = model((1 - level) * latents[picked] + level * noise, condition[picked], sigma, prompts)
        loss = F.mse_loss(velocity, noise - latents[picked])
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step(rate)
        average.update(model)
        step += 1
        recent.append(loss.item())
        if step % 100 == 0:
            log.write(step=step, seconds=time.monotonic() - began, loss=sum(recent) / len(recent))
            recent.clear()
        if step % 1000 == 0 or step == options.steps:
            save_state(path, model, optimizer, average, step, time.monotonic() - began)


if __name__ == "__main__":
    main()
