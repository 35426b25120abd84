"""ControlNet files in every layout that they are published in: read, told apart, converted both ways, written."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from pixart_pack.pixart.checkpoint import (
    control_to_diffusers,
    control_to_original,
    detect_layout,
    split_controlnet,
    to_diffusers,
    to_original,
)
from pixart_pack.pixart.controlnet import PixArtControlNet
from pixart_pack.pixart.weights.controlnets import expected_control_shapes, read_controlnet, save_controlnet
from pixart_pack.tests.goldens import load_golden, take
from pixart_pack.tests.tiny_pixart import make_weights, tiny_config

CONFIG = tiny_config()


def make_control(config=CONFIG, num_copies=2, seed=3):
    generator = torch.Generator().manual_seed(seed)
    control = PixArtControlNet(config, num_copies, device="meta")
    return {name: torch.randn(like.shape, generator=generator) for name, like in control.state_dict().items()}


def combined(config=CONFIG, num_copies=2):
    base = {f"base_model.{name}": tensor for name, tensor in make_weights(config).items()}
    return base | make_control(config, num_copies)


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=0)


@pytest.mark.parametrize("config", [CONFIG, tiny_config(qk_norm=True), tiny_config("sigma-512")])
def test_conversion_is_exact_both_ways(config):
    control = make_control(config)
    theirs = control_to_diffusers(control)
    assert "controlnet_blocks.0.before_proj.weight" in theirs
    assert "controlnet_blocks.1.transformer_block.attn1.to_q.weight" in theirs
    assert "controlnet_blocks.1.transformer_block.scale_shift_table" in theirs
    assert detect_layout(theirs) == "control"
    assert_same(control_to_original(theirs), control)
    assert_same(control_to_diffusers(theirs), theirs)
    bare = {name.removeprefix("controlnet."): tensor for name, tensor in control.items()}
    assert_same(control_to_original(bare), control)


@pytest.mark.peer
def test_diffusers_names_are_those_of_its_own_blocks():
    """The names of BasicTransformerBlock, out of which diffusers' ControlNet is made."""
    attention = pytest.importorskip("diffusers.models.attention")
    width, heads = CONFIG.hidden_size, CONFIG.num_heads
    block = attention.BasicTransformerBlock(
        width, heads, width // heads, cross_attention_dim=width, activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000, attention_bias=True, norm_type="ada_norm_single", norm_elementwise_affine=False,
    )  # fmt: skip
    stem = "controlnet_blocks.1.transformer_block."
    theirs = control_to_diffusers(make_control())
    ours = {name.removeprefix(stem): tensor.shape for name, tensor in theirs.items() if name.startswith(stem)}
    assert ours == {name: tensor.shape for name, tensor in block.state_dict().items()}


@pytest.mark.parametrize("wrap", [lambda w: w, lambda w: {"state_dict": w}, lambda w: {f"module.{k}": w[k] for k in w}])
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_official_file_is_parted(tmp_path, wrap, suffix):
    path, weights = tmp_path / f"PixArt-XL-2-1024-ControlNet.{suffix}", wrap(combined())
    if suffix == "pth":
        torch.save(weights, path)
    elif "state_dict" in weights:
        pytest.skip("safetensors has no wrappers")
    else:
        save_file(weights, path)
    found = read_controlnet(path)
    assert found.num_copies == 2 and found.family == "alpha"
    assert found.base.config == found.config and found.config.base_px == 1024
    assert_same(found.base.state_dict, make_weights(CONFIG))
    assert_same(found.state_dict, make_control())
    PixArtControlNet(found.config, found.num_copies).load_state_dict(found.state_dict)


def test_the_originals_own_file(tmp_path):
    _, tensors = load_golden("controlnet_half_512")
    weights = take(tensors, "weights")
    torch.save({"state_dict": weights, "epoch": 1}, tmp_path / "epoch_1_step_2.pth")
    found = read_controlnet(tmp_path / "epoch_1_step_2.pth")
    assert found.num_copies == 1 and found.base.config.depth == 3
    assert not found.config.micro_condition and found.config.base_size == 16  # by the stored position grid
    assert_same(found.state_dict, {f"controlnet.{n}": t for n, t in take(weights, "controlnet").items()})


def test_a_combined_file_in_diffusers_names(tmp_path):
    weights = {f"transformer.{name}": t for name, t in to_diffusers(make_weights(CONFIG)).items()}
    weights |= {f"controlnet.{name}": t for name, t in control_to_diffusers(make_control()).items()}
    assert detect_layout(weights) == "controlnet"
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, tmp_path / "both.safetensors")
    found = read_controlnet(tmp_path / "both.safetensors")
    assert_same(found.state_dict, make_control())
    expected = to_original(make_weights(CONFIG))
    del expected["y_embedder.y_embedding"]
    assert_same(found.base.state_dict, expected)


def test_control_weights_alone_tell_their_blocks(tmp_path):
    config = tiny_config(qk_norm=True, mlp_ratio=3.0, depth=6)
    save_file(make_control(config, 4), tmp_path / "edges.safetensors")
    found = read_controlnet(tmp_path / "edges.safetensors")
    assert found.num_copies == 4 and found.base is None and found.family is None
    for field in ("hidden_size", "qk_norm", "mlp_ratio"):
        assert getattr(found.config, field) == getattr(config, field)


@pytest.mark.parametrize(
    ("name", "family"), [("pixart-sigma-edges", "sigma"), ("PixArt-XL-2-512-ControlNet", "alpha"), ("edges", None)]
)
def test_family_of_control_weights_alone(tmp_path, name, family):
    save_file(make_control(), tmp_path / f"{name}.safetensors")
    assert read_controlnet(tmp_path / f"{name}.safetensors").family == family


@pytest.mark.parametrize("variant", ["alpha-1024", "sigma-512"])
@pytest.mark.parametrize("layout", ["original", "diffusers"])
@pytest.mark.parametrize("name", ["edges.safetensors", "edges.pth", "edges"])
def test_saved_files_are_read_again(tmp_path, variant, layout, name):
    config = tiny_config(variant, num_heads=2)
    control = make_control(config)
    save_controlnet(tmp_path / name, control, config, layout, metadata={"author": "me"})
    found = read_controlnet(tmp_path / name)
    assert_same(found.state_dict, control)
    assert found.config == config and found.num_copies == 2
    assert found.family == variant.split("-")[0]
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_folder_is_what_diffusers_writes(tmp_path):
    config = tiny_config("sigma-512")
    save_controlnet(tmp_path / "edges", make_control(config), config, dtype=torch.bfloat16)
    described = json.loads((tmp_path / "edges" / "config.json").read_text())
    assert described["_class_name"] == "PixArtSigmaControlNetAdapterModel"
    assert (described["num_layers"], described["num_attention_heads"], described["attention_head_dim"]) == (2, 4, 12)
    tensors = load_file(tmp_path / "edges" / "diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    with pytest.raises(ValueError, match="Folder is not empty"):
        save_controlnet(tmp_path / "edges", make_control(config), config)
    # What others write has no configuration of ours: family and heads are then in config.json.
    save_file(tensors, tmp_path / "edges" / "diffusion_pytorch_model.safetensors")
    found = read_controlnet(tmp_path / "edges")
    assert found.family == "sigma" and found.config.num_heads == 4


def test_base_and_control_in_one_file(tmp_path):
    save_controlnet(tmp_path / "both.pth", make_control(), CONFIG, base=make_weights(CONFIG))
    found = read_controlnet(tmp_path / "both.pth")
    assert found.base.config == CONFIG
    assert_same(found.base.state_dict, make_weights(CONFIG))
    assert_same(found.state_dict, make_control())
    with pytest.raises(ValueError, match="No room for the base model"):
        save_controlnet(tmp_path / "x.pth", make_control(), CONFIG, "diffusers", base=make_weights(CONFIG))
    assert not (tmp_path / "x.pth").exists()


def test_wrong_files_say_what_they_are(tmp_path):
    def read(weights, name="file.safetensors"):
        save_file(weights, tmp_path / name)
        return read_controlnet(tmp_path / name)

    with pytest.raises(ValueError, match=r"file\.safetensors: Not a PixArt ControlNet: got a PixArt model.*Checkpoint"):
        read(make_weights(CONFIG))
    with pytest.raises(ValueError, match="got ControlNet .of another model. weights.*Choose a PixArt ControlNet"):
        read(
            {
                "control_model.input_hint_block.0.weight": torch.zeros(2),
                "control_model.input_blocks.0.0.weight": torch.zeros(2),
            }
        )
    with pytest.raises(ValueError, match="got a LoRA"):
        read({"blocks.0.attn.qkv.lora_A.weight": torch.zeros(2)})
    with pytest.raises(ValueError, match="missing '1.after_proj.bias'"):
        read({name: t for name, t in make_control().items() if name != "controlnet.1.after_proj.bias"})
    with pytest.raises(ValueError, match="'controlnet.0.middle_proj.weight'"):
        read(make_control() | {"controlnet.0.middle_proj.weight": torch.zeros(2)})
    with pytest.raises(ValueError, match=r"blocks\.0\.attn\.odd"):
        read(make_control() | {"controlnet.0.copied_block.attn.odd": torch.zeros(2)})
    with pytest.raises(ValueError, match=r"Wrong tensor '0.after_proj.bias': got \(2,\)"):
        read(make_control() | {"controlnet.0.after_proj.bias": torch.zeros(2)})
    with pytest.raises(ValueError, match=r"got 3 over a base of 3 blocks, expected 1 to 2"):
        extra = {name.replace("controlnet.1.", "controlnet.2."): t for name, t in make_control().items()}
        read(combined() | extra)
    with pytest.raises(FileNotFoundError, match="File not found"):
        read_controlnet(tmp_path / "nowhere.pth")
    with pytest.raises(ValueError, match="Not a PixArt ControlNet"):
        split_controlnet(make_weights(CONFIG))


def test_expected_shapes_are_the_modules():
    config = tiny_config(qk_norm=True, kv_compress_ratio=2, kv_compress_layers=(1, 2))
    control = PixArtControlNet(config, 2)
    shapes = {name.removeprefix("controlnet."): tuple(t.shape) for name, t in control.state_dict().items()}
    assert expected_control_shapes(config, 2) == shapes
