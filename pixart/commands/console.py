"""What the pack's commands share: exit codes, errors in one line, devices and precisions."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
OK, FAILED, INTERRUPTED = 0, 1, 130


def make_parser(name: str, text: str) -> argparse.ArgumentParser:
    """The parser of `python -m pixart.<name>`. text: the module's: a summary, and after an empty line the examples."""
    return argparse.ArgumentParser(f"python -m pixart.{name}", **describe(*text.split("\n\n", 1)))


def describe(summary: str, examples: str) -> dict:
    """What a parser of argparse is given to show both as they are written."""
    return {"description": summary, "epilog": examples, "formatter_class": argparse.RawDescriptionHelpFormatter}


def run_command(
    main: Callable[[argparse.Namespace], None],
    parser: argparse.ArgumentParser,
    arguments: Sequence[str] | None = None,
) -> int:
    """Run a command. Returns its exit code: 0, 1 for bad input with one line that says what, 130 when interrupted."""
    options = parser.parse_args(arguments)
    try:
        main(options)
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        sys.stderr.write(f"error: {error}\n")
        return FAILED
    except KeyboardInterrupt:
        return INTERRUPTED
    return OK


def add_device(parser) -> None:
    """--device and --dtype; the defaults are what this machine is best at."""
    device, dtype = ("cuda", "bf16") if torch.cuda.is_available() else ("cpu", "fp32")
    parser.add_argument("--device", default=device, help="default: %(default)s")
    parser.add_argument("--dtype", choices=list(DTYPES), default=dtype, help="default: %(default)s")


def process_rank() -> tuple[int, int]:
    """(this process's number, how many there are), as `accelerate launch` and `torchrun` tell them; (0, 1) alone."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def own_device(device: str) -> str:
    """The device of this process: of several on one machine each has a GPU of its own."""
    return f"cuda:{os.environ['LOCAL_RANK']}" if device == "cuda" and "LOCAL_RANK" in os.environ else device
