"""Things of given names in a picture, by detectors of transformers: OWL-ViT, OWLv2 and Mask2Former."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from ..files.documents import load_json
from ..quoting import plain, shorten
from .local import LOAD_ERRORS, load_model, load_processor, refusal

GET_DETECTOR = (
    "Download a model with 'hf download google/owlv2-base-patch16-ensemble --local-dir owlv2', or "
    "facebook/mask2former-swin-small-coco-instance, and name its folder with --detector."
)
OPEN_CLASSES = {"owlvit": "OwlViT", "owlv2": "Owlv2"}  # model_type: the prefix of its classes
FIXED_CLASSES = "mask2former"
KINDS = (*OPEN_CLASSES, FIXED_CLASSES)
SAME_THING = 0.5  # detectors of open classes frame one thing several times: above this intersection over union
# What names mean to a detector of COCO's classes.
_PERSONS = frozenset(("girl", "boy", "man", "woman", "child"))


@dataclass(frozen=True)
class Found:
    """A thing in a picture. box: (left, top, right, bottom) in pixels. mask: (H, W) bool, where there is one."""

    name: str
    score: float
    box: tuple[float, float, float, float]
    mask: np.ndarray | None = None


class Detector(NamedTuple):
    """What finds things.

    find: (picture, names, least score) -> what was found, the surest first; raises ValueError for a name that it cannot
    know. has_masks: whether it is of fixed classes and gives outlines.
    """

    find: Callable[[Image.Image, Sequence[str], float], list[Found]]
    has_masks: bool = False


def load_detector(folder: Path, device: str = "cpu") -> Detector:
    """A detector of a folder as transformers saves it. Raises ValueError for a folder of another kind."""
    try:
        kind = load_json(folder / "config.json").get("model_type")
    except LOAD_ERRORS as error:
        raise refusal("a detector", folder, error, GET_DETECTOR) from error
    if kind not in KINDS:
        raise ValueError(
            f"Unknown detector: got model_type {plain(shorten(kind))} in {shorten(folder.name)}, expected one of "
            f"{', '.join(KINDS)}. {GET_DETECTOR}"
        )
    make = _fixed_classes if kind == FIXED_CLASSES else _open_classes
    try:
        return make(folder, kind, device)
    except LOAD_ERRORS as error:
        raise refusal("a detector", folder, error, GET_DETECTOR) from error


def _open_classes(folder: Path, kind: str, device: str) -> Detector:
    import transformers
    from torchvision.ops import batched_nms

    prefix = OPEN_CLASSES[kind]
    model = load_model(
        folder, getattr(transformers, f"{prefix}ForObjectDetection"), getattr(transformers, f"{prefix}Config")
    ).to(device)
    processor = load_processor(folder, getattr(transformers, f"{prefix}Processor"))

    @torch.inference_mode()
    def find(picture: Image.Image, names: Sequence[str], least: float) -> list[Found]:
        texts = [[f"a photo of {name}" for name in names]]
        inputs = processor(text=texts, images=picture, return_tensors="pt", truncation=True).to(device)
        sizes = torch.tensor([picture.size[::-1]])
        outputs = model(**inputs)
        (seen,) = processor.post_process_grounded_object_detection(outputs, least, sizes)
        kept = batched_nms(seen["boxes"].float(), seen["scores"].float(), seen["labels"], SAME_THING)
        rows = zip(seen["labels"][kept], seen["scores"][kept], seen["boxes"][kept], strict=True)
        return [Found(names[int(label)], float(score), tuple(box.tolist())) for label, score, box in rows]

    return Detector(find)


def _fixed_classes(folder: Path, kind: str, device: str) -> Detector:
    from transformers import AutoImageProcessor, Mask2FormerConfig, Mask2FormerForUniversalSegmentation

    model = load_model(folder, Mask2FormerForUniversalSegmentation, Mask2FormerConfig).to(device)
    processor = load_processor(folder, AutoImageProcessor)
    classes = {index: name.lower() for index, name in model.config.id2label.items()}

    @torch.inference_mode()
    def find(picture: Image.Image, names: Sequence[str], least: float) -> list[Found]:
        known = {_class_of(name, set(classes.values()), folder): name for name in names}
        inputs = processor(images=picture, return_tensors="pt").to(device)
        (seen,) = processor.post_process_instance_segmentation(
            model(**inputs), threshold=least, target_sizes=[picture.size[::-1]], return_binary_maps=True
        )
        masks = seen["segmentation"]
        found = []
        for index, each in enumerate(seen["segments_info"]):
            name, mask = classes[each["label_id"]], masks[index].bool().cpu().numpy()
            if name in known and mask.any():
                found.append(Found(known[name], float(each["score"]), _box_of(mask), mask))
        return sorted(found, key=lambda thing: -thing.score)

    return Detector(find, has_masks=True)


def _class_of(name: str, classes: set[str], folder: Path) -> str:
    low = name.lower()
    own = "person" if low.split()[-1] in _PERSONS and low not in classes else low
    if own not in classes:
        raise ValueError(
            f"Class unknown to the detector: got {plain(shorten(name))}, expected one of the {len(classes)} of "
            f"{shorten(folder.name)}. Take a detector that finds any name, such as OWLv2."
        )
    return own


def _box_of(mask: np.ndarray) -> tuple[float, float, float, float]:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)
