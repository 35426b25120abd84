"""The benchmarks' own tools: the mixture is what it says, and tables and plots are written."""

import argparse
import contextlib
import importlib
import json
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from pixart_pack.benchmarks import plain
from pixart_pack.benchmarks.captions import save_results as save_captions
from pixart_pack.benchmarks.cases import Case, add_options, list_cases, parse_run
from pixart_pack.benchmarks.mixture import GaussianMixture
from pixart_pack.benchmarks.peaks import measure_peak
from pixart_pack.benchmarks.report import describe_ratio, keep_runs, markdown_table, save_plot
from pixart_pack.benchmarks.samplers import read_results
from pixart_pack.samplers.schedules import schedule_sigmas
from pixart_pack.tests.tiny_pixart import tiny_config
from pixart_pack.tests.watch import watch_steps

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


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux tells the peak of a process")
def test_peak_of_memory():
    measure_peak(lambda: torch.ones(2**20))
    found = measure_peak(lambda: torch.ones(2**24))  # 64 MiB
    assert 0.95 < found / 2**26 < 1.2


TIMED = ("captions", "controlnet", "denoiser", "dials", "load", "loop", "text", "train", "vae", "plain")


@pytest.mark.parametrize("name", TIMED)
@pytest.mark.parametrize(("device", "message"), [("tpu", "got 'tpu', expected cpu or cuda"), ("cuda", "finds no GPU")])
def test_every_benchmark_is_told_the_device(name, device, message, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        importlib.import_module(f"pixart_pack.benchmarks.{name}").main(["--device", device])
    assert message in capsys.readouterr().err


def test_the_gpu_is_taken_where_there_is_one(monkeypatch):
    for found, device in ((False, "cpu"), (True, "cuda")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda found=found: found)
        assert parse_run(argparse.ArgumentParser(), []).device == device
    assert parse_run(argparse.ArgumentParser(), ["--device", "cpu"]).device == "cpu"


def allowed_packages(names):
    """What these distributions bring, and what those that they need bring: names to import."""
    todo, found = list(names), set()
    while todo:
        name = re.sub(r"[-_.]+", "-", todo.pop()).lower()
        if name in found:
            continue
        found.add(name)
        with contextlib.suppress(metadata.PackageNotFoundError):
            needs = [need for need in metadata.requires(name) or () if "extra ==" not in need]
            todo += [re.match(r"[\w.-]+", need)[0] for need in needs]
    brought = metadata.packages_distributions().items()
    return {package for package, by in brought if found & {re.sub(r"[-_.]+", "-", each).lower() for each in by}}


def run_plain(tmp_path, options, before=""):
    """What the script writes, run as a file and from elsewhere. before: code that comes first."""
    script, out = Path(plain.__file__), tmp_path / "plain.json"
    code = f"import runpy, sys\n{before}\nsys.argv = sys.argv[1:]\nrunpy.run_path(sys.argv[0], run_name='__main__')"
    options = f"--depth 1 --sides-px 64 --batches 2 --rounds 1 --threads 1 --device cpu {options} --out {out}"
    command = [sys.executable, "-c", code, str(script), *options.split()]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text())["cases"], done.stderr


@pytest.mark.slow
def test_plain_script_needs_three_libraries(tmp_path):
    """torch, numpy and safetensors, with what they need: nothing else that is installed here is found."""
    allowed = allowed_packages(["torch", "numpy", "safetensors"])
    others = sorted(set(metadata.packages_distributions()) - allowed)
    assert {"transformers", "diffusers", "tqdm"} <= set(others)
    hide = f"""
hidden = frozenset({others})
class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] in hidden:
            raise ModuleNotFoundError('No module named ' + repr(name), name=name)
sys.meta_path.insert(0, Hide())
"""
    results, said = run_plain(tmp_path, "--captions 7 mixed --steps 2 --lcm-steps 1 --alone", hide)
    assert [result["case"] for result in results] == [
        "64 px, batch 2, captions of 7 tokens, fp32",
        "64 px, batch 2, captions of 20 and 120 tokens, fp32",
        "2 guided steps, 64 px, fp32",
        "1 steps of LCM, 64 px, fp32",
    ]
    for result in results:
        assert result["seconds"].keys() == {"this pack"}
        assert 0 < result["roofline_s"] < min(result["seconds"]["this pack"])
    assert "1 steps of LCM, 64 px, fp32: " in said


@pytest.mark.slow
def test_plain_script_races_diffusers(tmp_path):
    pytest.importorskip("diffusers")
    results, said = run_plain(tmp_path, "--captions mixed --steps 2 --lcm-steps 0 --dtypes bf16")
    assert [result["case"] for result in results] == [
        "64 px, batch 2, captions of 20 and 120 tokens, bf16",
        "2 guided steps, 64 px, bf16",
    ]
    for result in results:
        assert {name: len(seconds) for name, seconds in result["seconds"].items()} == {"this pack": 1, "diffusers": 1}
        assert result["ratio"]["ratio"] > 0
    assert said.count("; over diffusers ") == 2


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["alpha-1024", "sigma-512"])
def test_plain_script_on_a_gpu(variant, monkeypatch):
    """One that is not there: tensors have a device, a type and a shape alone. Nothing mixes devices, no step waits."""
    pytest.importorskip("diffusers")
    mode, levels = FakeTensorMode(), {name: schedule_sigmas(name, 3) for name in ("uniform", "lcm")}
    monkeypatch.setattr(plain.schedules, "schedule_sigmas", lambda name, steps: levels[name])
    monkeypatch.setattr(plain.schedules, "sigmas", torch.zeros_like)
    monkeypatch.setattr("pixart_pack.samplers.noise.SampleNoise", lambda x, *_: lambda *_: torch.empty_like(x))
    case = Case(128, (20, 9), "bf16")
    with mode:
        track = plain.Track(tiny_config(variant), torch.bfloat16, "cuda")
        forward, loops = track.forward(case).rivals, [track.guided(case, 3).rivals, track.distilled(case, 3).rivals]
        assert {tuple(forward["this pack"]().shape), tuple(forward["diffusers"]().shape)} == {(2, 8, 16, 16)}
    watch = watch_steps(monkeypatch, mode)
    for loop in loops:
        found = loop["this pack"]()
        assert (found.device.type, found.dtype, found.shape) == ("cuda", torch.float32, (1, 4, 16, 16))
    assert watch.found == []
