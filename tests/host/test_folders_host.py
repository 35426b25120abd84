"""The host's lists of files, as the pack reads them."""

import importlib
import json
import os
import shutil
import time
from pathlib import Path

import pytest


def test_a_folder_of_models_may_be_removed_while_the_host_runs(pack):
    folder_paths = importlib.import_module("folder_paths")
    folders = importlib.import_module("pixart_pack.nodes.host.folders")
    place = Path(folder_paths.get_folder_paths("loras")[0]) / "removed"
    place.mkdir(parents=True)
    (place / "style.safetensors").write_bytes(b"x")
    assert "removed/style.safetensors" in [name.replace("\\", "/") for name in folders.list_files(("loras",))]
    shutil.rmtree(place)
    assert not [name for name in folders.list_files(("loras",)) if "removed" in name]


def test_the_demos_models_are_offered_after_the_users_own(pack):
    folder_paths = importlib.import_module("folder_paths")
    folders = importlib.import_module("pixart_pack.nodes.host.folders")
    shipped = {path.parent.name: path for path in folders.DEMO_MODELS.glob("*/*.safetensors")}
    assert shipped.keys() == {"controlnet", "diffusion_models", "text_encoders", "vae"}
    for kind, path in shipped.items():
        found = folder_paths.get_full_path(kind, path.name)
        assert path.name in folder_paths.get_filename_list(kind) and path.samefile(found)
        assert folders.show_path(found) == f"models/{kind}/{path.name}"
        assert not path.is_relative_to(folder_paths.get_folder_paths(kind)[0])  # where the host and others write
    own = Path(folder_paths.get_folder_paths("vae")[0]) / shipped["vae"].name
    own.parent.mkdir(parents=True, exist_ok=True)
    own.write_bytes(b"the user's")
    try:
        assert own.samefile(folder_paths.get_full_path("vae", own.name))
    finally:
        own.unlink()


@pytest.fixture
def models(pack, tmp_path, monkeypatch):
    """(the pack's module, a folder of the kind "tried", the list of what was walked)."""
    folder_paths = importlib.import_module("folder_paths")
    folders = importlib.import_module("pixart_pack.nodes.host.folders")
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "tried", ([str(tmp_path)], {".safetensors"}))
    walked, walk = [], folders._walk
    monkeypatch.setattr(folders, "_walk", lambda root: walked.append(root) or walk(root))
    for number in range(30):
        add_model(tmp_path / f"owner{number}" / "model")
    age(tmp_path)
    return folders, tmp_path, walked


def add_model(folder):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"kind": "wanted"}))


def age(root):
    """As if all had been there for an hour."""
    then = time.time() - 3600
    for path in [root, *root.rglob("*")]:
        os.utime(path, (then, then))


def is_wanted(folder):
    return json.loads((folder / "config.json").read_text())["kind"] == "wanted"


def test_folders_are_walked_once_until_they_change(models):
    folders, root, walked = models
    first = folders.find_folders(("tried",), is_wanted)
    assert len(first) == 30 and first["owner3/model/"] == root / "owner3" / "model"
    assert all(folders.find_folders(("tried",), is_wanted) == first for _ in range(5))
    assert folders.find_folders(("tried",), Path.is_symlink) == {}
    assert walked == [root]


@pytest.mark.parametrize(
    ("change", "count"),
    [
        (lambda root: add_model(root / "new"), 31),
        (lambda root: add_model(root / "owner1" / "other"), 31),
        (lambda root: shutil.rmtree(root / "owner1"), 29),
        (lambda root: (root / "owner1" / "model").rename(root / "owner1" / ".hidden"), 29),
        (lambda root: (root / "owner1" / "model" / "config.json").unlink(), 29),
        (lambda root: (root / "owner1" / "model" / "config.json").write_text('{"kind": "no more"}'), 29),
        (lambda root: [shutil.rmtree(root), root.mkdir()], 0),
    ],
    ids=["new", "inner", "removed", "hidden", "emptied", "rewritten", "all"],
)
def test_folders_are_walked_again_after_a_change(models, change, count):
    folders, root, walked = models
    folders.find_folders(("tried",), is_wanted)
    change(root)
    assert len(folders.find_folders(("tried",), is_wanted)) == count
    add_model(root / "soon after")  # which the clock of the file system may not tell from the change before
    assert len(folders.find_folders(("tried",), is_wanted)) == count + 1
    assert len(walked) == 3


def test_one_list_of_all_nodes_looks_at_the_folders_once(models, monkeypatch):
    folders, root, _ = models
    looked, stamp = [], folders._stamp
    monkeypatch.setattr(folders, "_stamp", lambda path: looked.append(path) or stamp(path))
    with importlib.import_module("folder_paths").cache_helper:
        for _ in range(20):
            folders.find_folders(("tried",), is_wanted)
    assert len(looked) == len(set(looked))


def test_gguf_files_are_searched_as_often_as_the_host_searches(pack, monkeypatch):
    folder_paths = importlib.import_module("folder_paths")
    folders = importlib.import_module("pixart_pack.nodes.host.folders")
    place = Path(folder_paths.get_folder_paths("text_encoders")[0])
    place.mkdir(parents=True, exist_ok=True)
    age(place)
    folders.list_files(("text_encoders",))
    searched, search = [], folder_paths.recursive_search
    monkeypatch.setattr(folder_paths, "recursive_search", lambda *a, **k: searched.append(a) or search(*a, **k))
    folders.list_files(("text_encoders",))
    assert not searched
    (place / "late.gguf").write_bytes(b"GGUF")
    try:
        assert "late.gguf" in folders.list_files(("text_encoders",))
    finally:
        (place / "late.gguf").unlink()
