"""Sampling without ComfyUI: captions are read once, and what comes out is what reading them at each step gives."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from pixart_pack.pixart.commands.sample import add_loras
from pixart_pack.pixart.lora import LowRank, merge, read_lora, save_lora
from pixart_pack.pixart.sampling import Captions, GuidedModel, Settings, sample_latents
from pixart_pack.tests.tiny_pixart import make_model, make_weights, tiny_config

CONFIG = tiny_config("alpha-1024")


def captions(*lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return Captions.of([torch.randn(length, CONFIG.caption_channels, generator=generator) for length in lengths])


@pytest.fixture
def reads():
    """A model, and a list that grows whenever one of its blocks reads a caption."""
    model, calls = make_model(CONFIG), []
    for block in model.blocks:
        block.cross_attn.kv_linear.register_forward_hook(lambda *_: calls.append(1))
    return model, calls


@pytest.mark.parametrize("guidance", [1.0, 4.5])
def test_captions_are_read_once(reads, guidance):
    model, calls = reads
    given = (captions(7, 4), captions(1, 1, seed=1), 72, 104, [5, 6], Settings(steps=3, guidance=guidance))
    kept = sample_latents(model, *given, keep=True)
    assert len(calls) == CONFIG.depth
    exact = sample_latents(model, *given)
    assert len(calls) == CONFIG.depth * (1 + 3)
    torch.testing.assert_close(kept, exact, atol=1e-4, rtol=1e-5)  # float32 noise of three steps


def test_memory_for_captions_is_bounded(reads, monkeypatch):
    model, calls = reads
    monkeypatch.setattr("pixart_pack.pixart.sampling.KEPT_KEYS_BYTES", 1000)
    sample_latents(model, captions(7), captions(1), 64, 64, [5], Settings(steps=3), keep=True)
    assert len(calls) == CONFIG.depth * 3


@pytest.mark.parametrize("guidance", [1.0, 4.5])
def test_a_step_waits_for_no_device(guidance):
    """Tensors without numbers refuse to be read: what runs on them copies nothing from a device."""
    model = make_model(CONFIG).to("meta")
    both = [Captions(each.states.to("meta"), each.mask.to("meta")) for each in (captions(7), captions(3))]
    guided = GuidedModel(model, *both, guidance, 3)
    x = torch.zeros(1, 4, 16, 12, device="meta")
    for _ in range(2):
        assert guided(x, torch.zeros(1, device="meta")).shape == x.shape


@pytest.mark.parametrize(("lengths", "guidance", "masked"), [((7, 7), 4.5, 0), ((7, 3), 4.5, 1), ((7, 3), 1.0, 0)])
def test_captions_with_nothing_to_hide_get_no_mask(lengths, guidance, masked):
    seen, model = [], make_model(CONFIG)
    attend = model.attention
    model.attention = lambda *given, mask=None: seen.append(mask is not None) or attend(*given, mask=mask)
    positive, negative = (captions(length) for length in lengths)
    sample_latents(model, positive, negative, 64, 64, [5], Settings(steps=1, guidance=guidance))
    assert seen == [False, bool(masked)] * CONFIG.depth


def test_the_model_is_told_the_size_in_pixels():
    model, caption = make_model(CONFIG), captions(5)
    x, sigma = torch.randn(1, 4, 9, 13, generator=torch.Generator().manual_seed(1)), torch.tensor([2.0])
    seen = []
    model.register_forward_hook(lambda _, given, out: seen.append((given, out)))
    with torch.no_grad():
        GuidedModel(model, caption, caption, 1.0)(x, sigma)
        (latent, time, *_), found = seen[0]
        size, ratio = torch.tensor([[72.0, 104.0]]), torch.tensor([[72 / 104]])
        assert torch.equal(model(latent, time, caption.states, None, size, ratio), found)


def test_loras_are_merged_one_after_another(tmp_path, capsys):
    weights, factor = make_weights(CONFIG), LowRank(torch.ones(2, 48), torch.ones(48, 2))
    save_lora(tmp_path / "one.safetensors", {"blocks.0.attn.proj": factor})
    path = str(tmp_path / "one.safetensors")
    found = add_loras(weights, CONFIG, [path, f"{path}:-0.5"], strict=True)
    expected = merge(weights, read_lora(path), 0.5)
    name = "blocks.0.attn.proj.weight"
    torch.testing.assert_close(found[name], expected[name])
    assert not torch.equal(found[name], weights[name])
    assert "note: one.safetensors: kind: LoRA" in capsys.readouterr().err
    save_file({**load_file(path), "transformer.nothing.lora_A.weight": torch.ones(2, 2)}, path)
    add_loras(weights, CONFIG, [path], strict=False)
    assert "loaded in part: 3 of 4 keys; what is missing changes the result" in capsys.readouterr().err
    with pytest.raises(ValueError, match="fits only in part"):
        add_loras(weights, CONFIG, [path], strict=True)
    with pytest.raises(FileNotFoundError, match="No LoRA: got .*nowhere"):
        add_loras(weights, CONFIG, ["nowhere.safetensors:1"], strict=True)
