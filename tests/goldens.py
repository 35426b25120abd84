"""Reads the reference cases: numbers computed with the original implementations (see tests/goldens/README.md)."""

import json
from pathlib import Path

from safetensors.torch import load_file

FOLDER = Path(__file__).parent / "goldens"


def load_golden(name):
    """The description and the tensors of one case: (dict, {tensor name: tensor})."""
    case = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    path = FOLDER / f"{name}.safetensors"
    return case, load_file(path) if path.exists() else {}


def take(tensors, prefix):
    """The tensors whose name starts with `prefix.`, without it."""
    return {name[len(prefix) + 1 :]: tensor for name, tensor in tensors.items() if name.startswith(prefix + ".")}
