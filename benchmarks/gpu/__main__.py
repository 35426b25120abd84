"""What a GPU computes and how fast: correctness against the CPU, ComfyUI's ways with its memory, and speed.

`python dev.py gpu` runs it all, starting the servers. What is done is not done again on the same device and code: a run
that was cut goes on. `--device cpu --small` shows in minutes that everything runs.
"""

import argparse
import functools
import logging
import subprocess
import sys
from pathlib import Path

from ..cases import add_device, name_device
from ..report import RESULTS, markdown_table
from . import correctness, pictures, speed
from .parts import Part, Results, describe_limit, describe_value, run_parts, verdict

ROOT = Path(__file__).resolve().parent.parent.parent


def main(arguments: list[str] | None = None) -> int:
    """Run the parts that are asked for; returns 1 when one of them is wrong."""
    parser = argparse.ArgumentParser(prog="dev.py gpu", description=__doc__)
    add_device(parser)
    parser.add_argument("--small", action="store_true", help="tiny models: whether everything runs, not how fast")
    parser.add_argument("--budget-s", type=float, default=480, help="seconds in all (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--url", help="a running ComfyUI, for the part of `mode` alone")
    parser.add_argument("--mode", help="how that ComfyUI was started: a name for its pictures")
    parser.add_argument("--parts", nargs="+", choices=("correctness", "speed"), default=["correctness", "speed"])
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    about = {"device": name_device(options.device), "code": describe_code(), "small": options.small}
    results = Results(options.out / "gpu.json", about)
    left_out = run_parts(list(choose_parts(options)), results, options.budget_s)
    write_table(results, options.out)
    for name in left_out:
        logging.warning("%s: no time was left; run it again to go on", name)
    return int(any(verdict(each) in ("WRONG", "failed") for findings in results.parts.values() for each in findings))


def choose_parts(options: argparse.Namespace):
    if options.mode:
        folder = options.out / "gpu_pictures"
        yield Part(f"host {options.mode}", functools.partial(pictures.compare, options.url, options.mode, folder))
        return
    if "correctness" in options.parts:
        for name, find in correctness.list_checks(options.device, options.small).items():
            yield Part(f"{correctness.PART} {name}", lambda left_s, find=find: find(), least_s=10)
    if "speed" in options.parts:
        for each in speed.RUNS:
            run = functools.partial(speed.measure, each, options.device, options.small, options.out)
            yield Part(f"speed {each.name}", run, least_s=20)


def describe_code() -> str:
    """The commit, and whether files differ from it; "unknown" outside a clone."""
    try:
        command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def write_table(results: Results, folder: Path) -> None:
    rows = [
        [each.part, each.name, describe_value(each), describe_limit(each), verdict(each)]
        for findings in results.parts.values()
        for each in findings
    ]
    head = f"{results.about['device']}, {results.about['code']}{', tiny models' * results.about['small']}:\n\n"
    table = markdown_table(["part", "what", "value", "at most", ""], rows)
    (folder / "gpu.md").write_text(head + table, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
