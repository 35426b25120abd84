"""Encoded prompts on disk: what is kept, for whom, how much, and what a graph without T5 reads."""

import importlib
import os
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from pixart_pack.tests.host.graph import write_t5


@pytest.fixture(scope="module")
def text(pack):
    return importlib.import_module("pixart_pack.nodes.host.text.captions")


@pytest.fixture
def cache(pack, tmp_path, monkeypatch):
    module = importlib.import_module("pixart_pack.nodes.host.text.prompt_cache")
    monkeypatch.setattr(module, "folder", lambda: tmp_path / "prompts")
    return module


@pytest.fixture(scope="module")
def load(pack, tmp_path_factory):
    """A function that loads the tiny T5, anew each time."""
    path = tmp_path_factory.mktemp("t5") / "tiny.safetensors"
    write_t5(path)
    return lambda: importlib.import_module("pixart_pack.nodes.host.text.t5").load_t5(path)


def encodings(clip, monkeypatch):
    """A list that grows by one with every run of the encoder."""
    runs, encode = [], clip.encode_from_tokens_scheduled
    monkeypatch.setattr(clip, "encode_from_tokens_scheduled", lambda *a, **k: (runs.append(1), encode(*a, **k))[1])
    return runs


def test_a_prompt_seen_before_needs_no_encoder(text, cache, load, monkeypatch):
    first, _ = text.encode_captions(load(), ["a red circle", ""], 120)
    clip = load()
    runs = encodings(clip, monkeypatch)
    again, _ = text.encode_captions(clip, ["a red circle", ""], 120, width=64)
    assert not runs
    assert torch.equal(first[0][0], again[0][0])
    assert again[0][1]["width"] == 64
    assert again[0][1].keys() - {"width"} == first[0][1].keys()


def test_what_changes_the_encoding_is_told_apart(text, cache, load, monkeypatch):
    clip = load()
    runs = encodings(clip, monkeypatch)
    for count, (caption, length) in enumerate(
        [("a red circle", 120), ("a red circles", 120), ("a (red:1.2) circle", 120), ("a red circle", 2)], start=1
    ):
        text.encode_captions(clip, [caption], length)
        assert len(runs) == count
    patched = clip.clone()
    patched.patcher.patches = {"some.weight": []}
    assert cache.key_of(patched, [(1, 1.0)]) is None
    monkeypatch.setenv("PIXART_PROMPT_CACHE", "0")
    assert cache.key_of(clip, [(1, 1.0)]) is None


def test_another_file_of_the_same_name_is_told_apart(cache, pack, tmp_path):
    load_t5 = importlib.import_module("pixart_pack.nodes.host.text.t5").load_t5
    path = tmp_path / "t5.safetensors"
    write_t5(path)
    key = cache.key_of(load_t5(path), [(1, 1.0)])
    assert key == cache.key_of(load_t5(path), [(1, 1.0)])
    data = bytearray(path.read_bytes())
    data[-4:] = b"\x00\x00\x80\x3f"
    path.write_bytes(data)
    os.utime(path, ns=(1, 1))
    assert cache.key_of(load_t5(path), [(1, 1.0)]) != key


def test_the_files_are_the_users_alone_and_hold_no_prompt(text, cache, load):
    text.encode_captions(load(), ["a secret surprise"], 120)
    (file,) = cache.folder().iterdir()
    assert b"secret" not in file.read_bytes()
    if os.name == "posix":
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700


def test_the_least_recently_used_go_first(cache, monkeypatch):
    states = torch.zeros(1, 10, 24)
    for number in range(4):
        cache.write(f"key{number}", states)
        os.utime(cache.folder() / f"key{number}.safetensors", ns=(number * 10**9, number * 10**9))
    cache.read("key0")
    monkeypatch.setattr(cache, "LIMIT_BYTES", 3 * (cache.folder() / "key0.safetensors").stat().st_size)
    cache.write("key4", states)
    assert sorted(file.stem for file in cache.folder().iterdir()) == ["key0", "key3", "key4"]


def test_a_damaged_file_is_made_anew(text, cache, load, monkeypatch):
    clip = load()
    expected, _ = text.encode_captions(clip, ["a red circle"], 120)
    (file,) = cache.folder().iterdir()
    file.write_bytes(b"half")
    runs = encodings(clip, monkeypatch)
    again, _ = text.encode_captions(clip, ["a red circle"], 120)
    assert (len(runs), torch.equal(expected[0][0], again[0][0])) == (1, True)
    assert cache.read(file.stem) is not None


def refuse(*_, **__):
    raise PermissionError("Read-only file system")


def test_a_folder_that_cannot_be_written_is_read(text, cache, load, monkeypatch):
    """And what is damaged in it is passed over."""
    clip = load()
    expected, _ = text.encode_captions(clip, ["a red circle"], 120)
    (file,) = cache.folder().iterdir()
    monkeypatch.setattr(os, "utime", refuse)
    assert torch.equal(cache.read(file.stem), expected[0][0])
    file.write_bytes(b"half")
    monkeypatch.setattr(type(file), "unlink", refuse)
    assert cache.read(file.stem) is None
    monkeypatch.setattr(cache, "write_atomically", refuse)
    again, _ = text.encode_captions(clip, ["a red circle"], 120)
    assert torch.equal(again[0][0], expected[0][0])


def test_a_file_that_cannot_be_opened_stays(cache, monkeypatch):
    """It is not damaged: another program holds it, or too many files are open."""
    cache.write("key", torch.zeros(1, 2, 4))
    monkeypatch.setattr(cache, "load_file", refuse)
    assert cache.read("key") is None
    assert (cache.folder() / "key.safetensors").exists()


def test_two_programs_may_write_at_once(cache, monkeypatch):
    """The same prompt and others, while the least recently used leave."""
    states = {f"key{number}": torch.full((1, 8, 24), float(number)) for number in range(6)}
    cache.write("key0", states["key0"])
    monkeypatch.setattr(cache, "LIMIT_BYTES", 4 * (cache.folder() / "key0.safetensors").stat().st_size)
    found = []

    def work(seed):
        for turn in range(60):
            key = f"key{(turn * seed) % 6}"
            known = cache.read(key)
            found.append(known is None or torch.equal(known, states[key]))
            cache.write(key, states[key])

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, (1, 5, 7, 11)))
    assert all(found)
    assert 1 <= len(list(cache.folder().iterdir())) <= 4


def test_a_folder_that_others_may_read_is_closed(cache):
    cache.folder().mkdir(mode=0o755, parents=True)
    cache.write("key", torch.zeros(1, 2, 4))
    if os.name == "posix":
        assert stat.S_IMODE(cache.folder().stat().st_mode) == 0o700


def test_states_come_to_where_the_host_keeps_them(cache, load, text, run_node, monkeypatch):
    """With --gpu-only that is the GPU: some prompts of a batch may be known, and others not."""
    management = importlib.import_module("comfy.model_management")
    cache.write("key", torch.zeros(1, 2, 4))
    conditioning, _ = text.encode_captions(load(), ["a red circle"], 120)
    (name,) = run_node("PixArtSavePromptEmbeddings", conditioning=conditioning, filename_prefix="embeds/place")
    monkeypatch.setattr(management, "intermediate_device", lambda: torch.device("meta"))
    assert cache.read("key").device.type == "meta"
    (loaded,) = run_node("PixArtLoadPromptEmbeddings", embeddings=name)
    assert {loaded[0][0].device.type, loaded[0][1]["attention_mask"].device.type} == {"meta"}


def test_a_full_disk_stops_nothing(cache, monkeypatch):
    def fail(*_, **__):
        raise OSError("No space left on device")

    monkeypatch.setattr(cache, "write_atomically", fail)
    cache.write("key", torch.zeros(1, 1, 1))


def test_embeddings_go_to_a_file_and_back(text, cache, load, run_node):
    conditioning, _ = text.encode_captions(load(), ["a red circle", "a dog"], 120, pixart_size=(64, 96))
    (name,) = run_node("PixArtSavePromptEmbeddings", conditioning=conditioning, filename_prefix="embeds/one")
    assert name == "output/embeds/one_00001_.safetensors"
    (loaded,) = run_node("PixArtLoadPromptEmbeddings", embeddings=name)
    assert torch.equal(loaded[0][0], conditioning[0][0])
    assert torch.equal(loaded[0][1]["attention_mask"], conditioning[0][1]["attention_mask"])
    assert loaded[0][1]["pixart_size"] == (64, 96)


def test_parts_of_one_prompt_share_their_tensors(text, cache, load, run_node):
    """As ConditioningSetArea and ConditioningCombine leave them."""
    conditioning, _ = text.encode_captions(load(), ["a red circle", "a dog"], 120)
    states, extra = conditioning[0]
    parts = [[states, {**extra, "area": ("percentage", 0.5, 1.0, 0.0, 0.0)}], [states, extra], [states[1:], {}]]
    (name,) = run_node("PixArtSavePromptEmbeddings", conditioning=parts, filename_prefix="embeds/parts")
    (loaded,) = run_node("PixArtLoadPromptEmbeddings", embeddings=name)
    assert [torch.equal(one[0], other[0]) for one, other in zip(loaded, parts, strict=True)] == [True] * 3
    assert loaded[0][1]["area"] == ("percentage", 0.5, 1.0, 0.0, 0.0)


def test_another_file_of_the_same_name_is_read_anew(text, cache, load, run_node):
    nodes = importlib.import_module("pixart_pack.nodes.text")
    first, _ = text.encode_captions(load(), ["a red circle"], 120)
    (name,) = run_node("PixArtSavePromptEmbeddings", conditioning=first, filename_prefix="embeds/again")
    before = nodes.LoadPromptEmbeddings.fingerprint_inputs(embeddings=name)
    assert nodes.LoadPromptEmbeddings.fingerprint_inputs(embeddings=name) == before
    path = importlib.import_module("folder_paths").get_output_directory() + name.removeprefix("output")
    os.remove(path)
    second, _ = text.encode_captions(load(), ["a dog"], 120)
    assert run_node("PixArtSavePromptEmbeddings", conditioning=second, filename_prefix="embeds/again") == (name,)
    assert nodes.LoadPromptEmbeddings.fingerprint_inputs(embeddings=name) != before
    for away in ("output/../secret.safetensors", "output//etc/passwd.safetensors", "models/x.safetensors", ""):
        assert nodes.LoadPromptEmbeddings.fingerprint_inputs(embeddings=away) is None
        with pytest.raises(FileNotFoundError, match="Prompt embeddings not found"):
            run_node("PixArtLoadPromptEmbeddings", embeddings=away)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="a system without named pipes")
@pytest.mark.timeout(60)
def test_a_pipe_among_the_files_blocks_nothing(pack):
    pipe = Path(importlib.import_module("folder_paths").get_output_directory(), "pipe.safetensors")
    pipe.parent.mkdir(parents=True, exist_ok=True)
    os.mkfifo(pipe)
    try:
        embeddings = importlib.import_module("pixart_pack.nodes.host.text.embeddings")
        assert "output/pipe.safetensors" not in embeddings.list_embeddings()
        with pytest.raises(FileNotFoundError, match=r"Prompt embeddings not found: got 'output/pipe\.safetensors'"):
            embeddings.load_embeddings("output/pipe.safetensors")
    finally:
        pipe.unlink()


def test_what_a_file_cannot_hold_is_refused(run_node):
    conditioning = [[torch.zeros(1, 2, 4), {"control": object()}]]
    with pytest.raises(ValueError, match="Conditioning cannot be saved: got control in it"):
        run_node("PixArtSavePromptEmbeddings", conditioning=conditioning, filename_prefix="embeds/two")
    with pytest.raises(ValueError, match="Unusable file name"):
        run_node("PixArtSavePromptEmbeddings", conditioning=[[torch.zeros(1, 2, 4), {}]], filename_prefix="../two")
    with pytest.raises(FileNotFoundError, match="Prompt embeddings not found"):
        run_node("PixArtLoadPromptEmbeddings", embeddings="output/../../secret.safetensors")
