"""Links that leave a folder are refused; those of Hugging Face's cache are followed."""

import json
import os

import pytest

from pixart_pack.pixart.files import inside
from pixart_pack.pixart.files.inside import check_folder, check_inside, is_inside, is_plain_name
from pixart_pack.pixart.weights.folders import TRANSFORMER_STEMS, find_weights, read_json

HASH = "0123456789abcdef" * 4


def cache(root, name="models--me--pixart"):
    """A model as huggingface_hub keeps it: links in a snapshot, files named after their content beside it."""
    snapshot = root / name / "snapshots" / HASH[:40]
    snapshot.mkdir(parents=True)
    (root / name / "blobs").mkdir()
    for number, file in enumerate(("config.json", "diffusion_pytorch_model.safetensors")):
        blob = HASH[:-1] + str(number)
        (root / name / "blobs" / blob).write_text("{}")
        (snapshot / file).symlink_to(f"../../blobs/{blob}")
    return snapshot


def test_a_snapshot_of_hugging_faces_cache_is_read(tmp_path):
    snapshot = cache(tmp_path)
    check_folder(snapshot)
    assert read_json(snapshot / "config.json") == {}
    assert find_weights(snapshot, TRANSFORMER_STEMS)[0] == (snapshot / "diffusion_pytorch_model.safetensors",)
    (tmp_path / "linked").symlink_to(snapshot, target_is_directory=True)
    check_folder(tmp_path / "linked")


@pytest.mark.parametrize(
    "target", ["../secret.json", "{}/secret.json", "../models--a/blobs/secret", "sub/../../secret.json"]
)
def test_a_link_that_leaves_the_folder_is_refused_by_name(tmp_path, target):
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    for secret in (tmp_path / "secret.json", tmp_path / "models--a" / "blobs" / "secret"):
        secret.parent.mkdir(parents=True, exist_ok=True)
        secret.write_text('{"password": 1}')
    link = folder / "config.json"
    link.symlink_to(target.format(tmp_path))
    for read in (lambda: check_folder(folder), lambda: check_inside(link, folder), lambda: read_json(link)):
        with pytest.raises(ValueError, match="A link leads out of its folder: got 'config.json' in 'model'") as caught:
            read()
        assert "secret" not in str(caught.value)


def test_links_within_the_folder_are_followed(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.json").write_text("{}")
    (tmp_path / "b.json").symlink_to("sub/a.json")
    (tmp_path / "again").symlink_to(tmp_path, target_is_directory=True)
    check_folder(tmp_path)
    assert is_inside(tmp_path / "again" / "b.json", tmp_path)


def test_a_shard_that_is_a_link_out_is_refused(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "other.safetensors").write_bytes(b"x")
    shard = tmp_path / "model" / "diffusion_pytorch_model-00001-of-00001.safetensors"
    shard.symlink_to(tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="A link leads out of its folder"):
        find_weights(tmp_path / "model", TRANSFORMER_STEMS)
    index = tmp_path / "model" / "diffusion_pytorch_model.safetensors.index.json"
    for start in (f"{tmp_path}/", "../", "C:", "\\\\server\\"):
        index.write_text(json.dumps({"weight_map": {"a": f"{start}other.safetensors"}}))
        with pytest.raises(ValueError, match="got the shard name"):
            find_weights(tmp_path / "model", TRANSFORMER_STEMS)


def test_a_folder_is_checked_whole(tmp_path, monkeypatch):
    (tmp_path / "sub").mkdir()
    elsewhere = tmp_path / "sub" / "out"
    elsewhere.symlink_to(tmp_path.parent, target_is_directory=True)
    with pytest.raises(ValueError, match="A link leads out of its folder: got 'out'"):
        check_folder(tmp_path)
    elsewhere.unlink()
    elsewhere.symlink_to(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match="got the link 'out' to nothing"):
        check_folder(tmp_path)
    elsewhere.unlink()
    with open(tmp_path / "tokenizer.json", "wb") as file:
        file.truncate(inside.TOKENIZER_BYTES + 1)  # without taking room on the disk
    with pytest.raises(ValueError, match="File too large: got 128.0 MB in 'tokenizer.json'"):
        check_folder(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    monkeypatch.setattr(inside, "MOST_FILES", 2)
    for number in range(3):
        (tmp_path / str(number)).touch()
    with pytest.raises(ValueError, match="Too many files"):
        check_folder(tmp_path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names on this system")
def test_a_pipe_in_a_folder_is_refused(tmp_path):
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(ValueError, match="got a pipe named 'config.json'"):
        check_folder(tmp_path)
    with pytest.raises(ValueError, match="got a pipe named 'config.json'"):
        read_json(tmp_path / "config.json")


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/etc", "a\\b", "C:a", "a\0", "x::http", None, 3, ["a"]])
def test_names_that_are_paths(name):
    assert not is_plain_name(name)


def test_plain_names():
    assert is_plain_name("data-00000-of-00001.arrow") and is_plain_name("..a")
