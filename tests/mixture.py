"""Runs a solver on the reference mixture and compares it with the original's trajectory."""

import torch

from pixart_pack.benchmarks.mixture import GaussianMixture
from pixart_pack.samplers.schedules import timesteps_from_sigmas
from pixart_pack.tests.goldens import load_golden

DTYPES = {"output": torch.float32, "output_f64": torch.float64}


def reference_runs(*cases):
    """Every run of the cases in both precisions, as pytest parameters: (case, run, output)."""
    return [(case, run, output) for case in cases for run in load_golden(case)[0]["runs"] for output in DTYPES]


class ReferenceRun:
    """One run of a reference case: its start, its recorded noises, and the model it was computed with."""

    def __init__(self, case, run, output, levels):
        self.description, self.tensors = load_golden(case)
        self.settings = self.description["runs"][run]
        self.run, self.output, self.dtype = run, output, DTYPES[output]
        self.levels = levels.to(self.dtype)
        self.model = GaussianMixture(
            *(self.tensors[f"gmm.{name}"] for name in ("mu", "s", "logw")),
            condition=self.tensors["input.cond_logits"],
            guidance=self.settings.get("cfg_scale", 1.0),
        )
        self.start = self.tensors["input.x_T"].to(self.dtype) * (1.0 + self.levels[0] ** 2).sqrt()
        self.variance = None

    def noise_sampler(self, offset=0):
        """Gives the recorded noise of the step that starts at a sigma."""
        noises = self.tensors.get(f"input.{self.run}.noises")
        starts = self.levels.double().tolist()
        return lambda sigma, sigma_next: noises[starts.index(sigma) + offset].to(self.dtype)

    def denoise(self, x, sigma, **extra_args):
        """The model, which leaves its variance channels behind in `variance`."""
        timestep = timesteps_from_sigmas(sigma[0]).item()
        self.variance = torch.sin(0.7 * x / (1.0 + sigma[0] ** 2).sqrt() + 0.01 * timestep)
        return self.model(x, sigma, **extra_args)

    def check(self, result):
        """Assert that a result, at the last level, is the original's, and that the model saw the same times."""
        expected = self.tensors[f"{self.output}.{self.run}.final"]
        result = result / (1.0 + self.levels[-1] ** 2).sqrt()
        times = torch.tensor(self.model.evaluations, dtype=torch.float64)
        torch.testing.assert_close(times, torch.tensor(self.settings["model_t"]).double(), rtol=0.0, atol=1e-3)
        if self.dtype == torch.float64:
            assert (result - expected).norm() / expected.norm() < 1e-6
            return
        tolerance = self.description["tolerance"]
        torch.testing.assert_close(result, expected, atol=tolerance["suggested_atol"], rtol=tolerance["suggested_rtol"])
