"""A running ComfyUI over HTTP: queue a workflow, wait for its end, fetch its pictures."""

import io
import json
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid

from PIL import Image

from ..files.documents import parse_json
from ..quoting import plain

POLL_S = 0.5


class PromptError(RuntimeError):
    """The server refused a workflow, or a node in it failed; `details` is the server's own report."""

    def __init__(self, message: str, details: dict):
        super().__init__(message)
        self.details = details


class Interrupted(PromptError):
    """The run was interrupted."""


class ComfyServer:
    """A ComfyUI server."""

    def __init__(self, url: str, timeout_s: float = 60):
        """url: such as http://127.0.0.1:8188. timeout_s: for each request; runs have a limit of their own."""
        self.url = url.rstrip("/")
        self.timeout_s = timeout_s
        self.client_id = uuid.uuid4().hex

    def get(self, path: str, **query: str) -> bytes:
        """GET a path, such as `/view` with filename=... Raises urllib.error.HTTPError."""
        address = f"{self.url}{path}" + (f"?{urllib.parse.urlencode(query)}" if query else "")
        with urllib.request.urlopen(address, timeout=self.timeout_s) as answer:
            return answer.read()

    def get_json(self, path: str, **query: str) -> dict:
        return parse_json(self.get(path, **query))

    def post(self, path: str, content: dict | None = None) -> dict:
        """POST JSON; returns the answer, {} when it is empty. Raises urllib.error.HTTPError."""
        return self.post_bytes(path, json.dumps(content or {}).encode(), "application/json")

    def post_bytes(self, path: str, body: bytes, content_type: str) -> dict:
        request = urllib.request.Request(f"{self.url}{path}", body, {"Content-Type": content_type})
        with urllib.request.urlopen(request, timeout=self.timeout_s) as answer:
            return parse_json(answer.read() or b"{}")

    def upload(self, image: Image.Image, name: str) -> str:
        """Put a picture into the server's input folder, over one of that name, which may have a folder before it.

        Returns its name there, without the folder.
        """
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        boundary = uuid.uuid4().hex
        folder, _, file = name.rpartition("/")
        fields = (
            ("overwrite", "", b"true"),
            ("subfolder", "", folder.encode()),
            ("image", f'; filename="{file}"', buffer.getvalue()),
        )
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
            answer = parse_json(error.read())
            raise PromptError(_refusal(answer), answer) from error

    def wait(self, prompt_id: str, timeout_s: float = 600) -> dict:
        """Wait for a run's end and return its history entry.

        Raises PromptError when a node failed, Interrupted, TimeoutError, urllib.error.URLError when the server is gone.
        """
        deadline = time.monotonic() + timeout_s
        while prompt_id not in self.get_json(f"/history/{prompt_id}"):
            if time.monotonic() > deadline:
                raise TimeoutError("The run did not end in time")
            time.sleep(POLL_S)
        return self.result(prompt_id)

    def result(self, prompt_id: str) -> dict:
        """The history entry of a run that has ended. Raises PromptError when a node failed, Interrupted."""
        entry = self.get_json(f"/history/{prompt_id}")[prompt_id]
        for kind, data in entry["status"]["messages"]:
            if kind == "execution_error":
                node, reason = data["node_type"], data["exception_message"].strip()
                words = plain(reason, 1000)
                raise PromptError(f"{node} failed: {data['exception_type']}: {words}", data)
            if kind == "execution_interrupted":
                raise Interrupted(f"Interrupted in {data['node_type']}", data)
        return entry

    def images(self, entry: dict) -> list[bytes]:
        """The saved pictures of a history entry, in the order of its nodes; where nothing was saved, its previews."""
        # The server reports them as they were run; by number is the order in which the workflow has them.
        outputs = sorted(entry["outputs"].items(), key=lambda output: (len(output[0]), output[0]))
        files = [file for _, output in outputs for file in output.get("images", ())]
        files = [file for file in files if file["type"] == "output"] or files
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
    return plain("; ".join(reasons) or general, 1000)
