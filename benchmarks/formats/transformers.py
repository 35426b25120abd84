"""PixArt transformers as diffusers keeps them quantised."""

import copy
import functools
from pathlib import Path

import torch
from diffusers import PixArtTransformer2DModel
from safetensors.torch import save_file

from ...pixart.checkpoint import to_original
from ...pixart.weights.quantised.gguf_saving import PIXART, write_gguf
from ...pixart.weights.reading import read_checkpoint
from . import Found, Row
from .comparing import compare, plain_state
from .text_encoders import BITS4

FIELDS = {
    "num_layers": 2,
    "num_attention_heads": 4,
    "attention_head_dim": 16,
    "cross_attention_dim": 64,
    "caption_channels": 64,  # whole blocks of 64 in every row, as in the released models
    "sample_size": 128,
    "use_additional_conditions": False,
}


@functools.cache
def base() -> PixArtTransformer2DModel:
    torch.manual_seed(0)
    return PixArtTransformer2DModel(**FIELDS).eval()


def measure(path: Path, peer: dict) -> Found:
    found = read_checkpoint(path).state_dict
    original = to_original({name: tensor.clone() for name, tensor in base().state_dict().items()})
    return compare(found, to_original(peer), original)


def _layers(model: torch.nn.Module) -> list[tuple[str, torch.nn.Linear]]:
    return [(name, layer) for name, layer in model.named_modules() if type(layer) is torch.nn.Linear]


def _bitsandbytes(kind: str) -> tuple:
    """bitsandbytes' own layers in the place of diffusers', whose loader wants a GPU for it."""
    peers = {}

    def make(folder: Path) -> Path:
        import bitsandbytes

        model = copy.deepcopy(base())
        plain = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        for name, layer in _layers(model):
            size = (layer.in_features, layer.out_features)
            if kind == "int8":
                own = bitsandbytes.nn.Linear8bitLt(*size, has_fp16_weights=False)
            else:
                own = bitsandbytes.nn.Linear4bit(*size, quant_type=kind)
            own.load_state_dict(layer.state_dict())
            own = own.to("cpu")
            if kind == "int8":
                own.weight.data, own.weight.CB, own.weight.SCB = _by_rows(layer.weight)
                plain[f"{name}.weight"] = bitsandbytes.functional.int8_vectorwise_dequant(own.weight.CB, own.weight.SCB)
            else:
                own.weight = own.weight._quantize("cpu") if own.weight.quant_state is None else own.weight
                numbers = bitsandbytes.functional.dequantize_4bit(own.weight.data, own.weight.quant_state)
                plain[f"{name}.weight"] = numbers.float()
            model.set_submodule(name, own)
        peers[folder] = plain
        model.save_config(folder)
        save_file(dict(model.state_dict()), folder / "diffusion_pytorch_model.safetensors")
        return folder

    return make, lambda path: measure(path, peers[path])


def _by_rows(weight: torch.Tensor) -> tuple:
    import bitsandbytes

    codes, largest, _ = bitsandbytes.functional.int8_vectorwise_quant(weight.detach().half())
    return codes, codes, largest


def _quanto(kind: str) -> tuple:
    peers = {}

    def make(folder: Path) -> Path:
        from optimum import quanto

        model = copy.deepcopy(base())
        quanto.quantize(model, weights=getattr(quanto, kind))
        quanto.freeze(model)
        peers[folder] = plain_state(model)
        model.save_config(folder)
        save_file(dict(model.state_dict()), folder / "diffusion_pytorch_model.safetensors")
        return folder

    return make, lambda path: measure(path, peers[path])


def _gguf(kind: str) -> tuple:
    def make(folder: Path) -> Path:
        state = {
            name: tensor.contiguous() for name, tensor in base().state_dict().items() if name != "pos_embed.pos_embed"
        }
        write_gguf(folder / "pixart-sigma-1024.gguf", state, PIXART, kind)
        return folder / "pixart-sigma-1024.gguf"

    def compare_to_peer(path: Path) -> Found:
        import gguf

        tensors = gguf.GGUFReader(path).tensors
        numbers = {each.name: gguf.quants.dequantize(each.data, each.tensor_type).copy() for each in tensors}
        shapes = {name: tensor.shape for name, tensor in base().state_dict().items()}
        return measure(path, {name: torch.from_numpy(each).reshape(shapes[name]) for name, each in numbers.items()})

    return make, compare_to_peer


def make_float8(folder: Path) -> Path:
    state = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in base().state_dict().items()}
    save_file(state, folder / "pixart-sigma-1024.safetensors")
    return folder / "pixart-sigma-1024.safetensors"


def measure_float8(path: Path) -> Found:
    return measure(path, {name: tensor.to(torch.float8_e4m3fn).float() for name, tensor in base().state_dict().items()})


ROWS = [
    Row("transformer", "8 bit", "bitsandbytes", *_bitsandbytes("int8")),
    Row("transformer", "nf4", "bitsandbytes", *_bitsandbytes("nf4"), BITS4),
    Row("transformer", "fp4", "bitsandbytes", *_bitsandbytes("fp4"), BITS4),
    Row("transformer", "qint8", "optimum-quanto", *_quanto("qint8")),
    Row("transformer", "qfloat8", "optimum-quanto", *_quanto("qfloat8")),
    Row("transformer", "qint4", "optimum-quanto", *_quanto("qint4"), BITS4),
    *(
        Row("transformer", f"GGUF {kind}", "gguf", *_gguf(kind), BITS4 if "4" in kind else 0.99)
        for kind in ("F16", "Q8_0", "Q5_0", "Q4_0")
    ),
    Row("transformer", "float8 without a scale", "a cast", make_float8, measure_float8),
]
