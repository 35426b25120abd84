"""A tiny T5 v1.1 encoder with random weights, and its files in every layout that is published."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import T5Config, T5EncoderModel

VOCAB_SIZE = 32128
SIZES = {"d_model": 24, "d_ff": 56, "d_kv": 8, "num_heads": 4, "num_layers": 3}


def make_t5(vocab_size: int = VOCAB_SIZE, seed: int = 0, **sizes: int) -> T5EncoderModel:
    """transformers' encoder, float32, with weights large enough that every path counts."""
    torch.manual_seed(seed)
    config = T5Config(**{**SIZES, **sizes}, vocab_size=vocab_size, feed_forward_proj="gated-gelu", dropout_rate=0.0)
    model = T5EncoderModel(config).eval()
    for name, weight in model.named_parameters():
        if weight.ndim == 2:
            deviation = 1.0 if name.startswith("shared") or "bias" in name else weight.shape[1] ** -0.5
            torch.nn.init.normal_(weight, std=deviation)
        else:
            torch.nn.init.uniform_(weight, 0.5, 1.5)
    return model


def weights_of(model: T5EncoderModel) -> dict[str, torch.Tensor]:
    """Its state dict with the embedding once, as the single files in use have it."""
    return {key: value.clone() for key, value in model.state_dict().items() if key != "encoder.embed_tokens.weight"}


def read_config(model: T5EncoderModel) -> str:
    return json.dumps(model.config.to_dict())


def write_shards(folder: Path, weights: dict, suffix: str, count: int = 3) -> None:
    """Shards and their index, named as transformers does."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = "model" if suffix == ".safetensors" else "pytorch_model"
    weight_map = {}
    for number in range(count):
        name = f"{stem}-{number + 1:05d}-of-{count:05d}{suffix}"
        shard = {key: weights[key] for key in list(weights)[number::count]}
        weight_map |= dict.fromkeys(shard, name)
        save_file(shard, folder / name) if suffix == ".safetensors" else torch.save(shard, folder / name)
    (folder / f"{stem}{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def with_decoder(weights: dict) -> dict:
    """The keys of a whole T5: the embedding under all its names, and a decoder."""
    encoder = {key: value for key, value in weights.items() if key.startswith("encoder.")}
    decoder = {key.replace("encoder.", "decoder.", 1): value.clone() for key, value in encoder.items()}
    shared = {"encoder.embed_tokens.weight": weights["shared.weight"].clone(), "lm_head.weight": torch.zeros(4, 4)}
    return {**weights, **decoder, **shared}


def scale_to_fp8(weights: dict) -> tuple[dict, dict]:
    """(scaled fp8 as the files for ComfyUI have it, the same weights as they are read back)."""
    scaled, read_back = {"scaled_fp8": torch.empty(2, dtype=torch.float8_e4m3fn)}, {}
    for key, weight in weights.items():
        linear = "SelfAttention" in key and "bias" not in key or "DenseReluDense" in key
        if not linear:
            scaled[key] = read_back[key] = weight
            continue
        scale = (weight.abs().max() / 448.0).float()
        scaled[key] = (weight / scale).to(torch.float8_e4m3fn)
        scaled[key.replace(".weight", ".scale_weight")] = scale
        read_back[key] = scaled[key].float() * scale
    return scaled, read_back
