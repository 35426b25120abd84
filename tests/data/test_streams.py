"""Streams: tar files that others read, over connections that break, the same for any number of processes."""

import http.server
import json
import subprocess
import sys
import tarfile
import threading
from itertools import chain, islice
from pathlib import Path

import pytest
import torch
from safetensors.torch import load

from pixart_pack.pixart.data.buckets import BucketSampler
from pixart_pack.pixart.data.features import open_features
from pixart_pack.pixart.data.streams import places, reading
from pixart_pack.pixart.data.streams.reading import open_stream
from pixart_pack.pixart.data.streams.writing import STREAM, write_stream
from pixart_pack.pixart.training.run import train
from pixart_pack.tests.training_data import make_features, tiny_model, tiny_settings

ROOT = Path(__file__).resolve().parents[2]
SHARD_BYTES = 12_000  # four pictures or so


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """(features, the folder of their stream)."""
    features, folder = make_features(40, prior=(1, 8)), tmp_path_factory.mktemp("stream") / "made"
    write_stream(features, folder, SHARD_BYTES)
    return features, folder


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    monkeypatch.setattr(places, "_FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(reading, "SHARDS_A_BLOCK", 2)


class _Dropping(http.server.SimpleHTTPRequestHandler):
    """Files of a folder, with ranges; it drops a connection halfway for names in `drops`, as often as they say."""

    protocol_version = "HTTP/1.1"
    drops: dict[str, int] = {}
    asked: list[tuple[str, str | None]] = []
    folder: Path

    def do_GET(self):
        name = self.path.strip("/")
        self.asked.append((name, self.headers.get("Range")))
        path = self.folder / name
        if not path.is_file():
            self.send_error(404)
            return
        data, start = path.read_bytes(), int((self.headers.get("Range") or "bytes=0-")[6:-1])
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        data = data[start:]
        if self.drops.get(name, 0):
            self.drops[name] -= 1
            self.wfile.write(data[: len(data) // 2])
            self.wfile.flush()
            self.close_connection = True
            self.connection.close()
            return
        self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(written):
    handler = type("Handler", (_Dropping,), {"drops": {}, "asked": [], "folder": written[1]})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as made:
        threading.Thread(target=made.serve_forever, args=(0.02,), daemon=True).start()
        made.handler, made.address = handler, f"http://127.0.0.1:{made.server_port}"
        yield made
        made.shutdown()


def assert_same(one, other):
    for part in ("latent", "deviation", "caption"):
        assert torch.equal(getattr(one, part), getattr(other, part))
    assert (one.size_px, one.aspect_ratio, one.is_prior, one.text) == (
        other.size_px,
        other.aspect_ratio,
        other.is_prior,
        other.text,
    )


def test_a_stream_holds_every_picture_once(written):
    features, folder = written
    stream = open_features(folder)
    names = [stream.name_of(index) for index in range(len(stream))]
    assert sorted(names, key=lambda name: int(name.split()[1])) == [features.name_of(index) for index in range(40)]
    for index, name in enumerate(names):
        number = int(name.split()[1]) - 1
        assert_same(stream[index], features[number])
        assert (
            tuple(stream.bins[index]) == features.bins[number] and stream.is_prior[index] == features.is_prior[number]
        )
    assert torch.equal(stream.null_caption, features.null_caption)
    assert len(list(folder.glob("*.tar"))) > 5 and names != sorted(names)


def test_others_read_its_tar_files(written):
    """In WebDataset's form: files behind each other that share a name up to the dot."""
    features, folder = written
    with tarfile.open(sorted(folder.glob("*.tar"))[0]) as archive:
        first, second = archive.next(), archive.next()
        told = json.load(archive.extractfile(first))
        mean = load(archive.extractfile(second).read())["mean"]
    assert (Path(first.name).suffix, Path(second.name).suffix) == (".json", ".safetensors")
    assert Path(first.name).stem == Path(second.name).stem == f"{int(told['name'].split()[1]) - 1:010d}"
    assert torch.equal(mean, features[int(told["name"].split()[1]) - 1].latent)


def test_an_order_needs_a_few_files_at_a_time_and_is_that_of_any_number_of_processes(written):
    stream = open_features(written[1])
    asked: list[list[int]] = []
    one = BucketSampler(stream.bins, 4, 3, blocks=stream.blocks, ahead=asked.append)
    ranks = [BucketSampler(stream.bins, 2, 3, world_size=2, rank=rank, blocks=stream.blocks) for rank in range(2)]
    drawn = list(islice(one, 2 * one.batches_per_epoch))
    assert drawn == [list(chain(*map(next, ranks))) for _ in drawn]
    epochs = drawn[: len(drawn) // 2], drawn[len(drawn) // 2 :]
    assert epochs[0] != epochs[1] and all(set(chain(*epoch)) == set(range(40)) for epoch in epochs)
    assert all(len({int(stream.blocks[index]) for index in batch}) == 1 for batch in drawn)
    blocks = [int(stream.blocks[batch[0]]) for batch in epochs[0]]
    spans = [len(blocks) - blocks[::-1].index(block) - blocks.index(block) for block in set(blocks)]
    assert len(set(blocks)) > 4 and max(spans) < len(blocks)
    assert set(chain(*asked)) == set(blocks) and all(len(some) <= 4 for some in asked)
    state = BucketSampler(stream.bins, 4, 3, blocks=stream.blocks)
    state.load_state_dict({**one.state_dict(), "epoch": 1, "position": 3})
    assert next(state) == epochs[1][3]
    with pytest.raises(ValueError, match="'blocks': None"):
        BucketSampler(stream.bins, 4, 3).load_state_dict(one.state_dict()) or one.load_state_dict(
            BucketSampler(stream.bins, 4, 3).state_dict()
        )


def test_connections_that_break_cost_time_alone(written, server, tmp_path):
    features, folder = written
    shards = sorted(path.name for path in folder.glob("*.tar"))
    server.handler.drops.update({STREAM: 1, shards[0]: 3, shards[1]: 1})
    stream, local = open_stream(server.address, tmp_path), open_features(folder)
    for index in range(len(stream)):
        assert_same(stream[index], local[index])
    assert stream.identity == local.identity
    ranges = [asked for name, asked in server.handler.asked if name == shards[0]]
    assert len(ranges) == 4 and ranges[0] is None and all(asked.startswith("bytes=") for asked in ranges[1:])
    count = len(server.handler.asked)
    again = open_stream(server.address, tmp_path)
    assert_same(again[0], local[0])
    assert len(server.handler.asked) == count + 1  # its head alone: the rest is in the cache


def test_a_shard_that_cannot_be_had_is_named(written, server, tmp_path):
    shards = sorted(path.name for path in written[1].glob("*.tar"))
    stream = open_stream(server.address, tmp_path)
    server.handler.drops[shards[0]] = 1000
    server.handler.folder = tmp_path  # whatever else is asked for is not there
    with pytest.raises(OSError, match=f"Shard cannot be read: got .*404.* 6 times for '{shards[0]}' of 'http://"):
        stream[0]


def test_a_damaged_shard_is_fetched_again_from_an_address_and_named_in_a_folder(written, server, tmp_path):
    stream = open_stream(server.address, tmp_path)
    right, (cached,) = stream[0], list(tmp_path.rglob("*.tar"))
    data = bytearray(cached.read_bytes())
    data[-3000] ^= 1
    cached.write_bytes(data)
    assert_same(open_stream(server.address, tmp_path)[0], right)
    copied = tmp_path / "copied"
    copied.mkdir()
    for path in written[1].iterdir():
        (copied / path.name).write_bytes(bytes(data) if path.name == cached.name else path.read_bytes())
    with pytest.raises(OSError, match=f"bytes of another checksum for '{cached.name}'"):
        open_features(copied)[0]
    (copied / cached.name).unlink()
    with pytest.raises(OSError, match=f"got no file for '{cached.name}'"):
        open_features(copied)[0]


def test_a_cache_keeps_its_bounds(written, server, tmp_path):
    limit = 40_000
    stream = open_stream(server.address, tmp_path, limit)
    local = open_features(written[1])
    for index in range(len(stream)):
        assert_same(stream[index], local[index])
        assert sum(path.stat().st_size for path in tmp_path.rglob("*.tar")) <= limit
    assert_same(stream[0], local[0])


SCRIPT = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from pixart.data.buckets import BucketSampler
from pixart.data.streams import reading
reading.SHARDS_A_BLOCK = 2
stream = reading.open_stream(sys.argv[2], Path(sys.argv[3]), 60_000)
rank = int(sys.argv[4])
sampler = BucketSampler(stream.bins, 2, 3, world_size=2, rank=rank, blocks=stream.blocks, ahead=stream.fetch_ahead)
for _ in range(2 * sampler.batches_per_epoch):
    print(*(float(stream[index].latent.sum()) for index in next(sampler)), flush=True)
"""


@pytest.mark.slow
def test_two_processes_with_one_cache_read_what_one_reads(written, server, tmp_path):
    shards = sorted(path.name for path in written[1].glob("*.tar"))
    server.handler.drops.update(dict.fromkeys(shards, 2))
    command = [sys.executable, "-c", SCRIPT, str(ROOT), server.address, str(tmp_path)]
    running = [subprocess.Popen([*command, str(rank)], stdout=subprocess.PIPE, text=True) for rank in range(2)]
    told = [process.communicate(timeout=200)[0].splitlines() for process in running]
    assert [process.returncode for process in running] == [0, 0]
    stream = open_features(written[1])
    sampler = BucketSampler(stream.bins, 4, 3, blocks=stream.blocks)
    for lines in zip(*told, strict=True):
        sums = [float(stream[index].latent.sum()) for index in next(sampler)]
        assert [float(number) for line in lines for number in line.split()] == sums


@pytest.mark.slow
def test_a_training_on_a_stream_that_is_cut_goes_on_bit_by_bit(written, server, tmp_path):
    """Within an epoch, from another place of the same stream, and with a cache that is lost."""
    settings = tiny_settings(steps=9, checkpoint_every=4)
    whole = train(tiny_model(), open_features(written[1]), settings, tmp_path / "whole").weights
    train(tiny_model(), open_stream(server.address, tmp_path / "a"), tiny_settings(steps=4), tmp_path / "cut")
    server.handler.drops.update({path.name: 1 for path in written[1].glob("*.tar")})
    stream = open_stream(server.address, tmp_path / "b", 50_000)
    continued = train(tiny_model(), stream, settings, tmp_path / "cut").weights
    assert all(torch.equal(continued[name], whole[name]) for name in whole)


@pytest.mark.parametrize(
    "change", [{"version": 3}, {"index": "../x"}, {"index_digest": "00" * 20}, {"identity": None, "null_caption": "zz"}]
)
def test_another_content_is_refused(written, tmp_path, change):
    for path in written[1].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    head = json.loads((tmp_path / STREAM).read_text())
    (tmp_path / STREAM).write_text(json.dumps({**head, **change}))
    with pytest.raises((ValueError, OSError), match="Not a stream|Shard cannot be read"):
        open_features(tmp_path)


def test_the_cache_of_the_environment(server, tmp_path, monkeypatch):
    monkeypatch.setenv("PIXART_STREAM_CACHE", str(tmp_path / "mine"))
    monkeypatch.setenv("PIXART_STREAM_CACHE_GB", "0.5")
    place = open_stream(server.address).place
    assert place.folder.parent == tmp_path / "mine" and place.limit_bytes == 500_000_000
    monkeypatch.setenv("PIXART_STREAM_CACHE_GB", "much")
    with pytest.raises(ValueError, match="much.* GB in PIXART_STREAM_CACHE_GB"):
        open_stream(server.address)


def test_addresses_that_do_not_answer(tmp_path):
    with pytest.raises(OSError, match="Stream cannot be opened: got .* for 'stream.json' of 'http://127.0.0.1:9"):
        open_stream("http://127.0.0.1:9/x", tmp_path)
    with pytest.raises(ValueError, match="Stream exists already"):
        (tmp_path / STREAM).write_text("{}")
        write_stream(make_features(1), tmp_path)
