"""The pack's nodes, as ComfyUI gets them."""

from comfy_api.latest import ComfyExtension, io

from . import (
    acceleration,
    caption,
    compare,
    controlnet,
    dataset,
    decoder,
    edges,
    embeddings,
    export,
    features,
    latent,
    loaders,
    log,
    lora,
    migration,
    sampling,
    styles,
    text,
    training,
)
from .host.replacements import register_replacements
from .host.sampling import register_samplers
from .host.training import register_folders


class PixArtExtension(ComfyExtension):
    """All nodes of the pack; its solvers are entered into KSampler's own lists when it is made ready."""

    async def on_load(self) -> None:
        register_samplers()
        register_folders()
        await register_replacements(migration.REPLACEMENTS)

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [
            loaders.LoadCheckpoint,
            loaders.LoadDiffusers,
            loaders.LoadVAE,
            loaders.ModelInfo,
            text.LoadT5,
            text.TextEncode,
            text.Negative,
            latent.Resolution,
            latent.FitImage,
            *sampling.NODES,
            *styles.NODES,
            *compare.NODES,
            *controlnet.NODES,
            *edges.NODES,
            *lora.NODES,
            *export.NODES,
            *dataset.NODES,
            *features.NODES,
            *training.NODES,
            *caption.NODES,
            *decoder.NODES,
            *log.NODES,
            *acceleration.NODES,
            *embeddings.NODES,
            *migration.NODES,
        ]
