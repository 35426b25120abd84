"""What a picture says of itself: read by a program that reads other programs' pictures, and in SwarmUI's form."""

import io
import json

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from pixart_pack.pixart.tracking.notes import FIELDS_KEY, KEY, to_fields, to_parameters

HASH = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
ENTRY = {
    "prompt": "a fox, red: and\nwhite", "negative": "blurry", "seed": 42, "steps": 20, "guidance": 4.5,
    "solver": "pixart_dpm_solver", "schedule": "pixart_uniform", "denoise": 1.0, "width": 64, "height": 32,
    "models": [
        {"name": "t5-v1_1-xxl/", "node": "PixArtLoadT5", "input": "text_encoder"},
        {"name": "big/PixArt-XL-2-1024-MS.pth", "node": "PixArtLoadCheckpoint", "input": "checkpoint", "sha256": HASH},
        {"name": "sd-vae-ft-ema.safetensors", "node": "VAELoader", "input": "vae_name"},
    ],
    "loras": [{"name": "my\\style.safetensors", "node": "PixArtLoadLoRA", "input": "lora", "strength": 0.8}],
}  # fmt: skip


def png(text: str) -> io.BytesIO:
    notes, file = PngInfo(), io.BytesIO()
    notes.add_itxt(KEY, text)
    Image.new("RGB", (8, 8)).save(file, "PNG", pnginfo=notes)
    return file


def test_a_reader_of_pictures_finds_all():
    sd_parsers = pytest.importorskip("sd_parsers", reason="needs sd-parsers: pip install sd-parsers")
    found = sd_parsers.ParserManager().parse(png(to_parameters(ENTRY, {"Reference": "a, b.png"})))
    [sampler] = found.samplers
    assert sampler.name == "pixart_dpm_solver" and sampler.model.name == "PixArt-XL-2-1024-MS"
    assert sampler.model.hash == HASH[:10]
    assert [each.value for each in found.prompts] == ["a fox, red: and\nwhite"]
    assert [each.value for each in found.negative_prompts] == ["blurry"]
    asked = {"steps": "20", "cfg_scale": "4.5", "seed": "42", "scheduler": "pixart_uniform"}
    assert sampler.parameters == asked
    told = {"Size": "64x32", "VAE": "sd-vae-ft-ema", "Lora_0 Model name": "style", "Lora_0 Strength model": "0.8"}
    assert found.metadata.items() >= {**told, "Hashes": {"model": HASH[:10]}}.items()


def test_what_is_not_known_is_left_out():
    assert to_parameters({"prompt": "a", "seed": 0, "models": [], "loras": []}) == "a\nSeed: 0"
    assert to_parameters({"denoise": 0.5}, {"Reference": "a, b"}) == '\nDenoising strength: 0.5, Reference: "a, b"'
    assert to_fields({"models": [], "loras": []})[FIELDS_KEY] == {"prompt": "", "negativeprompt": ""}


def test_the_same_in_swarmuis_form():
    told = json.loads(json.dumps(to_fields(ENTRY)))
    fields = told[FIELDS_KEY]
    assert fields == {
        "prompt": ENTRY["prompt"], "negativeprompt": "blurry", "seed": 42, "steps": 20, "cfgscale": 4.5, "width": 64,
        "height": 32, "sampler": "pixart_dpm_solver", "comfyuisampler": "pixart_dpm_solver",
        "scheduler": "pixart_uniform", "model": "big/PixArt-XL-2-1024-MS", "vae": "sd-vae-ft-ema",
        "t5xxlmodel": "t5-v1_1-xxl", "loras": ["my/style"], "loraweights": ["0.8"],
    }  # fmt: skip
    assert {(each["name"], each["param"]) for each in told["sui_models"]} >= {
        ("big/PixArt-XL-2-1024-MS.pth", "model"),
        ("my\\style.safetensors", "loras"),
    }
