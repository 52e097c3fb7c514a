"""A Wan 2.1 I2V pipeline of a few hundred thousand random weights, made of the same classes as the real one.

For tests and for trying a training setup on a CPU in minutes. Nothing in it was trained: its videos are noise.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from torch import nn

from vcd_fast.models.random_weights import seeded

WORDS = """
    a an the this that of in on at by to from with and or is are cat dog bird man woman child person boat car train tree flower
    sea sky road street house room table cup coffee water light sun red blue green white black small big slowly quickly
    runs walks jumps turns moves rocket camera pans zooms video photo picture still quiet smiles looks drinks flies
""".split()  # noqa: SIM905
HEADS, HEAD_DIM, LAYERS = 2, 12, 2
TEXT_DIM, IMAGE_DIM, IMAGE_SIZE = 32, 16, 32


def tiny_transformer(image_encoder: bool = True, layers: int = LAYERS) -> nn.Module:
    """Float32 `WanTransformer3DModel`, 2 blocks of width 24; the same weights at every call."""
    from diffusers import WanTransformer3DModel

    width = HEADS * HEAD_DIM
    with seeded("transformer"):
        model = WanTransformer3DModel(
            patch_size=(1, 2, 2),
            num_attention_heads=HEADS,
            attention_head_dim=HEAD_DIM,
            in_channels=36,
            out_channels=16,
            text_dim=TEXT_DIM,
            freq_dim=256,
            ffn_dim=2 * width,
            num_layers=layers,
            cross_attn_norm=True,
            qk_norm="rms_norm_across_heads",
            rope_max_seq_len=64,
            image_dim=IMAGE_DIM if image_encoder else None,
            added_kv_proj_dim=width if image_encoder else None,
        )
    return model.eval()


def tiny_vae() -> nn.Module:
    """Float32 `AutoencoderKLWan`. Base width 16: with less, the RMS norms are too ill-conditioned for finite differences."""
    from diffusers import AutoencoderKLWan

    with seeded("vae"):
        model = AutoencoderKLWan(
            base_dim=16, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
        )
    return model.eval()


def tiny_text_encoder() -> nn.Module:
    from transformers import UMT5Config, UMT5EncoderModel

    config = UMT5Config(
        vocab_size=len(WORDS) + 3,
        d_model=TEXT_DIM,
        d_kv=8,
        d_ff=37,
        num_layers=2,
        num_heads=4,
        relative_attention_num_buckets=8,
        dropout_rate=0.0,
    )
    with seeded("text_encoder"):
        return UMT5EncoderModel(config).eval()


def tiny_tokenizer() -> object:
    """Words of a short list, everything else unknown; one token per word, as UMT5 ends every prompt with `</s>`."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: index for index, word in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def tiny_image_encoder() -> nn.Module:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    config = CLIPVisionConfig(
        hidden_size=IMAGE_DIM,
        intermediate_size=2 * IMAGE_DIM,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=IMAGE_SIZE,
        patch_size=8,
        projection_dim=IMAGE_DIM,
    )
    with seeded("image_encoder"):
        return CLIPVisionModel(config).eval()


def image_processor_class() -> type:
    """CLIP's processor on PIL. Plain `CLIPImageProcessor` resizes differently once torchvision is installed."""
    import transformers

    return getattr(transformers, "CLIPImageProcessorPil", None) or transformers.CLIPImageProcessor


def tiny_image_processor() -> object:
    return image_processor_class()(
        size={"shortest_edge": IMAGE_SIZE}, crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    )


def tiny_components(image_encoder: bool = True) -> dict[str, object]:
    """Every component of the tiny `WanImageToVideoPipeline`, by the name its constructor gives it."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    return {
        "transformer": tiny_transformer(image_encoder),
        "vae": tiny_vae(),
        "text_encoder": tiny_text_encoder(),
        "tokenizer": tiny_tokenizer(),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0),
        "image_encoder": tiny_image_encoder() if image_encoder else None,
        "image_processor": tiny_image_processor() if image_encoder else None,
    }


def save_tiny_pipeline(folder: str | os.PathLike[str], image_encoder: bool = True) -> Path:
    """Write the tiny pipeline to `folder` in diffusers layout, all of it or nothing.

    Raises:
        FileExistsError: `folder` exists and is not empty.
    """
    from diffusers import WanImageToVideoPipeline

    target = Path(folder)
    if target.exists() and any(target.iterdir()):
        raise FileExistsError(f"{target}: expected a new or empty folder")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as temporary:
        partial = Path(temporary) / "pipeline"
        WanImageToVideoPipeline(**tiny_components(image_encoder)).save_pretrained(partial)
        if target.exists():
            target.rmdir()
        partial.rename(target)
    return target
