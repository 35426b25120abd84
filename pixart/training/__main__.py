"""Training on the command line: `python -m pixart.training caption ...`, `encode ...` and `run ...`.

`accelerate launch -m pixart.training run config.yaml` does the same on many processes.
"""

import sys
from collections.abc import Sequence

from ..command import make_parser, run_command
from . import caption, encode, launch


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code."""
    parser = make_parser("training", __doc__)
    commands = parser.add_subparsers(required=True, metavar="command")
    for module in (caption, encode, launch):
        module.add_parser(commands)
    return run_command(lambda options: options.main(options), parser, arguments)


if __name__ == "__main__":
    sys.exit(main())
