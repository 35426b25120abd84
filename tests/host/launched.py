"""Several of the pack's commands one after the other in each process of one launch, since a launch takes seconds.

    accelerate launch ... tests/host/launched.py commands.json

commands.json: [[command, argument, ...], ...]. Ends with the first code that is not 0.
"""

import json
import sys
from importlib import import_module
from pathlib import Path

import torch

from pixart.commands.console import run_command


def main(path: str) -> int:
    torch.distributed.init_process_group("gloo")  # once, since PyTorch finds the same processes only once
    for name, *arguments in json.loads(Path(path).read_text()):
        command = import_module(f"pixart.commands.{name}")
        code = run_command(command.main, command.parse(), arguments)
        if code:
            return code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
