"""A denoiser that is known exactly: data from a mixture of Gaussians."""

import torch

from ..samplers.schedules import timesteps_from_sigmas


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

    def project(self, directions):
        """The marginals along unit directions, each a mixture in one dimension: means (P, K) and scales (K,)."""
        return directions @ self.means.T, self.scales

    def quantiles(self, directions, count):
        """Quantiles of the data along each direction, at the middles of count equal shares. (P, count) float64."""
        means, scales = self.project(directions)
        shares = (torch.arange(count, dtype=torch.float64) + 0.5) / count
        reach = 10.0 * scales.max() + means.abs().max()
        low, high = -reach.expand(len(directions), count), reach.expand(len(directions), count)
        for _ in range(48):
            middle = 0.5 * (low + high)
            below = sum(
                w * torch.special.ndtr((middle - m[:, None]) / s)
                for w, m, s in zip(self.log_weights.exp(), means.T, scales, strict=True)
            )
            low, high = torch.where(below < shares, middle, low), torch.where(below < shares, high, middle)
        return 0.5 * (low + high)
