"""Finds the PixArt in all that a file or dict holds, wherever it lies: below any wrapper, under any prefix.

Everything is laid flat under dotted names first, so that a wrapper and a prefix are the same: each tensor whose name
ends in one that every PixArt has once shows where a model begins. What lies beside it is left out, and named.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from ..quoting import list_names, shorten
from .layouts import (
    CONTROL,
    CONTROLNET,
    DIFFUSERS,
    EXTRA_KEYS,
    NULL_CAPTION_KEY,
    ORIGINAL,
    Weights,
    advice,
    describe,
    diffusers_tensors,
    layout_of,
    original_tensors,
)
from .opcodes import Foreign
from .quantised.forms import WEIGHT_ENDINGS

EMA, MODEL = "ema", "model"  # the choices of weights beside the name of a place
_MOST_DEPTH = 8  # of containers; deeper nesting is no checkpoint
_FEWEST_NAMELESS = 30  # tensors of a list that can be a model's
# The end of a name that shows a whole PixArt, and that of control blocks; what is before it is the place.
_MODEL_SIGN = re.compile(rf"(.*\.|)(?:t_block\.1|adaln_single\.linear){WEIGHT_ENDINGS}")
_BLOCK_SIGN = re.compile(
    rf"(|.*?\.)(?:blocks\.\d+\.attn\.qkv|transformer_blocks\.\d+\.attn1\.to_(?:q|qkv)){WEIGHT_ENDINGS}"
)
_CONTROL_SIGN = re.compile(
    r"(|.*?\.)(?:controlnet\.)?(?:\d+\.copied_block\..+|controlnet_blocks\.\d+\.transformer_block\..+"
    r"|(?:controlnet_blocks\.)?\d+\.(?:before|after)_proj\.(?:weight|bias))"
)
_BASE_PREFIXES = ("base_model.", "transformer.")  # of the model beside control blocks
# What torch puts into the middle of names where it wraps a module.
_INFIX = re.compile(r"(?:(?<=\.)|^)(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
# Words of a place. An optimizer's averages bear the names of weights, too, and are none.
_OPTIMIZER = {"optimizer", "optimizers", "optim", "moments", "avg_sq", "exp_avg"}
_AVERAGED = {"ema", "shadow", "averaged", "average", "swa", "target"}
_SECOND = {"teacher", "critic", "fake", "real", "discriminator", "guidance", "reference", "ref", "score", "pretrained"}


@dataclass(frozen=True)
class _Found:
    """A model in a file. place: the dotted names of what it lies in. tensors: as in Weights."""

    place: str
    tensors: dict
    is_averaged: bool


def detect_layout(state_dict: Mapping) -> str:
    """What kind of weights these are, wrapped or not, by their names alone: see `layouts.layout_of`."""
    return identify(state_dict).layout


def unwrap(state_dict: Mapping, weights: str = EMA) -> dict:
    """The weights of a training checkpoint alone: the tensors that `identify` finds, under their plain names."""
    return identify(state_dict, weights).tensors


def to_original(state_dict: Mapping) -> dict:
    """Rename to the original layout, merging q, k, v; wrapped, prefixed and original dicts are taken as well.

    The position grid is left out, since it is recomputed. A missing `y_embedder.y_embedding` stays missing.
    Raises ValueError naming every unknown key and every missing part of a merged tensor.
    Source: diffusers, convert_pixart_alpha_to_diffusers.py, read backwards.
    """
    return original_tensors(identify_pixart(state_dict))


def to_diffusers(state_dict: Mapping, *, keep_null_caption: bool = False) -> dict:
    """Rename to the diffusers layout, cutting qkv and kv by rows (views of the same memory).

    keep_null_caption: also carries the learned null caption, as `caption_projection.y_embedding`. With it
    `to_original` gives back everything; without it the names are exactly those of diffusers' own class.
    Raises ValueError naming every unknown key and every tensor whose rows cannot be cut.
    Source: diffusers, convert_pixart_alpha_to_diffusers.py.
    """
    return diffusers_tensors(identify_pixart(state_dict), keep_null_caption=keep_null_caption)


def identify_pixart(content: object, weights: str = EMA, metadata: Mapping[str, str] | None = None) -> Weights:
    """As `identify`, of a PixArt model: ORIGINAL or DIFFUSERS. Raises ValueError saying what the weights are else."""
    found = identify(content, weights, metadata)
    if found.layout not in (ORIGINAL, DIFFUSERS):
        raise ValueError(
            f"Not a PixArt model: got {describe(found.layout)}, expected PixArt weights. {advice(found.layout)}"
        )
    return found


def identify(
    content: object, weights: str = EMA, metadata: Mapping[str, str] | None = None, *, control: bool = False
) -> Weights:
    """Take the weights out of all that a file or dict holds, and tell what they are.

    weights: "ema" prefers averaged weights where there are both, "model" takes the trained ones; the name of a place,
    as an error or `Weights.place` gives it, takes what lies there. The learned null caption always comes from the
    trained weights: averaging skips buffers, so the averaged one is an untrained tensor. control: where there are
    models and ControlNets apart, take a ControlNet.
    A ControlNet file keeps its `base_model.` and `controlnet.` prefixes; `control_layouts.part_controlnet` parts them.
    Raises ValueError when there is nothing like a state dict, not the chosen weights, or no telling which to take.
    """
    named, nameless = _lay_flat(content)
    models = _find_models(named)
    models += [model for model in (_name_list(*each, models) for each in nameless.items()) if model]
    if not models:
        _require_known(weights, [])
        _require_tensors(named, nameless, content)
        return Weights(named, layout_of(named), metadata or {})
    chosen = _choose(models, weights, control)
    tensors = dict(chosen.tensors)
    trained = [model for model in models if not model.is_averaged]
    if chosen.is_averaged and len(trained) == 1:
        for key in (NULL_CAPTION_KEY, f"base_model.{NULL_CAPTION_KEY}"):
            if key in trained[0].tensors and key in tensors:
                tensors[key] = trained[0].tensors[key]
    others = tuple(_shown(model.place) for model in models if model is not chosen)
    left = tuple(_left_over(named, models, chosen.place))
    return Weights(tensors, layout_of(tensors), metadata or {}, _shown(chosen.place), others, left)


def _lay_flat(content: object) -> tuple[dict[str, object], dict[str, list]]:
    """(dotted name -> tensor, dotted name -> list of tensors without names) of all that a file holds."""
    named, nameless = {}, {}
    for name, value in _walk(content, "", _MOST_DEPTH):
        plain = _INFIX.sub("", name)
        if isinstance(value, list):
            nameless[plain] = value
        elif plain in named:
            raise ValueError(
                f"Two tensors of one name: got {shorten(plain)} in two wrappers, expected it once. Save the weights "
                f"alone, as one state dict."
            )
        else:
            named[plain] = value
    return named, nameless


def _walk(value: object, name: str, depth: int) -> Iterator[tuple[str, object]]:
    """(dotted name, tensor or list of tensors) of everything in containers."""
    start = f"{name}." if name else ""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if isinstance(key, str) and hasattr(inner, "shape"):
                yield f"{start}{key}", inner
            elif isinstance(inner, Mapping | list | tuple) and isinstance(key, str | int | float) and depth:
                yield from _walk(inner, f"{start}{key}", depth - 1)
    elif type(value) in (list, tuple) and value:
        if len(value) >= _FEWEST_NAMELESS and all(hasattr(item, "shape") for item in value):
            yield name, list(value)
        elif len(value) < _FEWEST_NAMELESS and depth:
            for number, inner in enumerate(value):
                if isinstance(inner, Mapping):
                    yield from _walk(inner, f"{start}{number}", depth - 1)


def _find_models(named: Mapping[str, object]) -> list[_Found]:
    """Every PixArt and every ControlNet under these names; of a ControlNet with its base, the two as one."""
    signs = (_places(_MODEL_SIGN, named), _places(_BLOCK_SIGN, named))
    places = next(filter(None, signs), {})  # where the first is missing the weights are damaged, and still PixArt's
    controls = _places(_CONTROL_SIGN, named)
    bases = {place + base for place in controls for base in _BASE_PREFIXES}
    places = {place: None for place in places if place not in bases}
    places = [place for place in {**places, **controls} if not _words(place) & _OPTIMIZER]
    found: dict[str, dict] = {place: {} for place in places}
    lengths = sorted({len(place) for place in places}, reverse=True)  # the innermost first
    for name, tensor in named.items():
        place = next((name[:length] for length in lengths if name[:length] in found), None)
        if place is not None:
            found[place][name[len(place) :]] = tensor
    models = []
    for place, tensors in found.items():
        averaged = bool(_words(place) & _AVERAGED) or f"{place.removesuffix('module.')}n_averaged" in named
        models.append(_Found(place, tensors, averaged))
    return models


def _places(sign: re.Pattern, named: Mapping[str, object]) -> dict[str, None]:
    """What is before the names that a sign fits, in the order of the file."""
    return dict.fromkeys(match[1] for match in map(sign.fullmatch, named) if match)


def _name_list(place: str, tensors: list, models: list[_Found]) -> _Found | None:
    """The model of a list of weights in parameter order: by a model with names beside it, else in diffusers' order."""
    shapes = [tuple(tensor.shape) for tensor in tensors]
    if _words(place) & _OPTIMIZER:
        return None
    for model in models:
        names = [name for name in model.tensors if name not in (*EXTRA_KEYS, NULL_CAPTION_KEY)]
        if [tuple(model.tensors[name].shape) for name in names] == shapes:
            break
    else:
        names = _diffusers_order(len(tensors))
        if len(shapes[0]) != 2 or not names:  # where the table of the last layer comes first
            return None
    return _Found(f"{place}.", dict(zip(names, tensors, strict=True)), bool(_words(place) & _AVERAGED))


def _diffusers_order(count: int) -> list[str]:
    """The names of a PixArtTransformer2DModel's parameters in its own order, by their number; empty for none."""
    linears = ("adaln_single.emb.timestep_embedder", "adaln_single.emb.resolution_embedder")
    linears = {15: linears[:1], 23: (*linears, "adaln_single.emb.aspect_ratio_embedder")}.get((count - 15) % 21 + 15)
    if linears is None:
        return []
    both = ("weight", "bias")
    parts = [f"{attention}.{part}" for attention in ("attn1", "attn2") for part in ("to_q", "to_k", "to_v", "to_out.0")]
    block = [
        "scale_shift_table",
        *(f"{part}.{kind}" for part in (*parts, "ff.net.0.proj", "ff.net.2") for kind in both),
    ]
    tail = ["proj_out", *(f"{each}.linear_{number}" for each in linears for number in (1, 2)), "adaln_single.linear"]
    tail += [f"caption_projection.linear_{number}" for number in (1, 2)]
    depth = (count - 3 - 2 * len(tail)) // len(block)
    return [
        "scale_shift_table",
        *(f"pos_embed.proj.{kind}" for kind in both),
        *(f"transformer_blocks.{index}.{name}" for index in range(depth) for name in block),
        *(f"{name}.{kind}" for name in tail for kind in both),
    ]


def _choose(models: list[_Found], weights: str, control: bool) -> _Found:
    """The model that is asked for. Raises ValueError where that leaves several, naming their places."""
    _require_known(weights, models)
    named = [model for model in models if _shown(model.place) == weights]
    if named:
        return named[0]
    trained = [model for model in models if not model.is_averaged]
    if weights == MODEL and not trained:
        raise ValueError(
            "No trained weights in this checkpoint: got averaged (EMA) weights only, expected 'state_dict'. "
            "Choose the EMA weights."
        )
    averaged = [model for model in models if model.is_averaged]
    left = averaged if averaged and weights == EMA else trained
    first = [model for model in left if not _words(model.place) & _SECOND] or left
    whole = [model for model in first if (layout_of(model.tensors) in (CONTROL, CONTROLNET)) == control] or first
    different = [model for model in whole if not _same(model.tensors, whole[0].tensors)]
    if different:
        raise ValueError(
            f"Several models in this file: got them at {list_names([_shown(model.place) for model in whole])}, "
            f"expected one. Name the one to take (`place` of the loader, `--weights` of a command)."
        )
    return whole[0]


def _require_known(weights: str, models: list[_Found]) -> None:
    places = [_shown(model.place) for model in models]
    if weights not in (EMA, MODEL, *places):
        raise ValueError(
            f"Unknown choice of weights: got {shorten(weights)}, expected 'ema', 'model'"
            f"{f' or one of {list_names(places)}' if any(places) else ''}. Choose one of them."
        )


def _same(left: Mapping, right: Mapping) -> bool:
    """Whether two models are the same tensors of a file, or of memory."""
    return left.keys() == right.keys() and all(
        left[name] is right[name] or (isinstance(left[name], tuple) and left[name] == right[name]) for name in left
    )


def _left_over(named: Mapping[str, object], models: list[_Found], taken: str) -> Iterator[str]:
    """What lies beside the models, but for optimizers and single numbers: the first of its names, and how much."""
    places = tuple(model.place for model in models)
    start = taken[: taken.rstrip(".").rfind(".") + 1]  # its neighbours in the wrapper are kept apart
    beside = Counter(
        name.removeprefix(start).partition(".")[0]
        for name, tensor in named.items()
        if not name.startswith(places) and not _words(name) & _OPTIMIZER and tuple(tensor.shape) not in ((), (1,))
    )
    for name, count in beside.most_common(8):
        yield f"{shorten(name)[1:-1]} ({count} tensors)"


def _require_tensors(named: Mapping, nameless: Mapping[str, list], content: object) -> None:
    """Raises ValueError when there are no tensors with names, saying what there is instead."""
    if named:
        return
    values = content.values() if isinstance(content, Mapping) else [content]
    remedy = "Choose a checkpoint that was saved as a state dict."
    kind = "no tensors" if isinstance(content, Mapping) else f"a {type(content).__name__} object"
    if nameless:
        place, tensors = next(iter(nameless.items()))
        kind = f"a list of {len(tensors)} weights without names at {shorten(place)}"
        remedy = "Put them into the model where it was trained (EMAModel.copy_to), and save its state_dict()."
    elif any(isinstance(value, Foreign) for value in values):
        kind = "a whole pickled object, which only running its code would open"
        remedy = "Load it where it was made, and save it again with torch.save(model.state_dict(), path)."
    raise ValueError(f"No weights in this file: got {kind}, expected a dict of tensors. {remedy}")


def _words(place: str) -> set[str]:
    """The words that names are made of, and pairs of them."""
    words = re.split(r"[^a-z0-9]+", place.lower())
    return {*words, *(f"{one}_{two}" for one, two in zip(words, words[1:], strict=False))}


def _shown(place: str) -> str:
    return place.removesuffix(".")
