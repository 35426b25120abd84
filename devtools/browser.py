"""A browser for the tests of the editor: one that is installed, or one that is fetched once and noted."""

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from .browser_package import unpacked_package
from .environment import Environment, locked, read_json
from .process import ROOT, DevError, child_environment, run_limited, say

VARIABLE = "PIXART_BROWSER"  # names a browser; the tests get the one that was found by it, too
MISSING_VARIABLE = "PIXART_BROWSER_MISSING"  # tells the tests why there is none
NAMES = (
    "chromium",
    "chromium-browser",
    "google-chrome",
    "google-chrome-stable",
    "chrome",
    "microsoft-edge",
    "microsoft-edge-stable",
    "msedge",
    "brave-browser",
)
PLACES = (  # where systems keep browsers that no PATH leads to
    "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
    "/Applications/Chromium.app/Contents/MacOS/Chromium",
    "/Applications/Microsoft Edge.app/Contents/MacOS/Microsoft Edge",
    "/opt/google/chrome/chrome",
    "/opt/microsoft/msedge/msedge",
    "/usr/lib/chromium/chromium",
    "/snap/bin/chromium",
    "$PROGRAMFILES/Google/Chrome/Application/chrome.exe",
    "$LOCALAPPDATA/Google/Chrome/Application/chrome.exe",
    "${PROGRAMFILES(X86)}/Microsoft/Edge/Application/msedge.exe",
    "$PROGRAMFILES/Microsoft/Edge/Application/msedge.exe",
)
DEBIANS = ("chromium", "fonts-liberation")  # without a font every text has no width
PROBE_LIMIT_S, DOWNLOAD_LIMIT_S, APT_LIMIT_S = 60, 300, 600
PROBE = """
import sys
from playwright.sync_api import sync_playwright
with sync_playwright() as running:
    browser = running.chromium.launch(executable_path=sys.argv[1], args=["--no-sandbox"])
    browser.new_page().set_content("<p>x</p>")
    browser.close()
"""
ASK_PLAYWRIGHT = """
from playwright.sync_api import sync_playwright
with sync_playwright() as running:
    print(running.chromium.executable_path)
"""


def installed(environment: Environment) -> Iterator[Path]:
    """The browsers on PATH and in the usual places."""
    places = [*map(shutil.which, NAMES), *map(os.path.expandvars, PLACES)]
    for path in dict.fromkeys(place for place in places if place and os.path.isfile(place)):
        yield Path(path)


def playwrights_own(environment: Environment) -> Iterator[Path]:
    say("Fetching the browser that Playwright offers ...")
    arguments = ["-m", "playwright", "install", "--no-shell", "chromium"]
    variables = child_environment(PLAYWRIGHT_DOWNLOAD_CONNECTION_TIMEOUT="10000")
    run_limited([environment.python, *arguments], DOWNLOAD_LIMIT_S, log_of(environment), env=variables)
    output = run_limited([environment.python, "-c", ASK_PLAYWRIGHT], PROBE_LIMIT_S, log_of(environment))
    yield Path(output.splitlines()[-1])


def debians_package(environment: Environment) -> Iterator[Path]:
    if not hasattr(os, "geteuid") or os.geteuid() != 0 or not shutil.which("apt-get"):
        raise DevError("it takes root and apt-get")
    say(f"Installing {' and '.join(DEBIANS)} with apt-get ...")
    variables = child_environment(DEBIAN_FRONTEND="noninteractive")
    apt = ["apt-get", "-y", "-o", "DPkg::Lock::Timeout=120"]
    with contextlib.suppress(DevError):  # one broken source of many need not matter; the next line tells
        run_limited([*apt, "update"], APT_LIMIT_S, log_of(environment), env=variables)
    install = [*apt, "install", "--no-install-recommends", *DEBIANS]
    run_limited(install, APT_LIMIT_S, log_of(environment), env=variables)
    yield from installed(environment)


def npms_package(environment: Environment) -> Iterator[Path]:
    yield unpacked_package(environment.lasting / "browsers", DOWNLOAD_LIMIT_S, log_of(environment))


Way = Callable[[Environment], Iterable[Path]]
WAYS: Mapping[str, Way] = {  # tried in this order
    "an installed browser": installed,
    "Playwright's download": playwrights_own,
    "Debian's package": debians_package,
    "npm's package": npms_package,
}


def log_of(environment: Environment) -> Path:
    return environment.folder / "browser.log"


def check(environment: Environment, path: Path) -> None:
    """Raise DevError unless Playwright can drive this browser."""
    run_limited([environment.python, "-c", PROBE, path], PROBE_LIMIT_S, log_of(environment), env=child_environment())


def named_browser() -> Path | None:
    """The browser that the user's variable names, by a path or a command. Raises DevError if there is none."""
    name = os.environ.get(VARIABLE)
    if not name:
        return None
    path = shutil.which(os.path.expanduser(name))
    if path is None:
        raise DevError(
            f"No browser in {VARIABLE}: got {name!r}, expected a program's path or name. Correct or unset it"
        )
    return Path(path)


def find_browser(environment: Environment, ways: Mapping[str, Way] = WAYS) -> tuple[Path | None, list[str]]:
    """The path of a browser, found or fetched, and what failed on the way, each as `WAY: why`.

    What was found is noted beside the environment, so that the next call takes no time. Raises DevError if the
    variable names a browser that does not work.
    """
    if named := named_browser():
        check_named(environment, named)
        return named, []
    with locked(environment.folder / "browser"):
        note = environment.folder / "browser.json"
        noted = read_json(note)
        if noted.get("key") == environment.key and os.access(noted.get("path", ""), os.X_OK):
            return Path(noted["path"]), []
        log_of(environment).unlink(missing_ok=True)
        path, failures = try_ways(environment, ways)
        if path:
            say(f"The browser of the tests is {path}")
            note.write_text(json.dumps({"key": environment.key, "path": str(path)}), encoding="utf-8")
        return path, failures


def check_named(environment: Environment, path: Path) -> None:
    try:
        check(environment, path)
    except DevError as error:
        raise DevError(f"The browser in {VARIABLE} does not work: got {path} ({error}). Correct or unset it") from error


def try_ways(environment: Environment, ways: Mapping[str, Way]) -> tuple[Path | None, list[str]]:
    """The first browser that works, and why each way before it gave none."""
    failures = []
    for name, way in ways.items():
        reasons = []
        try:
            for path in way(environment):
                try:
                    check(environment, path)
                    return path, failures
                except DevError as error:
                    reasons.append(f"{path} does not work ({error})")
        except (DevError, OSError) as error:
            reasons.append(str(error))
        failures.append(f"{name}: {', '.join(reasons) or 'there is none'}")
    return None, failures


@contextlib.contextmanager
def browser_offered(environment: Environment, ways: Mapping[str, Way] = WAYS) -> Iterator[dict[str, str]]:
    """Variables that lead the tests to a browser. If there is none, the last lines that are printed say so."""
    path, failures = find_browser(environment, ways)
    if path:
        yield {VARIABLE: str(path)}
        return
    yield {MISSING_VARIABLE: "; ".join(failures)}
    lines = ["", "The tests of the editor did NOT run: no browser could be found or fetched."]
    lines += [f"  {failure}" for failure in failures]
    log = f" The log: {log_of(environment)}" if log_of(environment).exists() else ""
    say("\n".join([*lines, f"Install Chromium, or let {VARIABLE} name one.{log}"]))


def runs_browser_tests(arguments: Sequence[str]) -> bool:
    """Whether pytest with these arguments comes to the tests of the editor: it names them, or no path at all."""
    tests = ROOT / "tests" / "browser"
    paths = [ROOT / each.split("::")[0] for each in arguments if not each.startswith("-")]
    paths = [path.resolve() for path in paths if path.exists()]
    return not paths or any(path in (tests, *tests.parents) or tests in path.parents for path in paths)
