"""Sampling nodes: PixArt's solvers, its schedules, and the published settings of both."""

from comfy_api.latest import io, ui

from ..pixart.drawing.diagrams import draw_schedule
from ..samplers.dpm_solver import LOWER_ORDER_FINAL
from ..samplers.from_diffusers import AS_THE_FOLDER_SAYS
from ..samplers.noise import NOISE_DEVICES
from ..samplers.presets import PRESETS
from ..samplers.sa_solver import MODES, OFFICIAL_INTERVALS, TAU_UNITS
from ..samplers.schedules import SCHEDULES
from .host.denoiser.sampling import GUIDANCE_MODES, apply_preset, make_sampler, make_sigmas
from .host.pictures import show_picture
from .host.schema import choice_input, node_input, schema
from .host.text.captions import show_text

SAMPLERS_CATEGORY = "PixArt/sampling"
OFFICIAL = "official"
WEIGHTS = ("exact", OFFICIAL)
ENDS = (OFFICIAL, "sigma 0")
SAMPLER_TIP = "For SamplerCustom and SamplerCustomAdvanced."


def _noise_device():
    return choice_input(
        "noise_device",
        NOISE_DEVICES,
        advanced=True,
        tooltip="Where the noise of the steps is drawn. cpu gives the same noise on every machine.",
    )


def _sampler_output():
    return [io.Sampler.Output(display_name="sampler", tooltip=SAMPLER_TIP)]


class SASolver(io.ComfyNode):
    """SA-Solver as a SAMPLER."""

    @classmethod
    def define_schema(cls):
        order = {"default": 2, "max": 4, "optional": True}
        bound = {"min": 0.0, "max": 1000.0, "step": 0.01, "round": False, "optional": True, "advanced": True}
        return schema(
            node_id="PixArtSASolver",
            display_name="PixArt SA-Solver",
            category=SAMPLERS_CATEGORY,
            description="SA-Solver: stochastic Adams steps of order 2 with a corrector, and noise between t = 800 and "
            "t = 200. 25 steps, guidance 3; the kl_optimal schedule for fewer. The preset is the original, exactly.",
            search_aliases=["sa solver", "stochastic adams", "pixart sampler", "sde"],
            inputs=[
                node_input(
                    io.Int,
                    "predictor_order",
                    min=1,
                    tooltip="Model evaluations that a step builds on. 2 with guidance, 3 or 4 without.",
                    **order,
                ),
                node_input(
                    io.Int,
                    "corrector_order",
                    min=0,
                    tooltip="Order of the correction that each new evaluation brings to the step before it; 0: none.",
                    **order,
                ),
                node_input(
                    io.Float,
                    "tau",
                    default=1.0,
                    min=0.0,
                    max=10.0,
                    step=0.01,
                    optional=True,
                    tooltip="Amount of noise inside the interval. 0 everywhere makes the sampler deterministic.",
                ),
                choice_input(
                    "weights",
                    WEIGHTS,
                    tooltip="exact: the integrals themselves, more accurate from about 8 steps on. official: the "
                    "simplified second-order weights of the original.",
                ),
                choice_input(
                    "tau_interval",
                    [OFFICIAL, *TAU_UNITS],
                    default=OFFICIAL,
                    advanced=True,
                    tooltip="official: noise for t from 200 to 800. Otherwise the unit of the two bounds below.",
                ),
                node_input(
                    io.Float,
                    "tau_start",
                    default=800.0,
                    tooltip="One bound of the interval, included: a timestep (0 to 999), a sigma (0 to 157.4) or a "
                    "share of the run (0 to 1).",
                    **bound,
                ),
                node_input(io.Float, "tau_end", default=200.0, tooltip="The other bound, included.", **bound),
                choice_input(
                    "tau_at",
                    OFFICIAL_INTERVALS,
                    default="target",
                    advanced=True,
                    tooltip="Whether the interval is compared with where a step ends (the original sampler) or starts "
                    "(the original's diffusers scheduler).",
                ),
                choice_input(
                    "mode",
                    MODES,
                    advanced=True,
                    tooltip="PECE evaluates the model again after each correction: twice the time.",
                ),
                _noise_device(),
            ],
            outputs=_sampler_output(),
        )

    @classmethod
    def execute(
        cls,
        predictor_order=2,
        corrector_order=2,
        tau=1.0,
        weights=WEIGHTS[0],
        tau_interval=OFFICIAL,
        tau_start=800.0,
        tau_end=200.0,
        tau_at="target",
        mode=MODES[0],
        noise_device=NOISE_DEVICES[0],
    ):
        interval = {}
        if tau_interval != OFFICIAL:
            interval = {"tau_interval": (tau_start, tau_end), "tau_unit": tau_interval}
        sampler = make_sampler(
            "sa_solver",
            predictor_order=predictor_order,
            corrector_order=corrector_order,
            tau=tau,
            few_steps=weights == OFFICIAL,
            tau_at=tau_at,
            mode=mode,
            noise_device=noise_device,
            **interval,
        )
        return io.NodeOutput(sampler)


class DPMSolver(io.ComfyNode):
    """DPM-Solver++ as a SAMPLER."""

    @classmethod
    def define_schema(cls):
        return schema(
            node_id="PixArtDPMSolver",
            display_name="PixArt DPM-Solver++",
            category=SAMPLERS_CATEGORY,
            description="DPM-Solver++ multistep as PixArt uses it: deterministic, 14 to 20 steps at guidance 4.5.",
            search_aliases=["dpm solver", "dpmpp 2m", "dpmpp 3m", "pixart sampler"],
            inputs=[
                node_input(
                    io.Int,
                    "order",
                    default=2,
                    min=1,
                    max=3,
                    optional=True,
                    tooltip="Model evaluations that a step builds on. 2 with guidance; 3 is exact to third order.",
                ),
                choice_input(
                    "lower_order_final",
                    LOWER_ORDER_FINAL,
                    tooltip="Lower the order over the last steps: always (PixArt-Sigma; the more accurate), only in "
                    "runs of fewer than 10 steps (PixArt-alpha), or never.",
                ),
            ],
            outputs=_sampler_output(),
        )

    @classmethod
    def execute(cls, order=2, lower_order_final=LOWER_ORDER_FINAL[0]):
        return io.NodeOutput(make_sampler("dpm_solver", order=order, lower_order_final=lower_order_final))


class IDDPM(io.ComfyNode):
    """IDDPM as a SAMPLER."""

    @classmethod
    def define_schema(cls):
        return schema(
            node_id="PixArtIDDPM",
            display_name="PixArt IDDPM",
            category=SAMPLERS_CATEGORY,
            description="Ancestral sampling with the noise amounts that PixArt itself predicts (its variance "
            "channels), 100 steps. Use it with the iddpm schedule.",
            search_aliases=["iddpm", "ddpm", "ancestral", "learned variance", "pixart sampler"],
            inputs=[
                choice_input(
                    "guidance",
                    GUIDANCE_MODES,
                    tooltip="original: guidance moves latent channels 1 to 3 only, as the original does. all channels: "
                    "all four, as every other sampler does.",
                ),
                _noise_device(),
            ],
            outputs=_sampler_output(),
        )

    @classmethod
    def execute(cls, guidance=GUIDANCE_MODES[0], noise_device=NOISE_DEVICES[0]):
        return io.NodeOutput(make_sampler("iddpm", guidance=guidance, noise_device=noise_device))


class DDIM(io.ComfyNode):
    """DDIM as a SAMPLER."""

    @classmethod
    def define_schema(cls):
        return schema(
            node_id="PixArtDDIM",
            display_name="PixArt DDIM",
            category=SAMPLERS_CATEGORY,
            description="DDIM with eta: first order, deterministic at eta 0. Use it with the ddim or iddpm schedule.",
            search_aliases=["ddim", "eta", "pixart sampler"],
            inputs=[
                node_input(
                    io.Float,
                    "eta",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    optional=True,
                    tooltip="Share of fresh noise in each step: 0 none, 1 as much as in DDPM.",
                ),
                _noise_device(),
            ],
            outputs=_sampler_output(),
        )

    @classmethod
    def execute(cls, eta=0.0, noise_device=NOISE_DEVICES[0]):
        return io.NodeOutput(make_sampler("ddim", eta=eta, noise_device=noise_device))


class LCM(io.ComfyNode):
    """Latent consistency sampling as a SAMPLER."""

    @classmethod
    def define_schema(cls):
        return schema(
            node_id="PixArtLCM",
            display_name="PixArt LCM",
            category=SAMPLERS_CATEGORY,
            description="Latent consistency sampling for PixArt-LCM weights or the LCM LoRA: 1 to 8 steps of the lcm "
            "schedule, guidance 1 (off).",
            search_aliases=["lcm", "latent consistency", "pixart delta", "pixart sampler"],
            inputs=[_noise_device()],
            outputs=_sampler_output(),
        )

    @classmethod
    def execute(cls, noise_device=NOISE_DEVICES[0]):
        return io.NodeOutput(make_sampler("lcm", noise_device=noise_device))


class DMD(io.ComfyNode):
    """One-step DMD as a SAMPLER."""

    @classmethod
    def define_schema(cls):
        return schema(
            node_id="PixArtDMD",
            display_name="PixArt DMD",
            category=SAMPLERS_CATEGORY,
            description="The single step of PixArt-DMD weights: the dmd schedule with 1 step, guidance 1 (off).",
            search_aliases=["dmd", "one step", "distribution matching", "pixart sampler"],
            inputs=[],
            outputs=_sampler_output(),
        )

    @classmethod
    def execute(cls):
        return io.NodeOutput(make_sampler("dmd"))


class Scheduler(io.ComfyNode):
    """A schedule as SIGMAS."""

    @classmethod
    def define_schema(cls):
        return schema(
            node_id="PixArtScheduler",
            display_name="PixArt Scheduler",
            category=SAMPLERS_CATEGORY,
            description="The noise levels of PixArt's samplers: equal steps in time (the official one), in log SNR, "
            "Karras and others, and the fixed lists of IDDPM, DDIM, LCM and DMD.",
            search_aliases=["pixart sigmas", "scheduler", "timesteps", "lcm schedule"],
            inputs=[
                node_input(
                    io.Combo,
                    "schedule",
                    options=list(SCHEDULES),
                    tooltip="uniform: DPM-Solver++ and SA-Solver, as published. kl_optimal: fewer errors in 10 to 25 "
                    "steps of theirs. linspace, trailing: whole timesteps, as diffusers. "
                    "iddpm, ddim, lcm, dmd: for the samplers of these names.",
                ),
                node_input(io.Int, "steps", default=20, min=1, max=1000, tooltip="Evaluations of the model. dmd: 1."),
                node_input(
                    io.Float,
                    "denoise",
                    default=1.0,
                    min=0.01,
                    max=1.0,
                    step=0.01,
                    optional=True,
                    tooltip="Below 1 for image-to-image: the run starts at this share of the time axis, with all its "
                    "steps.",
                ),
                choice_input(
                    "end",
                    ENDS,
                    default=OFFICIAL,
                    advanced=True,
                    tooltip="official: as the original, at t = 0, where 1 % of noise is left, or at sigma 0 for the "
                    "lists. sigma 0: always there, the last step being of first order.",
                ),
                node_input(io.Model, "model", optional=True, tooltip="The model, to check that the levels fit it."),
            ],
            outputs=[io.Sigmas.Output(display_name="sigmas", tooltip=SAMPLER_TIP)],
            has_intermediate_output=True,
        )

    @classmethod
    def execute(cls, schedule, steps, denoise=1.0, end=OFFICIAL, model=None):
        levels = make_sigmas(schedule, steps, denoise, None if end == OFFICIAL else True, model)
        return io.NodeOutput(levels, ui=show_picture(draw_schedule(levels.tolist()), cls))


class SamplingPreset(io.ComfyNode):
    """A published setting: SAMPLER, SIGMAS and guidance."""

    @classmethod
    def define_schema(cls):
        return schema(
            node_id="PixArtSamplingPreset",
            display_name="PixArt Sampling Preset",
            category=SAMPLERS_CATEGORY,
            description="A published PixArt setting in one node: sampler, noise levels and guidance. Says when it "
            "does not suit the connected model.",
            search_aliases=["pixart preset", "pixart settings", "recommended", "sampler preset"],
            inputs=[
                node_input(io.Model, "model", tooltip="The PixArt model that the preset is for."),
                node_input(
                    io.Combo,
                    "preset",
                    options=[*PRESETS, AS_THE_FOLDER_SAYS],
                    tooltip="Family, sampler and steps. LCM and DMD need their distilled weights (or the LCM LoRA). as "
                    "the folder says: solver, order, times and final noise of a diffusers folder's scheduler; the node "
                    "says what of it is done otherwise.",
                ),
                node_input(
                    io.Float,
                    "denoise",
                    default=1.0,
                    min=0.01,
                    max=1.0,
                    step=0.01,
                    optional=True,
                    tooltip="Below 1 for image-to-image.",
                ),
            ],
            outputs=[
                *_sampler_output(),
                io.Sigmas.Output(display_name="sigmas", tooltip=SAMPLER_TIP),
                io.Float.Output(display_name="guidance", tooltip="The cfg for SamplerCustom or CFGGuider."),
            ],
            hidden=[io.Hidden.unique_id],
            has_intermediate_output=True,
        )

    @classmethod
    def execute(cls, model, preset, denoise=1.0):
        sampler, sigmas, guidance, notice = apply_preset(preset, model, denoise)
        show_text(cls.hidden, notice)
        return io.NodeOutput(sampler, sigmas, guidance, ui=ui.PreviewText(notice) if notice else None)


NODES: list[type[io.ComfyNode]] = [SASolver, DPMSolver, IDDPM, DDIM, LCM, DMD, Scheduler, SamplingPreset]
