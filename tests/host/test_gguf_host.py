"""GGUF in ComfyUI's own classes: packed in memory, the same numbers as the plain model, patched like any other."""

import importlib
import re
from pathlib import Path

import gguf
import pytest
import torch

from pixart_pack.pixart.lora import Target, relative
from pixart_pack.pixart.text import load_tokenizer, tokenize
from pixart_pack.pixart.weights.quantised.gguf_file import llama_name
from pixart_pack.pixart.weights.t5 import read_encoder
from pixart_pack.tests.gguf_files import matrices, write_gguf
from pixart_pack.tests.tiny_pixart import make_weights, tiny_config
from pixart_pack.tests.tiny_t5 import make_t5, weights_of

NOISE = 1e-5  # float32 of two implementations
CONFIG = tiny_config("sigma-1024", hidden_size=64, caption_channels=32)
LAYER = "diffusion_model.blocks.1.attn.qkv.weight"
TABLE = "diffusion_model.blocks.0.scale_shift_table.weight"


def folder_of(kind):
    folder = Path(importlib.import_module("folder_paths").get_folder_paths(kind)[0])
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture(scope="module")
def encoder_file(pack):
    """(the file, transformers' T5 of its numbers)."""
    model = make_t5(d_model=32, d_ff=64)
    path = folder_of("text_encoders") / "t5_tiny_q8_0.gguf"
    write_gguf(path, {llama_name(name): weight for name, weight in weights_of(model).items()}, matrices("Q8_0"))
    model.load_state_dict(read_encoder(path, torch.float32)[0], strict=False)
    yield path, model
    path.unlink()


@pytest.fixture(scope="module")
def expected(encoder_file, comfyui):
    return states_of(encoder_file[1], comfyui)


def states_of(model, comfyui):
    vocabulary = comfyui / "comfy" / "text_encoders" / "t5_tokenizer"
    ids, mask = tokenize("a red ball", load_tokenizer(vocabulary), 40)
    with torch.inference_mode():
        return model(input_ids=ids[:, : int(mask.sum())]).last_hidden_state


def encode(run_node, clip, text="a red ball"):
    return run_node("PixArtTextEncode", clip=clip, text=text)[0][0][0]


@pytest.mark.parametrize("device", ["default", "cpu"])
def test_a_text_encoder(run_node, pack, encoder_file, expected, device):
    options = importlib.import_module("pixart_pack.nodes.host.text.t5").list_text_encoders()
    assert encoder_file[0].name in options
    (clip,) = run_node("PixArtLoadT5", text_encoder=encoder_file[0].name, device=device)
    torch.testing.assert_close(encode(run_node, clip), expected, atol=NOISE, rtol=0)
    layers = clip.cond_stage_model.t5xxl.transformer
    assert layers.shared.weight.dtype == layers.encoder.block[0].layer[0].SelfAttention.q.weight.dtype == torch.uint8
    assert clip.patcher.model_size() < 1.1 * encoder_file[0].stat().st_size
    taken = importlib.import_module("pixart_pack.nodes.host.text.t5").take_t5(clip)
    torch.testing.assert_close(encode(run_node, taken), expected, atol=NOISE, rtol=0)


@pytest.mark.parametrize("how", [{"full_load": True}, {"lowvram_model_memory": 1}])
def test_a_lora_on_a_packed_encoder(run_node, encoder_file, expected, how):
    (clip,) = run_node("PixArtLoadT5", text_encoder=encoder_file[0].name)
    layer = "encoder.block.0.layer.1.DenseReluDense.wo"
    down, up = torch.randn(2, 64, generator=torch.Generator().manual_seed(0)), torch.full((32, 2), 0.1)
    factors = {f"text_encoders.t5xxl.transformer.{layer}.lora_down.weight": down,
               f"text_encoders.t5xxl.transformer.{layer}.lora_up.weight": up}  # fmt: skip
    _, patched = importlib.import_module("comfy.sd").load_lora_for_models(None, clip, factors, 1.0, 1.0)
    weight = clip.cond_stage_model.t5xxl.transformer.get_submodule(layer)
    clip.patcher.unpatch_model()  # the host loads it at once where there is no other device, and notes that
    for module in clip.patcher.model.modules():
        vars(module).pop("prev_comfy_cast_weights", None)
    patched.patcher.load(torch.device("cpu"), **how)
    assert weight.is_packed() == ("lowvram_model_memory" in how)
    found = weight._numbers(torch.device("cpu"), torch.float32)
    plain = encoder_file[1].get_submodule(layer).weight
    torch.testing.assert_close(found, plain + up @ down, atol=2e-3, rtol=1e-3)  # fp16 while it is changed
    patched.patcher.unpatch_model()
    assert weight.is_packed()
    torch.testing.assert_close(encode(run_node, clip), expected, atol=NOISE, rtol=0)


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_a_text_encoder_that_another_program_quantised(run_node, pack, comfyui, tmp_path, kind):
    functional = importlib.import_module("bitsandbytes.functional")
    model, stored = make_t5(d_model=32, d_ff=64), {}
    plain = {name: weight.clone() for name, weight in weights_of(model).items()}
    for name, weight in list(plain.items()):
        stored[name] = weight
        if kind == "int8" and "DenseReluDense" in name:
            codes, largest, _ = functional.int8_vectorwise_quant(weight.half())
            stored |= {name: codes, name.replace("weight", "SCB"): largest}
            plain[name] = functional.int8_vectorwise_dequant(codes, largest)
        if kind == "nf4" and name.endswith("wo.weight"):  # of 64 columns, one block each
            codes, state = functional.quantize_4bit(weight, quant_type="nf4")
            stored |= {name: codes, **{f"{name}.{part}": value for part, value in state.as_dict(packed=True).items()}}
            plain[name] = functional.dequantize_4bit(codes, state)
    importlib.import_module("safetensors.torch").save_file(stored, tmp_path / f"t5_{kind}.safetensors")
    model.load_state_dict(plain, strict=False)
    t5 = importlib.import_module("pixart_pack.nodes.host.text.t5")
    clip = t5.load_t5(tmp_path / f"t5_{kind}.safetensors")
    assert re.fullmatch(rf"The weights stay packed \({kind}\): 4\.\d MiB in memory\.", t5.remark_on(clip))
    assert clip.cond_stage_model.t5xxl.transformer.encoder.block[0].layer[1].DenseReluDense.wo.is_packed()
    torch.testing.assert_close(encode(run_node, clip), states_of(model, comfyui), atol=NOISE, rtol=0)


@pytest.fixture(scope="module")
def model_file(pack):
    path = folder_of("diffusion_models") / "pixart_sigma_1024_q8_0.gguf"
    write_gguf(path, make_weights(CONFIG), matrices("Q8_0"), "pixart")
    yield path
    path.unlink()


def predict(model):
    generator = torch.Generator().manual_seed(1)
    latent, caption = torch.randn(1, 4, 8, 6, generator=generator), torch.randn(1, 5, 32, generator=generator)
    with torch.inference_mode():
        return model.model.diffusion_model(latent, torch.tensor([500.0]), caption)


def load(run_node, name, dtype="default"):
    return run_node("PixArtLoadCheckpoint", checkpoint=name, weight_dtype=dtype)[0]


def test_a_transformer(run_node, model_file):
    packed, plain = load(run_node, model_file.name), load(run_node, model_file.name, "fp32")
    assert packed.model.diffusion_model.blocks[0].attn.qkv.weight.dtype == torch.uint8
    assert plain.model.diffusion_model.blocks[0].attn.qkv.weight.dtype == torch.float32
    assert packed.model_size() < plain.model_size() / 2
    # Tables and norms are fp16 beside packed weights, of values up to 0.3.
    torch.testing.assert_close(predict(packed), predict(plain), atol=2e-3, rtol=0)
    (text,) = run_node("PixArtModelInfo", model=packed)
    assert "weights: GGUF Q8_0" in text, text
    parameters = sum(weight.numel() for weight in make_weights(CONFIG).values())
    assert f"{parameters / 1e6:.1f} M parameters" in text


def test_patches_streamed_weights_and_saving(run_node, model_file):
    patch = {LAYER: (torch.full((192, 64), 0.02),), TABLE: (torch.full((6, 64), 0.1),)}
    predictions = []
    for how in ({"full_load": True}, {"lowvram_model_memory": 1}):
        model = load(run_node, model_file.name).clone()
        model.add_patches(patch, 1.0)
        model.load(torch.device("cpu"), **how)
        predictions.append(predict(model))
        model.unpatch_model()
    plain = load(run_node, model_file.name, "fp32").clone()
    plain.add_patches(patch, 1.0)
    plain.load(torch.device("cpu"), full_load=True)
    for found in predictions:
        torch.testing.assert_close(found, predict(plain), atol=2e-3, rtol=0)
    assert (predictions[0] - predict(load(run_node, model_file.name))).abs().max() > 0.01
    (path,) = run_node(
        "PixArtSaveCheckpoint", model=load(run_node, model_file.name), filename_prefix="gguf", layout="original (.pth)"
    )
    saved = importlib.import_module("pixart_pack.pixart.weights.reading").read_tensors(
        Path(importlib.import_module("folder_paths").get_output_directory()) / Path(path).name
    )[0]
    stored = next(tensor for tensor in gguf.GGUFReader(model_file).tensors if tensor.name == "blocks.0.mlp.fc1.weight")
    numbers = torch.from_numpy(gguf.quants.dequantize(stored.data, stored.tensor_type))
    torch.testing.assert_close(saved["blocks.0.mlp.fc1.weight"].float(), numbers, atol=1e-3, rtol=1e-3)


def plain_weights(path):
    """The numbers of a GGUF file, as its package reads them."""
    return {
        each.name: torch.from_numpy(gguf.quants.dequantize(each.data, each.tensor_type).copy())
        for each in gguf.GGUFReader(path).tensors
    }


def read_saved(prefix):
    tensors = importlib.import_module("safetensors.torch").load_file
    (path,) = Path(importlib.import_module("folder_paths").get_output_directory()).rglob(f"{prefix}_*.safetensors")
    saved = tensors(path)
    path.unlink()
    return saved


HALF = {"atol": 1e-3, "rtol": 1e-3}  # fp16, in which packed weights are saved


@pytest.mark.parametrize("changed", [False, True])
def test_the_hosts_own_nodes_save_numbers(run_node, core_nodes, model_file, changed):
    model = load(run_node, model_file.name).clone()
    expected = plain_weights(model_file)
    if changed:
        model.add_patches({LAYER: (torch.full((192, 64), 0.02),)}, 1.0)
        expected["blocks.1.attn.qkv.weight"] += 0.02
    run_node("ModelSave", model=model, filename_prefix="packed_model")
    saved = read_saved("packed_model")
    for name, weight in expected.items():
        found = saved[f"model.diffusion_model.{name}"]
        assert found.is_floating_point()
        torch.testing.assert_close(found.float(), weight, **HALF)
    # With little memory the host loads a part, and patches what is read.
    model.unpatch_model()
    model.load(torch.device("cpu"), lowvram_model_memory=1)
    with torch.inference_mode():
        streamed = model.model_state_dict_for_saving(model.model.diffusion_model, "diffusion_model.")
    torch.testing.assert_close(
        streamed["blocks.1.attn.qkv.weight"].float(), expected["blocks.1.attn.qkv.weight"], **HALF
    )


@pytest.mark.parametrize("changed", [False, True])
def test_the_hosts_own_node_saves_a_text_encoder(run_node, core_nodes, encoder_file, changed):
    (clip,) = run_node("PixArtLoadT5", text_encoder=encoder_file[0].name)
    layer = "encoder.block.0.layer.1.DenseReluDense.wo.weight"
    expected = {name: weight.detach().clone() for name, weight in encoder_file[1].state_dict().items()}
    if changed:
        clip = clip.clone()
        clip.add_patches({f"t5xxl.transformer.{layer}": (torch.full((32, 64), 0.02),)}, 1.0)
        expected[layer] += 0.02
    run_node("CLIPSave", clip=clip, filename_prefix="packed_clip")
    saved = read_saved("packed_clip_t5xxl")
    for name in (layer, "shared.weight", "encoder.block.0.layer.0.SelfAttention.q.weight"):
        torch.testing.assert_close(saved[name].float(), expected[name], **HALF)


def test_the_hosts_own_nodes_merge(run_node, core_nodes, model_file, encoder_file):
    packed, plain = load(run_node, model_file.name), load(run_node, model_file.name, "fp32")
    changed = plain.clone()
    changed.add_patches({LAYER: (torch.full((192, 64), 0.05),)}, 1.0)
    for first, second in ((packed, changed), (changed, packed), (packed, packed.clone())):
        (merged,) = run_node("ModelMergeSimple", model1=first, model2=second, ratio=0.5)
        expected = plain.clone()
        share = 0.0 if changed not in (first, second) else 0.025
        expected.add_patches({LAYER: (torch.full((192, 64), share),)}, 1.0)
        predictions = []
        for each in (merged, expected):
            each.load(torch.device("cpu"), full_load=True)
            predictions.append(predict(each))
            each.unpatch_model()
        torch.testing.assert_close(*predictions, atol=2e-3, rtol=0)
    (clip,) = run_node("PixArtLoadT5", text_encoder=encoder_file[0].name)
    (merged,) = run_node("CLIPMergeSimple", clip1=clip, clip2=clip.clone(), ratio=0.3)
    before = encode(run_node, clip)
    torch.testing.assert_close(encode(run_node, merged), before, atol=1e-2, rtol=0)  # fp16 while it is merged


def test_a_lora_that_is_made_of_its_base(run_node, model_file):
    lora = importlib.import_module("pixart_pack.nodes.host.lora")
    target = Target("blocks.0.attn.proj.weight")
    weight = plain_weights(model_file)[target.name]
    left, sizes, right = torch.linalg.svd(weight)
    factor = relative.Started(right[:3].clone(), left[:, :3] * 1.1, sizes[:3].clone(), target, alpha=2.0)
    patched = lora.add_lora(load(run_node, model_file.name), {target: factor}, 0.7)
    found = lora.patched_weight(patched.get_key_patches(), lora.host_key(target.name), torch.device("cpu"))
    torch.testing.assert_close(found, factor.bound(weight).apply(weight, 0.7), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("mode", ["MinVram", "MaxSpeed"])
def test_hooks_of_loras_change_packed_weights(run_node, core_nodes, comfy, model_file, mode):
    """A LoRA by a hook for one prompt alone: as on plain weights, and the packed ones are there again afterwards."""
    hooks = importlib.import_module("comfy.hooks")
    down, up = torch.randn(2, 64, generator=torch.Generator().manual_seed(3)) * 0.1, torch.full((192, 2), 0.1)
    factors = {"diffusion_model.blocks.1.attn.qkv.lora_down.weight": down,
               "diffusion_model.blocks.1.attn.qkv.lora_up.weight": up}  # fmt: skip
    group = hooks.create_hook_lora(lora=factors, strength_model=1.0, strength_clip=0.0)
    changed = plain_weights(model_file)["blocks.1.attn.qkv.weight"] + up @ down
    model = load(run_node, model_file.name).clone()
    model.set_hook_mode(getattr(hooks.EnumHookMode, mode))
    layer = model.model.diffusion_model.blocks[1].attn.qkv
    before = predict(model)
    model.register_all_hook_patches(group, hooks.create_target_dict(hooks.EnumWeightTarget.Model))
    for _ in range(2):  # the second time from what the host keeps
        with torch.inference_mode():
            model.apply_hooks(group)
        assert not layer.is_packed()
        torch.testing.assert_close(layer.weight.float(), changed, **HALF)
        with torch.inference_mode():
            model.apply_hooks(None)
        assert layer.is_packed()
        torch.testing.assert_close(predict(model), before, atol=0, rtol=0)


def test_a_sampler_runs(run_node, core_nodes, comfy, model_file):
    model = load(run_node, model_file.name)
    sampling = importlib.import_module("comfy.sample")
    latent = torch.zeros(1, 4, 8, 8)
    entry = [torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(2)), {"pooled_output": None}]
    noise = sampling.prepare_noise(latent, 5)
    with torch.inference_mode():
        found = [
            sampling.sample(each, noise, 2, 4.5, "euler", "simple", [entry], [entry], latent)
            for each in (model, load(run_node, model_file.name, "fp32"))
        ]
    # fp16 tables and biases, multiplied by the first sigma of 157 and guidance.
    assert torch.nn.functional.cosine_similarity(found[0].flatten(), found[1].flatten(), dim=0) > 0.999


def test_hostile_files_are_refused_by_the_nodes(run_node, model_file, encoder_file):
    for kind, node, name in (
        ("diffusion_models", "PixArtLoadCheckpoint", "checkpoint"),
        ("text_encoders", "PixArtLoadT5", "text_encoder"),
    ):
        path = folder_of(kind) / "damaged.gguf"
        path.write_bytes(model_file.read_bytes()[:700])
        with pytest.raises(ValueError, match=r"damaged\.gguf"):
            run_node(node, **{name: path.name})
        path.unlink()
    copy = folder_of("text_encoders") / "a_transformer.gguf"
    copy.write_bytes(model_file.read_bytes())
    with pytest.raises(ValueError, match="got .*PixArt.* in a_transformer.gguf, expected a T5"):
        run_node("PixArtLoadT5", text_encoder=copy.name)
    copy.unlink()
