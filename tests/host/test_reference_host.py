"""A reference picture in the host: what it is without the host, alone, in batches, with ControlNet, LoRA and CFG."""

import importlib

import pytest
import torch

from pixart_pack.demo.train import VAE_FILE
from pixart_pack.pixart.reference.attention import Reference, ReferencedModel
from pixart_pack.pixart.reference.pictures import fit_reference
from pixart_pack.tests.host.test_controlnet_host import apply, control_weights
from pixart_pack.tests.host.test_model import caption, sample
from pixart_pack.tests.tiny_pixart import make_model, make_weights, tiny_config

CONFIG = tiny_config("alpha-512", depth=4, base_size=8)
NOISE = 2e-3  # cfg 4.5 and sigma 157 multiply the network's float32 noise in the first step


@pytest.fixture(scope="module")
def host_model(pack):
    return importlib.import_module("pixart_pack.nodes.host.denoiser.model")


@pytest.fixture(scope="module")
def patcher(host_model):
    return host_model.make_patcher(make_weights(CONFIG), CONFIG, dtype=torch.float32)


@pytest.fixture(scope="module")
def vae(pack):
    return importlib.import_module("pixart_pack.nodes.host.loading").read_vae(VAE_FILE)


def image(seed=0, batch=1, size=(96, 128)):
    return torch.rand(batch, *size, 3, generator=torch.Generator().manual_seed(seed))


PROMPTS = {"positive": caption(12, 1, keep=10), "negative": caption(3, 2)}


@pytest.fixture
def referenced(run_node, patcher, vae):
    """A function that puts a reference on the MODEL."""

    def put(model=None, picture=None, strength=1.0, start=0.0, end=1.0, seed=0):
        fields = {"strength": strength, "start_percent": start, "end_percent": end, "seed": seed}
        picture = image() if picture is None else picture
        return run_node("PixArtReference", model=model or patcher, image=picture, vae=vae, **fields)[0]

    return put


@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_each_evaluation_is_the_one_without_the_host(comfy, patcher, vae, referenced, strength):
    extension, seen = importlib.import_module("comfy.patcher_extension"), []
    model = patcher.clone()

    def note(executor, x, timesteps, context, control, options, **conds):
        out = executor(x, timesteps, context, control, options, **conds)
        seen.append((x, timesteps, context, conds["attention_mask"], out))
        return out

    model.add_wrapper_with_key(extension.WrappersMP.DIFFUSION_MODEL, "note", note)  # around the reference's
    sample(comfy, referenced(model, strength=strength), size=(8, 8), **PROMPTS)
    with torch.inference_mode():
        pixels = fit_reference(image().movedim(-1, 1), CONFIG.base_px).movedim(1, -1)
        latent = vae.encode(pixels) * CONFIG.vae_scale
        plain = ReferencedModel(make_model(CONFIG), Reference.of(latent, strength=strength))
        assert seen
        for x, timesteps, context, mask, out in seen:
            expected = plain(x, timesteps, context, mask)[:, :4]
            torch.testing.assert_close(out, expected, rtol=1e-4, atol=2e-5)  # float32 sums in another order


def test_off_is_the_model_and_the_range_holds(comfy, patcher, referenced):
    plain = sample(comfy, patcher, **PROMPTS)
    assert torch.equal(sample(comfy, referenced(strength=0.0), **PROMPTS), plain)
    whole = sample(comfy, referenced(), **PROMPTS)
    part = sample(comfy, referenced(end=0.4), **PROMPTS)
    assert (whole - plain).abs().max() > 10 * NOISE
    assert (part - plain).abs().max() > 10 * NOISE and (part - whole).abs().max() > 10 * NOISE
    with pytest.raises(ValueError, match="Empty interval"):
        referenced(start=0.5, end=0.5)


def test_a_batch_is_its_pictures_alone(comfy, referenced):
    """Of one seed, each picture with its own reference."""
    pictures = image(batch=2) * torch.tensor([0.1, 1.0]).reshape(2, 1, 1, 1)  # a dark one, and a bright one
    together = sample(comfy, referenced(picture=pictures), batch=2, **PROMPTS)
    first = sample(comfy, referenced(picture=pictures[:1]), batch=2, **PROMPTS)
    second = sample(comfy, referenced(picture=pictures[1:]), batch=2, **PROMPTS)
    torch.testing.assert_close(together[0], first[0], rtol=1e-4, atol=NOISE)
    torch.testing.assert_close(together[1], second[1], rtol=1e-4, atol=NOISE)
    assert (first[1] - second[1]).abs().max() > 10 * NOISE


def test_two_references_add_up_in_either_order(comfy, referenced):
    one, other = image(1), image(2)
    chained = sample(comfy, referenced(referenced(picture=one), picture=other), **PROMPTS)
    turned = sample(comfy, referenced(referenced(picture=other), picture=one), **PROMPTS)
    alone = sample(comfy, referenced(picture=one), **PROMPTS)
    torch.testing.assert_close(chained, turned, rtol=1e-4, atol=NOISE)
    assert (chained - alone).abs().max() > 10 * NOISE


def test_with_a_lora_and_a_controlnet(comfy, pack, patcher, vae, referenced, tmp_path):
    """A changed weight and a control each change the referenced picture, and the reference the changed one."""
    controls = importlib.import_module("pixart_pack.nodes.host.controlnet")
    saving = importlib.import_module("pixart_pack.pixart.weights.controlnets")
    saving.save_controlnet(tmp_path / "edges.safetensors", control_weights(CONFIG), CONFIG)
    control = controls.make_control(saving.read_controlnet(tmp_path / "edges.safetensors"), torch.float32)
    steered = dict(zip(PROMPTS, apply(controls, control, vae, conds=tuple(PROMPTS.values())), strict=True))
    lora = patcher.clone()
    change = torch.randn(144, 48, generator=torch.Generator().manual_seed(4)) * 0.1
    lora.add_patches({"diffusion_model.blocks.1.attn.qkv.weight": ("diff", (change,))})
    plain = sample(comfy, referenced(), **PROMPTS)
    for model, given in ((lora, PROMPTS), (patcher, steered), (lora, steered)):
        found = sample(comfy, referenced(model), **given)
        assert torch.isfinite(found).all()
        assert (found - plain).abs().max() > 10 * NOISE
        assert (found - sample(comfy, model, **given)).abs().max() > 10 * NOISE


def test_with_the_block_cache_nothing_is_remembered_of_the_reference(comfy, run_node, patcher, referenced):
    cached, *_ = run_node("PixArtBlockCache", model=patcher, threshold=0.0)
    exact = sample(comfy, referenced(), steps=4, **PROMPTS)
    torch.testing.assert_close(sample(comfy, referenced(cached), steps=4, **PROMPTS), exact, rtol=1e-4, atol=NOISE)
    loose, *_ = run_node("PixArtBlockCache", model=patcher, threshold=2.0, start_percent=0.0)
    assert torch.isfinite(sample(comfy, referenced(loose), steps=4, **PROMPTS)).all()
