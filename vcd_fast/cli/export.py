"""`vcd export`: a LoRA in the format another program reads."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def export(
    source: Annotated[Path, typer.Argument(help="LoRA file or folder; the folder of a run works too")],
    target: Annotated[Path, typer.Argument(help="what to write: a folder, or a .safetensors file")],
    format: Annotated[str, typer.Option("--format", help="diffusers, peft or comfy; vader for Open-Sora")] = "comfy",
    model: Annotated[str | None, typer.Option(help="model family, if the file does not say")] = None,
) -> None:
    """Convert a trained LoRA."""
    from vcd_fast.models.lora import export_lora
    from vcd_fast.training.record import LORA_FOLDER

    if (source / LORA_FOLDER).is_dir():
        source = source / LORA_FOLDER
    written = export_lora(source, target, format, family_name=model)
    print(f"{written}: {format}")
