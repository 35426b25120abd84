"""Training on several processes, really launched: the same losses as one process with the same global batch."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pixart_pack.pixart.lora import read_lora
from pixart_pack.pixart.saving import save_checkpoint
from pixart_pack.pixart.training.cache import DatasetEncoder, EncodeSettings
from pixart_pack.pixart.training.report import read_log
from pixart_pack.pixart.training.settings import RunConfig, write_config
from pixart_pack.pixart.training.sources import read_dataset
from pixart_pack.pixart.training.state import Checkpoints
from pixart_pack.tests.tiny_pixart import make_weights, tiny_config
from pixart_pack.tests.training_data import WIDTH, tiny_settings

pytest.importorskip("accelerate")
ROOT = Path(__file__).resolve().parent.parent
STEPS = 4
# Without --cpu, which would start a single process: the environment says that there is no GPU.
ACCELERATE = "-m accelerate.commands.launch --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no"
LAUNCHERS = {
    "one": (),
    "accelerate": (*ACCELERATE.split(), "--main_process_port", "0"),
    "torchrun": ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"),
}


def encode_text(captions):
    generator = torch.Generator().manual_seed(len(captions[0]))
    return [torch.randn(len(caption.split()) + 1, WIDTH, generator=generator) for caption in captions]


def encode_image(pixels):
    means = torch.nn.functional.avg_pool2d(pixels.movedim(-1, 1), 8) * 4
    return torch.cat([means, means.sum(1, keepdim=True)], 1), None


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model and an encoded dataset on disk."""
    folder = tmp_path_factory.mktemp("processes")
    config = tiny_config()
    save_checkpoint(folder / "model.safetensors", make_weights(config), config)
    pictures = folder / "pictures"
    pictures.mkdir()
    for number in range(10):
        size = (64, 64) if number % 3 else (96, 64)
        noise = np.random.default_rng(number).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(noise).save(pictures / f"{number}.png")
        (pictures / f"{number}.txt").write_text("a word " * (number % 4 + 1))
    records = read_dataset(pictures)
    encoder = DatasetEncoder(records, folder / "features", EncodeSettings(base_px=64), "text", "image")
    encoder.encode_captions(encode_text)
    encoder.encode_pictures(encode_image)
    encoder.features()
    return folder


def launch(place, name, launcher, more=(), expect=0, **fields):
    """Run a configuration; returns (the run's folder, what was printed)."""
    usual = {"steps": STEPS, "batch_size": 4, "checkpoint_every": 2, "ema_decay": 0.9, "accumulation": 2}
    settings = tiny_settings(**{**usual, **fields})
    config = RunConfig("model.safetensors", "features", settings, output="runs", name=name)
    write_config(place / f"{name}.yaml", config)
    command = [sys.executable, *LAUNCHERS[launcher], *more, "-m", "pixart.training", "run", str(place / f"{name}.yaml")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, encoding="utf-8"
    )
    assert done.returncode == expect, done.stdout[-2000:] + done.stderr[-4000:]
    return place / "runs" / f"{name}_001", done.stdout + done.stderr


def losses(folder):
    return [entry["loss"] for entry in read_log(folder / "log.jsonl")]


def assert_like_one(folder, alone):
    # float32: the mean over four pictures, or of two means over two
    assert losses(folder) == pytest.approx(losses(alone), rel=1e-5) and len(losses(folder)) == STEPS
    given, expected = (Checkpoints(each / "checkpoints", 1).load() for each in (folder, alone))
    for part in ("parameters", "average"):
        ours, theirs = (each[part]["shadow"] if part == "average" else each[part] for each in (given, expected))
        for key in ours:
            torch.testing.assert_close(ours[key], theirs[key], rtol=1e-3, atol=1e-5)  # Adam divides by small numbers


@pytest.fixture(scope="module")
def alone(place):
    return {kind: launch(place, f"alone_{kind}", "one", kind=kind)[0] for kind in ("lora", "full")}


@pytest.mark.slow
@pytest.mark.parametrize("launcher, kind", [("accelerate", "lora"), ("torchrun", "full")])
def test_two_processes_train_as_one_does(place, alone, launcher, kind):
    more = ("--multi_gpu",) if launcher == "accelerate" else ()
    folder, text = launch(place, f"{launcher}_{kind}", launcher, more, kind=kind, batch_size=2)
    assert_like_one(folder, alone[kind])
    assert text.count("steps are done") == 1
    if kind == "lora":
        assert not read_lora(folder / f"{folder.name}.safetensors").unmatched


@pytest.mark.slow
def test_a_signal_ends_a_training_with_its_result(place):
    name = "stopped"
    usual = tiny_settings(steps=100_000, batch_size=2, checkpoint_every=0)
    write_config(place / f"{name}.yaml", RunConfig("model.safetensors", "features", usual, output="runs", name=name))
    command = [sys.executable, "-m", "pixart.training", "run", str(place / f"{name}.yaml"), "--device", "cpu"]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        folder, began = place / "runs" / f"{name}_001", time.monotonic()
        while len(read_log(folder / "log.jsonl")) < 3 and time.monotonic() - began < 200:
            time.sleep(0.2)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=200)
    assert process.returncode == 0
    steps = len(read_log(folder / "log.jsonl"))
    assert [path.name for path in (folder / "checkpoints").iterdir()] == [f"step-{steps:08d}.pt"]
    assert not read_lora(folder / f"{folder.name}.safetensors").unmatched


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_sharded_processes_train_as_one_does(place, alone, kind):
    flags = "--use_fsdp --fsdp_version 2 --fsdp_auto_wrap_policy TRANSFORMER_BASED_WRAP"
    more = (*flags.split(), "--fsdp_transformer_layer_cls_to_wrap", "PixArtBlock", "--fsdp_cpu_ram_efficient_loading")
    name, more = f"sharded_{kind}", (*more, "false")
    if kind == "lora":  # and continued from a checkpoint of the shards
        launch(place, name, "accelerate", more, kind=kind, batch_size=2, steps=2)
    folder, _ = launch(place, name, "accelerate", more, kind=kind, batch_size=2)
    assert_like_one(folder, alone[kind])
