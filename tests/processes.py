"""The pack's commands in processes of their own, alone or by the launchers that start many of them."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Without --cpu, which would start a single process: the environment says that there is no GPU.
ACCELERATE = "-m accelerate.commands.launch --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no"
ALONE = ()
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")


def accelerate(*more: str) -> tuple[str, ...]:
    """`accelerate launch` of two processes on the CPU. more: its options; by default DDP."""
    return (*ACCELERATE.split(), "--main_process_port", "0", *(more or ("--multi_gpu",)))


def start(module: str | Path, *arguments, launcher: Sequence[str] = ALONE) -> subprocess.Popen:
    """`python -m <module> <arguments>`, or of a file's path that file, in the pack's folder; its output is in pipes."""
    program = [str(module)] if isinstance(module, Path) else ["-m", module]
    command = [sys.executable, *launcher, *program, *map(str, arguments)]
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "ACCELERATE_USE_CPU": "true",
    }
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "encoding": "utf-8"}
    return subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True, **pipes)


def interrupt(process: subprocess.Popen) -> None:
    """Ctrl-C as a terminal sends it: to the process and to all that it has started."""
    os.killpg(process.pid, signal.SIGINT)


def finish(process: subprocess.Popen, timeout_s: float = 300) -> tuple[str, str]:
    """(its output, its errors) at its end. What does not end in time is killed, with all that it has started."""
    try:
        return process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        raise


def wait_until(happened: Callable[[], object], process: subprocess.Popen, timeout_s: float = 200) -> None:
    """Until something has happened, or the process has ended, or time is over."""
    began = time.monotonic()
    while not happened() and process.poll() is None and time.monotonic() - began < timeout_s:
        time.sleep(0.05)
