"""`vcd generate`: a picture and a prompt become a video, with or without a LoRA."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

SMALL_MODEL = "tiny-i2v"
"""preset of the model of family wan that comes with the package"""


def generate(
    image: Annotated[Path, typer.Argument(help="the picture the video starts from")],
    prompt: Annotated[str, typer.Argument(help="what should happen")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="video to write; with several seeds -SEED is added")
    ] = Path("video.mp4"),
    model: Annotated[str, typer.Option(help="model family: wan or opensora")] = "wan",
    preset: Annotated[str | None, typer.Option(help="named settings of the family, e.g. tiny")] = None,
    weights: Annotated[str | None, typer.Option(help="folder or hub name of the weights")] = None,
    lora: Annotated[Path | None, typer.Option(help="LoRA file or folder (diffusers, peft or comfy)")] = None,
    lora_scale: Annotated[float, typer.Option(help="factor on the LoRA's effect; 0 is the base model")] = 1.0,
    seed: Annotated[list[int], typer.Option(help="noise; may be given several times")] = [0],  # noqa: B006  (typer copies it)
    negative_prompt: Annotated[str | None, typer.Option(help="what should not happen")] = None,
    frames: Annotated[int | None, typer.Option(help="frames of the video, the picture included")] = None,
    size: Annotated[str | None, typer.Option(help="WIDTHxHEIGHT in pixels")] = None,
    fps: Annotated[float | None, typer.Option(help="frames per second")] = None,
    guidance: Annotated[float | None, typer.Option(help="classifier-free guidance")] = None,
    steps: Annotated[int | None, typer.Option(help="sampling steps")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    strip: Annotated[bool, typer.Option(help="also write a strip of frames as PNG")] = True,
) -> None:
    """Animate a picture."""
    import torch
    from rich.progress import Progress

    from vcd_fast.config import compose_sections
    from vcd_fast.devices import pick_device
    from vcd_fast.media import frame_strip, read_image, resize_crop, write_image, write_video
    from vcd_fast.models.base import family
    from vcd_fast.models.lora import load_lora, read_lora
    from vcd_fast.rollout.generate import generate as sample

    if model == "wan" and preset is None and weights is None:
        preset = SMALL_MODEL
        print(f"no --preset or --weights: {SMALL_MODEL}, the small model that comes with vcd_fast")
    width, height = parse_size(size) if size else (None, None)
    given = {
        "weights": weights,
        "num_frames": frames,
        "height": height,
        "width": width,
        "fps": fps,
        "guidance_scale": guidance,
    }
    overlay = {
        "model": {key: value for key, value in given.items() if value is not None},
        "rollout": {"sampling_steps": steps} if steps is not None else {},
    }
    strip_path = output.with_name(f"{output.stem}-strip.png") if strip else None
    check_outputs(image, output, strip_path)
    sections = compose_sections(model, preset, ("model", "rollout"), overlay)
    settings, sampling_steps = sections["model"], sections["rollout"].sampling_steps
    if lora is not None:
        read_lora(lora, model)  # what is wrong with it is said before anything large is loaded
    picture = resize_crop(read_image(image), settings.height, settings.width)
    torch_device = pick_device(device)
    package = family(model)
    condition = package.load_encoder(settings, torch_device).encode(
        picture[None],
        [prompt],
        [settings.negative_prompt if negative_prompt is None else negative_prompt],
        settings.height,
        settings.width,
        settings.num_frames,
    )
    network = package.load_model(settings, torch_device)
    if lora is not None:
        load_lora(network, lora, lora_scale)
    rows = []
    with Progress(transient=True) as progress:
        for number in seed:
            task = progress.add_task(f"seed {number}", total=sampling_steps)

            def report(phase: str, done: int, total: int, task=task) -> None:
                progress.update(task, description=phase, completed=done, total=total)

            noise = torch.Generator().manual_seed(number)
            batch = condition.to(torch_device)
            video = sample(network, batch, [noise], sampling_steps, on_progress=report)[0]
            path = output if len(seed) == 1 else output.with_stem(f"{output.stem}-{number}")
            write_video(path, video, settings.fps)
            rows.append((f"seed {number}", video))
            high, wide = video.shape[-2:]  # a family may decode less than the size asked for
            print(f"{path}: {len(video)} frames of {wide}x{high}, {settings.fps:g} fps")
    if strip_path is not None:
        write_image(strip_path, frame_strip(rows, picture))
        print(f"{strip_path}: {json.dumps(prompt)}")


def check_outputs(image: Path, output: Path, strip: Path | None) -> None:
    """Before anything is computed: can be written, and is not the picture itself.

    Raises:
        ValueError: no .mp4, or a path that would overwrite the picture. FileNotFoundError: no such folder.
    """
    if output.suffix.lower() != ".mp4":
        raise ValueError(f"output: expected a name that ends in .mp4, got {output}")
    if not output.parent.is_dir():
        raise FileNotFoundError(f"output: there is no folder {output.parent}")
    if image.resolve() in (output.resolve(), strip and strip.resolve()):
        raise ValueError(f"output: {output} would overwrite the picture {image}; choose another name")


def parse_size(text: str) -> tuple[int, int]:
    """ "368x272" -> (368, 272), width first.

    Raises:
        ValueError: anything else.
    """
    width, _, height = text.lower().partition("x")
    if not (width.isdecimal() and height.isdecimal() and int(width) and int(height)):
        raise ValueError(f"size: expected WIDTHxHEIGHT such as 368x272, got {text!r}")
    return int(width), int(height)
