"""What `dev.py test` makes of its options: the runs of pytest, and what it says of them."""

import json
import shutil
import sys
import time

import pytest

from pixart_pack.devtools import commands, tiers
from pixart_pack.devtools.process import spawn
from pixart_pack.devtools.tiers import Outcome, Run


@pytest.fixture(autouse=True)
def two_cores(monkeypatch):
    monkeypatch.setattr(tiers, "usable_cores", lambda: 2)
    for name in ("OMP_NUM_THREADS", tiers.WAIT_VARIABLE):
        monkeypatch.delenv(name, raising=False)


WORKERS = ("-n", "2", "--dist", "worksteal")
BY_FILE = ("-n", "3", "--dist", "loadfile")  # one more than there are cores


def marks_of(run: Run) -> str:
    return run.arguments[run.arguments.index("-m") + 1]


def test_a_tier_stands_before_the_arguments_of_pytest():
    options = commands.parse(["test", "--env", "E", "--quick", "-q", "--host"])
    assert (options.env, options.tier, options.rest) == ("E", "quick", ["-q", "--host"])
    assert commands.parse(["test", "-q"]).tier is None
    assert commands.parse(["bench", "--quick"]).rest == ["--quick"]
    with pytest.raises(SystemExit, match="2"):
        commands.parse(["test", "--quick", "--host"])


def test_quick_leaves_out_the_host_and_the_browser():
    (run,) = tiers.plan("quick", ["-x"])
    assert run == Run("quick", (*WORKERS, *tiers.UNIT, "-m", "quick", "-x"), {"OMP_NUM_THREADS": "1"})


@pytest.mark.parametrize("tier", ["host", "browser"])
def test_a_folder_is_a_tier(tier):
    (run,) = tiers.plan(tier, ["-q"])
    workers = BY_FILE if tier == "host" else ()
    assert (run.name, run.arguments, run.editor) == (tier, (*workers, "-q", f"tests/{tier}"), tier == "browser")
    path = f"tests/{tier}/conftest.py"
    assert tiers.plan(tier, [path])[0].arguments == (*workers, path)


def test_everything_is_what_is_quick_and_what_is_not():
    quick, rest, editor = tiers.plan(None, ["-k", "demo", "-m", "host or slow"])
    assert marks_of(quick) == "(quick) and (host or slow)"
    assert marks_of(rest) == marks_of(editor) == "(not quick) and (host or slow)"
    assert quick.arguments[:4] == WORKERS and rest.arguments[:4] == BY_FILE and "-n" not in editor.arguments
    assert "tests/browser" not in rest.arguments and editor.arguments[-1] == "tests/browser"
    assert (quick.editor, rest.editor, editor.editor) == (False, False, True)
    assert (quick.beside, rest.beside, editor.beside) == (False, False, True)
    assert not any(run.beside for run in tiers.plan(None, ["-x"]))
    assert all("-k" in run.arguments for run in (quick, rest, editor))


@pytest.mark.parametrize("rest", [["tests/samplers", "-q"], ["--lf"], ["--collect-only", "-q"]])
def test_named_tests_and_questions_are_one_run_without_workers(rest):
    (run,) = tiers.plan(None, rest)
    assert (run.name, run.arguments, run.variables) == ("", rest, {})


@pytest.mark.parametrize("argument", ["-n0", "--pdb", "-s"])
def test_the_user_can_do_without_workers(argument):
    assert "--dist" not in tiers.plan("quick", [argument])[0].arguments


def test_threads_share_the_cores_with_the_workers(monkeypatch):
    monkeypatch.setattr(tiers, "usable_cores", lambda: 16)
    (run,) = tiers.plan("quick", [])
    assert (run.arguments[1], run.variables) == ("4", {"OMP_NUM_THREADS": "4"})
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert tiers.plan("quick", [])[0].variables == {"OMP_NUM_THREADS": "3"}


def test_each_setting_of_a_processor_is_a_run():
    runs = tiers.plan("cpus", [])
    assert [run.name for run in runs] == [tiers.title(setting) for setting in tiers.SETTINGS]
    assert [run.variables["OMP_NUM_THREADS"] for run in runs] == ["1", "1", "1", "1", "2"]
    assert not any("--dist" in run.arguments for run in runs)
    assert {marks_of(run) for run in runs} == {"peer or quick"}
    assert all((tiers.ROOT / path).exists() for path in tiers.COMPUTING)
    assert tiers.plan("cpus", ["tests/lora"])[0].arguments[-1] == "tests/lora"


def run_made_up(runs, codes: list[int], counts: list[dict | None]):
    """Make runs of a made-up pytest that ends with these codes and writes these counts."""
    ends = iter(zip(codes, counts, strict=True))

    def start(run, variables):
        code, found = next(ends)
        if found is not None:
            with open(variables[tiers.COUNTS_VARIABLE], "w", encoding="utf-8") as file:
                json.dump(found, file)
        return code

    return tiers.run_all(runs, start)


def test_the_last_line_sums_all_runs():
    runs = [Run("quick", ()), Run("the rest", ())]
    counts = [{"passed": 3, "error": 1, "skipped": [["a.py::b", "no c"]]}, {"passed": 2, "failed": 2, "skipped": []}]
    outcomes = run_made_up(runs, [1, 1], counts)
    assert tiers.closing_lines(runs, outcomes) == ["Skipped, no c: a.py::b", "5 passed, 3 failed, 1 skipped"]
    assert tiers.exit_code(outcomes, chosen=False) == 1


def test_a_run_goes_on_beside_the_one_before_it(capsys):
    """It has begun before that one begins, and is shown after it; what has not ended with all others is ended."""
    events, slow = [], "import time; print('made beside', flush=True); time.sleep({})"

    def start(run, variables):
        events.append(run.name)
        return 0

    def begin(run, variables, log):
        events.append(f"{run.name} begins")
        with open(log, "wb") as file:
            return spawn([sys.executable, "-c", slow.format(run.arguments[0])], stdout=file)

    runs = [Run("quick", ()), Run("the rest", ()), Run("browser", ("0.01",), beside=True)]
    outcomes = tiers.run_all(runs, start, begin)
    assert events == ["quick", "browser begins", "the rest"]
    assert [(each.name, each.code) for each in outcomes] == [("quick", 0), ("the rest", 0), ("browser", 0)]
    said = capsys.readouterr().out
    assert said.index("the rest: pytest") < said.index("browser: pytest") < said.index("made beside")

    def fail(run, variables):
        raise SystemExit(130)

    began = time.monotonic()
    with pytest.raises(SystemExit):
        tiers.run_all([runs[1], Run("browser", ("60",), beside=True)], fail, begin)
    assert time.monotonic() - began < 30


def test_threads_wait_without_spinning_unless_the_user_wants_it(monkeypatch):
    seen = []
    for policy in (None, "ACTIVE"):
        if policy:
            monkeypatch.setenv(tiers.WAIT_VARIABLE, policy)
        tiers.run_all([Run("", ())], lambda run, variables: seen.append(variables[tiers.WAIT_VARIABLE]) or 0)
    assert seen == ["PASSIVE", "ACTIVE"]


def test_a_run_that_breaks_off_is_a_failure():
    runs = [Run("quick", ()), Run("the rest", ())]
    outcomes = run_made_up(runs, [3, 0], [None, {"passed": 2}])
    assert tiers.closing_lines(runs, outcomes)[-1] == "2 passed, 1 failed, 0 skipped"
    assert tiers.exit_code(outcomes, chosen=False) == 3


def test_what_a_failure_kept_from_running_is_named():
    runs = [Run("quick", ("-x",)), Run("the rest", ("-x",))]
    outcomes = run_made_up(runs, [1], [{"passed": 1, "failed": 1}])
    lines = ["Not run, because one before it failed: the rest", "1 passed, 1 failed, 0 skipped"]
    assert tiers.closing_lines(runs, outcomes) == lines


def test_a_run_without_tests_fails_unless_the_user_picked_others():
    runs = [Run("quick", ()), Run("the rest", ())]
    outcomes = run_made_up(runs, [0, 5], [{"passed": 1}, {}])
    assert tiers.exit_code(outcomes, chosen=True) == 0
    assert tiers.exit_code(outcomes, chosen=False) == 5
    assert tiers.exit_code(outcomes[1:], chosen=True) == 5
    assert "the rest: no tests were found" in tiers.closing_lines(runs, outcomes)


def test_the_table_has_a_line_for_each_setting():
    lines = tiers.table([Outcome("A=1", 0, 12, 0, (), 3.4), Outcome("LONGER=2", 1, 11, 1, (), 61.6)])
    assert lines[1:] == ["A=1           12       0        3", "LONGER=2      11       1       62"]
    assert len(set(map(len, lines))) == 1


# --- The plugin of pytest that the tests have: tests/closing.py

MADE_UP = """
import pytest

def test_one(): pass

@pytest.mark.slow
def test_two(): pass

def test_three(): pytest.skip("needs a moon")
"""
WITHOUT_MODULE = "import pytest; pytest.importorskip('no_such_module')"


@pytest.fixture
def made_up(pytester, monkeypatch):
    """A folder with two files of tests, of which some cannot run; its list allows nothing."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # they take a second to import
    for name in ("CI", tiers.COUNTS_VARIABLE):
        monkeypatch.delenv(name, raising=False)
    pytester.makeini("[pytest]\nmarkers =\n    quick:\n    slow:\n    host:\n")
    (pytester.path / "tests" / "host").mkdir(parents=True)
    shutil.copy(tiers.ROOT / "tests" / "closing.py", pytester.path / "conftest.py")
    (pytester.path / "tests" / "test_a.py").write_text(MADE_UP)
    (pytester.path / "tests" / "host" / "test_b.py").write_text(WITHOUT_MODULE)
    return pytester


def allow(made_up, text: str) -> None:
    (made_up.path / "tests" / "allowed_skips.txt").write_text(text)


def test_skips_are_listed_and_pass_elsewhere(made_up):
    result = made_up.runpytest("-ra")
    assert result.ret == 0
    result.stdout.fnmatch_lines(["*SKIPPED*could not import 'no_such_module'*", "*SKIPPED*needs a moon*"])
    result.stdout.fnmatch_lines(["*2 passed, 2 skipped*"])


def test_skips_fail_in_ci_by_name(made_up, monkeypatch):
    monkeypatch.setenv("CI", "true")
    result = made_up.runpytest("-ra")
    assert result.ret == 1
    named = ["tests/test_a.py::test_three: needs a moon", "tests/host/test_b.py: could not import 'no_such_module'*"]
    result.stdout.fnmatch_lines(["*skipped, which tests/allowed_skips.txt does not allow*", *named])
    result.stdout.fnmatch_lines(["ERROR tests/host/test_b.py*", "FAILED tests/test_a.py::test_three*"])
    result.assert_outcomes(passed=2, failed=1, errors=1)


def test_listed_skips_pass_in_ci(made_up, monkeypatch):
    monkeypatch.setenv("CI", "true")
    allow(made_up, "# why\ntests/test_a.py::test_three: needs a moon\ntests/host/*: could not import 'no_such_*\n")
    assert made_up.runpytest().ret == 0
    allow(made_up, "tests/test_a.py::test_three: needs a sun\ntests/host/*: could not import *\n")
    assert made_up.runpytest().ret == 1


def test_a_listed_skip_has_a_reason(made_up, monkeypatch):
    monkeypatch.setenv("CI", "1")
    allow(made_up, "tests/test_a.py::test_three\n")
    result = made_up.runpytest()
    assert result.ret not in (0, 1)
    assert "No reason in" in result.stderr.str() + result.stdout.str()


def test_a_whole_tier_that_cannot_run_fails_in_ci(made_up, monkeypatch):
    monkeypatch.setenv("CI", "true")
    assert made_up.runpytest("tests/host").ret == 1


def test_quick_is_what_is_neither_slow_nor_of_the_host(made_up):
    (made_up.path / "tests" / "host" / "test_b.py").write_text("def test_four(): pass")
    made_up.runpytest("-m", "quick").assert_outcomes(passed=1, skipped=1, deselected=2)
    made_up.runpytest("-m", "not quick").assert_outcomes(passed=2, deselected=2)


def test_files_of_which_a_tier_takes_nothing_are_not_read(made_up):
    (made_up.path / "tests" / "host" / "test_b.py").write_text("def test_four(): pass")
    (made_up.path / "tests" / "test_c.py").write_text("import pytest\n\npytestmark = pytest.mark.slow\n1 / 0")
    made_up.runpytest("-m", "(quick) and (not other)").assert_outcomes(passed=1, skipped=1, deselected=2)
    (made_up.path / "tests" / "test_c.py").write_text("1 / 0")
    made_up.runpytest("-m", "not quick").assert_outcomes(passed=2, deselected=2)
    made_up.runpytest().assert_outcomes(errors=1)


def test_a_mark_stands_in_the_file_of_its_test(made_up):
    (made_up.path / "tests" / "test_c.py").write_text("import pytest\n\n@pytest.mark.slow\ndef test(): pass")
    assert made_up.runpytest("tests/test_c.py").ret == 0
    hidden = "import pytest\n\n@getattr(pytest.mark, 'slow')\ndef test(): pass"
    (made_up.path / "tests" / "test_c.py").write_text(hidden)
    result = made_up.runpytest("tests/test_c.py")
    assert result.ret == pytest.ExitCode.USAGE_ERROR and "by another file" in result.stderr.str()


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["0", "2"])
def test_the_counts_are_written_for_the_last_line(made_up, monkeypatch, tmp_path, workers):
    monkeypatch.setenv("CI", "true")
    monkeypatch.setenv(tiers.COUNTS_VARIABLE, str(tmp_path / "counts.json"))
    allow(made_up, "tests/test_a.py::*: needs a moon\n")
    made_up.runpytest_subprocess("-p", "xdist", "-n", workers)
    outcome = tiers.read_outcome("", 1, tmp_path / "counts.json", 0)
    assert (outcome.passed, outcome.failed) == (2, 1)
    assert outcome.skipped == (("needs a moon", "tests/test_a.py::test_three"),)


def test_a_long_test_without_the_mark_is_named(made_up, monkeypatch):
    (made_up.path / "conftest.py").write_text((made_up.path / "conftest.py").read_text() + "\nLIMIT_S = 0\n")
    result = made_up.runpytest()
    result.stdout.fnmatch_lines(["*without the mark `slow`*", "tests/test_a.py::test_one: 0 s"])
    result.stdout.no_fnmatch_line("tests/test_a.py::test_two*")


def test_every_part_of_the_tests_is_run_the_longest_first():
    parts = tiers.folders_in_order()
    assert parts[:2] == ["tests/encoders", "tests/training"] and "tests/host" in parts and "tests/goldens" not in parts
    assert {path.relative_to(tiers.ROOT).as_posix() for path in (tiers.ROOT / "tests").glob("test_*.py")} <= set(parts)
