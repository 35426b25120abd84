"""Error of every solver against the number of model evaluations, on a mixture of Gaussians that is known exactly.

Two errors: the distance of the samples' distribution from the data's (sliced Wasserstein-2, exact quantiles), and for
deterministic solvers the distance of each sample from the exact solution of the ODE. ComfyUI's own samplers run in the
same process on the same starts and sigmas, and on the sigmas of ComfyUI's own schedulers where named so.
"""

import argparse
import functools
import inspect
import json
import logging
import math
import re
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors.torch import load_file
from tqdm import tqdm

from ..samplers import SAMPLERS
from ..samplers.schedules import BETA_END, BETA_START, NUM_TIMESTEPS, schedule_sigmas
from .host import import_host
from .mixture import GaussianMixture
from .report import RESULTS, markdown_table, save_plot

MIXTURE_FILE = Path(__file__).parent.parent / "tests" / "goldens" / "sampler_sa_solver.safetensors"
EVALUATIONS = (5, 8, 10, 14, 20, 25, 35, 50, 100)
ORDER_STEPS = (1920, 3840)  # below, the errors of SA-Solver's corrector change sign and show no order
ORDER_SAMPLES = 16
DIRECTIONS = 64
SHAPE = (4, 1, 2)
HOST_SCHEDULES = frozenset({"normal", "beta", "exponential", "kl_optimal"})
EXACT_STEPS = 400
SEED_STRIDE = 1000

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Contender:
    """One row: a solver with its options on a schedule. host: solver and schedules but "uniform" are ComfyUI's."""

    label: str
    sampler: str
    schedule: str = "uniform"
    options: dict = field(default_factory=dict)
    host: bool = False
    deterministic: bool = False
    style: dict = field(default_factory=dict)


def _ours(label, sampler, schedule="uniform", deterministic=False, **options):
    return Contender(label, sampler, schedule, options, deterministic=deterministic)


def _hosts(sampler, schedule="uniform", deterministic=False):
    label = f"ComfyUI {sampler}" + (f", {schedule} sigmas" if schedule != "uniform" else "")
    return Contender(label, sampler, schedule, host=True, deterministic=deterministic, style={"linestyle": "--"})


FIRST = {"predictor_order": 1, "corrector_order": 1}
THIRD = {"predictor_order": 3, "corrector_order": 3}
CONTENDERS = (
    _ours("SA-Solver 2/2, tau 1 (official)", "sa_solver", few_steps=True),
    _ours("SA-Solver 2/2, tau 1", "sa_solver"),
    _ours("SA-Solver 2/2, tau 1, quadratic times", "sa_solver", "quadratic"),
    _ours("SA-Solver 2/2, tau 1, kl_optimal times", "sa_solver", "kl_optimal"),
    _ours("SA-Solver 1/1, tau 0", "sa_solver", deterministic=True, tau=0.0, **FIRST),
    _ours("SA-Solver 2/2, tau 0", "sa_solver", deterministic=True, tau=0.0),
    _ours("SA-Solver 3/3, tau 0", "sa_solver", deterministic=True, tau=0.0, **THIRD),
    _ours("DPM-Solver++ 1", "dpm_solver", deterministic=True, order=1),
    _ours("DPM-Solver++ 2 (Sigma)", "dpm_solver", deterministic=True),
    _ours("DPM-Solver++ 2 (alpha)", "dpm_solver", deterministic=True, lower_order_final="short_runs"),
    _ours("DPM-Solver++ 2, kl_optimal times", "dpm_solver", "kl_optimal", deterministic=True),
    _ours("DPM-Solver++ 3", "dpm_solver", deterministic=True, order=3),
    _ours("IDDPM, posterior variance", "iddpm", "iddpm"),
    _ours("DDIM", "ddim", deterministic=True),
    _ours("LCM", "lcm"),
    _hosts("sa_solver"),
    *(_hosts("sa_solver", schedule) for schedule in ("normal", "beta", "kl_optimal")),
    _hosts("dpmpp_2m_sde"),
    *(_hosts("dpmpp_2m_sde", schedule) for schedule in ("normal", "beta", "exponential")),
    _hosts("dpmpp_2m", deterministic=True),
    _hosts("dpmpp_2m", "normal", deterministic=True),
    _hosts("uni_pc", deterministic=True),
    _hosts("uni_pc", "normal", deterministic=True),
    _hosts("euler", deterministic=True),
    _hosts("ddim", deterministic=True),
    _hosts("lcm"),
)

ORDERS = {
    "DPM-Solver++ 1": ("dpm_solver", {"order": 1}, 1),
    "DPM-Solver++ 2": ("dpm_solver", {"order": 2}, 2),
    "DPM-Solver++ 3": ("dpm_solver", {"order": 3}, 3),
    "SA-Solver 1/1, tau 0": ("sa_solver", {"tau": 0.0, **FIRST}, 1),
    "SA-Solver 2/2, tau 0": ("sa_solver", {"tau": 0.0}, 2),
    "SA-Solver 3/3, tau 0": ("sa_solver", {"tau": 0.0, **THIRD}, 3),
}


class Host:
    """ComfyUI's samplers with what they want around a model."""

    def __init__(self):
        import_host()
        from comfy import model_sampling, samplers

        class Sampling(model_sampling.ModelSamplingDiscrete, model_sampling.EPS):
            pass

        betas = {"linear_start": BETA_START, "linear_end": BETA_END, "timesteps": NUM_TIMESTEPS}
        self.samplers = samplers
        # The host's "sqrt_linear" betas are the linear ones.
        self.sampling = Sampling(SimpleNamespace(sampling_settings={"beta_schedule": "sqrt_linear", **betas}))

    def levels(self, schedule, steps):
        """The sigmas of ComfyUI's scheduler."""
        return self.samplers.calculate_sigmas(self.sampling, schedule, steps)

    def solver(self, name):
        """The host's sampler as a function of one of our models."""
        solve = self.samplers.sampler_object(name).sampler_function
        takes_noise = "noise_sampler" in inspect.signature(solve).parameters

        def run(model, x, levels, noise_sampler, **options):
            patcher = SimpleNamespace(get_model_object=lambda _: self.sampling)
            inner = SimpleNamespace(model_patcher=patcher, inner_model=SimpleNamespace(model_sampling=self.sampling))
            wrapped = Wrapped(model, inner)
            noise = {"noise_sampler": noise_sampler} if takes_noise else {}
            return solve(wrapped, x, levels, extra_args={}, callback=None, disable=True, **noise, **options)

        return run


@dataclass
class Wrapped:
    """A model with the attributes that the host's samplers look at."""

    model: GaussianMixture
    inner_model: SimpleNamespace

    def __call__(self, x, sigma, **_):
        return self.model(x, sigma.expand(x.shape[0]))


class Arena:
    """The mixture, the starts, and what the samples are measured against."""

    def __init__(self, samples):
        tensors = load_file(MIXTURE_FILE)
        self.mixture = partial(GaussianMixture, *(tensors[f"gmm.{name}"] for name in ("mu", "s", "logw")))
        generator = torch.Generator().manual_seed(0)
        directions = torch.randn(DIRECTIONS, math.prod(SHAPE), generator=generator, dtype=torch.float64)
        self.directions = directions / directions.norm(dim=1, keepdim=True)
        self.quantiles = self.mixture().quantiles(self.directions, samples)
        # Quasi-random starts: their own distance from a normal distribution is far below that of random ones.
        sobol = torch.quasirandom.SobolEngine(math.prod(SHAPE), scramble=True, seed=0)
        uniform = sobol.draw(samples, dtype=torch.float64).clamp(1e-9, 1 - 1e-9)
        self.noise = torch.special.ndtri(uniform).view(samples, *SHAPE)

    def start(self, levels, count=None):
        """The noised starts at the first level, in the levels' dtype."""
        return self.noise[:count].to(levels) * (1.0 + levels[0] ** 2).sqrt()

    def distribution_distance(self, x):
        """Sliced Wasserstein-2 distance between samples and the data."""
        projected = (self.directions @ x.double().flatten(1).T).sort(dim=1).values
        return (projected - self.quantiles).square().mean().sqrt().item()

    @functools.cached_property
    def solutions(self):
        """The exact solution of the ODE from every start, by final sigma: at t = 0 and at 0."""
        levels = schedule_sigmas("log_snr", EXACT_STEPS)
        rest = torch.logspace(math.log10(levels[-1]), -4, EXACT_STEPS // 8, dtype=torch.float64)
        near = SAMPLERS["dpm_solver"](self.mixture(), self.start(levels), levels, order=3, disable=True)
        clean = SAMPLERS["dpm_solver"](self.mixture(), near, rest, order=3, disable=True)
        return {False: near, True: clean}

    @functools.cached_property
    def finest(self):
        """The solution of the ODE from a few starts, far more exact than what its orders are measured with."""
        orders = {"predictor_order": 4, "corrector_order": 4}
        return self.solve("sa_solver", 2 * ORDER_STEPS[-1], tau=0.0, **orders)

    def solve(self, sampler, steps, **options):
        """Solve from a few starts in float64, in equal steps of log SNR."""
        levels = schedule_sigmas("log_snr", steps)
        return SAMPLERS[sampler](self.mixture(), self.start(levels, ORDER_SAMPLES), levels, disable=True, **options)

    def solution_error(self, x, last):
        """Root mean square distance to the exact solution of the ODE at the last level."""
        return (x.double() - self.solutions[last.item() == 0.0]).square().mean().sqrt().item()


def measure(contender, steps, arena, host, repeats=1):
    """Evaluations made, distance of the distribution, and error of the solution when deterministic.

    repeats: how often a stochastic solver runs, each time with other noise; its distance is the root mean square.
    """
    own = contender.host and contender.schedule in HOST_SCHEDULES
    levels = host.levels(contender.schedule, steps) if own else schedule_sigmas(contender.schedule, steps)
    runs = [_run(contender, levels.float(), arena, host, seed) for seed in range(_repeats(contender, repeats))]
    results, evaluations = zip(*runs, strict=True)
    distances = [arena.distribution_distance(result) for result in results]
    return {
        "evaluations": evaluations[0],
        "distribution": math.sqrt(sum(d**2 for d in distances) / len(distances)),
        "solution": arena.solution_error(results[0], levels[-1]) if contender.deterministic else None,
    }


def _repeats(contender, repeats):
    return 1 if contender.deterministic else repeats


def _run(contender, levels, arena, host, seed):
    """The samples and how often the model was evaluated."""
    solve = host.solver(contender.sampler) if contender.host else partial(SAMPLERS[contender.sampler], disable=True)
    model, x = arena.mixture(), arena.start(levels)
    generator = torch.Generator().manual_seed(len(levels) - 1 + SEED_STRIDE * seed)
    options = dict(contender.options)
    if contender.host or not contender.deterministic:
        options["noise_sampler"] = lambda sigma, sigma_next: torch.randn(x.shape, generator=generator, dtype=x.dtype)
    if contender.sampler == "iddpm":
        options["variance"] = lambda: torch.full_like(x, -1.0)
    return solve(model, x, levels, **options), len(model.evaluations)


def measure_order(sampler, options, arena):
    """The observed order of convergence to the ODE's solution, in equal steps of log SNR."""
    results = (arena.solve(sampler, steps, **options) for steps in ORDER_STEPS)
    coarse, fine = ((result - arena.finest).square().mean().sqrt() for result in results)
    return torch.log2(coarse / fine).item() / math.log2(ORDER_STEPS[1] / ORDER_STEPS[0])


def report(results, orders, counts):
    """The Markdown text of all results."""
    order_rows = [[label, theory, f"{order:.2f}"] for label, (order, theory) in orders.items()]
    first, last = ORDER_STEPS
    return "\n".join(
        [
            "Distance of the samples from the data (sliced Wasserstein-2), by model evaluations:\n",
            _table(results, counts, "distribution"),
            "Root mean square error of the deterministic solvers against the exact solution of the ODE:\n",
            _table(results, counts, "solution"),
            f"Orders of convergence, {first} to {last} equal steps of log SNR in float64:\n",
            markdown_table(["solver", "theory", "measured"], order_rows),
        ]
    )


def _table(results, counts, key):
    rows = []
    for label, runs in results.items():
        if runs[0][key] is not None:
            rows.append([label, *(f"{run[key]:.4f}" for run in runs)])
    return markdown_table(["solver", *counts], rows)


def _plot(results, path):
    styles = {contender.label: contender.style for contender in CONTENDERS}
    curves = {
        label: ([run["evaluations"] for run in runs], [run["distribution"] for run in runs], styles[label])
        for label, runs in results.items()
    }
    save_plot(path, curves, "Samplers on a mixture of Gaussians", "model evaluations", "distance from the data (SW2)")


def main(arguments):
    """Run the benchmark and write results/samplers.json, .md and .svg."""
    parser = argparse.ArgumentParser(prog="benchmarks samplers", description=__doc__)
    parser.add_argument("--samples", type=int, default=16384)
    parser.add_argument("--repeats", type=int, default=1, help="runs of each stochastic solver, with other noise")
    parser.add_argument("--evaluations", type=int, nargs="+", default=list(EVALUATIONS))
    parser.add_argument("--only", default="", help="rows whose label matches this regular expression; others stay")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    arena, host = Arena(options.samples), Host()
    settings = {"samples": options.samples, "repeats": options.repeats, "evaluations": options.evaluations}
    known = read_results(options.out / "samplers.json", settings) if options.only else {"runs": {}, "orders": {}}
    results, orders = {}, {}
    for contender in tqdm(CONTENDERS):
        label = contender.label
        if re.search(options.only, label):
            counts = options.evaluations
            results[label] = [measure(contender, count, arena, host, options.repeats) for count in counts]
        elif label in known["runs"]:
            results[label] = known["runs"][label]
    for label, (sampler, parameters, theory) in ORDERS.items():
        orders[label] = known["orders"].get(label) or (measure_order(sampler, parameters, arena), theory)
    save_results({**settings, "runs": results, "orders": orders}, options.out)


def read_results(path, settings):
    """The numbers of an earlier run. Raises ValueError when it was made with other settings."""
    numbers = json.loads(path.read_text(encoding="utf-8"))
    given = {key: numbers.get(key) for key in settings}
    if given != settings:
        raise ValueError(
            f"The results in {path} do not fit: got {given}, expected {settings}. Run it without --only, or set --out."
        )
    return numbers


def save_results(numbers, folder):
    """Write the numbers, their table and their plot, and log the table."""
    folder.mkdir(parents=True, exist_ok=True)
    text = report(numbers["runs"], numbers["orders"], numbers["evaluations"])
    (folder / "samplers.json").write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")
    (folder / "samplers.md").write_text(text, encoding="utf-8")
    _plot(numbers["runs"], folder / "samplers.svg")
    logger.info("%s", text)
