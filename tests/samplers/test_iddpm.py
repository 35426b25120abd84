"""IDDPM against the original's trajectories, through the network too, and its fall-back."""

import pytest
import torch

from pixart_pack.benchmarks.mixture import GaussianMixture
from pixart_pack.pixart.config import PixArtConfig
from pixart_pack.pixart.transformer import PixArt
from pixart_pack.samplers.iddpm import sample_iddpm
from pixart_pack.samplers.schedules import schedule_sigmas, timesteps_from_sigmas
from pixart_pack.tests.goldens import load_golden, take
from pixart_pack.tests.mixture import ReferenceRun, reference_runs


@pytest.mark.parametrize(("case", "run", "output"), reference_runs("sampler_iddpm"))
def test_original_trajectories(case, run, output):
    settings = load_golden(case)[0]["runs"][run]
    reference = ReferenceRun(case, run, output, schedule_sigmas("iddpm", settings["nfe"]))
    result = sample_iddpm(
        reference.denoise,
        reference.start,
        reference.levels,
        disable=True,
        noise_sampler=reference.noise_sampler(),
        variance=lambda: reference.variance,
        clip_denoised=settings["clip_denoised"],
    )
    reference.check(result)


def test_pipeline_through_the_network_with_the_originals_guidance():
    """Guidance on channels 0 to 2, channel 3 and the variance from the conditional half."""
    case, tensors = load_golden("pipeline_alpha_tiny")
    shape = case["config"]
    config = PixArtConfig(
        depth=shape["depth"],
        hidden_size=shape["hidden_size"],
        num_heads=shape["num_heads"],
        caption_channels=shape["caption_channels"],
        caption_length=shape["model_max_length"],
        base_size=shape["input_size"] // 2,
        pe_scale=shape["lewei_scale"],
        micro_condition=False,
    )
    network = PixArt(config)
    network.load_state_dict({k: v for k, v in take(tensors, "weights").items() if k != "pos_embed"})
    network.eval()
    caption, mask = tensors["input.y"].squeeze(1), tensors["input.mask"].bool()
    null = tensors["weights.y_embedder.y_embedding"].expand(len(caption), -1, -1)
    seen = {}

    @torch.no_grad()
    def guided(x, sigma):
        timestep = timesteps_from_sigmas(sigma[0]).round().to(x).expand(2 * len(x))
        scaled = (x / (1.0 + sigma[0] ** 2).sqrt()).repeat(2, 1, 1, 1)
        output = network(scaled, timestep, torch.cat([caption, null]), mask.repeat(2, 1))
        conditional, unconditional = output.chunk(2)
        seen["variance"] = conditional[:, 4:]
        noise = conditional[:, :4].clone()
        noise[:, :3] = unconditional[:, :3] + 4.5 * (conditional[:, :3] - unconditional[:, :3])
        return x - sigma[0] * noise

    levels = schedule_sigmas("iddpm", 10).float()
    starts = levels.double().tolist()
    result = sample_iddpm(
        guided,
        tensors["input.z"] * (1.0 + levels[0] ** 2).sqrt(),
        levels,
        disable=True,
        noise_sampler=lambda sigma, sigma_next: tensors["input.iddpm_noises"][starts.index(sigma), :2],
        variance=lambda: seen["variance"],
    )
    torch.testing.assert_close(
        result,
        tensors["output.iddpm_cfg"][:2],
        atol=case["tolerance"]["suggested_atol"],
        rtol=case["tolerance"]["suggested_rtol"],
    )


def run_mixture(**options):
    _, tensors = load_golden("sampler_iddpm")
    model = GaussianMixture(*(tensors[f"gmm.{name}"] for name in ("mu", "s", "logw")))
    levels = schedule_sigmas("iddpm", 20)
    x = torch.ones(2, 4, 1, 2, dtype=torch.float64) * levels[0]
    return sample_iddpm(model, x, levels, {"seed": 1}, disable=True, **options)


def test_no_variance_channels_fall_back_to_the_posterior_with_one_warning(caplog):
    posterior = run_mixture(variance=lambda: torch.full((2, 4, 1, 2), -1.0, dtype=torch.float64))
    assert not caplog.records
    torch.testing.assert_close(run_mixture(), posterior)
    torch.testing.assert_close(run_mixture(variance=lambda: None), posterior)
    assert [record.message for record in caplog.records] == [
        "The model gave no variance channels; IDDPM uses the posterior variance instead."
    ] * 2


def test_larger_variance_channels_give_more_noise():
    low, high = (
        run_mixture(variance=lambda value=value: torch.full((2, 4, 1, 2), value, dtype=torch.float64))
        for value in (-1.0, 1.0)
    )
    assert not torch.allclose(low, high)
