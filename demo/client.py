"""Follow a ComfyUI server over its websocket: progress and previews while a workflow runs."""

import io
import json
import struct
import time
from collections.abc import Callable

import websocket
from PIL import Image

from ..pixart.commands.server import ComfyServer, Interrupted, PromptError

__all__ = ["ComfyClient", "Interrupted", "PromptError"]

# What a binary websocket message starts with (big-endian unsigned 32 bit).
_PREVIEW, _PREVIEW_WITH_METADATA = 1, 4


class ComfyClient(ComfyServer):
    """A connection to a ComfyUI server. Close it, or use it as a context."""

    def __init__(self, url: str, timeout_s: float = 60):
        super().__init__(url, timeout_s)
        address = f"{self.url.replace('http', 'ws', 1)}/ws?clientId={self.client_id}"
        self._socket = websocket.create_connection(address, timeout=timeout_s)

    def __enter__(self) -> "ComfyClient":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        self._socket.close()

    def wait(self, prompt_id: str, timeout_s: float = 600, on_event: Callable[[str, dict], None] | None = None) -> dict:
        """Wait for a run's end and return its history entry.

        on_event: called with every message's type and data; a preview is ("preview", {"image": PIL image}).
        Raises PromptError when a node failed, Interrupted, TimeoutError, ConnectionError when the server is gone.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            kind, data = self._receive(deadline)
            if on_event is not None and data.get("prompt_id", prompt_id) == prompt_id:
                on_event(kind, data)
            if kind == "executing" and data["node"] is None and data.get("prompt_id") == prompt_id:
                break
        return self.result(prompt_id)

    def _receive(self, deadline: float) -> tuple[str, dict]:
        while True:
            self._socket.settimeout(max(deadline - time.monotonic(), 0.01))
            try:
                message = self._socket.recv()
            except websocket.WebSocketTimeoutException as error:
                raise TimeoutError("The run did not end in time") from error
            except (websocket.WebSocketException, OSError) as error:
                raise ConnectionError(f"The server at {self.url} closed the connection") from error
            if isinstance(message, str) and message:
                content = json.loads(message)
                return content["type"], content["data"] or {}
            if isinstance(message, bytes) and (image := _preview(message)):
                return "preview", {"image": image}
            if not message:
                raise ConnectionError(f"The server at {self.url} closed the connection")


def _preview(message: bytes) -> Image.Image | None:
    """The picture of a binary message; None for the other kinds."""
    (kind,) = struct.unpack(">I", message[:4])
    if kind == _PREVIEW:
        start = 8  # after the picture's format
    elif kind == _PREVIEW_WITH_METADATA:
        start = 8 + struct.unpack(">I", message[4:8])[0]
    else:
        return None
    return Image.open(io.BytesIO(message[start:]))
