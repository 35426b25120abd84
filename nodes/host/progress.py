"""Work on many pictures, shown on the node while it goes on, and ended by the host's interruption."""

from collections.abc import Callable

import comfy.model_management
import comfy.utils
import torch

from .pictures import to_pil

_PREVIEW_PX = 512


def show_progress(total: int, offset: int = 0) -> Callable:
    """A function of (done, of how many, picture (H, W, 3) or None) that moves the node's bar and shows the picture.

    total: of the bar; the work may be a part of it, which begins at offset.
    Called, it raises the host's InterruptProcessingException when the user has interrupted.
    """
    bar = comfy.utils.ProgressBar(total)

    def report(done: int, _count: int, picture: torch.Tensor | None) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        preview = None if picture is None else ("JPEG", to_pil(picture[None])[0], _PREVIEW_PX)
        bar.update_absolute(offset + done, preview=preview)

    return report
