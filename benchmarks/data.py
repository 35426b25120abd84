"""Encoded datasets of up to ten million pictures: how long a training waits for them, and what they take of the memory.

The lists are whole, with a name, a caption and keys of its own for each picture. The shards are as many as a real
dataset of 512 px would have, but all are links to one file with a few features. Every number is of processes of their
own, which have imported everything before: one alone, and two at once for the memory of all, their own and the pages of
the list that they share. Time is the processor's, so that other work on the machine counts for little.
"""

import argparse
import logging
import multiprocessing
import os
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from ..pixart.data.buckets import BucketSampler, training_bins
from ..pixart.data.examples import collate
from ..pixart.data.features import open_features, write_list
from ..pixart.data.storage.index import INDEX_SUFFIX, Index
from ..pixart.data.storage.rows import KEY_BYTES, PARTS
from ..pixart.data.storage.shards import ShardWriter
from .peaks import read_status
from .report import RESULTS, keep_runs, markdown_table

PICTURES_A_SHARD = 400  # of 512 px: 64 MiB of latents and their captions
BATCH = 64
_ENTRIES = 64
_HEAD = ("pictures", "open", "first batch", "epoch change", "resume", "own memory, a process", "all memory of two")

logger = logging.getLogger(__name__)


def main(arguments):
    """Run the benchmark and write results/data.json and .md."""
    parser = argparse.ArgumentParser(prog="benchmarks data", description=__doc__)
    parser.add_argument("--pictures", type=int, nargs="+", default=[100_000, 1_000_000, 10_000_000])
    parser.add_argument("--folder", type=Path, help="for the lists, 200 bytes a picture (default: a temporary one)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    options = parser.parse_args(arguments)
    for count in options.pictures:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            with multiprocessing.get_context("fork").Pool(1) as pool:  # whose memory is gone when it is measured
                pool.apply(simulate, (Path(folder), count))
            run = {"case": {"pictures": count}, **measure(Path(folder))}
        text = publish(keep_runs(options.out / "data.json", [run]), options.out)
    logger.info("%s", text)


def simulate(folder: Path, count: int) -> None:
    """Write a dataset of so many pictures, of all the bins of 512 px."""
    bins = [(height // 8, width // 8) for height, width in training_bins(512).values()]
    keys = np.random.default_rng(0).integers(0, 256, (_ENTRIES, 3, KEY_BYTES), np.uint8)
    with ShardWriter(folder) as writer:
        for number, entry in enumerate(keys):
            size = bins[number % len(bins)]
            writer.add(entry[0].tobytes().hex(), {"caption": torch.randn(20, 4096).half()})
            writer.add(entry[1].tobytes().hex(), {"mean": torch.randn(4, *size), "deviation": torch.ones(4, *size)})
    (shard,) = folder.glob("*.safetensors")
    names = [shard.name, *(f"{number:024x}.safetensors" for number in range(1, max(count // PICTURES_A_SHARD, 1)))]
    for name in names[1:]:
        os.link(shard, folder / name)
    rows = np.arange(count) % _ENTRIES
    shards = (np.arange(count) // PICTURES_A_SHARD % len(names)).astype(np.int32)
    columns = {part: keys[rows, number] for number, part in enumerate(PARTS)}
    columns |= {f"{part}_shard": shards if part != "hint" else np.full(count, -1, np.int32) for part in PARTS}
    for which, size in (("name", 16), ("text", 80)):
        columns[f"{which}_end"] = np.arange(1, count + 1, dtype=np.int64) * size
        columns[f"{which}_bytes"] = np.full(count * size, ord("a"), np.uint8)
    sizes = np.array(bins, np.int32)
    ids = (rows % len(bins)).astype(np.uint16)
    columns |= {
        "bin": ids,
        "sizes": sizes,
        "size_px": sizes[ids] * 8,
        "aspect_ratio": np.ones(count),
        "is_prior": np.zeros(count, np.uint8),
        "has_deviation": np.ones(count, np.uint8),
        "null": keys[0, :1],
        "null_shard": np.zeros(1, np.int32),
        "shard_names": np.frombuffer("\n".join(names).encode(), np.uint8),
        "shard_bytes": np.full(len(names), shard.stat().st_size),
    }
    write_list(folder / "features.json", Index(columns), {})


def measure(folder: Path) -> dict:
    """Seconds of each part in a process alone, and the memory of two at once."""
    context = multiprocessing.get_context("fork")
    with context.Pool(1) as pool:
        alone = pool.apply(_train, (folder, None))
    with context.Pool(1) as pool:
        resumed = pool.apply(_train, (folder, alone.pop("state")))
    barrier = context.Barrier(3)
    queue = context.Queue()
    pair = [context.Process(target=_hold, args=(folder, rank, barrier, queue)) for rank in range(2)]
    for process in pair:
        process.start()
    barrier.wait()
    total = sum(queue.get() for _ in pair)
    barrier.wait()
    for process in pair:
        process.join()
    return {**alone, "resume_s": resumed["open_s"] + resumed["first_s"], "total_bytes": total}


def _train(folder: Path, state: dict | None) -> dict:
    own, began = read_status("RssAnon"), time.process_time()
    features = open_features(folder)
    sampler = BucketSampler(features.bins, BATCH, is_prior=features.is_prior)
    if state:
        sampler.load_state_dict(state)
    opened = time.process_time()
    collate([features[index] for index in next(sampler)])
    first = time.process_time()
    sampler.position = sampler.batches_per_epoch
    next(sampler)
    changed = time.process_time()
    sampler.position //= 2
    return {
        "open_s": opened - began,
        "first_s": first - opened,
        "epoch_s": changed - first,
        "own_bytes": read_status("RssAnon") - own,
        "state": sampler.state_dict(),
    }


def _hold(folder: Path, rank: int, barrier, queue) -> None:
    before = read_status("RssAnon")
    features = open_features(folder)
    sampler = BucketSampler(features.bins, BATCH, world_size=2, rank=rank, is_prior=features.is_prior)
    collate([features[index] for index in next(sampler)])
    barrier.wait()
    queue.put(read_status("RssAnon") - before + _list_pages())
    barrier.wait()  # until both have counted


def _list_pages() -> int:
    """Bytes of the list that this process has in its memory, divided by how many processes share them (Linux)."""
    total, is_list = 0, False
    for line in Path("/proc/self/smaps").read_text(encoding="utf-8").splitlines():
        if "-" in line.partition(" ")[0]:
            is_list = line.endswith(INDEX_SUFFIX)
        elif is_list and line.startswith("Pss:"):
            total += int(line.split()[1]) * 1024
    return total


def publish(runs: list[dict], folder: Path) -> str:
    """Write the table of all runs."""
    rows = []
    for run in sorted(runs, key=lambda run: run["case"]["pictures"]):
        count = run["case"]["pictures"]
        times = [f"{run[name]:.2f} s" for name in ("open_s", "first_s", "epoch_s", "resume_s")]
        own = f"{run['own_bytes'] / 1e6:.0f} MB ({run['own_bytes'] / count:.0f} B a picture)"
        rows.append([f"{count:,}", *times, own, f"{run['total_bytes'] / 1e6:.0f} MB"])
    text = markdown_table(_HEAD, rows)
    (folder / "data.md").write_text(text, encoding="utf-8")
    return text
