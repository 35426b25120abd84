"""What `dev.py gpu` is made of: parts that may fail, results that are kept, and checks that see what is wrong."""

import json

import pytest
import torch

from pixart_pack.benchmarks.gpu import __main__ as program
from pixart_pack.benchmarks.gpu import correctness
from pixart_pack.benchmarks.gpu.parts import Finding, Part, Results, check, run_parts, verdict

pytestmark = pytest.mark.slow


def test_parts_that_fail_end_nothing_and_what_is_done_is_not_done_again(tmp_path):
    done = []

    def fail(left_s):
        raise RuntimeError("no kernel\nfor it")

    def measure(left_s):
        done.append(left_s)
        return [Finding("b", "speed", 2.0, 1.0), check("b", "other", lambda: 1 / 0, 1.0)]

    parts = [Part("a", fail), Part("b", measure), Part("c", measure, least_s=100)]
    assert run_parts(parts, Results(tmp_path / "gpu.json", {"device": "x"}), 50) == ["c"]
    results = Results(tmp_path / "gpu.json", {"device": "x"})
    found = [each for findings in results.parts.values() for each in findings]
    assert [verdict(each) for each in found] == ["failed", "WRONG", "failed"]
    assert found[0].error == "RuntimeError: no kernel" and "ZeroDivisionError" in found[2].error
    assert run_parts(parts, results, 500) == [] and len(done) == 2
    assert Results(tmp_path / "gpu.json", {"device": "y"}).parts == {}


def test_everything_is_right_on_this_processor_itself(tmp_path):
    """The same checks as on a GPU, with the CPU as the device: whether they run, and hold where nothing can differ."""
    options = ["--device", "cpu", "--small", "--parts", "correctness", "--out", str(tmp_path)]
    assert program.main(options) == 0, (tmp_path / "gpu.md").read_text()
    parts = json.loads((tmp_path / "gpu.json").read_text())["parts"]
    assert len(parts["correctness"]) > 20
    assert "| correctness | solver dmd |" in (tmp_path / "gpu.md").read_text()


def test_a_device_that_computes_wrong_is_seen(monkeypatch):
    own = correctness.predict

    def predict(model, inputs, device="cpu", *arguments, **more):
        found = own(model, inputs, "cpu", *arguments, **more)
        return found * 1.001 if device == "wrong" else found

    monkeypatch.setattr(correctness, "predict", predict)
    monkeypatch.setattr(torch.nn.Module, "to", lambda self, *_: self)
    found = correctness._compressed("wrong", correctness.TINY)
    assert found == pytest.approx(1e-3, rel=1e-3) and found > correctness.LIMITS[torch.float32]
