"""The cache of encoded datasets: nothing twice, nothing stale, nothing lost to a kill."""

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from pixart_pack.pixart.data.buckets import training_bins
from pixart_pack.pixart.data.cache import DatasetEncoder, EncodeSettings
from pixart_pack.pixart.data.examples import collate
from pixart_pack.pixart.data.features import open_features
from pixart_pack.pixart.data.identity import fingerprint
from pixart_pack.pixart.data.pictures import FilePicture, TensorPicture
from pixart_pack.pixart.data.records import Record, check_records
from pixart_pack.pixart.data.sources import read_dataset
from pixart_pack.pixart.data.storage.shards import ShardFolder, ShardWriter
from pixart_pack.pixart.training.validation import read_prompts
from pixart_pack.tests.training_data import interrupting

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = EncodeSettings(base_px=64, caption_length=20)
SIZES = ((64, 64), (96, 64), (64, 96), (128, 64), (64, 64))


class Encoders:
    """Plain functions of what they are given, which note how often they are called."""

    def __init__(self, deviation=True):
        self.deviation, self.texts, self.pictures = deviation, [], 0

    def text(self, captions):
        self.texts += captions
        return [torch.tensor([[float(ord(letter)), 1.0] for letter in caption] or [[0.0, 1.0]]) for caption in captions]

    def image(self, pixels):
        self.pictures += len(pixels)
        means = F.avg_pool2d(pixels.movedim(-1, 1), 8)
        mean = torch.cat([means, means.sum(1, keepdim=True)], 1)
        return mean, mean * 0 + 0.5 if self.deviation else None


def make_folder(folder, count=5):
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        width, height = SIZES[number % len(SIZES)]
        noise = np.random.default_rng(number).integers(0, 255, (height, width, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"picture {number}")
    return folder


def encode(source, cache, settings=SETTINGS, encoders=None, text="t5", image="vae", **options):
    encoders = encoders or Encoders()
    records = check_records(read_dataset(source)).records if isinstance(source, Path) else source
    make_hint = options.pop("make_hint", None)
    encoder = DatasetEncoder(records, cache, settings, text, image, **options)
    encoder.encode_captions(encoders.text)
    encoder.encode_pictures(encoders.image, batch_size=2, make_hint=make_hint)
    return encoder.features(), encoders


def test_every_picture_is_encoded_once_into_its_bin(tmp_path):
    folder = make_folder(tmp_path / "set")
    features, encoders = encode(folder, tmp_path / "cache")
    assert encoders.pictures == 5 and sorted(encoders.texts) == ["", *(f"picture {n}" for n in range(5))]
    assert len(features) == 5 and features.bins[0] == (8, 8) and features.bins[1] == (6, 10)
    example = features[1]
    assert example.latent.shape == (4, 6, 10) and example.deviation.shape == (4, 6, 10)
    assert example.size_px == (48, 80) and example.aspect_ratio == 0.68 and example.text == "picture 1"
    assert example.caption.dtype == torch.float16 and example.caption.shape == (9, 2)
    assert example.hint is None and not example.is_prior
    assert features.null_caption.tolist() == [[0.0, 1.0]]
    exact = torch.tensor(np.asarray(Image.open(folder / "0.png"))).float() / 255
    assert torch.allclose(features[0].latent[:3], F.avg_pool2d(exact.movedim(-1, 0)[None], 8)[0], atol=1e-5)
    assert len(collate([features[0], features[4]])) == 2

    again, encoders = encode(folder, tmp_path / "cache")
    assert encoders.pictures == 0 and not encoders.texts
    assert torch.equal(again[3].latent, features[3].latent)
    assert torch.equal(open_features(tmp_path / "cache")[3].caption, features[3].caption)
    assert torch.equal(pickle.loads(pickle.dumps(features))[2].latent, features[2].latent)
    elsewhere, _ = encode(folder, tmp_path / "other cache")
    assert elsewhere.identity == again.identity == features.identity


def test_a_list_grows_and_shrinks_under_a_training_that_has_it_open(tmp_path):
    folder, cache = make_folder(tmp_path / "set"), tmp_path / "cache"
    before, _ = encode(folder, cache)
    make_folder(folder, 8)
    grown, encoders = encode(folder, cache)
    assert encoders.pictures == 3 and len(encoders.texts) == 3 and len(grown) == 8
    for number in (0, 3):
        (folder / f"{number}.png").unlink()
    fewer, encoders = encode(folder, cache)
    assert not encoders.pictures and not encoders.texts and len(fewer) == len(open_features(cache)) == 6
    assert [fewer.name_of(index) for index in range(6)] == [f"{number}.png" for number in (1, 2, 4, 5, 6, 7)]
    assert len(list(cache.glob("*.index"))) == 1
    for features, names in ((before, range(5)), (grown, range(8))):  # whose lists are gone
        assert [features[index].text for index in range(len(features))] == [f"picture {number}" for number in names]
        assert features.index.identify() == features.identity
    assert (
        torch.equal(before[3].latent, grown[3].latent) and len({before.identity, grown.identity, fewer.identity}) == 3
    )


def test_what_changes_is_encoded_again_and_nothing_else(tmp_path):
    folder, cache = make_folder(tmp_path / "set"), tmp_path / "cache"
    first, _ = encode(folder, cache)
    (folder / "2.txt").write_text("another")
    features, encoders = encode(folder, cache)
    assert encoders.texts == ["another"] and encoders.pictures == 0
    assert features[2].text == "another" and len(features[2].caption) == 7 and features.identity != first.identity
    Image.new("RGB", (64, 64)).save(folder / "4.png")
    features, encoders = encode(folder, cache)
    assert not encoders.texts and encoders.pictures == 1 and not features[4].latent.any()


@pytest.mark.parametrize(
    ("change", "texts", "pictures"),
    [
        ({"settings": replace(SETTINGS, caption_length=30)}, 6, 0),
        ({"settings": replace(SETTINGS, caption_dtype="bf16")}, 6, 0),
        ({"settings": replace(SETTINGS, base_px=80)}, 0, 5),
        ({"settings": replace(SETTINGS, square=True)}, 0, 3),
        ({"settings": replace(SETTINGS, flip=True)}, 0, 5),
        ({"settings": replace(SETTINGS, size_condition="picture")}, 0, 0),
        ({"text": "another t5"}, 6, 0),
        ({"image": "another vae"}, 0, 5),
    ],
)
def test_settings_and_models_are_part_of_the_keys(tmp_path, change, texts, pictures):
    folder = make_folder(tmp_path / "set")
    encode(folder, tmp_path / "cache")
    _, encoders = encode(folder, tmp_path / "cache", **change)
    assert (len(encoders.texts), encoders.pictures) == (texts, pictures)


def test_captions_that_were_cut_are_counted_and_shown_also_when_they_are_in_the_cache(tmp_path):
    folder, settings = make_folder(tmp_path / "set"), replace(SETTINGS, caption_length=9)
    (folder / "3.txt").write_text("picture number 3", encoding="utf-8")

    class Cutting(Encoders):
        def text(self, captions):
            return [states[:9] for states in super().text(captions)]

    encode(folder, tmp_path / "cache", settings, Cutting())
    encoder = DatasetEncoder(check_records(read_dataset(folder)).records, tmp_path / "cache", settings, "t5", "vae")
    asked = []
    notes = encoder.describe_cut(lambda text: asked.append(text) or len(text))
    assert notes == [
        "cut at 9 tokens, without their ends: 1 of 5 captions",
        "'3.png': 16 tokens, 'picture number 3'",
    ]
    assert len(asked) == 5 and encoder.features(notes=notes).notes == open_features(tmp_path / "cache").notes == notes
    assert encoder.describe_cut(lambda text: 9) == []


def test_official_cleaning(tmp_path):
    record = Record("a", TensorPicture(torch.rand(64, 64, 3)), "A  <b>Cat</b> http://x.com")
    features, encoders = encode([record], tmp_path, replace(SETTINGS, clean=True))
    assert features[0].text == "a cat" and "a cat" in encoders.texts


def test_names_and_captions_that_are_no_unicode(tmp_path):
    """A file's name in another code page, and half an emoji, as scraped tables have them."""
    folder = tmp_path / "set"
    folder.mkdir()
    for name in (b"caf\xe9.png", b"b.png"):
        Image.new("RGB", (64, 64)).save(folder / os.fsdecode(name))
    rows = [{"file_name": os.fsdecode(b"caf\xe9.png"), "text": "a"}, {"file_name": "b.png", "text": "wow \ud83d"}]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    records = check_records(read_dataset(folder)).records
    features, _ = encode(records, tmp_path / "cache", replace(SETTINGS, caption_dtype="fp32"))
    assert [features.name_of(index) for index in range(2)] == ["caf\ufffd.png", "b.png"]
    assert features[1].text == open_features(tmp_path / "cache")[1].text == "wow \ufffd"


def test_mirrored_pictures(tmp_path):
    pixels = torch.rand(64, 96, 3)
    records = [Record("a", TensorPicture(pixels), "a", control=TensorPicture(1 - pixels))]
    features, _ = encode(records, tmp_path, replace(SETTINGS, flip=True))
    assert len(features) == 2
    assert torch.allclose(features[1].latent, features[0].latent.flip(-1), atol=1e-5)
    assert torch.allclose(features[1].hint, features[0].hint.flip(-1), atol=1e-5)
    assert torch.allclose(features[0].hint[:3], 1 - features[0].latent[:3], atol=0.05)  # bicubic overshoot is cut off


def test_hints_made_of_pictures_and_pictures_own(tmp_path):
    pixels, control = torch.rand(64, 64, 3), torch.rand(64, 64, 3)
    records = [Record("a", TensorPicture(pixels), "a"), Record("b", TensorPicture(pixels), "b", TensorPicture(control))]
    features, encoders = encode(records, tmp_path, hint_identity="invert", make_hint=lambda batch: 1 - batch)
    assert encoders.pictures == 3  # one picture for both, its inverse, and the control picture
    assert torch.allclose(features[0].hint[:3], 1 - features[0].latent[:3], atol=1e-5)
    assert not torch.allclose(features[0].hint, features[1].hint)
    _, encoders = encode(records, tmp_path, hint_identity="other", make_hint=lambda batch: batch)
    assert encoders.pictures == 1


def test_the_size_condition_may_be_the_pictures_own(tmp_path):
    records = [Record("a", TensorPicture(torch.rand(100, 200, 3)), "a", is_prior=True)]
    features, _ = encode(records, tmp_path, replace(SETTINGS, size_condition="picture"), Encoders(deviation=False))
    assert features[0].size_px == (100, 200) and features[0].aspect_ratio == 0.5
    assert features[0].is_prior and features[0].deviation is None


def test_interrupt_keeps_what_is_done(tmp_path):
    folder, cache = make_folder(tmp_path / "set", 8), tmp_path / "cache"
    encoders, (seen, stop) = Encoders(), interrupting(4)
    encoder = DatasetEncoder(check_records(read_dataset(folder)).records, cache, SETTINGS, "t5", "vae")
    with pytest.raises(KeyboardInterrupt):
        encoder.encode_pictures(encoders.image, batch_size=2, progress=stop)
    assert seen[-1][1] == 8 and seen[-1][2].shape[-1] == 3
    _, rest = encode(folder, cache)
    assert encoders.pictures >= 4 and encoders.pictures + rest.pictures == 8


def test_looking_through_the_pictures_is_told_and_can_be_interrupted(tmp_path):
    records = check_records(read_dataset(make_folder(tmp_path / "set"))).records
    seen, stop = interrupting(3)
    with pytest.raises(KeyboardInterrupt):
        DatasetEncoder(records, tmp_path / "cache", SETTINGS, "t5", "vae", progress=stop)
    assert seen == [(1, 5, None), (2, 5, None), (3, 5, None)]


def test_an_autoencoder_or_text_encoder_that_overflows(tmp_path):
    folder = make_folder(tmp_path / "set", 1)
    encoder = DatasetEncoder(check_records(read_dataset(folder)).records, tmp_path / "c", SETTINGS, "t5", "vae")
    with pytest.raises(ValueError, match="The VAE overflows: got NaN or infinity for the picture"):
        encoder.encode_pictures(lambda pixels: (torch.full((len(pixels), 4, 8, 8), torch.nan), None))
    with pytest.raises(ValueError, match="The text encoder overflows: .* the caption ''"):
        encoder.encode_captions(lambda texts: [torch.full((1, 2), 1e5)] * len(texts))  # beyond fp16
    with pytest.raises(ValueError, match=r"Wrong autoencoder: got latents of the shape \(1, 16, 8, 8\)"):
        encoder.encode_pictures(lambda pixels: (torch.zeros(1, 16, 8, 8), None))


def test_bad_settings_and_lists(tmp_path):
    with pytest.raises(ValueError, match="Unknown caption_dtype: got 'int8'"):
        EncodeSettings(caption_dtype="int8")
    with pytest.raises(ValueError, match="Resolution out of range: got 0"):
        EncodeSettings(base_px=0)
    with pytest.raises(FileNotFoundError, match="Encoded dataset not found"):
        open_features(tmp_path)
    (tmp_path / "a.json").write_text("[]")
    with pytest.raises(ValueError, match="Not an encoded dataset: got 'a.json'"):
        open_features(tmp_path)
    for text in ('{"version": 1, "items": [1]}', '{"version": 1, "items": [{}], "settings": {}, "null_caption": "x"}'):
        (tmp_path / "a.json").write_text(text)
        with pytest.raises(ValueError, match="Not an encoded dataset: got 'a.json'"):
            open_features(tmp_path)
    (tmp_path / "b.json").write_text("{}")
    with pytest.raises(ValueError, match="got a.json, b.json"):
        open_features(tmp_path)


def test_a_lost_shard_is_named_and_encoded_again(tmp_path):
    folder, cache = make_folder(tmp_path / "set"), tmp_path / "cache"
    encode(folder, cache)
    for shard in cache.glob("*.safetensors"):
        shard.write_bytes(shard.read_bytes()[:-100])  # as a full disk or a broken copy leaves it
    with pytest.raises(FileNotFoundError, match="Cache is not complete: got 11 of 11 entries missing"):
        open_features(cache)
    features, encoders = encode(folder, cache)
    assert len(features) == encoders.pictures == 5


def test_shares_of_several_processes_make_one_cache(tmp_path):
    folder, cache = make_folder(tmp_path / "set", 9), tmp_path / "cache"
    first, second = (Encoders(), Encoders())
    with pytest.raises(FileNotFoundError, match="Let the other processes finish"):
        encode(folder, cache, encoders=first, rank=0, world_size=2)
    features, _ = encode(folder, cache, encoders=second, rank=1, world_size=2)
    assert len(features) == 9 and first.pictures == 5 and second.pictures == 4
    assert set(first.texts).isdisjoint(second.texts)


def test_bins_of_a_size_without_a_table():
    assert training_bins(1024)[0.25] == (512, 2048)
    small = training_bins(64)
    assert small[1.0] == (64, 64) and small[0.25] == (32, 128)
    assert all(side % 16 == 0 and side for size in small.values() for side in size)
    assert training_bins(512, square=True) == {1.0: (512, 512)}


def test_a_fingerprint_tells_models_apart():
    weights = {"a": torch.randn(100, 300), "b": torch.tensor(1.0), "c": torch.ones(3, dtype=torch.float8_e4m3fn)}
    same = fingerprint(reversed(list(weights.items())))
    assert same == fingerprint(weights.items())
    for name, value in (("a", weights["a"] + 1e-3), ("b", weights["b"].half()), ("c", weights["c"][:2])):
        assert fingerprint({**weights, name: value}.items()) != same


def test_a_half_written_shard_is_never_seen(tmp_path):
    writer = ShardWriter(tmp_path)
    with writer:
        writer.add("key", {"mean": torch.ones(2)})
        (tmp_path / ".abc.safetensors.12.tmp").write_bytes(b"half")
        assert "key" not in ShardFolder(tmp_path)
    shards = ShardFolder(tmp_path)
    assert shards.read("key")["mean"].tolist() == [1, 1] and shards.shape_of("key", "mean") == (2,)
    assert len(list(tmp_path.glob("*.safetensors"))) == 1


def test_a_full_disk_is_told(tmp_path):
    with pytest.raises(OSError, match="Cache cannot be written: got .*, expected room in"):
        with ShardWriter(tmp_path / "cache") as writer:
            writer.add("key", {"mean": torch.ones(2)})
            (tmp_path / "cache").rmdir()
            (tmp_path / "cache").write_text("a file in the way")


SCRIPT = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import torch
from pixart.data.storage import shards
from pixart.data.cache import DatasetEncoder, EncodeSettings
from pixart.data.records import check_records
from pixart.data.sources import read_dataset
shards.SHARD_BYTES = 4000  # a shard or so for every batch
records = check_records(read_dataset(Path(sys.argv[2]))).records
encoder = DatasetEncoder(records, Path(sys.argv[3]), EncodeSettings(base_px=64, caption_length=20), "t5", "vae")
encoder.encode_captions(lambda texts: [torch.ones(len(text) + 1, 2) for text in texts])
def encode(pixels):
    time.sleep(float(sys.argv[4]))
    height, width = pixels.shape[1:3]
    return torch.ones(len(pixels), 4, height // 8, width // 8) * pixels.mean(), None
print("ready", flush=True)
encoder.encode_pictures(encode, batch_size=1, progress=lambda done, total, picture: print(done, flush=True))
encoder.features()
"""


def start_writer(folder, cache, delay):
    command = [sys.executable, "-c", SCRIPT, str(ROOT), str(folder), str(cache), str(delay)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_a_killed_encoding_goes_on(tmp_path):
    folder, cache = make_folder(tmp_path / "set", 12), tmp_path / "cache"
    writer = start_writer(folder, cache, 0.05)
    while writer.stdout.readline().strip() not in ("5", ""):
        pass
    writer.send_signal(signal.SIGKILL)
    writer.wait(30)
    writer.stdout.close()
    shards = ShardFolder(cache)
    encoder = DatasetEncoder(check_records(read_dataset(folder)).records, cache, SETTINGS, "t5", "vae")
    assert 0 < len(encoder.missing_pictures) < 12 and not len(encoder.missing_captions)
    assert encoder.null_key in shards
    features, encoders = encode(folder, cache)
    assert len(features) == 12 and encoders.pictures == len(encoder.missing_pictures)


@pytest.mark.slow
def test_two_writers_at_once(tmp_path):
    folder, cache = make_folder(tmp_path / "set", 8), tmp_path / "cache"
    writers = [start_writer(folder, cache, 0.02) for _ in range(2)]
    deadline = time.monotonic() + 120
    for writer in writers:
        writer.communicate(timeout=deadline - time.monotonic())
    assert [writer.returncode for writer in writers] == [0, 0]
    features = open_features(cache)
    assert len(features) == 8 and all(torch.isfinite(features[index].latent).all() for index in range(8))
    assert json.loads((cache / "features.json").read_text())["version"] == 1
    _, encoders = encode(folder, cache)
    assert encoders.pictures == 0 and not encoders.texts


def test_records_of_files_that_vanish(tmp_path):
    with pytest.raises(FileNotFoundError):
        DatasetEncoder([Record("x", FilePicture(tmp_path / "x.png"), "a")], tmp_path, SETTINGS, "t5", "vae")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="This system has no named pipes")
def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    """In place of a dataset, of a shard, and of prompts."""
    for name in ("set.csv", "set", "cache.safetensors", "cache/x.safetensors"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        os.mkfifo(tmp_path / name)
    for name in ("set.csv", "set"):
        with pytest.raises(ValueError, match=f"Not a dataset: got a pipe or device named '{name}'"):
            read_dataset(tmp_path / name)
    features, _ = encode(make_folder(tmp_path / "pictures"), tmp_path / "cache")
    assert len(features) == 5
    with pytest.raises(ValueError, match="Not a file: got a pipe"):
        read_prompts(tmp_path / "cache.safetensors")


def test_shares_of_several_machines_make_the_list_that_one_would(tmp_path):
    """Each reads and lists its own records alone; a picture that two shares have is listed once, as one check would."""
    folder = make_folder(tmp_path / "set", 9)
    for suffix in ("png", "txt"):
        (folder / f"7b.{suffix}").write_bytes((folder / f"2.{suffix}").read_bytes())
    settings = replace(SETTINGS, flip=True)
    whole, _ = encode(folder, tmp_path / "whole", settings)
    found = [replace(record, number=number) for number, record in enumerate(read_dataset(folder))]
    cache, missing, encoders = tmp_path / "shares", [], Encoders()
    for which in (3, 1, 2):
        records = check_records(found[which - 1 :: 3]).records
        encoder = DatasetEncoder(records, cache, settings, "t5", "vae")
        encoder.encode_captions(encoders.text)
        encoder.encode_pictures(encoders.image)
        missing.append(encoder.write_share((which, 3), notes=[f"note {which}"]))
    assert missing == [[1, 2], [2], []]
    features = open_features(cache)
    assert features.identity == whole.identity and features.notes == ["note 1", "note 2", "note 3"]
    assert [features.name_of(index) for index in range(18)] == [whole.name_of(index) for index in range(18)]
    assert list(features.bins) == list(whole.bins) and encoders.pictures == 18
    assert all(torch.equal(features[index].latent, whole[index].latent) for index in range(18))
    assert [features[index].text for index in range(18)] == [whole[index].text for index in range(18)]
    other = DatasetEncoder(check_records(found[::3]).records, cache, SETTINGS, "t5", "vae")
    assert other.write_share((1, 3)) == [2, 3] and len(open_features(cache)) == 18  # another encoding's share


def encode_sizes(tmp_path, **fields):
    pictures = [TensorPicture(torch.rand(height, width, 3)) for height, width in ((40, 60), (200, 130), (130, 200))]
    records = [Record(f"{number}", picture, "x") for number, picture in enumerate(pictures)]
    settings = EncodeSettings(base_px=64, more_px=(128, 64), caption_length=20, **fields)
    encoder, encoders = DatasetEncoder(records, tmp_path, settings, "text", "image"), Encoders()
    encoder.encode_captions(encoders.text)
    encoder.encode_pictures(encoders.image, batch_size=2)
    return encoder.features(), encoders


def areas(features):
    return [round((height * width) ** 0.5 * 8 / 64) for height, width in features.bins]


def test_each_picture_goes_into_each_size(tmp_path):
    features, encoders = encode_sizes(tmp_path)
    assert encoders.pictures == len(features) == 6
    assert areas(features) == [1, 2] * 3
    assert features[3].size_px == tuple(side * 8 for side in features.bins[3])
    alone = EncodeSettings(base_px=64, caption_length=20)
    assert alone.sizes_px == (64,)


def test_each_picture_goes_into_the_nearest_size(tmp_path):
    features, encoders = encode_sizes(tmp_path, spread="nearest", flip=True)
    assert encoders.pictures == len(features) == 6  # with their mirrors
    assert areas(features) == [1, 1, 2, 2, 2, 2]


def test_sizes_that_cannot_be(tmp_path):
    for fields, match in (({"more_px": (8,)}, "Resolution out of range: got 8"), ({"spread": "all"}, "Unknown spread")):
        with pytest.raises(ValueError, match=match):
            EncodeSettings(base_px=64, **fields)
