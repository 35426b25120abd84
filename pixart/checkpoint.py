"""What a checkpoint is: its layout, its configuration, and a strict check of its weights. Dict in, dict out.

`layouts.py` holds the names, `wrappers.py` finds the weights, `detection.py` knows the signs; `reading.py` reads the
files and `saving.py` writes them.
"""

from .weights.checking import check_weights, expected_shapes
from .weights.control_layouts import control_to_diffusers, control_to_original, split_controlnet
from .weights.detection import Detection, config_to_tensor, detect_config, explain_detection
from .weights.layouts import CONFIG_KEY, NULL_CAPTION_KEY, parts_to_merge
from .weights.wrappers import detect_layout, to_diffusers, to_original, unwrap

__all__ = [
    "CONFIG_KEY",
    "NULL_CAPTION_KEY",
    "Detection",
    "check_weights",
    "config_to_tensor",
    "control_to_diffusers",
    "control_to_original",
    "detect_config",
    "detect_layout",
    "expected_shapes",
    "explain_detection",
    "parts_to_merge",
    "split_controlnet",
    "to_diffusers",
    "to_original",
    "unwrap",
]
