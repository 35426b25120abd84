"""A ComfyUI server for tests, with this pack in it, over HTTP."""

import sys
from pathlib import Path

import pixart_pack.demo.client as client
from pixart_pack.devtools.server import PACK, Server, prepare_base
from pixart_pack.tests.host import connections

PREVIEWS = ("--preview-method", "latent2rgb")


class Host(client.ComfyClient):
    """A running server and a connection to it: `queue`, `wait`, `run`, `interrupt` as ComfyClient has them, and more.

    models: the folder of its models. Files may be added at any time: models / "loras" / "some.safetensors".
    """

    def __init__(self, server: Server, base: Path):
        super().__init__(server.url)
        self.server = server
        self.base = base
        self.models = base / "models"
        self.output = server.output

    def object_info(self, node_id: str | None = None) -> dict:
        """What the server says of a node, or of all nodes by their ids."""
        if node_id is None:
            return self.get_json("/object_info")
        return self.get_json(f"/object_info/{node_id}")[node_id]

    def events(self, workflow: dict, timeout_s: float = 600) -> list[tuple[str, dict]]:
        """Run a workflow and return all its messages, previews as ("preview", {"image": PIL image})."""
        messages = []
        self.wait(self.queue(workflow), timeout_s, lambda *message: messages.append(message))
        return messages

    def unload(self) -> None:
        """Let the server forget its models and cached results before its next prompt."""
        self.post("/free", {"unload_models": True, "free_memory": True})

    def log(self) -> str:
        return self.server.log.read_text(encoding="utf-8", errors="replace")


def start(comfyui: Path, base: Path, flags: tuple[str, ...]) -> Host:
    """Start a server on the CPU with an empty base directory."""
    prepare_base(base)
    for folder in ("checkpoints", "diffusers", "diffusion_models", "text_encoders", "vae", "loras", "controlnet"):
        (base / "models" / folder).mkdir(parents=True, exist_ok=True)
    only_ours = ("--disable-all-custom-nodes", "--whitelist-custom-nodes", PACK, connections.install(base))
    server = Server(Path(sys.executable), comfyui, base, flags=("--cpu", *PREVIEWS, *only_ours, *flags))
    try:
        server.start()
        return Host(server, base)
    except BaseException:
        server.stop()
        raise
