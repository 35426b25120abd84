"""What nodes of other models look for on a model and PixArt has not: answered in words in place of a bare name."""

FLOW_FIELDS = ("set_parameters", "set_noise_scale", "shift", "multiplier")  # of noise levels of flow models
UNET_FIELDS = (
    "model_channels",
    "channel_mult",
    "num_res_blocks",
    "transformer_depth",
    "context_dim",
    "adm_in_channels",
)


class MissingField(KeyError, ValueError):
    """A field that a U-Net's configuration has. Also a KeyError, for code that asks and goes on without."""

    def __str__(self):
        return self.args[0]


class UNetFields(dict):
    """The host's `unet_config`, which answers in words where a node asks for what only U-Nets have."""

    def __missing__(self, name):
        if name not in UNET_FIELDS:
            raise KeyError(name)
        raise MissingField(
            f"A node for U-Nets: got PixArt, which has no {name}, expected Stable Diffusion 1, 2 or XL. PixArt is a "
            f"transformer: remove the node that asks for it (such as FreeU)."
        )


def flow_field(name: str) -> AttributeError:
    """The error for one of FLOW_FIELDS."""
    return AttributeError(
        f"A node for flow models: got PixArt's noise levels, which have no {name}, expected those of a flow model such "
        f"as SD3 or Flux. PixArt's noise has no scale or shift of that kind: remove the node."
    )
