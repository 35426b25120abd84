"""Talk to a ComfyUI server: queue a workflow, follow it over the websocket, fetch its pictures."""

import io
import json
import struct
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable

import websocket
from PIL import Image

# What a binary websocket message starts with (big-endian unsigned 32 bit).
_PREVIEW, _PREVIEW_WITH_METADATA = 1, 4


class PromptError(RuntimeError):
    """The server refused a workflow, or a node in it failed; `details` is the server's own report."""

    def __init__(self, message: str, details: dict):
        super().__init__(message)
        self.details = details


class Interrupted(PromptError):
    """The run was interrupted."""


class ComfyClient:
    """A connection to a ComfyUI server. Close it, or use it as a context."""

    def __init__(self, url: str, timeout_s: float = 60):
        """url: such as http://127.0.0.1:8188. timeout_s: for each request; runs have a limit of their own."""
        self.url = url.rstrip("/")
        self.timeout_s = timeout_s
        self.client_id = uuid.uuid4().hex
        address = f"{self.url.replace('http', 'ws', 1)}/ws?clientId={self.client_id}"
        self._socket = websocket.create_connection(address, timeout=timeout_s)

    def __enter__(self) -> "ComfyClient":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        self._socket.close()

    def get(self, path: str, **query: str) -> bytes:
        """GET a path, such as `/view` with filename=... Raises urllib.error.HTTPError."""
        address = f"{self.url}{path}" + (f"?{urllib.parse.urlencode(query)}" if query else "")
        with urllib.request.urlopen(address, timeout=self.timeout_s) as answer:
            return answer.read()

    def get_json(self, path: str, **query: str) -> dict:
        return json.loads(self.get(path, **query))

    def post(self, path: str, content: dict | None = None) -> dict:
        """POST JSON; returns the answer, {} when it is empty. Raises urllib.error.HTTPError."""
        return self.post_bytes(path, json.dumps(content or {}).encode(), "application/json")

    def post_bytes(self, path: str, body: bytes, content_type: str) -> dict:
        request = urllib.request.Request(f"{self.url}{path}", body, {"Content-Type": content_type})
        with urllib.request.urlopen(request, timeout=self.timeout_s) as answer:
            return json.loads(answer.read() or b"{}")

    def upload(self, image: Image.Image, name: str) -> str:
        """Put a picture into the server's input folder, over one of that name. Returns its name for LoadImage."""
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        boundary = uuid.uuid4().hex
        fields = (("overwrite", "", b"true"), ("image", f'; filename="{name}"', buffer.getvalue()))
        body = b"".join(
            f'--{boundary}\r\nContent-Disposition: form-data; name="{field}"{more}\r\n\r\n'.encode() + content + b"\r\n"
            for field, more, content in fields
        )
        body += f"--{boundary}--\r\n".encode()
        return self.post_bytes("/upload/image", body, f"multipart/form-data; boundary={boundary}")["name"]

    def queue(self, workflow: dict) -> str:
        """Queue a workflow in API format and return the run's id. Raises PromptError with the reasons of a refusal."""
        try:
            return self.post("/prompt", {"prompt": workflow, "client_id": self.client_id})["prompt_id"]
        except urllib.error.HTTPError as error:
            if error.code != 400:
                raise
            answer = json.loads(error.read())
            raise PromptError(_refusal(answer), answer) from error

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
        entry = self.get_json(f"/history/{prompt_id}")[prompt_id]
        for kind, data in entry["status"]["messages"]:
            if kind == "execution_error":
                node, reason = data["node_type"], data["exception_message"].strip()
                raise PromptError(f"{node} failed: {data['exception_type']}: {reason}", data)
            if kind == "execution_interrupted":
                raise Interrupted(f"Interrupted in {data['node_type']}", data)
        return entry

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

    def images(self, entry: dict) -> list[bytes]:
        """The picture files of a history entry, in the order of its nodes, as they lie on the server's disk."""
        # The server reports them as they were run; by number is the order in which the workflow has them.
        outputs = sorted(entry["outputs"].items(), key=lambda output: (len(output[0]), output[0]))
        files = [file for _, output in outputs for file in output.get("images", ())]
        return [self.get("/view", **{name: file[name] for name in ("filename", "subfolder", "type")}) for file in files]

    def run(self, workflow: dict, timeout_s: float = 600) -> list[Image.Image]:
        """Queue a workflow, wait for it, and return its pictures. Raises as `queue` and `wait` do."""
        entry = self.wait(self.queue(workflow), timeout_s)
        return [Image.open(io.BytesIO(content)) for content in self.images(entry)]

    def interrupt(self) -> None:
        self.post("/interrupt")


def _refusal(answer: dict) -> str:
    """The reasons of a refused workflow in one line."""
    reasons = [
        f"{node['class_type']}: {error['message']} ({error['details']})"
        for node in answer.get("node_errors", {}).values()
        for error in node["errors"]
    ]
    error = answer["error"]
    general = error if isinstance(error, str) else f"{error['message']} {error.get('details', '')}".strip()
    return "; ".join(reasons) or general


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
