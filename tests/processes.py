"""The pack's commands in processes of their own, alone or by the launchers that start many of them."""

import contextlib
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
# Without --cpu, which would start a single process: the environment says that there is no GPU.
ACCELERATE = "-m accelerate.commands.launch --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no"
ALONE = ()
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
VARIABLES = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT)}
# What takes a command five to ten seconds to import, and nothing of the pack itself.
PRELOADED = ("accelerate", "diffusers.models.autoencoders.autoencoder_kl", "transformers.models.t5.modeling_t5")


def accelerate(*more: str) -> tuple[str, ...]:
    """`accelerate launch` of two processes on the CPU. more: its options; by default DDP."""
    return (*ACCELERATE.split(), "--main_process_port", "0", *(more or ("--multi_gpu",)))


def start(module: str | Path, *arguments, launcher: Sequence[str] = ALONE) -> subprocess.Popen:
    """`python -m <module> <arguments>`, or of a file's path that file, in the pack's folder; its output is in pipes."""
    program = [str(module)] if isinstance(module, Path) else ["-m", module]
    command = [sys.executable, *launcher, *program, *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "encoding": "utf-8"}
    return subprocess.Popen(command, cwd=ROOT, env=os.environ | VARIABLES, start_new_session=True, **pipes)


def ranks(launcher: Sequence[str] = TORCHRUN) -> list[dict[str, str]]:
    """The variables by which this launcher tells each of two processes what it is."""
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": _free_port()}
    if "accelerate" in launcher[1]:
        shared |= _accelerates(tuple(launcher[2:]))
    return [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]


@cache
def _accelerates(options: Sequence[str]) -> dict[str, str]:
    """Those that `accelerate launch` adds to torchrun's, by its own code."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_multi_gpu_env

    with mock.patch.dict(os.environ, VARIABLES):
        launch, *_ = _validate_launch_command(launch_command_parser().parse_args([*options, "-m", "pixart"]))
        return dict(prepare_multi_gpu_env(launch).items() - os.environ.items())


def _free_port() -> str:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return str(found.getsockname()[1])


class Forked:
    """`python -m <module> <arguments>` out of a process that holds PRELOADED already, as a `subprocess.Popen` is used.

    Such a process costs half a second where a new one costs ten. each: variables of every process that is started.
    """

    def __init__(self, module: str, *arguments, each: Sequence[Mapping[str, str]] = ({},)):
        self._folder = tempfile.TemporaryDirectory()
        places = [Path(self._folder.name, str(number)) for number in range(len(each))]
        given = [str(argument) for argument in arguments]
        self._places = places
        self._all = [
            _fork(module, given, os.environ | VARIABLES | own, str(place))
            for own, place in zip(each, places, strict=True)
        ]
        for process in self._all:
            process.start()
        self.pids = [process.pid for process in self._all]

    @property
    def returncode(self) -> int | None:
        """The worst of all, None while one goes on."""
        codes = [process.exitcode for process in self._all]
        return None if None in codes else max(codes, key=abs)

    def poll(self) -> int | None:
        return self.returncode

    def send_signal(self, number: int) -> None:
        for process in self._all:
            if process.exitcode is None:
                os.kill(process.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """(what all have printed, their errors) once they have ended; after `timeout` seconds TimeoutExpired."""
        end = time.monotonic() + (timeout or 1e9)
        for process in self._all:
            process.join(max(0.0, end - time.monotonic()))
            if process.exitcode is None:
                raise subprocess.TimeoutExpired("forked", timeout)
        said, errors = (
            "".join(place.with_suffix(kind).read_text(encoding="utf-8", errors="replace") for place in self._places)
            for kind in (".out", ".err")
        )
        return said, errors


@cache
def _forks() -> multiprocessing.context.ForkServerContext:
    """The process that holds PRELOADED and forks itself; it ends with the tests."""
    from multiprocessing import forkserver

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    with mock.patch.dict(os.environ, VARIABLES):
        forkserver.ensure_running()
    return context


def _fork(*given) -> multiprocessing.context.ForkServerProcess:
    """A process that runs `forked.run` with what is given, not yet started."""
    how = {"init_globals": {"GIVEN": given}, "run_name": "forked"}
    return _forks().Process(target=runpy.run_path, args=(str(ROOT / "tests" / "forked.py"),), kwargs=how)


def interrupt(process: subprocess.Popen | Forked) -> None:
    """Ctrl-C as a terminal sends it: to the process and to all that it has started."""
    _signal_groups(process, signal.SIGINT)


def _signal_groups(process: subprocess.Popen | Forked, number: int) -> None:
    for pid in process.pids if isinstance(process, Forked) else [process.pid]:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, number)


def finish(process: subprocess.Popen | Forked, timeout_s: float = 300) -> tuple[str, str]:
    """(its output, its errors) at its end. What does not end in time is killed, with all that it has started."""
    try:
        return process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        _signal_groups(process, signal.SIGKILL)
        process.communicate()
        raise


def wait_until(happened: Callable[[], object], process: subprocess.Popen | Forked, timeout_s: float = 200) -> None:
    """Until something has happened, or the process has ended, or time is over."""
    began = time.monotonic()
    while not happened() and process.poll() is None and time.monotonic() - began < timeout_s:
        time.sleep(0.05)
