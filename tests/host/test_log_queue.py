"""The run log through the queue of a real server."""

import hashlib
import json

import numpy as np
import pytest
from PIL import Image

from pixart_pack.pixart.commands.server import PromptError
from pixart_pack.tests.host.graph import PictureGraph, write_lora, write_pixart, write_t5
from pixart_pack.tests.tiny_pixart import tiny_config

FILES = ("log_tiny.safetensors", "log_t5.safetensors")
LORA = "log_lora.safetensors"


@pytest.fixture
def server(host):
    if not (host.models / "loras" / LORA).exists():
        config = tiny_config(base_size=4, pe_scale=1.0)
        write_pixart(host.models / "diffusion_models" / FILES[0], config)
        write_t5(host.models / "text_encoders" / FILES[1])
        write_lora(host.models / "loras" / LORA, config, "transformer.")
    return host


def log_of(host, folder):
    text = (host.output / folder / "log.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def test_each_run_of_a_comparison_has_its_line_with_what_made_it(server):
    graph = PictureGraph(*FILES)
    graph.model = graph.add("PixArtLoadLoRA", model=graph.model, lora=LORA, strength=0.5)
    timed = graph.add("PixArtRunTimer", model=graph.model)
    axes = graph.add("PixArtCompareAxes", x_values="1, 3", x_name="steps")
    latent = graph.sample(graph.empty(64, 40, batch=2), steps=axes, seed=11, model=timed)
    image = graph.add("VAEDecode", samples=latent, vae=graph.vae)
    inputs = {"images": image, "timer": [timed[0], 1], "note": [axes[0], 2], "folder": "runs/first"}
    log = graph.add("PixArtRunLog", **inputs)
    entry = server.wait(server.queue(graph.nodes), 300)
    first, second = log_of(server, "runs/first")
    assert (first["steps"], second["steps"]) == (1, 3)
    assert (first["note"], second["note"]) == ("steps 1", "steps 3")
    assert all(each["seed"] == 11 and each["guidance"] == 3.0 and each["solver"] == "euler" for each in (first, second))
    assert first["prompt"].startswith("a red circle") and first["seconds_per_step"] > 0
    assert (first["width"], first["height"], len(first["pictures"])) == (64, 40, 2)
    sums = {each["name"]: each["sha256"] for each in (*first["models"], *first["loras"])}
    for folder, name in (("diffusion_models", FILES[0]), ("text_encoders", FILES[1]), ("loras", LORA)):
        assert sums[name] == hashlib.sha256((server.models / folder / name).read_bytes()).hexdigest()
    assert first["loras"][0]["strength"] == 0.5
    shown = entry["outputs"][log[0]]["images"]
    assert [each["filename"] for each in shown] == [*first["pictures"], *second["pictures"]]
    saved = [np.asarray(Image.open(server.output / "runs/first" / each["filename"])) for each in shown]
    assert saved[0].shape == (40, 64, 3) and not np.array_equal(saved[0], saved[2])


def test_names_stay_in_the_output_folder(server):
    graph = PictureGraph(*FILES)
    image = graph.add("EmptyImage", width=8, height=8, batch_size=1, color=0)
    graph.add("PixArtRunLog", images=image, folder="../out")
    with pytest.raises(PromptError, match="Unusable file name: got '../out'"):
        server.run(graph.nodes)


def test_offline_wandb_stays_in_the_folder_and_online_needs_the_owner(server):
    pytest.importorskip("wandb")
    graph = PictureGraph(*FILES)
    image = graph.add("EmptyImage", width=24, height=16, batch_size=2, color=0xFF0000)
    graph.add("PixArtRunLog", images=image, folder="runs/tracked", wandb="offline", prompt="a red dot")
    server.wait(server.queue(graph.nodes), 300)
    (entry,) = log_of(server, "runs/tracked")
    runs = list((server.output / "runs/tracked/wandb").glob("offline-run-*"))
    assert len(runs) == 1 and list(runs[0].glob("*.wandb"))
    kept = [np.asarray(Image.open(path).convert("RGB")) for path in runs[0].rglob("*.png")]
    saved = [np.asarray(Image.open(server.output / "runs/tracked" / name)) for name in entry["pictures"]]
    assert len(saved) == 2 and len(kept) >= 2 and all(np.array_equal(picture, saved[0]) for picture in kept)
    graph.nodes[str(len(graph.nodes))]["inputs"] |= {"wandb": "online", "folder": "runs/sent"}
    with pytest.raises(PromptError, match="may not go online here: got no permission"):
        server.run(graph.nodes)
    assert not (server.output / "runs/sent" / "wandb").exists()
