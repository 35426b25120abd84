"""What all commands have in common: help with examples, and exit codes."""

import importlib

import pytest

from pixart_pack.pixart.commands.console import FAILED, INTERRUPTED, OK, run_command
from pixart_pack.pixart.training import __main__ as training


@pytest.mark.parametrize("name", ["compare", "convert", "evaluate", "sample"])
def test_help_shows_examples(name, capsys):
    module = importlib.import_module(f"pixart_pack.pixart.{name}")
    with pytest.raises(SystemExit) as ended:
        run_command(module.main, module.parse(), ["--help"])
    shown = capsys.readouterr().out
    assert ended.value.code == 0 and shown.startswith(f"usage: python -m pixart.{name} ")
    assert shown.count(f"  python -m pixart.{name} ") > 1


@pytest.mark.parametrize("name", ["caption", "encode", "run"])
def test_help_of_training_shows_examples(name, capsys):
    with pytest.raises(SystemExit) as ended:
        training.main([name, "--help"])
    shown = capsys.readouterr().out
    assert ended.value.code == 0 and shown.startswith(f"usage: python -m pixart train {name} ")
    assert f"examples:\n  python -m pixart train {name} " in shown


def test_help_of_all_training(capsys):
    with pytest.raises(SystemExit):
        training.main(["--help"])
    assert "accelerate launch -m pixart train config.yaml" in capsys.readouterr().out


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
    def main(options):
        if raised:
            raise raised

    parser = importlib.import_module("pixart_pack.pixart.commands.convert").parse()
    assert run_command(main, parser, ["a", "b"]) == code
    assert capsys.readouterr().err == said


def test_unknown_options_are_told_by_argparse(capsys):
    with pytest.raises(SystemExit) as ended:
        training.main(["run"])
    assert ended.value.code == 2 and "the following arguments are required: config" in capsys.readouterr().err
