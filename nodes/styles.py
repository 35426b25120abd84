"""The style node: templates around a prompt, and the flags that the original app reads in it."""

import logging

from comfy_api.latest import io

from ..pixart.resolution import ASPECT_RATIOS, parse_prompt_flags
from ..pixart.styles import PLAIN, STYLES_FILE, find_styles, load_styles
from .host.folders import user_file
from .host.schema import choice_input, node_input, schema

log = logging.getLogger(__name__)

USER_FILE = "pixart_styles.json"  # in ComfyUI's user folder, which an update of the pack does not touch
BASES = [str(base_px) for base_px in ASPECT_RATIOS]


def _known_styles() -> dict:
    """The shipped styles and the user's own. Raises ValueError for a slip in the user's file."""
    return load_styles([STYLES_FILE, user_file(USER_FILE)])


def _style_names() -> list[str]:
    try:
        return list(_known_styles())
    except (ValueError, OSError) as error:  # a slip in the user's file must not take the node away
        log.warning("Styles are missing from the list: %s", error)
        return [PLAIN.name]


class Style(io.ComfyNode):
    """Put a prompt into one style, or into many."""

    @classmethod
    def define_schema(cls):
        return schema(
            node_id="PixArtStyle",
            display_name="PixArt Style",
            category="PixArt/conditioning",
            description="Put a prompt into a style: a template around the words and what the style avoids for the "
            f"negative. Several styles run the graph once each. Your own go into {USER_FILE} in ComfyUI's user folder.",
            search_aliases=["style selector", "prompt template", "sdxl prompt styler", "aspect ratio flag", "--ar"],
            inputs=[
                node_input(io.String, "text", multiline=True, dynamic_prompts=True, tooltip="What the picture shows."),
                node_input(io.Combo, "style", options=_style_names(), default=PLAIN.name, tooltip="The template."),
                node_input(
                    io.String,
                    "negative",
                    multiline=True,
                    dynamic_prompts=True,
                    default="",
                    optional=True,
                    tooltip="What to avoid; the style's own is added to it.",
                ),
                node_input(
                    io.String,
                    "more_styles",
                    multiline=True,
                    default="",
                    optional=True,
                    advanced=True,
                    tooltip="Names of further styles, one on each line or between commas; * takes all. The rest of "
                    "the graph runs once for each.",
                ),
                node_input(
                    io.Boolean,
                    "prompt_flags",
                    default=False,
                    optional=True,
                    advanced=True,
                    tooltip="Read --ar height:width (nearest trained size) and --hw height:width (pixels of the "
                    "finished picture) in the text, as PixArt's own app does. The text ends at the first flag.",
                ),
                choice_input(
                    "base",
                    BASES,
                    default="1024",
                    advanced=True,
                    tooltip="The size that the model was trained at, for --ar.",
                ),
            ],
            outputs=[
                io.String.Output(display_name="text", is_output_list=True, tooltip="The styled prompt."),
                io.String.Output(display_name="negative", is_output_list=True, tooltip="The styled negative."),
                io.String.Output(display_name="style", is_output_list=True, tooltip="The style's name, as a label."),
                io.Int.Output(display_name="width", tooltip="Width to sample at: of --ar, else of the square."),
                io.Int.Output(display_name="height", tooltip="Height to sample at."),
                io.Int.Output(display_name="output_width", tooltip="Width of the finished picture: of --hw, or width."),
                io.Int.Output(display_name="output_height", tooltip="Height of the finished picture."),
            ],
        )

    @classmethod
    def execute(cls, text, style, negative="", more_styles="", prompt_flags=False, base="1024"):
        flags = parse_prompt_flags(text if prompt_flags else "", int(base))
        styles = _known_styles()
        chosen = list(dict.fromkeys([*find_styles(style, styles), *find_styles(more_styles, styles)]))
        words = flags.prompt if prompt_flags else text
        texts, negatives = zip(*(each.apply(words, negative) for each in chosen), strict=True)
        names = [each.name for each in chosen]
        return io.NodeOutput(list(texts), list(negatives), names, *flags.bin_px[::-1], *flags.output_px[::-1])


NODES: list[type[io.ComfyNode]] = [Style]
