"""The benchmarks' own tools: the mixture is what it says, and tables and plots are written."""

import pytest
import torch

from pixart_pack.benchmarks.captions import save_results as save_captions
from pixart_pack.benchmarks.mixture import GaussianMixture
from pixart_pack.benchmarks.report import markdown_table, save_plot
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
