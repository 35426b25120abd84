"""LoRAs of every layout and kind, against the original's numbers and against PEFT itself."""

import json
import math

import pytest
import torch
from safetensors.torch import save_file

from pixart_pack.pixart.checkpoint import detect_config, to_diffusers, to_original
from pixart_pack.pixart.commands.convert import detect_kind
from pixart_pack.pixart.lora import Target, describe_lora, load_lora, merge, read_lora
from pixart_pack.pixart.lora.alphas import matches
from pixart_pack.pixart.transformer import PixArt
from pixart_pack.tests.goldens import load_golden, take
from pixart_pack.tests.tiny_pixart import make_weights, tiny_config

GOLDENS = ["lora_tiny_512", "lora_tiny_1024ms", "lora_tiny_r16_default_alpha"]
CONFIG = tiny_config(depth=2)
QKV, KV, PROJ = (
    Target.of("blocks.0.attn.qkv"),
    Target.of("blocks.1.cross_attn.kv_linear"),
    Target.of("blocks.1.mlp.fc1"),
)
PATCH = Target.of("x_embedder.proj")
# Sums of some ten float32 products of unit size, in another order.
NOISE = {"atol": 2e-6, "rtol": 1e-5}


def golden(name):
    """Base weights in the original layout, the configuration, the adapter and its configuration, and all tensors."""
    case, tensors = load_golden(name)
    given = case["diffusers_config"]
    weights = to_original(take(tensors, "diffusers"))
    config = detect_config(weights, model_config=given, num_heads=given["num_attention_heads"])
    return case, weights, config, take(tensors, "lora"), tensors


def run_model(weights, config, inputs, dtype):
    model = PixArt(config).eval().to(dtype)
    expected = {name: weights.get(name, tensor) for name, tensor in model.state_dict().items()}
    model.load_state_dict({name: tensor.to(dtype) for name, tensor in expected.items()})
    sizes = {name: inputs[name] for name in ("resolution", "aspect_ratio") if name in inputs}
    with torch.no_grad():
        return model(inputs["x"].to(dtype), inputs["timestep"], inputs["y"].to(dtype), inputs["mask"], **sizes)


@pytest.mark.parametrize("name", GOLDENS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
def test_predicts_as_the_original_with_its_lora(name, dtype):
    case, weights, config, adapter, tensors = golden(name)
    lora = load_lora(adapter, case["adapter_config"], config=config)
    assert not lora.unmatched
    assert {factor.scale for factor in lora.factors.values()} == {case["scaling"]}
    weights = {key: tensor.to(dtype) for key, tensor in weights.items()}
    inputs = take(tensors, "input")
    tolerance = {"atol": case["tolerance"]["suggested_atol"], "rtol": case["tolerance"]["suggested_rtol"]}
    kind = "output" if dtype == torch.float32 else "output_f64"
    for strength, output in ((0.0, "base"), (1.0, "lora_unmerged"), (1.0, "lora_merged")):
        found = run_model(merge(weights, lora, strength), config, inputs, dtype)
        torch.testing.assert_close(found.float(), tensors[f"{kind}.{output}"], **tolerance)


def same_weights(found, expected, **tolerance):
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(
            found[name], expected[name], **tolerance, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("name", GOLDENS)
def test_merged_weights_are_the_originals(name):
    case, weights, config, adapter, tensors = golden(name)
    merged = to_diffusers(merge(weights, load_lora(adapter, case["adapter_config"])))
    for key, expected in take(tensors, "output.merged_weight").items():
        torch.testing.assert_close(merged[key], expected, **NOISE)


def renamed(adapter, prefix, *, flat=False, down="lora_A.weight", up="lora_B.weight", alpha=None):
    """PEFT's keys under another program's names."""
    other = {}
    for key, tensor in adapter.items():
        module, part = key.removeprefix("base_model.model.").rsplit(".lora_", 1)
        module = prefix + (module.replace(".", "_") if flat else module)
        other[f"{module}.{down if part.startswith('A') else up}"] = tensor
        if alpha is not None:
            other[f"{module}.alpha"] = torch.tensor(alpha)
    return other


KOHYA = {"flat": True, "down": "lora_down.weight", "up": "lora_up.weight", "alpha": 8.0}
LAYOUTS = {
    "peft": ("base_model.model.", {}),
    "peft with the adapter's name": (
        "base_model.model.",
        {"down": "lora_A.default.weight", "up": "lora_B.default.weight"},
    ),
    "pipeline": ("unet.base_model.model.", {}),
    "diffusers": ("transformer.", {"alpha": 8.0}),
    "bare": ("", {"alpha": 8.0}),
    "bare, down and up": ("", {"down": "lora.down.weight", "up": "lora.up.weight", "alpha": 8.0}),
    "kohya": ("lora_unet_", KOHYA),
    "OneTrainer": ("lora_transformer_", KOHYA),
    "LyCORIS": ("lycoris_", KOHYA),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", GOLDENS[1:])
def test_every_layout_of_names_is_the_same_lora(name, layout):
    case, weights, config, adapter, _ = golden(name)
    prefix, how = LAYOUTS[layout]
    lora = load_lora(renamed(adapter, prefix, **how), config=config)
    assert not lora.unmatched
    assert lora.matched == len(adapter) * (1.5 if "alpha" in how else 1)
    same_weights(merge(weights, lora), merge(weights, load_lora(adapter, case["adapter_config"])))


@pytest.mark.parametrize(
    "prefix", ["base_model.model.", "diffusion_model.", "lora_unet_", "model.diffusion_model.", "lycoris_"]
)
def test_original_names_on_packed_weights(prefix):
    generator = torch.Generator().manual_seed(0)
    flat = prefix.endswith("_")
    adapter, expected = {}, make_weights(CONFIG)
    for module, (rows, columns) in {"blocks.0.attn.qkv": (144, 48), "t_block.1": (288, 48)}.items():
        name = prefix + (module.replace(".", "_") if flat else module)
        down, up = torch.randn(4, columns, generator=generator), torch.randn(rows, 4, generator=generator)
        adapter |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up, f"{name}.alpha": torch.tensor(2.0)}
        expected[f"{module}.weight"] = expected[f"{module}.weight"] + 0.5 * up @ down
    same_weights(merge(make_weights(CONFIG), load_lora(adapter, config=CONFIG)), expected, **NOISE)


def lycoris_kinds():
    """{kind: (a file's tensors without the module's name, the change of a 48 x 48 weight)}, as LyCORIS writes them."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=generator) * 0.3

    a, b, c, d = random(48, 3), random(3, 48), random(48, 3), random(3, 48)
    w1, w1_a, w1_b, w2, w2_a, w2_b = (
        random(4, 4), random(4, 2), random(2, 4), random(12, 12), random(12, 2), random(2, 12),
    )  # fmt: skip
    alpha, whole = torch.tensor(1.5), random(48, 48)
    return {
        "LoCon": ({"lora_down.weight": b, "lora_up.weight": a, "alpha": alpha}, a @ b / 2),
        "LoHa": (
            {"hada_w1_a": a, "hada_w1_b": b, "hada_w2_a": c, "hada_w2_b": d, "alpha": alpha},
            (a @ b) * (c @ d) / 2,
        ),
        "LoKr, both whole": ({"lokr_w1": w1, "lokr_w2": w2, "alpha": alpha}, torch.kron(w1, w2)),
        "LoKr, the second in factors": (
            {"lokr_w1": w1, "lokr_w2_a": w2_a, "lokr_w2_b": w2_b, "alpha": alpha},
            torch.kron(w1, w2_a @ w2_b) * 0.75,
        ),
        "LoKr, the first in factors": (
            {"lokr_w1_a": w1_a, "lokr_w1_b": w1_b, "lokr_w2": w2, "alpha": alpha},
            torch.kron(w1_a @ w1_b, w2) * 0.75,
        ),
        "LoKr, both in factors": (
            {"lokr_w1_a": w1_a, "lokr_w1_b": w1_b, "lokr_w2_a": w2_a, "lokr_w2_b": w2_b, "alpha": alpha},
            torch.kron(w1_a @ w1_b, w2_a @ w2_b) * 0.75,
        ),
        "full": ({"diff": whole}, whole),
    }


@pytest.mark.parametrize("kind", lycoris_kinds())
def test_every_kind_of_lycoris_on_rows_of_a_packed_weight(kind):
    tensors, change = lycoris_kinds()[kind]
    weights = make_weights(CONFIG)
    lora = load_lora({f"lycoris_transformer_blocks_1_attn2_to_v.{key}": value for key, value in tensors.items()})
    assert not lora.unmatched and lora.matched == len(tensors)
    expected = {
        **weights,
        "blocks.1.cross_attn.kv_linear.weight": weights["blocks.1.cross_attn.kv_linear.weight"].clone(),
    }
    expected["blocks.1.cross_attn.kv_linear.weight"][48:] += change
    same_weights(merge(weights, lora), expected, **NOISE)


def test_the_names_of_the_first_attention_processors():
    down, up = torch.randn(2, 48), torch.randn(48, 2)
    module = "transformer_blocks.1.attn2.processor.to_out_lora"
    lora = load_lora({f"{module}.down.weight": down, f"{module}.up.weight": up}, config=CONFIG)
    assert list(lora.factors) == [Target("blocks.1.cross_attn.proj.weight")]


@pytest.mark.parametrize(("module", "rows"), [("attn1.to_qkv", "attn.qkv"), ("attn2.to_kv", "cross_attn.kv_linear")])
def test_the_names_of_fused_projections(module, rows):
    """As diffusers' fuse_qkv_projections leaves them."""
    lora = load_lora(one_lora("transformer.", f"transformer_blocks.1.{module}"))
    assert list(lora.factors) == [Target(f"blocks.1.{rows}.weight")]


# -- alpha ------------------------------------------------------------------------------------------------------------


def one_lora(prefix="base_model.model.", module="transformer_blocks.0.ff.net.2", rank=4, **more):
    rows, columns = 48, 192
    generator = torch.Generator().manual_seed(rank)
    return {
        f"{prefix}{module}.lora_A.weight": torch.randn(rank, columns, generator=generator),
        f"{prefix}{module}.lora_B.weight": torch.randn(rows, rank, generator=generator),
        **{f"{prefix}{module}.{name}": value for name, value in more.items()},
    }


HEADER = {"lora_adapter_metadata": '{"transformer.lora_alpha": 2}'}  # as diffusers writes it
BOTH = {"lora_adapter_metadata": '{"transformer.lora_alpha": 2, "text_encoder.lora_alpha": 64}'}


@pytest.mark.parametrize(
    ("adapter", "given", "scale", "source"),
    [
        (one_lora(rank=16), {}, 0.5, "PEFT's default"),
        (one_lora("unet.base_model.model.", rank=16), {}, 0.5, "PEFT's default"),
        (one_lora("transformer.", rank=16), {}, 1.0, "the rank"),
        (one_lora("transformer.", rank=16, alpha=torch.tensor(4)), {}, 0.25, "stored in the file"),
        (one_lora("transformer.", rank=16, alpha=torch.tensor([4.0]).bfloat16()), {}, 0.25, "stored in the file"),
        (one_lora(rank=16), {"adapter_config": {"lora_alpha": 32}}, 2.0, "adapter_config.json"),
        (one_lora(rank=16), {"adapter_config": {"lora_alpha": 32, "use_rslora": True}}, 8.0, "by use_rslora"),
        (one_lora(rank=4), {"adapter_config": {"lora_alpha": 32, "alpha_pattern": {"net.2": 2}}}, 0.5, "config.json"),
        (one_lora(rank=4), {"adapter_config": {"lora_alpha": 32, "alpha_pattern": {"(": 2}}}, 8.0, "adapter_config"),
        (one_lora(rank=4), {"adapter_config": {"lora_alpha": None, "r": None}}, 2.0, "adapter_config"),
        (one_lora(rank=4), {"adapter_config": {"lora_alpha": -2}}, -0.5, "adapter_config"),
        (one_lora(rank=4), {"adapter_config": {"lora_alpha": 0}}, 0.0, "adapter_config"),
        (one_lora("transformer.", alpha=torch.tensor(2j)), {}, 1.0, "the rank"),
        (one_lora(rank=16), {"alpha": 4.0}, 0.25, "chosen by you"),
        (one_lora("transformer."), {"metadata": HEADER}, 0.5, "adapter_config.json"),
        (one_lora("transformer."), {"metadata": BOTH}, 0.5, "adapter_config.json"),
        (one_lora("transformer."), {"metadata": {"lora_adapter_metadata": "["}}, 1.0, "the rank"),
        (one_lora("transformer.", alpha=torch.tensor(math.nan)), {}, 1.0, "the rank"),
    ],
)  # fmt: skip
def test_where_alpha_is_from(adapter, given, scale, source):
    lora = load_lora(adapter, config=CONFIG, **given)
    assert next(iter(lora.factors.values())).scale == scale
    assert source in lora.alpha_sources[0]


@pytest.mark.parametrize(
    "config",
    [
        {"lora_alpha": "16"},
        {"lora_alpha": True},
        {"lora_alpha": math.nan},
        {"lora_alpha": 1e12},
        {"lora_alpha": 4, "alpha_pattern": {"net.2": [2]}},
    ],
)
def test_a_configuration_whose_numbers_are_none_is_refused(config):
    with pytest.raises(
        ValueError, match="Unusable number in adapter_config.json: got .* for '(lora_alpha|alpha_pattern)'"
    ):
        load_lora(one_lora(), config, config=CONFIG)


# -- PEFT itself ------------------------------------------------------------------------------------------------------

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
EVERYTHING = [*ATTENTION, "ff.net.0.proj", "ff.net.2", "proj", "proj_out", "linear", "linear_1", "linear_2"]


def diffusers_model(weights):
    diffusers = pytest.importorskip("diffusers")
    from pixart_pack.pixart.weights.saving import diffusers_config

    fields = {key: value for key, value in diffusers_config(CONFIG).items() if not key.startswith("_")}
    model = diffusers.PixArtTransformer2DModel(**fields).eval()
    model.load_state_dict(to_diffusers(weights), strict=True)
    return model


def peft_model(weights, peft_config, seed=0):
    """The model with a random adapter in it; also the magnitudes of DoRA are off from where they start."""
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(diffusers_model(weights), peft_config).eval()
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "magnitude" in name:
            parameter.data *= 0.5 + torch.rand(parameter.shape, generator=generator)
        elif any(part in name for part in ("lora_", "hada_", "lokr_")):
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
    return model


PEFT_CASES = {
    "lora": ("LoraConfig", {"r": 4, "target_modules": EVERYTHING}),
    "patterns": (
        "LoraConfig",
        {
            "r": 4,
            "lora_alpha": 16,
            "target_modules": EVERYTHING,
            "rank_pattern": {"attn1.to_q": 2, "transformer_blocks.1.ff.net.2": 6},
            "alpha_pattern": {"to_k": 3, "adaln_single.linear": 5, r".*\.1\.attn2\.to_v": 7},
        },
    ),
    "biases": ("LoraConfig", {"r": 4, "lora_alpha": 6, "lora_bias": True, "target_modules": ["to_k", "ff.net.2"]}),
    "rslora": ("LoraConfig", {"r": 4, "lora_alpha": 6, "use_rslora": True, "target_modules": ATTENTION}),
    "dora": ("LoraConfig", {"r": 4, "use_dora": True, "target_modules": EVERYTHING}),
    "dora on q alone": ("LoraConfig", {"r": 3, "use_dora": True, "lora_alpha": 5, "target_modules": ["attn1.to_q"]}),
    "loha": ("LoHaConfig", {"r": 3, "alpha": 5, "target_modules": EVERYTHING, "use_effective_conv2d": True}),
    "loha, flat convolution": ("LoHaConfig", {"r": 3, "target_modules": EVERYTHING}),
    "lokr": ("LoKrConfig", {"r": 3, "alpha": 5, "target_modules": EVERYTHING, "use_effective_conv2d": True}),
    "lokr, both in factors": ("LoKrConfig", {"r": 2, "target_modules": EVERYTHING, "decompose_both": True}),
    "lokr, whole matrices": ("LoKrConfig", {"r": 64, "alpha": 32, "target_modules": ATTENTION}),
    "lokr, whole matrices and patterns": (
        "LoKrConfig",
        {
            "r": 64,
            "alpha": 32,
            "target_modules": ATTENTION,
            "rank_pattern": {"to_q": 128},
            "alpha_pattern": {"attn2.to_k": 5},
        },
    ),
}


@pytest.mark.peer
@pytest.mark.parametrize("case", PEFT_CASES)
def test_merges_as_peft_does(case, tmp_path):
    peft = pytest.importorskip("peft")
    name, fields = PEFT_CASES[case]
    weights = {key: value for key, value in make_weights(CONFIG).items() if key != "y_embedder.y_embedding"}
    model = peft_model(weights, getattr(peft, name)(**fields))
    model.save_pretrained(tmp_path)
    lora = read_lora(tmp_path, CONFIG)
    assert not lora.unmatched, lora.unmatched
    expected = to_original(model.merge_and_unload().state_dict())
    assert any(not torch.equal(expected[key], weights[key]) for key in weights)
    same_weights(merge(weights, lora), expected, **NOISE)
    alone = read_lora(tmp_path / "adapter_model.safetensors", CONFIG)  # the file in its folder, chosen itself
    same_weights(merge(weights, alone), expected, **NOISE)


# -- merging ----------------------------------------------------------------------------------------------------------


def test_strength():
    weights, lora = make_weights(CONFIG), load_lora(one_lora(), config=CONFIG)
    name = "blocks.0.mlp.fc2.weight"
    whole = merge(weights, lora)[name] - weights[name]
    nothing = merge(weights, lora, 0.0)
    assert all(nothing[key] is weights[key] for key in weights)
    for strength in (-1.0, 0.25, 3.0):
        found = merge(weights, lora, strength)
        torch.testing.assert_close(found[name] - weights[name], strength * whole, **NOISE)
        assert all(found[key] is weights[key] for key in weights if key != name)


def test_strength_of_dora_goes_from_the_old_weight_to_the_changed_one():
    weights = make_weights(CONFIG)
    tensors = one_lora("diffusion_model.", "blocks.0.mlp.fc2", dora_scale=torch.rand(48, 1) + 1)
    lora = load_lora(tensors, config=CONFIG)
    name = "blocks.0.mlp.fc2.weight"
    changed = merge(weights, lora)[name]
    torch.testing.assert_close(changed.norm(dim=1, keepdim=True), lora.factors[Target(name)].magnitude, **NOISE)
    torch.testing.assert_close(merge(weights, lora, 0.5)[name], (weights[name] + changed) / 2, **NOISE)


def test_dora_by_columns_as_lycoris_has_it():
    weights, lengths = make_weights(CONFIG), torch.rand(1, 192) + 1
    lora = load_lora(one_lora("lycoris_", "blocks_0_mlp_fc2", dora_scale=lengths), config=CONFIG)
    changed = merge(weights, lora)["blocks.0.mlp.fc2.weight"]
    torch.testing.assert_close(changed.norm(dim=0, keepdim=True), lengths, **NOISE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_merging_keeps_the_dtype_and_sums_in_float32(dtype):
    weights = {name: tensor.to(dtype) for name, tensor in make_weights(CONFIG).items()}
    lora = load_lora(one_lora(), config=CONFIG)
    name = "blocks.0.mlp.fc2.weight"
    merged = merge(weights, lora)[name]
    assert merged.dtype == dtype
    exact = merge({key: tensor.float() for key, tensor in weights.items()}, lora)[name]
    assert torch.equal(merged.float(), exact.to(dtype).float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_loras_of_few_bits(tmp_path, dtype):
    tensors = {key: tensor.to(dtype) for key, tensor in one_lora(dora_scale=torch.rand(48, 1) + 1).items()}
    save_file(tensors, tmp_path / "few.safetensors")
    exact = load_lora({key: tensor.float() for key, tensor in tensors.items()}, config=CONFIG)
    found = read_lora(tmp_path / "few.safetensors", CONFIG)
    same_weights(merge(make_weights(CONFIG), found), merge(make_weights(CONFIG), exact), atol=0, rtol=0)
    matrices = {"lokr_w1": torch.ones(4, 4).to(dtype), "lokr_w2": torch.ones(12, 12).to(dtype)}
    whole = {f"base_model.model.blocks.0.attn.proj.{name}": matrix for name, matrix in matrices.items()}
    found = load_lora(whole, {"r": 8, "alpha": 4}, config=CONFIG)
    assert next(iter(found.factors.values())).delta(torch.ones(48, 48)).unique().tolist() == [0.5]


def test_a_row_of_zeros_stays_one_under_dora():
    weights = {name: torch.zeros_like(tensor) for name, tensor in make_weights(CONFIG).items()}
    tensors = one_lora(lora_magnitude_vector=torch.ones(48))
    tensors = {key: torch.zeros_like(value) if "lora_B" in key else value for key, value in tensors.items()}
    assert not merge(weights, load_lora(tensors, config=CONFIG))["blocks.0.mlp.fc2.weight"].any()


# -- what is no PixArt LoRA, and what is left over --------------------------------------------------------------------


def test_every_key_without_a_place_is_named():
    strange = {
        **one_lora("transformer."),
        **one_lora("transformer.", "transformer_blocks.7.ff.net.2"),  # deeper than the model
        **one_lora("transformer.", "single_transformer_blocks.0.attn.to_q"),
        "transformer.transformer_blocks.1.ff.net.2.lora_A.weight": torch.ones(2, 192),  # half of a pair
        "transformer.proj_out.bias": torch.ones(32),
        "transformer.proj_out.alpha": torch.tensor(3.0),
        "lora_te_encoder_block_0_layer_0_SelfAttention_q.lora_down.weight": torch.ones(2, 8),
    }
    lora = load_lora(strange, config=CONFIG)
    assert lora.matched == 2
    assert set(lora.unmatched) | set(lora.text_encoder) == set(strange) - set(one_lora("transformer."))
    text = describe_lora(lora)
    assert all(key in text for key in strange if key not in one_lora("transformer."))
    assert "keys: 2 of 10 matched, on 1 weights" in text


def test_what_is_told_of_a_lora():
    text = describe_lora(load_lora({**one_lora(), **one_lora(module="transformer_blocks.1.ff.net.2", rank=2)}))
    for line in ("kind: LoRA", "names: PEFT", "rank: 2 to 4", "alpha: 8 (PEFT's default", "keys: 4 of 4 matched"):
        assert line in text


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({}, "No key of this LoRA is a PixArt's: got 0 keys such as none"),
        (
            {"lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q.lora_up.weight": torch.ones(8, 2)},
            "No key of this LoRA is a PixArt's: got 1 keys such as 'lora_unet_down_blocks",
        ),
        ({"lora_te_encoder_block_0.lora_up.weight": torch.ones(8, 2)}, "LoRA of a text encoder alone.*onto the CLIP"),
        (
            {key: value[..., :24] for key, value in one_lora().items()},
            r"width mismatch at 'blocks\.0\.mlp\.fc2\.weight': got a change of shape \(48, 24\), expected \(48, 192\)",
        ),
        (
            {key: value[:3] if "lora_A" in key else value for key, value in one_lora().items()},
            "got factors that do not belong together",
        ),
        (one_lora(lora_magnitude_vector=torch.ones(7)), "width mismatch.*got 7 magnitudes, expected"),
        ({"blocks.0.attn.proj.lokr_w1": torch.ones(5, 5), "blocks.0.attn.proj.lokr_w2": torch.ones(9, 9)}, "mismatch"),
        ({key: value.int() for key, value in one_lora().items()}, "No key"),
        ({key: value / 0 for key, value in one_lora().items()}, "Broken LoRA at 'blocks"),
        ({key: value[:0] if "lora_A" in key else value[:, :0] for key, value in one_lora().items()}, "No key"),
    ],
    ids="empty|other model|text encoder|widths|ranks|magnitudes|kronecker|integers|NaN|rank 0".split("|"),
)  # fmt: skip
def test_wrong_files_are_refused(tensors, message):
    with pytest.raises(ValueError, match=message):
        load_lora(tensors, config=CONFIG)


def test_dora_without_magnitudes_is_refused():
    with pytest.raises(ValueError, match="DoRA without its magnitudes"):
        load_lora(one_lora(), {"use_dora": True}, config=CONFIG)


def test_magnitudes_that_do_not_fit_a_vector_are_refused():
    config = tiny_config(qk_norm=True)
    tensors = {
        "blocks.0.attn.q_norm.lora_A.weight": torch.ones(2, 1),
        "blocks.0.attn.q_norm.lora_B.weight": torch.ones(config.hidden_size // config.num_heads, 2),
        "blocks.0.attn.q_norm.lora_magnitude_vector": torch.ones(7),
    }
    with pytest.raises(ValueError, match="width mismatch"):
        load_lora(tensors, config=config)


@pytest.mark.parametrize("start", ["pissa_niter_4", "olora", "corda", "lora_ga", "loftq"])
def test_adapters_that_belong_to_a_changed_base_are_refused(start):
    with pytest.raises(ValueError, match=f"LoRA of a changed base: got init_lora_weights '{start}'"):
        load_lora(one_lora(), {"init_lora_weights": start}, config=CONFIG)
    assert load_lora(one_lora(), {"init_lora_weights": "gaussian"}, config=CONFIG).factors


def test_a_lora_of_another_model_does_not_merge():
    with pytest.raises(ValueError, match=r"'blocks\.0\.mlp\.fc2\.weight': got a weight of shape \(64, 256\)"):
        merge(make_weights(tiny_config(hidden_size=64, micro_condition=False)), load_lora(one_lora()))


def test_folders_and_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="No LoRA in folder"):
        read_lora(tmp_path)
    save_file(one_lora(), tmp_path / "pytorch_lora_weights.safetensors")
    assert "PEFT's default" in read_lora(tmp_path).alpha_sources[0]
    (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": 2}), encoding="utf-8")
    for path in (tmp_path, tmp_path / "pytorch_lora_weights.safetensors"):
        assert read_lora(path).alpha_sources == ("adapter_config.json",)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": 3}), encoding="utf-8-sig")
    torch.save(one_lora(rank=3), tmp_path / "adapter_model.bin")
    assert next(iter(read_lora(tmp_path).factors.values())).scale == 1.0  # before the diffusers form beside it
    torch.save(one_lora(), tmp_path / "another.bin")
    assert "PEFT's default" in read_lora(tmp_path / "another.bin").alpha_sources[0]  # that configuration is not its
    (tmp_path / "adapter_config.json").write_text("[]", encoding="utf-8")
    with pytest.raises(ValueError, match=r"Unreadable 'adapter_config\.json'"):
        read_lora(tmp_path)
    save_file({"x": torch.ones(1)}, tmp_path / "wrong.safetensors")
    with pytest.raises(ValueError, match=r"wrong\.safetensors: No key of this LoRA"):
        read_lora(tmp_path / "wrong.safetensors")


def test_a_named_adapter_lies_in_a_folder_of_its_own(tmp_path):
    for name, alpha in (("style", 2), ("other", 3)):
        (tmp_path / name).mkdir()
        save_file(one_lora(), tmp_path / name / "adapter_model.safetensors")
        (tmp_path / name / "adapter_config.json").write_text(json.dumps({"lora_alpha": alpha}), encoding="utf-8")
        if name == "style":
            assert next(iter(read_lora(tmp_path).factors.values())).scale == 2 / 4
    assert detect_kind(tmp_path) == "lora"
    with pytest.raises(ValueError, match=r"Several LoRAs in folder .*: got other, style, expected one"):
        read_lora(tmp_path)
    assert next(iter(read_lora(tmp_path / "other").factors.values())).scale == 3 / 4


def test_what_fits_in_part_says_so_and_strict_refuses_it(tmp_path):
    strange = {"transformer.nothing.lora_A.weight": torch.ones(2, 2), "lora_te_x.alpha": torch.ones(1)}
    save_file({**one_lora("transformer."), **strange}, tmp_path / "part.safetensors")
    text = describe_lora(read_lora(tmp_path / "part.safetensors"))
    assert "loaded in part: 2 of 4 keys; what is missing changes the result" in text
    message = r"part\.safetensors: LoRA that fits only in part: got 2 of 4 keys.*transformer\.nothing.*strict off"
    with pytest.raises(ValueError, match=message):
        read_lora(tmp_path / "part.safetensors", strict=True)
    save_file(one_lora("transformer."), tmp_path / "whole.safetensors")
    lora = read_lora(tmp_path / "whole.safetensors", strict=True)
    assert "in part" not in describe_lora(lora)


@pytest.mark.parametrize(
    ("config", "missing"),
    [
        ({"modules_to_save": ["proj_out"]}, "the whole module 'proj_out'"),
        ({"bias": "all"}, "the trained biases ('all')"),
    ],
)
def test_what_the_configuration_names_and_the_file_has_not(config, missing):
    text = describe_lora(load_lora(one_lora(), config))
    assert f"loaded in part: without {missing}; what is missing changes the result" in text


@pytest.mark.parametrize(
    ("tensors", "given", "assumed"),
    [
        (one_lora(), {}, ["alpha is PEFT's default", "no rsLoRA: only adapter_config.json names it"]),
        (one_lora("transformer."), {}, ["alpha is the rank"]),
        (one_lora(), {"adapter_config": {"lora_alpha": 8}}, []),
        (one_lora(), {"alpha": 4.0}, []),
        (one_lora("transformer.", alpha=torch.tensor(4.0)), {}, []),
        (
            {f"base_model.model.blocks.0.attn.proj.lokr_w{n}": torch.ones(s, s) for n, s in ((1, 4), (2, 12))},
            {},
            ["alpha is PEFT's default", "LoKr's scale, which only adapter_config.json names"],
        ),
    ],
)
def test_what_was_assumed_is_told(tensors, given, assumed):
    lines = [line for line in describe_lora(load_lora(tensors, **given)).splitlines() if line.startswith("assumed")]
    assert lines == [f"assumed: {each}" for each in assumed]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"peft_type": "POLY"}, "no change of weights: got 'POLY'.*Use it in diffusers with PEFT itself"),
        ({"peft_type": "PSOFT"}, "its base's own weights: got 'PSOFT'.*merge_and_unload"),
        ({"peft_type": "LORA", "use_bdlora": {"nblocks": 2}}, "another construction: got use_bdlora"),
        ({"peft_type": 3}, "no change of weights: got 3"),
        ({"lora_bias": True}, r"without its biases: got lora_bias .* 'blocks\.0\.mlp\.fc2\.weight'"),
    ],
)
def test_configurations_of_another_kind_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        load_lora(one_lora(), config, config=CONFIG)


@pytest.mark.parametrize(
    ("key", "shape", "message"),
    [
        ("attn1.to_q.oft_R.weight", (4, 66), "OFT without its configuration: got no adapter_config.json"),
        ("attn1.to_q.oft_r", (4, 12, 12), "got OFT of PEFT before 0.16 without its adapter_config"),
        ("attn1.to_q.hira_A", (4, 48), "got HIRA without its adapter_config.json.*Put the file back into the folder"),
        ("attn1.to_q.hra_u", (48, 4), "HRA without its configuration"),
        ("attn1.to_q.vera_lambda_d", (4,), "got VERA without its adapter_config"),
        ("attn1.to_q.lora_A", (4, 48), "No key"),
    ],
)
def test_kinds_that_need_their_configuration_are_named(key, shape, message):
    with pytest.raises(ValueError, match=message):
        load_lora({f"base_model.model.transformer_blocks.0.{key}": torch.ones(shape)}, config=CONFIG)


def test_tensors_that_share_their_bytes_are_refused(tmp_path):
    ones = torch.ones(1)
    wide = {"down": ones.expand(10**6, 192), "up": ones.expand(48, 10**6)}
    module = "base_model.model.transformer_blocks.0.ff.net.2"
    tensors = {f"{module}.lora_{side}.weight": value for side, value in zip("AB", wide.values(), strict=True)}
    torch.save(tensors, tmp_path / "adapter_model.bin")
    with pytest.raises(ValueError, match="Repeated tensor .* got .1000000, 192. of 1 stored numbers"):
        read_lora(tmp_path, CONFIG)


@pytest.mark.parametrize("pattern", ["(.+)+!", "(?:a|a)*b", ".*.*.*.*.*!", "x" * 10**6 + "*"])
def test_patterns_that_take_hours_are_refused(pattern):
    with pytest.raises(ValueError, match="Pattern of a LoRA is refused: got '") as caught:
        matches(pattern, "blocks.27.cross_attn.kv_linear_of_a_long_name")
    assert len(str(caught.value)) < 400


def test_patterns_mean_the_end_of_a_name():
    assert matches("attn.qkv", "blocks.0.attn.qkv") and not matches("qk", "blocks.0.attn.qkv")
    assert matches(r"blocks\.\d+\.(attn|mlp)\.\w+", "x.blocks.0.attn.qkv") and not matches("(", "blocks.0")
