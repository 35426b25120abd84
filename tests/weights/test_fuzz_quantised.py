"""Key sets of quantised models with names gone, changed, doubled or of another type: the file's model, or a refusal.

Every weight is a small integer times a power of two, which all the forms here and all types of floats hold exactly.
"""

import json
import random

import pytest
import torch
from safetensors.torch import save_file

from pixart_pack.pixart import PixArtConfig
from pixart_pack.pixart.checkpoint import NULL_CAPTION_KEY, expected_shapes, to_diffusers
from pixart_pack.pixart.weights.quantised.gguf_file import llama_name
from pixart_pack.pixart.weights.quantised.packed import expand_all
from pixart_pack.pixart.weights.reading import read_checkpoint
from pixart_pack.pixart.weights.t5 import read_encoder
from pixart_pack.tests.gguf_files import matrices, write_gguf
from pixart_pack.tests.tiny_t5 import make_t5, weights_of

pytestmark = pytest.mark.slow

WIDTH, LEVEL = 32, 127
CONFIG = PixArtConfig(depth=2, hidden_size=12, num_heads=1, caption_channels=4, caption_length=6, micro_condition=False)
FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
OTHER_TYPES = (*FLOATS, torch.int8, torch.int32, torch.uint8, torch.bool)


def exact(shape, generator):
    """(integers with 127 in every 32nd place, a power of two for each row)."""
    codes = torch.randint(-LEVEL, LEVEL + 1, shape, generator=generator).float()
    codes.flatten()[::WIDTH] = LEVEL
    return codes, 2.0 ** torch.randint(-9, -5, (shape[0], *[1] * (len(shape) - 1)), generator=generator)


def model_of(shapes):
    """Codes and powers of two of every tensor."""
    generator = torch.Generator().manual_seed(0)
    return {name: exact(shape, generator) for name, shape in sorted(shapes.items())}


def plain(parts):
    return {name: codes * scale for name, (codes, scale) in parts.items()}


def by_bitsandbytes(name, codes, scale):
    return {name: codes.to(torch.int8), name.replace("weight", "SCB"): (scale * LEVEL).flatten()}


def by_compressed_tensors(name, codes, scale):
    return {name: codes.to(torch.int8), name.replace("weight", "weight_scale"): scale}


def by_zero_points(name, codes, scale):
    shifted = {name: (codes - 1).clamp(-128, 127).to(torch.int8), name.replace("weight", "weight_scale"): scale}
    return shifted | {name.replace("weight", "weight_zero_point"): torch.full_like(scale, -1).to(torch.int8)}


def by_quanto(name, codes, scale):
    ones = {name.replace("weight", end): torch.ones(()) for end in ("input_scale", "output_scale")}
    return {f"{name}._data": codes.to(torch.int8), f"{name}._scale": scale, **ones}


def by_comfy(name, codes, scale):
    return {name: codes.to(torch.int8), name.replace("weight", "scale_weight"): scale}


FORMS = (by_bitsandbytes, by_compressed_tensors, by_zero_points, by_quanto, by_comfy)


def quantised(parts, form, chosen, draw):
    """The model as one program has it. chosen: name -> whether its layer is quantised."""
    tensors = {}
    for name, (codes, scale) in parts.items():
        if chosen(name) and draw.random() < 0.8:
            tensors |= form(name, codes, scale)
        else:
            tensors[name] = (codes * scale).to(draw.choice([torch.float32, torch.bfloat16]))
    return tensors


def mutilated(tensors, draw):
    """The same with a few names gone, changed or doubled, or values cast."""
    tensors = dict(tensors)
    for _ in range(draw.choice([0, 1, 1, 2, 3])):
        name = draw.choice(sorted(tensors))
        value = tensors.pop(name)
        changed = draw.choice([None, f"{name}_", f"module.{name}", name.replace(".", "_"), name[1:], "x", name, name])
        if changed == name and draw.random() < 0.8:
            value = value.to(draw.choice(OTHER_TYPES))
        elif changed == name and value.ndim:
            value = value[..., : max(value.shape[-1] // 2, 1)]
        if changed is not None:
            tensors[changed] = value.contiguous()
        if draw.random() < 0.2:
            tensors.setdefault(name, value)
    return {name: value.clone() for name, value in tensors.items()}


def lossy(tensors, original):
    """Whether a cast has changed the numbers in the file, or a zero point is gone without a trace: another model."""
    gone = {name for name in original.keys() - tensors.keys() if name.endswith("zero_point")}
    return bool(gone) or any(
        value.shape != original[name].shape or not torch.equal(value.double(), original[name].double())
        for name, value in tensors.items()
        if name in original
    )


def read_t5(path):
    return read_encoder(path, torch.float32)[0]


def read_packed_t5(path):
    return expand_all(read_encoder(path, torch.float32, packed=True)[0])


def read_transformer(path):
    return {name: each for name, each in read_checkpoint(path).state_dict.items() if name != NULL_CAPTION_KEY}


def outcome(read, path):
    """The weights, or None where they were refused by the file's name."""
    try:
        return read(path)
    except ValueError as error:
        assert path.name in str(error) or path.stem in str(error), error
        assert "Traceback" not in str(error)
        return None


T5 = {
    name: tuple(weight.shape)
    for name, weight in weights_of(make_t5(d_model=WIDTH, d_ff=64, vocab_size=64, num_layers=1)).items()
}
T5_PARTS = model_of(T5)
PIXART_PARTS = model_of({name: shape for name, shape in expected_shapes(CONFIG).items() if name != NULL_CAPTION_KEY})


def is_layer(name):
    return name.endswith(".weight") and ("DenseReluDense" in name or "SelfAttention." in name) and "bias" not in name


def is_transformer_layer(name):
    return name.endswith((".qkv.weight", ".proj.weight", ".fc1.weight", ".fc2.weight")) and "x_embedder" not in name


def same(found, parts):
    expected = plain(parts)
    is_equal = {name: torch.equal(found[name].float(), expected[name]) for name in found.keys() & expected.keys()}
    return found.keys() == expected.keys() and all(is_equal.values())


@pytest.mark.parametrize("form", FORMS)
def test_text_encoders(tmp_path, form):
    path, read = tmp_path / "t5_of_a_stranger.safetensors", 0
    for seed in range(30):
        draw = random.Random(f"{form.__name__} {seed}")
        original = quantised(T5_PARTS, form, is_layer, draw)
        tensors = mutilated(original, draw)
        save_file(tensors, path)
        found = outcome(draw.choice([read_t5, read_packed_t5]), path)
        if found is not None and not lossy(tensors, original):
            assert same(found, T5_PARTS), (seed, sorted(tensors))
            read += 1
    assert 4 < read < 26


@pytest.mark.parametrize("form", FORMS[:4])
def test_transformers(tmp_path, form):
    path, read = tmp_path / "pixart_sigma_of_a_stranger.safetensors", 0
    for seed in range(20):
        draw = random.Random(f"{form.__name__} {seed}")
        original = quantised(PIXART_PARTS, form, is_transformer_layer, draw)
        tensors = mutilated(original, draw)
        save_file(tensors, path)
        found = outcome(read_transformer, path)
        if found is not None and not lossy(tensors, original):
            assert same(found, PIXART_PARTS), (seed, sorted(tensors))
            read += 1
    assert 2 < read < 18


def test_gguf(tmp_path):
    path, read = tmp_path / "sigma_of_a_stranger.gguf", 0
    for seed in range(30):
        draw = random.Random(seed)
        is_t5 = draw.random() < 0.5
        parts = T5_PARTS if is_t5 else PIXART_PARTS
        named = {(llama_name(name) if is_t5 else name): weight for name, weight in plain(parts).items()}
        if not is_t5 and draw.random() < 0.5:
            named = {name: weight.contiguous() for name, weight in to_diffusers(named).items()}
        tensors = {name: each.float() for name, each in mutilated(named, draw).items()}
        write_gguf(path, tensors, matrices(draw.choice(["Q8_0", "F16"])), "t5encoder" if is_t5 else "pixart")
        found = outcome(read_t5 if is_t5 else read_transformer, path)
        if found is not None and not lossy(tensors, named):
            assert same(found, parts), seed
            read += 1
    assert 3 < read < 28


def four_bits(block):
    """(the T5 with its layers as nf4, its numbers)."""
    table, stored, expected = torch.arange(-8, 8).float() / 8, {}, {}
    for seed, (name, (codes, scale)) in enumerate(T5_PARTS.items()):
        stored[name] = expected[name] = codes * scale
        if not is_layer(name):
            continue
        count, generator = codes.numel(), torch.Generator().manual_seed(seed)
        numbers = torch.randint(0, 16, (count,), generator=generator)
        steps = 2.0 ** torch.randint(-4, 0, (-(-count // block),), generator=generator)
        state = json.dumps({"shape": list(codes.shape), "blocksize": block, "quant_type": "nf4", "dtype": "float32"})
        stored |= {
            name: (numbers[::2] * 16 + numbers[1::2]).to(torch.uint8)[:, None],
            f"{name}.absmax": steps,
            f"{name}.quant_map": table.clone(),
            f"{name}.quant_state.bitsandbytes__nf4": torch.tensor(list(state.encode()), dtype=torch.uint8),
        }
        expected[name] = (table[numbers] * steps.repeat_interleave(block)[:count]).reshape(codes.shape)
    return stored, expected


@pytest.mark.parametrize("block", [16, 64])
def test_four_bits(tmp_path, block):
    path, read = tmp_path / "nf4_of_a_stranger.safetensors", 0
    original, expected = four_bits(block)
    for seed in range(30):
        draw = random.Random(seed)
        tensors = mutilated(original, draw)
        save_file(tensors, path)
        found = outcome(read_packed_t5, path)
        if found is not None and not lossy(tensors, original):
            assert all(torch.equal(found[name].float(), expected[name]) for name in expected), seed
            read += 1
    assert 2 < read < 26
