"""What other programs write, through the loader nodes: adapters that only PEFT can merge, and models inside files."""

import importlib
import shutil
from pathlib import Path

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("diffusers")

from pixart_pack.benchmarks.adapters import CONFIG, PACKAGE_CASES, WEIGHTS, WIDE, save_with_peft
from pixart_pack.pixart.checkpoint import to_diffusers
from pixart_pack.tests.host.test_lora_host import weights_of
from pixart_pack.tests.lora.test_reading import same_weights

pytestmark = pytest.mark.slow
ADDED, SCALED = "gralora", "hira"  # one that adds to weights, and one that multiplies them


@pytest.fixture(scope="module")
def folders(comfy, pack):
    """The host's own folders of LoRAs and of models."""
    paths = importlib.import_module("folder_paths")
    found = [Path(paths.get_folder_paths(kind)[0]) for kind in ("loras", "diffusion_models")]
    for folder in found:
        folder.mkdir(parents=True, exist_ok=True)
    return found


@pytest.fixture(scope="module")
def merged(folders):
    """{kind: what PEFT itself makes of the weights}; the adapters lie in the host's folder while these tests run."""
    places = {kind: folders[0] / f"by_peft_{kind}" for kind in (ADDED, SCALED)}
    yield {kind: save_with_peft(place, *PACKAGE_CASES[kind]) for kind, place in places.items()}
    for place in places.values():
        shutil.rmtree(place)


@pytest.fixture
def patcher(pack):
    module = importlib.import_module("pixart_pack.nodes.host.denoiser.model")
    return module.make_patcher(dict(WEIGHTS), CONFIG, torch.float32)


def read(model):
    """Its weights, less the null caption's, which adapters have no part in."""
    return {name: tensor for name, tensor in weights_of(model).items() if name in WEIGHTS}


def load(run_node, model, kind, strength):
    name = f"by_peft_{kind}/adapter_model.safetensors"
    return run_node("PixArtLoadLoRA", model=model, lora=name, strength=strength)[0]


@pytest.mark.parametrize("kind", [ADDED, SCALED])
def test_an_adapter_that_peft_merges_goes_on_and_off(run_node, merged, patcher, kind):
    same_weights(read(load(run_node, patcher, kind, 1.0)), merged[kind], **WIDE)
    same_weights(read(load(run_node, patcher, kind, 0.0)), WEIGHTS, atol=0, rtol=0)
    same_weights(read(patcher), WEIGHTS, atol=0, rtol=0)


@pytest.mark.parametrize("strengths", [(1.0, 1.0), (-1.0, 2.0), (0.5, 0.0)])
def test_two_that_peft_merges_follow_one_another(run_node, merged, patcher, strengths):
    """The second multiplies what the first has made, as when PEFT merges one after the other."""
    stacked = patcher
    for kind, strength in zip((ADDED, SCALED), strengths, strict=True):
        stacked = load(run_node, stacked, kind, strength)
    expected = {}
    for key, weight in WEIGHTS.items():
        factor = merged[SCALED][key] / weight - 1
        expected[key] = (weight + strengths[0] * (merged[ADDED][key] - weight)) * (1 + strengths[1] * factor)
    # The factor is found by dividing: small weights leave few bits of it.
    same_weights(read(stacked), expected, atol=5e-3, rtol=1e-3)


def test_a_distributed_folder_and_a_place_in_a_file_are_loaded(run_node, folders):
    models, others = folders[1], {key: tensor * 2 for key, tensor in WEIGHTS.items()}
    dcp = importlib.import_module("torch.distributed.checkpoint")
    dcp.save({"model": to_diffusers(WEIGHTS), "step": 3}, checkpoint_id=models / "by_torch_distributed", no_dist=True)
    torch.save({"one": WEIGHTS, "two": others}, models / "two_models.pth")
    usual = {"weight_dtype": "fp32", "variant": "auto", "weights": "ema"}
    model = run_node("PixArtLoadCheckpoint", checkpoint="by_torch_distributed/", **usual)[0]
    same_weights(read(model), WEIGHTS, atol=0, rtol=0)
    with pytest.raises(ValueError, match="one.*two|two.*one"):
        run_node("PixArtLoadCheckpoint", checkpoint="two_models.pth", **usual)
    for place, expected in (("one", WEIGHTS), ("two", others)):
        model = run_node("PixArtLoadCheckpoint", checkpoint="two_models.pth", **usual, place=place)[0]
        same_weights(read(model), expected, atol=0, rtol=0)
