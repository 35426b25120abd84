"""What is minimised: noise prediction, ControlNet, and distillations. One small class each.

An objective is a module: its forward takes a Batch and its Draws and gives the loss to minimise and, beside it,
numbers to report. Its parameters that require gradients are what is trained.
"""

from .base import Loss, Objective, huber, replace_captions, timestep_weights
from .consistency import AdapterDistillation, Distillation, FullDistillation
from .matching import DistributionMatching
from .prediction import ControlPrediction, NoisePrediction, PreservingPrediction

__all__ = [
    "AdapterDistillation",
    "ControlPrediction",
    "Distillation",
    "DistributionMatching",
    "FullDistillation",
    "Loss",
    "NoisePrediction",
    "Objective",
    "PreservingPrediction",
    "huber",
    "replace_captions",
    "timestep_weights",
]
