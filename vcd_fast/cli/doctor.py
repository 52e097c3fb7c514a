"""`vcd doctor`: whether this machine can do what is asked of it, and what to do where it cannot."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from pydantic import BaseModel
    from rich.console import Console

    from vcd_fast.evaluation.doctor import Finding

STYLES = {"ok": "green", "note": "yellow", "problem": "bold red"}


def doctor(
    model: Annotated[
        str | None, typer.Option(help="model family whose weights are looked for: wan or opensora")
    ] = None,
    preset: Annotated[
        str | None, typer.Option(help="named settings of the family, e.g. tiny; default: the paper's")
    ] = None,
    weights: Annotated[str | None, typer.Option(help="folder or hub name of the weights")] = None,
    collective: Annotated[bool, typer.Option(help="start two processes and let them exchange a tensor")] = True,
    json: Annotated[Path | None, typer.Option("--json", help="write every finding to this file")] = None,
) -> None:
    """Check versions, devices, backends of the distance, weights, disk and processes. Exit code 0: nothing stands in the way."""
    import dataclasses
    from json import dumps

    from rich.console import Console

    from vcd_fast.evaluation import doctor as checks
    from vcd_fast.evaluation.machine import versions
    from vcd_fast.evaluation.score import write_json

    if model is None and (preset is not None or weights is not None):
        raise ValueError("model: expected wan or opensora with --preset or --weights, got none")
    if json is not None and not json.parent.is_dir():
        raise ValueError(f"json: expected a file in an existing folder, got {json}")
    settings = None if model is None else _settings(model, preset, weights)
    console = Console(highlight=False)
    findings: list[Finding] = []
    with console.status("versions and devices") as status:
        findings += checks.check_versions(model is not None)
        findings += checks.check_video_writing(model is not None)
        findings += checks.check_devices()
        status.update("backends of the distance")
        findings += checks.check_backends()
        status.update("weights")
        findings += checks.check_vgg19()
        to_download = 0.0
        if settings is not None:
            of_model, to_download = checks.check_model(model, settings)
            findings += of_model
        findings += checks.check_disk(to_download)
        findings += checks.check_ports()
        if collective:
            status.update("two processes")
            findings += checks.check_collective()
    _print(console, findings)
    healthy = checks.is_healthy(findings)
    if json is not None:
        content = {
            "healthy": healthy,
            "versions": versions(),
            "findings": [dataclasses.asdict(finding) for finding in findings],
        }
        write_json(json, dumps(content, indent=1))
        console.print(f"wrote {json}", soft_wrap=True, markup=False)
    if not healthy:
        raise typer.Exit(1)


def _settings(model: str, preset: str | None, weights: str | None) -> BaseModel | None:
    """The section `model` of a run; None where a package is missing to read it, which `check_versions` reports."""
    try:
        from vcd_fast.config import compose_sections
        from vcd_fast.models.base import family
    except ImportError:
        return None
    if preset is None and weights is None:
        preset = family(model).DEFAULT_PRESET
    overlay = {"model": {"weights": weights} if weights is not None else {}}
    return compose_sections(model, preset, ("model",), overlay)["model"]


def _print(console: Console, findings: list[Finding]) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    for title in ("check", "", "found"):
        table.add_column(title)
    for finding in findings:
        table.add_row(finding.check, Text(finding.status, STYLES[finding.status]), Text(finding.found))
    console.print(table)
    todo = dict.fromkeys(f"  {finding.check}: {finding.advice}" for finding in findings if finding.advice)
    if todo:
        console.print("\nwhat to do")
    for line in todo:  # outside the table, where a terminal does not break what one wants to copy
        console.print(line, soft_wrap=True, markup=False)
    problems = sum(finding.status == "problem" for finding in findings)
    text = f"{problems} problem{'s' * (problems > 1)}" if problems else "nothing stands in the way"
    console.print(Text(f"\n{text}", STYLES["problem" if problems else "ok"]))
