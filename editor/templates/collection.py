"""All workflows by their names: the files below `workflows/`."""

from .control import CONTROL
from .pictures import PICTURES
from .training import TRAINING

WORKFLOWS = {**PICTURES, **CONTROL, **TRAINING}
