"""Two users of one server: each has trainings, encoded pictures, logs and cached prompts of his own."""

import json
import os
import urllib.request

import pytest

from pixart_pack.tests.host.test_training_queue import TrainingGraph, write_pictures

NAME = "two_users"


@pytest.fixture
def shared(start_host):
    """A server that knows users."""
    return start_host("--multi-user")


def send(host, path, content, user=None):
    headers = {"Content-Type": "application/json", **({"comfy-user": user} if user else {})}
    request = urllib.request.Request(f"{host.url}{path}", json.dumps(content).encode(), headers)
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.loads(answer.read())


def queue(host, user, nodes, **more):
    """Run a prompt of a user; returns what the editor shows of each node."""
    body = {"prompt": nodes, "client_id": host.client_id, **more}
    entry = host.wait(send(host, "/prompt", body, user)["prompt_id"], 200)
    return {number: output for number, output in entry["outputs"].items() if "text" in output or "images" in output}


def test_each_user_has_a_training_a_log_and_cached_prompts_of_his_own(shared):
    write_pictures(shared.models.parent / "input" / NAME)
    anna, ben = (send(shared, "/users", {"username": name}) for name in ("anna", "ben"))
    graph = TrainingGraph(shared.models.parent / "input" / NAME)
    trained = graph.train(steps=2)
    image = graph.add("LoadImage", image=f"{NAME}/0.png")
    log = graph.add("PixArtRunLog", images=image, folder="log")
    graph.add("PreviewAny", source=[trained[0], 1])
    graph.sample(trained)
    text = next(node["inputs"] for node in graph.nodes.values() if node["class_type"] == "PixArtTextEncode")
    shown = {}
    for user, pretended in ((anna, ben), (ben, anna)):
        text["text"] = f"a picture for {user}"  # else the host keeps what the same prompt came to
        shown[user] = queue(shared, user, graph.nodes, extra_data={"pixart_user": pretended})
    for user in (anna, ben):
        own = shared.output / "pixart_users" / user
        assert {path.name for path in own.iterdir()} == {"pixart_training", "pixart_cache", "log"}
        assert (own / "pixart_training" / f"{NAME}_001" / "result.json").exists()
        if os.name != "nt":  # Windows has no such modes
            assert {path.stat().st_mode & 0o777 for path in own.iterdir()} == {0o700}
        assert (shared.output / "loras" / "pixart_users" / user / f"{NAME}_001.safetensors").exists()
        assert len((own / "log" / "log.jsonl").read_text(encoding="utf-8").splitlines()) == 1
        assert shown[user][log[0]]["images"][0]["subfolder"] == f"pixart_users/{user}/log"
        assert list((shared.base / "user" / user / "pixart_prompts").iterdir())
    assert not (shared.base / "user" / "pixart_prompts").exists()
    loaders = shared.object_info("LoraLoaderModelOnly")["input"]["required"]["lora_name"]
    assert f"pixart_users/{anna}/{NAME}_001.safetensors" in str(loaders).replace("\\", "/")
    opened = TrainingGraph(shared.models.parent / "input" / NAME)
    features = opened.add("PixArtLoadFeatures", path=f"pixart_cache/{NAME}")
    opened.add("PreviewAny", source=[features[0], 1])
    assert "3 encoded pictures" in queue(shared, ben, opened.nodes)[features[0]]["text"][0]
