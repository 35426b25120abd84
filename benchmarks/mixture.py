"""A denoiser that is known exactly: data from a mixture of Gaussians."""

import numpy as np
import torch

from ..samplers.schedules import timesteps_from_sigmas

QUANTILE_GRID = 8192


class GaussianMixture:
    """Latents x0 ~ sum_k w_k N(mean_k, s_k^2 I), flattened; noising them leaves a mixture, so all is closed form.

    Calling it is the samplers' model(x, sigma): the denoised latent, or with guidance above 1 its extrapolation.
    """

    def __init__(self, means, scales, log_weights, condition=None, guidance=1.0):
        """means: (K, D). scales: (K,). log_weights: (K,), unnormalised. condition: (B, K) log weights per sample."""
        self.means, self.scales = means.double(), scales.double()
        self.log_weights = torch.log_softmax(log_weights.double(), -1)
        self.condition = None if condition is None else torch.log_softmax(condition.double(), -1)
        self.guidance = guidance
        self.evaluations = []

    def __call__(self, x, sigma, **extra_args):
        """The denoised latent. x: (B, ...), variance exploding. sigma: (B,), all equal."""
        level = sigma[0].double()
        self.evaluations.append(timesteps_from_sigmas(level).item())
        scaled = x / (1.0 + sigma[0] ** 2).sqrt()
        noise = self.noise(scaled, level, self.log_weights if self.condition is None else self.condition)
        if self.guidance != 1.0:
            unguided = self.noise(scaled, level, self.log_weights)
            noise = unguided + self.guidance * (noise - unguided)
        return x - sigma[0] * noise

    def noise(self, x, sigma, log_weights):
        """The noise in x, variance preserving: computed in float64, returned in x's dtype."""
        share = 1.0 / (1.0 + sigma**2)
        amplitude, deviation = share.sqrt(), (1.0 - share).sqrt()
        variances = share * self.scales**2 + deviation**2
        flat = x.double().flatten(1)
        centres = amplitude * self.means
        distances = torch.cdist(flat, centres, compute_mode="donot_use_mm_for_euclid_dist").square()
        dimensions = flat.shape[1]
        logits = log_weights - 0.5 * dimensions * variances.log() - 0.5 * distances / variances
        shares = torch.softmax(logits, -1) / variances
        residual = shares.sum(-1, keepdim=True) * flat - shares @ centres
        return (deviation * residual).view_as(x).to(x.dtype)

    def quantiles(self, directions, count):
        """Quantiles of the data along unit directions, at the middles of count equal shares: (P, count) float64."""
        means = directions @ self.means.T
        reach = means.abs().max() + 8.0 * self.scales.max()
        grid = torch.linspace(-reach, reach, QUANTILE_GRID, dtype=torch.float64)
        below = sum(
            weight * torch.special.ndtr((grid - mean[:, None]) / scale)
            for weight, mean, scale in zip(self.log_weights.exp(), means.T, self.scales, strict=True)
        )
        shares = (np.arange(count) + 0.5) / count
        return torch.from_numpy(np.stack([np.interp(shares, row, grid.numpy()) for row in below.numpy()]))
