"""PixArt as one of ComfyUI's own models: weights under its memory management, patches and wrappers honoured."""

import functools
from typing import NamedTuple

import comfy.model_base
import comfy.model_management
import comfy.ops
import comfy.patcher_extension
import comfy.supported_models_base
import comfy.utils
import torch
from torch.utils.weak import WeakTensorKeyDictionary

from ....pixart.checkpoint import CONFIG_KEY, config_to_tensor
from ....pixart.config import PixArtConfig
from ....pixart.layers import blank_hidden, common_row
from ....pixart.quoting import shorten
from ....pixart.transformer import PixArt, ProjectedCaption, add_control
from ....pixart.weights.quantised.packed import Packed
from ..weights.eight_bit import FORMAT, quantise, require_kernels
from ..weights.memory import CAPTION_MEMORY_BYTES, CONTROLS, count_bytes, count_controls, longest
from ..weights.packed import PackedOperations, is_packed
from ..weights.precision import choose_dtypes, set_inference_dtype
from .attention import block_attention
from .block_cache import BLOCK_CACHE
from .compilation import COMPILED, compiled_blocks
from .conditions import RATIO_UNITS, CaptionCond, MaskCond, SizeCond, in_window
from .kv_compression import compress_keys
from .latent import latent_format
from .noise_levels import PixArtSampling, check_noise_levels, share_row
from .patcher import make_named
from .patches import read_patches
from .words import UNetFields

VARIANCE_SINK = "pixart_variance"  # transformer option: a list that receives (cond_or_uncond, full prediction)
REFERENCE = "pixart_reference"  # transformer option: what keeps and reads a reference's tokens, see pixart.reference
TABLES = ("scale_shift_table", "y_embedding")  # parameters that are modules of their own here


class Table(torch.nn.Module, comfy.ops.CastWeightBiasOp):
    """A bare parameter as a leaf module: the host patches, merges and offloads modules with a `weight` only."""

    comfy_cast_weights = True

    def __init__(self, rows, width, dtype=None, device=None):
        super().__init__()
        if dtype is not None and dtype.itemsize == 1:
            dtype = torch.float16  # 0.1 % of the weights, and every token passes them: not worth 8 bits
        self.weight = torch.nn.Parameter(torch.empty(rows, width, dtype=dtype, device=device), requires_grad=False)
        self.bias = None

    def forward(self, x):
        """The rows on x's device and in its dtype: (rows, D)."""
        weight, bias, stream = comfy.ops.cast_bias_weight(self, x, offloadable=True)
        rows = weight + 0 if self._is_lent(weight, stream) else weight
        comfy.ops.uncast_bias_weight(self, weight, bias, stream)
        return rows

    def _is_lent(self, weight, stream):
        """Whether the weight lies in a buffer of the host, which is reused: neither the parameter nor cast from it."""
        if hasattr(self, "_v"):  # of the host's dynamic memory
            return True
        given = stream[1] if isinstance(stream, tuple) else None if stream is None else weight
        return weight is given and weight is not self.weight


@functools.cache
def with_table(operations):
    """The host's operations, and Table among them."""
    return type("PixArtOperations", (operations,), {"Table": Table})


class RememberedCaption(NamedTuple):
    """A caption of this run with what was made of it at its first step. source: the tensor that the net is given."""

    source: torch.Tensor
    projected: ProjectedCaption


class PixArtNet(PixArt):
    """The transformer behind the host's calling convention; every public patch point of the host works on it."""

    def __init__(self, pixart_config: PixArtConfig, dtype=None, device=None, operations=None, **_):
        super().__init__(pixart_config, operations=with_table(operations), dtype=dtype, device=device)
        self.dtype = dtype
        self.in_channels = pixart_config.in_channels  # nodes of other models look here

    def forward(self, x, timesteps, context, control=None, transformer_options=None, **conds):
        """x: (B, C, H, W). context: (B, L, caption_channels). Returns the predicted noise, (B, C, H, W)."""
        options = {} if transformer_options is None else transformer_options
        wrappers = comfy.patcher_extension.get_all_wrappers(comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, options)
        executor = comfy.patcher_extension.WrapperExecutor.new_class_executor(self._predict, self, wrappers)
        return executor.execute(x, timesteps, context, control, options, **conds)

    def _predict(
        self,
        x,
        timesteps,
        context,
        control=None,
        transformer_options=None,
        attention_mask=None,
        c_size=None,
        c_ar=None,
        remembered_caption=None,
        **_,
    ):
        options = {} if transformer_options is None else transformer_options
        ratio = None if c_ar is None else common_row(c_ar).float() / RATIO_UNITS
        tokens, grid = self.embed_latent(x)
        condition = self.embed_condition(x, timesteps, c_size, ratio)
        caption = context
        if remembered_caption is not None and remembered_caption.source is context:  # no wrapper has put another
            caption = remembered_caption.projected
        compiled = options.get(COMPILED)
        with block_attention(options, compiled is not None) as attention:
            inputs = self.prepare_blocks(tokens, grid, condition, caption, attention_mask, attention)
            if compiled is not None:
                inputs = compiled.enter(inputs, tokens)
            tokens = self._run_blocks(tokens, inputs, x, condition, _residuals(control), options)
        sink = options.get(VARIANCE_SINK)
        wanted = self.config.in_channels if sink is None else None
        prediction = self.project(tokens, condition, grid, x.shape, wanted)
        if sink is not None:
            sink.append((options.get("cond_or_uncond"), prediction))
        return prediction[:, : self.config.in_channels]

    def _run_blocks(self, tokens, inputs, x, condition, residuals, options):
        patches = options.get("patches", {})
        for patch in patches.get("post_input", ()):
            given = {"img": tokens, "txt": inputs.caption, "img_ids": None, "txt_ids": None}
            out = patch({**given, "transformer_options": options})
            tokens, inputs = out["img"], inputs.with_caption(out["txt"])
        options["total_blocks"], options["block_type"] = len(self.blocks), "double"
        placed = read_patches(options, len(self.blocks), self.config.kv_compress_ratio, inputs.grid)
        cache = options.get(BLOCK_CACHE)
        evaluation = None
        if cache is not None:
            read_input = functools.partial(self.blocks[0].modulate_input, tokens, inputs, 0)
            evaluation = cache.begin(options, residuals, tokens, len(self.blocks), read_input)
        held = placed is not None or evaluation is not None or residuals
        inputs = inputs._replace(overwrites=not held and not self.is_watched())
        index = 0
        while index < len(self.blocks):
            if evaluation is not None:
                index, tokens = evaluation.before(index, tokens)
            if index == len(self.blocks):
                break
            options["block_index"] = index
            tokens = add_control(tokens, residuals, index, compress_keys(inputs, index - 1, len(self.blocks), options))
            tokens, inputs = self._run_block(self.blocks[index], index, tokens, inputs, condition, options, placed)
            for patch in patches.get("double_block", ()):
                given = {"img": tokens, "txt": inputs.caption, "x": x, "block_index": index}
                out = patch({**given, "transformer_options": options})
                tokens, inputs = out["img"], inputs.with_caption(out.get("txt", inputs.caption))
            index += 1
        if evaluation is not None:
            evaluation.end(tokens)
        return tokens

    def _run_block(self, block, index, tokens, inputs, condition, options, placed):
        here = compress_keys(inputs, index, len(self.blocks), options)
        if placed is not None:
            here = placed.place(here, index)
        for each in options.get(REFERENCE, ()):
            here = each.place(here, index)
        replacement = None if placed is None else placed.replacement("dit", index)
        if replacement is None:
            return here.run_block(block, tokens, index), inputs

        def original(given):
            given_here = here.with_caption(given.get("txt", here.caption))
            return {"img": given_here.run_block(block, given["img"], index), "txt": given_here.caption}

        vector = condition.expand(tokens.shape[0], -1)
        given = {"img": tokens, "txt": inputs.caption, "vec": vector, "transformer_options": options}
        out = replacement(given, {"original_block": original})
        return out["img"], inputs.with_caption(out.get("txt", inputs.caption))


def _residuals(control):
    """The host's control dict -> residuals in the order of the blocks they precede, from block 1 on."""
    return None if control is None else control.get("output")


class PixArtModel(comfy.model_base.PixArt):
    """PixArt as a BaseModel. Subclasses the host's PixArt only for its LoRA key map, which depends on the class."""

    def __init__(self, model_config, device=None):
        # Built without memory: every tensor of the file is assigned, so none is allocated twice. The host's layers in
        # 8 bits have none before they are loaded, and take what they get to the device that they were built on.
        net = PixArtNet if model_config.quant_config else functools.partial(_on_meta, PixArtNet)
        comfy.model_base.BaseModel.__init__(
            self, model_config, comfy.model_base.ModelType.EPS, device=device, unet_model=net
        )
        self.model_sampling = PixArtSampling(model_config)
        self._captions = WeakTensorKeyDictionary()  # caption of a run -> ProjectedCaption; goes with the caption

    @property
    def pixart_config(self) -> PixArtConfig:
        """The hyper-parameters."""
        return self.diffusion_model.config

    @property
    def has_null_caption(self) -> bool:
        """Whether the file held the learned "no caption"."""
        return self.diffusion_model.has_null_caption

    def extra_conds(self, **kwargs):
        """The conditioning of one prompt as tensors: caption, mask, size in pixels, and aspect ratio.

        On the device where the model computes: what is elsewhere would be sent there at every step.
        Raises ValueError for a conditioning without a caption, or with one of another width.
        """
        check_noise_levels(self.model_sampling)
        out = comfy.model_base.BaseModel.extra_conds(self, **kwargs)
        caption = kwargs.get("cross_attn")
        if caption is None:
            raise ValueError(
                "No caption: got a conditioning without text, expected a prompt for each side. Connect a text node, "
                "or PixArt Negative for the side that is to say nothing."
            )
        caption, mask = self._caption(caption, kwargs.get("attention_mask"), kwargs.get("pixart_null", False))
        size, ratio = kwargs.get("pixart_size"), kwargs.get("pixart_ratio") or kwargs.get("aspect_ratio")
        own = size is None, size is None and ratio is None  # the latent's
        size = size or (kwargs["height"], kwargs["width"])
        ratio = ratio or size[0] / size[1]
        device = kwargs.get("device", caption.device)
        whole = bool(mask.all())
        out["c_crossattn"] = CaptionCond(caption.to(device=device, dtype=self.get_dtype_inference()), whole)
        out["attention_mask"] = MaskCond(mask.to(device), whole)
        out["c_size"] = SizeCond(size, device, own[0])
        out["c_ar"] = SizeCond([round(ratio * RATIO_UNITS)], device, own[1])
        return out

    def extra_conds_shapes(self, **kwargs):
        """What a prompt says of the memory that it will take, for `memory_required`."""
        caption = kwargs.get("cross_attn")
        shapes = {} if caption is None else {"c_crossattn": list(caption.shape)}
        return {**shapes, CONTROLS: list(count_controls(kwargs.get("control")))}

    def memory_required(self, input_shape, cond_shapes={}):  # noqa: B006  the host's signature
        """Bytes beside the weights. input_shape: of all latents that are denoised together, (B, C, H, W)."""
        management = comfy.model_management
        if not (management.xformers_enabled() or management.pytorch_attention_flash_attention()):
            return super().memory_required(input_shape, cond_shapes=cond_shapes)  # which counts the logits
        config = self.pixart_config
        maths = self.get_dtype_inference()
        length = longest(cond_shapes.get("c_crossattn", ())) or config.caption_length
        controls = max(map(tuple, cond_shapes.get(CONTROLS, ())), default=(0, 0))
        return count_bytes(
            config, input_shape[0], tuple(input_shape[-2:]), management.dtype_size(maths), length, controls,
            casts=maths != self.get_dtype() or self.model_config.custom_operations is not None,
        )  # fmt: skip

    def resize_cond_for_context_window(self, cond_key, cond_value, window, x_in, device, retain_index_list=()):
        """A condition for a window of rows or columns: the host samples it as a picture of its own."""
        return in_window(cond_key, cond_value, window, x_in)

    def _caption(self, caption, mask, is_null):
        """Caption (B, L, channels) and mask (B, L) long, cut to the longest valid caption.

        Tokens that other nodes appended have no mask of their own: they are kept.
        """
        channels = self.pixart_config.caption_channels
        if caption.shape[-1] != channels:
            raise ValueError(
                f"Caption width mismatch: got {caption.shape[-1]}, expected {channels}. "
                f"Connect the T5 text encoder of this PixArt model (T5-XXL for the released ones) to the text node."
            )
        batch, length = caption.shape[:2]
        keep = torch.ones(batch, length, dtype=torch.long, device=caption.device)
        if mask is not None:
            mask = comfy.utils.repeat_to_batch_size(mask.flatten(1), batch)[:, :length]
            keep[:, : mask.shape[1]] = mask.to(keep)
        if is_null:
            caption = self._null_caption(batch, length, caption)
            keep = keep[:, : caption.shape[1]]
        used = keep.any(dim=0).nonzero()
        longest = int(used[-1]) + 1 if len(used) else 1
        caption, keep = caption[:, :longest], keep[:, :longest]
        return (caption if mask is None else blank_hidden(caption, keep)), keep

    def _null_caption(self, batch, length, like):
        """The learned "no caption", cut to `length` tokens, in the dtype of `like`: (B, L, channels)."""
        if not self.has_null_caption:
            raise ValueError(
                "This PixArt file has no learned null caption: got a diffusers-layout file, expected the original "
                "layout. Set PixArt Negative to 'empty' or 'text', or load the original .pth."
            )
        return self.diffusion_model.y_embedder.y_embedding(like)[None, :length].expand(batch, -1, -1)

    def _apply_model(self, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options=None, **kwargs):
        options = {} if transformer_options is None else transformer_options
        net = self.diffusion_model
        remembered = self._remember(c_crossattn)
        if remembered is not None:
            kwargs["remembered_caption"] = remembered
        if self.current_patcher is not None:
            t = share_row(t, options, self.current_patcher.model_options)
        blocks = compiled_blocks(net, self.current_patcher, options)
        if blocks is None:
            return super()._apply_model(x, t, c_concat, c_crossattn, control, options, **kwargs)
        try:
            self.diffusion_model = getattr(net, "_orig_mod", net)  # what decides between blocks is not to be compiled
            return super()._apply_model(x, t, c_concat, c_crossattn, control, {**options, COMPILED: blocks}, **kwargs)
        finally:
            self.diffusion_model = net

    def _remember(self, caption):
        """The caption with its projection and every block's keys and values; None where they could grow stale.

        Within a run of a sampler weights change by hooks alone; every run has captions of its own.
        """
        patcher = self.current_patcher
        if caption is None or patcher is None or getattr(patcher, "hook_patches", None) or torch.is_grad_enabled():
            return None
        if caption.dtype != self.get_dtype_inference():
            return None
        if caption not in self._captions:
            config = self.pixart_config
            numbers = caption.shape[0] * caption.shape[1] * config.hidden_size * (1 + 2 * config.depth)
            known = self._captions.values()
            kept = sum(each.states.nbytes * (1 + 2 * config.depth) for each in known if each.keys_values)
            fits = kept + numbers * caption.element_size() <= CAPTION_MEMORY_BYTES
            self._captions[caption] = self.diffusion_model.project_caption(caption, keep_keys=fits)
        return RememberedCaption(caption, self._captions[caption])

    def load_model_weights(self, sd, unet_prefix="", assign=True):
        """Loads a state dict in the original layout, strictly, by assignment. Raises ValueError naming the keys."""
        state = {key[len(unet_prefix) :]: sd.pop(key) for key in list(sd) if key.startswith(unet_prefix)}
        state = self.model_config.process_unet_state_dict(state)
        try:
            self.diffusion_model.load_state_dict(state, strict=True, assign=True)
        except RuntimeError as error:
            raise ValueError(
                f"PixArt weights do not fit the model: got {shorten(str(error).splitlines()[1:4], 300)}, expected the "
                f"keys and shapes of {self.pixart_config}. Choose the right variant in the loader, or "
                f"download the file again."
            ) from error
        self.diffusion_model.requires_grad_(False)
        comfy.model_management.archive_model_dtypes(self.diffusion_model)
        return self


def _on_meta(net_class, **fields):
    return net_class(**{**fields, "device": "meta"})


class PixArtModelConfig(comfy.supported_models_base.BASE):
    """What the host wants to know of a model before it builds it."""

    sampling_settings = {
        "beta_schedule": "sqrt_linear",  # the host's name for betas that are linear themselves
        "linear_start": 0.0001,
        "linear_end": 0.02,
        "timesteps": 1000,
    }
    unet_extra_config = {}
    memory_usage_factor = 0.5
    vae_key_prefix = ["vae."]
    text_encoder_key_prefix = ["text_encoders."]

    def __init__(self, config: PixArtConfig):
        self.latent_format = latent_format(config)
        super().__init__(
            {
                "image_model": "pixart_sigma" if config.is_sigma else "pixart_alpha",
                "pixart_config": config,
                "depth": config.depth,
                "hidden_size": config.hidden_size,
                "in_channels": config.in_channels,
            }
        )
        self.unet_config = UNetFields(self.unet_config)
        self.latent_format.scale_factor = config.vae_scale

    def get_model(self, state_dict, prefix="", device=None):
        """The model without its weights; see PixArtModel.load_model_weights."""
        return PixArtModel(self, device=device).eval()

    def inpaint_model(self):
        """PixArt has no inpainting channels; masks work by blending."""
        return False

    def process_unet_state_dict(self, state_dict):
        """Original names -> the module's."""
        return name_tables(state_dict)

    def process_unet_state_dict_for_saving(self, state_dict):
        """The module's names -> original ones behind the host's prefix, with the config among them."""
        config = self.unet_config["pixart_config"]
        named = {}
        for key, value in state_dict.items():
            bare = key.removesuffix(".weight")
            named[bare if bare.endswith(TABLES) else key] = value
        named[CONFIG_KEY] = config_to_tensor(config)  # says what the shapes cannot tell
        return super().process_unet_state_dict_for_saving(named)


def make_patcher(state_dict, config, dtype=None, fp8_optimizations=False, disable_dynamic=False):
    """A MODEL from a state dict in the original layout, which is emptied on the way.

    dtype: of the weights; None lets the host choose by the file and the device, see `choose_dtypes`. torch.int8: the
    blocks' linear layers multiply in it, see `eight_bit`; the others have the dtype of the maths.
    Raises ValueError when weights and config do not fit.
    """
    management = comfy.model_management
    load_device, offload_device = management.get_torch_device(), management.unet_offload_device()
    model_config = PixArtModelConfig(config)
    supported = list(model_config.supported_inference_dtypes)
    in_8_bits = dtype == torch.int8
    dtype, manual_cast = choose_dtypes(state_dict, load_device, supported, None if in_8_bits else dtype)
    if in_8_bits:
        require_kernels()
        dtype = manual_cast = manual_cast or dtype
        model_config.quant_config = {"format": FORMAT}
    set_inference_dtype(model_config, dtype, manual_cast, load_device)
    model_config.optimizations["fp8"] = fp8_optimizations
    packed = is_packed(state_dict) and not in_8_bits
    if packed:
        model_config.custom_operations = PackedOperations
    model = model_config.get_model(state_dict)
    patcher = make_named(model, load_device, offload_device, disable_dynamic or packed)
    for key in list(state_dict):  # one by one, so that the file's tensors go as ours come
        in_its_place = quantise(key, state_dict[key]) if in_8_bits else {}
        state_dict.update(in_its_place or {key: cast_weight(key, state_dict[key], dtype)})
    # The host moves its weights in 8 bits as it runs nodes, without gradients, and cannot move others then.
    with torch.inference_mode(in_8_bits or torch.is_inference_mode_enabled()):
        model.load_model_weights(state_dict, assign=True)
    if not management.is_device_cpu(offload_device):
        model.to(offload_device)
    return patcher


def name_tables(state_dict):
    """Original names -> the module's: a table is a leaf module here."""
    return {f"{key}.weight" if key.endswith(TABLES) else key: value for key, value in state_dict.items()}


def cast_weight(key, tensor, dtype):
    """A tensor of the file in the dtype that its parameter has in the host."""
    if isinstance(tensor, Packed) or not tensor.is_floating_point():
        return tensor
    if dtype.itemsize == 1 and key.endswith(TABLES):
        dtype = torch.float16
    return tensor.to(dtype)
