"""Training on the command line: `python -m pixart caption ...`, `encode ...` and `run ...`.

`accelerate launch -m pixart train config.yaml` does the same on many processes.
"""

import sys
from collections.abc import Sequence

from ..commands import caption, encode
from ..commands.console import make_parser, run_command


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code."""
    parser = make_parser("training", __doc__)
    commands = parser.add_subparsers(required=True, metavar="command")
    for module in (caption, encode, launch):
        module.add_parser(commands)
    return run_command(lambda options: options.main(options), parser, arguments)


if __name__ == "__main__":
    sys.exit(main())
