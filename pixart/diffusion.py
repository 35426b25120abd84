"""The diffusion that PixArt is trained with: noise schedule, noising, and the training losses.

Source: DDPM, arXiv 2006.11239; learned range of variances: Improved DDPM, arXiv 2102.09672.
"""

import math

import torch
from torch import Tensor

from .solvers import NUM_TIMESTEPS, make_betas

TRAIN_STEPS = NUM_TIMESTEPS
LAST_START_TIMESTEP = 249  # of the "snr_loss"
_LOWEST_PROBABILITY = 1e-12


def alphas_cumprod(betas: Tensor | None = None) -> Tensor:
    """Cumulative products of 1 - beta: (steps,) float64."""
    return (1 - (make_betas() if betas is None else betas)).cumprod(0)


def respaced_betas(kept: Tensor, betas: Tensor | None = None) -> Tensor:
    """The betas of a schedule with the timesteps `kept` (ascending, integer) alone: (len(kept),) float64."""
    cumulative = alphas_cumprod(betas)[kept]
    return 1 - cumulative / torch.cat([cumulative.new_ones(1), cumulative[:-1]])


def _rows(table: Tensor, timestep: Tensor, like: Tensor) -> Tensor:
    """table[timestep] in like's dtype, shaped (B, 1, 1, 1) to broadcast over it."""
    values = table.to(timestep.device)[timestep].to(like.dtype)
    return values.reshape(-1, *[1] * (like.ndim - 1))


class Diffusion:
    """Tables over the timesteps, float64, and what follows from them.

    betas: (T,); default PixArt's thousand linear ones. For a respaced schedule see `respaced_betas`.
    timesteps passed to the methods are (B,) integer indices into these tables.
    """

    def __init__(self, betas: Tensor | None = None):
        self.betas = make_betas() if betas is None else betas.double()
        self.alphas_cumprod = alphas_cumprod(self.betas)
        previous = torch.cat([self.betas.new_ones(1), self.alphas_cumprod[:-1]])
        variance = self.betas * (1 - previous) / (1 - self.alphas_cumprod)
        self.mean_start = self.betas * previous.sqrt() / (1 - self.alphas_cumprod)
        self.mean_noisy = (1 - previous) * (1 - self.betas).sqrt() / (1 - self.alphas_cumprod)
        # The first variance is zero; its log takes the second's place.
        self.posterior_log_variance = torch.cat([variance[1:2], variance[1:]]).log()

    def to(self, device: torch.device | str) -> "Diffusion":
        """Move the tables to where the latents are, once instead of in every call; float32 where float64 is unknown."""
        dtype = torch.float32 if torch.device(device).type == "mps" else torch.float64
        for name, table in vars(self).items():
            setattr(self, name, table.to(device, dtype))
        return self

    def q_sample(self, start: Tensor, timestep: Tensor, noise: Tensor) -> Tensor:
        """Noise clean latents (B, C, H, W) to their timesteps."""
        kept = _rows(self.alphas_cumprod, timestep, start)
        return kept.sqrt() * start + (1 - kept).sqrt() * noise

    def predict_start(self, noisy: Tensor, timestep: Tensor, noise: Tensor) -> Tensor:
        """The clean latent that the predicted noise implies."""
        scale = _rows((1 / self.alphas_cumprod).sqrt(), timestep, noisy)
        return scale * noisy - _rows((1 / self.alphas_cumprod - 1).sqrt(), timestep, noisy) * noise

    def posterior(self, start: Tensor, noisy: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance of q(x_{t-1} | x_t, x_0)."""
        mean = _rows(self.mean_start, timestep, noisy) * start + _rows(self.mean_noisy, timestep, noisy) * noisy
        return mean, _rows(self.posterior_log_variance, timestep, noisy).expand_as(mean)

    def model_posterior(self, noisy: Tensor, timestep: Tensor, noise: Tensor, variance: Tensor):
        """Mean and log variance of p(x_{t-1} | x_t) from predicted noise and variance channels (each (B, C, H, W)).

        variance: -1 gives the posterior's variance, 1 gives beta, in between interpolates their logs.
        """
        mean, low = self.posterior(self.predict_start(noisy, timestep, noise), noisy, timestep)
        high = _rows(self.betas.log(), timestep, noisy)
        share = (variance + 1) / 2
        return mean, share * high + (1 - share) * low

    def vlb_terms(
        self,
        start: Tensor,
        noisy: Tensor,
        timestep: Tensor,
        noise: Tensor,
        variance: Tensor,
        region: Tensor | None = None,
    ) -> Tensor:
        """One term of the variational bound per sample, in bits per dimension: (B,). region: see training_losses."""
        true_mean, true_log_variance = self.posterior(start, noisy, timestep)
        mean, log_variance = self.model_posterior(noisy, timestep, noise, variance)
        divergence = normal_kl(true_mean, true_log_variance, mean, log_variance)
        likelihood = -discretized_log_likelihood(start, mean, 0.5 * log_variance)
        divergence, likelihood = (mean_over(x, region) / math.log(2) for x in (divergence, likelihood))
        return torch.where(timestep == 0, likelihood, divergence)

    def training_losses(
        self,
        prediction: Tensor,
        start: Tensor,
        noisy: Tensor,
        timestep: Tensor,
        noise: Tensor,
        *,
        snr: bool = False,
        region: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """PixArt's loss per sample: {"loss", "mse"} and, when the prediction has variance channels, {"vb"}.

        prediction: (B, C or 2C, H, W). The bound sees the predicted noise detached: it trains the variance alone.
        snr: the original's "snr_loss", which at timesteps up to 249 compares clean latents in place of noises.
        region: (B, 1, H, W) factors of the places of a picture, or None for 1 everywhere.
        """
        channels = start.shape[1]
        predicted = prediction[:, :channels]
        error = noise - predicted
        if snr:
            low = (timestep <= LAST_START_TIMESTEP).reshape(-1, *[1] * (start.ndim - 1))
            error = torch.where(low, start - self.predict_start(noisy, timestep, predicted), error)
        mse = mean_over(error.square(), region)
        if prediction.shape[1] == channels:
            return {"loss": mse, "mse": mse}
        bound = self.vlb_terms(start, noisy, timestep, predicted.detach(), prediction[:, channels:], region)
        return {"loss": mse + bound, "mse": mse, "vb": bound}


def mean_over(x: Tensor, region: Tensor | None = None) -> Tensor:
    """The mean of each sample, (B,). region: (B, 1, H, W) factors of its places, or None for 1 everywhere."""
    return (x if region is None else x * region).flatten(1).mean(1)


def normal_kl(mean1: Tensor, log_variance1: Tensor, mean2: Tensor, log_variance2: Tensor) -> Tensor:
    """KL divergence of two diagonal Gaussians, elementwise, in nats."""
    ratio = (log_variance1 - log_variance2).exp()
    return 0.5 * (log_variance2 - log_variance1 + ratio - 1 + (mean1 - mean2).square() * (-log_variance2).exp())


def _normal_cdf(x: Tensor) -> Tensor:
    """The original's tanh approximation, kept for equal numbers."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def discretized_log_likelihood(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """Log probability of x under a Gaussian cut into bins of width 2/255 over [-1, 1], elementwise, in nats."""
    centred, inverse = x - mean, (-log_scale).exp()
    upper = _normal_cdf(inverse * (centred + 1 / 255))
    lower = _normal_cdf(inverse * (centred - 1 / 255))
    probability = torch.where(x < -0.999, upper, torch.where(x > 0.999, 1 - lower, upper - lower))
    return probability.clamp(min=_LOWEST_PROBABILITY).log()
