"""The host's lists of files, as the pack reads them."""

import importlib
import shutil
from pathlib import Path


def test_a_folder_of_models_may_be_removed_while_the_host_runs(pack):
    folder_paths = importlib.import_module("folder_paths")
    folders = importlib.import_module("pixart_pack.nodes.host.folders")
    place = Path(folder_paths.get_folder_paths("loras")[0]) / "removed"
    place.mkdir(parents=True)
    (place / "style.safetensors").write_bytes(b"x")
    assert "removed/style.safetensors" in [name.replace("\\", "/") for name in folders.list_files(("loras",))]
    shutil.rmtree(place)
    assert not [name for name in folders.list_files(("loras",)) if "removed" in name]
