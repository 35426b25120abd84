"""PixArt's noise levels as the host's model sampling."""

import comfy.model_sampling
import torch
from comfy.patcher_extension import WrappersMP

from ....pixart.quoting import shorten
from .words import FLOW_FIELDS, flow_field

LEAST_TOP_TIME = 100.0  # of 1000: what the highest noise level must reach for PixArt to know it for noise


def share_row(sigma, options: dict, model_options: dict):
    """The noise levels (B,) of an evaluation, as one number that `expand` repeats where all are known to be that.

    That is of a single picture, whose prompts are evaluated together, and where nobody may have changed a row of them.
    Nothing is compared: to look would be to wait for the device.
    options: the host's transformer options.
    """
    given, wrappers = options.get("sigmas"), options.get("wrappers", {})
    changed = "model_function_wrapper" in model_options or wrappers.get(WrappersMP.APPLY_MODEL)
    if given is None or changed or not (len(given) == 1 or shares_row(given)):
        return sigma
    return sigma[:1].expand_as(sigma)


def shares_row(values) -> bool:
    """Whether there are several rows, and known to be alike since they share one's memory."""
    return values.ndim > 0 and len(values) > 1 and values.stride(0) == 0


def check_noise_levels(sampling) -> None:
    """Raises ValueError where a node put another model's noise levels in place of PixArt's.

    PixArt predicts noise, and takes times of 0 to 999: those of flow models mix noise otherwise, and EDM's and
    Stable Cascade's times end near 1.
    """
    if isinstance(sampling, PixArtSampling):
        return
    flows = isinstance(sampling, comfy.model_sampling.CONST)
    if not flows and float(sampling.timestep(torch.as_tensor(sampling.sigma_max))) >= LEAST_TOP_TIME:
        return
    kind = "a flow model" if flows else shorten(type(sampling).__bases__[0].__name__)
    raise ValueError(
        f"Noise levels of another model: got those of {kind}, expected times of 0 to 999 with added noise. Remove the "
        f"ModelSampling node of that model; ModelSamplingDiscrete suits PixArt (lcm for LCM)."
    )


class PixArtSampling(comfy.model_sampling.ModelSamplingDiscrete, comfy.model_sampling.EPS):
    """The host's discrete noise schedule with fractional times, as the original's solvers have them.

    The host rounds a noise level to the nearest of 1000 times; here log alpha is linear between them.
    Source: DPM-Solver, arXiv 2206.00927, appendix D.4.
    """

    def __getattr__(self, name):
        if name in FLOW_FIELDS:
            raise flow_field(name)
        return super().__getattr__(name)

    def set_sigmas(self, sigmas):
        """Sets the noise level of each integer time."""
        super().set_sigmas(sigmas)
        self.register_buffer("log_variance", torch.log1p(self.sigmas.double().square()), persistent=False)

    def _table(self, device):
        if self.log_variance.device != device:  # moved once: a copy in every step would be one too many
            self.log_variance = self.log_variance.to(
                device=device, dtype=torch.float32 if device.type == "mps" else torch.float64
            )
        return self.log_variance

    def timestep(self, sigma):
        """Noise levels -> times in [0, 999], any shape. Rows that share their memory do so afterwards, too."""
        if shares_row(sigma):
            return self.timestep(sigma[:1]).expand_as(sigma)
        table = self._table(sigma.device)
        target = torch.log1p(sigma.to(table.dtype).square()).contiguous()
        high = torch.searchsorted(table, target).clamp(1, len(table) - 1)
        low = high - 1
        fraction = (target - table[low]) / (table[high] - table[low])
        return (low + fraction).clamp(0, len(table) - 1).to(torch.float32)

    def sigma(self, timestep):
        """Times in [0, 999] -> noise levels, any shape."""
        table = self._table(timestep.device)
        time = timestep.to(table.dtype).clamp(0, len(table) - 1)
        low = time.floor().long().clamp(max=len(table) - 2)
        return torch.expm1(torch.lerp(table[low], table[low + 1], time - low)).sqrt().to(torch.float32)
