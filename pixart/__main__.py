"""PixArt on the command line: `python -m pixart <command>`, or `pixart <command>` where pip installed it.

`accelerate launch -m pixart train config.yaml` does the same on many processes.
"""

import importlib
import sys
from collections.abc import Sequence

from .commands.console import program, run_command

COMMANDS = {
    "sample": "make pictures from prompts",
    "convert": "write a checkpoint, ControlNet, LoRA or T5 in another layout",
    "compare": "draw a labelled sheet of two settings of a workflow, with a running ComfyUI",
    "evaluate": "make a picture for every prompt of a list, and score them",
    "caption": "describe pictures with a vision-language model",
    "encode": "encode a dataset for training",
    "pairs": "make pairs of noises and pictures, for the training of a model of one step",
    "train": "train by a configuration file, in one process or many",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code: 0, 1 for bad input, 2 for an unknown command, 130 when interrupted."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        sys.stdout.write(overview())
        return 0
    name, *rest = arguments
    if name not in COMMANDS:
        sys.stderr.write(f"error: Unknown command: got '{name}', expected one of {', '.join(COMMANDS)}. Choose one.\n")
        return 2
    command = importlib.import_module(f".commands.{name}", __package__)
    return run_command(command.main, command.parse(), rest)


def overview() -> str:
    """The commands, one a line."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {text}" for name, text in COMMANDS.items()]
    head, foot = f"usage: {program()} <command> [options]\n\n", "\n\nEach has a --help with examples.\n"
    return head + "\n".join(lines) + foot


if __name__ == "__main__":
    sys.exit(main())
