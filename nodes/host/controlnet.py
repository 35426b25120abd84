"""PixArt's ControlNet as the host's CONTROL_NET: chained, scaled, scheduled and moved in memory like any other."""

import threading
import weakref
from pathlib import Path

import comfy.controlnet
import comfy.latent_formats
import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.utils
import torch
from torch.utils.weak import WeakTensorKeyDictionary

from ...pixart.config import PixArtConfig
from ...pixart.controlnet import ControlBranch, PixArtControlNet
from ...pixart.weights.controlnets import ALPHA_CLASS, SIGMA_CLASS, ControlNetCheckpoint, read_controlnet
from ...pixart.weights.detection import SIGMA
from .denoiser.model import cast_weight, name_tables, with_table
from .folders import find_file, find_folder, find_folders, list_files
from .loading import DTYPES, class_name, hints_of, make_model
from .weights.packed import PackedOperations, is_packed
from .weights.precision import choose_dtypes

# Several devices of the host evaluate at once, each in a thread; the first evaluation encodes the image, for which
# models are moved in memory. A control calls the one before it.
_ENCODING = threading.RLock()
FILE_KINDS, FOLDER_KINDS = ("controlnet",), ("controlnet", "diffusers")


class Residual:
    """What control adds in front of one block of the base, computed when the base gets there.

    The host's `control_merge` handles it like a tensor: it is scaled by the strength and added to other controls'.
    terms: pairs of a function of (tokens, BlockInputs) and a strength.
    """

    def __init__(self, terms, shape):
        self.terms = tuple(terms)
        self.shape = shape

    def __imul__(self, strength):
        return Residual([(compute, factor * strength) for compute, factor in self.terms], self.shape)

    def __add__(self, other):
        return Residual([*self.terms, *other.terms], self.shape)

    def __call__(self, tokens, inputs):
        """The sum, (B, N, D), or a single zero when every strength is."""
        total = None
        for compute, strength in self.terms:
            if strength == 0:
                continue
            residual = compute(tokens, inputs)
            residual = residual if strength == 1 else residual * strength
            total = residual if total is None else total + residual
        return tokens.new_zeros(()) if total is None else total


class ControlNetModel(PixArtControlNet):
    """The control branch behind the calling convention of the host's ControlNets."""

    def __init__(self, config: PixArtConfig, num_copies: int, dtype: torch.dtype, packed: bool = False):
        # Weights are cast to the base's dtype, whatever theirs. Built without memory: the file's tensors are assigned.
        operations = with_table(PackedOperations if packed else comfy.ops.manual_cast)
        super().__init__(config, num_copies, operations=operations, dtype=dtype, device="meta")
        self.dtype = dtype
        self.captions = WeakTensorKeyDictionary()  # of the run: see ControlBranch

    def forward(self, x, hint, timesteps, context, base_model=None, **_):
        """The branch over base_model as lazy residuals; nothing is computed yet.

        x: (B, C, H, W). hint: (B or 1, C, H, W), encoded and scaled. timesteps, context: the base brings them itself.
        """
        # By a weak reference: the host takes a model for leaked while anything, such as a kept residual, refers to it.
        branch = ControlBranch(weakref.proxy(self), base_model, hint, self.captions)
        return {"output": [Residual([(compute, 1.0)], x.shape) for compute in branch.residuals()]}


class PixArtControl(comfy.controlnet.ControlNet):
    """A CONTROL_NET of PixArt. family: "alpha" or "sigma", None when nothing in the file shows it."""

    def __init__(self, control_model, family=None, load_device=None):
        super().__init__(
            control_model,
            compression_ratio=1,  # the hint becomes a latent, as large as the picture's
            latent_format=comfy.latent_formats.SD15(),  # until `pre_run` brings the model's own
            load_device=load_device,
            manual_cast_dtype=torch.float32,  # of the hint; the base casts it to its own
            extra_conds=[],
            preprocess_image=to_rgb,
        )
        self.family = family
        self.whole_hint = None  # the image's latent, (B, C, H, W), while windows of the picture are sampled
        self.upscale_algorithm = "bilinear"  # a hint of the picture's size comes through unchanged

    def copy(self):
        """A twin over the same weights, for other hints and strengths."""
        twin = PixArtControl(None, self.family, self.load_device)
        twin.control_model, twin.control_model_wrapped = self.control_model, self.control_model_wrapped
        self.copy_to(twin)
        return twin

    def pre_run(self, model, percent_to_timestep_function):
        """Checks, before the first step, that model, hint and control belong together; ValueError otherwise."""
        config = getattr(model, "pixart_config", None)
        if config is None:
            raise ValueError(
                f"PixArt ControlNet on another model: got {type(model).__name__}, expected a PixArt of this pack. "
                f"Connect the MODEL of Load PixArt Checkpoint to the sampler."
            )
        self._check_family(config)
        self.control_model.match_base(config)
        if self.vae is None:
            raise ValueError(
                "ControlNet image without a VAE: got none, expected the one of the PixArt model. Connect it to "
                "PixArt ControlNet Apply, or to the vae input of Apply ControlNet."
            )
        super().pre_run(model, percent_to_timestep_function)
        if tuple(self.timestep_percent_range) == (0.0, 1.0):
            self.timestep_range = None  # or the host would wait for the device at each step, to look at the time
        self.latent_format = model.latent_format
        self.set_extra_arg("base_model", model.diffusion_model)

    def get_control(self, x_noisy, t, cond, batched_number, transformer_options):
        """The host's residuals; in a window of rows or columns, by that part of the image which lies under it."""
        window = transformer_options.get("context_window")
        with _ENCODING:  # the residuals themselves are computed later, by the base
            if window is not None and window.dim >= 2:
                self._show_window(x_noisy, window)
            return super().get_control(x_noisy, t, cond, batched_number, transformer_options)

    def _show_window(self, x_noisy, window):
        before = getattr(window, "causal_anchor_index", None)  # a row or column in front, which the host cuts off again
        places = [*([] if before is None else [before]), *window.index_list]
        sides = list(x_noisy.shape[2:])
        if sides[window.dim - 2] != len(places):
            return
        sides[window.dim - 2] = window.total_frames
        if self.whole_hint is None or list(self.whole_hint.shape[2:]) != sides:
            pixels = [side * self.vae.spacial_compression_encode() for side in sides]
            image = comfy.utils.common_upscale(
                self.cond_hint_original, pixels[1], pixels[0], self.upscale_algorithm, "center"
            )
            running = comfy.model_management.loaded_models(only_currently_used=True)
            latent = self.vae.encode(to_rgb(image).movedim(1, -1))
            comfy.model_management.load_models_gpu(running)
            self.whole_hint = self.latent_format.process_in(latent).to(x_noisy.device, self.manual_cast_dtype)
        places = torch.tensor(places, device=self.whole_hint.device)
        self.cond_hint = self.whole_hint.index_select(window.dim, places)

    def cleanup(self):
        """Lets go of the model that was sampled with, and of its captions."""
        self.extra_args.pop("base_model", None)
        self.control_model.captions.clear()
        self.whole_hint = None
        super().cleanup()

    def _check_family(self, config):
        if self.family is not None and (self.family == SIGMA) != config.is_sigma:
            raise ValueError(
                f"ControlNet of the other family: got one of PixArt-{self.family}, expected one of PixArt-"
                f"{'sigma' if config.is_sigma else 'alpha'} like the model. Connect the model that it was trained on."
            )


def to_rgb(image):
    """(B, C, H, W) -> (B, 3, H, W): grey is repeated, transparency left out."""
    return image[:, :3] if image.shape[1] >= 3 else image[:, :1].repeat(1, 3, 1, 1)


def apply_control(positive, negative, control_net, image, vae, strength, start_percent, end_percent):
    """Both CONDITIONINGs with the control net in them. image: (B, H, W, C) in [0, 1]; percents as fractions.

    Raises ValueError for a CONTROL_NET of another kind, a VAE with other channels, and a start after the end.
    """
    if not isinstance(control_net, PixArtControl):
        raise ValueError(
            f"Not a PixArt ControlNet: got {type(control_net).__name__}, expected the CONTROL_NET of Load PixArt "
            f"ControlNet. Connect that node, or use ComfyUI's Apply ControlNet."
        )
    channels = getattr(vae, "latent_channels", control_net.control_model.config.in_channels)
    if channels != control_net.control_model.config.in_channels:
        raise ValueError(
            f"VAE of another model: got one of {channels} latent channels, expected "
            f"{control_net.control_model.config.in_channels}. Connect the VAE that decodes this model's pictures."
        )
    if start_percent > end_percent:
        raise ValueError(
            f"Control ends before it starts: got start_percent {start_percent:g} and end_percent {end_percent:g}, "
            f"expected a start before the end. Exchange them."
        )
    if strength == 0:
        return positive, negative
    hint, twins = image.movedim(-1, 1), {}

    def controlled(entry):
        options = entry[1].copy()
        previous = options.get("control")
        if previous not in twins:  # prompts that share their controls share this one, so the host can batch them
            twins[previous] = control_net.copy().set_cond_hint(hint, strength, (start_percent, end_percent), vae=vae)
            twins[previous].set_previous_controlnet(previous)
        options |= {"control": twins[previous], "control_apply_to_uncond": False}
        return [entry[0], options]

    return [controlled(entry) for entry in positive], [controlled(entry) for entry in negative]


def list_controlnets() -> list[str]:
    """What Load PixArt ControlNet offers: files of models/controlnet, and diffusers folders there and in diffusers."""
    return [*list_files(FILE_KINDS), *find_folders(FOLDER_KINDS, _is_controlnet)]


def load_controlnet(name: str, variant: str, dtype: str):
    """(CONTROL_NET, MODEL or None) of one of list_controlnets. MODEL: the base of a combined file.

    variant: of loading.VARIANTS, for the base; dtype: of loading.DTYPES. Raises ValueError for files of other kinds.
    """
    if name.endswith("/"):
        path = find_folder(FOLDER_KINDS, _is_controlnet, name)
    else:
        path = find_file(FILE_KINDS, name)
    checkpoint = _read(path, variant, dtype)
    control = make_control(checkpoint, DTYPES[dtype])
    return control, None if checkpoint.base is None else _base_model(checkpoint, path, variant, dtype)


def _read(path, variant, dtype):
    return read_controlnet(path, packed=DTYPES[dtype] is None, **hints_of(variant))


def load_base(path, variant, dtype, disable_dynamic=False):
    """The MODEL in a combined file: what the host calls to load the same once more."""
    return _base_model(_read(path, variant, dtype), path, variant, dtype, disable_dynamic)


def _base_model(checkpoint, path, variant, dtype, disable_dynamic=False):
    model = make_model(checkpoint.base, dtype, disable_dynamic)
    model.cached_patcher_init = (load_base, (path, variant, dtype))
    return model


def make_control(checkpoint: ControlNetCheckpoint, dtype: torch.dtype | None = None) -> PixArtControl:
    """A CONTROL_NET. dtype: of the weights; None lets the host choose by the file and the device."""
    management = comfy.model_management
    state_dict, packed = checkpoint.state_dict, is_packed(checkpoint.state_dict)
    supported = [torch.float16, torch.bfloat16, torch.float32]
    dtype, _ = choose_dtypes(state_dict, management.get_torch_device(), supported, dtype)
    model = ControlNetModel(checkpoint.config, checkpoint.num_copies, dtype, packed)
    state_dict = name_tables({key: cast_weight(key, value, dtype) for key, value in state_dict.items()})
    model.load_state_dict(state_dict, strict=True, assign=True)
    model.eval().requires_grad_(False)
    management.archive_model_dtypes(model)
    control = PixArtControl(model, checkpoint.family, load_device=management.get_torch_device())
    if packed:  # without the host's dynamic memory: these layers cast by themselves
        devices = {"load_device": control.load_device, "offload_device": management.unet_offload_device()}
        control.control_model_wrapped = comfy.model_patcher.ModelPatcher(model, **devices)
    return control


def _is_controlnet(folder: Path) -> bool:
    return class_name(folder) in (ALPHA_CLASS, SIGMA_CLASS)
