"""Programs that talk to the server: they get results as pictures, and nobody gets another's messages."""

import io
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import websocket
from PIL import Image

from pixart_pack.tests.host import npm_clients
from pixart_pack.tests.host.graph import VAE, Graph

T5 = "pixart_demo_t5.safetensors"
SIZE = (128, 128)


def graph(caption: str) -> dict:
    """Nodes that say and show something on the way, and one result."""
    made = Graph()
    text = made.add("PixArtTextEncode", clip=made.add("PixArtLoadT5", text_encoder=T5), text=caption)
    made.add("PreviewAny", source=text)
    levels = made.add("PixArtScheduler", schedule="uniform", steps=4)
    made.add("PreviewAny", source=levels)
    size = made.add("PixArtResolution", base="256", mode="nearest to size", width=SIZE[0], height=SIZE[1])
    latent = made.add("EmptyLatentImage", width=SIZE[0], height=SIZE[1], batch_size=1)
    made.add("PreviewAny", source=size)
    pixels = made.add("VAEDecode", samples=latent, vae=made.add("VAELoader", vae_name=VAE))
    made.add("SaveImage", images=pixels, filename_prefix=f"client_{time.time_ns()}")
    for node in made.nodes.values():
        node["_meta"] = {"title": node["class_type"]}
    return made.nodes


def listen(host, client: str, features: dict | None = None):
    socket = websocket.create_connection(f"{host.url.replace('http', 'ws', 1)}/ws?clientId={client}", timeout=2)
    if features:
        socket.send(json.dumps({"type": "feature_flags", "data": features}))
    return socket


def heard(socket) -> list:
    """All messages until none has come for two seconds."""
    messages = []
    while True:
        try:
            messages.append(socket.recv())
        except websocket.WebSocketTimeoutException:
            return messages


def test_messages_reach_their_client_alone(host):
    sockets = [listen(host, "editor", {"supports_preview_metadata": True}), listen(host, "tab"), listen(host, "script")]
    host.post("/prompt", {"prompt": graph(f"one {time.time_ns()}"), "client_id": "editor"})
    own, others, script = map(heard, sockets)
    assert [message for message in own if isinstance(message, bytes) and b" tokens" in message]
    host.post("/prompt", {"prompt": graph(f"two {time.time_ns()}"), "client_id": "script"})
    script += heard(sockets[2])
    assert any('"execution_success"' in message for message in script if isinstance(message, str))
    assert any("tokens" in message for message in script if isinstance(message, str))  # in the output of the node
    host.post("/prompt", {"prompt": graph(f"three {time.time_ns()}")})  # without a client
    for socket, messages in zip(sockets, ([], others, script), strict=True):
        assert not [message for message in (*messages, *heard(socket)) if isinstance(message, bytes)]
        socket.close()


def test_only_results_are_among_the_images(host):
    nodes = graph(f"results {time.time_ns()}")
    outputs = host.wait(host.queue(nodes))["outputs"]
    named = {nodes[number]["class_type"]: output for number, output in outputs.items()}
    assert [kind for kind, output in named.items() if "images" in output] == ["SaveImage"]
    for kind in ("PixArtResolution", "PixArtScheduler"):
        if kind in named:  # an older ComfyUI has no outputs of nodes on the way
            [picture] = named[kind]["pixart_pictures"]
            assert picture["type"] == "temp" and picture["filename"].endswith(".png")


@pytest.mark.slow
def test_comfy_api_simplified(host):
    simplified = pytest.importorskip("comfy_api_simplified", reason="needs comfy-api-simplified")
    nodes = graph(f"simplified {time.time_ns()}")
    found = simplified.ComfyApiWrapper(host.url).queue_and_wait_images(nodes, "SaveImage")
    assert [Image.open(io.BytesIO(content)).size for content in found.values()] == [SIZE]


@pytest.mark.slow
def test_comfy_cli(host, tmp_path):
    pytest.importorskip("comfy_cli", reason="needs comfy-cli: pip install comfy-cli")
    file = tmp_path / "graph.json"
    file.write_text(json.dumps(graph(f"cli {time.time_ns()}")))
    address, port = host.url.removeprefix("http://").split(":")
    command = [sys.executable, "-m", "comfy_cli", "--skip-prompt", "--no-enable-telemetry", "run"]
    command += ["--workflow", str(file), "--wait", "--host", address, "--port", port, "--timeout", "120"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "client_" in done.stdout


SCRIPT = """
from comfy_script.runtime import *
load({url!r})  # and it watches, else it waits for ever
from comfy_script.runtime.nodes import *
with Workflow(wait=True):
    PreviewAny(PixArtTextEncode(PixArtLoadT5({t5!r}), {prefix!r}))
    width, height, latent, ratio = PixArtResolution("256", "nearest to size", width={width}, height={height})
    PreviewAny(width)
    result = SaveImage(VAEDecode(latent, VAELoader({vae!r})), {prefix!r})
print("SIZES", [image.size for image in result.wait()])
"""


@pytest.mark.slow
def test_comfy_script(host, tmp_path):
    """In a process of its own, since it changes how this one's event loop works."""
    pytest.importorskip("nest_asyncio2", reason="needs comfy-script and nest-asyncio2")
    width, height = SIZE
    named = {"prefix": f"client_{time.time_ns()}", "t5": T5, "vae": VAE, "width": width, "height": height}
    file = tmp_path / "script.py"  # it reads its own source
    file.write_text(SCRIPT.format(url=host.url, **named), encoding="utf-8")
    command = [sys.executable, file.name]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "SIZES [(256, 256)]" in done.stdout, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("program", [npm_clients.BY_CLIENT, npm_clients.BY_SDK], ids=["stable-canvas", "saintno"])
def test_clients_of_the_npm_registry(host, request, program):
    folder = npm_clients.fetched(request.config.cache.mkdir("npm"))
    # Where nodes come from the server's cache, the SDK can wait for ever, with ComfyUI's own nodes alone too.
    host.post("/free", {"free_memory": True})
    nodes = graph(f"npm {time.time_ns()}")
    [prefix] = (node["inputs"]["filename_prefix"] for node in nodes.values() if node["class_type"] == "SaveImage")
    [found] = npm_clients.run(folder, program, host.url, nodes)
    assert prefix in found


def test_the_pages_table_names_each_client_that_is_run():
    here = Path(__file__)
    page = (here.parents[2] / "docs" / "from-other-tools.md").read_text(encoding="utf-8")
    section = page.partition("## Programs that talk to ComfyUI's server")[2]
    rows = section[section.index("\n|") :].strip().partition("\n\n")[0].splitlines()  # of its first table
    clients = [row.split("|")[1].strip().strip("`") for row in rows][2:]
    programs = [client.split(",")[0].replace("-", "_") for client in clients[2:]]  # the first two are ours to imitate
    run = here.read_text(encoding="utf-8") + (here.parent / "npm_clients.py").read_text(encoding="utf-8")
    assert len(programs) == 5 and all(program in run.replace("-", "_") for program in programs)
