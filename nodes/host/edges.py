"""Edge pictures on the host's device: the HED network under its memory management, batches in chunks."""

import functools
from collections.abc import Callable, Iterator
from pathlib import Path

import comfy.model_management
import comfy.model_patcher
import comfy.utils
import folder_paths
import torch

from ...pixart.encoders.edges import canny_edges, soft_edges
from ...pixart.encoders.hed import FILE_NAME, detect_edges, make_hed
from ...pixart.resolution import fit_images, nearest_bin
from ...pixart.weights.reading import read_tensors
from .folders import find_file, list_files

HED, SOFT, CANNY = METHODS = ("hed", "soft edges", "canny")
AUTO = "auto"
KINDS = ("annotators", "controlnet")
# Bytes that a pixel takes at the most: HED's first block holds three maps of 64 floats, the others' maps less.
_BYTES_PER_PIXEL = {HED: 1024, SOFT: 96, CANNY: 256}
_CHUNK_PIXELS = 2**21  # two pictures of 1024 px at once: more would not be faster

# The host has no folder of its own for annotators; a path of the user's stays.
folder_paths.add_model_folder_path(KINDS[0], str(Path(folder_paths.models_dir, KINDS[0])))
folder_paths.folder_names_and_paths[KINDS[0]][1].update(folder_paths.supported_pt_extensions)


def list_hed_models() -> list[str]:
    """What PixArt HED Preprocessor offers: auto, then the files, those that HED's name is in first."""
    return [AUTO, *sorted(list_files(KINDS), key=lambda name: not _is_named_hed(name))]


def make_edges(
    image: torch.Tensor,
    method: str,
    hed_model: str = AUTO,
    strength: float = 1.0,
    base_px: int | None = None,
    thresholds: tuple[float, float] = (0.4, 0.8),
) -> torch.Tensor:
    """IMAGE of white edges on black: (B, H, W, C) in [0, 1] -> (B, h, w, 3).

    method: of METHODS. hed_model: of list_hed_models. strength: what the edges are multiplied by.
    base_px: fit the pictures into the nearest bin of this table first. thresholds: of canny, low and high.
    Raises FileNotFoundError or ValueError when HED's file is missing or is something else.
    """
    device = comfy.model_management.get_torch_device()
    detect, models = _detector(method, hed_model, thresholds)
    size = image.shape[1:3] if base_px is None else nearest_bin(*image.shape[1:3], base_px)
    chunk = max(1, _CHUNK_PIXELS // (size[0] * size[1]))
    memory = min(chunk, len(image)) * size[0] * size[1] * _BYTES_PER_PIXEL[method]
    comfy.model_management.load_models_gpu(models, memory_required=memory, force_full_load=True)
    parts = []
    for images in _chunks(image, chunk):
        if base_px is not None:
            images = fit_images(images, *size, "bicubic")
        edges = detect(images.to(device)) * strength
        parts.append(edges.clamp(0, 1).to(comfy.model_management.intermediate_device()))
    return torch.cat(parts).expand(-1, 3, -1, -1).movedim(1, -1).contiguous()


def _chunks(image: torch.Tensor, size: int) -> Iterator[torch.Tensor]:
    """Pictures (b, 3, H, W) in float32, `size` at a time; stops when the run is interrupted."""
    progress = comfy.utils.ProgressBar(len(image))
    for part in image.split(size):
        comfy.model_management.throw_exception_if_processing_interrupted()
        images = part.movedim(-1, 1).float()
        yield images[:, :3] if images.shape[1] >= 3 else images[:, :1].expand(-1, 3, -1, -1)
        progress.update(len(part))


def _detector(method: str, hed_model: str, thresholds: tuple[float, float]) -> tuple[Callable, list]:
    """(function of pictures on the device, the patchers that it needs loaded)."""
    if method == SOFT:
        return soft_edges, []
    if method == CANNY:
        return functools.partial(canny_edges, low_threshold=thresholds[0], high_threshold=thresholds[1]), []
    path = _find_hed(hed_model)
    patcher = _load_hed(path, path.stat().st_mtime_ns)
    return functools.partial(detect_edges, patcher.model), [patcher]


def _find_hed(name: str) -> Path:
    if name == AUTO:
        found = [file for file in list_files(KINDS) if _is_named_hed(file)]
        if not found:
            raise FileNotFoundError(
                f"HED file not found: got none in models/annotators and models/controlnet, expected {FILE_NAME}. "
                f"Download it from huggingface.co/lllyasviel/Annotators into models/annotators, or set method to "
                f"'{SOFT}'."
            )
        name = next((file for file in found if Path(file).name == FILE_NAME), found[0])
    return find_file(KINDS, name)


def _is_named_hed(name: str) -> bool:
    """Whether a name is ControlNetHED's, and not that of a ControlNet for HED's edges."""
    stem = Path(name).stem.lower()
    return stem == "hed" or stem.startswith(Path(FILE_NAME).stem.lower())


@functools.lru_cache(maxsize=1)
def _load_hed(path: Path, _changed: int) -> comfy.model_patcher.ModelPatcher:
    """The network of a file; kept, since every run of the node would read it again."""
    management = comfy.model_management
    network = make_hed(read_tensors(path)[0], path.name)
    return comfy.model_patcher.ModelPatcher(
        network, load_device=management.get_torch_device(), offload_device=management.unet_offload_device()
    )
