"""The log of runs: what it reads off a workflow, what it writes, and that nothing is sent unasked."""

import getpass
import json
import os
import platform
import socket
import sys
import threading
import time
from pathlib import Path

import pytest
from PIL import Image

from pixart_pack.pixart.tracking import run_log, weights_and_biases
from pixart_pack.pixart.tracking.run_log import Hashes, close_tracking, describe_workflow, track, write_run
from pixart_pack.pixart.tracking.weights_and_biases import PERMISSION, check_tracking, open_run, usual_mode
from pixart_pack.tests.host.audit_hook import leaves_the_machine

NODES = {
    "1": ("PixArtLoadCheckpoint", {"checkpoint": "PixArt-XL-2-1024-MS.pth", "weight_dtype": "default"}),
    "2": ("PixArtLoadT5", {"text_encoder": "t5-v1_1-xxl/"}),
    "3": ("VAELoader", {"vae_name": "sd-vae-ft-ema.safetensors"}),
    "4": ("PixArtLoadLoRA", {"model": ["1", 0], "lora": "style.safetensors", "strength": 0.8}),
    "5": ("PixArtTextEncode", {"clip": ["2", 0], "text": "a fox"}),
    "6": ("PixArtNegative", {"clip": ["2", 0], "mode": "text", "text": "blurry"}),
    "7": ("PrimitiveInt", {"value": 42}),
    "8": ("PixArtLoadConsistencyDecoder", {"decoder": "cd/", "vae": ["3", 0], "seed": 9}),
    "10": ("EmptyLatentImage", {"width": 64, "height": 64, "batch_size": 1}),
    "12": ("VAEDecode", {"samples": ["11", 0], "vae": ["8", 0]}),
    "13": ("PixArtRunLog", {"images": ["12", 0], "folder": "x"}),
    "14": ("LoraLoader", {"lora_name": "unused.safetensors"}),
}
KSAMPLER = {
    "model": ["4", 0], "positive": ["5", 0], "negative": ["6", 0], "latent_image": ["10", 0], "seed": ["7", 0],
    "steps": 20, "cfg": 4.5, "sampler_name": "pixart_dpm_solver", "scheduler": "pixart_uniform", "denoise": 1.0,
}  # fmt: skip
CUSTOM = {
    "11": ("SamplerCustomAdvanced", {"noise": ["20", 0], "guider": ["21", 0], "sampler": ["22", 0],
                                     "sigmas": ["23", 0], "latent_image": ["10", 0]}),
    "20": ("RandomNoise", {"noise_seed": 5}),
    "21": ("CFGGuider", {"model": ["4", 0], "positive": ["5", 0], "negative": ["6", 0], "cfg": 3.0}),
    "22": ("PixArtSASolver", {"tau": 1.0}),
    "23": ("PixArtScheduler", {"schedule": "quadratic", "steps": 8}),
}  # fmt: skip


def workflow(**more):
    nodes = {**NODES, "11": ("KSampler", KSAMPLER), **more}
    return {number: {"class_type": kind, "inputs": inputs} for number, (kind, inputs) in nodes.items()}


def picture(colour="red"):
    return Image.new("RGB", (24, 16), colour)


def test_a_workflow_tells_settings_prompts_and_files():
    assert describe_workflow(workflow(), "13") == {
        "prompt": "a fox", "negative": "blurry", "seed": 42, "steps": 20, "guidance": 4.5,
        "solver": "pixart_dpm_solver", "schedule": "pixart_uniform", "denoise": 1.0,
        "width": 64, "height": 64,
        "models": [
            {"name": "PixArt-XL-2-1024-MS.pth", "node": "PixArtLoadCheckpoint", "input": "checkpoint"},
            {"name": "t5-v1_1-xxl/", "node": "PixArtLoadT5", "input": "text_encoder"},
            {"name": "sd-vae-ft-ema.safetensors", "node": "VAELoader", "input": "vae_name"},
            {"name": "cd/", "node": "PixArtLoadConsistencyDecoder", "input": "decoder"},
        ],
        "loras": [{"name": "style.safetensors", "node": "PixArtLoadLoRA", "input": "lora", "strength": 0.8}],
    }  # fmt: skip


def test_custom_samplers_are_read_too():
    entry = describe_workflow(workflow(**CUSTOM), "13")
    expected = {"prompt": "a fox", "negative": "blurry", "seed": 5, "steps": 8, "guidance": 3.0}
    assert entry.items() >= {**expected, "solver": "PixArtSASolver", "schedule": "quadratic"}.items()


@pytest.mark.parametrize("broken", [{}, {"13": {"class_type": "PixArtRunLog", "inputs": {"images": ["99", 0]}}}])
def test_what_a_workflow_does_not_tell_is_left_out(broken):
    assert describe_workflow(broken, "13") == {"models": [], "loras": []}


def test_runs_are_lines_with_pictures_even_when_many_write_at_once(tmp_path):
    threads = [
        threading.Thread(target=write_run, args=(tmp_path / "log", {"prompt": "狐狸\n"}, [picture(), picture("blue")]))
        for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    lines = [json.loads(line) for line in (tmp_path / "log" / run_log.LOG).read_text(encoding="utf-8").split("\n")[:-1]]
    names = [name for line in lines for name in line["pictures"]]
    assert len(lines) == 6 and len(set(names)) == 12
    assert all((line["prompt"], line["width"], line["height"]) == ("狐狸\n", 24, 16) for line in lines)
    for name in names:
        with Image.open(tmp_path / "log" / name) as saved:
            assert saved.size == (24, 16) and saved.text["parameters"] == "狐狸\n\nSize: 24x16"
            assert json.loads(saved.text[run_log.OWN_KEY])["pictures"]
    assert not list((tmp_path / "log").glob("*.tmp"))


def test_a_file_is_hashed_once_until_it_changes(tmp_path):
    file, chunks = tmp_path / "model.safetensors", []
    file.write_bytes(b"abc")
    hashes = Hashes(tmp_path / "hashes.json", lambda: chunks.append(1))
    known = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # SHA-256 of abc, as published
    assert hashes.of(file) == hashes.of(file) == known and len(chunks) == 1
    assert Hashes(tmp_path / "hashes.json").of(file) == known
    folder = hashes.of(tmp_path)
    file.write_bytes(b"abcd")
    os.utime(file, ns=(1, 1))
    assert hashes.of(file) != known and hashes.of(tmp_path) != folder


def test_off_needs_nothing_and_unknown_modes_are_refused(monkeypatch, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    check_tracking("off")
    track(tmp_path, {}, "off")
    with pytest.raises(ImportError, match="wandb is missing"):
        check_tracking("offline")
    with pytest.raises(ValueError, match="Unknown mode: got 'on'"):
        check_tracking("on")


def test_online_needs_the_owner_and_an_account(monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.delenv(PERMISSION, raising=False)
    with pytest.raises(ValueError, match="may not go online here: got no permission of the machine's owner"):
        check_tracking("online")
    assert usual_mode() == "offline"
    monkeypatch.setenv(PERMISSION, "online")
    check_tracking("online")
    assert usual_mode() == "online"
    monkeypatch.delenv("WANDB_API_KEY")
    monkeypatch.setattr(weights_and_biases.netrc, "netrc", lambda: (_ for _ in ()).throw(FileNotFoundError()))
    with pytest.raises(ValueError, match="No account of Weights & Biases"):
        check_tracking("online")


@pytest.mark.slow
def test_a_run_records_nothing_of_the_machine(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("PIXART_TEST_SECRET", "secret-of-the-environment")
    looked_up, look_up = [], socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *rest: looked_up.append(host) or look_up(host, *rest))
    run = open_run(tmp_path / "log", "offline", config={"steps": 3})
    sys.stdout.write("line-of-the-console\n")
    run.log({"loss": 1.0})
    run.finish()
    deadline, written = time.monotonic() + 20, b""
    while b"loss" not in written and time.monotonic() < deadline:  # a process of wandb's own writes it
        files = [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".log"]
        written = b"".join(path.read_bytes() for path in files)
    assert b"loss" in written and b"steps" in written
    machine = (socket.gethostname(), getpass.getuser() + "@", os.getcwd(), sys.executable)
    private = ("line-of-the-console", "secret-of-the-environment", *machine, platform.platform())
    # A short name, such as a host's, may stand in it by chance.
    assert [each for each in private if len(each) > 6 and each.encode() in written] == []
    assert [host for host in looked_up if leaves_the_machine(host)] == []


@pytest.mark.slow
def test_offline_writes_the_table_and_pictures_and_sends_nothing(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "online")  # what the environment says does not count
    folder = tmp_path / "log"
    known = {"prompt": "a fox", "models": [{"name": "a.pth"}], "seconds": 2.0, "seconds_per_step": 0.1}
    for colour in ("red", "blue"):
        track(folder, write_run(folder, known, [picture(colour)]), "offline")
    close_tracking(folder)
    runs = list(Path(folder, "wandb").glob("offline-run-*"))
    assert len(runs) == 1
    files = [path.name for path in runs[0].rglob("*") if path.is_file()]
    assert sum(name.endswith(".png") for name in files) >= 2
    assert any(name.endswith(".wandb") for name in files) and any(name.endswith("table.json") for name in files)


def test_a_failed_write_leaves_no_empty_picture(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run_log, "write_atomically", full)
    with pytest.raises(OSError, match="No space left"):
        write_run(tmp_path, {}, [picture("red")])
    assert list(tmp_path.iterdir()) == []
