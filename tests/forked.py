"""Run a command of the pack in a process that was forked for it, as `python -m` runs it in a new one.

`processes.Forked` begins here by runpy.run_path, with GIVEN among the globals.
"""

import os
import runpy
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def run(module: str, arguments: Sequence[str], variables: Mapping[str, str], place: str) -> None:
    """Its output goes into <place>.out and <place>.err."""
    os.setsid()
    for number, ending in ((1, ".out"), (2, ".err")):
        os.dup2(os.open(place + ending, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), number)
    sys.stdout, sys.stderr = (open(number, "w", buffering=1, encoding="utf-8", closefd=False) for number in (1, 2))
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "forked":
    run(*GIVEN)  # noqa: F821
