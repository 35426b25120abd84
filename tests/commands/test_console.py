"""What all commands have in common: one list, help with examples, and exit codes."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from pixart_pack.pixart.__main__ import COMMANDS, main
from pixart_pack.pixart.commands.console import FAILED, INTERRUPTED, OK, run_command

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("arguments", [[], ["--help"]])
def test_the_commands_are_listed(arguments, capsys):
    assert main(arguments) == OK
    shown = capsys.readouterr().out
    assert all(f"  {name} " in shown for name in COMMANDS)


def test_the_list_needs_no_torch():
    check = "import runpy, sys; sys.argv = ['pixart']; runpy.run_module('pixart.__main__', run_name='pixart.list'); "
    check += "from pixart.__main__ import overview; print(overview()); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", check], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert "sample" in done.stdout and done.stdout.endswith("False\n"), done.stderr


def test_an_unknown_command_is_refused(capsys):
    assert main(["paint"]) == 2
    assert "got 'paint', expected one of sample, convert" in capsys.readouterr().err


@pytest.mark.parametrize("name", COMMANDS)
def test_help_shows_examples(name, capsys):
    with pytest.raises(SystemExit) as ended:
        main([name, "--help"])
    shown = capsys.readouterr().out
    assert ended.value.code == 0 and shown.startswith(f"usage: python -m pixart {name} ")
    assert shown.count(f"-m pixart {name} ") > 1


@pytest.mark.parametrize(
    ("raised", "code", "said"),
    [
        (None, OK, ""),
        (ValueError("wrong: got a"), FAILED, "error: wrong: got a\n"),
        (FileExistsError("there"), FAILED, "error: there\n"),
        (KeyboardInterrupt(), INTERRUPTED, ""),
    ],
)
def test_exit_codes(raised, code, said, capsys):
    def fail(options):
        if raised:
            raise raised

    parser = importlib.import_module("pixart_pack.pixart.commands.convert").parse()
    assert run_command(fail, parser, ["a", "b"]) == code
    assert capsys.readouterr().err == said


def test_missing_arguments_are_named_by_argparse(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["convert", "model.pth"])
    assert ended.value.code == 2 and "the following arguments are required: target" in capsys.readouterr().err
