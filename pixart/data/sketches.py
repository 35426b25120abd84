"""Sketches of models: some numbers of each weight, by which a training knows its base again in any precision."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..config import PixArtConfig
from ..files.atomic import write_atomically
from ..files.documents import parse_json
from ..quoting import list_names, shorten
from ..transformer import PixArt
from ..weights.layouts import NULL_CAPTION_KEY
from ..weights.reading import read_tensors

_SKETCHED = 16  # numbers of each tensor: enough that another training or a merge of it shows
# How far the same weights may lie apart when one of them was rounded to half precision, and after a merge elsewhere.
_ROUNDING, _EXACT = {"torch.bfloat16": 2**-8, "torch.float16": 2**-10}, 1e-5
_LEAST = 1e-6  # below it fp16 has no more digits


def sketch_weights(config: PixArtConfig, weights: Iterable[tuple[str, Tensor]]) -> dict:
    """What a model is known by: its configuration, and some numbers of each weight, in fp32 with the dtype they had."""
    fields = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(config).items()}
    sketched = {}
    for name, tensor in weights:
        flat = tensor.detach().reshape(-1)
        some = flat[:: max(1, flat.numel() // _SKETCHED)]
        sketched[name] = [str(tensor.dtype), some.to("cpu", torch.float32, copy=True)]
    return {"config": fields, "weights": sketched}


def sketch_model(model: PixArt) -> dict:
    """The sketch of a model, without a null caption that it has not learned."""
    names = model.state_dict().items()
    return sketch_weights(
        model.config, ((name, tensor) for name, tensor in names if name != NULL_CAPTION_KEY or model.has_null_caption)
    )


def differences(then: Mapping, now: Mapping) -> list[str]:
    """How the sketch `now` differs from `then`, in a few words each; not at all for one model in two dtypes."""
    old, new = then["config"], now["config"]
    names = sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))
    found = [f"{name} {shorten(new.get(name))} instead of {shorten(old.get(name))}" for name in names]
    old, new = then["weights"], now["weights"]
    wrong = sorted(name for name in old.keys() | new.keys() if not _is_same(old.get(name), new.get(name)))
    return [*found, f"other numbers in {list_names(wrong, 2)} ({len(wrong)} weights)"] if wrong else found


def _is_same(then: list | None, now: list | None) -> bool:
    if then is None or now is None or then[1].shape != now[1].shape:
        return False
    slack = max(_ROUNDING.get(dtype, _EXACT) for dtype in (then[0], now[0]))
    return bool(torch.isclose(then[1], now[1], rtol=slack, atol=_LEAST, equal_nan=True).all())


def write_sketch(path: Path, sketch: Mapping) -> None:
    """Keep a sketch in a safetensors file."""
    dtypes = {name: dtype for name, (dtype, _) in sketch["weights"].items()}
    texts = {"config": json.dumps(sketch["config"]), "dtypes": json.dumps(dtypes)}
    tensors = {name: numbers for name, (_, numbers) in sketch["weights"].items()}
    write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata=texts))


def read_sketch(path: Path) -> dict:
    """The sketch of write_sketch. Raises FileNotFoundError, and ValueError for another file."""
    tensors, texts = read_tensors(path)
    try:
        dtypes = parse_json(texts["dtypes"])
        weights = {name: [dtypes[name], numbers] for name, numbers in tensors.items()}
        return {"config": dict(parse_json(texts["config"])), "weights": weights}
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"Not a sketch of a model: got {shorten(path.name)}, expected the file that Export PixArt Training Config "
            f"writes beside its configuration. Export it again."
        ) from error
