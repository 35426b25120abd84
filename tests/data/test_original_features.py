"""Features in PixArt-alpha's own files, read and written."""

import json
import os
import pickle

import numpy as np
import pytest
import torch

from pixart_pack.pixart.data import original_features
from pixart_pack.pixart.data.examples import Example, ListFeatures
from pixart_pack.pixart.data.features import open_features
from pixart_pack.pixart.data.original_features import find_original_features, write_original_features


def write_caption(path, length, width=6, total=120, mask=True):
    path.parent.mkdir(parents=True, exist_ok=True)
    states = np.random.default_rng(length).normal(size=(1, total, width)).astype(np.float32)
    kept = {"attention_mask": (np.arange(total) < length).astype(np.int64)[None]} if mask else {}
    np.savez(path, caption_feature=states, **kept)
    return torch.from_numpy(states[0, :length])


def write_latent(path, height=8, width=8):
    path.parent.mkdir(parents=True, exist_ok=True)
    moments = np.random.default_rng(height).normal(size=(8, height, width)).astype(np.float32)
    np.save(path, moments)
    return torch.from_numpy(moments)


def write_list(root, rows, where="partition"):
    (root / where).mkdir(parents=True, exist_ok=True)
    (root / where / "data_info.json").write_text(json.dumps(rows), encoding="utf-8")


def test_single_size_with_folders_in_the_names(tmp_path):
    write_list(tmp_path, [{"path": "dir/x.png", "prompt": "one", "height": 30, "width": 40, "ratio": 0.75}])
    caption = write_caption(tmp_path / "caption_feature_wmask" / "dir_x.npz", 7)
    moments = write_latent(tmp_path / "img_vae_features_64resolution" / "noflip" / "dir_x.npy")
    features = open_features(tmp_path)
    assert len(features) == 1 and features.bins == [(8, 8)] and features.null_caption is None
    example = features[0]
    assert torch.equal(example.caption, caption) and example.text == "one"
    assert torch.equal(example.latent, moments[:4]) and torch.equal(example.deviation, moments[4:])
    assert example.size_px == (64, 64) and example.aspect_ratio == 1.0


def test_several_sizes_tell_the_pictures_own(tmp_path):
    write_list(tmp_path, [{"path": "x.jpg", "prompt": "one", "height": 300, "width": 400}], "partition_filter")
    write_caption(tmp_path / "caption_features" / "x.npz", 3)
    write_latent(tmp_path / "img_vae_fatures_512_multiscale" / "ms" / "x.npy", 56, 72)
    features = find_original_features(tmp_path)
    assert features.bins == [(56, 72)]
    assert features[0].size_px == (300, 400) and features[0].aspect_ratio == 0.78


def test_sam_layout_without_a_list_and_without_masks(tmp_path):
    write_caption(tmp_path / "caption_feature_wmask" / "sa_1.npz", 120, mask=False)
    write_latent(tmp_path / "img_vae_feature" / "train_vae_256" / "noflip" / "sa_1.npy", 32, 32)
    write_latent(tmp_path / "img_vae_feature" / "train_vae_256" / "noflip" / "sa_2.npy", 32, 32)
    features = open_features(tmp_path)
    assert len(features) == 1 and len(features[0].caption) == 120 and features[0].size_px == (256, 256)


def test_the_identity_is_of_what_the_files_hold(tmp_path):
    def features(folder, seed=0, text="a"):
        generator = torch.Generator().manual_seed(seed)
        caption = torch.randn(5, 7, generator=torch.Generator().manual_seed(len(text)))
        example = Example(torch.randn(4, 8, 8, generator=generator), caption, (64, 64), 1.0, text=text)
        write_original_features(ListFeatures([example]), tmp_path / folder, 64)
        return open_features(tmp_path / folder)

    first = features("one").identity
    assert first == features("other folder").identity
    assert len({first, features("picture", seed=1).identity, features("caption", text="ab").identity}) == 3


def test_written_features_are_read_back(tmp_path):
    examples = [
        Example(torch.randn(4, 6, 10), torch.randn(5, 7), (48, 80), 0.6, torch.rand(4, 6, 10), text="ünï"),
        Example(torch.randn(4, 8, 8), torch.randn(120, 7), (64, 64), 1.0, text="two"),
    ]
    write_original_features(ListFeatures(examples), tmp_path, 64)
    features = open_features(tmp_path)
    assert features.bins == [(6, 10), (8, 8)]
    for found, expected in zip((features[0], features[1]), examples, strict=True):
        assert torch.equal(found.latent, expected.latent) and torch.equal(found.caption, expected.caption)
        assert found.size_px == expected.size_px and found.text == expected.text
    assert torch.equal(features[0].deviation, examples[0].deviation) and not features[1].deviation.any()
    with np.load(next(tmp_path.rglob("000000.npz"))) as file:
        assert file["caption_feature"].shape == (1, 120, 7) and file["attention_mask"].shape == (1, 120)
        assert file["attention_mask"].sum() == 5
    with pytest.raises(ValueError, match="Caption too long: got 120 tokens for 'two', expected at most 77"):
        write_original_features(ListFeatures(examples[1:]), tmp_path / "short", 64, caption_length=77)


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="without caption_feature_wmask"):
        find_original_features(tmp_path)
    write_caption(tmp_path / "caption_feature_wmask" / "x.npz", 3)
    with pytest.raises(FileNotFoundError, match="Latents not found: .* expected one of any size"):
        open_features(tmp_path)
    for base_px in (256, 512):
        write_latent(tmp_path / f"img_vae_features_{base_px}resolution" / "noflip" / "y.npy")
    with pytest.raises(ValueError, match="Which latents are meant"):
        open_features(tmp_path)
    with pytest.raises(FileNotFoundError, match="got none of 1 listed pictures"):
        find_original_features(tmp_path, 256)


@pytest.mark.parametrize("damage", ["cut", "no array", "empty", "object"])
def test_damaged_files_are_named(tmp_path, damage):
    for number in range(2):
        write_caption(tmp_path / "caption_feature_wmask" / f"{number}.npz", 3)
        write_latent(tmp_path / "img_vae_features_64resolution" / "noflip" / f"{number}.npy")
    caption, latent = sorted(path for path in tmp_path.rglob("*1.np*"))
    if damage == "object":
        np.save(latent, np.array([{"a": 1}], dtype=object))
        np.savez(caption, caption_feature=np.array([{"a": 1}], dtype=object))
    else:
        for path in (caption, latent):
            whole = path.read_bytes()
            path.write_bytes({"cut": whole[: len(whole) // 2], "no array": b"<html>", "empty": b""}[damage])
    with pytest.raises(ValueError, match=r"Feature file cannot be read: got .* in 1\.npy"):
        open_features(tmp_path)
    write_latent(latent)
    features = open_features(tmp_path)
    with pytest.raises(ValueError, match=r"Feature file cannot be read: got .* in 1\.npz"):
        features[1]


def test_latents_and_captions_of_other_kinds_are_refused(tmp_path):
    write_caption(tmp_path / "caption_feature_wmask" / "x.npz", 3)
    latent = tmp_path / "img_vae_features_64resolution" / "noflip" / "x.npy"
    latent.parent.mkdir(parents=True)
    np.save(latent, np.zeros((16, 8, 8), np.float32))
    with pytest.raises(ValueError, match=r"^Wrong latent: got the shape \(16, 8, 8\) in x\.npy, expected"):
        open_features(tmp_path)
    write_latent(latent)
    np.savez(tmp_path / "caption_feature_wmask" / "x.npz", other=np.zeros(3))
    with pytest.raises(ValueError, match=r"got 'caption_feature' in x\.npz"):
        open_features(tmp_path)[0]


@pytest.mark.parametrize("content", ['{"path": "x"}', '[{"name": "x"}]', "[1]", "nothing"])
def test_a_list_of_another_kind_is_refused(tmp_path, content):
    write_caption(tmp_path / "caption_feature_wmask" / "x.npz", 3)
    write_latent(tmp_path / "img_vae_features_64resolution" / "noflip" / "x.npy")
    (tmp_path / "data_info.json").write_text(content)
    with pytest.raises(ValueError, match=r"Unreadable 'data_info\.json': got .*, expected a list of objects with path"):
        open_features(tmp_path)


def test_names_do_not_lead_out(tmp_path):
    root = tmp_path / "root"
    write_caption(tmp_path / "x.npz", 3)
    write_caption(root / "caption_feature_wmask" / "y.npz", 3)
    write_latent(root / "img_vae_features_64resolution" / "noflip" / "y.npy")
    write_list(root, [{"path": path, "prompt": ""} for path in ("../x.png", "y.png", "", "..", "a" * 300)])
    assert len(open_features(root)) == 1


def _whole_numbers(caption, latent):
    np.save(latent, np.ones((8, 8, 8), np.int64))


def _texts(caption, latent):
    np.savez(caption, caption_feature=np.array([["a", "b"]]))


def _empty_mask(caption, latent):
    np.savez(caption, caption_feature=np.ones((1, 5, 6), np.float32), attention_mask=np.zeros((1, 5)))


def _short_mask(caption, latent):
    np.savez(caption, caption_feature=np.ones((1, 5, 6), np.float32), attention_mask=np.ones((1, 3)))


@pytest.mark.parametrize("damage", [_whole_numbers, _texts, _empty_mask, _short_mask])
def test_arrays_of_another_kind_are_refused_by_name(tmp_path, damage):
    caption = tmp_path / "caption_feature_wmask" / "x.npz"
    latent = tmp_path / "img_vae_features_64resolution" / "noflip" / "x.npy"
    write_caption(caption, 3)
    write_latent(latent)
    damage(caption, latent)
    with pytest.raises(ValueError, match=r"(Wrong caption|cannot be read): got .*in '?x.np[yz]'?, expected"):
        open_features(tmp_path)[0]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="This system has no named pipes")
def test_a_pipe_in_place_of_features_is_refused_and_not_waited_for(tmp_path):
    latent = tmp_path / "img_vae_features_64resolution" / "noflip" / "x.npy"
    write_caption(tmp_path / "caption_feature_wmask" / "x.npz", 3)
    latent.parent.mkdir(parents=True)
    os.mkfifo(latent)
    with pytest.raises((ValueError, FileNotFoundError), match="a pipe|none of"):
        open_features(tmp_path)


def test_a_second_start_opens_none_of_the_files(tmp_path, monkeypatch):
    monkeypatch.setattr(original_features, "LISTED_FROM", 3)
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(shape, generator=generator)

    examples = [
        Example(random(4, *size), random(5, 7), (48, 80), 0.6, text=text)
        for size, text in (((6, 10), "ünï"), ((8, 8), ""), ((6, 10), "three"))
    ]
    write_original_features(ListFeatures(examples), tmp_path, 64)
    first = open_features(tmp_path)
    opened = []
    for name in ("read_shape", "open_regular"):
        plain = getattr(original_features, name)
        monkeypatch.setattr(original_features, name, lambda path, plain=plain: opened.append(path) or plain(path))
    second = open_features(tmp_path)
    assert not opened and second.identity == first.identity and list(second.bins) == first.bins and len(second) == 3
    for index, copied in enumerate(pickle.loads(pickle.dumps(second)).entries):
        assert copied == first.entries[index]
        one, other = first[index], second[index]
        assert torch.equal(one.latent, other.latent) and torch.equal(one.caption, other.caption)
        assert (one.text, one.size_px, one.aspect_ratio) == (other.text, other.size_px, other.aspect_ratio)
    latent = first.entries[1].latent
    np.save(latent, np.zeros((8, 8, 8), np.float32))
    os.utime(latent, ns=(1, 1))
    with pytest.raises(ValueError, match="Feature files have changed: got another 000001.npy"):
        second[1]
    latent.with_name("more.npy").write_bytes(latent.read_bytes())  # the folder is another one now
    assert open_features(tmp_path).identity != second.identity and opened
    listed = tmp_path / "pixart_features_64.json"
    for broken in ("{}", "[]", json.dumps({**json.loads(listed.read_text()), "index": "../x"})):
        listed.write_text(broken)
        assert len(open_features(tmp_path)) == 3
