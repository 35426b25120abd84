"""What the pack's commands share: exit codes, errors in one line, devices and precisions."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

OK, FAILED, INTERRUPTED = 0, 1, 130


def program() -> str:
    """How this program was called: by the script that pip installs, or as a module."""
    return "pixart" if Path(sys.argv[0]).stem == "pixart" else "python -m pixart"


def make_parser(name: str, summary: str, examples: str | None = None) -> argparse.ArgumentParser:
    """The parser of the command `name`; both texts are shown as they are written.

    examples: by default what follows the first empty line of the summary.
    """
    if examples is None:
        summary, examples = summary.split("\n\n", 1)
    shown = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(f"{program()} {name}", description=summary, epilog=examples, formatter_class=shown)


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
        rank, processes = process_rank()
        sys.stderr.write(f"error: {f'rank {rank}: ' * (processes > 1)}{error}\n")
        return FAILED
    except KeyboardInterrupt:
        return INTERRUPTED
    return OK


AUTO = "auto"


def add_device(parser, asks_file: bool = False) -> None:
    """--device and --dtype; the defaults are what this machine is best at.

    asks_file: the default of --dtype is AUTO, which the model's file decides, see `processors.own_dtype`.
    """
    # Here, since the list of commands needs no PyTorch, which takes seconds.
    import torch

    from ..weights.saving import DTYPES

    device, dtype = ("cuda", "bf16") if torch.cuda.is_available() else ("cpu", "fp32")
    parser.add_argument("--device", default=device, help="default: %(default)s")
    if asks_file:
        help = "auto: bf16 on a GPU, and for a file in bf16 on a CPU that has it (AVX512_BF16, AMX); else fp32"
        parser.add_argument("--dtype", choices=[AUTO, *DTYPES], default=AUTO, help=help)
        return
    parser.add_argument("--dtype", choices=list(DTYPES), default=dtype, help="default: %(default)s")


def add_weights(parser) -> None:
    """--weights, of a checkpoint that holds several models."""
    parser.add_argument(
        "--weights",
        default="ema",
        metavar="WHICH",
        help="of a file with several: ema (default: the average where there is one), model (as trained), or a place",
    )


def tell(name: str, remarks: Sequence[str]) -> None:
    """Say on standard error what whoever reads the file `name` should know; of several processes the first says it."""
    if process_rank()[0]:
        return
    for remark in remarks:
        sys.stderr.write(f"note: {name}: {remark}\n")


def process_rank() -> tuple[int, int]:
    """(this process's number, how many there are), as `accelerate launch` and `torchrun` tell them; (0, 1) alone."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def own_device(device: str) -> str:
    """The device of this process: of several on one machine each has a GPU of its own.

    Raises ValueError where there are fewer GPUs.
    """
    if device != "cuda" or "LOCAL_RANK" not in os.environ:
        return device
    import torch

    own, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if own >= count > 0:
        raise ValueError(f"More processes than GPUs: got {own + 1} and {count}, expected a GPU each. Start {count}.")
    return f"cuda:{own}"
