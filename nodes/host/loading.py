"""PixArt checkpoints and autoencoders from the host's folders, as MODEL and VAE."""

from pathlib import Path

import comfy.sd
import torch
from safetensors import SafetensorError, safe_open

from ...pixart.config import ALPHA_VAE_SCALE, CONFIGS, SIGMA_VAE_SCALE, PixArtConfig
from ...pixart.encoders.autoencoder import LATENT_CHANNELS, TINY_CLASS, tiny_weights
from ...pixart.quoting import list_names, plain, shorten
from ...pixart.stages.records import only_stages, read_stages
from ...pixart.weights.distributed import is_distributed
from ...pixart.weights.folders import read_json
from ...pixart.weights.reading import Checkpoint, read_checkpoint, read_tensors
from ...samplers.from_diffusers import AS_THE_FOLDER_SAYS, read_scheduler
from .denoiser.model import make_patcher
from .folders import find_file, find_folder, find_folders, list_files
from .text.t5 import load_t5
from .weights.packed import count_numbers, describe_packing

CHECKPOINT_KINDS = ("diffusion_models", "checkpoints")
AUTO = "auto"
VARIANTS = (AUTO, *CONFIGS)
WEIGHTS = ("ema", "model")
DTYPES = {
    "default": None,
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp8_e4m3fn": torch.float8_e4m3fn,
    "fp8_e4m3fn_fast": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
}
MODEL_DTYPES = {**DTYPES, "int8": torch.int8}
_SCALE_SLACK = 1e-4
# Words of a file's name that tell an autoencoder's family, where nothing else does.
_SIGMA_VAE_NAMES = ("sdxl", "xl_vae", "xl-vae", "sigma")
_ALPHA_VAE_NAMES = ("ft-ema", "ft_ema", "ft-mse", "ft_mse", "sd-vae", "sd_vae", "sd15", "kl-f8", "taesd")


def list_checkpoints() -> list[str]:
    """What Load PixArt Checkpoint offers: files, and folders by torch.distributed.checkpoint."""
    return [*list_files(CHECKPOINT_KINDS), *find_folders(CHECKPOINT_KINDS, is_distributed)]


def list_pipelines() -> list[str]:
    """What Load PixArt Diffusers offers: folders with a transformer in them, or that are one."""
    return list(find_folders(("diffusers",), _is_pipeline))


def list_vaes() -> list[str]:
    """What Load PixArt VAE offers: files of models/vae, and vae folders of models/diffusers."""
    return [*list_files(("vae",)), *find_folders(("diffusers", "vae"), _is_vae_folder)]


def load_checkpoint(name: str, variant: str, dtype: str, weights: str):
    """The MODEL of one of list_checkpoints.

    variant: of VARIANTS; dtype: of MODEL_DTYPES; weights: of WEIGHTS, or a place.
    """
    if name.endswith("/"):
        return load_patcher(find_folder(CHECKPOINT_KINDS, is_distributed, name), variant, dtype, weights)
    return load_patcher(find_file(CHECKPOINT_KINDS, name), variant, dtype, weights)


def load_pipeline(name: str, variant: str, dtype: str):
    """MODEL, CLIP and VAE of one of list_pipelines; CLIP and VAE are None where the folder has none.

    Raises ValueError when the autoencoder is of the other family.
    """
    path = find_folder(("diffusers",), _is_pipeline, name)
    root = path.parent if path.name == "transformer" else path
    vae_folder, text_folder = root / "vae", root / "text_encoder"
    patcher = load_patcher(path, variant, dtype, WEIGHTS[0])
    config = patcher.model.pixart_config
    if vae_folder.is_dir():
        check_vae(vae_folder, config)
    clip = load_t5(text_folder, _tokenizer_of(root)) if text_folder.is_dir() else None
    return patcher, clip, read_vae(vae_folder, config) if vae_folder.is_dir() else None


def load_vae(name: str, model=None):
    """The VAE of one of list_vaes, and what to know about it, in words. model: a MODEL that it must suit, or None."""
    if name.endswith("/"):
        path = find_folder(("diffusers", "vae"), _is_vae_folder, name)
    else:
        path = find_file(("vae",), name)
    config = None if model is None else getattr(model.model, "pixart_config", None)
    if config is not None:
        check_vae(path, config)
    vae = read_vae(path, config)
    if config is not None or vae.latent_channels == LATENT_CHANNELS:
        return vae, ""
    return vae, f"This VAE has {vae.latent_channels} latent channels; every released PixArt has {LATENT_CHANNELS}."


def load_patcher(path, variant=AUTO, dtype="default", weights=WEIGHTS[0], disable_dynamic=False):
    """The MODEL of a file or folder. Also what the host calls to load the same once more."""
    checkpoint = read_checkpoint(path, weights=weights, packed=MODEL_DTYPES[dtype] is None, **hints_of(variant))
    patcher = make_model(checkpoint, dtype, disable_dynamic)
    patcher.cached_patcher_init = (load_patcher, (path, variant, dtype, weights))
    return patcher


def hints_of(variant: str) -> dict:
    """What a chosen variant, of VARIANTS, says to the reader of a file."""
    return {} if variant == AUTO else {"variant": variant}


def make_model(checkpoint: Checkpoint, dtype: str, disable_dynamic=False):
    """The MODEL of a checkpoint, which is emptied on the way. dtype: of MODEL_DTYPES."""
    state_dict = dict(checkpoint.state_dict)
    checkpoint.state_dict.clear()  # so that each tensor of the file goes when its converted twin comes
    patcher = make_patcher(state_dict, checkpoint.config, MODEL_DTYPES[dtype], dtype.endswith("_fast"), disable_dynamic)
    patcher.model.pixart_stages = only_stages(checkpoint.metadata)
    patcher.model.pixart_source = {
        "file": checkpoint.path.name,
        "detection": checkpoint.detection,
        "places": (checkpoint.place, *checkpoint.others),
        "left": checkpoint.left,
        "remarks": checkpoint.remarks,
        "scheduler": checkpoint.folder.scheduler_config if checkpoint.folder else None,
    }
    return patcher


def read_vae(path: Path, config: PixArtConfig | None = None):
    """A VAE from a file, or from a diffusers folder. config: of the model that it is for, where that is known.

    Raises ValueError naming what is no autoencoder, or one of another number of latent channels than the model's.
    """
    state_dict, metadata = read_tensors(path)
    if config is not None:
        _check_channels(path, state_dict, config.in_channels)
    if path.is_dir() and class_name(path) == TINY_CLASS:
        state_dict = tiny_weights(state_dict)
        state_dict |= {"vae_scale": torch.tensor(_scale_of_tiny(path, config)), "vae_shift": torch.tensor(0.0)}
    try:
        vae = comfy.sd.VAE(sd=state_dict, metadata=metadata or None)
        vae.throw_exception_if_invalid()
    except (RuntimeError, KeyError, ValueError) as error:  # also GroupNorm's of an odd width
        raise ValueError(
            f"Not an autoencoder: got {shorten(path.name)}, expected a VAE of 4 latent channels. Choose the VAE of "
            f"PixArt: sd-vae-ft-ema for alpha, the SDXL VAE for Sigma."
        ) from error
    return vae


def check_vae(path: Path, config: PixArtConfig) -> None:
    """Raises ValueError when a VAE's config.json, metadata or name says that it is of the other PixArt family."""
    found = _scale_of_vae(path)
    if found is None or abs(found[0] - config.vae_scale) < _SCALE_SLACK:
        return
    family, fit = ("Sigma", "the SDXL VAE") if config.is_sigma else ("alpha", "sd-vae-ft-ema (SD 1.5's)")
    raise ValueError(
        f"VAE of another family: got {shorten(path.name)} with latent scale {found[0]:g} (by its {found[1]}), expected "
        f"{config.vae_scale:g}. Choose {fit} for this PixArt-{family} model."
    )


def _scale_of_vae(path: Path) -> tuple[float, str] | None:
    """(latent scale, the sign that shows it), or None."""
    if path.is_dir() and class_name(path) == TINY_CLASS:
        by_name = _scale_by_name(path.absolute().parts[-4:])
        return None if by_name is None else (by_name, "name")
    if path.is_dir():
        scale = read_json(path / "config.json").get("scaling_factor")
        return None if scale is None else (float(scale), "config.json")
    stored = _stored_scale(path)
    if stored is not None:
        return stored, "stored scale"
    by_name = _scale_by_name([path.stem])
    return None if by_name is None else (by_name, "name")


def _check_channels(path: Path, state_dict: dict, expected: int) -> None:
    """Raises ValueError for an autoencoder of other latent channels, before any network of it is made."""
    ends = (".decoder.conv_in.weight", ".taesd_decoder.1.weight", ".decoder.layers.0.weight")
    shapes = [tuple(tensor.shape) for name, tensor in state_dict.items() if f".{name}".endswith(ends)]
    got = next((shape[1] for shape in shapes if len(shape) > 1), expected)
    if got != expected:
        raise ValueError(
            f"VAE of another kind of model: got {got} latent channels in {shorten(path.name)}, expected {expected}. "
            f"Choose the VAE of PixArt: sd-vae-ft-ema for alpha, the SDXL VAE for Sigma."
        )


def _scale_of_tiny(path: Path, config: PixArtConfig | None) -> float:
    """The latent scale of an AutoencoderTiny, whose config.json does not tell the family: by its name, or the model's.

    Raises ValueError where neither says it.
    """
    by_name = _scale_by_name(path.absolute().parts[-4:])
    if by_name is None and config is None:
        raise ValueError(
            f"Family of a tiny autoencoder unknown: got {shorten(path.name)}, which is taesd's or taesdxl's, expected "
            f"a name that says which. Connect the model."
        )
    return by_name or config.vae_scale


def _scale_by_name(names) -> float | None:
    """The scale that words of a file's or of folders' names tell, the innermost first."""
    for name in reversed([name.lower() for name in names]):
        if any(word in name for word in _SIGMA_VAE_NAMES):
            return SIGMA_VAE_SCALE
        if any(word in name for word in _ALPHA_VAE_NAMES):
            return ALPHA_VAE_SCALE
    return None


def _stored_scale(path: Path) -> float | None:
    """The scale that a TAESD file stores beside its weights, None without one."""
    if path.suffix != ".safetensors":
        return None
    try:
        with safe_open(path, framework="pt") as file:
            return float(file.get_tensor("vae_scale")) if "vae_scale" in file.keys() else None  # noqa: SIM118
    except (SafetensorError, OSError):
        return None  # reading the weights will say what is wrong with the file


def remarks_on(model) -> str:
    """What whoever loaded a MODEL should know about its file, in lines of text; "" when there is nothing."""
    source = model.model.pixart_source
    return "\n".join([*source["remarks"], *_scheduler_lines(source["scheduler"])])


def _scheduler_lines(config: dict | None) -> list[str]:
    """What a folder's scheduler asks for, and what of it is done otherwise."""
    if config is None:
        return []
    try:
        asked = read_scheduler(config)
    except ValueError as error:
        return [f"scheduler: {plain(str(error), 300)}"]
    return [f"scheduler: {asked} (PixArt Sampling Preset, '{AS_THE_FOLDER_SAYS}')", *asked.remarks]


def describe_model(model) -> str:
    """What a MODEL is, in lines of text: variant, sizes, layers, dtypes, patches, and the signs that decided it."""
    net = model.model
    config = getattr(net, "pixart_config", None)
    if config is None:
        return f"Not a PixArt of this pack: {type(net).__name__}. Load it with Load PixArt Checkpoint."
    source = getattr(net, "pixart_source", None)
    family, vae = ("Sigma", "SDXL VAE") if config.is_sigma else ("alpha", "sd-vae-ft-ema (SD 1.5)")
    parameters, blocks = count_numbers(net.diffusion_model), describe_packing(net.diffusion_model)
    cast = net.manual_cast_dtype
    in_8_bits = "int8 in the blocks, else " if net.model_config.quant_config else ""
    lines = [
        f"PixArt-{family}, trained at {config.base_px} x {config.base_px} px",
        f"caption: {config.caption_length} tokens of width {config.caption_channels}",
        f"learned null caption: {'yes' if net.has_null_caption else 'no'}",
        f"VAE: {vae}, latent scale {config.vae_scale:g}",
        f"layers: {config.depth}, width {config.hidden_size}, {config.num_heads} heads, "
        f"{parameters / 1e6:.1f} M parameters",
        f"size conditioning: {_yes(config.micro_condition)}, variance: {_yes(config.learn_sigma)}, "
        f"qk norm: {_yes(config.qk_norm)}, key-value compression: {_yes(config.kv_compress_ratio > 1)}",
        f"weights: {in_8_bits}{f'GGUF {blocks}' if blocks else _dtype(net.get_dtype())}"
        + (f", computed in {_dtype(cast)}" if cast else ""),
        f"patched weights (LoRA, merges): {len(model.patches)}",
    ]
    lines += [f"stage: {shorten(line)[1:-1]}" for line in read_stages(getattr(net, "pixart_stages", {}))]
    if source:
        detection = source["detection"]
        lines.insert(0, f"file: {source['file']} ({detection.layout} layout)")
        lines += [f"{field} from: {sign}" for field, sign in _notable(detection.signs)]
        lines += [f"overruled: {conflict}" for conflict in detection.conflicts]
        taken, *others = source["places"]
        lines += [f"taken from the file's: {shorten(taken)}"] * bool(taken)
        lines += [f"also in the file: {list_names(others)}"] * bool(others)
        lines += [f"left out: {list_names(source['left'])}"] * bool(source["left"])
        lines += _scheduler_lines(source["scheduler"])
    return "\n".join(lines)


def _notable(signs: dict[str, str]):
    return [(field, signs[field]) for field in ("family", "base_size", "num_heads") if field in signs]


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _is_pipeline(folder: Path) -> bool:
    inner = folder / "transformer"
    return (inner if inner.is_dir() else folder).joinpath("config.json").is_file() and (
        inner.is_dir() or class_name(folder) in ("Transformer2DModel", "PixArtTransformer2DModel")
    )


def _is_vae_folder(folder: Path) -> bool:
    return class_name(folder).startswith("Autoencoder")


def class_name(folder: Path) -> str:
    """The class that a folder's config.json names, of diffusers or another library; "None" or "" without one."""
    try:
        return str(read_json(folder / "config.json").get("_class_name"))
    except (OSError, ValueError):
        return ""


def _tokenizer_of(root: Path) -> Path | None:
    folder = root / "tokenizer"
    return folder if any((folder / name).is_file() for name in ("spiece.model", "tokenizer.json")) else None
