"""Nodes that make training data: datasets from files or from the graph, and their encoding."""

from comfy_api.latest import io, ui

from ..pixart.training.cache import DTYPES, SIZE_CONDITIONS
from ..pixart.training.records import POLICIES
from ..pixart.training.sources import KINDS, Columns
from .host.dataset import (
    dataset_of_images,
    describe_features,
    features_of_latents,
    fingerprint_paths,
    load_dataset,
    load_features,
)
from .host.edges import AUTO, list_hed_models
from .host.encoding import CACHE_FOLDER, CONTROL_FILES, CONTROL_METHODS, encode_dataset, settings_for
from .host.schema import choice_input, node_input, schema
from .host.text import show_text

CATEGORY = "PixArt/training"
DatasetType = io.Custom("PIXART_DATASET")
FeaturesType = io.Custom("PIXART_FEATURES")
BINS = ("aspect ratio bins", "square")
CLEANING = ("off", "official")
REPORT_TIP = "What is in it, and what was wrong with which picture."


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


def _features_outputs() -> list:
    return [
        FeaturesType.Output(display_name="features", tooltip="For the PixArt training nodes."),
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
                    "what Hugging Face's save_to_disk wrote.",
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
        )

    @classmethod
    def fingerprint_inputs(cls, path="", control_folder="", **_):
        return fingerprint_paths(path, control_folder)

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
        )

    @classmethod
    def execute(
        cls, images, captions, control=(), smallest=(0,), problems=POLICIES[:1], is_prior=(False,), add_to=None
    ):
        checks = {"smallest_px": smallest[0], "policy": problems[0], "is_prior": is_prior[0]}
        dataset = dataset_of_images(images, captions, control or (), **checks)
        return _dataset_output(cls.hidden, dataset, add_to[0] if add_to else None)


class DatasetFromLatents(io.ComfyNode):
    """Take latents and conditionings in the graph as an encoded dataset."""

    @classmethod
    def define_schema(cls):
        return schema(
            node_id="PixArtDatasetFromLatents",
            display_name="PixArt Dataset From Latents",
            category=CATEGORY,
            description="Training data that is encoded already: the latents and conditioning of Make or Load Training "
            "Dataset, Resolution Bucket, or any encoders.",
            search_aliases=["training data", "latents to dataset", "make training dataset", "cached latents"],
            is_input_list=True,
            inputs=[
                node_input(io.Latent, "latents", tooltip="One, a batch, or a list of any sizes, not noised."),
                node_input(
                    io.Conditioning,
                    "conditioning",
                    tooltip="The captions of the same pictures, in the same order; or a single one for all.",
                ),
                node_input(
                    io.Conditioning,
                    "empty",
                    optional=True,
                    tooltip="The empty caption, from PixArt Negative: needed for caption dropout where the model has "
                    "no learned null caption.",
                ),
            ],
            outputs=_features_outputs(),
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, latents, conditioning, empty=None):
        return _features_output(cls.hidden, features_of_latents(latents, conditioning, empty[0] if empty else None))


def _features_output(hidden, features):
    report = describe_features(features)
    show_text(hidden, report)
    return io.NodeOutput(features, report, ui=ui.PreviewText(report))


class EncodeDataset(io.ComfyNode):
    """Encode a dataset once, so that training needs neither T5 nor VAE."""

    @classmethod
    def define_schema(cls):
        return schema(
            node_id="PixArtEncodeDataset",
            display_name="PixArt Encode Dataset",
            category=CATEGORY,
            description="Encode captions with T5 and pictures with the VAE, once: what a later run finds in the cache "
            "is not encoded again, and nothing in it is ever stale. An interrupted run goes on where it was.",
            search_aliases=["cache latents", "vae encode dataset", "cache text encoder", "extract features"],
            inputs=[
                node_input(DatasetType, "dataset", tooltip="From PixArt Dataset."),
                node_input(io.Clip, "clip", tooltip="The T5 encoder: Load T5 Text Encoder, or Load CLIP as pixart."),
                node_input(
                    io.Vae, "vae", tooltip="The autoencoder of the model: sd-vae-ft-ema for alpha, SDXL's for Sigma."
                ),
                node_input(
                    io.Model,
                    "model",
                    optional=True,
                    tooltip="The PixArt model that is to be trained, for its size and caption length.",
                ),
                node_input(
                    io.Int,
                    "resolution",
                    default=0,
                    min=0,
                    max=4096,
                    step=16,
                    optional=True,
                    tooltip="The size that the model was trained at, in pixels. 0: the connected model's.",
                ),
                choice_input(
                    "bins",
                    BINS,
                    tooltip="aspect ratio bins: each picture is resized and cropped into the nearest of PixArt's "
                    "sizes. square: all into the square one, as the models without several sizes were trained.",
                ),
                node_input(
                    io.Boolean,
                    "flip",
                    default=False,
                    optional=True,
                    tooltip="Add the mirrored picture of each. Not where left and right or letters matter.",
                ),
                *_caption_inputs(),
                *_control_inputs(),
                *_cache_inputs(),
            ],
            outputs=_features_outputs(),
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        dataset,
        clip,
        vae,
        model=None,
        resolution=0,
        bins=BINS[0],
        flip=False,
        caption_length=0,
        clean_caption=CLEANING[0],
        caption_dtype="fp16",
        size_condition=SIZE_CONDITIONS[0],
        control=CONTROL_FILES,
        hed_model=AUTO,
        batch_size=1,
        name="dataset",
    ):
        choices = {"square": bins == "square", "flip": flip, "clean": clean_caption == "official"}
        choices |= {"caption_dtype": caption_dtype, "size_condition": size_condition}
        settings = settings_for(model, resolution, caption_length, **choices)
        places = {"hed_model": hed_model, "batch_size": batch_size, "name": name}
        features = encode_dataset(dataset, clip, vae, settings, model=model, control=control, **places)
        return _features_output(cls.hidden, features)


def _caption_inputs() -> list:
    return [
        node_input(
            io.Int,
            "caption_length",
            default=0,
            min=0,
            max=4096,
            optional=True,
            advanced=True,
            tooltip="Longest caption in tokens; what is longer is cut. 0: the connected model's, which is 120 for "
            "alpha and 300 for Sigma.",
        ),
        choice_input(
            "clean_caption",
            CLEANING,
            advanced=True,
            tooltip="As in PixArt Text Encode; choose the same when you use what you train.",
        ),
        choice_input(
            "caption_dtype",
            DTYPES,
            default="fp16",
            advanced=True,
            tooltip="How captions are stored: fp16 and bf16 take half the space of fp32.",
        ),
        choice_input(
            "size_condition",
            SIZE_CONDITIONS,
            advanced=True,
            tooltip="The size that PixArt-alpha 1024 is told. bin: the one it is trained at, as when you make "
            "pictures. picture: the picture's own, as in PixArt's own training, which hints at its quality.",
        ),
    ]


def _control_inputs() -> list:
    return [
        choice_input(
            "control",
            CONTROL_METHODS,
            default=CONTROL_FILES,
            tooltip="For a ControlNet. control pictures: the dataset's own, where it has some. hed, soft edges, "
            "canny: drawn from the pictures, as PixArt HED Preprocessor does. none: left out.",
        ),
        choice_input(
            "hed_model",
            list_hed_models(),
            default=AUTO,
            advanced=True,
            tooltip="For hed: ControlNetHED.pth. auto finds it by its name.",
        ),
    ]


def _cache_inputs() -> list:
    return [
        node_input(
            io.Int,
            "batch_size",
            default=1,
            min=1,
            max=64,
            optional=True,
            advanced=True,
            tooltip="Pictures that the VAE encodes at once. More is faster only on large GPUs.",
        ),
        node_input(
            io.String,
            "name",
            default="dataset",
            optional=True,
            tooltip=f"Folder of the cache in output/{CACHE_FOLDER}, best one for each dataset: PixArt Load Features "
            "opens what was encoded into it last.",
        ),
    ]


class LoadFeatures(io.ComfyNode):
    """Open a dataset that was encoded before."""

    @classmethod
    def define_schema(cls):
        return schema(
            node_id="PixArtLoadFeatures",
            display_name="PixArt Load Features",
            category=CATEGORY,
            description="Open an encoded dataset: a cache of PixArt Encode Dataset or of the command line, or the "
            ".npz and .npy files of PixArt-alpha's own training.",
            search_aliases=["load encoded dataset", "cached features", "npz features"],
            inputs=[
                node_input(
                    io.String,
                    "path",
                    default=f"{CACHE_FOLDER}/dataset",
                    tooltip="A cache's folder or features.json in ComfyUI's output folder, or an absolute path. For "
                    "PixArt-alpha's files the folder above caption_feature_wmask.",
                ),
            ],
            outputs=_features_outputs(),
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, path):
        return _features_output(cls.hidden, load_features(path))


NODES: list[type[io.ComfyNode]] = [TrainingDataset, DatasetFromImages, DatasetFromLatents, EncodeDataset, LoadFeatures]
