"""What all solvers share: the checks on their sigmas, one evaluation of the model, and the progress bar."""

import inspect
from dataclasses import dataclass

import torch

from .conventions import AS_IT_IS
from .schedules import sigmas as noise_levels

try:
    from tqdm.auto import trange
except ImportError:  # the solvers need PyTorch alone; a progress bar is a comfort

    def trange(count, disable=None):
        return range(count)


LAST_LEVEL = noise_levels(0.0).item() * (1.0 + 1e-3)  # the noise left at t = 0, and what a host rounds it to


SAME_LEVEL = 1e-6  # the relative rounding of a level in float32, and more
GUIDED_CHANNELS = 3  # of four, where the variance is learned: the original leaves the last to the caption alone


@dataclass(frozen=True)
class Traits:
    """What a solver takes beyond the contract, which its caller has to give.

    draws_noise: a `noise_sampler`. reads_variance: a `variance`, the model's variance channels. scales_noise: a
    `pure_noise`. guided_channels: how many channels the guidance moves, None for all.
    """

    draws_noise: bool
    reads_variance: bool
    scales_noise: bool

    @property
    def guided_channels(self):
        return GUIDED_CHANNELS if self.reads_variance else None


def traits_of(solver):
    """The traits of a `sample_x`, by the names of its parameters."""
    names = inspect.signature(solver).parameters
    return Traits("noise_sampler" in names, "variance" in names, "pure_noise" in names)


def check_sigmas(sigmas):
    """The noise levels as Python floats, once they are known to be usable; a last one that repeats is there once.

    Raises ValueError unless there are at least two, all finite, strictly descending, and none is negative.
    """
    levels = torch.as_tensor(sigmas).tolist()  # waits for the device once a run; Apple's has no float64
    # As Karras' levels end in diffusers, to rounding: nothing is left to step.
    while len(levels) > 2 and abs(levels[-1] - levels[-2]) <= SAME_LEVEL * levels[-2]:
        levels.pop()
    if len(levels) < 2:
        raise ValueError(
            f"Too few sigmas: got {len(levels)}, expected at least 2. Connect a scheduler with 1 step or more."
        )
    for before, after in zip(levels, levels[1:], strict=False):
        if not (float("inf") > before > after >= 0.0):
            raise ValueError(
                f"Sigmas do not descend: got {before:g} followed by {after:g}, expected every sigma to be finite, "
                "below the one before it and not negative. Connect the SIGMAS of a scheduler, unflipped."
            )
    return levels


def steps_to_lower(levels):
    """The steps among which a multistep solver's last ones are of lower order.

    That is all of them, but for a step to sigma 0 from t = 0: it only denoises, and the one before it is the large one
    that the originals end with. Most of ComfyUI's schedules end so.
    """
    count = len(levels) - 1
    only_denoises = levels[-1] == 0.0 and levels[-2] <= LAST_LEVEL
    return max(1, count - only_denoises)


class Denoiser:
    """Evaluates the model at the i-th noise level and calls the callback."""

    def __init__(self, model, levels, extra_args=None, callback=None, conventions=None):
        """conventions: how the model is asked and what of its answer is kept, None as it is."""
        self.model = model
        self.levels = levels
        self.extra_args = {} if extra_args is None else extra_args
        self.callback = callback
        self.conventions = conventions or AS_IT_IS
        self.unlimited = None  # the last answer, before its limits

    def __call__(self, x, i):
        """The denoised latent of x at noise level i. x: (B, C, H, W), variance exploding."""
        sigma = self.levels[i]
        denoised = self.again(x, i)
        if self.callback is not None:
            self.callback({"x": x, "i": i, "sigma": sigma, "sigma_hat": sigma, "denoised": denoised})
        return denoised

    def again(self, x, i):
        """The same without telling the callback, for a second evaluation in a step."""
        self.unlimited = self.conventions.ask(self.model, x, self.levels[i], self.extra_args)
        return self.conventions.limit(self.unlimited)


def steps(levels, disable=None):
    """Iterate over the steps between the noise levels, with a progress bar where there is tqdm.

    disable: hide it; None hides it off a terminal.
    """
    return trange(len(levels) - 1, disable=disable)
