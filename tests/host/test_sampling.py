"""The solvers, schedules and presets through ComfyUI's own sampling, on a tiny PixArt."""

import importlib

import pytest
import torch

from pixart_pack.samplers import SAMPLERS
from pixart_pack.samplers.schedules import ENDS_CLEAN, SCHEDULES, schedule_sigmas
from pixart_pack.tests.tiny_pixart import make_weights, tiny_config
from pixart_pack.tests.tiny_t5 import SIZES

NAMES = sorted(SAMPLERS)
STEPS = {"dmd": 1, "lcm": 4, "iddpm": 6, "ddim": 5}
NODES = {
    "sa_solver": "PixArtSASolver",
    "dpm_solver": "PixArtDPMSolver",
    "iddpm": "PixArtIDDPM",
    "ddim": "PixArtDDIM",
    "lcm": "PixArtLCM",
    "dmd": "PixArtDMD",
}
BATCH_NOISE = 157.4 * 5e-6  # sigma of the first step times what another batch changes in the network: 2.7e-6 measured


@pytest.fixture(scope="module")
def host_model(pack):
    return importlib.import_module("pixart_pack.nodes.host.denoiser.model")


@pytest.fixture(scope="module")
def host_sampling(pack):
    module = importlib.import_module("pixart_pack.nodes.host.denoiser.sampling")
    module.register_samplers()
    return module


@pytest.fixture(scope="module")
def make_model(host_model):
    """A function that makes a MODEL with random weights: make_model("alpha-512", learn_sigma=False)."""

    def make(variant="alpha-512", **fields):
        config = tiny_config(variant, **fields)
        return host_model.make_patcher(make_weights(config), config, dtype=torch.float32)

    return make


@pytest.fixture(scope="module")
def model(make_model):
    return make_model()


@pytest.fixture(scope="module")
def captions():
    generator = torch.Generator().manual_seed(1)
    return [[[torch.randn(1, 8, SIZES["d_model"], generator=generator), {}]] for _ in range(2)]


@pytest.fixture
def sample(comfy, host_sampling, model, captions):
    """A function that samples as SamplerCustom does: sample("lcm", batch=2, cfg=1.0, ...) -> latent."""
    comfy_sample = importlib.import_module("comfy.sample")

    def run(name, batch=1, size=(6, 5), seed=3, cfg=3.0, latent=None, noise=None, denoise=1.0, mask=None, **fields):
        latent = torch.zeros(batch, 4, *size) if latent is None else latent
        noise = comfy_sample.prepare_noise(latent, seed, fields.pop("batch_index", None)) if noise is None else noise
        schedule = name if name in SCHEDULES else "uniform"
        levels = host_sampling.make_sigmas(fields.pop("schedule", schedule), STEPS.get(name, 6), denoise)
        sampler = host_sampling.make_sampler(name, **fields.pop("options", {}))
        with torch.inference_mode():
            return comfy_sample.sample_custom(
                fields.pop("model", model),
                noise,
                cfg,
                sampler,
                levels,
                *captions,
                latent,
                noise_mask=mask,
                seed=seed,
                disable_pbar=True,
                **fields,
            )

    return run


@pytest.mark.parametrize("name", NAMES)
def test_same_seed_same_latent_and_every_step_is_reported(sample, name):
    steps = []
    first = sample(name, callback=lambda step, denoised, x, total: steps.append((step, total)))
    assert torch.isfinite(first).all()
    assert steps == [(i, STEPS.get(name, 6)) for i in range(STEPS.get(name, 6))]
    assert torch.equal(first, sample(name))
    assert not torch.equal(first, sample(name, seed=4))


@pytest.mark.parametrize("name", NAMES)
def test_batch_of_four_equals_four_batches_of_one(sample, name):
    size = (8, 6)
    together = sample(name, batch=4, size=size)
    for i in range(4):
        alone = sample(name, batch=1, size=size, batch_index=[i])
        torch.testing.assert_close(together[i : i + 1], alone, atol=BATCH_NOISE, rtol=BATCH_NOISE)


@pytest.mark.parametrize("name", NAMES)
def test_samples_with_the_same_initial_noise_are_equal(sample, name):
    noise = torch.randn(1, 4, 6, 5, generator=torch.Generator().manual_seed(2)).repeat(2, 1, 1, 1)
    result = sample(name, batch=2, noise=noise)
    torch.testing.assert_close(result[0], result[1], atol=BATCH_NOISE, rtol=BATCH_NOISE)


@pytest.mark.parametrize("name", ["sa_solver", "lcm"])
def test_without_initial_noise_the_seed_decides(sample, name):
    latent = torch.ones(2, 4, 6, 5)
    first, second = (sample(name, latent=latent, noise=torch.zeros_like(latent), seed=s) for s in (1, 2))
    assert not torch.equal(first, second)
    torch.testing.assert_close(first[1], second[0], atol=BATCH_NOISE, rtol=BATCH_NOISE)


@pytest.mark.parametrize("name", NAMES)
def test_image_to_image(sample, name):
    latent = torch.randn(1, 4, 7, 5, generator=torch.Generator().manual_seed(5))
    weak, strong = (sample(name, latent=latent, denoise=d) for d in (0.15, 0.9))
    if name != "dmd":
        assert (weak - latent).norm() < (strong - latent).norm()
    assert torch.isfinite(strong).all()


@pytest.mark.parametrize("name", NAMES)
def test_outside_the_mask_nothing_changes(sample, name):
    latent = torch.randn(1, 4, 6, 5, generator=torch.Generator().manual_seed(5))
    mask = torch.zeros(1, 1, 6, 5)
    mask[..., 2:] = 1.0
    result = sample(name, latent=latent, mask=mask)
    torch.testing.assert_close(result[..., :2], latent[..., :2], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(result[..., 2:], latent[..., 2:], atol=0.1)


@pytest.mark.parametrize("name", NAMES)
def test_interrupt_stops_the_run_and_the_next_one_works(comfy, sample, name):
    management = importlib.import_module("comfy.model_management")
    before = sample(name)

    def interrupt(step, *_):
        management.interrupt_current_processing()
        management.throw_exception_if_processing_interrupted()

    with pytest.raises(management.InterruptProcessingException):
        sample(name, callback=interrupt)
    assert torch.equal(sample(name), before)


@pytest.mark.parametrize("name", NAMES)
def test_ksampler_lists_have_it_and_run_it(pack, core_nodes, host_sampling, run_node, model, captions, name):
    schedule = name if name in SCHEDULES else "uniform"
    (latent,) = run_node(
        "KSampler",
        model=model,
        seed=1,
        steps=STEPS.get(name, 6),
        cfg=2.0,
        sampler_name=f"pixart_{name}",
        scheduler=f"pixart_{schedule}",
        positive=captions[0],
        negative=captions[1],
        latent_image={"samples": torch.zeros(1, 4, 6, 6)},
        denoise=1.0,
    )
    assert torch.isfinite(latent["samples"]).all()
    choices = core_nodes["KSampler"].INPUT_TYPES()["required"]
    assert f"pixart_{name}" in choices["sampler_name"][0]


def test_registering_again_changes_nothing(comfy, host_sampling):
    samplers = importlib.import_module("comfy.samplers")
    before = list(samplers.KSampler.SAMPLERS), list(samplers.SCHEDULER_NAMES)
    host_sampling.register_samplers()
    assert (samplers.KSampler.SAMPLERS, samplers.SCHEDULER_NAMES) == before
    assert {f"pixart_{name}" for name in SCHEDULES} <= set(samplers.SCHEDULER_NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_sampler_nodes_with_their_defaults(run_node, name):
    (sampler,) = run_node(NODES[name])
    assert sampler.sampler_function.__name__ == f"sample_pixart_{name}"


def test_sa_solver_node_passes_its_interval(run_node, host_sampling):
    (sampler,) = run_node("PixArtSASolver", tau_interval="percent", tau_start=0.2, tau_end=0.8, weights="exact")
    assert sampler.extra_options["tau_interval"] == (0.2, 0.8)
    assert sampler.extra_options["tau_unit"] == "percent"
    assert not sampler.extra_options["few_steps"]


@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_scheduler_node(run_node, model, name):
    steps = STEPS.get(name, 5)
    (levels,) = run_node("PixArtScheduler", schedule=name, steps=steps, model=model)
    assert levels.dtype == torch.float32
    torch.testing.assert_close(levels, schedule_sigmas(name, steps).float())
    (clean,) = run_node("PixArtScheduler", schedule=name, steps=steps, end="sigma 0")
    assert clean[-1] == 0.0
    assert (levels[-1] == 0.0) == (name in ENDS_CLEAN)


@pytest.mark.parametrize(
    ("preset", "config", "warning"),
    [
        ("alpha DPM-Solver++ 14", "alpha-512", None),
        ("alpha DPM-Solver++ 20", "sigma-1024", "The preset is for PixArt-alpha models"),
        ("alpha SA-Solver 25", "alpha-1024", None),
        ("alpha IDDPM 100", "alpha-256", None),
        ("alpha LCM 4", "alpha-1024", None),
        ("alpha LCM 4", "alpha-512", "LCM weights exist for 1024 px; this model is for 512 px."),
        ("alpha DMD 1", "alpha-512", None),
        ("alpha DMD 1", "alpha-256", "DMD weights exist for 512 px; this model is for 256 px."),
        ("sigma DPM-Solver++ 14", "sigma-512", None),
        ("sigma DPM-Solver++ 14", "alpha-512", "The preset is for PixArt-Sigma models"),
    ],
)
def test_presets_run_and_say_what_does_not_fit(run_node, make_model, captions, caplog, preset, config, warning):
    model = make_model(config)
    sampler, levels, guidance = run_node("PixArtSamplingPreset", model=model, preset=preset)
    assert (warning is None and not caplog.records) or warning in caplog.text
    if len(levels) > 30:
        levels = torch.cat([levels[:5], levels[-1:]])
    comfy_sample = importlib.import_module("comfy.sample")
    latent = torch.zeros(1, 4, 5, 4)
    noise = comfy_sample.prepare_noise(latent, 0)
    with torch.inference_mode():
        result = comfy_sample.sample_custom(
            model, noise, guidance, sampler, levels, *captions, latent, seed=0, disable_pbar=True
        )
    assert torch.isfinite(result).all()


LCM_FOLDER = {"_class_name": "LCMScheduler", "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}


@pytest.mark.parametrize(
    ("scheduler", "steps", "guidance", "last"),
    [(LCM_FOLDER, 4, 1.0, 0.0), ({"_class_name": "DPMSolverMultistepScheduler"}, 20, 4.5, 0.0),
     ({"_class_name": "SASolverScheduler"}, 20, 4.5, 0.01), ({"_class_name": "DDIMScheduler"}, 20, 4.5, 0.0),
     ({"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "sde-dpmsolver++", "use_karras_sigmas": True,
       "thresholding": True}, 20, 4.5, 0.0)],
)  # fmt: skip
def test_a_folder_is_sampled_as_it_says(run_node, make_model, captions, scheduler, steps, guidance, last):
    model = make_model("alpha-512")
    model.model.pixart_source = {"scheduler": scheduler}
    sampler, levels, found = run_node("PixArtSamplingPreset", model=model, preset="as the folder says")
    assert (len(levels) - 1, found) == (steps, guidance) and levels[-1] == pytest.approx(last, abs=1e-4)
    half = run_node("PixArtSamplingPreset", model=model, preset="as the folder says", denoise=0.5)[1]
    assert len(half) == steps + 1 and half[0] < levels[0] / 2
    comfy_sample = importlib.import_module("comfy.sample")
    latent = torch.zeros(1, 4, 5, 4)
    noise = comfy_sample.prepare_noise(latent, 0)
    with torch.inference_mode():
        result = comfy_sample.sample_custom(
            model, noise, found, sampler, levels[-3:], *captions, latent, seed=0, disable_pbar=True
        )
    assert torch.isfinite(result).all()


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (None, "No scheduler: got a model without one"),
        ({"_class_name": "DDIMScheduler", "prediction_type": "v_prediction"}, "Another diffusion: got prediction_type"),
    ],
)
def test_a_folder_that_says_nothing_or_another_diffusion_is_refused(run_node, make_model, scheduler, message):
    model = make_model("alpha-512")
    model.model.pixart_source = {"scheduler": scheduler}
    with pytest.raises(ValueError, match=message):
        run_node("PixArtSamplingPreset", model=model, preset="as the folder says")


def test_iddpm_reads_the_variance_channels(sample, make_model, caplog):
    """Without them it warns and falls back to the posterior variance."""
    learned = sample("iddpm", cfg=1.0)
    assert not caplog.records
    fixed = sample("iddpm", cfg=1.0, model=make_model(learn_sigma=False))
    assert "no variance channels" in caplog.text
    assert torch.isfinite(fixed).all()
    assert not torch.equal(learned, fixed)


def test_iddpm_guidance_leaves_the_fourth_channel_alone(sample, host_sampling):
    def first_denoised(mode, cfg):
        seen = []
        sample("iddpm", cfg=cfg, options={"guidance": mode}, callback=lambda i, denoised, *_: seen.append(denoised))
        return seen[0]

    latents = {}
    for mode in host_sampling.GUIDANCE_MODES:
        for cfg in (2.0, 5.0):
            latents[mode, cfg] = first_denoised(mode, cfg)
    first, second = latents["original", 2.0], latents["original", 5.0]
    torch.testing.assert_close(first[:, 3], second[:, 3])
    assert not torch.allclose(first[:, :3], second[:, :3])
    assert not torch.allclose(latents["all channels", 2.0][:, 3], latents["all channels", 5.0][:, 3])


def test_dmd_scales_pure_noise_to_unit_variance(sample):
    seen = []
    sample("dmd", cfg=1.0, size=(32, 32), callback=lambda i, denoised, x, total: seen.append(x))
    level = schedule_sigmas("dmd", 1)[0]
    assert seen[0].std().item() == pytest.approx((1 + level**2).sqrt().item(), rel=0.05)


def test_flow_matching_models_are_refused(comfy, host_sampling, sample, make_model):
    sampling = importlib.import_module("comfy.model_sampling")

    class Flow(sampling.ModelSamplingDiscreteFlow, sampling.CONST):
        pass

    model = make_model().clone()
    model.add_object_patch("model_sampling", Flow())
    with pytest.raises(ValueError, match="Noise levels of another model: got those of a flow model"):
        sample("sa_solver", model=model)
    with pytest.raises(ValueError, match="got a highest sigma of 1, expected 157.407"):
        host_sampling.make_sigmas("uniform", 5, model=model)


def test_sample_of_one_sigma_is_refused(comfy, host_sampling, model, captions):
    comfy_sample = importlib.import_module("comfy.sample")
    latent = torch.zeros(1, 4, 4, 4)
    with pytest.raises(ValueError, match="Too few sigmas: got 1"):
        comfy_sample.sample_custom(
            model, latent, 1.0, host_sampling.make_sampler("lcm"), torch.tensor([5.0]), *captions, latent, seed=0
        )


def test_unknown_guidance_is_refused(sample):
    with pytest.raises(ValueError, match="Unknown guidance: got 'some'"):
        sample("iddpm", options={"guidance": "some"})


def test_the_callers_options_stay_as_they_were(host_sampling):
    options = {"transformer_options": {"patches": {}}, "sampler_post_cfg_function": []}
    extra_args = {"model_options": options, "seed": 0}
    changed, _ = host_sampling._with_variance(torch.zeros(1, 4, 2, 2), extra_args, {})
    assert options == {"transformer_options": {"patches": {}}, "sampler_post_cfg_function": []}
    assert changed["model_options"]["transformer_options"]["patches"] == {}
