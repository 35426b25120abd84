"""Start programs, and leave none behind; say what happens, and fail in one line."""

import contextlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LAUNCH = Path(__file__).with_name("launch.py")
GRACE_S = 15  # what a program gets to clean up in before it is ended by force
REASONS = (  # how loaders, browsers under Playwright, apt, npm and others begin the line that counts
    r"error while loading shared libraries: (.+)",
    r"\[err\] (.+)",
    r"^E: (.+)",
    r"npm (?:error|ERR!) (?!code |errno |syscall )(.+)",
    r"Error: (.+)",
)
FOREIGN_VARIABLES = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "PIP_TARGET", "PIP_PREFIX", "PIP_REQUIRE_VIRTUALENV")


class DevError(RuntimeError):
    """A failure in one line; `log` is the file whose last lines explain it."""

    def __init__(self, message: str, log: Path | None = None):
        super().__init__(message)
        self.log = log


def say(message: str) -> None:
    sys.stdout.write(message + "\n")
    sys.stdout.flush()


def tail(log: Path, lines: int = 20) -> str:
    """The last lines of a log without colours; empty when it cannot be read."""
    try:
        text = log.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    return "\n".join(re.sub(r"\x1b\[[0-9;]*m", "", text).splitlines()[-lines:])


def child_environment(**extra: str) -> dict[str, str]:
    """The variables for a program of the environment: ours, without those that lead to another Python's packages."""
    kept = {name: value for name, value in os.environ.items() if name not in FOREIGN_VARIABLES}
    fixed = {"PIP_USER": "0", "PYTHONNOUSERSITE": "1", "PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8"}
    return {**kept, **fixed, **extra}


def spawn(command: Sequence, **options) -> subprocess.Popen:
    """Start a program as the head of a process group of its own, which `end_tree` ends whole."""
    if os.name == "nt":
        options["creationflags"] = subprocess.CREATE_NEW_PROCESS_GROUP
    else:
        options["start_new_session"] = True
    return subprocess.Popen([str(part) for part in command], **options)


def end_tree(process: subprocess.Popen) -> None:
    """End a program from `spawn` and all its children: politely first, then by force."""
    if os.name == "nt":
        if process.poll() is None:
            subprocess.run(["taskkill", "/T", "/F", "/PID", str(process.pid)], capture_output=True)
        process.wait()
        return
    with contextlib.suppress(ProcessLookupError):  # once the group is empty
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            ends_within(process, GRACE_S)
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def ends_within(process: subprocess.Popen, seconds: float) -> bool:
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return False
    return True


def run_limited(command: Sequence, limit_s: float, log: Path, **options) -> str:
    """Run a program without input and return what it prints, which also goes to the end of a log.

    Raises DevError with the reason in a few words when it fails or takes longer than limit_s seconds.
    """
    with open(log, "ab") as file:
        start = file.tell()
        process = spawn(command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, **options)
        try:
            in_time = ends_within(process, limit_s)
        finally:
            end_tree(process)
    with open(log, "rb") as file:
        file.seek(start)
        output = file.read().decode(errors="replace")
    if not in_time:
        raise DevError(f"no end within {limit_s:.0f} s", log)
    if process.returncode:
        raise DevError(reason(output) or f"exit code {process.returncode}", log)
    return output


def reason(output: str) -> str:
    """The line of a failed program's output that says most: of the first pattern that fits, or the last line."""
    lines = [line.strip() for line in re.sub(r"\x1b\[[0-9;]*m", "", output).splitlines() if line.strip()]
    for pattern in REASONS:
        if found := next(filter(None, (re.search(pattern, line) for line in lines)), None):
            return found[1]
    return lines[-1] if lines else ""


def foreground(command: Sequence, **options) -> int:
    """Run a program that shares our terminal and return its exit code. If we are stopped, it may clean up first."""
    process = subprocess.Popen([str(part) for part in command], **options)
    try:
        return process.wait()
    except SystemExit as stop:
        # Ctrl-C has reached the program too, and a second one would break off its cleaning up.
        reached = stop.code == 128 + signal.SIGINT and ends_within(process, GRACE_S)
        if not reached and process.poll() is None:
            process.send_signal(signal.SIGTERM if os.name == "nt" else signal.SIGINT)
            ends_within(process, GRACE_S)
        raise
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def stop_on_signals() -> None:
    """Turn a stop signal into SystemExit, so that what was started is ended on the way out; later ones are ignored."""
    names = ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK")
    signals = [getattr(signal, name) for name in names if hasattr(signal, name)]

    def stop(number, frame):
        for each in signals:
            signal.signal(each, signal.SIG_IGN)
        raise SystemExit(128 + number)

    for each in signals:
        signal.signal(each, stop)
