"""`vcd score`: how far a video drifts from its image."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.console import Console
    from rich.table import Table

    from vcd_fast.evaluation.score import Score

MOST_ROWS = 24
BAR_AFTER_SECONDS = 2.0


def score(
    video: Annotated[Path, typer.Argument(help="a video file, or a folder of numbered frames")],
    image: Annotated[
        Path | None, typer.Option(help="the picture the video was made from; without it, the video's first frame")
    ] = None,
    preset: Annotated[
        str, typer.Option(help="vcd, vcd_amp, vcd_phase, vcd_no_temporal_weight, vcd_l2, vcd_feature or fdl")
    ] = "vcd",
    projections: Annotated[int | None, typer.Option(help="directions of the sliced Wasserstein distance")] = None,
    seed: Annotated[int, typer.Option(help="draws the directions")] = 0,
    weights: Annotated[str, typer.Option(help="VGG19 weights: imagenet, random, or a file")] = "imagenet",
    size: Annotated[
        str | None, typer.Option(help="WIDTHxHEIGHT to scale and crop everything to, e.g. 368x272; default: as it is")
    ] = None,
    frames: Annotated[
        int | None, typer.Option(help="score only so many frames, evenly spaced, the last included")
    ] = None,
    every: Annotated[int | None, typer.Option(help="score only every so many frames: 0, EVERY, 2·EVERY, …")] = None,
    json: Annotated[Path | None, typer.Option("--json", help="write every term to this file")] = None,
    plot: Annotated[Path | None, typer.Option(help="draw the terms into this file (.png, .svg or .pdf)")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    backend: Annotated[str, typer.Option(help="auto, reference, simd or triton")] = "auto",
) -> None:
    """Measure the Video Consistency Distance of a video to its image; smaller is more consistent."""
    import dataclasses

    import torch
    from rich.console import Console

    from vcd_fast.devices import pick_device
    from vcd_fast.distance import VCDLoss, VGG19Features
    from vcd_fast.distance.config import resolve_config
    from vcd_fast.evaluation.score import as_json, check_plot_path, choose_frames, score_video, write_json, write_plot
    from vcd_fast.media import read_image, read_video, resize_crop

    console = Console(highlight=False)
    for name, path in (("json", json), ("plot", plot)):
        if path is not None and not path.parent.is_dir():
            raise ValueError(f"{name}: expected a file in an existing folder, got {path}")
    if plot is not None:
        check_plot_path(plot)
    config = resolve_config(preset, {"seed": seed} | ({} if projections is None else {"num_projections": projections}))
    started = time.perf_counter()
    clip, fps = read_video(video)
    picture = None if image is None else read_image(image)
    index = choose_frames(len(clip), frames=frames, every=every)
    num_frames, clip = len(clip), clip[list(index)] if len(index) < len(clip) else clip
    height, width = clip.shape[-2:]
    if size is not None:
        width, height = _parse_size(size)
        clip = torch.stack([resize_crop(frame, height, width) for frame in clip])
    if picture is not None and tuple(picture.shape[-2:]) != (height, width):
        console.print(
            f"note: the image is {picture.shape[-1]}×{picture.shape[-2]}; scaled and cropped to {width}×{height}, as the video is",
            style="yellow",
        )
        picture = resize_crop(picture, height, width)
    read = time.perf_counter()
    extractor = VGG19Features(weights, layers=config.layers)
    loss = VCDLoss(config, extractor=extractor, backend=backend).to(pick_device(device))
    loaded = time.perf_counter()
    with _Bar(console, len(index) - 1) as advance:
        result = score_video(loss, clip, picture, frame_index=index, num_frames=num_frames, on_frames=advance)
    result = dataclasses.replace(result, seconds={"read": read - started, "weights": loaded - read, **result.seconds})
    console.print(_frame_table(result, fps))
    console.print(_layer_table(result))
    against = "its first frame" if image is None else str(image)
    console.print(f"VCD of {video} to {against}: [bold]{result.total:.6g}[/bold]  (smaller is more consistent)")
    if extractor.weight_file.source == "random":
        console.print("note: with random VGG19 weights; not comparable with published figures", style="yellow")
    per_second = len(result.frame_index) / result.seconds["frames"]
    console.print(
        "  ".join(f"{name} {value:.2f} s" for name, value in result.seconds.items()) + f"  ({per_second:.2f} frames/s)"
    )
    if json is not None:
        about = {
            "video": str(video),
            "image": None if image is None else str(image),
            "preset": preset,
            "config": {k: str(v) if callable(v) else v for k, v in dataclasses.asdict(config).items()},
            "vgg19": {k: None if v is None else str(v) for k, v in dataclasses.asdict(extractor.weight_file).items()},
            "device": str(next(loss.parameters()).device),
            "backend": backend,
            "num_frames": num_frames,
            "fps": fps,
            "height": height,
            "width": width,
        }
        write_json(json, as_json(result, fps=fps, about=about))
        console.print(f"wrote {json}")
    if plot is not None:
        write_plot(plot, result, title=f"{video.name} against {against if image is None else image.name}")
        console.print(f"wrote {plot}")


def _parse_size(text: str) -> tuple[int, int]:
    from vcd_fast.cli.generate import parse_size

    return parse_size(text)


def _frame_table(result: Score, fps: float | None) -> Table:
    from rich.table import Table

    count = len(result.frame_index)
    shown = range(count)
    if count > MOST_ROWS:
        shown = [round(i * (count - 1) / (MOST_ROWS - 1)) for i in range(MOST_ROWS)]
    title = "per frame, summed over layers"
    table = Table(title=title if count == len(shown) else f"{title}: {len(shown)} of {count} frames")
    table.add_column("frame", justify="right")
    if fps is not None:
        table.add_column("time", justify="right")
    for name in (*result.parts, "weight", "VCD"):
        table.add_column(name, justify="right")
    columns = [result.of_frames(part) for part in result.parts]
    for t in shown:
        frame = result.frame_index[t]
        times = [] if fps is None else [f"{frame / fps:.2f} s"]
        values = [*(column[t] for column in columns), result.weights[t].item(), result.per_frame[t].item()]
        table.add_row(str(frame), *times, *(f"{value:.5g}" for value in values))
    return table


def _layer_table(result: Score) -> Table:
    from rich.table import Table

    table = Table(title="per layer, mean over frames")
    table.add_column("layer")
    for part in result.parts:
        table.add_column(part, justify="right")
        table.add_column("share", justify="right")
    columns = [result.of_layers(part) for part in result.parts]
    for i, layer in enumerate(result.layers):
        cells = []
        for column in columns:
            total = sum(column)
            cells += [f"{column[i]:.5g}", f"{column[i] / total:.0%}" if total > 0 else "-"]
        table.add_row(layer, *cells)
    return table


class _Bar:
    """A progress bar over frames that shows itself once the whole is reckoned to take longer than two seconds."""

    def __init__(self, console: Console, total: int) -> None:
        self.console, self.total, self.done = console, total, 0
        self.bar = None
        self.started = time.perf_counter()

    def __enter__(self) -> Callable[[int], None]:
        return self.advance

    def __exit__(self, *args: object) -> None:
        if self.bar is not None:
            self.bar.stop()

    def advance(self, frames: int) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self.done += frames
        elapsed = time.perf_counter() - self.started
        if self.bar is None and elapsed * self.total / self.done > BAR_AFTER_SECONDS and self.done < self.total:
            columns = (TextColumn("frames"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self.bar = Progress(*columns, console=self.console, transient=True)
            self.task = self.bar.add_task("frames", total=self.total, completed=self.done)
            self.bar.start()
        elif self.bar is not None:
            self.bar.update(self.task, completed=self.done)
