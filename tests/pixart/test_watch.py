"""No step waits for the GPU: the model and every solver on tensors that have a device, a type and a shape alone."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from pixart_pack.pixart.controlnet import PixArtControlNet
from pixart_pack.pixart.layers import common_row
from pixart_pack.pixart.transformer import PixArt
from pixart_pack.samplers import SAMPLERS
from pixart_pack.samplers.noise import SampleNoise
from pixart_pack.samplers.presets import PRESETS
from pixart_pack.samplers.schedules import schedule_sigmas, timesteps_from_sigmas
from pixart_pack.tests.tiny_pixart import tiny_config
from pixart_pack.tests.watch import Watch, watch_steps

pytestmark = pytest.mark.slow  # half a minute, all together

SCHEDULES = {"iddpm": "iddpm", "ddim": "ddim", "lcm": "lcm", "dmd": "dmd"}
OPTIONS = {
    "sa_solver": [{}, {"mode": "PECE", "few_steps": True}, {"tau": 0.0, "predictor_order": 4}],
    "dpm_solver": [{"order": 1}, {"order": 2}, {"order": 3}],
    "iddpm": [{}, {"clip_denoised": True}],
    "ddim": [{"eta": 1.0}, {}],
}
RUNS = [
    *[(name, SCHEDULES.get(name, "uniform"), options) for name in SAMPLERS for options in OPTIONS.get(name, [{}])],
    *[(preset.sampler, preset.schedule, preset.options) for preset in PRESETS.values()],
]


def make_denoiser(config, controlled):
    """(model(x, sigma), a function that gives the variance channels) on a GPU that is not there."""
    net = PixArt(config, dtype=torch.bfloat16, device="cuda").requires_grad_(False)
    control = PixArtControlNet(config, 2, dtype=torch.bfloat16, device="cuda").requires_grad_(False)
    caption = net.project_caption(torch.empty(2, 9, config.caption_channels, dtype=torch.bfloat16, device="cuda"))
    mask = torch.ones(2, 9, dtype=torch.bool, device="cuda")
    hint, seen = torch.empty(1, 4, 9, 13, dtype=torch.bfloat16, device="cuda"), []

    def denoise(x, sigma):
        scaled = (x / (1 + sigma.view(-1, 1, 1, 1) ** 2).sqrt()).to(torch.bfloat16).repeat(2, 1, 1, 1)
        branch = control.attach(net, hint) if controlled else None
        predicted = net(scaled, (sigma * 6).repeat(2), caption, mask, control=branch).float()
        told, untold = predicted.chunk(2)
        seen.append(told[:, 4:])
        return x - sigma.view(-1, 1, 1, 1) * (untold + 4.5 * (told - untold))[:, :4]

    return denoise, seen.pop


@pytest.mark.parametrize("variant", ["alpha-512", "alpha-1024", "sigma-512"])
@pytest.mark.parametrize("controlled", [False, True])
def test_the_model_waits_for_nothing(variant, controlled):
    config, watch = tiny_config(variant), Watch()
    with FakeTensorMode():
        denoise, _ = make_denoiser(config, controlled)
        x, sigma = torch.empty(1, 4, 9, 13, device="cuda"), torch.empty(1, device="cuda")
        denoise(x, sigma)  # from here on positions are known
        with watch:
            assert denoise(x, sigma).shape == x.shape
    assert watch.found == []


@pytest.mark.parametrize(("name", "schedule", "options"), RUNS)
def test_no_solver_waits(name, schedule, options, monkeypatch):
    mode = FakeTensorMode()
    with mode:
        denoise, variance = make_denoiser(tiny_config("alpha-512"), controlled=False)
        x = torch.empty(1, 4, 9, 13, device="cuda")
        denoise(x, torch.empty(1, device="cuda"))
    levels = schedule_sigmas(schedule, {"dmd": 1, "ddim": 10}.get(schedule, 6))
    options = {**options, "variance": variance} if name == "iddpm" else options
    watch = watch_steps(monkeypatch, mode)
    found = SAMPLERS[name](denoise, x, levels, {}, **options)
    assert (found.shape, found.device.type, watch.found) == (x.shape, "cuda", [])


def test_the_watch_sees_what_waits():
    with Watch() as watch:
        common_row(torch.ones(2, 1))  # compares, where that costs nothing
        assert torch.ones(3)[torch.tensor([True, False, True])].sum().item() == 2  # a test's own affair
        PixArt(tiny_config("alpha-512")).positions((2, 2), torch.float32, torch.device("cpu"))
    assert [(name, place.partition(":")[0]) for name, place in watch.found] == [("equal", "pixart/layers.py")]
    with FakeTensorMode(), Watch() as watch:
        SampleNoise(torch.empty(1, 4, device="cuda"), [1])(1.0, 0.5)  # sent, and not waited for
        with pytest.raises(AssertionError, match="FakeTensor"):  # the table has numbers
            timesteps_from_sigmas(torch.empty(2, device="cuda"))
    assert [(name, place.partition(":")[0]) for name, place in watch.found] == [("_to_copy", "samplers/schedules.py")]
