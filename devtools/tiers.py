"""What `test` runs: one or several runs of pytest for a tier of tests, and what they came to."""

import contextlib
import json
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from .browser import runs_browser_tests
from .process import ROOT, end_tree, say

TIERS = {  # the options of `test`
    "quick": "unit tests only: no ComfyUI, no browser, no diffusers, nothing that takes more than a second",
    "host": "what runs in a real ComfyUI (tests/host)",
    "browser": "what drives ComfyUI's editor (tests/browser)",
    "cpus": "the tests that compute, as on other processors: once for each of five settings",
}
UNIT = ("--ignore=tests/host", "--ignore=tests/browser")  # not even imported
COMPUTING = (  # about half a minute of one core's time
    "tests/samplers",
    "tests/lora",
    "tests/encoders",
    "tests/pixart/test_transformer.py",
    "tests/pixart/test_controlnet.py",
    "tests/pixart/test_diffusion.py",
    "tests/training/test_objectives.py",
)
SETTINGS = (  # variables that make PyTorch compute as on another processor
    {"ATEN_CPU_CAPABILITY": "default"},
    {"ATEN_CPU_CAPABILITY": "avx2"},
    {"ONEDNN_MAX_CPU_ISA": "AVX2"},
    {"OMP_NUM_THREADS": "1"},
    {"OMP_NUM_THREADS": "2"},
)
# Their tests take longest and begin first, so that no worker waits for another at the end.
IN_ORDER = ("--no-loadscope-reorder",)
LONGEST_FIRST = ("training", "encoders")
MOST_WORKERS = 4  # each takes about 1 GB
COUNTS_VARIABLE = "PIXART_TEST_COUNTS"  # tells the tests where to write what they came to
WAIT_VARIABLE = "OMP_WAIT_POLICY"
NOTHING_COLLECTED = 5  # pytest's exit code

# Options of pytest: those followed by a value, those after which a whole run makes no sense in parts, those that want
# the terminal and so no workers, and those that end at a failure.
VALUED = ("-k", "-m", "-n", "-p", "-o", "-c", "-W", "-r", "--deselect", "--ignore", "--maxfail", "--durations")
WHOLE = ("--lf", "--last-failed", "--ff", "--failed-first", "--nf", "--new-first", "--sw", "--stepwise", "--co")
WHOLE += ("--collect-only", "-h", "--help", "-V", "--version", "--fixtures", "--markers", "--cache-show")
TERMINAL = ("-s", "--capture=no", "--pdb", "--trace", "--numprocesses", "-n")
STOPPING = ("-x", "--exitfirst", "--maxfail")


@dataclass(frozen=True)
class Run:
    """One run of pytest: its name, its arguments and variables.

    editor: whether it comes to the tests of the editor. beside: it goes on at the same time as the run before it.
    """

    name: str
    arguments: Sequence[str]
    variables: dict[str, str] = field(default_factory=dict)
    editor: bool = False
    beside: bool = False


@dataclass(frozen=True)
class Outcome:
    """What a run came to. skipped: a reason and a test, or a file, for each that did not run."""

    name: str
    code: int
    passed: int = 0
    failed: int = 0
    skipped: tuple[tuple[str, str], ...] = ()
    seconds: float = 0


def plan(tier: str | None, rest: Sequence[str]) -> list[Run]:
    """The runs of a tier, or of everything; rest: pytest's arguments, which all of them get."""
    paths = named_paths(rest)
    quick = (*UNIT, *marked("quick", rest))
    if tier == "quick":
        return [with_workers(Run("quick", quick), rest)]
    if tier == "cpus":
        chosen = () if paths else COMPUTING
        # No workers: to start them costs as much as they save here, and two threads each are too many for two cores.
        arguments = (*UNIT, *marked("peer or quick", rest), *chosen)
        return [Run(title(each), arguments, {"OMP_NUM_THREADS": "1", **each}) for each in SETTINGS]
    if tier is not None:
        folder = () if paths else (f"tests/{tier}",)
        run = Run(tier, (*rest, *folder), editor=tier == "browser")
        return [run if run.editor else with_workers(run, rest, "loadfile")]
    if paths or any(argument in WHOLE for argument in rest):
        return [Run("", rest, editor=runs_browser_tests(rest))]
    arguments = (*IN_ORDER, *marked("not quick", rest), *folders_in_order())
    alone = any(argument in TERMINAL or argument[:2] == "-n" or argument.startswith(STOPPING) for argument in rest)
    editor = Run("browser", (*marked("not quick", rest), "tests/browser"), editor=True, beside=not alone)
    others = with_workers(Run("the rest", arguments), rest, "loadfile")
    return [with_workers(Run("quick", quick), rest), others, editor]


def folders_in_order() -> list[str]:
    """The parts of tests/, those that take longest first; pytest would order them itself if `tests` were among them.

    Without the editor's, whose driver keeps an event loop running in its process: the host's tests start their own.
    """
    found = [path for path in (ROOT / "tests").iterdir() if path.match("test_*.py") or any(path.rglob("test_*.py"))]
    parts = [path for path in found if path.name != "browser"]
    parts.sort(key=lambda path: (path.name not in LONGEST_FIRST, path.name))
    return [f"tests/{path.name}" for path in parts]


def title(variables: dict[str, str]) -> str:
    return " ".join(f"{name}={value}" for name, value in variables.items())


def named_paths(arguments: Sequence[str]) -> list[str]:
    """Those of pytest's arguments that name tests by a path."""
    before = ("", *arguments)
    pairs = zip(before, arguments, strict=False)
    free = [each for option, each in pairs if not each.startswith("-") and option not in VALUED]
    return [each for each in free if (ROOT / each.split("::")[0]).exists()]


def marked(marks: str, rest: Sequence[str]) -> tuple[str, ...]:
    """Pytest's arguments, with these marks asked for beside those that they ask for: of several -m the last counts."""
    kept, asked = [], ""
    arguments = iter(rest)
    for argument in arguments:
        if argument.startswith("-m"):
            asked = argument[2:] or next(arguments, "")
        else:
            kept.append(argument)
    return ("-m", f"({marks}) and ({asked})" if asked else marks, *kept)


def with_workers(run: Run, rest: Sequence[str], distribution: str = "worksteal") -> Run:
    """Spread a run over the processor's cores, unless the arguments want otherwise. Its threads share them too.

    distribution: of pytest-xdist; "loadfile" keeps the tests of a file together, which share what takes long to start.
    Those wait for servers and other programs, a quarter of the time for nothing at all: one worker more fills it.
    """
    if any(argument in TERMINAL or argument[:2] == "-n" for argument in rest):
        return run
    cores = usable_cores()
    workers = max(1, min(MOST_WORKERS, cores + (distribution == "loadfile" and cores > 1)))
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, cores // workers))
    arguments = ("-n", str(workers), "--dist", distribution, *run.arguments)
    return replace(run, arguments=arguments, variables={"OMP_NUM_THREADS": threads, **run.variables})


def usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_all(
    runs: Sequence[Run],
    start: Callable[[Run, dict[str, str]], int],
    begin: Callable[[Run, dict[str, str], Path], subprocess.Popen] | None = None,
) -> list[Outcome]:
    """Make the runs one after another, but for those beside others.

    start: runs pytest with further variables and returns its exit code. begin: starts pytest with its output in a file;
    None makes all runs one after another.
    """
    outcomes: list[Outcome] = []
    with contextlib.ExitStack() as ends:
        going = None
        for run, following in zip(runs, [*runs[1:], None], strict=True):
            own, going = going, None
            if begin is not None and following is not None and following.beside:
                going = ends.enter_context(_Going(following, begin))
            outcomes.append(_make(run, start) if own is None else own.finish())
            failed = outcomes[-1].code not in (0, NOTHING_COLLECTED)
            if failed and any(each.startswith(STOPPING) for each in run.arguments):
                break
    return outcomes


def _make(run: Run, start: Callable[[Run, dict[str, str]], int]) -> Outcome:
    _announce(run)
    with tempfile.TemporaryDirectory() as folder:
        counts = Path(folder) / "counts.json"
        began = time.perf_counter()
        code = start(run, _variables(run, counts))
        return read_outcome(run.name, code, counts, time.perf_counter() - began)


class _Going:
    """A run beside another, as a context: what has not ended with it is ended. Its output is shown in one piece."""

    def __init__(self, run: Run, begin: Callable[[Run, dict[str, str], Path], subprocess.Popen]):
        self.run, self.folder, self.began = run, tempfile.TemporaryDirectory(), time.perf_counter()
        self.counts, self.log = (Path(self.folder.name) / name for name in ("counts.json", "log"))
        self.process = begin(run, _variables(run, self.counts), self.log)

    def __enter__(self) -> "_Going":
        return self

    def __exit__(self, *_) -> None:
        end_tree(self.process)
        self.folder.cleanup()

    def finish(self) -> Outcome:
        code = self.process.wait()
        seconds = time.perf_counter() - self.began
        _announce(self.run)
        say(self.log.read_text(encoding="utf-8", errors="replace"))
        return read_outcome(self.run.name, code, self.counts, seconds)


def _announce(run: Run) -> None:
    if run.name:
        say(f"\n{run.name}: pytest {' '.join(run.arguments)}")


def _variables(run: Run, counts: Path) -> dict[str, str]:
    # Threads that wait for work spin else, which takes the time of those that have some: up to eightfold.
    waiting = os.environ.get(WAIT_VARIABLE, "PASSIVE")
    return {WAIT_VARIABLE: waiting, **run.variables, COUNTS_VARIABLE: str(counts)}


def read_outcome(name: str, code: int, counts: Path, seconds: float) -> Outcome:
    """What a run wrote about itself. One that broke off, or found no tests, counts as a failure."""
    found = json.loads(counts.read_text(encoding="utf-8")) if counts.exists() else {}
    failed = sum(found.get(kind, 0) for kind in ("failed", "error", "xpassed"))
    if code and code != NOTHING_COLLECTED:
        failed = max(1, failed)
    passed = found.get("passed", 0) + found.get("xfailed", 0)
    skipped = tuple((reason, test) for test, reason in found.get("skipped", ()))
    return Outcome(name, code, passed, failed, skipped, seconds)


def exit_code(outcomes: Sequence[Outcome], chosen: bool) -> int:
    """That of the first run that failed. chosen: the user picks tests, so one of several runs may find none."""
    codes = [each.code for each in outcomes]
    if chosen and any(code != NOTHING_COLLECTED for code in codes):
        codes = [code for code in codes if code != NOTHING_COLLECTED]
    return next(filter(None, codes), 0)


def closing_lines(runs: Sequence[Run], outcomes: Sequence[Outcome]) -> list[str]:
    """What did not run and why, and in the last line the sum of all runs."""
    reasons: dict[str, list[str]] = {}
    for reason, test in (pair for each in outcomes for pair in each.skipped):
        reasons.setdefault(reason, []).append(test)
    lines = [f"Skipped, {reason}: {', '.join(dict.fromkeys(tests))}" for reason, tests in sorted(reasons.items())]
    lines += [f"Not run, because one before it failed: {run.name}" for run in runs[len(outcomes) :]]
    lines += [f"{each.name}: no tests were found" for each in outcomes if each.code == NOTHING_COLLECTED]
    passed, failed = sum(each.passed for each in outcomes), sum(each.failed for each in outcomes)
    return [*lines, f"{passed} passed, {failed} failed, {sum(len(each.skipped) for each in outcomes)} skipped"]


def table(outcomes: Sequence[Outcome]) -> list[str]:
    """A line for each setting."""
    rows = [("setting", "passed", "failed", "seconds")]
    rows += [(each.name, str(each.passed), str(each.failed), f"{each.seconds:.0f}") for each in outcomes]
    width = max(len(row[0]) for row in rows)
    return [f"{name:{width}} {passed:>7} {failed:>7} {seconds:>8}" for name, passed, failed, seconds in rows]
