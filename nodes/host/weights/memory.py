"""How much memory sampling a PixArt takes beside its weights, as the host wants to know it before it loads them."""

import math

from ....pixart.config import PixArtConfig

CAPTION_MEMORY_BYTES = 256 * 2**20  # for captions that are kept projected while a picture is sampled
CONTROLS = "pixart_controls"  # name of a condition's shape: how many ControlNets, and how many blocks they copy
MARGIN = 1.1  # over what is counted: a GPU's allocator rounds up, and matrix products take some room to work in
# Beside the feed-forward's hidden layer, as tensors of all tokens: the stream, the modulated stream and the result;
# with ControlNets also what steers, and the base's stream while a copied block runs.
OWN_STREAMS, CONTROLLED_STREAMS = 3, 6


def count_bytes(
    config: PixArtConfig,
    rows: int,
    sides: tuple[int, int],
    itemsize: int,
    caption_length: int,
    controls: tuple[int, int] = (0, 0),
    casts: bool = False,
) -> int:
    """Bytes alive at once while `rows` latents are denoised together, attention by kernels that hold no logits.

    sides: of the latent. itemsize: of the dtype of the maths, in bytes. controls: see `count_controls`.
    casts: weights are of another dtype, and become the maths' where they are used.
    """
    tokens = math.prod(math.ceil(side / config.patch_size) for side in sides)
    width = config.hidden_size * itemsize
    nets, copies = controls
    streams = (CONTROLLED_STREAMS if nets else OWN_STREAMS) + max(nets - 1, 0) + config.mlp_ratio
    captions = rows * caption_length * width
    kept = captions * (1 + 2 * config.depth)
    kept = kept + captions * 2 * copies if kept <= CAPTION_MEMORY_BYTES else captions
    modulation = 2 * rows * config.depth * 6 * width
    cast = config.hidden_size * width * config.mlp_ratio if casts else 0  # of the largest weight
    return round(MARGIN * ((rows * streams + 1) * tokens * width + modulation + cast) + kept)


def count_controls(control) -> tuple[int, int]:
    """(how many ControlNets stand in a chain of the host's, how many blocks they copy)."""
    nets = copies = 0
    while control is not None:
        nets, copies = nets + 1, copies + getattr(getattr(control, "control_model", None), "num_copies", 0)
        control = control.previous_controlnet
    return nets, copies


def longest(shapes) -> int:
    """The most tokens of any caption, from the shapes that the host has collected."""
    return max((shape[1] for shape in shapes), default=0)
