"""Edge pictures for ControlNet."""

from comfy_api.latest import io

from ..pixart.resolution import ASPECT_RATIOS
from .host.edges import AUTO, HED, METHODS, list_hed_models, make_edges
from .host.schema import choice_input, node_input, schema

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


NODES: list[type[io.ComfyNode]] = [HEDPreprocessor]
