"""The pack's nodes, as ComfyUI gets them."""

from comfy_api.latest import ComfyExtension, io

from . import (
    acceleration,
    controlnet,
    dataset,
    features,
    latent,
    loaders,
    lora,
    migration,
    results,
    sampling,
    styles,
    text,
    training,
)
from .host.denoiser.sampling import register_samplers
from .host.folders import register_demo
from .host.replacements import register_replacements
from .host.schema import guard
from .host.server.notes import register_notes
from .host.server.users import register_users
from .host.text.t5 import register_t5_folder
from .host.training.runs import register_folders


class PixArtExtension(ComfyExtension):
    """All nodes of the pack; its solvers are entered into KSampler's own lists when it is made ready."""

    async def on_load(self) -> None:
        register_samplers()
        register_folders()
        register_t5_folder()
        register_demo()
        register_users()
        await register_replacements(migration.REPLACEMENTS)
        register_notes()  # behind the replacements, of which it tells

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        listed = [
            *loaders.NODES,
            *text.NODES,
            *latent.NODES,
            *sampling.NODES,
            *styles.NODES,
            *results.NODES,
            *controlnet.NODES,
            *lora.NODES,
            *dataset.NODES,
            *features.NODES,
            *training.NODES,
            *acceleration.NODES,
            *migration.NODES,
        ]
        return [guard(node) for node in listed]
