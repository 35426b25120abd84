"""PixArt three ways with the same random weights: this pack's, ComfyUI's own, and diffusers'."""

import dataclasses

import torch
from torch.nn import functional as F

from ..pixart.checkpoint import expected_shapes, to_diffusers
from ..pixart.config import CONFIGS
from ..pixart.weights.saving import diffusers_config
from .host import import_host

OURS, HOST, DIFFUSERS = "this pack", "ComfyUI", "diffusers"
GUIDANCE = 4.5
TIMESTEP = 500  # of a single step


def make_config(variant, depth):
    """A released variant, with fewer blocks of the same width where depth is not 0."""
    return dataclasses.replace(CONFIGS[variant], depth=depth) if depth else CONFIGS[variant]


def make_weights(config, dtype, seed=0):
    """Random weights in the original layout."""
    generator = torch.Generator().manual_seed(seed)
    shapes = expected_shapes(config)
    return {name: (torch.randn(s, generator=generator) * 0.02).to(dtype) for name, s in shapes.items()}


def make_captions(config, lengths, dtype, seed=1):
    """Raw caption states of these lengths, one (1, L, channels) each."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(1, n, config.caption_channels, generator=generator).to(dtype) for n in lengths]


class OurLoop:
    """This pack's model in ComfyUI, sampled as a workflow samples it."""

    def __init__(self, config, weights, dtype, device=None):
        import_host(device)
        from ..nodes.host.denoiser import model

        self.patcher = model.make_patcher(dict(weights), config, dtype)

    @property
    def maths(self):
        """The dtype that ComfyUI computes in, which on a CPU need not be that of the weights."""
        return self.patcher.model.get_dtype_inference()

    def sample(self, captions, side, steps, stepped=None, **options):
        """The latent after so many guided steps of dpmpp_2m; side: of the latent. stepped: called after each step."""
        return sample_in_host(self.patcher, captions, side, steps, stepped, **options)

    def compile(self):
        """From now on with torch.compile, as ComfyUI's own node does it."""
        from comfy_api.torch_helpers import set_torch_compile_wrapper

        self.patcher = self.patcher.clone()
        set_torch_compile_wrapper(self.patcher, backend="inductor", keys=["diffusion_model"])

    def use_step(self, captions, side, use):
        """Call use(predict) in the midst of a sampling, where predict(side) evaluates the model as each step does.

        captions: states of the prompt, or of the prompt and its negative. predict's side is at most that of the latent.
        """
        step_in_host(self.patcher, captions, side, use)


class HostLoop(OurLoop):
    """ComfyUI's own PixArt. It runs captions of different length in forwards of their own."""

    def __init__(self, config, weights, dtype, device=None):
        import_host(device)
        import comfy.ldm.pixart.pixartms
        import comfy.model_base
        import comfy.model_management
        import comfy.model_patcher
        import comfy.supported_models

        from ..nodes.host.weights.precision import set_inference_dtype

        settings = {**host_settings(config), "dtype": dtype}
        kind = comfy.supported_models.PixArtSigma if config.is_sigma else comfy.supported_models.PixArtAlpha
        description = kind(settings)
        description.unet_config = settings
        manual_cast = comfy.model_management.unet_manual_cast(dtype, _devices()[0], kind.supported_inference_dtypes)
        set_inference_dtype(description, dtype, manual_cast, _devices()[0])
        model = description.get_model({}, "")
        model.diffusion_model.load_state_dict(weights, strict=False)
        self.patcher = comfy.model_patcher.ModelPatcher(model, *_devices())


def host_settings(config):
    """What ComfyUI's own PixArt is built from."""
    return {
        "image_model": "pixart_sigma" if config.is_sigma else "pixart_alpha",
        "depth": config.depth,
        "hidden_size": config.hidden_size,
        "num_heads": config.num_heads,
        "caption_channels": config.caption_channels,
        "micro_condition": config.micro_condition,
        "pe_interpolation": config.pe_scale,
        "model_max_length": config.caption_length,
    }


def _devices():
    import comfy.model_management

    return comfy.model_management.get_torch_device(), comfy.model_management.unet_offload_device()


def sample_in_host(patcher, captions, side, steps, stepped=None, seed=5, guidance=GUIDANCE):
    """Guided steps of ComfyUI's dpmpp_2m from pure noise; captions: positive and negative states."""
    import comfy.sample

    latent = torch.zeros(1, 4, side, side)
    noise = comfy.sample.prepare_noise(latent, seed)
    positive, negative = ([[states.float(), {"pooled_output": None}]] for states in captions)
    with torch.inference_mode():
        return comfy.sample.sample(
            patcher, noise, steps, guidance, "dpmpp_2m", "simple", positive, negative, latent,
            disable_pbar=True, seed=seed, callback=stepped,
        )  # fmt: skip


def step_in_host(patcher, captions, side, use, seed=5):
    """See OurLoop.use_step."""
    import comfy.sample
    import comfy.samplers

    def take(model, x, sigmas, extra_args=None, **_):
        use(lambda side=side: model(x[..., :side, :side], sigmas[:1], **extra_args))
        return x

    latent, sigma = torch.zeros(1, 4, side, side), patcher.get_model_object("model_sampling").sigmas[TIMESTEP]
    noise = comfy.sample.prepare_noise(latent, seed)
    positive, negative = ([[states.float(), {"pooled_output": None}]] for states in (captions[0], captions[-1]))
    guidance = GUIDANCE if len(captions) > 1 else 1.0  # at 1 the negative is not evaluated
    with torch.inference_mode():
        comfy.sample.sample_custom(
            patcher, noise, guidance, comfy.samplers.KSAMPLER(take), torch.stack([sigma, 0 * sigma]), positive,
            negative, latent, disable_pbar=True, seed=seed,
        )  # fmt: skip


def make_transformer(config, weights):
    """diffusers' transformer on the memory of these weights."""
    from diffusers import PixArtTransformer2DModel

    fields = {name: value for name, value in diffusers_config(config).items() if not name.startswith("_")}
    with torch.device("meta"):
        network = PixArtTransformer2DModel(**fields)
    network.load_state_dict(to_diffusers(weights), assign=True)
    empty = PixArtTransformer2DModel(**{**fields, "num_layers": 0, "caption_channels": 8})
    network.pos_embed.pos_embed = empty.pos_embed.pos_embed  # a buffer that no file holds
    return network


class DiffusersLoop:
    """diffusers' transformer and scheduler in the loop of its pipeline: captions padded, under a mask, in one batch."""

    def __init__(self, config, weights, dtype, device="cpu"):
        from diffusers import DPMSolverMultistepScheduler

        self.config, self.dtype, self.device = config, dtype, device
        self.net = make_transformer(config, {name: weight.to(device) for name, weight in weights.items()})
        self.net.pos_embed.pos_embed = self.net.pos_embed.pos_embed.to(device, dtype)
        self.net.eval().requires_grad_(False)
        self.scheduler = DPMSolverMultistepScheduler()

    def pad(self, captions):
        """(states, mask) of the pipeline's encode_prompt: padded to the trained length."""
        length = self.config.caption_length
        states = torch.cat([F.pad(c, (0, 0, 0, length - c.shape[1])) for c in captions])
        counts = torch.tensor([[c.shape[1]] for c in captions])
        return states.to(self.device), (torch.arange(length) < counts).to(self.device, self.dtype)

    def draw_noise(self, side, seed):
        """The latent of pure noise, (1, 4, side, side)."""
        noise = torch.randn(1, 4, side, side, generator=torch.Generator().manual_seed(seed))
        return noise.to(self.device, self.dtype)

    def predict(self, latent, time, states, mask):
        """One forward pass of the transformer."""
        batch, size = latent.shape[0], latent.shape[-1] * 8
        added = {"resolution": None, "aspect_ratio": None}
        if self.config.micro_condition:
            added = {"resolution": torch.full((batch, 2), size), "aspect_ratio": torch.ones(batch, 1)}
            added = {key: value.to(self.device, self.dtype) for key, value in added.items()}
        return self.net(
            latent, encoder_hidden_states=states, encoder_attention_mask=mask, timestep=time,
            added_cond_kwargs=added, return_dict=False,
        )[0]  # fmt: skip

    def compile(self):
        """From now on with torch.compile."""
        self.net = torch.compile(self.net)

    def use_step(self, captions, side, use, seed=5):
        """As OurLoop.use_step."""
        latent = self.draw_noise(side, seed).repeat(len(captions), 1, 1, 1)
        time = torch.full((len(captions),), TIMESTEP, device=self.device)
        with torch.inference_mode():
            states, mask = self.pad(captions)
            use(lambda side=side: self.predict(latent[..., :side, :side], time, states, mask))

    def sample(self, captions, side, steps, stepped=None, seed=5):
        """As OurLoop.sample, with diffusers' own solver of the same order."""
        latent = self.draw_noise(side, seed)
        with torch.inference_mode():
            states, mask = self.pad([captions[1], captions[0]])
            self.scheduler.set_timesteps(steps, device=self.device)
            for time in self.scheduler.timesteps:
                both = self.predict(latent.repeat(2, 1, 1, 1), time.expand(2), states, mask)
                untold, told = both[:, :4].chunk(2)
                latent = self.scheduler.step(untold + GUIDANCE * (told - untold), time, latent, return_dict=False)[0]
                if stepped is not None:
                    stepped()
        return latent
