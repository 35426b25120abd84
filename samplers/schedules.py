"""When to evaluate the model: sequences of timesteps, and the noise levels they stand for.

Time is PixArt's discrete time made continuous: t in [0, 999], log alpha linear between integers, as DPM-Solver reads a
discrete schedule (arXiv 2206.00927, appendix D.4). It goes on to t = -1, where the picture is clean (sigma 0), so that
`sigmas` and `timesteps_from_sigmas` are exact inverses on [-1, 999]. Everything is float64 on the CPU.
"""

import functools
import logging
import math
import reprlib

import torch

NUM_TIMESTEPS = 1000
LAST_TIMESTEP = float(NUM_TIMESTEPS - 1)
CLEAN_TIMESTEP = -1.0
BETA_START, BETA_END = 1e-4, 2e-2
LCM_ORIGIN_STEPS = 50
DMD_TIMESTEP = 400.0


def make_betas(steps=NUM_TIMESTEPS):
    """The linear schedule of variances that PixArt is trained with: (steps,) float64."""
    return torch.linspace(BETA_START, BETA_END, steps, dtype=torch.float64)


# log alpha-bar at t = -1, 0, ..., 999: non-increasing from 0
_LOG_ALPHA_BAR = torch.cat([torch.zeros(1, dtype=torch.float64), torch.log1p(-make_betas()).cumsum(0)])


def log_alpha_bar(timesteps):
    """Log of the signal's share of the variance at each time. timesteps: any shape, clamped to [-1, 999]. float64."""
    position = torch.as_tensor(timesteps, dtype=torch.float64).cpu().clamp(CLEAN_TIMESTEP, LAST_TIMESTEP) + 1.0
    low = position.floor().long().clamp(max=NUM_TIMESTEPS - 1)
    return torch.lerp(_LOG_ALPHA_BAR[low], _LOG_ALPHA_BAR[low + 1], position - low)


def sigmas(timesteps):
    """Variance-exploding noise levels, sqrt((1 - alpha_bar) / alpha_bar), of the given times.

    timesteps: any shape, clamped to [-1, 999]; -1 gives exactly 0. Returns float64 on the CPU, the same shape.
    """
    return torch.expm1(log_alpha_bar(timesteps).abs()).sqrt()


def timesteps_from_sigmas(noise_levels):
    """The times of the given noise levels: the inverse of `sigmas`.

    noise_levels: any shape, >= 0; a level above that of t = 999 gives 999, and 0 gives -1. Returns float64 on the CPU.
    """
    return timesteps_where_sigmas_are(torch.as_tensor(noise_levels, dtype=torch.float64).cpu())


def timesteps_where_sigmas_are(noise_levels):
    """`timesteps_from_sigmas` of a tensor on its own device, without waiting for it; on MPS in float32."""
    table = _rising_table(noise_levels.device)
    target = torch.log1p(noise_levels.to(table.dtype).square()).contiguous()
    high = torch.searchsorted(table, target).clamp(1, NUM_TIMESTEPS)
    below, above = torch.take(table, high - 1), torch.take(table, high)  # an index would be a number to wait for
    return (high - 2 + (target - below) / (above - below)).clamp(CLEAN_TIMESTEP, LAST_TIMESTEP)


@functools.cache
def _rising_table(device):
    return -_LOG_ALPHA_BAR.to(device=device, dtype=torch.float32 if device.type == "mps" else torch.float64)


def uniform(steps, denoise=1.0):
    """Equal steps of time down to t = 0: what the original DPM-Solver++ and SA-Solver scripts use. steps + 1 values."""
    return torch.linspace(_first_timestep(steps, denoise), 0.0, steps + 1, dtype=torch.float64)


def quadratic(steps, denoise=1.0):
    """Equal steps of the square root of time, finer towards the picture. steps + 1 values.

    Source: arXiv 2206.00927, "time_quadratic"; its time is (t + 1) / 1000.
    """
    first = _first_timestep(steps, denoise) + 1.0
    return torch.linspace(math.sqrt(first), 1.0, steps + 1, dtype=torch.float64).square().sub(1.0).clamp(min=0.0)


def log_snr(steps, denoise=1.0):
    """Equal steps of the log signal-to-noise ratio. steps + 1 values. Source: arXiv 2206.00927, "logSNR"."""
    first, last = sigmas([_first_timestep(steps, denoise), 0.0]).log().tolist()
    return _descend(torch.linspace(first, last, steps + 1, dtype=torch.float64).exp())


def karras(steps, denoise=1.0, rho=7.0):
    """Equal steps of sigma^(1/rho). steps + 1 values. Source: arXiv 2206.00364, equation 5."""
    first, last = sigmas([_first_timestep(steps, denoise), 0.0]).pow(1.0 / rho).tolist()
    return _descend(torch.linspace(first, last, steps + 1, dtype=torch.float64).pow(rho))


def kl_optimal(steps, denoise=1.0):
    """Equal steps of the angle arctan(sigma). steps + 1 values. Source: arXiv 2404.14507, "KL-optimal" schedule."""
    first, last = sigmas([_first_timestep(steps, denoise), 0.0]).atan().tolist()
    return _descend(torch.linspace(first, last, steps + 1, dtype=torch.float64).tan())


def linspace(steps, denoise=1.0):
    """Equal steps of time rounded to integers, down to 0, as diffusers' schedulers space them. steps + 1 values.

    A thousand steps are each time once, and the last twice.
    """
    if steps == NUM_TIMESTEPS and denoise == 1.0:
        return torch.arange(NUM_TIMESTEPS, dtype=torch.float64).flip(0)[[*range(NUM_TIMESTEPS), -1]]
    return _distinct(uniform(steps, denoise).round(), "linspace", steps)


def trailing(steps, denoise=1.0):
    """Integer times counted down from the end by 1000 / steps, then 0, as diffusers' "trailing". steps + 1 values.

    A thousand steps are each time once, and the last twice.
    """
    end = _first_timestep(steps, denoise) + 1.0
    counted = end - torch.arange(steps, dtype=torch.float64) * (end / steps)
    times = _distinct(counted.round() - 1.0, "trailing", steps)
    return torch.cat([times, times.new_zeros(1)])


def iddpm(steps, denoise=1.0):
    """IDDPM's respacing: integers strided evenly from 0 to the first time. steps values, the last of them 0.

    The running sum is rounded, as in the original. Source: arXiv 2102.09672, section 4.
    """
    first = round(_first_timestep(steps, denoise))
    stride = first / (steps - 1) if steps > 1 else 1.0
    position, times = 0.0, []
    for _ in range(steps):
        times.append(float(round(position)))
        position += stride
    if steps == 1:
        times = [float(first)]
    return _distinct(torch.tensor(times[::-1], dtype=torch.float64), "iddpm", steps)


def ddim(steps, denoise=1.0):
    """DDIM's respacing "ddimN": the smallest integer stride that gives N times. steps values, the last of them 0."""
    span = round(_first_timestep(steps, denoise)) + 1
    for stride in range(1, span):
        if len(range(0, span, stride)) == steps:
            return torch.arange(0, span, stride, dtype=torch.float64).flip(0)
    raise ValueError(
        f"No integer stride gives this many DDIM steps: got {steps}, expected a count such as 10, 20, 25, 50 or 100. "
        "Choose another step count, or the iddpm schedule."
    )


def lcm(steps, denoise=1.0):
    """The official LCM grid: every (50 // steps)-th of the 50 distilled times, from the top. steps values.

    4 steps: 999, 759, 519, 279. Source: arXiv 2310.04378 and PixArt-delta, arXiv 2401.05252.
    """
    grid = _lcm_grid(steps, denoise)
    return grid[:: len(grid) // steps][:steps]


def lcm_diffusers(steps, denoise=1.0):
    """The LCM grid of the diffusers pipelines: indices floor(i * 50 / steps). 4 steps: 999, 759, 499, 259."""
    grid = _lcm_grid(steps, denoise)
    return grid[torch.arange(steps) * len(grid) // steps]


def dmd(steps=1, denoise=1.0):
    """The one time, t = 400, that PixArt-DMD was distilled for. One value. Source: arXiv 2311.18828."""
    if steps != 1:
        raise ValueError(f"DMD takes a single step: got {steps}, expected 1. Set the steps to 1.")
    return torch.tensor([min(DMD_TIMESTEP, _first_timestep(steps, denoise))], dtype=torch.float64)


SCHEDULES = {
    "uniform": uniform,
    "log_snr": log_snr,
    "quadratic": quadratic,
    "karras": karras,
    "kl_optimal": kl_optimal,
    "linspace": linspace,
    "trailing": trailing,
    "iddpm": iddpm,
    "ddim": ddim,
    "lcm": lcm,
    "lcm_diffusers": lcm_diffusers,
    "dmd": dmd,
}

# Lists of times to evaluate at, rather than of points to pass: after the last one the picture is clean.
ENDS_CLEAN = frozenset({"iddpm", "ddim", "lcm", "lcm_diffusers", "dmd"})


def schedule_sigmas(name, steps, denoise=1.0, end_clean=None):
    """The sigmas a sampler takes for `steps` evaluations of the model: steps + 1 values, float64.

    name: a key of SCHEDULES. denoise: the part of the time axis to run, (0, 1]; below 1 for image-to-image.
    end_clean: whether to end at sigma 0; None does as the original does (True for the lists in ENDS_CLEAN; the others
        end at t = 0, sigma 0.01). With True, a schedule that passes through t = 0 goes to sigma 0 instead.
    """
    if name not in SCHEDULES:
        known = ", ".join(SCHEDULES)
        raise ValueError(f"Unknown schedule: got {reprlib.repr(name)}, expected one of {known}. Choose one of these.")
    levels = sigmas(SCHEDULES[name](steps, denoise=denoise))
    clean = levels.new_zeros(1)
    if name in ENDS_CLEAN:
        if end_clean is False:
            logging.warning("PixArt schedule %s always ends at a clean picture; end_clean=False is ignored.", name)
        return torch.cat([levels, clean])
    return torch.cat([levels[:-1], clean]) if end_clean else levels


def _first_timestep(steps, denoise):
    """The time a run starts from. Raises ValueError for a step count or a denoise strength out of range."""
    if steps < 1:
        raise ValueError(f"Too few steps: got {steps}, expected at least 1. Raise the steps.")
    if not 0.0 < denoise <= 1.0:
        raise ValueError(f"Denoise is out of range: got {denoise}, expected more than 0 and at most 1. Set it to 1.")
    return LAST_TIMESTEP * denoise


def _descend(levels):
    """Times of descending noise levels, the first and last free of rounding: both lie on integer table entries."""
    return timesteps_from_sigmas(levels).clamp(min=0.0)


def _distinct(times, name, steps):
    """The times, once they are known to differ from each other."""
    if len(times.unique()) != len(times):
        raise ValueError(
            f"Too many steps for the {name} schedule: got {steps}, expected at most one per integer timestep "
            f"from {int(times[0])} down. Lower the steps or raise denoise."
        )
    return times


def _lcm_grid(steps, denoise):
    """The distilled times, descending, of the first `denoise` part of the time axis."""
    _first_timestep(steps, denoise)
    available = int(LCM_ORIGIN_STEPS * denoise)
    if steps > available:
        raise ValueError(
            f"Too many LCM steps: got {steps}, expected at most {available} at denoise {denoise}. "
            "Lower the steps (1 to 8 is usual) or raise denoise."
        )
    stride = NUM_TIMESTEPS // LCM_ORIGIN_STEPS
    return torch.arange(1, available + 1, dtype=torch.float64).mul(stride).sub(1.0).flip(0)
