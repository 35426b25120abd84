"""Nodes that make datasets of pictures and captions, from files or from the graph."""

from comfy_api.latest import io, ui

from ..pixart.training.records import POLICIES
from ..pixart.training.sources import AUTO, KINDS, Columns
from .host.dataset import dataset_of_images, fingerprint_dataset, load_dataset
from .host.schema import choice_input, node_input, schema
from .host.text import show_text
from .host.types import REPORT_TIP, DatasetType

CATEGORY = "PixArt/training"


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
                    tooltip="auto tells it by what is there. folder: pictures with .txt of the same name. csv (also "
                    "dir,text), jsonl. pixart json: data_info.json. sam: images, captions, partition. datasets: "
                    "what Hugging Face's save_to_disk wrote, or .parquet files.",
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
            ],
            outputs=_dataset_outputs(),
            hidden=[io.Hidden.unique_id],
            has_intermediate_output=True,
        )

    @classmethod
    def fingerprint_inputs(
        cls, path="", kind=AUTO, picture_column="", caption_column="", control_column="", control_folder="", **_
    ):
        # What is connected comes as None: then the node before this one tells of changes.
        columns = Columns(*((name or "").strip() for name in (picture_column, caption_column, control_column)))
        return fingerprint_dataset(path or "", kind or AUTO, columns, control_folder or "")

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
    ):
        columns = Columns(*(name.strip() for name in (picture_column, caption_column, control_column)))
        checks = {"smallest_px": smallest, "policy": problems, "fallback_caption": caption, "is_prior": is_prior}
        dataset = load_dataset(path, kind, columns, control_folder, **checks)
        return _dataset_output(cls.hidden, dataset, add_to)


def _dataset_output(hidden, dataset, add_to):
    dataset = dataset if add_to is None else add_to + dataset
    show_text(hidden, dataset.report)
    return io.NodeOutput(dataset, dataset.report, ui=ui.PreviewText(dataset.report))


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


NODES: list[type[io.ComfyNode]] = [TrainingDataset, DatasetFromImages]
