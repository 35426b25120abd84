"""No step in ComfyUI waits for the GPU by the pack's doing, whatever is combined; the dials do so to decide, once."""

import importlib

import pytest
import torch

from pixart_pack.demo.train import VAE_FILE
from pixart_pack.pixart.weights.controlnets import ControlNetCheckpoint
from pixart_pack.samplers import SAMPLERS
from pixart_pack.samplers.presets import PRESETS
from pixart_pack.tests.host.test_controlnet_host import COPIES, control_weights
from pixart_pack.tests.host.test_model import CONFIG, caption
from pixart_pack.tests.tiny_pixart import make_weights
from pixart_pack.tests.watch import watch_steps

STEPS = 5
PROMPTS = [caption(12, 1, keep=9)], [caption(3, 2)]
SHORT = {"dmd": 1, "lcm": 4}  # schedules that know other counts alone
RUNS = {name: (name, {"dmd": "dmd", "lcm": "lcm"}.get(name, "uniform"), {}) for name in SAMPLERS}
RUNS |= {name: (preset.sampler, preset.schedule, preset.options) for name, preset in PRESETS.items()}


@pytest.fixture(scope="module")
def host(pack):
    """A function that gives a module of nodes.host."""
    return lambda name: importlib.import_module(f"pixart_pack.nodes.host.{name}")


@pytest.fixture(scope="module")
def patcher(host):
    return host("denoiser.model").make_patcher(make_weights(CONFIG), CONFIG, dtype=torch.float32)


@pytest.fixture
def watched(comfy, host, patcher, monkeypatch):
    """A function that samples, and tells what was waited for in the steps: watched(model, prompts, ...) -> Watch."""
    # Rows are compared on a CPU alone, where that costs nothing.
    monkeypatch.setattr("pixart_pack.pixart.transformer.common_row", lambda values: values)
    watch, comfy_sample = watch_steps(monkeypatch), importlib.import_module("comfy.sample")

    def run(model=patcher, prompts=None, name="dpm_solver", schedule="uniform", options=None, batch=2, **settings):
        watch.found.clear()
        watch.others.clear()
        sampling = host("denoiser.sampling")
        levels = sampling.make_sigmas(schedule, SHORT.get(schedule, STEPS), settings.pop("denoise", 1.0))
        latent = settings.pop("latent", torch.zeros(batch, 4, 9, 13))
        noise = comfy_sample.prepare_noise(latent, 5)
        with torch.inference_mode():
            found = comfy_sample.sample_custom(
                model, noise, 4.5, sampling.make_sampler(name, **(options or {})), levels,
                *(prompts or PROMPTS), latent, disable_pbar=True, seed=5, **settings,
            )  # fmt: skip
        assert found.isfinite().all()
        return watch

    return run


@pytest.mark.parametrize("run", RUNS)
def test_solvers_and_presets(watched, run):
    name, schedule, options = RUNS[run]
    assert watched(name=name, schedule=schedule, options=options).found == []


def test_pictures_as_a_start_and_masks(watched):
    latent, mask = torch.randn(4, 4, 9, 13), torch.zeros(1, 1, 9, 13)
    mask[..., 5:] = 1.0
    for name in ("dpm_solver", "sa_solver"):
        assert watched(name=name, latent=latent, denoise=0.6, noise_mask=mask).found == []


def test_regions_and_parts_of_the_sampling(watched):
    """The host asks for the time of a prompt's part; the pack for nothing."""
    area = [caption(5, 3)[0], {"area": (4, 6, 2, 3), "strength": 0.7}]
    masked = [caption(8, 4)[0], {"mask": torch.rand(1, 9, 13), "mask_strength": 1.0}]
    late = [caption(7, 5)[0], {"start_percent": 0.5, "end_percent": 1.0}]
    assert watched(prompts=([caption(12, 1, keep=9), area, masked, late], [caption(3, 2)])).found == []


def steer(host, start=0.0, end=1.0):
    """The prompts with a ControlNet."""
    weights = control_weights(CONFIG)
    checkpoint = ControlNetCheckpoint("edges", weights, CONFIG, COPIES, None, None)
    control = host("controlnet").make_control(checkpoint, torch.float32)
    vae, hint = host("loading").read_vae(VAE_FILE), torch.rand(1, 72, 104, 3).round()
    return host("controlnet").apply_control(*PROMPTS, control, hint, vae, 0.8, start, end)


def test_control_adds_no_waiting(watched, host):
    """Not even the host's, which looks at the time where control may begin late or end early."""
    without = len(watched().others)
    controlled = watched(prompts=steer(host))
    assert (controlled.found, len(controlled.others)) == ([], without)
    part = watched(prompts=steer(host, end=0.5))
    assert part.found == [] and len(part.others) > without


def test_weights_that_are_patched(watched, patcher):
    model = patcher.clone()
    model.add_patches({"diffusion_model.blocks.1.attn.qkv.weight": (torch.full((144, 48), 0.02),)}, 0.7)
    assert watched(model).found == []


def test_dials_that_need_not_decide(watched, host, patcher):
    compressed = host("denoiser.acceleration").compress_attention(patcher, 2, "all", 0.0, 1.0)
    assert watched(compressed).found == []


def test_dials_decide_once_an_evaluation(watched, host, patcher):
    dials = host("denoiser.acceleration")
    intervals = {
        "guidance": dials.limit_guidance(patcher, 0.3, 1.0),
        "compression": dials.compress_attention(patcher, 2, "all", 0.3, 1.0),
    }
    for model in intervals.values():
        assert [name for name, _ in watched(model).found] == ["item"] * STEPS
    cache = dials.cache_blocks(patcher, 1e9, 1, 0, 0.0, 1.0, 2)
    # Steps 2 and 3 reuse the first, and 5 the fourth: they read the time and the change. Others have nothing to ask.
    assert len(watched(cache).found) == 2 * 3
