"""LoRAs onto a MODEL as patches of the host, out of files and into files."""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import comfy.lora
import comfy.model_management
import comfy.utils
import torch
from comfy.weight_adapter import LoHaAdapter, LoKrAdapter, LoRAAdapter, WeightAdapterBase

from ...pixart.checkpoint import NULL_CAPTION_KEY, expected_shapes
from ...pixart.lora import PEFT_CONFIG, Target, describe_lora, export_notes, read_lora, save_lora
from ...pixart.lora.extracting import extract_lora as extract_factors
from ...pixart.lora.kinds import Difference, Factor, Hadamard, LowRank
from ...pixart.quoting import list_names, shorten
from ...pixart.weights.saving import DTYPES
from .denoiser.model import TABLES
from .folders import find_file, find_folder, find_folders, list_files, next_output, show_path
from .text.captions import pixart_config

KINDS = ("loras",)
SAVED_DTYPES = {"as it is": None, **{name: DTYPES[name] for name in ("fp32", "fp16", "bf16")}}
PREFIX = "diffusion_model."


class FactorAdapter(WeightAdapterBase):
    """A change that depends on the weight it is made to, DoRA among them, as a patch of the host.

    The host's own DoRA divides by the length of the weight's rows without the change in them; DoRA, and PEFT's files
    with it, mean the rows with it (arXiv 2402.09353, equation 5).
    """

    name = "pixart_factor"

    def __init__(self, loaded_keys, weights):
        """weights: (the change, *its tensors), which the host may have moved elsewhere."""
        self.loaded_keys = loaded_keys
        self.weights = weights

    @classmethod
    def of(cls, factor: Factor) -> "FactorAdapter":
        """The patch that makes a change."""
        return cls(set(), (factor, *factor.tensors.values()))

    def calculate_weight(
        self,
        weight,
        key,
        strength,
        strength_model,
        offset,
        function,
        intermediate_dtype=torch.float32,
        original_weight=None,
    ):
        """Adds the change to `weight` in place, which may be some rows of a larger one."""
        factor, *tensors = self.weights
        moved = [comfy.model_management.cast_to_device(each, weight.device, each.dtype) for each in tensors]
        factor = replace(factor, **dict(zip(factor.tensors, moved, strict=True)))
        exact = weight.float()
        weight += function((factor.apply(exact, strength) - exact).to(weight.dtype))
        return weight


def list_loras() -> list[str]:
    """What Load PixArt LoRA offers: files of models/loras and output/loras, and PEFT folders there."""
    return [*find_folders(KINDS, _is_peft), *list_files(KINDS)]


def load_lora(model, name: str, strength: float, alpha: float = 0.0, strict: bool = False):
    """(MODEL with one of list_loras on it, what the LoRA is in lines of text). The given MODEL stays as it is.

    alpha: in place of the file's, 0 takes the file's. strict: refuse a file that fits only in part.
    Raises ValueError when the model is no PixArt, or the LoRA is not for it.
    """
    lora = read_lora(find_lora(name), pixart_config(model), alpha or None, strict)
    return add_lora(model, lora.factors, strength), f"file: {name}, strength {strength:g}\n{describe_lora(lora)}"


def add_lora(model, factors: Mapping[Target, Factor], strength: float = 1.0):
    """A clone of the MODEL with a LoRA's changes as patches; with a strength of 0, without."""
    clone = model.clone()
    if not strength:
        return clone
    shapes, patches, bases = expected_shapes(pixart_config(model)), {}, {}
    for target, factor in factors.items():
        if factor.needs is not None:
            bases = bases or model.get_key_patches(PREFIX)
            factor = factor.bound(_unpatched(bases, factor.needs))
        rows = target.rows(shapes[target.name][0])
        key = host_key(target.name)
        place = key if target.parts == 1 else (key, (0, rows.start, rows.stop - rows.start))
        patches[place] = _to_patch(factor)
    missing = patches.keys() - set(clone.add_patches(patches, strength))
    if missing:
        raise ValueError(
            f"LoRA does not fit: got changes of {list_names(missing)}, expected weights of this model. "
            f"Choose a LoRA that was trained on this PixArt model."
        )
    return clone


def convert_lora(name: str, layout: str, prefix: str, dtype: str) -> str:
    """Write one of list_loras under the names of another program. layout: of LAYOUTS; dtype: of SAVED_DTYPES.

    prefix: see `folders.next_output`. Returns where it is and what it holds, in lines of text.
    """
    lora = read_lora(find_lora(name))
    path = _save(lora.factors, layout, prefix, dtype, {**lora.metadata, "pixart_converted_from": name})
    lines = [
        f"saved: {show_path(path)}",
        describe_lora(lora),
        *(f"note: {each}" for each in export_notes(lora, layout)),
    ]
    return "\n".join(lines)


def extract_lora(model, base, rank: int, energy: float, keep_small: bool, prefix: str, dtype: str):
    """Write the LoRA that turns `base` into `model`, with progress. Returns (base with that LoRA on it, text).

    rank, energy, keep_small: see `lora_extraction.extract_lora`. prefix: see `folders.next_output`.
    Raises ValueError for models of different shapes, or the same one.
    """
    next_output(prefix)  # a bad name shows before minutes of work
    config, names = pixart_config(base), _shared_names(model, base)
    models = model.get_key_patches(PREFIX), base.get_key_patches(PREFIX)

    def read(name: str) -> tuple[torch.Tensor, torch.Tensor]:
        tuned, plain = (patched_weight(patches, host_key(name), base.load_device) for patches in models)
        return tuned, plain

    factors, share = extract_factors(names, read, rank, energy, keep_small, _reporter(len(names)))
    texts = {"pixart_extracted": f"rank {rank}, energy {energy:g}", "pixart_depth": str(config.depth)}
    path = _save(factors, "host", prefix, dtype, texts)
    whole = sum(isinstance(factor, Difference) for factor in factors.values())
    ranks = Counter(factor.rank for factor in factors.values() if factor.rank)
    spread = f"{min(ranks)} to {max(ranks)}" if len(ranks) > 1 else "".join(map(str, ranks)) or "none"
    text = (
        f"saved: {show_path(path)}\nrank: {spread}, on {ranks.total()} weights\nbiases and tables, whole: {whole}\n"
        f"of the difference's energy: {share:.2%}"
    )
    return add_lora(base, factors), text


def _save(factors: Mapping[Target, Factor], layout: str, prefix: str, dtype: str, texts: dict[str, str]) -> Path:
    path = next_output(prefix, "" if layout == "peft" else ".safetensors")
    save_lora(path, factors, layout=layout, metadata=texts, dtype=SAVED_DTYPES[dtype])
    return path


def find_lora(name: str) -> Path:
    """The file or folder of one of list_loras."""
    return find_folder(KINDS, _is_peft, name) if name.endswith("/") else find_file(KINDS, name)


def _is_peft(folder: Path) -> bool:
    return (folder / PEFT_CONFIG).is_file()


def host_key(name: str) -> str:
    """A parameter's name in the host's model, from its original one."""
    return f"{PREFIX}{name}{'.weight' if name.endswith(TABLES) else ''}"


def _to_patch(factor: Factor):
    """A change as the host's patch: its own adapter where it has one that means the same."""
    if isinstance(factor, Difference):
        return ("diff", (factor.values,))
    if factor.is_relative:
        return FactorAdapter.of(factor)
    alpha = factor.scale * factor.rank if factor.rank else factor.alpha
    if isinstance(factor, LowRank):
        return LoRAAdapter(set(), (factor.up, factor.down, alpha, factor.mid, None, None))
    if isinstance(factor, Hadamard):
        weights = (factor.w1_a, factor.w1_b, alpha, factor.w2_a, factor.w2_b, factor.t1, factor.t2, None)
        return LoHaAdapter(set(), weights)
    halves = (factor.w1_a, factor.w1_b, factor.w2_a, factor.w2_b)
    return LoKrAdapter(set(), (factor.w1, factor.w2, alpha, *halves, factor.t2, None))


def _shared_names(model, base) -> list[str]:
    """The parameters of both. Raises ValueError when the two are not of one shape."""
    tuned, plain = (expected_shapes(pixart_config(each)) for each in (model, base))
    nulls = NULL_CAPTION_KEY
    if not (model.model.has_null_caption and base.model.has_null_caption):
        tuned.pop(nulls), plain.pop(nulls)
    other = next((name for name in {**tuned, **plain} if tuned.get(name) != plain.get(name)), None)
    if other is not None:
        raise ValueError(
            f"Models of different shapes: got {tuned.get(other)} and {plain.get(other)} for {shorten(other)}, expected "
            f"the same. Connect a fine-tuned model and the base that it was made from."
        )
    return list(tuned)


def patched_weight(patches: Mapping[str, list], key: str, device: torch.device) -> torch.Tensor:
    """A weight as the MODEL runs with it, LoRAs and merges in it, in float32."""
    (weight, convert), *changes = patches[key]
    exact = comfy.model_management.cast_to_device(weight, device, torch.float32, copy=True)
    return comfy.lora.calculate_weight(changes, convert(exact, inplace=True), key)


def _unpatched(patches: Mapping[str, list], target: Target) -> torch.Tensor:
    """Rows of a weight of the MODEL without what is on it, in float32 on the CPU; of GGUF's blocks, their numbers.

    Raises ValueError for a weight whose numbers only its own loader can read.
    """
    key = host_key(target.name)
    stored, convert = patches[key][0]
    if not convert(stored).is_floating_point():
        raise ValueError(
            f"LoRA that is made of its base's weights: got {str(stored.dtype).removeprefix('torch.')} numbers for "
            f"{shorten(target.name)}, expected floating ones. Load the PixArt model unquantised."
        )
    weight = patched_weight({key: patches[key][:1]}, key, torch.device("cpu"))
    return weight[target.rows(weight.shape[0])]


def _reporter(total: int) -> Callable[[int, int], None]:
    """Shows progress, and raises when the user interrupts."""
    bar = comfy.utils.ProgressBar(total)

    def report(done: int, _total: int) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        bar.update_absolute(done, total)

    return report
