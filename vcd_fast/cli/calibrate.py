"""`vcd calibrate`: fit the step cache to a model, with one's own pictures and prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def calibrate(
    pictures: Annotated[Path, typer.Argument(help="folder of pictures with prompts, as for training")],
    output: Annotated[Path, typer.Option("--output", "-o", help="JSON file to write")] = Path("step_cache.json"),
    model: Annotated[str, typer.Option(help="model family: wan or opensora")] = "wan",
    preset: Annotated[str | None, typer.Option(help="named settings of the family, e.g. tiny")] = None,
    weights: Annotated[str | None, typer.Option(help="folder or hub name of the weights")] = None,
    steps: Annotated[int | None, typer.Option(help="sampling steps")] = None,
    mode: Annotated[str | None, typer.Option(help="ret or non-ret; default: ret for wan, non-ret for opensora")] = None,
    limit: Annotated[int, typer.Option(help="pictures to use at most; TeaCache used about 70", min=1)] = 70,
    seed: Annotated[int, typer.Option(help="noise of the first picture, the next one for the next")] = 0,
    plot: Annotated[Path | None, typer.Option(help="also write a plot of observations and fit")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
) -> None:
    """Fit the step cache's polynomial to a model that none was published for."""
    import torch
    from rich.progress import Progress

    from vcd_fast.config import compose_sections
    from vcd_fast.data import PictureFolder
    from vcd_fast.devices import pick_device
    from vcd_fast.models.base import family
    from vcd_fast.rollout.step_cache.calibrate import fit, observe, threshold_table
    from vcd_fast.rollout.step_cache.coefficients import ENDS, save

    if mode not in (None, *ENDS):
        raise ValueError(f"mode: expected one of {', '.join(ENDS)}, got {mode!r}")
    mode = mode or ("ret" if model == "wan" else "non-ret")
    overlay = {
        "model": {} if weights is None else {"weights": weights},
        "rollout": {} if steps is None else {"sampling_steps": steps},
        "data": {"pictures": str(pictures)},
    }
    sections = compose_sections(model, preset, ("model", "rollout", "data"), overlay)
    settings, sampling_steps = sections["model"], sections["rollout"].sampling_steps
    folder = PictureFolder(sections["data"], settings.height, settings.width)
    chosen = range(min(limit, len(folder.samples)))
    torch_device = pick_device(device)
    package = family(model)
    samples = [folder.samples[index] for index in chosen]
    encoder = package.load_encoder(settings, torch_device)
    # all in one call: text encoder, VAE and image encoder are read from disk once each
    conditions = encoder.encode(
        torch.stack([folder.image(index) for index in chosen]),
        [sample.prompt for sample in samples],
        [sample.negative_prompt or settings.negative_prompt for sample in samples],
        settings.height,
        settings.width,
        settings.num_frames,
    ).split()
    del encoder
    network = package.load_model(settings, torch_device)
    observations = []
    with Progress(transient=True) as progress:
        for index in progress.track(chosen, description="sampling"):
            batch = conditions[index].to(torch_device)
            observations += observe(network, batch, [seed + index], sampling_steps, mode)
    found = fit(observations, mode)
    facts = {**found.facts(), "pictures": len(chosen), "sampling_steps": sampling_steps, "data_hash": folder.data_hash}
    save(output, network.transformer, found.coefficients, mode, facts)

    low, high = found.input_range
    print(
        f"{output}: degree 4, R² {found.r_squared:.3f} on {found.observations} steps of {len(chosen)} clips, mode {mode}"
    )
    print(f"input distances {low:.4g} to {high:.4g}; coefficients {', '.join(f'{c:.8g}' for c in found.coefficients)}")
    for threshold, computed in threshold_table(found, observations, mode):
        print(f"threshold {threshold:<8g} {computed:.1f} of {sampling_steps} steps computed")
    if found.r_squared < 0.5:
        print(
            "note: the fit explains less than half of how much the output changes; compare thresholds by their videos before you trust it"
        )
    if plot is not None:
        plot_fit(plot, observations, found, mode)
        print(f"{plot}: observations, fit and residuals")


def plot_fit(path: Path, observations: list, found: object, mode: str) -> None:
    """Output over input distance of the steps that were fitted, the polynomial, and what it leaves."""
    import os

    import numpy as np
    from matplotlib.figure import Figure

    from vcd_fast.rollout.step_cache.calibrate import fitted

    used = fitted(observations, mode)
    x, y = np.array([each.input for each in used]), np.array([each.output for each in used])
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    grid = np.linspace(x.min(), x.max(), 200)
    left.plot(x, y, ".", ms=3)
    left.plot(grid, np.polyval(found.coefficients, grid), lw=1)
    left.set(title=f"R² {found.r_squared:.3f}", xlabel="relative distance of the modulation", ylabel="of the output")
    right.plot(x, y - np.polyval(found.coefficients, x), ".", ms=3)
    right.set(title="residuals", xlabel="relative distance of the modulation")
    temporary = path.with_name(f".{path.stem}.tmp{path.suffix or '.png'}")
    figure.savefig(temporary, dpi=120)
    os.replace(temporary, path)
