"""Which kernel each attention gets on a GPU, by what PyTorch's rules look at; docs/speed.md says the same."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pixart_pack.pixart.config import CONFIGS
from pixart_pack.pixart.controlnet import PixArtControlNet
from pixart_pack.pixart.layers import LENGTH_STEPS
from pixart_pack.pixart.sampling import Captions, GuidedModel
from pixart_pack.pixart.transformer import PixArt
from pixart_pack.tests.attention_backends import ALONE, ALONE_LARGE, COMFYUI, chosen, is_read_in_place, watch_attention

SPEED = Path(__file__).resolve().parents[2] / "docs" / "speed.md"
COMPRESSED = {"qk_norm": True, "kv_compress_ratio": 2, "kv_compress_layers": (0, 1)}
MODELS = {"alpha": CONFIGS["alpha-1024"], "Sigma, compressed": replace(CONFIGS["sigma-1024"], **COMPRESSED)}
KERNELS = {80: ALONE, 90: ALONE_LARGE, 120: ALONE}


def calls(monkeypatch, lengths, dtype=torch.bfloat16, config=MODELS["alpha"], cfg=4.5, latent=(64, 64)):
    """What two blocks and a ControlNet with heads of the released width ask for, on tensors without numbers."""
    config = replace(config, depth=2, hidden_size=144, num_heads=2, caption_channels=64)
    model = PixArt(config, dtype=dtype, device="meta").requires_grad_(False)
    control = PixArtControlNet(config, num_copies=1, dtype=dtype, device="meta").requires_grad_(False)
    seen = watch_attention(monkeypatch)
    positive, negative = (
        Captions(torch.empty(1, n, 64, dtype=dtype, device="meta"), torch.empty(1, n, dtype=torch.bool, device="meta"))
        for n in lengths
    )
    monkeypatch.setattr("pixart_pack.pixart.layers.LENGTH_STEPS", {"meta": LENGTH_STEPS["cuda"]})
    monkeypatch.setattr("pixart_pack.pixart.sampling.whole", lambda mask: lengths[0] == lengths[1])
    guided = GuidedModel(model, positive, negative, cfg)
    x = torch.empty(2 if guided.is_guided else 1, 4, *latent, dtype=dtype, device="meta")
    residuals = control.attach(model, x)
    model(x, torch.empty(1, device="meta"), guided.caption, guided.mask, control=residuals)
    self_attention, cross = seen[0::2], seen[1::2]
    assert len(self_attention) == len(cross) == 3
    return self_attention, cross


CASES = {
    "self-attention": (0, (120, 20), 4.5),
    "captions of one length, or a single one": (1, (37, 37), 4.5),
    "captions of different length": (1, (120, 19), 4.5),
    "a caption of one token, without guidance": (1, (1, 1), 1.0),
}
EXPECTED = {
    "self-attention": ("flash", "cuDNN", "flash", "flash"),
    "captions of one length, or a single one": ("flash", "cuDNN", "flash", "flash"),
    "captions of different length": ("efficient", "cuDNN", "efficient", "cuDNN"),
    "a caption of one token, without guidance": ("flash", "flash", "flash", "flash"),
}


@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("case", CASES)
def test_each_attention_gets_the_fastest_kernel_there_is(case, config, monkeypatch):
    which, lengths, cfg = CASES[case]
    for call in calls(monkeypatch, lengths, config=config, cfg=cfg)[which]:
        alone = [chosen(call, capability, order) for capability, order in KERNELS.items()]
        host = {chosen(call, capability, COMFYUI) for capability in KERNELS}
        assert (*alone, *host) == EXPECTED[case]
        assert call.width == 72 and is_read_in_place(call)


@pytest.mark.parametrize("case", CASES)
def test_the_page_on_speed_says_so(case):
    alone, large, _, host = EXPECTED[case]
    assert f"| {case} | {alone} | {large} | {host} |" in SPEED.read_text(encoding="utf-8")


def test_float32_is_memory_efficient_everywhere(monkeypatch):
    for call in sum(calls(monkeypatch, (120, 19), torch.float32), []):
        assert {chosen(call, capability, order) for capability, order in KERNELS.items()} == {"efficient"}
        assert is_read_in_place(call)


@pytest.mark.parametrize(
    "lengths, expected", [((3, 9), 32), ((33, 1), 64), ((64, 2), 64), ((300, 120), 320), ((37, 37), 37)]
)
def test_lengths_under_a_mask_are_rounded_up_where_each_is_a_plan(lengths, expected, monkeypatch):
    for call in calls(monkeypatch, lengths)[1]:
        assert call.k.shape[2] == expected and (call.mask is None) == (lengths[0] == lengths[1])
