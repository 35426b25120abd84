"""Noise for the stochastic solvers, drawn sample by sample so that it does not depend on the batch."""

import hashlib
import reprlib

import torch

NOISE_DEVICES = ("cpu", "gpu")
_MASK = (1 << 64) - 1


class SampleNoise:
    """Standard normal noise, each sample of the batch from a generator of its own."""

    def __init__(self, x, seeds, device="cpu"):
        """x: (B, ...) gives shape, dtype and device. seeds: B integers. device: "cpu" or "gpu" (that of x)."""
        if device not in NOISE_DEVICES:
            raise ValueError(f"Unknown noise device: got {reprlib.repr(device)}, expected cpu or gpu. Choose cpu.")
        self.like = x
        self.device = x.device if device == "gpu" else torch.device("cpu")
        self.generators = [torch.Generator(self.device).manual_seed(scramble(seed)) for seed in seeds]

    def __call__(self, sigma, sigma_next):
        """Noise for the step between two noise levels, of x's shape. Drawn in float32 whatever x's dtype is."""
        shape = self.like.shape[1:]
        drawn = [torch.randn(shape, generator=g, device=self.device, dtype=torch.float32) for g in self.generators]
        # Without waiting for what the GPU has yet to do; it has read memory that is not pinned when this returns.
        return torch.stack(drawn).to(self.like, non_blocking=self.like.is_cuda)


def batch_seeds(seed, count):
    """A seed for each sample: sample i of a batch with seed s has what a batch of one with seed s + i has.

    seed: int, or None for a random one.
    """
    seed = torch.randint(0, 1 << 62, ()).item() if seed is None else seed
    return [seed + i for i in range(count)]


def noise_seeds(initial):
    """A seed for each sample from its initial noise (B, ...), so that the seed follows the sample into any batch."""
    return [_fingerprint(sample) for sample in initial.float().cpu()]


def _fingerprint(tensor):
    """64 bits that depend on every bit of a float32 tensor on the CPU."""
    return int.from_bytes(hashlib.blake2b(tensor.contiguous().numpy().tobytes(), digest_size=8).digest(), "little")


def scramble(seed):
    """A seed far from its neighbours: the SplitMix64 mixing function, cut to 63 bits.

    So a step's noise is never the initial noise that a host draws from the same seed.
    """
    z = (seed + 0x9E3779B97F4A7C15) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return (z ^ (z >> 31)) >> 1


def noise_source(x, noise_sampler=None, extra_args=None, device="cpu"):
    """The caller's noise_sampler(sigma, sigma_next), or noise per sample from the "seed" in the extra arguments."""
    if noise_sampler is not None:
        return noise_sampler
    return SampleNoise(x, batch_seeds((extra_args or {}).get("seed"), x.shape[0]), device)
