"""Adapters of any keys: they change what they say, or what is left out is named, or they are refused."""

import random

import torch

from pixart_pack.pixart.checkpoint import expected_shapes
from pixart_pack.pixart.lora import load_lora, merge
from pixart_pack.tests.tiny_pixart import tiny_config

CONFIG = tiny_config(depth=2)
PLACES = [
    ("blocks.0.mlp.fc2", "transformer_blocks.0.ff.net.2"), ("blocks.0.mlp.fc1", "transformer_blocks.0.ff.net.0.proj"),
    ("blocks.0.attn.proj", "transformer_blocks.0.attn1.to_out.0"), ("final_layer.linear", "proj_out"),
    ("blocks.1.cross_attn.q_linear", "transformer_blocks.1.attn2.to_q"),
    ("blocks.1.mlp.fc2", "transformer_blocks.1.ff.net.2"),
]  # fmt: skip
NAMES = [
    lambda original, diffusers, role: f"transformer.{diffusers}.{role}",
    lambda original, diffusers, role: f"diffusion_model.{original}.{role}",
    lambda original, diffusers, role: f"lora_unet_{original.replace('.', '_')}.{role}",
    lambda original, diffusers, role: f"lycoris_{original.replace('.', '_')}.{role}",
]
SHAPES = expected_shapes(CONFIG)


def drawn_module(draw, kind, shape):
    """Role -> tensor of an adapter of a kind for a weight of `shape`."""
    rows, columns = shape
    rank = draw.choice([1, 3, 4])

    def numbers(*shape):
        return torch.randn(shape, generator=torch.Generator().manual_seed(draw.randrange(10**6)))

    alpha = {"alpha": torch.tensor(draw.choice([0.5, 2.0, 7.0]))} if draw.random() < 0.7 and kind != "diff" else {}
    if kind == "lora":
        return {"lora_down.weight": numbers(rank, columns), "lora_up.weight": numbers(rows, rank)} | alpha
    if kind == "loha":
        sides = {f"hada_w{i}_a": numbers(rows, rank) for i in (1, 2)}
        return sides | {f"hada_w{i}_b": numbers(rank, columns) for i in (1, 2)} | alpha
    return {"diff": numbers(rows, columns)}


def effect_of(kind, roles, shape):
    """What the roles that are left change, written down a second time; None where they do not belong together."""
    needed = {"lora": ("lora_up.weight", "lora_down.weight"), "diff": ("diff",)}
    needed = needed.get(kind, tuple(f"hada_w{i}_{side}" for i in (1, 2) for side in "ab"))
    if any(role not in roles for role in needed):
        return torch.zeros(shape)
    first = [roles[role] for role in needed]
    try:
        product = first[0] if kind == "diff" else first[0] @ first[1]
        product = product * (first[2] @ first[3]) if kind == "loha" else product
    except RuntimeError:
        return None
    rank = first[1].shape[0] if kind != "diff" else 1
    scale = roles["alpha"].item() / rank if "alpha" in roles else 1.0
    return product * scale if product.shape == shape else None


def drawn_file(draw):
    """(a file's tensors, {weight: its kind, and the roles that are left of it}, the keys that are misspelt)."""
    given, left, strange, alphas = {}, {}, set(), []
    for original, diffusers in draw.sample(PLACES, draw.choice([1, 2, 4])):
        kind, name = draw.choice(["lora", "lora", "loha", "diff"]), draw.choice(NAMES)
        left[original] = kind, {}
        for role, tensor in drawn_module(draw, kind, SHAPES[f"{original}.weight"]).items():
            fate, key = draw.random(), name(original, diffusers, role)
            if fate < 0.05:
                continue
            if fate < 0.1:
                given[f"{key}{draw.choice('x_')}"] = tensor
                strange.add(next(reversed(given)))
                continue
            given[key] = left[original][1][role] = tensor.T.contiguous() if fate < 0.15 and tensor.ndim > 1 else tensor
            alphas += [(key, original)] if role == "alpha" else []
    if len(alphas) > 1 and draw.random() < 0.5:
        (first, one), (second, other) = alphas[:2]
        given[first], given[second] = given[second], given[first]
        left[one][1]["alpha"], left[other][1]["alpha"] = given[first], given[second]
    return given, left, strange


def test_any_keys_change_what_they_say_or_are_named_or_refused():
    """Kinds and names mixed, alphas swapped, matrices transposed, keys dropped and misspelt, as a seed draws them."""
    refused, nought = 0, {key: torch.zeros(shape) for key, shape in SHAPES.items()}
    for seed in range(60):
        given, left, strange = drawn_file(random.Random(seed))
        effects = {f"{place}.weight": effect_of(*each, SHAPES[f"{place}.weight"]) for place, each in left.items()}
        try:
            lora = load_lora(given, config=CONFIG)
        except ValueError as error:
            assert ": got " in str(error)
            assert any(each is None for each in effects.values()) or not any(map(torch.any, effects.values()))
            refused += 1
            continue
        assert strange <= set(lora.unmatched) and bool(lora.shortfall) == bool(lora.unmatched)
        for key, weight in merge(nought, lora).items():
            expected = effects.get(key, nought[key])
            torch.testing.assert_close(weight, expected, rtol=1e-5, atol=1e-5)  # of products up to 50
    assert 5 < refused < 40


def test_a_weights_scale_is_no_adapter():
    """Quantised factors have one beside them, which sorts before the weight."""
    module = "transformer.transformer_blocks.0.ff.net.2.lora_A"
    tensors = {f"{module}.{name}": torch.ones(1) for name in ("scale_weight", "weight_scale", "input_scale", "weights")}
    tensors |= {f"{module}.weight": torch.ones(4, 192), f"{module[:-1]}B.weight": torch.ones(48, 4)}
    lora = load_lora(tensors, config=CONFIG)
    assert lora.matched == 2 and len(lora.unmatched) == 4
