"""A CLIP and a MODEL that another pack keeps in GGUF's blocks, in this pack's nodes."""

import importlib
from types import SimpleNamespace

import pytest
import torch

from pixart_pack.pixart.weights.quantised.gguf_file import hugging_face_name, llama_name
from pixart_pack.pixart.weights.t5 import read_encoder
from pixart_pack.tests.gguf_files import matrices, write_gguf
from pixart_pack.tests.tiny_pixart import make_weights, tiny_config
from pixart_pack.tests.tiny_t5 import make_t5, weights_of

CONFIG = tiny_config("sigma-1024", hidden_size=64, caption_channels=32)
HALF = 1e-2  # such packs multiply scales and numbers in fp16
LAYER = "encoder.block.0.layer.1.DenseReluDense.wo"


@pytest.fixture(scope="module")
def other_pack(pack):
    """(a file's tensors by that pack, its operations, its patcher)."""
    module = importlib.import_module("pixart_pack.tests.host.foreign_gguf")
    return module.read, module.Operations, module.Patcher


@pytest.fixture(scope="module")
def encoder(other_pack, tmp_path_factory):
    """(the CLIP, transformers' T5 of its numbers)."""
    read, operations, patcher = other_pack
    sd, pixart_t5 = (importlib.import_module(f"comfy.{name}") for name in ("sd", "text_encoders.pixart_t5"))
    ours = importlib.import_module("pixart_pack.nodes.host.text.t5")
    path, model = tmp_path_factory.mktemp("gguf") / "t5.gguf", make_t5(d_model=32, d_ff=64)
    write_gguf(path, {llama_name(name): weight for name, weight in weights_of(model).items()}, matrices("Q8_0"))
    numbers, config = read_encoder(path, torch.float32)
    model.load_state_dict(numbers, strict=False)
    tokenizer = ours._make_tokenizer(None, config, path.name)
    clip = sd.CLIP(
        SimpleNamespace(params={}, clip=pixart_t5.pixart_te(), tokenizer=lambda **_: tokenizer),
        state_dict=[read(path, hugging_face_name)],
        model_options={
            "custom_operations": operations,
            "initial_device": torch.device("cpu"),
            "t5xxl_model_config": config,
        },
    )
    clip.patcher = patcher.clone(clip.patcher)
    return clip, model


def encode(run_node, clip):
    return run_node("PixArtTextEncode", clip=clip, text="a red ball")[0][0][0]


def states_of(model, comfyui):
    text = importlib.import_module("pixart_pack.pixart.text")
    tokenizer = text.load_tokenizer(comfyui / "comfy" / "text_encoders" / "t5_tokenizer")
    ids, mask = text.tokenize("a red ball", tokenizer, 40)
    with torch.inference_mode():
        return model(input_ids=ids[:, : int(mask.sum())]).last_hidden_state


def test_its_clip_gives_the_states_of_its_numbers(run_node, encoder, comfyui):
    clip, model = encoder
    expected = states_of(model, comfyui)
    torch.testing.assert_close(encode(run_node, clip), expected, atol=HALF, rtol=0)
    (alone,) = run_node("PixArtT5FromClip", clip=clip)
    torch.testing.assert_close(encode(run_node, alone), expected, atol=HALF, rtol=0)


def test_a_lora_on_its_clip(run_node, encoder, comfyui):
    clip, model = encoder
    before = encode(run_node, clip)
    down, up = torch.randn(2, 64, generator=torch.Generator().manual_seed(0)), torch.full((32, 2), 0.05)
    factors = {f"text_encoders.t5xxl.transformer.{LAYER}.lora_down.weight": down,
               f"text_encoders.t5xxl.transformer.{LAYER}.lora_up.weight": up}  # fmt: skip
    _, patched = importlib.import_module("comfy.sd").load_lora_for_models(None, clip, factors, 1.0, 1.0)
    weight = model.get_submodule(LAYER).weight
    with torch.no_grad():
        weight += up @ down
        expected = states_of(model, comfyui)
        weight -= up @ down
    assert (expected - before).abs().max() > 0.1
    torch.testing.assert_close(encode(run_node, patched), expected, atol=HALF, rtol=0)
    torch.testing.assert_close(encode(run_node, clip), before, atol=0, rtol=0)


@pytest.fixture(scope="module")
def make_model(other_pack, tmp_path_factory):
    """A function that gives ComfyUI's own PixArt, over blocks or over their numbers."""
    read, operations, patcher = other_pack
    supported = importlib.import_module("comfy.supported_models")
    path = tmp_path_factory.mktemp("gguf") / "pixart.gguf"
    weights = {name: weight for name, weight in make_weights(CONFIG).items() if name != "pos_embed"}
    write_gguf(path, weights, lambda name, tensor: None if "y_embedding" in name else matrices("Q8_0")(name, tensor))
    sizes = {"num_heads": CONFIG.num_heads, "patch_size": 2, "hidden_size": 64, "in_channels": 4, "input_size": 4}
    sizes |= {"depth": CONFIG.depth, "caption_channels": 32, "model_max_length": 300, "micro_condition": False}

    def make(packed):
        config = supported.PixArtSigma({"image_model": "pixart_sigma", "dtype": torch.float32, **sizes})
        config.custom_operations = operations if packed else None
        model = config.get_model({}, "", device=torch.device("cpu"))
        numbers = read(path) if packed else plain_weights(path)
        model.load_model_weights(numbers, "")
        whole = importlib.import_module("comfy.model_patcher").ModelPatcher
        loaded = whole(model, load_device=torch.device("cpu"), offload_device=torch.device("cpu"))
        return patcher.clone(loaded) if packed else loaded

    return make


def plain_weights(path):
    gguf = importlib.import_module("gguf")
    return {
        each.name: torch.from_numpy(gguf.quants.dequantize(each.data, each.tensor_type).copy())
        for each in gguf.GGUFReader(path).tensors
    }


def test_its_model_in_the_sampling_nodes(run_node, make_model):
    sampling = importlib.import_module("comfy.sample")
    latent, generator = torch.zeros(1, 4, 40, 40), torch.Generator().manual_seed(2)  # the least that it takes
    positive, negative = ([[torch.randn(1, 5, 32, generator=generator), {"pooled_output": None}]] for _ in range(2))
    found = []
    for packed in (True, False):
        (model,) = run_node("PixArtGuidanceInterval", model=make_model(packed), start_percent=0.0, end_percent=0.5)
        (sigmas,) = run_node("PixArtScheduler", model=model, schedule="uniform", steps=3)[:1]
        noise = sampling.prepare_noise(latent, 5)
        sampler = importlib.import_module("comfy.samplers").sampler_object("euler")
        with torch.inference_mode():
            found.append(sampling.sample_custom(model, noise, 4.5, sampler, sigmas, positive, negative, latent))
    assert torch.isfinite(found[0]).all()
    assert torch.nn.functional.cosine_similarity(found[0].flatten(), found[1].flatten(), dim=0) > 0.999


@pytest.mark.parametrize(
    "node, inputs",
    [
        ("PixArtBlockCache", {}),
        ("PixArtCompile", {}),
        ("PixArtKVCompression", {}),
        ("PixArtSaveCheckpoint", {"filename_prefix": "other"}),
    ],
)
def test_nodes_that_need_this_packs_model_name_the_loader(run_node, make_model, node, inputs):
    with pytest.raises(ValueError, match="ComfyUI's own PixArt.*Load PixArt Checkpoint.*GGUF"):
        run_node(node, **{**defaults_of(node), **inputs, "model": make_model(True)})


def defaults_of(node):
    inputs = importlib.import_module("nodes").NODE_CLASS_MAPPINGS[node].INPUT_TYPES()
    every = {**inputs["required"], **inputs.get("optional", {})}
    options = {name: each[1] for name, each in every.items() if len(each) > 1}
    return {
        name: each.get("default", each.get("options", [None])[0]) for name, each in options.items() if name != "model"
    }
