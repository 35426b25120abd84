"""Conversion between layouts against the original tools, wrappers, and the detection of every variant."""

import dataclasses
import json

import pytest
import torch

from pixart_pack.pixart import CONFIGS, PixArt, PixArtConfig
from pixart_pack.pixart.checkpoint import (
    CONFIG_KEY,
    NULL_CAPTION_KEY,
    check_weights,
    config_to_tensor,
    detect_config,
    detect_layout,
    expected_shapes,
    explain_detection,
    parts_to_merge,
    split_controlnet,
    to_diffusers,
    to_original,
    unwrap,
)
from pixart_pack.pixart.weights.layouts import original_tensors
from pixart_pack.pixart.weights.wrappers import identify_pixart
from pixart_pack.tests.goldens import load_golden, take

MAPS = [
    "conversion_map_alpha_1024ms",
    "conversion_map_alpha_256",
    "conversion_map_alpha_512",
    "conversion_map_sigma_1024ms",
    "conversion_map_sigma_256",
    "conversion_map_sigma_2k",
    "conversion_map_sigma_qknorm",
]
TINY_CASES = {
    "conversion_tiny_alpha_256": {"variant": "alpha-256", "caption_length": 24},
    "conversion_tiny_alpha_1024ms": {"variant": "alpha-1024", "caption_length": 24},
    "conversion_tiny_sigma_1024": {"variant": "sigma-1024", "caption_length": 40},
}
TINY = PixArtConfig(depth=2, hidden_size=48, num_heads=4, caption_channels=32, caption_length=24)


def describe_weights(config, **extra):
    """Weights of any size without their numbers, which the meta device leaves out."""
    return {name: torch.empty(shape, device="meta") for name, shape in (expected_shapes(config) | extra).items()}


def random_weights(config, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in expected_shapes(config).items()}


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def map_golden(name):
    """(case, original shapes, diffusers shapes) of a key map."""
    case, _ = load_golden(name)
    original = {key: tuple(shape) for key, shape in case["pth_keys_not_converted"].items()}
    for entry in case["map"].values():
        original[entry["from"]] = tuple(entry.get("from_shape", entry["shape"]))
    return case, original, {key: tuple(entry["shape"]) for key, entry in case["map"].items()}


# Conversion


@pytest.mark.parametrize("name", MAPS)
def test_key_map_agrees_with_the_original_tool(name):
    case, original, diffusers = map_golden(name)
    assert (len(original), len(diffusers)) == (case["n_pth_keys"], case["n_diffusers_keys"])
    weights = {key: torch.empty(shape, device="meta") for key, shape in original.items()}
    converted = to_diffusers(weights)
    assert {key: tuple(tensor.shape) for key, tensor in converted.items()} == diffusers
    back = to_original(converted)
    kept = {key: shape for key, shape in original.items() if key not in case["pth_keys_not_converted"]}
    assert {key: tuple(tensor.shape) for key, tensor in back.items()} == kept


def test_key_map_takes_the_rows_that_the_original_tool_takes():
    case, original, _ = map_golden("conversion_map_sigma_qknorm")
    # One number per row suffices to see which rows went where, at a fortieth of the memory.
    weights = {
        key: torch.arange(shape[0], dtype=torch.float32) for key, shape in original.items() if key.endswith("bias")
    }
    for key, tensor in to_diffusers(weights).items():
        start, end = case["map"][key].get("rows", (0, tensor.shape[0]))
        assert torch.equal(tensor, torch.arange(start, end, dtype=torch.float32)), key


def test_size_embedders_convert_where_the_original_tool_gives_up():
    case, original, _ = map_golden("conversion_map_alpha_512ms_unsupported")
    converted = to_diffusers({key: torch.empty(shape, device="meta") for key, shape in original.items()})
    assert len(converted) == case["n_diffusers_keys"] + 8
    assert "adaln_single.emb.resolution_embedder.linear_1.weight" in converted


@pytest.mark.parametrize("name", TINY_CASES)
def test_numbers_agree_in_both_layouts(name):
    _, tensors = load_golden(name)
    original, diffusers = take(tensors, "weights"), take(tensors, "diffusers")
    assert same(to_diffusers(original), diffusers)
    without_null = {key: value for key, value in original.items() if key != NULL_CAPTION_KEY}
    assert same(to_original(diffusers), without_null)
    assert same(to_original(to_diffusers(original, keep_null_caption=True)), original)
    assert same(to_diffusers(to_original(diffusers)), diffusers)


@pytest.mark.parametrize("name", TINY_CASES)
@pytest.mark.parametrize("layout", ["weights", "diffusers"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
def test_forward_is_the_same_from_either_layout(name, layout, dtype):
    _, tensors = load_golden(name)
    weights = take(tensors, layout)
    model = PixArt(detect_config(weights, num_heads=4, **TINY_CASES[name])).to(dtype)
    model.load_state_dict(to_original(weights))
    inputs = {key: value if key == "mask" else value.to(dtype) for key, value in take(tensors, "input").items()}
    with torch.no_grad():
        output = model(
            inputs["x"],
            inputs["timestep"],
            inputs["y"].squeeze(1),
            inputs["mask"] != 0,
            resolution=inputs.get("img_hw"),
            aspect_ratio=inputs.get("aspect_ratio"),
        )
    assert model.has_null_caption == (layout == "weights")
    if dtype == torch.float64:
        expected = tensors["output_f64.pth_forward"].double()
        assert (output - expected).norm() / expected.norm() < 1e-6  # the reference is stored as float32: 6e-8
    else:
        expected = tensors["output.pth_forward" if layout == "weights" else "output.diffusers_forward"]
        # As in the transformer's cases: float32 rounding of the sinusoids alone is 3e-5 (see `noise` in the case).
        torch.testing.assert_close(output, expected, atol=2e-5, rtol=0)


def test_conversion_takes_either_layout_and_leaves_its_input_alone():
    original = random_weights(TINY) | {"pos_embed": torch.zeros(1, 64, 48)}
    names = list(original)
    diffusers = to_diffusers(original)
    assert same(to_diffusers(diffusers), diffusers)
    assert "pos_embed" not in to_original(original)
    assert list(original) == names and parts_to_merge(diffusers) and not parts_to_merge(original)


def test_a_merge_lets_go_of_identified_weights_and_keeps_a_callers_own():
    diffusers = to_diffusers(random_weights(TINY))
    names, weights = list(diffusers), identify_pixart({"state_dict": diffusers})
    assert same(original_tensors(weights), to_original(diffusers))
    assert not weights.tensors and list(diffusers) == names


@pytest.mark.parametrize("convert", [to_original, to_diffusers])
@pytest.mark.parametrize("layout", ["original", "diffusers"])
def test_unknown_weights_are_named(convert, layout):
    weights = random_weights(TINY) if layout == "original" else to_diffusers(random_weights(TINY))
    weights |= {"blocks.0.attn.surprise": torch.zeros(1), "transformer_blocks.0.other.weight": torch.zeros(1)}
    with pytest.raises(ValueError, match="(surprise|other.weight).*Choose"):
        convert(weights)


def test_missing_part_of_a_merged_tensor_is_named():
    weights = to_diffusers(random_weights(TINY))
    del weights["transformer_blocks.1.attn1.to_k.weight"]
    with pytest.raises(ValueError, match=r"transformer_blocks\.1\.attn1\.to_k\.weight"):
        to_original(weights)


@pytest.mark.parametrize("rows", [0, 143])
def test_rows_that_cannot_be_cut_are_named(rows):
    weights = random_weights(TINY) | {"blocks.1.attn.qkv.bias": torch.zeros(rows)}
    with pytest.raises(ValueError, match=rf"blocks\.1\.attn\.qkv\.bias.*{rows},"):
        to_diffusers(weights)


def test_parts_that_do_not_fit_together_are_named():
    weights = to_diffusers(random_weights(TINY)) | {"transformer_blocks.0.attn1.to_v.weight": torch.zeros(48, 47)}
    with pytest.raises(ValueError, match=r"blocks\.0\.attn\.qkv\.weight.*\(48, 47\)"):
        to_original(weights)


# Wrappers and layouts


@pytest.mark.parametrize(
    "prefix",
    ["", "model.", "module.", "model.diffusion_model.", "diffusion_model.", "base_model.", "module._orig_mod."],
)
def test_prefixes_come_off(prefix):
    weights = random_weights(TINY)
    prefixed = {prefix + name: tensor for name, tensor in weights.items()}
    assert same(unwrap(prefixed), weights)
    assert detect_layout({"state_dict": prefixed}) == "original"
    assert same(to_original({"state_dict": prefixed}), weights)


def test_companions_of_an_all_in_one_checkpoint_are_left_out():
    weights = random_weights(TINY)
    file = {f"model.diffusion_model.{name}": tensor for name, tensor in weights.items()}
    file |= {
        "first_stage_model.decoder.conv_in.weight": torch.zeros(1),
        "text_encoders.t5.shared.weight": torch.zeros(1),
    }
    assert same(to_original(file), weights)


def test_averaged_weights_are_preferred_but_for_the_null_caption():
    trained, averaged = random_weights(TINY, 1), random_weights(TINY, 2)
    file = {"state_dict": trained, "state_dict_ema": averaged, "epoch": 3, "optimizer": {"state": {}}}
    chosen = unwrap(file)
    assert torch.equal(chosen["t_block.1.weight"], averaged["t_block.1.weight"])
    assert torch.equal(chosen[NULL_CAPTION_KEY], trained[NULL_CAPTION_KEY])
    assert same(unwrap(file, "model"), trained)
    assert same(unwrap({"state_dict_ema": averaged}), averaged)
    with pytest.raises(ValueError, match="No trained weights"):
        unwrap({"state_dict_ema": averaged}, "model")
    with pytest.raises(ValueError, match="'best'"):
        unwrap(file, "best")


def test_what_is_no_tensor_is_left_out_of_a_bare_checkpoint():
    weights = random_weights(TINY)
    assert same(unwrap(weights | {"epoch": 3, "args": object(), 7: torch.zeros(1)}), weights)


@pytest.mark.parametrize("content", [{}, [], None, {"state_dict": {}}, {"state_dict": [1]}, {"epoch": 3}])
def test_a_file_without_weights_says_so(content):
    with pytest.raises(ValueError, match="No weights"):
        unwrap(content)


@pytest.mark.parametrize(
    ("key", "layout", "advice"),
    [
        ("transformer.transformer_blocks.0.attn1.to_q.lora_A.weight", "lora", "Load PixArt LoRA"),
        ("base_model.model.blocks.0.attn.qkv.lora_B.default.weight", "lora", "Load PixArt LoRA"),
        ("lora_transformer_transformer_blocks_0_attn1_to_q.lora_up.weight", "lora", "Load PixArt LoRA"),
        ("controlnet.0.copied_block.attn.qkv.weight", "control", "Load PixArt ControlNet"),
        ("encoder.block.0.layer.0.SelfAttention.q.weight", "T5 text encoder", "Load T5 Text Encoder"),
        ("text_model.encoder.layers.0.mlp.fc1.weight", "CLIP text encoder", "Choose a PixArt checkpoint"),
        ("decoder.conv_in.weight", "VAE", "Load VAE"),
        ("controlnet_blocks.0.transformer_block.attn1.to_q.weight", "control", "Load PixArt ControlNet"),
        ("controlnet_blocks.0.weight", "ControlNet (of another model)", "Choose a PixArt checkpoint"),
        ("control_model.input_hint_block.0.weight", "ControlNet (of another model)", "Choose a PixArt checkpoint"),
        ("model.diffusion_model.input_blocks.0.0.weight", "UNet (Stable Diffusion)", "Choose a PixArt checkpoint"),
        ("double_blocks.0.img_attn.qkv.weight", "Flux", "Choose a PixArt checkpoint"),
        ("joint_blocks.0.x_block.attn.qkv.weight", "Stable Diffusion 3", "Choose a PixArt checkpoint"),
        ("y_embedder.embedding_table.weight", "DiT", "Choose a PixArt checkpoint"),
        ("something.else", "unknown", "Choose a PixArt-alpha or PixArt-Sigma checkpoint"),
    ],
)
def test_other_kinds_of_files_are_told_and_refused(key, layout, advice):
    weights = {key: torch.zeros(1)}
    assert detect_layout(weights) == layout
    for use in (to_original, to_diffusers, detect_config):
        with pytest.raises(ValueError, match=f"Not a PixArt model.*{advice}"):
            use(weights)


def test_controlnet_file_is_parted():
    base = random_weights(TINY)
    control = {"0.copied_block.attn.qkv.weight": torch.ones(2), "0.before_proj.bias": torch.zeros(2)}
    file = {f"base_model.{name}": tensor for name, tensor in base.items()}
    file |= {f"controlnet.{name}": tensor for name, tensor in control.items()}
    assert detect_layout({"state_dict": file}) == "controlnet"
    with pytest.raises(ValueError, match="Load PixArt ControlNet"):
        to_original(file)
    found_base, found_control = split_controlnet({"state_dict": file})
    assert same(found_base, base) and same(found_control, control)
    assert split_controlnet(control)[0] == {}
    with pytest.raises(ValueError, match="Not a PixArt ControlNet: got a PixArt model"):
        split_controlnet(base)


# Detection


@pytest.mark.parametrize("variant", CONFIGS)
def test_every_released_original_file_is_recognised_by_its_weights(variant):
    config = CONFIGS[variant]
    weights = describe_weights(config, pos_embed=(1, config.base_size**2, config.hidden_size))
    assert detect_config(weights) == config
    assert explain_detection({"state_dict": weights}).variant == variant


# What the released config.json files hold of the fields that matter (early files leave out the last two).
RELEASED_CONFIGS = {
    "alpha-256": {"sample_size": 32},
    "alpha-512": {"sample_size": 64},
    "alpha-1024": {"sample_size": 128},
    "sigma-256": {"sample_size": 32, "interpolation_scale": 0.5, "use_additional_conditions": False},
    "sigma-512": {"sample_size": 64, "interpolation_scale": 1, "use_additional_conditions": False},
    "sigma-1024": {"sample_size": 128, "interpolation_scale": 2, "use_additional_conditions": False},
    "sigma-2048": {"sample_size": 256, "interpolation_scale": 4, "use_additional_conditions": False},
}


@pytest.mark.parametrize("variant", CONFIGS)
def test_every_released_diffusers_folder_is_recognised(variant):
    weights = to_diffusers(describe_weights(CONFIGS[variant]))
    model_config = {"num_attention_heads": 16, **RELEASED_CONFIGS[variant]}
    assert detect_config(weights, model_config=model_config) == CONFIGS[variant]
    nulls = {"interpolation_scale": None, "use_additional_conditions": None}
    vae_config = {"scaling_factor": CONFIGS[variant].vae_scale}
    detection = explain_detection(weights, model_config=nulls | model_config, vae_config=vae_config)
    assert detection.config == CONFIGS[variant] and detection.layout == "diffusers"


@pytest.mark.parametrize(
    ("name", "variant"),
    [
        ("diffusion_models/PixArt-Sigma-XL-2-2K-MS.safetensors", "sigma-2048"),
        ("PixArt-alpha--PixArt-Sigma-XL-2-512-MS/transformer", "sigma-512"),
        ("PixArt-XL-2-256x256-MSCOCO-FID732.pth", "alpha-256"),
        ("pixart_sigma_1024px_fp16.safetensors", "sigma-1024"),
        ("my-pixart-alpha-512.safetensors", "alpha-512"),
        ("pixart_sigma_2k.safetensors", "sigma-2048"),
    ],
)
def test_file_name_is_the_last_resort(name, variant):
    weights = to_diffusers(describe_weights(dataclasses.replace(CONFIGS[variant], micro_condition=False)))
    detection = explain_detection(weights, name=name)
    assert detection.variant == variant
    assert detection.signs["family"] == detection.signs["base_size"] == "file name"


def test_stronger_signs_overrule_the_name_and_say_so():
    config = CONFIGS["alpha-512"]
    weights = describe_weights(config, pos_embed=(1, 1024, 1152))
    detection = explain_detection(weights, name="PixArt-Sigma-XL-2-2K-MS.pth")
    assert detection.config == config
    assert detection.signs["family"] == "learned null caption of 120 tokens"
    assert detection.signs["base_size"] == "stored position grid"
    assert detection.conflicts == ("file name says sigma",)


def test_everything_can_be_overridden():
    weights = to_diffusers(describe_weights(CONFIGS["sigma-1024"]))
    detection = explain_detection(weights, variant="alpha-256", pe_scale=1.5, num_heads=8)
    assert detection.config == dataclasses.replace(CONFIGS["alpha-256"], pe_scale=1.5, num_heads=8)
    assert detection.signs["pe_scale"] == detection.signs["family"] == "chosen by you"
    with pytest.raises(ValueError, match="Unknown variant: got 'beta-9'"):
        detect_config(weights, variant="beta-9")
    with pytest.raises(ValueError, match="Unknown settings: got heads"):
        detect_config(weights, heads=3)


def test_deeper_sigma_of_42_layers():
    config = dataclasses.replace(CONFIGS["sigma-1024"], depth=42)
    weights = describe_weights(config, pos_embed=(1, 4096, 1152))
    assert detect_config(weights) == config
    assert detect_config(to_diffusers(weights), name="pixart-sigma-900M-1024.safetensors") == config


@pytest.mark.parametrize(
    "changes",
    [
        {"qk_norm": True},
        {"kv_compress_ratio": 2, "kv_compress_layers": (1, 2)},
        {"learn_sigma": False},
        {"patch_size": 4, "base_size": 32},
        {"in_channels": 16},
        {"mlp_ratio": 100 / 72},
        {"hidden_size": 128, "num_heads": 2, "mlp_ratio": 2.5},
        {"hidden_size": 576, "num_heads": 8},
        {"micro_condition": False},
    ],
)
def test_shapes_tell_the_rest(changes):
    fields = {"depth": 3, "hidden_size": 144, "num_heads": 2, "caption_channels": 32, "micro_condition": False}
    config = PixArtConfig(**(fields | changes))
    weights = describe_weights(config, pos_embed=(1, config.base_size**2, config.hidden_size))
    assert detect_config(weights) == config
    with_null = to_diffusers(weights, keep_null_caption=True)
    assert detect_config(with_null, model_config={"sample_size": 128, "interpolation_scale": 2}) == config
    model = PixArt(config, device="meta")
    assert {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()} == expected_shapes(config)


def test_saved_configuration_says_what_shapes_cannot():
    config = dataclasses.replace(TINY, base_size=8, pe_scale=0.25, vae_scale=0.7, num_heads=8)
    weights = random_weights(config)
    text = json.dumps(dataclasses.asdict(config))
    assert detect_config(weights, metadata={CONFIG_KEY: text}) == config
    carried = {f"model.diffusion_model.{name}": tensor for name, tensor in weights.items()}
    carried[f"model.diffusion_model.{CONFIG_KEY}"] = config_to_tensor(config)
    assert detect_config(carried) == config
    assert same(to_original(carried), weights)


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '{"num_heads": "4"}',
        '{"base_size": -1}',
        '{"pe_scale": NaN}',
        '{"depth": 1%s}' % ("0" * 400),
        "[" * 9999,
    ],
)
def test_unreadable_saved_configuration_is_refused(text):
    with pytest.raises(ValueError, match="Unreadable saved configuration"):
        detect_config(random_weights(TINY), metadata={CONFIG_KEY: text})


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("x_embedder.proj.weight", None, "x_embedder.proj.weight"),
        ("x_embedder.proj.weight", torch.zeros(48), "x_embedder.proj.weight.*4 dimensions"),
        ("final_layer.linear.weight", torch.zeros(20, 48), "final_layer.linear.weight"),
        ("blocks.7.mlp.fc1.bias", torch.zeros(192), "Blocks are missing: got 3 of them up to number 7"),
        ("blocks.0.mlp.fc1.weight", None, "blocks.0.mlp.fc1.weight"),
    ],
)
def test_detection_names_what_is_wrong(name, value, message):
    weights = {**random_weights(TINY), name: value}
    with pytest.raises(ValueError, match=message):
        detect_config({key: tensor for key, tensor in weights.items() if tensor is not None})


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("t_block.1.bias", None, "missing 't_block.1.bias'"),
        ("extra.weight", torch.zeros(1), "unknown 'extra.weight'"),
        ("blocks.1.attn.proj.weight", torch.zeros(48, 47), r"'blocks.1.attn.proj.weight': got \(48, 47\)"),
        ("t_block.1.bias", torch.zeros(288, dtype=torch.int64), "t_block.1.bias.*int64"),
    ],
)
def test_check_names_what_is_wrong(name, value, message):
    weights = {**random_weights(TINY), name: value}
    with pytest.raises(ValueError, match=message):
        check_weights({key: tensor for key, tensor in weights.items() if tensor is not None}, TINY)


def test_check_allows_the_learned_null_to_be_missing():
    weights = random_weights(TINY)
    del weights[NULL_CAPTION_KEY]
    check_weights(weights | {"pos_embed": torch.zeros(1, 4, 48)}, TINY)
    check_weights({name: tensor.to(torch.float8_e4m3fn) for name, tensor in weights.items()}, TINY)
