"""Picture size nodes: the aspect-ratio bins of PixArt, and fitting pictures into them."""

from math import gcd

from comfy_api.latest import io

from ..pixart.drawing.diagrams import draw_bins
from ..pixart.quoting import shorten
from ..pixart.resolution import ASPECT_RATIOS, FIT_METHODS, fit_images, nearest_ratio
from .host.denoiser.latent import empty_latent
from .host.pictures import show_picture
from .host.replacements import FOREIGN_BASES, FOREIGN_RATIOS
from .host.schema import choice_input, node_input, schema

BASES = [str(base_px) for base_px in ASPECT_RATIOS]
BASE_TIP = "The size that the model was trained at, in pixels: it chooses the table of picture sizes."
RESOLUTION_MODES = ("by ratio", "nearest to size", "nearest to image")
FIT_MODES = ("into the nearest bin", "to a size")


def _ratio_labels() -> dict[str, float]:
    """`height/width as the tables name it (width:height)` -> ratio."""
    labels = {}
    for ratio, (height, width) in ASPECT_RATIOS[1024].items():
        divisor = gcd(height, width)
        labels[f"{ratio} ({width // divisor}:{height // divisor})"] = ratio
    return labels


RATIOS = _ratio_labels()
SQUARE = next(label for label, ratio in RATIOS.items() if ratio == 1)


def _side_input(name: str, default: int, tooltip: str, **fields):
    return node_input(io.Int, name, default=default, min=0, max=16384, tooltip=tooltip, **fields)


class Resolution(io.ComfyNode):
    """Choose a picture size that PixArt was trained at."""

    @classmethod
    def define_schema(cls):
        return schema(
            node_id="PixArtResolution",
            display_name="PixArt Resolution",
            category="PixArt/latent",
            description="A picture size that PixArt was trained at, by ratio or nearest to a size or picture, with "
            "the empty latent for it.",
            search_aliases=["pixart aspect ratio", "pixart size", "resolution bin", "empty latent"],
            inputs=[
                node_input(io.Combo, "base", options=BASES, default="1024", tooltip=BASE_TIP),
                node_input(
                    io.Combo,
                    "mode",
                    options=list(RESOLUTION_MODES),
                    default=RESOLUTION_MODES[0],
                    tooltip="by ratio: the one chosen below. nearest to size: to width and height. nearest to image: "
                    "to the connected picture.",
                ),
                choice_input(
                    "ratio",
                    RATIOS,
                    default=SQUARE,
                    tooltip="Height / width as PixArt's tables name it; in brackets width:height. For by ratio.",
                ),
                _side_input("width", 1024, "The wanted width, for nearest to size.", optional=True),
                _side_input("height", 1024, "The wanted height, for nearest to size.", optional=True),
                node_input(
                    io.Int,
                    "batch_size",
                    default=1,
                    min=1,
                    max=4096,
                    optional=True,
                    tooltip="How many pictures the latent is for.",
                ),
                node_input(io.Image, "image", optional=True, tooltip="The picture, for nearest to image."),
            ],
            outputs=[
                io.Int.Output(display_name="width", tooltip="Width in pixels."),
                io.Int.Output(display_name="height", tooltip="Height in pixels."),
                io.Latent.Output(display_name="latent", tooltip="An empty latent of this size."),
                io.Float.Output(display_name="ratio", tooltip="The nominal height / width of the table."),
            ],
            has_intermediate_output=True,
        )

    @classmethod
    def validate_inputs(cls, base=None, ratio=None):
        for name, value, known in (("base", base, {*BASES, *FOREIGN_BASES}), ("ratio", ratio, RATIOS | FOREIGN_RATIOS)):
            if value is not None and value not in known:
                return f"Unknown {name}: got '{value}', expected one of the list. Choose it in PixArt Resolution."
        return True

    @classmethod
    def execute(cls, base, mode, ratio=SQUARE, width=1024, height=1024, batch_size=1, image=None):
        base_px = FOREIGN_BASES.get(base) or int(base)
        if mode == "nearest to image":
            height, width = _image_size(image)
        elif mode == "by ratio" and ratio in FOREIGN_RATIOS:
            width, height = ASPECT_RATIOS[base_px][FOREIGN_RATIOS[ratio]]
        is_chosen = mode == "by ratio" and ratio in RATIOS
        chosen = RATIOS[ratio] if is_chosen else nearest_ratio(height, width, base_px)
        height_px, width_px = ASPECT_RATIOS[base_px][chosen]
        if mode == "by ratio" and not is_chosen:
            height_px, width_px = height, width  # some mirrored bins, such as 704 x 1344, are none
        latent = empty_latent(height_px, width_px, batch_size)
        return io.NodeOutput(width_px, height_px, latent, chosen, ui=show_picture(draw_bins(base_px, chosen), cls))


def _image_size(image) -> tuple[int, int]:
    if image is None:
        raise ValueError(
            "Not connected: got no image, expected one for the mode 'nearest to image'. "
            "Connect a picture, or choose another mode."
        )
    return image.shape[1], image.shape[2]


class FitImage(io.ComfyNode):
    """Resize and centre-crop pictures into a bin, or to any size."""

    @classmethod
    def define_schema(cls):
        return schema(
            node_id="PixArtFitImage",
            display_name="PixArt Fit Image",
            category="PixArt/image",
            description="Resize and centre-crop a picture into the nearest size that PixArt was trained at, for image "
            "to image; or bring the result back to a wanted size.",
            search_aliases=["pixart resize", "crop to bin", "fit to resolution", "resize and crop"],
            inputs=[
                node_input(io.Image, "image", tooltip="The pictures, all of one size."),
                node_input(
                    io.Combo,
                    "mode",
                    options=list(FIT_MODES),
                    default=FIT_MODES[0],
                    tooltip="into the nearest bin: by the picture's ratio. to a size: to width and height.",
                ),
                node_input(io.Combo, "base", options=BASES, default="1024", optional=True, tooltip=BASE_TIP),
                _side_input("width", 0, "The wanted width, for to a size.", optional=True),
                _side_input("height", 0, "The wanted height, for to a size.", optional=True),
                choice_input(
                    "method",
                    FIT_METHODS,
                    advanced=True,
                    tooltip="bicubic and lanczos as PixArt's training pictures were prepared; bilinear as diffusers "
                    "brings its results to size.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="image", tooltip="The fitted pictures."),
                io.Int.Output(display_name="width", tooltip="Their width in pixels."),
                io.Int.Output(display_name="height", tooltip="Their height in pixels."),
                io.Int.Output(display_name="original_width", tooltip="Width before, for the way back."),
                io.Int.Output(display_name="original_height", tooltip="Height before, for the way back."),
            ],
        )

    @classmethod
    def execute(cls, image, mode, base="1024", width=0, height=0, method=FIT_METHODS[0]):
        old_height, old_width = _image_size(image)
        if mode == "into the nearest bin":
            height, width = ASPECT_RATIOS[int(base)][nearest_ratio(old_height, old_width, int(base))]
        elif not (width and height):
            raise ValueError(
                f"Incomplete size: got {width}x{height}, expected a width and height for the mode {shorten(mode)}. Set "
                f"both, or connect original_width and original_height of the first PixArt Fit Image."
            )
        fitted = fit_images(image.movedim(-1, 1), height, width, method).movedim(1, -1)
        return io.NodeOutput(fitted, width, height, old_width, old_height)


NODES: list[type[io.ComfyNode]] = [Resolution, FitImage]
