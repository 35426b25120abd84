"""The loader of the consistency decoder."""

from comfy_api.latest import io

from .host.consistency import list_consistency_decoders, load_consistency_vae
from .host.schema import node_input, schema


class LoadConsistencyDecoder(io.ComfyNode):
    """Decode latents of PixArt-alpha by DALL-E 3's decoder."""

    @classmethod
    def define_schema(cls):
        return schema(
            node_id="PixArtLoadConsistencyDecoder",
            display_name="Load PixArt Consistency Decoder",
            category="PixArt/loaders",
            description="A VAE that decodes by the consistency decoder of DALL-E 3: finer faces, letters and lines, "
            "for much more time and memory. For PixArt-alpha, whose latents are SD 1.5's.",
            search_aliases=["dall-e 3 decoder", "dalle", "consistency decoder", "openai vae", "consistencydecodervae"],
            inputs=[
                node_input(
                    io.Combo,
                    "decoder",
                    options=list_consistency_decoders(),
                    tooltip="The folder of openai/consistency-decoder in models/vae or models/diffusers, or its file.",
                ),
                node_input(io.Vae, "vae", tooltip="The normal VAE (sd-vae-ft-ema): encodes, and gives the precision."),
                node_input(
                    io.Int,
                    "seed",
                    default=0,
                    min=0,
                    max=2**64 - 1,
                    optional=True,
                    tooltip="Of the noise that it decodes from: changes the finest details alone.",
                ),
                node_input(
                    io.Model, "model", optional=True, tooltip="Connected, a PixArt-Sigma is refused before sampling."
                ),
            ],
            outputs=[io.Vae.Output(display_name="vae", tooltip="For VAE Decode, VAE Encode and their tiled kin.")],
        )

    @classmethod
    def execute(cls, decoder, vae, seed=0, model=None):
        return io.NodeOutput(load_consistency_vae(decoder, vae, seed, model))


NODES: list[type[io.ComfyNode]] = [LoadConsistencyDecoder]
