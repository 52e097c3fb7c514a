"""Fine-tune a LoRA of an image-to-video model with the Video Consistency Distance.

    deepspeed vcd_fast/train.py --model wan --preset tiny --pictures examples/pictures --output runs/tiny
    python vcd_fast/train.py --model wan --weights PATH_OR_HUB_NAME --pictures PICTURES --output runs/wan

The first form starts one process per GPU (`--num_gpus N` on a machine without), the second one process. `--help` lists every
setting, `--dry-run` prints what would happen.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    # Python puts the folder of a script first on its path, where `kernels`, `data` and `config` of this package would pass for
    # top-level modules (diffusers and transformers import `kernels` if they find it). The folder above is what belongs there.
    here = Path(__file__).resolve().parent
    sys.path[:] = [str(here.parent), *(entry for entry in sys.path if Path(entry or ".").resolve() != here)]

from vcd_fast.errors import reported_to_user


def main(argv: list[str], prog: str = "vcd_fast/train.py") -> None:
    """Parse the command line, then print the plan or train."""
    with reported_to_user():
        from vcd_fast.config import parse

        config, arguments = parse(argv, prog)
        if arguments.dry_run:
            from vcd_fast.training.dry_run import describe

            print(describe(config))
            return
        from vcd_fast.training.loop import train

        train(config, [prog, *argv])


if __name__ == "__main__":
    main(sys.argv[1:])
