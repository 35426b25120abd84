"""PixArt as one of the host's own models: weights, attention, conditions, noise levels and solvers."""
