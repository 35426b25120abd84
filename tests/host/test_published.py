"""What ComfyUI's registry publishes: the files that .comfyignore leaves, and a pack that works without the others."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
NEEDED = ("nodes", "pixart", "samplers", "web", "workflows", "subgraphs", "locales", "styles", "demo/models")
LEFT_OUT = ("tests", "benchmarks", "editor", "devtools")
LARGEST_MB = 20  # 17.4 when last measured, most of it the demo's models and the font
PACK = "import sys; from comfy_cli.file_utils import zip_files; zip_files(sys.argv[1])"
LIST_NODES = """
import asyncio, importlib, sys
options = importlib.import_module("comfy.cli_args").args
options.cpu, options.base_directory = True, sys.argv[1]
importlib.import_module("nodes")  # ComfyUI's
async def ids():
    extension = await importlib.import_module("published").comfy_entrypoint()
    await extension.on_load()
    return [node.GET_SCHEMA().node_id for node in await extension.get_node_list()]
sys.stdout.write(" ".join(asyncio.run(ids())))
"""


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Path:
    """The folder `published`, unpacked from the archive that comfy-cli makes of this clone."""
    pytest.importorskip("comfy_cli", reason="needs comfy-cli: pip install comfy-cli")
    if not (ROOT / ".git").exists():
        pytest.skip("needs a clone: comfy-cli packs the files that git knows")
    folder = tmp_path_factory.mktemp("registry")
    archive = folder / "node.zip"
    command = [sys.executable, "-c", PACK, str(archive)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0 and "Zipping all files" not in done.stdout, done.stdout + done.stderr
    assert archive.stat().st_size < LARGEST_MB * 1e6
    with zipfile.ZipFile(archive) as zipped:
        zipped.extractall(folder / "published")
    return folder / "published"


def tracked(*folders: str) -> set[str]:
    listed = subprocess.run(["git", "ls-files", "-z", "--", *folders], cwd=ROOT, capture_output=True, check=True)
    return {name for name in listed.stdout.decode().split("\0") if name and (ROOT / name).exists()}


def test_all_that_runs_and_nothing_that_only_the_repository_needs(published):
    files = {path.relative_to(published).as_posix() for path in published.rglob("*") if path.is_file()}
    assert tracked(*NEEDED) <= files
    assert {"__init__.py", "pyproject.toml", "requirements.txt", "LICENSE", "README.md", "docs/demo.png"} <= files
    assert [name for name in files if name.startswith("docs/")] == ["docs/demo.png"]  # the README's picture
    assert not {name for name in files if name.startswith((".", *(f"{folder}/" for folder in LEFT_OUT)))}


@pytest.mark.slow
def test_the_published_pack_lists_every_node(published, pack, comfyui):
    path = os.pathsep.join([str(comfyui), str(published.parent)])
    done = subprocess.run(
        [sys.executable, "-c", LIST_NODES, str(published.parent)],
        cwd=published.parent,
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [node.GET_SCHEMA().node_id for node in pack]
