"""The benchmarks' own tools: the mixture is what it says, and tables and plots are written."""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pixart_pack.benchmarks import plain
from pixart_pack.benchmarks.captions import save_results as save_captions
from pixart_pack.benchmarks.cases import Case, add_options, list_cases
from pixart_pack.benchmarks.mixture import GaussianMixture
from pixart_pack.benchmarks.peaks import measure_peak
from pixart_pack.benchmarks.report import describe_ratio, keep_runs, markdown_table, save_plot
from pixart_pack.benchmarks.samplers import read_results

MEANS = torch.tensor([[1.0, 0.0, 0.0, -1.0], [-2.0, 1.0, 0.5, 0.0]])
SCALES = torch.tensor([0.4, 0.7])
LOG_WEIGHTS = torch.tensor([0.3, -0.2])


def draw(count):
    generator = torch.Generator().manual_seed(0)
    shares = torch.softmax(LOG_WEIGHTS, 0)
    which = torch.multinomial(shares, count, replacement=True, generator=generator)
    return MEANS[which] + SCALES[which, None] * torch.randn(count, 4, generator=generator)


def test_denoised_is_the_conditional_mean():
    """Against the mean over many samples of the data, weighted by how well they explain the noised one."""
    samples = draw(400_000).double()
    x, sigma = torch.tensor([[0.2, 0.4, -0.3, -0.6]], dtype=torch.float64), torch.tensor([0.8], dtype=torch.float64)
    weights = torch.softmax(-(x - samples).square().sum(1) / (2 * sigma**2), 0)
    denoised = GaussianMixture(MEANS, SCALES, LOG_WEIGHTS)(x, sigma)
    torch.testing.assert_close(denoised[0], weights @ samples, atol=5e-3, rtol=0)


def test_quantiles_are_those_of_samples():
    directions = torch.nn.functional.normalize(torch.tensor([[1.0, 0, 0, 0], [1.0, 2.0, -1.0, 0.5]]), dim=1).double()
    quantiles = GaussianMixture(MEANS, SCALES, LOG_WEIGHTS).quantiles(directions, 9)
    projected = directions @ draw(400_000).double().T
    shares = (torch.arange(9, dtype=torch.float64) + 0.5) / 9
    torch.testing.assert_close(quantiles, torch.quantile(projected, shares, dim=1).T, atol=2e-2, rtol=0)


def test_guidance_extrapolates_from_the_unconditional_noise():
    x, sigma = torch.randn(3, 4, generator=torch.Generator().manual_seed(1)), torch.tensor([1.5] * 3)
    condition = torch.tensor([[2.0, -1.0]] * 3)
    parts = (MEANS, SCALES, LOG_WEIGHTS)
    plain, told = GaussianMixture(*parts)(x, sigma), GaussianMixture(*parts, condition)(x, sigma)
    guided = GaussianMixture(*parts, condition, guidance=3.0)(x, sigma)
    torch.testing.assert_close(guided, plain + 3.0 * (told - plain))


def test_table():
    assert markdown_table(["a", 5], [["b", "0.1"]]) == "| a | 5 |\n| --- | --- |\n| b | 0.1 |\n"


def test_plot(tmp_path):
    save_plot(tmp_path / "new" / "plot.svg", {"one": ([1, 2], [0.5, 0.1], {"linestyle": "--"})}, "t", "x", "y")
    assert "<svg" in (tmp_path / "new" / "plot.svg").read_text()


def test_every_curve_of_a_plot_looks_different(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("matplotlib.axes.Axes.legend", lambda axes, **_: drawn.extend(axes.get_lines()))
    save_plot(tmp_path / "plot.svg", {str(i): ([1, 2], [i + 1, i + 2], {}) for i in range(40)}, "t", "x", "y")
    assert len({(line.get_color(), line.get_marker()) for line in drawn}) == 40


def test_results_of_other_settings_are_not_mixed(tmp_path):
    path = tmp_path / "samplers.json"
    path.write_text('{"samples": 16, "runs": {}, "orders": {}}')
    assert read_results(path, {"samples": 16})["runs"] == {}
    with pytest.raises(ValueError, match="do not fit: got {'samples': 16}, expected {'samples': 32}"):
        read_results(path, {"samples": 32})


def test_caption_results_are_written_after_each_sampler(tmp_path):
    runs = {"SA-Solver": [50.0, 97.25]}
    assert "| SA-Solver | 50.0 | 97.2 |" in save_captions(runs, 10, [2, 10], tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"captions.json", "captions.md", "captions.svg"}


def test_results_of_the_same_case_are_replaced(tmp_path):
    path = tmp_path / "new" / "x.json"
    keep_runs(path, [{"case": {"side": 1, "captions": [20]}, "seconds": 1.0}, {"case": {"side": 2}, "seconds": 2.0}])
    runs = keep_runs(path, [{"case": {"side": 1, "captions": [20]}, "seconds": 3.0}, {"case": {}, "seconds": 4.0}])
    assert [run["seconds"] for run in runs] == [3.0, 2.0, 4.0]
    assert json.loads(path.read_text())["runs"] == runs


def test_ratio_is_told_with_its_spread():
    found = {"ratio": 0.9, "least": 0.8765, "greatest": 1.0}
    assert describe_ratio(found) == "0.90 (0.88 to 1.00)"
    assert describe_ratio(found, 3) == "0.900 (0.876 to 1.000)"
    assert describe_ratio(None) == "not run"


def parse(*arguments, **limits):
    parser = argparse.ArgumentParser()
    add_options(parser, dtypes=["fp32"], **limits)
    return parser.parse_args(arguments)


def test_cases_are_all_combinations():
    options = parse("--sides-px", "256", "512", "--batches", "1", "3", "--captions", "20", "mixed", "--dtypes", "bf16")
    of_one_side = [(20,), (20, 20, 20), (20, 120, 20)]  # a batch of one has nothing to mix
    assert list(list_cases(options)) == [Case(side, lengths, "bf16") for side in (256, 512) for lengths in of_one_side]
    assert (Case(512, (20, 120), "fp32").tokens, Case(512, (20, 120), "fp32").batch) == (1024, 2)


@pytest.mark.parametrize("arguments", [("--batches", "3"), ("--captions", "short"), ("--dtypes", "fp8")])
def test_cases_that_cannot_be_measured_are_refused(arguments, capsys):
    with pytest.raises(SystemExit):
        parse(*arguments, batches=(1, 2))
    assert "usage" in capsys.readouterr().err


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux tells the peak of a process")
def test_peak_of_memory():
    measure_peak(lambda: torch.ones(2**20))
    found = measure_peak(lambda: torch.ones(2**24))  # 64 MiB
    assert 0.95 < found / 2**26 < 1.2


def test_plain_script_needs_no_host(tmp_path):
    """Run as a file, from elsewhere: every case and the loop, beside their rooflines."""
    script, out = Path(plain.__file__), tmp_path / "plain.json"
    options = "--depth 1 --sides-px 64 --batches 2 --captions 7 mixed --rounds 1 --steps 2 --threads 1 --device cpu"
    command = [sys.executable, str(script), *options.split(), "--out", str(out)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    results = json.loads(out.read_text())["cases"]
    assert [result["case"] for result in results] == [
        "64 px, batch 2, captions of 7 tokens, fp32",
        "64 px, batch 2, captions of 20 and 120 tokens, fp32",
        "2 guided steps, 64 px, batch 2, captions of 7 tokens, fp32",
    ]
    assert all(0 < result["roofline_s"] < min(result["seconds"]) for result in results)
