"""ComfyUI in this process (`comfy`, `core_nodes`, `run_node`) and as servers (`host`, `start_host`)."""

import asyncio
import contextlib
import importlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from pixart_pack.tests.host import connections
from pixart_pack.tests.host.server import Host, start


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what needs a ComfyUI by the fixtures that it asks for."""
    for item in items:
        fixtures = getattr(item, "fixturenames", ())
        if "start_host" in fixtures:
            item.add_marker("server")
        if "comfy" in fixtures:
            item.add_marker("host")


@pytest.fixture(scope="session")
def comfyui() -> Path:
    """The folder of the ComfyUI to test with."""
    folder = os.environ.get("PIXART_COMFYUI")
    if not folder:
        pytest.skip("needs a ComfyUI: run `python dev.py test`, or let PIXART_COMFYUI name its folder")
    return Path(folder)


@pytest.fixture(scope="session")
def start_host(comfyui: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Host]]:
    """A function that gives a server with these command line flags; one for each set of flags in the whole session."""
    hosts: dict[tuple[str, ...], Host] = {}

    def get(*flags: str) -> Host:
        if flags not in hosts:
            hosts[flags] = host = start(comfyui, tmp_path_factory.mktemp("server"), flags)
            ends.callback(host.server.stop)
            ends.callback(host.close)
        return hosts[flags]

    with contextlib.ExitStack() as ends:
        yield get
    # Whatever the tests did (pictures, captions, trainings, a hostile file): nothing went out.
    left = {" ".join(flags): connections.outside(host.base) for flags, host in hosts.items()}
    assert not any(left.values()), f"A server connected to another machine: {left}"


@pytest.fixture
def host(start_host: Callable[..., Host]) -> Host:
    """A server without further flags."""
    return start_host()


@pytest.fixture(scope="session")
def comfy(comfyui: Path, tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """ComfyUI's package `comfy`, on the CPU, with a base directory of its own: `folder_paths.base_path`."""
    base = tmp_path_factory.mktemp("comfy")
    (base / "custom_nodes").mkdir()
    sys.path.insert(0, str(comfyui))
    options = importlib.import_module("comfy.cli_args").args
    options.cpu = True  # before model_management is imported, which asks for a GPU
    options.base_directory = str(base)  # before folder_paths is imported
    importlib.import_module("nodes")
    return importlib.import_module("comfy")


@pytest.fixture(scope="session")
def pack(comfy: ModuleType) -> list[type]:
    """This pack's node classes, got and registered as ComfyUI does it, but under the package name of the tests."""
    package = sys.modules["pixart_pack"]
    package.__spec__.loader.exec_module(package)
    extension = asyncio.run(package.comfy_entrypoint())
    asyncio.run(extension.on_load())
    classes = asyncio.run(extension.get_node_list())
    register(classes)
    return classes


def register(classes: list[type]) -> None:
    mappings = importlib.import_module("nodes").NODE_CLASS_MAPPINGS
    for node_class in classes:
        mappings[node_class.GET_SCHEMA().node_id] = node_class
        node_class.RELATIVE_PYTHON_MODULE = "custom_nodes.pixart_pack"


@pytest.fixture(scope="session")
def core_nodes(comfy: ModuleType) -> dict[str, type]:
    """ComfyUI's own node classes by their ids, those of comfy_extras included."""
    nodes = importlib.import_module("nodes")
    asyncio.run(nodes.init_builtin_extra_nodes())
    return nodes.NODE_CLASS_MAPPINGS


@pytest.fixture
def run_node(pack: list[type]) -> Callable[..., tuple]:
    """A function that runs one node in this process as the executor would: run_node(id, name=value, ...) -> outputs."""
    mappings = importlib.import_module("nodes").NODE_CLASS_MAPPINGS
    inference_mode = importlib.import_module("torch").inference_mode

    def run(node_id: str, **inputs: Any) -> tuple:
        node = mappings[node_id]()
        with inference_mode():
            output = getattr(node, node.FUNCTION)(**inputs)
            if asyncio.iscoroutine(output):
                output = asyncio.run(output)
        return tuple(getattr(output, "result", output))

    return run
