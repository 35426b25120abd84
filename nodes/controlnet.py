"""ControlNet nodes: load one, make its edge pictures, and let it steer a picture."""

from comfy_api.latest import io

from ..pixart.resolution import ASPECT_RATIOS
from .host.controlnet import apply_control, list_controlnets, load_controlnet
from .host.edges import AUTO, HED, METHODS, list_hed_models, make_edges
from .host.loading import DTYPES, VARIANTS
from .host.schema import choice_input, missing_output, node_input, percent_input, schema, seed_input
from .host.steering.reference import add_reference

CATEGORY = "PixArt/controlnet"
NO_BASE = (
    "No base model in this ControlNet file: got control weights alone, expected a combined file such as "
    "PixArt-XL-2-1024-ControlNet.pth. Connect the MODEL of Load PixArt Checkpoint instead."
)


class LoadControlNet(io.ComfyNode):
    """Load a PixArt ControlNet, and its base model where the file holds both."""

    @classmethod
    def define_schema(cls):
        return schema(
            node_id="PixArtLoadControlNet",
            display_name="Load PixArt ControlNet",
            category=CATEGORY,
            description="Load a PixArt ControlNet: the official .pth with its base model, control weights alone, or a "
            "diffusers folder. The CONTROL_NET works with PixArt ControlNet Apply and ComfyUI's Apply ControlNet.",
            search_aliases=["pixart controlnet", "control net", "pixart delta", "load controlnet", "hed", "canny"],
            inputs=[
                node_input(
                    io.Combo,
                    "controlnet",
                    options=list_controlnets(),
                    tooltip="A file of models/controlnet, such as PixArt-XL-2-1024-ControlNet.pth, or a diffusers "
                    "folder there. GGUF and quantised files are read, too.",
                ),
                choice_input(
                    "weight_dtype",
                    DTYPES,
                    default="default",
                    tooltip="Precision of the weights, of the base model too. default: as ComfyUI thinks best for the "
                    "file and the device. fp8 halves the memory at a small loss. With default, GGUF stays packed.",
                ),
                choice_input(
                    "variant",
                    VARIANTS,
                    advanced=True,
                    tooltip="Which released PixArt the base model in the file is. Choose it where auto is wrong.",
                ),
            ],
            outputs=[
                io.ControlNet.Output(display_name="control_net", tooltip="The ControlNet."),
                io.Model.Output(
                    display_name="model",
                    tooltip="The base model, when the file holds it; else connect Load PixArt Checkpoint.",
                ),
            ],
        )

    @classmethod
    def execute(cls, controlnet, weight_dtype="default", variant=VARIANTS[0]):
        control, model = load_controlnet(controlnet, variant, weight_dtype)
        return io.NodeOutput(control, missing_output(NO_BASE) if model is None else model)


class ControlNetApply(io.ComfyNode):
    """Let a PixArt ControlNet steer a picture by an image."""

    @classmethod
    def define_schema(cls):
        return schema(
            node_id="PixArtControlNetApply",
            display_name="PixArt ControlNet Apply",
            category=CATEGORY,
            description="Let a PixArt ControlNet steer the picture by an image, such as the edges of PixArt HED "
            "Preprocessor. Chain it for several controls.",
            search_aliases=["apply controlnet", "pixart control", "use controlnet", "hint"],
            inputs=[
                node_input(io.Conditioning, "positive", tooltip="The prompt."),
                node_input(io.Conditioning, "negative", tooltip="The negative prompt."),
                node_input(io.ControlNet, "control_net", tooltip="Of Load PixArt ControlNet."),
                node_input(
                    io.Image,
                    "image",
                    tooltip="What steers the picture. Another size is scaled and cropped from its middle. A batch "
                    "gives each picture its own.",
                ),
                node_input(io.Vae, "vae", tooltip="The VAE that decodes the model's pictures: it encodes the image."),
                node_input(
                    io.Float,
                    "strength",
                    default=1.0,
                    min=0.0,
                    max=10.0,
                    step=0.01,
                    tooltip="1 is as trained, 0 is no control at all.",
                ),
                percent_input(
                    "start_percent",
                    0.0,
                    "When control begins, as a fraction of the sampling: 0 is the first step.",
                    step=0.001,
                ),
                percent_input(
                    "end_percent",
                    1.0,
                    "When control ends: 1 is the last step. Ending early lets details go their own way.",
                    step=0.001,
                ),
            ],
            outputs=[
                io.Conditioning.Output(display_name="positive", tooltip="The prompt, with control."),
                io.Conditioning.Output(display_name="negative", tooltip="The negative prompt, with control."),
            ],
        )

    @classmethod
    def execute(cls, positive, negative, control_net, image, vae, strength, start_percent, end_percent):
        return io.NodeOutput(
            *apply_control(positive, negative, control_net, image, vae, strength, start_percent, end_percent)
        )


class ReferencePicture(io.ComfyNode):
    """Let a picture resemble another one."""

    @classmethod
    def define_schema(cls):
        return schema(
            node_id="PixArtReference",
            display_name="PixArt Reference Picture",
            category="PixArt/controlnet",
            description="Let pictures resemble an image in colours, forms and style: their self-attention also reads "
            "the image, noised as far as they are. Nothing is trained. Each step takes about twice as long.",
            search_aliases=["reference only", "reference image", "style reference", "image prompt", "ip adapter"],
            inputs=[
                node_input(io.Model, "model", tooltip="The PixArt model. LoRAs and ControlNets work with it."),
                node_input(
                    io.Image,
                    "image",
                    tooltip="The reference, of any size. A batch gives each picture its own. Chain the node for "
                    "several references.",
                ),
                node_input(io.Vae, "vae", tooltip="The VAE that decodes the model's pictures: it encodes the image."),
                node_input(
                    io.Float,
                    "strength",
                    default=1.0,
                    min=0.0,
                    max=10.0,
                    step=0.01,
                    tooltip="How much each part of the reference counts: 1 as much as the picture's own, 0 not at all.",
                ),
                percent_input(
                    "start_percent",
                    0.0,
                    "When the reference begins to be read, as a fraction of the sampling: 0 is the first step.",
                    step=0.001,
                ),
                percent_input(
                    "end_percent",
                    1.0,
                    "When it ends: 1 is the last step. Ending early leaves the details to the prompt.",
                    step=0.001,
                ),
                seed_input("Of the noise on the reference.", advanced=True),
            ],
            outputs=[io.Model.Output(display_name="model", tooltip="The model with the reference, for any sampler.")],
        )

    @classmethod
    def execute(cls, model, image, vae, strength, start_percent, end_percent, seed=0):
        return io.NodeOutput(add_reference(model, image, vae, strength, start_percent, end_percent, seed))


KEEP_SIZE = "keep"


def _threshold_input(name: str, default: float, tooltip: str):
    limits = {"min": 0.01, "max": 0.99, "step": 0.01}
    return node_input(io.Float, name, default=default, **limits, optional=True, advanced=True, tooltip=tooltip)


class HEDPreprocessor(io.ComfyNode):
    """Draw the edges of pictures, as PixArt's ControlNet was trained on them."""

    @classmethod
    def define_schema(cls):
        return schema(
            node_id="PixArtHEDPreprocessor",
            display_name="PixArt HED Preprocessor",
            category="PixArt/controlnet",
            description="White edges on black for PixArt ControlNet. hed is what the official one was trained with; "
            "soft edges resembles it and needs no file; canny draws thin lines.",
            search_aliases=["hed", "edge detection", "soft edge", "softedge", "canny", "controlnet preprocessor"],
            inputs=[
                node_input(io.Image, "image", tooltip="The pictures, of any size."),
                node_input(
                    io.Combo,
                    "method",
                    options=list(METHODS),
                    default=HED,
                    tooltip="hed: the official network, from a file. soft edges: soft lines without a file. canny: "
                    "lines one pixel wide.",
                ),
                choice_input(
                    "hed_model",
                    list_hed_models(),
                    default=AUTO,
                    tooltip="For hed: ControlNetHED.pth in models/annotators or models/controlnet. auto finds it by "
                    "its name.",
                ),
                node_input(
                    io.Float,
                    "strength",
                    default=1.0,
                    min=0.0,
                    max=2.0,
                    step=0.05,
                    optional=True,
                    tooltip="What the edges' brightness is multiplied by, as in PixArt's own demo. The ControlNet's "
                    "strength is set where it is applied.",
                ),
                choice_input(
                    "fit",
                    [KEEP_SIZE, *map(str, ASPECT_RATIOS)],
                    default=KEEP_SIZE,
                    tooltip="keep: edges of the picture's own size. A number: resize and crop the picture into the "
                    "nearest size that a PixArt of this base was trained at. Give the latent the same size.",
                ),
                _threshold_input("low_threshold", 0.4, "For canny: how faint a line may be that touches a clear one."),
                _threshold_input("high_threshold", 0.8, "For canny: how clear a line must be to be drawn."),
            ],
            outputs=[
                io.Image.Output(display_name="edges", tooltip="White edges on black."),
                io.Int.Output(display_name="width", tooltip="Their width in pixels, for the latent."),
                io.Int.Output(display_name="height", tooltip="Their height in pixels, for the latent."),
            ],
        )

    @classmethod
    def execute(cls, image, method, hed_model=AUTO, strength=1.0, fit=KEEP_SIZE, low_threshold=0.4, high_threshold=0.8):
        base_px = None if fit == KEEP_SIZE else int(fit)
        edges = make_edges(image, method, hed_model, strength, base_px, (low_threshold, high_threshold))
        return io.NodeOutput(edges, edges.shape[2], edges.shape[1])


NODES: list[type[io.ComfyNode]] = [LoadControlNet, ControlNetApply, ReferencePicture, HEDPreprocessor]
