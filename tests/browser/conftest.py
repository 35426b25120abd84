"""The ComfyUI editor in a headless Chromium, with one server and one browser for all of these tests."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from pixart_pack.editor.templates.rehearsal import prepare
from pixart_pack.tests.browser.editor import CLASSIC, Editor
from pixart_pack.tests.host.server import Host, start

REQUIRED = os.environ.get("PIXART_BROWSER_TESTS") == "required" or bool(os.environ.get("CI"))


def drives_the_editor(item: pytest.Item) -> bool:
    return "editor" in getattr(item, "fixturenames", ())


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark these tests and run them last: Playwright keeps an event loop running, and others start their own."""
    for item in filter(drives_the_editor, items):
        item.add_marker("browser")
        item.add_marker("slow")
    items.sort(key=lambda item: (drives_the_editor(item), _renderer_of(item) != CLASSIC))


def _renderer_of(item: pytest.Item) -> str:
    """By which tests are sorted, so that the renderer is changed once."""
    call = getattr(item, "callspec", None)
    return call.params.get("renderer", CLASSIC) if call else CLASSIC


def leave_out(reason: str) -> None:
    """Skip for want of something, or fail in CI and where PIXART_BROWSER_TESTS is `required`."""
    pytest.fail(reason, pytrace=False) if REQUIRED else pytest.skip(reason)


def pytest_terminal_summary(terminalreporter) -> None:
    """Say how long a user waits; and aloud that the editor was not tested, which goes unnoticed among dots."""
    for report in terminalreporter.stats.get("passed", ()):
        times = dict(report.user_properties)
        if report.when == "call" and "first_picture_s" in times:
            terminalreporter.write_line(
                f"the editor opened in {times['opened_s']} s, the first picture came after {times['first_picture_s']} s"
            )
    skipped = [report for report in terminalreporter.stats.get("skipped", ()) if "tests/browser" in report.nodeid]
    if skipped:
        reason = skipped[0].longrepr[2] if isinstance(skipped[0].longrepr, tuple) else skipped[0].longrepr
        terminalreporter.write_sep(
            "!", f"{len(skipped)} tests of the editor did NOT run. {reason}", red=True, bold=True
        )


@pytest.fixture(scope="package")
def chromium() -> str:
    """The path of a Chromium."""
    if reasons := os.environ.get("PIXART_BROWSER_MISSING"):
        leave_out(f"needs a Chromium. {reasons}")
    found = os.environ.get("PIXART_BROWSER") or shutil.which("chromium")
    if found is None:
        leave_out("needs a Chromium: run `python dev.py test`, or let PIXART_BROWSER name one")
    return found


@pytest.fixture(scope="package")
def editor_host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    """A server whose only models are the demo's."""
    folder = os.environ.get("PIXART_COMFYUI")
    if not folder:
        leave_out("needs a ComfyUI: run `python dev.py test`, or let PIXART_COMFYUI name its folder")
    host = start(Path(folder), tmp_path_factory.mktemp("editor"), ())
    try:
        prepare(host)
        host.post("/settings", {"Comfy.TutorialCompleted": True})  # else templates open by themselves, sooner or later
        yield host
    finally:
        host.close()
        host.server.stop()


# Package, not session: while Playwright runs, this thread has an event loop, in which other tests cannot start theirs.
@pytest.fixture(scope="package")
def editor(chromium: str, editor_host: Host, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Editor]:
    """The editor, opened. Its screenshots go into the folder that PIXART_SCREENSHOTS names, or a temporary one."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs Playwright: pip install playwright")
    shots = Path(os.environ.get("PIXART_SCREENSHOTS") or tmp_path_factory.mktemp("screenshots"))
    shots.mkdir(parents=True, exist_ok=True)
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield Editor(browser.new_page(viewport={"width": 1600, "height": 1000}), editor_host.url, shots)
        browser.close()


@pytest.fixture(autouse=True)
def renderer(request: pytest.FixtureRequest, editor: Editor) -> str:
    """What draws the nodes: the classic canvas, or Nodes 2.0 for tests with `in_both`."""
    name = getattr(request, "param", CLASSIC)
    editor.draw_by(name)
    return name


@pytest.fixture(autouse=True)
def no_complaints(editor):
    """No test may leave an error in the browser's console, or an unanswered request, that speaks of this pack."""
    editor.problems.clear()
    yield
    editor.close_dialogs()
    assert not editor.complaints()
