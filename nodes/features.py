"""Nodes that encode datasets, once, and open what was encoded."""

from comfy_api.latest import io, ui

from ..pixart.data.cache import CAPTION_DTYPES, EACH, SIZE_CONDITIONS, SPREADS
from .host.edges import AUTO, list_hed_models
from .host.schema import choice_input, node_input, schema
from .host.server.users import current_user
from .host.text.captions import show_text
from .host.training.dataset import describe_features, features_of_latents, fingerprint_features, load_features
from .host.training.encoding import (
    CACHE_FOLDER,
    CONTROL_FILES,
    CONTROL_METHODS,
    encode_dataset,
    read_sizes,
    settings_for,
)
from .host.types import REPORT_TIP, DatasetType, FeaturesType

CATEGORY = "PixArt/training"
BINS = ("aspect ratio bins", "square")
CLEANING = ("off", "official")


def _features_outputs() -> list:
    return [
        FeaturesType.Output(display_name="features", tooltip="For the PixArt training nodes."),
        io.String.Output(display_name="report", tooltip=REPORT_TIP),
    ]


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
            has_intermediate_output=True,
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
                *_further_sizes(),
            ],
            outputs=_features_outputs(),
            hidden=[io.Hidden.unique_id],
            has_intermediate_output=True,
        )

    @classmethod
    def fingerprint_inputs(cls, **_):
        return current_user()

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
        more_resolutions="",
        spread=EACH,
    ):
        choices = {
            "more_px": read_sizes(more_resolutions),
            "spread": spread,
            "square": bins == "square",
            "flip": flip,
            "clean": clean_caption == "official",
        }
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
            CAPTION_DTYPES,
            default="fp16",
            advanced=True,
            tooltip="How captions are stored: fp16 and bf16 take half the space of fp32.",
        ),
        choice_input(
            "size_condition",
            SIZE_CONDITIONS,
            advanced=True,
            tooltip="The size that PixArt-alpha 1024 is given. bin: the one it is trained at, as when you make "
            "pictures. picture: the picture's own, as in PixArt's own training, which hints at its quality.",
        ),
    ]


def _further_sizes() -> list:
    return [
        node_input(
            io.String,
            "more_resolutions",
            default="",
            optional=True,
            advanced=True,
            tooltip="Further sizes to train at in one training, in pixels, such as '256, 1024'. Empty: none.",
        ),
        choice_input(
            "spread",
            SPREADS,
            default=EACH,
            advanced=True,
            tooltip="Of several sizes: each picture in each of them, or in the one nearest to its own.",
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
            has_intermediate_output=True,
        )

    @classmethod
    def fingerprint_inputs(cls, path):
        return fingerprint_features(path or "")

    @classmethod
    def execute(cls, path):
        return _features_output(cls.hidden, load_features(path))


NODES: list[type[io.ComfyNode]] = [DatasetFromLatents, EncodeDataset, LoadFeatures]
