"""Encodes a dataset once: captions by T5, pictures by the autoencoder, into a cache of content-keyed shards."""

import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from ..config import LATENT_DOWNSCALE
from ..quoting import shorten
from ..resolution import fit_images
from ..text import clean_prompt
from ..weights.saving import DTYPES
from .buckets import GRID_PX, training_bins
from .features import CachedFeatures, complete_index, merge_parts, open_cached, write_list, write_part
from .identity import digest
from .pictures import Picture, measure_picture, read_picture
from .records import Record
from .storage.index import MANIFEST, RECORD, VERSION
from .storage.shards import ShardFolder, ShardWriter

CAPTION_DTYPES = ("fp16", "bf16", "fp32")
SIZE_CONDITIONS = ("bin", "picture")
EACH, NEAREST = SPREADS = ("each", "nearest")
LANCZOS_FROM_PX = 2048  # PixArt-Sigma prepared its largest pictures so
_LATENT_CHANNELS = 4
_CAPTIONS_AT_ONCE = 16
_SHOWN_CUT = 5

EncodeText = Callable[[list[str]], list[torch.Tensor]]  # captions -> (L, D) states each, without padding
# (B, H, W, 3) in [0, 1] -> unscaled mean (B, 4, H / 8, W / 8), and the deviation of the same shape or None
EncodeImage = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor | None]]
MakeHint = Callable[[torch.Tensor], torch.Tensor]  # (B, H, W, 3) -> (B, H, W, 3), such as edges
Progress = Callable[[int, int, torch.Tensor | None], None]  # done, of how many, a picture (H, W, 3) to show


@dataclass(frozen=True)
class EncodeSettings:
    """How a dataset is encoded. Each field is part of the keys of what it changes.

    base_px: the size that the model was trained at; pictures go to the nearest of its bins, or with `square` all to
    the square one. flip: add the mirrored picture of each. caption_length: in tokens; `clean`: as the official ones.
    caption_dtype: of CAPTION_DTYPES. size_condition: the size that the model is given, of SIZE_CONDITIONS: the bin's as
    when pictures are made, or the picture's own as in PixArt-alpha's training. more_px: further sizes to train at, like
    base_px; spread, of SPREADS: each picture goes into the bins of every size, or of the one nearest to its own.
    """

    base_px: int = 512
    square: bool = False
    flip: bool = False
    caption_length: int = 120
    clean: bool = False
    caption_dtype: str = "fp16"
    size_condition: str = SIZE_CONDITIONS[0]
    more_px: tuple[int, ...] = ()
    spread: str = EACH

    def __post_init__(self):
        choices = {"caption_dtype": CAPTION_DTYPES, "size_condition": SIZE_CONDITIONS, "spread": SPREADS}
        object.__setattr__(self, "more_px", tuple(self.more_px))
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"Unknown {name}: got {shorten(getattr(self, name))}, expected one of {', '.join(allowed)}. Choose "
                    f"one."
                )
        if min(self.sizes_px) < GRID_PX:
            raise ValueError(
                f"Resolution out of range: got {min(self.sizes_px)}, expected at least {GRID_PX}. Enter the size in "
                f"pixels that the model was trained at, or connect the model and enter 0."
            )

    @property
    def sizes_px(self) -> tuple[int, ...]:
        """All sizes to train at, each once."""
        return tuple(dict.fromkeys((self.base_px, *self.more_px)))

    def sizes_for(self, height_px: int, width_px: int) -> tuple[int, ...]:
        """Those that a picture goes into; the nearest in proportion."""
        if self.spread == EACH:
            return self.sizes_px
        own = math.sqrt(height_px * width_px)
        return (min(self.sizes_px, key=lambda size: abs(math.log(size / own))),)


@dataclass(frozen=True)
class _Job:
    """A picture to be encoded under a key. edges: its hint is to be made of it. method: of fitting it into its bin."""

    key: str
    name: str
    picture: Picture
    content: str
    bin_px: tuple[int, int]
    flipped: bool
    edges: bool = False
    method: str = "bicubic"


class DatasetEncoder:
    """The encoding of some records: what is in the cache already is known, the rest is encoded on demand.

    text_identity, image_identity: identify the encoders (see identity.fingerprint). hint_identity: identifies how
    hints are made of pictures that have no control picture; empty: they have none.
    rank, world_size: this process encodes its share alone; the caches of all are one folder.
    progress: called while the contents of all pictures are read, which say what is in the cache.
    """

    def __init__(
        self,
        records: Sequence[Record],
        folder: Path,
        settings: EncodeSettings,
        text_identity: str,
        image_identity: str,
        hint_identity: str = "",
        rank: int = 0,
        world_size: int = 1,
        progress: Progress | None = None,
    ):
        self.settings, self.shards = settings, ShardFolder(folder)
        self._text_identity, self._image_identity, self._hint_identity = text_identity, image_identity, hint_identity
        self._rank, self._world_size = rank, world_size
        self._bins = {size: training_bins(size, settings.square) for size in settings.sizes_px}
        self._captions: dict[str, str] = {}
        self._jobs: dict[str, _Job] = {}
        self.null_key = self._plan_caption("")
        self.items: list[dict] = []
        for number, record in enumerate(records, 1):
            self.items += self._plan(record)
            _report(progress, number, len(records), None)

    @property
    def missing_captions(self) -> dict[str, str]:
        """{key: text} of this process's share that is not in the cache."""
        return {key: text for key, text in self._share(self._captions.items()) if key not in self.shards}

    @property
    def missing_pictures(self) -> list[_Job]:
        """This process's share of pictures and hints that are not in the cache."""
        return [job for key, job in self._share(self._jobs.items()) if key not in self.shards]

    def encode_captions(self, encode_text: EncodeText, progress: Progress | None = None) -> None:
        """Encode the missing captions. Whatever ends it, what is done stays. Raises ValueError for NaN."""
        missing = list(self.missing_captions.items())
        missing.sort(key=lambda entry: len(entry[1]))  # captions of like length make full batches
        with ShardWriter(self.shards.folder) as writer:
            for done, batch in _batches(missing, _CAPTIONS_AT_ONCE):
                states = encode_text([text for _, text in batch])
                for (key, text), caption in zip(batch, states, strict=True):
                    caption = caption.to(DTYPES[self.settings.caption_dtype])
                    _check_finite(caption, f"the caption {text[:60]!r}", "text encoder")
                    writer.add(key, {"caption": caption})
                _report(progress, done + len(batch), len(missing), None)
        self.shards.scan()

    def encode_pictures(
        self,
        encode_image: EncodeImage,
        batch_size: int = 1,
        make_hint: MakeHint | None = None,
        progress: Progress | None = None,
    ) -> None:
        """Encode the missing pictures and hints, in batches of one bin. Whatever ends it, what is done stays.

        Raises ValueError for an autoencoder that gives NaN or latents of another shape.
        """
        missing = self.missing_pictures
        missing.sort(key=lambda job: (job.bin_px, job.edges))
        groups = (list(_batches(group, batch_size)) for group in _runs(missing, lambda job: (job.bin_px, job.edges)))
        done = 0
        with ShardWriter(self.shards.folder) as writer:
            for batch in (batch for group in groups for _, batch in group):
                pixels = torch.stack([self._prepare(job) for job in batch])
                if batch[0].edges:
                    pixels = make_hint(pixels)
                mean, deviation = encode_image(pixels)
                _check_latents(mean, batch)
                for row, job in enumerate(batch):
                    parts = {"mean": mean[row].float()}
                    if deviation is not None:
                        parts["deviation"] = deviation[row].float()
                    writer.add(job.key, parts)
                done += len(batch)
                _report(progress, done, len(missing), pixels[-1])
        self.shards.scan()

    def describe_cut(self, count_tokens: Callable[[str], int]) -> list[str]:
        """Which captions are longer than they were encoded: how many, and the first of them; no lines for none.

        count_tokens: how many a text has; asked of those alone that are as long as a caption may be.
        """
        longest, cut = self.settings.caption_length, {}
        for item in self.items:
            key = item["caption"]
            if key not in cut and key in self.shards and self.shards.shape_of(key, "caption")[0] >= longest:
                cut[key] = (item["name"], self._captions[key], count_tokens(self._captions[key]))
        cut = {key: found for key, found in cut.items() if found[2] > longest}
        if not cut:
            return []
        shown = list(cut.values())[:_SHOWN_CUT]
        lines = [f"{shorten(name)}: {count} tokens, {shorten(text)}" for name, text, count in shown]
        more = [f"... and {len(cut) - _SHOWN_CUT} more"] if len(cut) > _SHOWN_CUT else []
        captions = len({item["caption"] for item in self.items})
        return [f"cut at {longest} tokens, without their ends: {len(cut)} of {captions} captions", *lines, *more]

    def features(self, manifest: str = MANIFEST, notes: Sequence[str] = ()) -> "CachedFeatures":
        """The encoded dataset; its list is written into the cache's folder under the name `manifest`.

        notes: lines to keep with it, for those who open it.
        Raises FileNotFoundError while other processes have not encoded their share.
        """
        self.shards.scan()
        path = self.shards.folder / manifest
        index = complete_index(self.items, self.null_key, self.shards)
        write_list(path, index, asdict(self.settings), notes)
        return open_cached(path)

    def write_share(self, share: tuple[int, int], manifest: str = MANIFEST, notes: Sequence[str] = ()) -> list[int]:
        """Write the list of this share, (which, of how many), and once all shares have one, that of the dataset.

        Returns the shares that are missing yet. Raises FileNotFoundError as features does.
        """
        self.shards.scan()
        index = complete_index(self.items, self.null_key, self.shards)
        path, settings = self.shards.folder / manifest, asdict(self.settings)
        run = digest(json.dumps(settings), self._text_identity, self._image_identity, self._hint_identity)
        write_part(path, index, settings, notes, share, run)
        return merge_parts(path, share[1], run)

    def _share(self, entries: Iterable[tuple]) -> list[tuple]:
        return list(entries)[self._rank :: self._world_size]

    def _plan_caption(self, text: str) -> str:
        settings = self.settings
        text = clean_prompt(text) if settings.clean else text
        key = digest(
            "caption", str(VERSION), text, str(settings.caption_length), settings.caption_dtype, self._text_identity
        )
        self._captions[key] = text
        return key

    def _plan(self, record: Record) -> Iterator[dict]:
        """The items of a record: of each of its sizes one, or with its mirror two."""
        caption_key = self._plan_caption(record.caption or "")
        data = record.picture.content()
        size_px = height, width = measure_picture(record.picture, data)
        content = digest(data)
        control = None if record.control is None else digest(record.control.content())
        sizes, mirrors = self.settings.sizes_for(height, width), (False, True)[: 1 + self.settings.flip]
        for size, flipped in itertools.product(sizes, mirrors):
            ratio = min(self._bins[size], key=lambda nominal: abs(nominal - height / width))
            bin_px, method, hint = self._bins[size][ratio], _fit_method(size), None
            if control is not None:
                hint = self._plan_picture(record.name, record.control, control, bin_px, method, flipped)
            elif self._hint_identity:
                hint = self._plan_picture(record.name, record.picture, content, bin_px, method, flipped, edges=True)
            yield {
                "name": record.name,
                "text": self._captions[caption_key],
                "caption": caption_key,
                "picture": self._plan_picture(record.name, record.picture, content, bin_px, method, flipped),
                "hint": hint,
                "bin_px": list(bin_px),
                "size_px": list(bin_px if self.settings.size_condition == "bin" else size_px),
                "aspect_ratio": ratio,
                "is_prior": record.is_prior,
                **({} if record.number is None else {RECORD: record.number}),
            }

    def _plan_picture(self, name, picture, content: str, bin_px, method: str, flipped: bool, edges=False) -> str:
        parts = [method, "flipped" if flipped else "", self._hint_identity if edges else ""]
        key = digest("picture", str(VERSION), content, "{}x{}".format(*bin_px), *parts, self._image_identity)
        self._jobs[key] = _Job(key, name, picture, content, bin_px, flipped, edges, method)
        return key

    def _prepare(self, job: _Job) -> torch.Tensor:
        """(H, W, 3) of the bin's size, as PixArt's training pictures were prepared."""
        pixels = read_picture(job.picture, job.bin_px, job.content)
        fitted = fit_images(pixels.movedim(-1, 0)[None], *job.bin_px, job.method)[0].movedim(0, -1)
        return fitted.flip(1) if job.flipped else fitted


def _fit_method(base_px: int) -> str:
    return "lanczos" if base_px >= LANCZOS_FROM_PX else "bicubic"


def _batches(entries: list, size: int) -> Iterator[tuple[int, list]]:
    for start in range(0, len(entries), size):
        yield start, entries[start : start + size]


def _runs(entries: list, key: Callable) -> Iterator[list]:
    groups: dict = {}
    for entry in entries:
        groups.setdefault(key(entry), []).append(entry)
    yield from groups.values()


def _report(progress: Progress | None, done: int, total: int, picture: torch.Tensor | None) -> None:
    if progress is not None:
        progress(done, total, picture)


def _check_finite(tensor: torch.Tensor, what: str, who: str) -> None:
    if not torch.isfinite(tensor).all():
        raise ValueError(
            f"The {who} overflows: got NaN or infinity for {what}, expected numbers. "
            f"Load the {who} in fp32 or bf16, or choose one that was made for fp16."
        )


def _check_latents(mean: torch.Tensor, batch: list[_Job]) -> None:
    height, width = (side // LATENT_DOWNSCALE for side in batch[0].bin_px)
    expected = (len(batch), _LATENT_CHANNELS, height, width)
    if tuple(mean.shape) != expected:
        raise ValueError(
            f"Wrong autoencoder: got latents of the shape {tuple(mean.shape)} for {batch[0].name}, expected "
            f"{expected}. Connect the VAE of PixArt: sd-vae-ft-ema for alpha, the SDXL VAE for Sigma."
        )
    for job, latent in zip(batch, mean, strict=True):
        _check_finite(latent, f"the picture {job.name}", "VAE")
