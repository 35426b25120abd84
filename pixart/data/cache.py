"""Encodes a dataset once: captions by T5, pictures by the autoencoder, into a cache of content-keyed shards."""

import itertools
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch

from ..config import LATENT_DOWNSCALE
from ..quoting import shorten
from ..text import clean_prompt
from ..weights.saving import DTYPES
from .buckets import GRID_PX, training_bins
from .features import CachedFeatures, complete_index, merge_parts, open_cached, write_list, write_part
from .identity import digest
from .pictures import Picture, measure_picture, read_picture
from .records import Record
from .storage.index import MANIFEST, VERSION
from .storage.plans import CONTROL, EDGES, MASK_KIND, PICTURE, CaptionPlan, Job, PicturePlan
from .storage.rows import GROUP, KEY_BYTES, MASK, RECORD, Rows
from .storage.shards import ShardFolder, ShardWriter
from .variety.masks import ALPHA, FILES, AlphaPicture, middle_of, read_mask
from .variety.views import PLAIN, View

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
        self._records = records
        self._captions, self._pictures = CaptionPlan(self._text_of), PicturePlan()
        self._rows = Rows(texts_of=lambda record, variant: (records[record].name, self._text_of(record, variant)))
        self._groups = 0
        self.null_key = self._plan_caption("", -1, 0)
        for number, record in enumerate(records):
            self._plan(number, record)
            _report(progress, number + 1, len(records), None)

    @property
    def missing_captions(self) -> np.ndarray:
        """(M,) the numbers of captions of this process's share that are not in the cache."""
        return self._missing(self._captions.keys)

    @property
    def missing_pictures(self) -> np.ndarray:
        """(M,) the numbers of its share of pictures, hints and masks that are not in the cache."""
        return self._missing(self._pictures.keys)

    def _missing(self, keys) -> np.ndarray:
        share = keys.firsts()[self._rank :: self._world_size]
        return share[self.shards.find(keys.all()[share]) < 0]

    def encode_captions(self, encode_text: EncodeText, progress: Progress | None = None) -> None:
        """Encode the missing captions. Whatever ends it, what is done stays. Raises ValueError for NaN."""
        missing = self.missing_captions
        missing = missing[np.argsort(self._captions.lengths(missing), kind="stable")]  # so that batches are full
        with ShardWriter(self.shards.folder) as writer:
            for start in range(0, len(missing), _CAPTIONS_AT_ONCE):
                batch = missing[start : start + _CAPTIONS_AT_ONCE].tolist()
                texts = [self._captions.text(number) for number in batch]
                for number, text, states in zip(batch, texts, encode_text(texts), strict=True):
                    caption = states.to(DTYPES[self.settings.caption_dtype])
                    _check_finite(caption, f"the caption {text[:60]!r}", "text encoder")
                    writer.add(self._captions.keys.text(number), {"caption": caption})
                _report(progress, start + len(batch), len(missing), None)
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
        missing, done = self.missing_pictures, 0
        with ShardWriter(self.shards.folder) as writer:
            for run in self._pictures.runs(missing):
                for start in range(0, len(run), batch_size):
                    batch = [self._pictures.job(number) for number in run[start : start + batch_size].tolist()]
                    shown = self._encode(batch, writer, encode_image, make_hint)
                    done += len(batch)
                    _report(progress, done, len(missing), shown)
        self.shards.scan()

    def _encode(self, batch: list[Job], writer: ShardWriter, encode_image: EncodeImage, make_hint):
        """Write the entries of a batch of one bin and way of encoding; returns a picture of it to show, or None."""
        if batch[0].kind == MASK_KIND:
            for job in batch:
                mask = self._records[job.record].mask
                writer.add(job.key, {MASK: read_mask(mask, job.view, job.bin_px, job.method, job.content).half()})
            return None
        pixels = torch.stack([self._prepare(job) for job in batch])
        if batch[0].kind == EDGES:
            pixels = make_hint(pixels)
        mean, deviation = encode_image(pixels)
        _check_latents(mean, batch[0].bin_px, [self._records[job.record].name for job in batch])
        for row, job in enumerate(batch):
            parts = {"mean": mean[row].float()}
            if deviation is not None:
                parts["deviation"] = deviation[row].float()
            writer.add(job.key, parts)
        return pixels[-1]

    def describe_cut(self, count_tokens: Callable[[str], int]) -> list[str]:
        """Which captions are longer than they were encoded: how many, and the first of them; no lines for none.

        count_tokens: how many a text has; asked of those alone that are as long as a caption may be.
        """
        longest, keys = self.settings.caption_length, self._rows.keys("caption")
        firsts = np.sort(np.unique(keys.view(f"V{KEY_BYTES}").reshape(-1), return_index=True)[1])
        entries = self.shards.find(keys[firsts])
        lengths = np.array([form["caption"][0] if "caption" in form else 0 for form in self.shards.forms] or [0])
        full = firsts[(entries >= 0) & (lengths[self.shards.forms_of(entries)] >= longest)]
        shown, cut = [], 0
        for row in full.tolist():
            text = self._rows.text("text", row)
            count = count_tokens(text)
            cut += count > longest
            if count > longest and len(shown) < _SHOWN_CUT:
                shown.append(f"{shorten(self._rows.text('name', row))}: {count} tokens, {shorten(text)}")
        if not cut:
            return []
        more = [f"... and {cut - _SHOWN_CUT} more"] if cut > _SHOWN_CUT else []
        return [f"cut at {longest} tokens, without their ends: {cut} of {len(firsts)} captions", *shown, *more]

    def features(self, manifest: str = MANIFEST, notes: Sequence[str] = ()) -> "CachedFeatures":
        """The encoded dataset; its list is written into the cache's folder under the name `manifest`.

        notes: lines to keep with it, for those who open it.
        Raises FileNotFoundError while other processes have not encoded their share.
        """
        self.shards.scan()
        path = self.shards.folder / manifest
        index = complete_index(self._rows, self.null_key, self.shards)
        write_list(path, index, asdict(self.settings), notes)
        return open_cached(path)

    def write_share(self, share: tuple[int, int], manifest: str = MANIFEST, notes: Sequence[str] = ()) -> list[int]:
        """Write the list of this share, (which, of how many), and once all shares have one, that of the dataset.

        Returns the shares that are missing yet. Raises FileNotFoundError as features does.
        """
        self.shards.scan()
        index = complete_index(self._rows, self.null_key, self.shards)
        path, settings = self.shards.folder / manifest, asdict(self.settings)
        run = digest(json.dumps(settings), self._text_identity, self._image_identity, self._hint_identity)
        write_part(path, index, settings, notes, share, run)
        return merge_parts(path, share[1], run)

    def _text_of(self, record: int, variant: int) -> str:
        """A caption of a record as it is encoded; a record of -1 has the empty one."""
        text = "" if record < 0 else _captions_of(self._records[record])[variant]
        return clean_prompt(text) if self.settings.clean else text

    def _plan_caption(self, text: str, record: int, variant: int) -> str:
        """The key of a caption."""
        settings = self.settings
        text = clean_prompt(text) if settings.clean else text
        key = digest(
            "caption", str(VERSION), text, str(settings.caption_length), settings.caption_dtype, self._text_identity
        )
        self._captions.add(key, record, variant, len(text))
        return key

    def _plan(self, number: int, record: Record) -> None:
        """The rows of a record: of each of its sizes, and of each mirror, one for each variant."""
        captions = [self._plan_caption(text, number, place) for place, text in enumerate(_captions_of(record))]
        data = record.picture.content()
        size_px = height, width = measure_picture(record.picture, data)
        contents = {PICTURE: digest(data)}
        contents |= {kind: digest(each.content()) for kind, each in self._others(record)}
        views = [PLAIN]
        if record.views is not None:
            needs_middle = record.views.focus == MASK and record.mask is not None
            views = list(record.views.of(contents[PICTURE], middle_of(record.mask) if needs_middle else None))
        sizes, mirrors = self.settings.sizes_for(height, width), (False, True)[: 1 + self.settings.flip]
        for size, is_flipped in itertools.product(sizes, mirrors):
            ratio = min(self._bins[size], key=lambda nominal: abs(nominal - height / width))
            bin_px = self._bins[size][ratio]
            shown = [replace(view, flipped=view.flipped ^ is_flipped) for view in views]
            jobs = [self._plan_view(number, contents, bin_px, _fit_method(size), view) for view in shown]
            plain = {
                "record_number": number,
                "size_px": bin_px if self.settings.size_condition == "bin" else size_px,
                "aspect_ratio": ratio,
                "is_prior": record.is_prior,
                "repeats": record.repeats,
                "weight": record.weight,
                GROUP: self._groups,
                **({} if record.number is None else {RECORD: record.number}),
            }
            for variant in range(max(len(captions), len(jobs))):
                words = variant % len(captions)
                self._rows.add({**plain, "caption": captions[words], "variant": words, **jobs[variant % len(jobs)]})
            self._groups += 1

    def _others(self, record: Record) -> Iterator[tuple[str, Picture]]:
        if record.control is not None:
            yield CONTROL, record.control
        if record.mask is not None:
            yield MASK_KIND, record.mask

    def _plan_view(
        self, record: int, contents: dict[str, str], bin_px, method: str, view: View
    ) -> dict[str, str | None]:
        """The keys of a picture, its hint and its mask in a view."""
        keys = {"picture": self._plan_picture(record, PICTURE, contents[PICTURE], bin_px, method, view), "hint": None}
        if CONTROL in contents:
            keys["hint"] = self._plan_picture(record, CONTROL, contents[CONTROL], bin_px, method, view.shape)
        elif self._hint_identity:
            keys["hint"] = self._plan_picture(record, EDGES, contents[PICTURE], bin_px, method, view.shape)
        if MASK_KIND in contents:
            keys[MASK] = self._plan_picture(record, MASK_KIND, contents[MASK_KIND], bin_px, method, view.shape)
        return keys

    def _plan_picture(self, record: int, kind: str, content: str, bin_px, method: str, view: View) -> str:
        parts = [method, "flipped" if view.flipped else "", self._hint_identity if kind == EDGES else ""]
        parts += ["view", seen] if (seen := replace(view, flipped=False).name) else []
        size = "{}x{}".format(*bin_px)
        if kind == MASK_KIND:
            source = self._records[record].mask
            is_alpha = isinstance(source, AlphaPicture)
            key = digest("mask", str(VERSION), content, size, *parts, ALPHA if is_alpha else FILES)
        else:
            key = digest("picture", str(VERSION), content, size, *parts, self._image_identity)
        return self._pictures.add(Job(key, kind, record, content, bin_px, method, view))

    def _prepare(self, job: Job) -> torch.Tensor:
        """(H, W, 3) of the bin's size, as PixArt's training pictures were prepared."""
        record = self._records[job.record]
        picture = record.control if job.kind == CONTROL else record.picture
        return job.view.show(read_picture(picture, job.bin_px, job.content), *job.bin_px, job.method)


def _captions_of(record: Record) -> Sequence[str]:
    return record.captions or [record.caption or ""]


def _fit_method(base_px: int) -> str:
    return "lanczos" if base_px >= LANCZOS_FROM_PX else "bicubic"


def _report(progress: Progress | None, done: int, total: int, picture: torch.Tensor | None) -> None:
    if progress is not None:
        progress(done, total, picture)


def _check_finite(tensor: torch.Tensor, what: str, who: str) -> None:
    if not torch.isfinite(tensor).all():
        raise ValueError(
            f"The {who} overflows: got NaN or infinity for {what}, expected numbers. "
            f"Load the {who} in fp32 or bf16, or choose one that was made for fp16."
        )


def _check_latents(mean: torch.Tensor, bin_px: tuple[int, int], names: list[str]) -> None:
    height, width = (side // LATENT_DOWNSCALE for side in bin_px)
    expected = (len(names), _LATENT_CHANNELS, height, width)
    if tuple(mean.shape) != expected:
        raise ValueError(
            f"Wrong autoencoder: got latents of the shape {tuple(mean.shape)} for {names[0]}, expected "
            f"{expected}. Connect the VAE of PixArt: sd-vae-ft-ema for alpha, the SDXL VAE for Sigma."
        )
    for name, latent in zip(names, mean, strict=True):
        _check_finite(latent, f"the picture {name}", "VAE")
