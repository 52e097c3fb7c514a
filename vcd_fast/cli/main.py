"""The command `vcd`. Nothing beyond the core is imported here: what is missing is then said in a sentence."""

from __future__ import annotations

import sys

from vcd_fast.errors import reported_to_user


def main() -> None:
    with reported_to_user():
        from vcd_fast.cli.app import build_app

        build_app()(args=sys.argv[1:])


if __name__ == "__main__":
    main()
