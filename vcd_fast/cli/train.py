"""`vcd train`: the entry script under another name, for one process."""

from __future__ import annotations

import typer

# argparse, built from the settings themselves, reads what follows.
CONTEXT = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


def train(context: typer.Context) -> None:
    """Tune a LoRA; the same options as vcd_fast/train.py, see `vcd train --help`."""
    from vcd_fast import train as script

    script.main(context.args, prog="vcd train")
