"""What `dev.py gpu` is made of: parts that may fail, results that are kept, and checks that see what is wrong."""

import importlib
import json

import pytest
import torch

from pixart_pack.benchmarks.gpu import __main__ as program
from pixart_pack.benchmarks.gpu import correctness, pictures, speed
from pixart_pack.benchmarks.gpu.parts import Finding, Part, Results, check, run_parts, verdict
from pixart_pack.devtools import commands
from pixart_pack.devtools.process import DevError

pytestmark = pytest.mark.slow


def test_parts_that_fail_end_nothing_and_what_is_done_is_not_done_again(tmp_path):
    done = []

    def fail(left_s):
        raise RuntimeError("no kernel\nfor it")

    def measure(left_s):
        done.append(left_s)
        return [Finding("b", "speed", 2.0, 1.0), check("b", "other", lambda: 1 / 0, 1.0)]

    def hang(left_s):
        raise TimeoutError

    parts = [Part("a", fail), Part("b", measure), Part("c", measure, least_s=100), Part("d", hang)]
    assert run_parts(parts, Results(tmp_path / "gpu.json", {"device": "x"}), 50) == ["c", "d"]
    results = Results(tmp_path / "gpu.json", {"device": "x"})
    found = [each for findings in results.parts.values() for each in findings]
    assert [verdict(each) for each in found] == ["failed", "WRONG", "failed"]
    assert found[0].error == "RuntimeError: no kernel" and "ZeroDivisionError" in found[2].error
    assert run_parts(parts, results, 500) == ["d"] and len(done) == 2
    assert Results(tmp_path / "gpu.json", {"device": "y"}).parts == {}


def test_everything_is_right_on_this_processor_itself(tmp_path):
    """The same checks as on a GPU, with the CPU as the device: whether they run, and hold where nothing can differ."""
    options = ["--device", "cpu", "--small", "--parts", "correctness", "--out", str(tmp_path)]
    assert program.main(options) == 0, (tmp_path / "gpu.md").read_text()
    parts = json.loads((tmp_path / "gpu.json").read_text())["parts"]
    assert sum(len(findings) for findings in parts.values()) > 20
    assert set(parts) == {f"correctness {name}" for name in correctness.list_checks("cpu", True)}
    assert "| correctness | solver dmd |" in (tmp_path / "gpu.md").read_text()


class Parsed(Exception):
    """The benchmark would begin now."""


@pytest.mark.parametrize("run", speed.RUNS, ids=lambda run: run.name)
def test_every_benchmark_of_speed_takes_its_options(run, tmp_path, monkeypatch):
    """Those for a GPU, too, which nothing here can run."""
    module = importlib.import_module(f"pixart_pack.benchmarks.{run.name}")
    parse = module.parse_run

    def stop(*arguments, **more):
        raise Parsed(parse(*arguments, **more))

    monkeypatch.setattr(module, "parse_run", stop)
    assert run.options != run.small or run.name == "vae"
    for options in (run.options, run.small):
        with pytest.raises(Parsed):
            module.main(["--device", "cpu", "--out", str(tmp_path), *options])


def test_caches_stand_between_the_loader_and_all_that_takes_its_model():
    workflow = json.loads(pictures.WORKFLOW.read_text())
    loader = next(name for name, node in workflow.items() if node["class_type"] == "PixArtLoadCheckpoint")
    pictures.turn_dials(workflow)
    first, *_, last = pictures.DIALS
    takers = {name for name, node in workflow.items() if [loader, 0] in node["inputs"].values()}
    assert takers == {first} and [last, 0] in [node["inputs"].get("model") for node in workflow.values()]


@pytest.mark.parametrize(
    ("arguments", "expected"), [([], commands.GPU_S), (["--budget-s", "60"], 60.0), (["--small", "--budget-s=5"], 5.0)]
)
def test_all_parts_together_have_a_time(arguments, expected):
    assert commands.budget(arguments) == expected


def test_a_time_that_is_no_number_is_refused():
    with pytest.raises(DevError, match="Not a number of seconds: got --budget-s long"):
        commands.budget(["--budget-s", "long"])


def test_a_device_that_computes_wrong_is_seen(monkeypatch):
    own = correctness.predict

    def predict(model, inputs, device="cpu", *arguments, **more):
        found = own(model, inputs, "cpu", *arguments, **more)
        return found * 1.001 if device == "wrong" else found

    monkeypatch.setattr(correctness, "predict", predict)
    monkeypatch.setattr(torch.nn.Module, "to", lambda self, *_: self)
    found = correctness._compressed("wrong", correctness.TINY)
    assert found == pytest.approx(1e-3, rel=1e-3) and found > correctness.LIMITS[torch.float32]
