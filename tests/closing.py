"""Plugin of pytest: marks what is quick, holds skips to tests/allowed_skips.txt in CI, and counts for dev.py."""

import functools
import json
import os
import re
from pathlib import Path

import pytest

ALLOWED = "tests/allowed_skips.txt"  # from pytest's root folder
COUNTS_VARIABLE = "PIXART_TEST_COUNTS"  # names the file for what the run came to
TIERS = ("tests/host/", "tests/browser/")  # whole folders that are not quick
LIMIT_S = 5  # a quick test takes a second at most on a quiet machine; one that took as long as this is named
SLOW, PEER = "pytest.mark.slow", "pytest.mark.peer"  # as a file writes them
WHOLE = tuple(f"\npytestmark = {mark}" for mark in (SLOW, PEER))  # of all its tests


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave out files of which the tier takes nothing, unread: their imports take longer than many tests."""
    asked = config.option.markexpr.lstrip("(")
    if collection_path.suffix != ".py" or not asked.startswith(("quick", "not quick")):
        return None
    text = read(collection_path)
    if asked.startswith("quick"):
        return True if any(mark in text for mark in WHOLE) else None
    tier = collection_path.relative_to(config.rootpath).as_posix().startswith(TIERS)
    return True if not tier and SLOW not in text and PEER not in text else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        marked = [mark for mark in (SLOW, PEER) if item.get_closest_marker(mark.rpartition(".")[2])]
        if missing := [mark for mark in marked if mark not in read(item.path)]:
            raise pytest.UsageError(f"Marked by another file: {item.nodeid}. Write {missing[0]} in the test's own file")
        if not marked and not item.nodeid.startswith(TIERS):
            item.add_marker("quick")


@functools.cache
def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def in_ci() -> bool:
    return os.environ.get("CI", "").lower() not in ("", "0", "false")


def read_allowed(path: Path) -> list[re.Pattern]:
    """Lines `TEST: REASON`, where * stands for anything; # begins a comment, and no list allows nothing."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    lines = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    if wrong := [line for line in lines if ": " not in line]:
        raise pytest.UsageError(f"No reason in {path}: got {wrong[0]!r}, expected `TEST: REASON`. Add why it may skip")
    return [re.compile(re.escape(line).replace(r"\*", ".*"), re.DOTALL) for line in lines]


def reason_of(report) -> str:
    text = report.longrepr[2] if isinstance(report.longrepr, tuple | list) else str(report.longrepr)
    return text.removeprefix("Skipped: ")


def told(report) -> str:
    return f"{report.nodeid}: {reason_of(report)}"


def terminal(config: pytest.Config):
    """What collects the reports of a run; a worker of pytest-xdist has none."""
    return None if hasattr(config, "workerinput") else config.pluginmanager.get_plugin("terminalreporter")


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Turn skips that are not allowed into failures before pytest sums up."""
    reporter = terminal(session.config)
    if reporter is None:
        return
    skipped = reporter.stats.get("skipped", [])
    if in_ci() and skipped:
        allowed = read_allowed(session.config.rootpath / ALLOWED)
        for report in [each for each in skipped if not any(line.fullmatch(told(each)) for line in allowed)]:
            skipped.remove(report)
            refuse(report, reporter)
            if session.exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
                session.exitstatus = pytest.ExitCode.TESTS_FAILED
    if path := os.environ.get(COUNTS_VARIABLE):
        write_counts(Path(path), reporter.stats)


def refuse(report, reporter) -> None:
    report.refused = told(report)
    report.outcome, report.longrepr = "failed", f"Skipped, which {ALLOWED} does not allow: {reason_of(report)}"
    kind = "error" if isinstance(report, pytest.CollectReport) else "failed"
    reporter.stats.setdefault(kind, []).append(report)


def write_counts(path: Path, stats: dict) -> None:
    count = {kind: len(stats.get(kind, ())) for kind in ("passed", "failed", "error", "xfailed", "xpassed")}
    skipped = [(each.nodeid, reason_of(each)) for each in stats.get("skipped", ())]
    path.write_text(json.dumps({**count, "skipped": skipped}), encoding="utf-8")


def pytest_terminal_summary(terminalreporter) -> None:
    stats = terminalreporter.stats
    failed = [*stats.get("failed", ()), *stats.get("error", ())]
    if refused := [report.refused for report in failed if hasattr(report, "refused")]:
        terminalreporter.write_sep("=", f"skipped, which {ALLOWED} does not allow", red=True)
        terminalreporter.write("".join(f"{line}\n" for line in refused))
    if slow := [each for each in stats.get("passed", ()) if "quick" in each.keywords and each.duration > LIMIT_S]:
        terminalreporter.write_sep("=", f"more than {LIMIT_S} s without the mark `slow`", yellow=True)
        terminalreporter.write("".join(f"{each.nodeid}: {each.duration:.0f} s\n" for each in slow))
