"""The command that encodes datasets outside ComfyUI, on the demo's T5 and autoencoder."""

import json
import shutil
from pathlib import Path
from random import Random

import pytest
import torch
from PIL import Image

from pixart_pack.demo.autoencoder import VAE_SCALE, average_latents
from pixart_pack.demo.scenes import caption, draw_scene, random_scene
from pixart_pack.pixart.commands import encode, train
from pixart_pack.pixart.data.examples import collate
from pixart_pack.pixart.data.features import open_features
from pixart_pack.pixart.data.pictures import FilePicture, read_picture
from pixart_pack.tests import processes

ROOT = Path(__file__).resolve().parent.parent.parent
MODELS = ROOT / "demo" / "models"
T5 = MODELS / "text_encoders" / "pixart_demo_t5.safetensors"
VAE = MODELS / "vae" / "pixart_demo_vae.safetensors"


@pytest.fixture
def scenes(tmp_path):
    """A folder of five drawn scenes with captions, of two sizes."""
    folder, rng = tmp_path / "set", Random(0)
    folder.mkdir()
    for number in range(5):
        size = (96, 160) if number == 4 else (128, 128)
        scene = random_scene(rng, 2, *size)
        Image.fromarray(draw_scene(scene, *size)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(caption(scene))
    return folder


@pytest.fixture
def arguments(scenes, tmp_path, comfyui):
    tokenizer = comfyui / "comfy" / "text_encoders" / "t5_tokenizer"
    return [
        *(str(scenes), "--output", str(tmp_path / "cache"), "--tokenizer", str(tokenizer)),
        *("--text-encoder", str(T5), "--vae", str(VAE), "--resolution", "128", "--device", "cpu", "--dtype", "fp32"),
    ]


def run(arguments):
    encode.main(encode.parse().parse_args(arguments))


def test_pictures_and_captions_of_the_demo(arguments, scenes, tmp_path):
    run([*arguments, "--batch-size", "3", "--edges", "soft", "--original-layout", str(tmp_path / "original")])
    features = open_features(tmp_path / "cache")
    assert len(features) == 5 and features.bins[0] == (16, 16) and features.bins[4] == (12, 20)
    picture = read_picture(FilePicture(scenes / "2.png"))
    expected = average_latents(picture.movedim(-1, 0)[None])[0] / VAE_SCALE
    assert (features[2].latent - expected).abs().max() < 0.01  # the encoder's sum of many averages, over 0.18
    assert features[2].deviation is None and features[2].hint.shape == (4, 16, 16)
    assert features[2].text == (scenes / "2.txt").read_text()
    batch = collate([features[index] for index in range(4)])
    assert batch.caption.shape[2] == 64 and batch.caption_mask[:, 0].all()
    assert features.null_caption.shape == (1, 64)  # the end token alone
    original = open_features(tmp_path / "original")
    assert torch.equal(original[2].latent, features[2].latent)
    assert torch.equal(original[2].caption, features[2].caption.float())


def test_files_of_the_original_layout_are_not_written_over_unasked(arguments, tmp_path):
    original = tmp_path / "original"
    original.mkdir()
    (original / "mine.npz").write_bytes(b"mine")
    with pytest.raises(FileExistsError, match="Exists already: got '.*original', expected a new folder. Use --force"):
        run([*arguments, "--original-layout", str(original)])
    assert not (tmp_path / "cache").exists()
    run([*arguments, "--original-layout", str(original), "--force"])
    assert len(open_features(original)) == 5 and (original / "mine.npz").read_bytes() == b"mine"


def test_prior_pictures_and_bad_input(arguments, scenes, tmp_path):
    run([*arguments, "--prior", str(scenes), "--prior-caption", "a shape"])
    features = open_features(tmp_path / "cache")
    assert [features[index].is_prior for index in range(10)] == [False] * 5 + [True] * 5
    run([*arguments, "--caption-length", "3", "--name", "short.json"])
    notes = open_features(tmp_path / "cache" / "short.json").notes
    assert notes[0] == "cut at 3 tokens, without their ends: 5 of 5 captions" and len(notes) == 6
    with pytest.raises(ValueError, match="Batch size out of range: got 0"):
        run([*arguments, "--batch-size", "0"])
    with pytest.raises(FileNotFoundError, match="Model not found"):
        run([*arguments, "--vae", str(tmp_path / "none.safetensors")])
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(FileNotFoundError, match="Model not found"):  # before any picture is looked at
        run([str(empty), *arguments[1:], "--text-encoder", str(tmp_path / "none.safetensors")])
    with pytest.raises(ValueError, match="got 0 bytes|Wrong text encoder"):
        run([*arguments, "--text-encoder", str(VAE)])


def test_shares_make_one_dataset_and_its_stream(arguments, scenes, tmp_path):
    prior = ["--prior", str(scenes), "--prior-caption", "a shape"]
    run([*arguments, *prior, "--name", "whole.json"])
    run([*arguments, *prior, "--share", "2/2"])
    assert not (tmp_path / "cache" / "features.json").exists()
    run([*arguments, *prior, "--share", "1/2", "--stream", str(tmp_path / "stream")])
    whole, shared = (open_features(tmp_path / "cache" / name) for name in ("whole.json", "features.json"))
    assert shared.identity == whole.identity and shared.is_prior.tolist() == [False] * 5 + [True] * 5
    stream = open_features(tmp_path / "stream")
    latents = [sorted(float(each[index].latent.sum()) for index in range(10)) for each in (stream, shared)]
    assert latents[0] == latents[1]
    with pytest.raises(SystemExit):
        run([*arguments, "--share", "3/2"])


def test_captions_of_another_tokenizer_are_encoded_again(arguments, tmp_path, comfyui):
    run(arguments)
    shards = set((tmp_path / "cache").glob("*.safetensors"))
    copy = tmp_path / "tokenizer"
    shutil.copytree(comfyui / "comfy" / "text_encoders" / "t5_tokenizer", copy)
    run([*arguments, "--tokenizer", str(copy)])
    assert set((tmp_path / "cache").glob("*.safetensors")) == shards
    vocabulary = json.loads((copy / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary["model"]["vocab"][1000][1] -= 1.0
    (copy / "tokenizer.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    run([*arguments, "--tokenizer", str(copy)])
    assert len(set((tmp_path / "cache").glob("*.safetensors")) - shards) == 1  # captions, no pictures


def test_prompts_are_sampled_while_it_trains(arguments, tmp_path, comfyui):
    run(arguments)
    settings = {"steps": 2, "sample_every": 2, "sample_steps": 1, "rank": 2, "tensorboard": False}
    values = {"model": str(MODELS / "diffusion_models" / "pixart_demo.safetensors"), "features": "cache"}
    config = tmp_path / "c.json"
    config.write_text(
        json.dumps({**values, "output": ".", "settings": settings, "prompts": ["a red circle", "a blue square"]})
    )
    given = [str(config), "--device", "cpu", "--vae", str(VAE)]
    with pytest.raises(ValueError, match="No text encoder for the validation prompts"):
        train.main(train.parse().parse_args(given))
    (tmp_path / "p.txt").write_text("a large red circle\n\na small green cross\na blue star\n", encoding="utf-8")
    given += ["--text-encoder", str(T5), "--tokenizer", arguments[arguments.index("--tokenizer") + 1]]
    train.main(train.parse().parse_args([*given, "--prompts", str(tmp_path / "p.txt")]))
    folder = tmp_path / "pixart_training_001"
    rows = [Image.open(path).size for path in sorted((folder / "samples").glob("*.png"))]
    assert rows == [(3 * 128, 128)] * 2
    strip = Image.open(folder / "samples.png")
    assert strip.size == (3 * 128, 3 * 16 + 2 * (128 + 16))


def test_two_processes_share_the_work(arguments, tmp_path):
    """As torchrun and accelerate launch start them."""
    process = processes.Forked("pixart", "encode", *arguments, each=processes.ranks())
    _, errors = processes.finish(process)
    assert process.returncode == 0, errors
    assert len(open_features(tmp_path / "cache")) == 5
    assert "5 pictures are encoded" in errors
