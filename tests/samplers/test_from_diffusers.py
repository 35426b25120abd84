"""A folder's scheduler: the same noise levels, and in the end the same latents, as diffusers' own classes give."""

import dataclasses
import inspect
import json
import math

import diffusers
import pytest
import torch

from pixart_pack.pixart.sampling import Captions, Settings, sample_latents
from pixart_pack.pixart.transformer import PixArt
from pixart_pack.pixart.weights.reading import read_checkpoint
from pixart_pack.samplers import SAMPLERS
from pixart_pack.samplers.contract import check_sigmas
from pixart_pack.samplers.conventions import Conventions
from pixart_pack.samplers.from_diffusers import read_scheduler
from pixart_pack.samplers.schedules import SCHEDULES, schedule_sigmas, timesteps_from_sigmas

pytestmark = pytest.mark.peer

PIXART = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}
SPACINGS = [{"timestep_spacing": spacing} for spacing in ("linspace", "leading", "trailing")]
CASES = [
    *(("DPMSolverMultistepScheduler", fields) for fields in SPACINGS),
    ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    ("DPMSolverMultistepScheduler", {"use_exponential_sigmas": True}),
    ("DPMSolverMultistepScheduler", {"final_sigmas_type": "sigma_min"}),
    *(("SASolverScheduler", fields) for fields in SPACINGS),
    ("SASolverScheduler", {"use_karras_sigmas": True}),
    ("UniPCMultistepScheduler", {}),
    ("DEISMultistepScheduler", {}),
    *(("EulerDiscreteScheduler", fields) for fields in SPACINGS),
    ("EulerDiscreteScheduler", {"use_karras_sigmas": True}),
    ("EulerAncestralDiscreteScheduler", {}),
    ("LCMScheduler", PIXART),
    *(("DDIMScheduler", fields) for fields in SPACINGS),
    ("DDIMScheduler", {"steps_offset": 1}),
    ("DDPMScheduler", {"timestep_spacing": "trailing"}),
]


def make(name, fields):
    scheduler = getattr(diffusers, name)(**fields)
    return scheduler, read_scheduler(json.loads(scheduler.to_json_string()))


def their_levels(scheduler, steps):
    scheduler.set_timesteps(steps)
    if getattr(scheduler, "sigmas", None) is not None and len(scheduler.sigmas) == steps + 1:
        return scheduler.sigmas.double()
    kept = scheduler.alphas_cumprod[scheduler.timesteps.long()].double()
    return torch.cat([((1 - kept) / kept).sqrt(), torch.zeros(1).double()])


@pytest.mark.parametrize(("name", "fields"), CASES)
@pytest.mark.parametrize("steps", [4, 20, 25, 50])
def test_noise_levels_are_those_of_diffusers(name, fields, steps):
    scheduler, asked = make(name, fields)
    # Their table is float32: its first level, the difference of 1 and 0.9999, has an error of 3e-4.
    torch.testing.assert_close(asked.levels(steps), their_levels(scheduler, steps), rtol=5e-4, atol=0)
    check_sigmas(asked.levels(steps))


@pytest.mark.parametrize("name", ["linspace", "trailing", "uniform", "ddim", "iddpm"])
def test_a_thousand_steps_are_each_time_once(name):
    levels = schedule_sigmas(name, 1000, end_clean=True)
    assert len(check_sigmas(levels)) == 1001 and len(SCHEDULES[name](1000)) in (1000, 1001)


def test_levels_that_repeat_at_the_end_are_merged():
    assert check_sigmas(torch.tensor([3.0, 1.0, 0.5, 0.5, 0.5])) == [3.0, 1.0, 0.5]
    with pytest.raises(ValueError, match="do not descend"):
        check_sigmas(torch.tensor([3.0, 1.0, 1.0, 0.5]))


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("DPMSolverMultistepScheduler", {"prediction_type": "v_prediction"}, "prediction_type 'v_prediction'"),
        ("DPMSolverMultistepScheduler", {"beta_schedule": "scaled_linear"}, "beta_schedule 'scaled_linear'"),
        ("LCMScheduler", {}, "beta_start 0.00085"),
        ("DPMSolverMultistepScheduler", {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}, "prediction"),
        ("DDIMScheduler", {"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr True"),
    ],
)
def test_another_diffusion_is_refused(name, fields, message):
    with pytest.raises(ValueError, match=f"Another diffusion: got {message}"):
        make(name, fields)


@pytest.mark.parametrize("config", [{}, {"_class_name": "OddScheduler"}, {"_class_name": []}])
def test_an_unknown_class_is_refused(config):
    with pytest.raises(ValueError, match="Unknown scheduler"):
        read_scheduler(config)


@pytest.mark.parametrize(
    ("key", "value"),
    [("solver_order", "2"), ("solver_order", 9), ("timestep_spacing", "odd"), ("sample_max_value", float("nan")),
     ("dynamic_thresholding_ratio", 1.5), ("clip_sample_range", 0.0)],
)  # fmt: skip
def test_numbers_that_are_none_are_refused(key, value):
    with pytest.raises(ValueError, match=f"Unusable scheduler: got {key}"):
        read_scheduler({"_class_name": "DPMSolverMultistepScheduler", key: value})


@pytest.mark.parametrize(
    ("name", "fields", "remark"),
    [
        ("UniPCMultistepScheduler", {}, "DPM-Solver++"),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, None),
        (
            "DPMSolverMultistepScheduler",
            {"algorithm_type": "sde-dpmsolver++", "solver_order": 3},
            "order 3 is not done",
        ),
        ("DPMSolverMultistepScheduler", {"lambda_min_clipped": -4.0}, "lambda_min_clipped -4.0 is not done"),
        ("DPMSolverMultistepScheduler", {"thresholding": True}, "thresholding True holds latents"),
        ("EulerDiscreteScheduler", {"sigma_max": 80.0}, "sigma_max 80.0 is not done"),
        ("EulerDiscreteScheduler", {"interpolation_type": "log_linear"}, "interpolation_type 'log_linear'"),
        ("SASolverScheduler", {"algorithm_type": "noise_prediction"}, "algorithm_type 'noise_prediction'"),
        ("DDPMScheduler", {"variance_type": "fixed_large"}, "variance_type 'fixed_large'"),
        ("DDIMScheduler", {}, "clip_sample True"),
        ("DDIMScheduler", {"clip_sample": False}, None),
        ("DDIMScheduler", {"timestep_spacing": "linspace", "clip_sample": False}, None),
        ("DPMSolverMultistepScheduler", {"solver_order": 3}, None),
        ("SASolverScheduler", {}, None),
        ("DPMSolverMultistepScheduler", {}, None),
        ("LCMScheduler", PIXART, None),
    ],
)
def test_what_is_done_otherwise_is_named(name, fields, remark):
    remarks = make(name, fields)[1].remarks
    assert any(remark in each for each in remarks) if remark else not remarks


def test_an_lcm_folder_gets_few_steps_without_guidance():
    asked = make("LCMScheduler", PIXART)[1]
    assert (asked.sampler, asked.steps, asked.guidance) == ("lcm", 4, 1.0)
    assert str(asked) == "LCMScheduler: lcm, 4 steps, guidance off"


SHAPE = (2, 4, 3, 5)
MULTISTEP = [
    {},
    {"solver_order": 3},
    {"solver_order": 1},
    {"solver_order": 3, "lower_order_final": False},
    {"solver_order": 3, "final_sigmas_type": "sigma_min"},
    {"euler_at_final": True, "final_sigmas_type": "sigma_min"},
    {"solver_type": "heun"},
    {"algorithm_type": "sde-dpmsolver++"},
    {"algorithm_type": "sde-dpmsolver++", "solver_type": "heun"},
    {"algorithm_type": "sde-dpmsolver++", "solver_order": 1},
    {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"},
    {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min", "solver_order": 3},
    {"algorithm_type": "sde-dpmsolver", "final_sigmas_type": "sigma_min"},
    {"thresholding": True},
    {"thresholding": True, "sample_max_value": 1.7, "dynamic_thresholding_ratio": 0.8},
    {"use_karras_sigmas": True},
    {"use_lu_lambdas": True},
    {"use_exponential_sigmas": True},
    {"use_beta_sigmas": True},
    *SPACINGS,
]
SPREAD = [{f"use_{name}_sigmas": True} for name in ("karras", "exponential", "beta")]
WHOLE = {"clip_sample": False}
RUNS = [
    *(("DPMSolverMultistepScheduler", fields) for fields in MULTISTEP),
    *(("SASolverScheduler", fields) for fields in (*SPACINGS, *SPREAD, {"thresholding": True}, {"corrector_order": 3})),
    *(("EulerDiscreteScheduler", fields) for fields in (*SPACINGS, *SPREAD)),
    *(("EulerAncestralDiscreteScheduler", fields) for fields in SPACINGS),
    *(("DDIMScheduler", fields | WHOLE) for fields in (*SPACINGS, {"set_alpha_to_one": False}, {"thresholding": True})),
    *(("DDIMScheduler", fields) for fields in (*SPACINGS, {"clip_sample_range": 0.6})),
    *(("DDPMScheduler", fields | WHOLE) for fields in (*SPACINGS, {"variance_type": "fixed_small_log"})),
    *(("DDPMScheduler", fields) for fields in SPACINGS),
    *(("LCMScheduler", PIXART | fields) for fields in ({}, {"clip_sample": True}, {"thresholding": True})),
]


def predict(x, time):
    """A noise that depends smoothly on x and on the time, so that a time that is off by one is seen."""
    return torch.tanh(1.3 * x + math.sin(time / 90.0)) * 0.9 + 0.2 * torch.cos(2.0 * x - time / 300.0)


def drawn(seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return lambda: torch.randn(SHAPE, generator=generator, dtype=dtype).double()


def their_run(scheduler, steps):
    scheduler.set_timesteps(steps)
    x, generator = drawn(1)() * scheduler.init_noise_sigma, torch.Generator().manual_seed(5)
    takes = "generator" in inspect.signature(scheduler.step).parameters
    for time in scheduler.timesteps:
        noise = predict(scheduler.scale_model_input(x, time), float(time))
        x = scheduler.step(noise, time, x, return_dict=False, **({"generator": generator} if takes else {}))[0]
    return x


def our_run(asked, steps):
    levels = asked.levels(steps)
    at_most = asked.name.startswith("Euler") and asked.config["timestep_spacing"] != "leading"
    x = drawn(1)() * (levels[0] if at_most else (1 + levels[0] ** 2).sqrt())  # as Euler's classes start
    step = drawn(5, torch.float32 if asked.sampler == "dpm_solver" else torch.float64)  # as the classes draw
    noises = dict(zip(levels.tolist(), [step() for _ in range(steps)], strict=False))

    def model(x, sigma):
        level = sigma[0].item()
        return x - level * predict(x / math.sqrt(1 + level**2), max(0.0, timesteps_from_sigmas(level).item()))

    x = SAMPLERS[asked.sampler](
        model, x, levels, disable=True, noise_sampler=lambda level, _: noises[level], **asked.options(steps)
    )
    return x if asked.name.startswith("Euler") else x / (1 + levels[-1] ** 2).sqrt()  # they end in their own scale


@pytest.mark.parametrize(("name", "fields"), RUNS)
@pytest.mark.parametrize("steps", [8, 20])
def test_a_run_is_that_of_the_scheduler(name, fields, steps):
    scheduler, asked = make(name, fields)
    theirs, ours = their_run(scheduler, steps), our_run(asked, steps)
    # Their levels and, in some classes, their latents are float32: up to 5e-6, and 2.4e-4 where SA-Solver's spread
    # levels lie close, whose differences it divides by.
    within = 5e-4 if name == "SASolverScheduler" else 5e-5
    if fields in SPREAD and torch.backends.cpu.get_cpu_capability() == "DEFAULT":
        within *= 10  # logarithms and exponentials by plain kernels: 3.7e-4 was measured, 3.4e-3 with SA-Solver
    assert ((ours - theirs).abs().max() / theirs.abs().max()).item() < within


def test_the_last_part_of_a_run_is_asked_as_the_whole():
    asked = make("DDIMScheduler", {"timestep_spacing": "linspace", **WHOLE})[1]
    assert asked.options(10, 0.5)["stride"] == 50 and asked.options(10)["stride"] == 100
    asked = make("DPMSolverMultistepScheduler", {})[1]
    assert (
        asked.options(10, 0.5)["lower_order_final"] == "never" and asked.options(10)["lower_order_final"] == "last_two"
    )


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """diffusers' pipeline around a tiny transformer, and the same model of ours, both in float64."""
    torch.manual_seed(0)
    network = diffusers.PixArtTransformer2DModel(
        num_layers=2, num_attention_heads=2, attention_head_dim=12, cross_attention_dim=24, caption_channels=16,
        sample_size=8, interpolation_scale=1, use_additional_conditions=False,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("pixart") / "transformer"
    network.save_pretrained(path)
    checkpoint = read_checkpoint(path, vae_scale=1.0)
    model = PixArt(checkpoint.config).double().eval()
    model.load_state_dict({name: tensor.double() for name, tensor in checkpoint.state_dict.items()}, strict=False)
    pipe = diffusers.PixArtAlphaPipeline(None, None, None, network.double().eval(), None)
    pipe.set_progress_bar_config(disable=True)
    return pipe, model


def decibel(ours, theirs):
    return (10 * (theirs.square().max() / (ours - theirs).square().mean()).log10()).item()


@pytest.mark.parametrize(
    ("name", "fields", "steps", "guidance"),
    [
        ("DPMSolverMultistepScheduler", {}, 20, 4.5),
        ("DPMSolverMultistepScheduler", {}, 10, 4.5),
        ("DPMSolverMultistepScheduler", {"final_sigmas_type": "sigma_min", "solver_order": 1}, 10, 4.5),
        ("DPMSolverMultistepScheduler", {"timestep_spacing": "trailing"}, 8, 0.5),
        ("EulerDiscreteScheduler", {"timestep_spacing": "trailing"}, 10, 0.0),
        ("DDIMScheduler", {"timestep_spacing": "trailing", "clip_sample": False}, 10, 3.0),
        ("DDIMScheduler", {"clip_sample": False, "steps_offset": 1}, 25, 3.0),
        ("LCMScheduler", PIXART, 1, 0.0),
    ],
)
def test_the_picture_is_that_of_the_pipeline(pipeline, name, fields, steps, guidance):
    pipe, model = pipeline
    pipe.scheduler, asked = make(name, fields)
    generator = torch.Generator().manual_seed(1)
    texts = [torch.randn(1, 6, 16, generator=generator, dtype=torch.float64) for _ in range(2)]
    mask = torch.ones(1, 6, dtype=torch.int64)
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(7))
    theirs = pipe(
        prompt=None, negative_prompt=None, prompt_embeds=texts[0], negative_prompt_embeds=texts[1],
        prompt_attention_mask=mask, negative_prompt_attention_mask=mask, latents=latents.double(),
        num_inference_steps=steps, guidance_scale=guidance, height=64, width=64, output_type="latent",
        use_resolution_binning=False,
    ).images  # fmt: skip
    positive, negative = (Captions(text, mask.bool()) for text in texts)
    settings = Settings(asked.sampler, "folder", steps, guidance, asked.options(steps), scheduler=asked)
    ours = sample_latents(model, positive, negative, 64, 64, [7], settings)
    assert decibel(ours, theirs) > 95  # 97.9 at the least, bounded by their table and our levels in float32


def test_the_clean_end_is_what_makes_the_difference(pipeline):
    settings = Settings(schedule="linspace", is_clean=True)
    _, asked = make("DPMSolverMultistepScheduler", {})
    torch.testing.assert_close(settings.levels, asked.levels(20))
    assert dataclasses.replace(settings, is_clean=None).levels[-1] > 0.0099


def test_unknown_conventions_are_refused():
    with pytest.raises(ValueError, match="Unknown times: got 'odd'"):
        Conventions(times="odd")
