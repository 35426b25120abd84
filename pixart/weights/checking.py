"""A strict check of weights against a configuration, before any model is built."""

from collections.abc import Mapping

from ..config import PixArtConfig
from ..quoting import shorten
from .layouts import NULL_CAPTION_KEY, RECOMPUTED_KEYS

MOST_LATENT = 2**14  # latent pixels of a side, and any other count that a config.json declares
ACTIVATIONS = ("gelu-approximate", "gelu")  # which differ by 0.0005 at the most
FREQUENCY_CHANNELS = 256  # width of the sinusoids that enter the timestep and size embedders


def expected_shapes(config: PixArtConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of a model in the original layout, with its shape; without the position grid.

    Source: PixArt-alpha and PixArt-Sigma, state dicts of diffusion/model/nets/PixArtMS.py.
    """
    width, third = config.hidden_size, config.hidden_size // 3
    inner = int(width * config.mlp_ratio)
    shapes = {"x_embedder.proj": (width, config.in_channels, config.patch_size, config.patch_size)}
    shapes |= {"t_embedder.mlp.0": (width, FREQUENCY_CHANNELS), "t_embedder.mlp.2": (width, width)}
    if config.micro_condition:
        for embedder in ("csize_embedder", "ar_embedder"):
            shapes |= {f"{embedder}.mlp.0": (third, FREQUENCY_CHANNELS), f"{embedder}.mlp.2": (third, third)}
    shapes |= {"t_block.1": (6 * width, width)}
    shapes |= {"y_embedder.y_proj.fc1": (width, config.caption_channels), "y_embedder.y_proj.fc2": (width, width)}
    tables = {NULL_CAPTION_KEY: (config.caption_length, config.caption_channels)}
    norms = {}
    for index in range(config.depth):
        block = f"blocks.{index}"
        tables[f"{block}.scale_shift_table"] = (6, width)
        shapes |= {f"{block}.attn.qkv": (3 * width, width), f"{block}.attn.proj": (width, width)}
        shapes |= {f"{block}.cross_attn.{part}": (width, width) for part in ("q_linear", "proj")}
        shapes |= {f"{block}.cross_attn.kv_linear": (2 * width, width)}
        shapes |= {f"{block}.mlp.fc1": (inner, width), f"{block}.mlp.fc2": (width, inner)}
        if config.qk_norm:
            norms |= {f"{block}.attn.{part}": (width,) for part in ("q_norm", "k_norm")}
        if config.kv_compress_ratio > 1 and index in config.kv_compress_layers:
            shapes[f"{block}.attn.sr"] = (width, 1, config.kv_compress_ratio, config.kv_compress_ratio)
            norms[f"{block}.attn.norm"] = (width,)
    tables["final_layer.scale_shift_table"] = (2, width)
    shapes["final_layer.linear"] = (config.patch_size**2 * config.out_channels, width)
    weights = {f"{name}.weight": shape for name, shape in (shapes | norms).items()}
    biases = {f"{name}.bias": shape[:1] for name, shape in (shapes | norms).items()}
    return weights | biases | tables


def check_declared(facts: Mapping, model_config: Mapping | None) -> None:
    """Raises ValueError where the numbers of a diffusers config.json are not those of the weights.

    facts: fields of PixArtConfig as the weights' shapes tell them.
    """
    declared = model_config or {}
    heads, width = declared.get("num_attention_heads"), declared.get("attention_head_dim")
    pairs = {
        "num_layers": (declared.get("num_layers"), facts["depth"]),
        "in_channels": (declared.get("in_channels"), facts["in_channels"]),
        "patch_size": (declared.get("patch_size"), facts["patch_size"]),
        "caption_channels": (declared.get("caption_channels"), facts["caption_channels"]),
        "sample_size": (declared.get("sample_size"), None),
    }
    if heads is not None and width is not None:
        known = all(type(each) is int and 0 < each <= MOST_LATENT for each in (heads, width))
        pairs["num_attention_heads * attention_head_dim"] = (heads * width if known else heads, facts["hidden_size"])
    if declared.get("activation_fn") not in (None, *ACTIVATIONS):
        raise ValueError(
            f"Another activation: got activation_fn {shorten(declared['activation_fn'])}, expected 'gelu-approximate'. "
            f"Choose a PixArt checkpoint."
        )
    for name, (value, fact) in pairs.items():
        fits = type(value) is int and (value == fact if fact is not None else 0 < value <= MOST_LATENT)
        if value is not None and not fits:
            expected = fact if fact is not None else f"a latent's side of at most {MOST_LATENT}"
            raise ValueError(
                f"Weights and their config.json disagree: got {name} {shorten(value)}, expected {expected}. Choose "
                f"files of one download."
            )


def check_weights(state_dict: Mapping, config: PixArtConfig) -> None:
    """Check original-layout weights against a configuration, before any model is built.

    Only the position grid and the learned null caption may be missing.
    Raises ValueError naming the tensor that is missing, unknown, of another shape, or not of a floating type.
    """
    expected = expected_shapes(config)
    unknown = [name for name in state_dict if name not in expected and name not in RECOMPUTED_KEYS]
    missing = [name for name in expected if name not in state_dict and name != NULL_CAPTION_KEY]
    for problem, names in (("missing", missing), ("unknown", unknown)):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise ValueError(
                f"Weights are {problem}: got {len(state_dict)} tensors, {problem} {shorten(names[0])}{more}, expected "
                f"exactly the {len(expected)} of a PixArt of {config.depth} layers. Download the complete PixArt "
                f"checkpoint."
            )
    for name, shape in expected.items():
        tensor = state_dict.get(name)
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(
                f"Wrong shape of {shorten(name)}: got {tuple(tensor.shape)}, expected {shape}. Choose a PixArt "
                f"checkpoint, or correct the overridden settings."
            )
        if tensor is not None and not tensor.dtype.is_floating_point:
            raise ValueError(
                f"Wrong type of {shorten(name)}: got {tensor.dtype}, expected a floating type. Choose a checkpoint in "
                f"fp32, fp16, bf16 or fp8."
            )
