"""T5 encoders as transformers, bitsandbytes, optimum-quanto, torchao, compressed-tensors and llama.cpp keep them."""

import functools
import json
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors.torch import load_file, save_file
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


def _torchao(folder: Path, kind: str = "Int8WeightOnlyConfig") -> T5EncoderModel:
    from torchao import quantization
    from transformers import TorchAoConfig

    return _from_pretrained(folder, TorchAoConfig(getattr(quantization, kind)()))


def make_torchao(folder: Path, kind: str = "Int8WeightOnlyConfig") -> Path:
    _torchao(folder, kind).save_pretrained(folder / "quantised")
    return folder / "quantised"


def measure_torchao(path: Path) -> Found:
    return measure(path, plain_state(T5EncoderModel.from_pretrained(path, device_map="cpu")))


def make_torchao_pickle(folder: Path) -> Path:
    torch.save(_torchao(folder).state_dict(), folder / "t5.bin")
    return folder / "t5.bin"


def make_modelopt(folder: Path) -> Path:
    from modelopt.torch import quantization
    from modelopt.torch.export import export_hf_checkpoint

    model = copy()
    model.config.architectures, model.config.dtype = ["T5EncoderModel"], torch.float32  # the export asks for both
    calibrate = lambda network: network(input_ids=torch.tensor([[1, 2, 3]]))  # noqa: E731
    export_hf_checkpoint(
        quantization.quantize(model, quantization.FP8_DEFAULT_CFG, forward_loop=calibrate),
        export_dir=folder / "exported",
    )
    return folder / "exported"


def measure_modelopt(path: Path) -> Found:
    """By modelopt's own tensors: the package has no reader of what it exports."""
    from modelopt.torch.quantization.qtensor import FP8QTensor

    stored, peer = load_file(path / "model.safetensors"), {}
    for name, tensor in stored.items():
        scale = stored.get(name.replace(".weight", ".weight_scale"))
        if scale is None:
            peer[name] = tensor
        elif name.endswith(".weight"):
            own = FP8QTensor(tensor.shape, torch.float32, tensor)
            peer[name] = own.dequantize(scale=scale, dtype=torch.float32)
    return measure(path, peer)


def _fine_grained(scale_format: str) -> tuple:
    """Quantised by transformers' operation alone, since its loader wants a GPU for that; read by its loader."""

    def make(folder: Path) -> Path:
        from transformers import FineGrainedFP8Config
        from transformers.integrations.finegrained_fp8 import Fp8Quantize

        config = FineGrainedFP8Config(weight_block_size=(32, 32), scale_fmt=scale_format)
        quantise, state = Fp8Quantize(SimpleNamespace(quantization_config=config)), {}
        for name, tensor in weights().items():
            is_layer = "SelfAttention" in name or "DenseReluDense" in name
            chosen = is_layer and "bias" not in name
            state |= quantise.convert({name: tensor}) if chosen else {name: tensor}
        base().save_pretrained(folder)
        save_file(state, folder / "model.safetensors", {"format": "pt"})
        content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        content["quantization_config"] = config.to_dict()
        (folder / "config.json").write_text(json.dumps(content), encoding="utf-8")
        return folder

    def compare_to_peer(path: Path) -> Found:
        return measure(path, plain_state(T5EncoderModel.from_pretrained(path, device_map="cpu")))

    return make, compare_to_peer


def make_comfy(folder: Path) -> Path:
    """By hand: ComfyUI reads this form, and has no program of its own that writes it."""
    state = {"scaled_fp8": torch.empty(0, dtype=torch.float8_e4m3fn)}
    for name, tensor in weights().items():
        state[name] = tensor
        if "DenseReluDense" in name:
            scale = tensor.abs().max() / 448
            state |= {name: (tensor / scale).to(torch.float8_e4m3fn), name.replace("weight", "scale_weight"): scale}
    save_file(state, folder / "t5_scaled.safetensors")
    return folder / "t5_scaled.safetensors"


def measure_comfy(path: Path) -> Found:
    stored = load_file(path)
    scales = {name: stored.get(name.replace("weight", "scale_weight"), torch.ones(())) for name in weights()}
    return measure(path, {name: stored[name].float() * scale for name, scale in scales.items()})


def make_float8(folder: Path) -> Path:
    save_file({name: tensor.to(torch.float8_e4m3fn) for name, tensor in weights().items()}, folder / "t5.safetensors")
    return folder / "t5.safetensors"


def measure_float8(path: Path) -> Found:
    return measure(path, {name: tensor.float() for name, tensor in load_file(path).items()})


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


BITS4, BITS2 = 0.95, 0.7
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
    Row("T5", "fp8", "modelopt", make_modelopt, measure_modelopt),
    Row("T5", "fp8 in blocks", "transformers", *_fine_grained("float")),
    Row("T5", "fp8 in blocks, powers of two", "transformers", *_fine_grained("ue8m0")),
    Row("T5", "qint8", "optimum-quanto", *_quanto("qint8")),
    Row("T5", "qfloat8", "optimum-quanto", *_quanto("qfloat8")),
    Row("T5", "qint4", "optimum-quanto", *_quanto("qint4"), BITS4),
    Row("T5", "qint2", "optimum-quanto", *_quanto("qint2"), BITS2),
    Row("T5", "int8, safetensors", "torchao", make_torchao, measure_torchao),
    Row(
        "T5",
        "float8, safetensors",
        "torchao",
        functools.partial(make_torchao, kind="Float8WeightOnlyConfig"),
        measure_torchao,
    ),
    Row("T5", "int8, pickled", "torchao", make_torchao_pickle, _read, refused=True),
    Row("T5", "scaled fp8", "by hand, for ComfyUI", make_comfy, measure_comfy),
    Row("T5", "float8 without a scale", "a cast", make_float8, measure_float8),
    Row("T5", "int8 without a scale", "a cast", make_cast, _read, refused=True),
    *(Row("T5", f"GGUF {kind}", "gguf", *_gguf(kind), BITS4 if "4" in kind else 0.99) for kind in ("F16", "BF16")),
    *(
        Row("T5", f"GGUF {kind}", "gguf", *_gguf(kind), BITS4 if "4" in kind else 0.99)
        for kind in ("Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0")
    ),
]
