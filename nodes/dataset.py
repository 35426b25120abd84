"""Nodes that make datasets of pictures and captions, from files, from the graph, or by a captioning model."""

from comfy_api.latest import io, ui

from ..pixart.data.records import POLICIES
from ..pixart.data.sources import AUTO, KINDS, Columns
from ..pixart.data.variety.captions import CaptionVariety
from ..pixart.data.variety.masks import MASKS, NONE
from ..pixart.data.variety.records import Variety, join, vary
from ..pixart.data.variety.views import CENTRE, FOCI, ViewVariety
from ..pixart.encoders.captioner import DESCRIBE, DESCRIBE_CAPTION, CaptionSettings
from .host.schema import choice_input, node_input, schema, seed_input
from .host.text.captions import show_text
from .host.training.captioning import PRECISIONS, caption_images, list_captioners
from .host.training.dataset import Source, dataset_of_images, fingerprint_dataset, load_dataset
from .host.types import REPORT_TIP, DatasetType

CATEGORY = "PixArt/training"
NAMES = ("plain", "10_cat shows pictures 10 times")  # of folders


def _text_input(name: str, tooltip: str, **fields):
    return node_input(io.String, name, default="", optional=True, tooltip=tooltip, **fields)


def _check_inputs() -> list:
    return [
        node_input(
            io.Int,
            "smallest",
            default=0,
            min=0,
            max=4096,
            optional=True,
            tooltip="Pictures whose shorter side has fewer pixels are too small. 0: all pass, and are enlarged.",
        ),
        choice_input(
            "problems",
            POLICIES,
            tooltip="What happens to unreadable, doubled, too small or narrow pictures and missing captions. skip: "
            "they are left out and named in the report. error: the prompt ends with the table.",
        ),
        node_input(
            io.Boolean,
            "is_prior",
            default=False,
            optional=True,
            tooltip="For DreamBooth: these are pictures of the whole class, which the model is to keep.",
        ),
        node_input(DatasetType, "add_to", optional=True, tooltip="Another dataset that these pictures are added to."),
    ]


def _mask_inputs() -> list:
    return [
        choice_input(
            "folder_names",
            NAMES,
            advanced=True,
            tooltip="10_cat shows pictures 10 times: folders' names say how often their pictures are shown in an "
            "epoch, and what they show where a picture has no caption, as kohya's trainers read them.",
        ),
        choice_input(
            "masks",
            MASKS,
            advanced=True,
            tooltip="What of the pictures is learned. alpha: what is opaque in them. files: what is white in pictures "
            "of the same name with -masklabel behind it.",
        ),
        _text_input(
            "mask_folder",
            "Masks under the names of the pictures: what is white in them is learned. In the input folder, or an "
            "absolute path.",
            advanced=True,
        ),
    ]


def _dataset_outputs() -> list:
    return [
        DatasetType.Output(display_name="dataset", tooltip="For PixArt Encode Dataset."),
        io.String.Output(display_name="report", tooltip=REPORT_TIP),
    ]


class TrainingDataset(io.ComfyNode):
    """Read pictures and captions from disk, and check them."""

    @classmethod
    def define_schema(cls):
        return schema(
            node_id="PixArtDataset",
            display_name="PixArt Dataset",
            category=CATEGORY,
            description="Training pictures with captions: a folder with .txt files, a table, PixArt's own or a "
            "Hugging Face dataset. Every picture is read and checked before any training, in one table.",
            search_aliases=["training data", "load dataset", "image caption folder", "csv dataset"],
            inputs=[
                node_input(
                    io.String,
                    "path",
                    default="",
                    tooltip="A folder or file in ComfyUI's input folder, or an absolute path. Tables in the input "
                    "folder may name pictures below their own folder only; those at an absolute path any.",
                ),
                node_input(
                    io.Combo,
                    "kind",
                    options=list(KINDS),
                    default=KINDS[0],
                    tooltip="auto chooses by what is there. folder: pictures with .txt of the same name. csv (also "
                    "dir,text), jsonl. pixart json: data_info.json. sam: images, captions, partition. datasets: "
                    "what Hugging Face's save_to_disk wrote, or .parquet files. tar: tar files as WebDataset and SA-1B "
                    "have them.",
                ),
                _text_input("caption", "The caption of pictures that have none, such as: a photo of sks dog"),
                _text_input("picture_column", "For tables; empty: by its usual names.", advanced=True),
                _text_input("caption_column", "For tables; empty: by its usual names.", advanced=True),
                _text_input("control_column", "For tables with control pictures.", advanced=True),
                _text_input(
                    "control_folder",
                    "Control pictures for a ControlNet, under the names of the pictures. In the input folder, or an "
                    "absolute path.",
                    advanced=True,
                ),
                *_check_inputs(),
                *_mask_inputs(),
            ],
            outputs=_dataset_outputs(),
            hidden=[io.Hidden.unique_id],
            has_intermediate_output=True,
        )

    @classmethod
    def fingerprint_inputs(cls, path="", kind=AUTO, masks=NONE, folder_names=NAMES[0], **rest):
        # What is connected comes as None: then the node before this one reports changes.
        columns = Columns(*((rest.get(f"{name}_column") or "").strip() for name in ("picture", "caption", "control")))
        folders = ((rest.get(f"{name}_folder") or "") for name in ("control", "mask"))
        control, mask = folders
        is_named = folder_names == NAMES[1]
        return fingerprint_dataset(Source(path or "", kind or AUTO, columns, control, is_named, masks or NONE, mask))

    @classmethod
    def execute(
        cls,
        path,
        kind,
        caption="",
        picture_column="",
        caption_column="",
        control_column="",
        control_folder="",
        smallest=0,
        problems=POLICIES[0],
        is_prior=False,
        add_to=None,
        folder_names=NAMES[0],
        masks=NONE,
        mask_folder="",
    ):
        columns = Columns(*(name.strip() for name in (picture_column, caption_column, control_column)))
        checks = {"smallest_px": smallest, "policy": problems, "fallback_caption": caption, "is_prior": is_prior}
        source = Source(path, kind, columns, control_folder, folder_names == NAMES[1], masks, mask_folder)
        dataset = load_dataset(source, **checks)
        return _dataset_output(cls.hidden, dataset, add_to)


def _dataset_output(hidden, dataset, add_to):
    dataset = dataset if add_to is None else add_to + dataset
    show_text(hidden, dataset.report)
    return io.NodeOutput(dataset, dataset.report, ui=ui.PreviewText(dataset.report))


class VaryDataset(io.ComfyNode):
    """Say how often pictures are shown, and make variants of their captions and of themselves."""

    @classmethod
    def define_schema(cls):
        return schema(
            node_id="PixArtVaryDataset",
            display_name="PixArt Vary Dataset",
            category=CATEGORY,
            description="How often pictures are shown, and in which variants: several captions, shuffled tags, trigger "
            "words, other crops and colours. Each variant is encoded once; a training draws one in each step.",
            search_aliases=[
                "repeats",
                "shuffle tags",
                "caption dropout",
                "augmentation",
                "trigger word",
                "dataset mix",
            ],
            inputs=[
                node_input(DatasetType, "dataset", tooltip="From PixArt Dataset."),
                *_share_inputs(),
                *_word_inputs(),
                *_view_inputs(),
            ],
            outputs=_dataset_outputs(),
            hidden=[io.Hidden.unique_id],
            has_intermediate_output=True,
        )

    @classmethod
    def execute(
        cls,
        dataset,
        repeats=1.0,
        weight=1.0,
        add_to=None,
        share=0.0,
        each_line=False,
        trigger="",
        prefix="",
        suffix="",
        shuffle_tags=False,
        drop_tags=0.0,
        keep_tags=0,
        separator=",",
        caption_variants=4,
        views=1,
        focus=CENTRE,
        zoom=1.0,
        mirror=0.0,
        colour=0.0,
    ):
        words = CaptionVariety(
            each_line, caption_variants, shuffle_tags, drop_tags, keep_tags, separator, trigger, prefix, suffix
        )
        seen = ViewVariety(views, focus.strip(), zoom, mirror, colour)
        dataset = vary(dataset, Variety(words if words.changes else None, seen, repeats, weight))
        dataset = dataset if add_to is None else join(add_to, dataset, share)
        return _dataset_output(cls.hidden, dataset, None)


def _number(name: str, default: float, low: float, high: float, tooltip: str, step: float = 0.05, **fields):
    limits = {"default": default, "min": low, "max": high, "step": step}
    return node_input(io.Float, name, **limits, optional=True, tooltip=tooltip, **fields)


def _share_inputs() -> list:
    return [
        _number("repeats", 1.0, 0.01, 1000.0, "How often each is shown in an epoch. 0.5: half of them, by turns.", 0.5),
        _number("weight", 1.0, 0.01, 100.0, "Factor of their loss.", advanced=True),
        node_input(DatasetType, "add_to", optional=True, tooltip="Another dataset that these pictures are added to."),
        _number(
            "share",
            0.0,
            0.0,
            1000.0,
            "How many of these an epoch shows for one of the pictures that they are added to. 0: each as often as its "
            "repeats say.",
            0.1,
        ),
    ]


def _word_inputs() -> list:
    return [
        node_input(
            io.Boolean,
            "each_line",
            default=False,
            optional=True,
            tooltip="Each line of a text, and each entry of a table's list, is a caption of its own.",
        ),
        _text_input("trigger", "Words at the beginning of every caption that does not have them."),
        _text_input("prefix", "Text before every caption.", advanced=True),
        _text_input("suffix", "Text behind every caption.", advanced=True),
        node_input(
            io.Boolean,
            "shuffle_tags",
            default=False,
            optional=True,
            tooltip="Tags in another order in each variant of a caption.",
        ),
        _number("drop_tags", 0.0, 0.0, 0.95, "Share of the tags that each variant leaves out."),
        node_input(
            io.Int,
            "keep_tags",
            default=0,
            min=0,
            max=100,
            optional=True,
            tooltip="So many tags at the beginning stay where they are.",
        ),
        node_input(
            io.String, "separator", default=",", optional=True, advanced=True, tooltip="What stands between tags."
        ),
        node_input(
            io.Int,
            "caption_variants",
            default=4,
            min=1,
            max=100,
            optional=True,
            tooltip="Variants of each caption where tags are shuffled or left out. Each takes T5's time and 8 KB a "
            "token on disk.",
        ),
    ]


def _view_inputs() -> list:
    return [
        node_input(
            io.Int,
            "views",
            default=1,
            min=1,
            max=100,
            optional=True,
            tooltip="Variants of each picture, the first as it is. Each takes the VAE's time and a latent's room.",
        ),
        node_input(
            io.String,
            "focus",
            default=CENTRE,
            optional=True,
            advanced=True,
            tooltip=f"Where pictures are cut: {', '.join(FOCI)}, or two numbers from 0 to 1 such as 0.5, 0.3.",
        ),
        _number("zoom", 1.0, 1.0, 10.0, "Other views are at most so many times nearer.", advanced=True),
        _number("mirror", 0.0, 0.0, 1.0, "Share of the other views that is mirrored.", advanced=True),
        _number("colour", 0.0, 0.0, 1.0, "How far other views differ in their colours.", advanced=True),
    ]


class DatasetFromImages(io.ComfyNode):
    """Make a dataset of pictures and captions in the graph."""

    @classmethod
    def define_schema(cls):
        return schema(
            node_id="PixArtDatasetFromImages",
            display_name="PixArt Dataset From Images",
            category=CATEGORY,
            description="Training data from pictures and captions that are in the graph: batches, or lists of "
            "pictures of several sizes.",
            search_aliases=["training data", "images to dataset", "image list", "dreambooth"],
            is_input_list=True,
            inputs=[
                node_input(io.Image, "images", tooltip="The pictures: a batch, or a list of any sizes."),
                node_input(
                    io.String,
                    "captions",
                    multiline=True,
                    tooltip="One line for each picture, or one for all; or a connected list of as many texts.",
                ),
                node_input(io.Image, "control", optional=True, tooltip="A control picture for each, for a ControlNet."),
                *_check_inputs(),
            ],
            outputs=_dataset_outputs(),
            hidden=[io.Hidden.unique_id],
            has_intermediate_output=True,
        )

    @classmethod
    def execute(
        cls, images, captions, control=(), smallest=(0,), problems=POLICIES[:1], is_prior=(False,), add_to=None
    ):
        checks = {"smallest_px": smallest[0], "policy": problems[0], "is_prior": is_prior[0]}
        dataset = dataset_of_images(images, captions, control or (), **checks)
        return _dataset_output(cls.hidden, dataset, add_to[0] if add_to else None)


USUAL = CaptionSettings()


class CaptionImages(io.ComfyNode):
    """Describe pictures by a vision-language model."""

    @classmethod
    def define_schema(cls):
        return schema(
            node_id="PixArtCaptionImages",
            display_name="PixArt Caption Images",
            category="PixArt/training",
            description="Describe pictures in detail with LLaVA or another vision-language model, as PixArt's own "
            "training captions were made. The captions go to PixArt Dataset From Images, or back into a prompt.",
            search_aliases=["llava", "vlm", "image to text", "auto caption", "interrogate", "describe image"],
            is_input_list=True,
            inputs=[
                node_input(io.Image, "images", tooltip="Pictures of any sizes."),
                node_input(
                    io.Combo,
                    "model",
                    options=list_captioners(),
                    tooltip="A folder of models/LLM as transformers saves it, such as llava-1.5-7b-hf.",
                ),
                node_input(
                    io.String,
                    "prompt",
                    multiline=True,
                    default="",
                    optional=True,
                    tooltip=f"What to ask; {{}} stands for the short caption. Empty asks as PixArt's authors did: "
                    f"{DESCRIBE}; or with a short caption: {DESCRIBE_CAPTION}.",
                ),
                node_input(
                    io.String,
                    "captions",
                    optional=True,
                    force_input=True,
                    tooltip="Short captions that the pictures have already: one for each, or one for all.",
                ),
                node_input(
                    io.Int,
                    "max_tokens",
                    default=USUAL.max_tokens,
                    min=1,
                    max=8192,
                    optional=True,
                    tooltip="Where a caption is cut that does not end by itself.",
                ),
                node_input(
                    io.Float,
                    "temperature",
                    default=USUAL.temperature,
                    min=0.0,
                    max=2.0,
                    step=0.05,
                    optional=True,
                    tooltip="0 always takes the likeliest word; more varies the words.",
                ),
                seed_input(
                    "Other words for the same picture, where the temperature is above 0.", control_after_generate=True
                ),
                node_input(
                    io.Int,
                    "batch_size",
                    default=4,
                    min=1,
                    max=256,
                    optional=True,
                    advanced=True,
                    tooltip="Pictures at once; more is faster and takes more memory.",
                ),
                choice_input(
                    "precision",
                    PRECISIONS,
                    advanced=True,
                    tooltip="Of the weights. default: as they are in the folder.",
                ),
            ],
            outputs=[
                io.String.Output(
                    display_name="captions", is_output_list=True, tooltip="A caption for each picture, whole."
                )
            ],
        )

    @classmethod
    def execute(
        cls,
        images,
        model,
        prompt=("",),
        captions=(),
        max_tokens=(USUAL.max_tokens,),
        temperature=(USUAL.temperature,),
        seed=(0,),
        batch_size=(4,),
        precision=PRECISIONS[:1],
    ):
        settings = CaptionSettings(max_tokens[0], temperature[0], seed[0])
        texts = caption_images(images, model[0], prompt[0], captions, settings, batch_size[0], precision[0])
        return io.NodeOutput(texts)


NODES: list[type[io.ComfyNode]] = [TrainingDataset, DatasetFromImages, CaptionImages, VaryDataset]
