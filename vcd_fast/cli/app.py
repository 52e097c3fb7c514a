"""The verbs of `vcd`, a file each. What a verb needs is imported when it runs, so that `vcd --help` is quick."""

from __future__ import annotations

import importlib

import typer

from vcd_fast.version import __version__

VERBS = ("score", "generate", "train", "export", "calibrate", "estimate", "doctor")


def build_app() -> typer.Typer:
    app = typer.Typer(
        name="vcd",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        help="Video Consistency Distance: score videos against their image, tune image-to-video models by it, generate with the result.",
    )
    app.callback(invoke_without_command=True)(_version)
    for verb in VERBS:
        module = importlib.import_module(f"vcd_fast.cli.{verb}")
        options = getattr(module, "CONTEXT", {})
        app.command(verb, context_settings=options)(getattr(module, verb))
    return app


def _version(
    context: typer.Context, version: bool = typer.Option(False, "--version", help="Print the version and stop.")
) -> None:
    if version:
        print(__version__)
        raise typer.Exit()
    if context.invoked_subcommand is None:
        print(context.get_help())
