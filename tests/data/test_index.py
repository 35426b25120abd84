"""The list of an encoded dataset: mapped columns that say what the rows of before said, in the order of before."""

import hashlib
import json
import pickle
import shutil
import sys
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from pixart_pack.pixart.data.buckets import Bins, BucketSampler
from pixart_pack.pixart.data.features import open_features, write_list
from pixart_pack.pixart.data.pictures import ArchivePicture, FilePicture, RowPicture, TensorPicture
from pixart_pack.pixart.data.storage.index import open_index, write_index
from pixart_pack.pixart.data.storage.table import Record, RecordTable
from pixart_pack.pixart.data.variety.masks import AlphaPicture
from pixart_pack.pixart.data.variety.views import ViewVariety

PUBLISHED = Path(__file__).parents[1] / "published" / "encoded"  # by the first version, whose list held its rows
IDENTITY = "76ce7f24c8927e6df7d43c7244242b10f2032f81"
SIZES = ((8, 8), (6, 10), (10, 6), (4, 16))


@pytest.mark.parametrize(
    ("count", "batch_size", "seed", "drop_last", "priors", "recorded"),
    [
        (1, 1, 0, False, (), "9df568cea963e2f7"),
        (19, 4, 3, False, (), "fbfdcf229c5b88ca"),
        (19, 4, 3, True, (), "6add169208f6f2c9"),
        (300, 7, 2**63, False, (3, 5, 200), "5a1ba548cda6554f"),
        (4096, 8, 11, True, (), "3690bf2062fcce1a"),
        (4097, 3, 0, False, range(0, 4097, 3), "705c0d961395c82d"),
        (40000, 5, 5, False, (), "59713d4e5dcb66fb"),
    ],
)
def test_orders_are_those_that_the_first_version_drew(count, batch_size, seed, drop_last, priors, recorded):
    """Recorded of two epochs each by the first version, which shuffled lists by Python's own Random."""
    bins = [SIZES[(index * index // 7) % 4] for index in range(count)]
    is_prior = [index in set(priors) for index in range(count)] if priors else ()
    sampler = BucketSampler(Bins.of(bins), batch_size, seed, drop_last, is_prior=np.array(is_prior, bool))
    drawn = json.dumps(list(islice(sampler, 2 * sampler.batches_per_epoch)))
    assert hashlib.blake2b(drawn.encode(), digest_size=8).hexdigest() == recorded


def test_a_list_of_the_first_version_is_read_as_it_was():
    features = open_features(PUBLISHED)
    assert features.identity == IDENTITY and len(features) == 8
    assert list(features.bins) == [size for size in ((8, 8), (6, 10), (10, 6), (6, 12)) for _ in range(2)]
    assert features.is_prior.tolist() == [False] * 6 + [True] * 2
    assert [features[index].latent.sum().item() for index in (0, 3, 7)] == [0, 90, 324]
    assert features.name_of(5) == "2.png" and features[5].text == "picture 2" and features[5].is_prior is False
    assert features[7].size_px == (48, 96) and features.null_caption.tolist() == [[0.0, 1.0]]


@pytest.fixture(scope="module")
def renewed(tmp_path_factory):
    """The same with a list as they are now."""
    folder = tmp_path_factory.mktemp("data") / "encoded"
    shutil.copytree(PUBLISHED, folder)
    features = open_features(folder)
    write_list(folder / "features.json", features.index, features.settings, ["a note"])
    return folder


def test_a_new_list_says_the_same(renewed):
    old, new = open_features(PUBLISHED), open_features(renewed)
    assert new.identity == IDENTITY and new.settings == old.settings and new.notes == ["a note"]
    assert list(new.bins) == list(old.bins) and new.is_prior.tolist() == old.is_prior.tolist()
    for index in range(len(old)):
        one, other = vars(old[index]), vars(new[index])
        assert all(torch.equal(one[key], other[key]) for key in ("latent", "deviation", "caption"))
        plain = ("size_px", "aspect_ratio", "is_prior", "text", "hint")
        assert [one[key] for key in plain] == [other[key] for key in plain]
        assert old.name_of(index) == new.name_of(index)


def test_a_list_goes_to_another_process_as_its_path(renewed):
    copied = pickle.dumps(open_features(renewed))
    assert len(copied) < 2000 and pickle.loads(copied)[6].latent.sum() == 324


def _columns(rows: int, **changed):
    """Columns of so many rows that name one entry in one shard."""
    keys = np.zeros((rows, 20), np.uint8)
    ends = np.arange(1, rows + 1)
    return {
        **{part: keys for part in ("caption", "picture", "hint")},
        **{f"{part}_shard": np.zeros(rows, np.int32) for part in ("caption", "picture", "hint")},
        **{f"{text}_end": ends for text in ("name", "text")},
        **{f"{text}_bytes": np.full(rows, 97, np.uint8) for text in ("name", "text")},
        "size_px": np.full((rows, 2), 64, np.int32),
        "aspect_ratio": np.ones(rows),
        "is_prior": np.zeros(rows, np.uint8),
        "has_deviation": np.zeros(rows, np.uint8),
        "bin": np.zeros(rows, np.uint16),
        "sizes": np.array([[8, 8]], np.int32),
        "null": keys[:1],
        "null_shard": np.zeros(1, np.int32),
        "shard_names": np.frombuffer(b"x.safetensors", np.uint8),
        "shard_bytes": np.ones(1, np.int64),
        **changed,
    }


def test_a_list_takes_no_memory_of_its_own(tmp_path):
    rows = 100_000
    write_index(tmp_path / "a.index", _columns(rows))
    index = open_index(tmp_path / "a.index")
    assert (tmp_path / "a.index").stat().st_size < 130 * rows
    columns = [column for column in index.columns.values() if len(column) == rows]
    addresses = [column.__array_interface__["data"][0] for column in columns]
    lines = Path("/proc/self/maps").read_text().splitlines() if Path("/proc/self/maps").exists() else None
    if lines is not None:
        mapped = [line.split()[0].split("-") for line in lines if line.endswith("a.index")]
        assert all(any(int(low, 16) <= at < int(high, 16) for low, high in mapped) for at in addresses)
    assert index.text("name", rows - 1) == "a" and index.place("picture", 5) == ("x.safetensors", "00" * 20)


@pytest.mark.parametrize(
    "changed",
    [
        {"bin": np.ones(3, np.uint16)},
        {"bin": np.zeros(2, np.uint16)},
        {"picture_shard": np.full(3, -1, np.int32)},
        {"caption_shard": np.ones(3, np.int32)},
        {"null_shard": np.full(1, 7, np.int32)},
        {"size_px": np.ones((3, 3), np.int32)},
        {"aspect_ratio": np.ones(3, np.int64)},
        {"shard_names": np.frombuffer(b"../x.safetens", np.uint8)},
        {"shard_names": np.frombuffer(b"a\nb", np.uint8)},
        {"shard_names": np.frombuffer(b"\xff", np.uint8)},
    ],
)
def test_columns_that_do_not_fit_are_refused(tmp_path, changed):
    write_index(tmp_path / "features.1.index", _columns(3, **changed))
    head = {"version": 1, "settings": {}, "index": "features.1.index", "identity": "x"}
    (tmp_path / "features.json").write_text(json.dumps(head))
    with pytest.raises(ValueError, match="Not an encoded dataset: got 'features.json'"):
        open_features(tmp_path)


@pytest.mark.parametrize("name", ["../features.1.index", "features.json", "", 5, None])
def test_a_list_names_nothing_but_an_index_beside_it(tmp_path, name):
    write_index(tmp_path / "features.1.index", _columns(3))
    (tmp_path / "features.json").write_text(json.dumps({"version": 1, "settings": {}, "index": name, "identity": "x"}))
    with pytest.raises(ValueError, match="Not an encoded dataset: got 'features.json'"):
        open_features(tmp_path)


def test_a_table_of_records_gives_back_what_it_was_given(tmp_path):
    rows, other = object(), object()
    files = [FilePicture(tmp_path / f"{name}.png") for name in ("a", "b\udce9", "c")]
    kinds = [
        *files,
        ArchivePicture(tmp_path / "x.tar", 512, 2**33),
        RowPicture(rows, 3, "image", tmp_path),
        RowPicture(other, 3, "image", tmp_path, True),
        AlphaPicture(files[0]),
        TensorPicture(torch.ones(2, 2, 3)),
        None,
    ]
    records = [Record("", kinds[-1], None), *(Record(f"{place}", each, "a \ud83d") for place, each in enumerate(kinds))]
    records += [Record("m", files[0], "", mask=each, control=files[1]) for each in kinds[::-1]]
    fields = {"others": ("x", ""), "captions": ("y",), "views": ViewVariety(2), "repeats": 1.5, "weight": 0.25}
    records.append(Record("all", files[2], "c", problem="none", number=7, is_prior=True, **fields))
    table = RecordTable(records)
    assert list(table) == records and table[-1] == records[-1] and table[2:4] == records[2:4] and len(table) == 20
    assert table + records[:1] == [*records, records[0]] and table != records[1:]
    assert table[5].picture.rows is rows and table[6].picture.rows is other
    with pytest.raises(IndexError):
        table[20]
    paths = [Path(f"/data/{number}.png") for number in range(2000)]
    many = RecordTable(Record(path.name, FilePicture(path), "x" * 50) for path in paths)
    assert sys.getsizeof(pickle.dumps(many)) < 2000 * 250
