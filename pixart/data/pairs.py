"""Pairs of noises and what a teacher makes of them in many steps: what a model of one step can be held to.

Source: distribution matching distillation, arXiv 2311.18828, section 3.3.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch

from ..config import LATENT_DOWNSCALE
from ..files.atomic import write_atomically
from ..files.documents import parse_json
from ..files.regular import TABLE_BYTES, read_text
from ..quoting import shorten
from .examples import Example, FeatureSet
from .identity import digest
from .storage.shards import ShardFolder, ShardWriter

PAIRS = "pairs.json"
VERSION = 1


def noise_of(seed: int, shape: Sequence[int]) -> torch.Tensor:
    """The noise of unit variance that a picture of this seed begins with: (C, h, w). See sampling.sample_latents."""
    return torch.randn((1, *shape), generator=torch.Generator().manual_seed(seed))[0]


# (captions (L, D) each, (height_px, width_px), seeds) -> unscaled latents (B, C, h, w)
MakeLatents = Callable[[list[torch.Tensor], tuple[int, int], list[int]], torch.Tensor]


def write_pairs(
    folder: Path,
    features: FeatureSet,
    make: MakeLatents,
    teacher: Mapping[str, object],
    count: int,
    seed: int = 0,
    batch_size: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> "PairFeatures":
    """Make `count` pairs for the captions and sizes of a dataset, in turn, and write them into a folder.

    teacher: what the latents depend on beside caption, size and seed: the model's identity and the sampling, as plain
    numbers and texts. What the folder holds already is not made again, whatever ended the run before.
    """
    shards, shared = ShardFolder(folder), json.dumps(teacher, sort_keys=True)
    items = list(_plan(features, shared, count, seed))
    missing = [item for item in items if item["key"] not in shards]
    missing.sort(key=lambda item: item["bin_latent"])
    with ShardWriter(folder) as writer:
        for batch in _batches(missing, batch_size):
            examples = [features[item["source"]] for item in batch]
            height, width = batch[0]["bin_latent"]
            seeds = [item["seed"] for item in batch]
            latents = make(
                [each.caption for each in examples], (height * LATENT_DOWNSCALE, width * LATENT_DOWNSCALE), seeds
            )
            for item, example, latent in zip(batch, examples, latents, strict=True):
                writer.add(item["key"], {"latent": latent.float(), "caption": example.caption})
            if progress is not None:
                progress(len(batch), len(missing))
        null = features.null_caption
        if null is not None and "null" not in shards:
            writer.add("null", {"caption": null})
    content = {"version": VERSION, "teacher": dict(teacher), "null": null is not None, "items": items}
    text = json.dumps(content, ensure_ascii=False, indent=1)
    write_atomically(folder / PAIRS, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    return open_pairs(folder)


def _plan(features: FeatureSet, teacher: str, count: int, seed: int) -> Iterator[dict]:
    for number in range(count):
        source = number % len(features)
        example, own = features[source], seed + number
        caption = digest(example.caption.float().numpy().tobytes())
        yield {
            "key": digest("pair", str(VERSION), teacher, caption, f"{features.bins[source]} {own}"),
            "source": source,
            "seed": own,
            "text": example.text,
            "bin_latent": list(features.bins[source]),
            "size_px": list(example.size_px),
            "aspect_ratio": example.aspect_ratio,
        }


def _batches(items: list[dict], size: int) -> Iterator[list[dict]]:
    """Of one latent size each."""
    batch: list[dict] = []
    for item in items:
        if batch and (len(batch) == size or batch[0]["bin_latent"] != item["bin_latent"]):
            yield batch
            batch = []
        batch.append(item)
    if batch:
        yield batch


class PairFeatures:
    """A FeatureSet of pairs: each Example has a teacher's latent and the noise that it came of."""

    def __init__(self, folder: Path, content: Mapping):
        self.shards, self.items, self.teacher = ShardFolder(folder), content["items"], content["teacher"]
        self._has_null = content["null"]
        self.notes: list[str] = []
        wanted = [item["key"] for item in self.items] + ["null"] * self._has_null
        missing = [key for key in wanted if key not in self.shards]
        if missing:
            raise FileNotFoundError(
                f"Pairs are not complete: got {len(missing)} of {len(wanted)} entries missing in "
                f"{shorten(str(folder), 300)}, expected all. Run 'python -m pixart pairs' again; only those are made."
            )
        self.bins = [tuple(self.shards.shape_of(item["key"], "latent")[-2:]) for item in self.items]
        self.is_prior = [False] * len(self.items)

    @property
    def null_caption(self) -> torch.Tensor | None:
        return self.shards.read("null")["caption"] if self._has_null else None

    @property
    def identity(self) -> str:
        """Of the pairs, wherever they lie: their keys are hashes of captions, sizes, seeds and teacher."""
        return digest(*(item["key"] for item in self.items))

    def name_of(self, index: int) -> str:
        return f"pair {index + 1}"

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Example:
        item = self.items[index]
        entry = self.shards.read(item["key"])
        return Example(
            latent=entry["latent"],
            caption=entry["caption"],
            size_px=tuple(item["size_px"]),
            aspect_ratio=item["aspect_ratio"],
            text=item["text"],
            noise=noise_of(item["seed"], entry["latent"].shape),
        )


def open_pairs(folder: Path) -> PairFeatures:
    """The pairs in a folder. Raises FileNotFoundError where some are missing, ValueError for another list."""
    path = Path(folder) / PAIRS
    try:
        content = parse_json(read_text(path, TABLE_BYTES), TABLE_BYTES)
        if content["version"] == VERSION and content["items"]:
            return PairFeatures(path.parent, content)
    except (ValueError, KeyError, TypeError) as error:
        raise _wrong_list(path) from error
    raise _wrong_list(path)


def _wrong_list(path: Path) -> ValueError:
    return ValueError(
        f"Not a list of pairs: got {shorten(path.name)} in {shorten(str(path.parent), 300)}, expected one of version "
        f"{VERSION} with pairs in it. Make them again with 'python -m pixart pairs'."
    )
