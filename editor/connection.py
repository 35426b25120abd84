"""A ComfyUI to ask: a running one, or one that is started for the purpose."""

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from ..demo.client import ComfyClient
from ..devtools.server import PACK, Server, prepare_base


@contextlib.contextmanager
def connect(url: str | None = None) -> Iterator[ComfyClient]:
    """A connection to the server at url, or to one with this pack and the demo model, of the host in PIXART_COMFYUI."""
    if url:
        with ComfyClient(url) as client:
            yield client
        return
    host = Path(os.environ["PIXART_COMFYUI"])
    flags = ("--cpu", "--disable-all-custom-nodes", "--whitelist-custom-nodes", PACK)
    with tempfile.TemporaryDirectory() as folder:
        with Server(Path(sys.executable), host, prepare_base(Path(folder)), flags=flags) as server:
            server.start()
            with ComfyClient(server.url) as client:
                yield client
