"""A ComfyUI server with this pack in it."""

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path

from .process import LAUNCH, ROOT, DevError, child_environment, end_tree, spawn, tail

PACK = "pixart_pack"  # the pack's folder in custom_nodes, and the name under which programs import it
READY_TIMEOUT_S = 600
KEEP_LOGS_S = 24 * 3600
MODEL_PATHS = "model_paths.yaml"
KEPT = "kept.json"  # in the base directory: the server that goes on running after its command


def link_pack(custom_nodes: Path, root: Path = ROOT) -> None:
    """Put the pack into a custom_nodes folder: a link, or on Windows a junction, or else a copy."""
    link = custom_nodes / PACK
    custom_nodes.mkdir(parents=True, exist_ok=True)
    if os.path.lexists(link):
        if link.resolve() == root:
            return
        if os.path.isdir(link) and not link.is_symlink():
            shutil.rmtree(link)
        else:
            link.unlink()
    if os.name != "nt":
        link.symlink_to(root, target_is_directory=True)
    elif subprocess.run(["cmd", "/c", "mklink", "/J", str(link), str(root)], capture_output=True).returncode:
        shutil.copytree(root, link, ignore=shutil.ignore_patterns(".git", "output"))


def prepare_base(base: Path, own_host: Path | None = None) -> Path:
    """Make a ComfyUI base directory: this clone in custom_nodes, which offers the demo's models itself.

    own_host: the user's own ComfyUI, whose models are offered too. Returns base.
    """
    link_pack(base / "custom_nodes")
    remove_leftovers(base)
    (base / MODEL_PATHS).unlink(missing_ok=True)
    if own_host and (models := own_host / "models").is_dir():
        kinds = {folder.name: folder.name for folder in models.iterdir() if folder.is_dir()}
        own = {"own": {"base_path": str(models), **kinds}}
        (base / MODEL_PATHS).write_text(json.dumps(own, indent=2), encoding="utf-8")  # JSON is YAML too
    return base


def note_kept(base: Path, server: "Server") -> None:
    """Remember a server that outlives us, for `find_kept`."""
    note = {
        "port": server.port,
        "pid": server.process.pid,
        "began": time.time(),
        "command": list(map(str, server.command)),
    }
    (base / KEPT).write_text(json.dumps(note), encoding="utf-8")


def find_kept(base: Path, server: "Server", root: Path = ROOT) -> dict | None:
    """The port and pid of a server that an earlier run left running, if it is as good as `server` would be.

    It must answer, have been started by the same command but for the port, and since then no program of the pack may
    have changed.
    """
    try:
        note = json.loads((base / KEPT).read_text(encoding="utf-8"))
        port, pid, began, command = (note[name] for name in ("port", "pid", "began", "command"))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    told = [str(part).replace(str(port), "PORT") for part in command]
    wanted = [str(part).replace(str(server.port), "PORT") for part in server.command]
    changed = max(path.stat().st_mtime for path in root.rglob("*.py"))
    return {"port": port, "pid": pid} if told == wanted and changed < began and answers(port) else None


def answers(port: int) -> bool:
    """Whether a ComfyUI answers at this port of 127.0.0.1."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/system_stats", timeout=5):
            return True
    except OSError:
        return False


def remove_leftovers(base: Path) -> None:
    """Remove the logs and folders of servers that are no more, after a day in which they may be read."""
    for log in base.glob("server-*.log"):
        port = log.stem.removeprefix("server-")
        if time.time() - log.stat().st_mtime < KEEP_LOGS_S:
            continue
        with contextlib.suppress(OSError):  # the port is taken: it runs on
            bind(int(port))
            shutil.rmtree(base / f"run-{port}", ignore_errors=True)
            log.unlink()


def device_flags(python: Path) -> list[str]:
    """`--cpu` unless PyTorch sees a GPU. It is asked only where there may be one, since that takes seconds."""
    if not shutil.which("nvidia-smi") and sys.platform != "darwin":
        return ["--cpu"]
    probe = "import sys, torch; sys.exit(not (torch.cuda.is_available() or torch.backends.mps.is_available()))"
    return ["--cpu"] if subprocess.run([str(python), "-c", probe], env=child_environment()).returncode else []


def bind(port: int) -> int:
    """Bind a port for a moment, any free one for 0; returns it. Raises OSError or OverflowError."""
    with socket.socket() as probe:
        if os.name != "nt":  # there this option would give a port that is in use
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("127.0.0.1", port))
        return probe.getsockname()[1]


def free_port(port: int = 0) -> int:
    """The port, or any free one for 0. Raises DevError when it is taken."""
    try:
        return bind(port)
    except (OSError, OverflowError) as error:
        raise DevError(f"The port cannot be used: got {port} ({error}). Choose another with --port") from error


class Server:
    """A ComfyUI server on 127.0.0.1, to be used as a context: `with Server(...) as server: server.start()`.

    base: the base directory; its custom_nodes must exist. output: where pictures go; without it into a folder of this
    run, which also holds temporary files and is removed at the end.
    The server ends with the context, and with this process whatever becomes of it. With `keep` it outlives both,
    unless the context ends by an exception.
    """

    def __init__(
        self,
        python: Path,
        host: Path,
        base: Path,
        *,
        port: int = 0,
        flags: Sequence[str] = (),
        output: Path | None = None,
        keep: bool = False,
    ):
        self.port = free_port(port)
        self.url = f"http://127.0.0.1:{self.port}"
        self.run_folder = base / f"run-{self.port}"
        self.output = output or self.run_folder / "output"
        self.log = base / f"server-{self.port}.log"
        self.keep = keep
        self.process: subprocess.Popen | None = None
        launch = () if keep else (LAUNCH, "--follow")
        folders = ("--base-directory", base, "--temp-directory", self.run_folder, "--output-directory", self.output)
        fixed = ("--port", self.port, "--database-url", "sqlite:///:memory:", "--disable-api-nodes")
        self.command = [python, *launch, host / "main.py", *folders, *fixed, "--disable-auto-launch", *flags]
        if (base / MODEL_PATHS).exists():
            self.command += ["--extra-model-paths-config", base / MODEL_PATHS]

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, kind, error, trace) -> None:
        if kind is not None or not self.keep:
            self.stop()

    def start(self, timeout_s: float = READY_TIMEOUT_S) -> None:
        """Start and wait until it answers. Raises DevError when it dies, is late, or could not load the pack."""
        for folder in (self.run_folder, self.output):
            folder.mkdir(parents=True, exist_ok=True)
        stdin = subprocess.DEVNULL if self.keep else subprocess.PIPE
        with open(self.log, "wb") as log:
            self.process = spawn(self.command, env=child_environment(), stdin=stdin, stdout=log, stderr=log)
        deadline = time.monotonic() + timeout_s
        while not self.answers():
            self.check()
            if time.monotonic() > deadline:
                raise DevError(f"ComfyUI did not answer at {self.url} within {timeout_s:.0f} s", self.log)
            time.sleep(0.2)
        failures = rf"IMPORT FAILED.*{PACK}.*|comfy_entrypoint in .*{PACK}.*"
        if failure := re.search(failures, self.log.read_text(encoding="utf-8", errors="replace")):
            raise DevError(f"ComfyUI could not load the pack: {failure[0]}", self.log)

    def answers(self) -> bool:
        return answers(self.port)

    def check(self) -> None:
        """Raise DevError if the server has died."""
        if self.process.poll() is not None:
            raise DevError(f"The ComfyUI server died with exit code {self.process.returncode}", self.log)

    def stop(self) -> None:
        if self.process is not None:
            end_tree(self.process)
            if self.process.stdin:
                self.process.stdin.close()
        shutil.rmtree(self.run_folder, ignore_errors=True)

    def tail(self, lines: int = 20) -> str:
        return tail(self.log, lines)
