"""T5 encoders as transformers, bitsandbytes, optimum-quanto, torchao, compressed-tensors and llama.cpp keep them."""

import functools
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import T5Config, T5EncoderModel

from ...pixart.weights.quantised.gguf_file import llama_name
from ...pixart.weights.quantised.gguf_saving import T5, t5_fields, write_gguf
from ...pixart.weights.quantised.packed import expand_all
from ...pixart.weights.t5 import read_encoder
from . import Found, Row
from .comparing import compare, plain_state

SIZES = {"d_model": 64, "d_ff": 128, "d_kv": 16, "num_heads": 4, "num_layers": 2, "vocab_size": 64}


@functools.cache
def base() -> T5EncoderModel:
    torch.manual_seed(0)
    return T5EncoderModel(T5Config(**SIZES, feed_forward_proj="gated-gelu")).eval()


def copy() -> T5EncoderModel:
    model = T5EncoderModel(base().config).eval()
    model.load_state_dict(base().state_dict())
    return model


def weights() -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in base().state_dict().items() if "embed_tokens" not in name}


def measure(path: Path, peer: dict) -> Found:
    found, _ = read_encoder(path, torch.float32)
    packed = expand_all(read_encoder(path, torch.float32, packed=True)[0])
    if any(not torch.equal(packed[name], tensor) for name, tensor in found.items()):
        raise AssertionError(f"{path.name} is another model where it stays packed")
    return compare(found, peer, weights())


def _from_pretrained(folder: Path, config) -> T5EncoderModel:
    base().save_pretrained(folder / "base")
    return T5EncoderModel.from_pretrained(folder / "base", quantization_config=config, device_map="cpu")


def _bitsandbytes(**fields) -> tuple:
    def make(folder: Path) -> Path:
        from transformers import BitsAndBytesConfig

        _from_pretrained(folder, BitsAndBytesConfig(**fields)).save_pretrained(folder / "quantised")
        return folder / "quantised"

    def compare_to_peer(path: Path) -> Found:
        return measure(path, plain_state(T5EncoderModel.from_pretrained(path, device_map="cpu").dequantize()))

    return make, compare_to_peer


def _quanto(kind: str) -> tuple:
    peers = {}

    def make(folder: Path) -> Path:
        from optimum import quanto

        model = copy()
        quanto.quantize(model, weights=getattr(quanto, kind))
        quanto.freeze(model)
        peers[folder] = plain_state(model)
        state = {name: tensor.contiguous() for name, tensor in model.state_dict().items() if "embed_tokens" not in name}
        save_file(state, folder / "model.safetensors")
        return folder / "model.safetensors"

    return make, lambda path: measure(path, peers[path.parent])


def _torchao(folder: Path, model=None) -> T5EncoderModel:
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    return _from_pretrained(folder, TorchAoConfig(Int8WeightOnlyConfig()))


def make_torchao(folder: Path) -> Path:
    _torchao(folder).save_pretrained(folder / "quantised")
    return folder / "quantised"


def measure_torchao(path: Path) -> Found:
    return measure(path, plain_state(T5EncoderModel.from_pretrained(path, device_map="cpu")))


def make_torchao_pickle(folder: Path) -> Path:
    torch.save(_torchao(folder).state_dict(), folder / "t5.bin")
    return folder / "t5.bin"


def make_cast(folder: Path) -> Path:
    cast = {name: tensor.to(torch.int8) if tensor.ndim == 2 else tensor for name, tensor in weights().items()}
    save_file(cast, folder / "int8.safetensors")
    return folder / "int8.safetensors"


def _gguf(kind: str) -> tuple:
    def make(folder: Path) -> Path:
        write_gguf(folder / "t5.gguf", weights(), T5, kind, numbers=t5_fields(SIZES))
        return folder / "t5.gguf"

    def compare_to_peer(path: Path) -> Found:
        import gguf

        theirs = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
        pairs = {name: theirs[llama_name(name)] for name in weights()}
        return measure(
            path,
            {name: torch.from_numpy(gguf.quants.dequantize(t.data, t.tensor_type)) for name, t in pairs.items()},
        )

    return make, compare_to_peer


def _compressed(bits: int, kind: str, strategy: str, symmetric: bool, form: str) -> tuple:
    peers = {}

    def make(folder: Path) -> Path:
        from compressed_tensors.compressors import ModelCompressor
        from compressed_tensors.quantization import (
            QuantizationArgs,
            QuantizationConfig,
            QuantizationScheme,
            apply_quantization_config,
        )
        from compressed_tensors.quantization.utils import calculate_qparams

        model, group = copy(), 32 if strategy == "group" else None
        args = QuantizationArgs(num_bits=bits, type=kind, strategy=strategy, symmetric=symmetric, group_size=group)
        scheme = QuantizationScheme(targets=["Linear"], weights=args, format=form)
        apply_quantization_config(model, QuantizationConfig(config_groups={"all": scheme}, format=form))
        for layer in model.modules():
            if hasattr(layer, "weight_scale"):
                parts = layer.weight.detach().reshape(layer.weight_scale.numel(), -1)
                scale, zero = calculate_qparams(parts.amin(1), parts.amax(1), args)
                layer.weight_scale.data = scale.reshape(layer.weight_scale.shape)
                if hasattr(layer, "weight_zero_point"):
                    place = layer.weight_zero_point
                    place.data = zero.reshape(place.shape).to(place.dtype)
        compressor = ModelCompressor.from_pretrained_model(model, form)
        compressor.compress_model(model)
        state = {name: tensor.clone() for name, tensor in model.state_dict().items() if "embed_tokens" not in name}
        save_file(state, folder / "model.safetensors")
        compressor.decompress_model(model)
        peers[folder] = plain_state(model)
        return folder / "model.safetensors"

    return make, lambda path: measure(path, peers[path.parent])


def _read(path: Path) -> Found:
    read_encoder(path)
    raise AssertionError(f"{path.name} is not refused")


BITS4 = 0.95
ROWS = [
    Row("T5", "8 bit", "bitsandbytes", *_bitsandbytes(load_in_8bit=True)),
    Row(
        "T5",
        "nf4, scales quantised as well",
        "bitsandbytes",
        *_bitsandbytes(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
        BITS4,
    ),
    Row("T5", "fp4", "bitsandbytes", *_bitsandbytes(load_in_4bit=True, bnb_4bit_quant_type="fp4"), BITS4),
    Row(
        "T5",
        "int8, a scale for each row",
        "compressed-tensors",
        *_compressed(8, "int", "channel", True, "int-quantized"),
    ),
    Row("T5", "int8, zero points", "compressed-tensors", *_compressed(8, "int", "channel", False, "int-quantized")),
    Row("T5", "fp8, one scale", "compressed-tensors", *_compressed(8, "float", "tensor", True, "float-quantized")),
    Row(
        "T5",
        "int4, packed in groups",
        "compressed-tensors",
        *_compressed(4, "int", "group", True, "pack-quantized"),
        BITS4,
    ),
    Row("T5", "qint8", "optimum-quanto", *_quanto("qint8")),
    Row("T5", "qfloat8", "optimum-quanto", *_quanto("qfloat8")),
    Row("T5", "int8, safetensors", "torchao", make_torchao, measure_torchao),
    Row("T5", "int8, pickled", "torchao", make_torchao_pickle, _read, refused=True),
    Row("T5", "int8 without a scale", "a cast", make_cast, _read, refused=True),
    *(Row("T5", f"GGUF {kind}", "gguf", *_gguf(kind), BITS4 if "4" in kind else 0.99) for kind in ("F16", "BF16")),
    *(
        Row("T5", f"GGUF {kind}", "gguf", *_gguf(kind), BITS4 if "4" in kind else 0.99)
        for kind in ("Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0")
    ),
]
