"""`train` and `convert` on a DiT and on models that grow: the file says so, and a continued run is the same run."""

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from pixart_pack.pixart.commands import convert, train
from pixart_pack.pixart.commands.console import run_command
from pixart_pack.pixart.data.cache import DatasetEncoder, EncodeSettings
from pixart_pack.pixart.data.pictures import TensorPicture
from pixart_pack.pixart.data.records import Record
from pixart_pack.pixart.lora import read_lora
from pixart_pack.pixart.stages.records import read_stages
from pixart_pack.pixart.training.settings import read_config
from pixart_pack.pixart.training.watching import rates
from pixart_pack.pixart.weights.reading import read_checkpoint
from pixart_pack.pixart.weights.saving import save_checkpoint
from pixart_pack.tests.stages.tiny_dit import make_dit
from pixart_pack.tests.tiny_pixart import make_weights, tiny_config

CONFIG = tiny_config("alpha-512")
SETTINGS = "settings: {kind: full, steps: 2, tensorboard: false, learning_rate: 0.001}\n"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A DiT, a PixArt, and encoded pictures of 64 px."""
    folder = tmp_path_factory.mktemp("stages")
    torch.save(make_dit().state_dict(), folder / "DiT.pt")
    save_checkpoint(folder / "pixart.safetensors", make_weights(CONFIG), CONFIG)
    records = [Record(f"{number}", TensorPicture(torch.rand(64, 64, 3)), f"picture {number}") for number in range(3)]
    encoder = DatasetEncoder(records, folder / "features", EncodeSettings(64), "t5", "vae")
    encoder.encode_captions(lambda texts: [torch.randn(len(text) + 1, CONFIG.caption_channels) for text in texts])
    encoder.encode_pictures(lambda pixels: (torch.randn(len(pixels), 4, 8, 8), None))
    encoder.features()
    return folder


def run(command, *arguments):
    return run_command(command.main, command.parse(), [str(each) for each in arguments])


def header(path):
    with safe_open(path, framework="pt") as file:
        return file.metadata()


def test_a_training_starts_from_a_dit(place):
    (place / "dit.yaml").write_text(f"features: features\noutput: runs\nname: dit\n{SETTINGS}")
    assert run(train, place / "dit.yaml", "--init", place / "DiT.pt", "--device", "cpu") == 0
    result = place / "runs" / "dit_001" / "dit_001.safetensors"
    assert read_stages(header(result)) == ("started from DiT.pt",)
    checkpoint = read_checkpoint(result)
    assert (checkpoint.config.caption_channels, checkpoint.config.base_size) == (CONFIG.caption_channels, 4)
    assert not torch.equal(checkpoint.state_dict["blocks.0.attn.qkv.weight"], make_dit().blocks[0].attn.qkv.weight)


@pytest.mark.slow
def test_a_grown_training_goes_on_as_one_that_was_never_cut(place):
    for name, steps in (("whole", 4), ("cut", 2)):
        text = f"model: pixart.safetensors\ngrow: alpha-1024\nfeatures: features\noutput: runs\nname: {name}\n"
        text += SETTINGS
        (place / f"{name}.yaml").write_text(text.replace("steps: 2", f"steps: {steps}"))
        assert run(train, place / f"{name}.yaml", "--device", "cpu") == 0
    (place / "cut.yaml").write_text((place / "cut.yaml").read_text().replace("steps: 2", "steps: 4"))
    assert run(train, place / "cut.yaml", "--device", "cpu") == 0
    whole, cut = (place / "runs" / f"{name}_001" / f"{name}_001.safetensors" for name in ("whole", "cut"))
    assert read_stages(header(cut)) == ("grown from alpha at 512 px to alpha at 1024 px (alpha-1024)",)
    assert read_checkpoint(cut).config.micro_condition
    expected = load_file(whole)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in load_file(cut).items())


def test_a_grown_run_is_not_continued_ungrown(place, capsys):
    text = f"model: pixart.safetensors\ngrow: 1024\nfeatures: features\noutput: runs\nname: size\n{SETTINGS}"
    (place / "size.yaml").write_text(text)
    assert run(train, place / "size.yaml", "--device", "cpu") == 0
    (place / "size.yaml").write_text(text.replace("grow: 1024\n", "").replace("steps: 2", "steps: 4"))
    assert run(train, place / "size.yaml", "--device", "cpu") == 1
    assert "got base_size" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "match"),
    [
        ("", "without .*model"),
        ("model: a.pth\ninit: b.pt", "Two beginnings"),
        ("model: a.pth\ngrow: [512]", r"grow: \[512\]"),
    ],
)
def test_beginnings_that_cannot_be(tmp_path, line, match):
    (tmp_path / "run.yaml").write_text(f"{line}\nfeatures: features\n")
    with pytest.raises(ValueError, match=match):
        read_config(tmp_path / "run.yaml")


def test_convert_makes_a_pixart_of_a_dit_and_grows_it(place, tmp_path, capsys):
    assert run(convert, place / "DiT.pt", tmp_path / "a.safetensors", "--grow", "128") == 0
    assert "PixArt-alpha trained at 128 px" in capsys.readouterr().out
    stages = read_stages(header(tmp_path / "a.safetensors"))
    assert stages == ("started from DiT.pt", "grown from alpha at 64 px to alpha at 128 px (128)")
    assert run(convert, place / "pixart.safetensors", tmp_path / "b", "--grow", "sigma-2048") == 0
    assert read_checkpoint(tmp_path / "b").config.is_sigma
    assert run(convert, place / "pixart.safetensors", tmp_path / "c.safetensors", "--grow", "beta") == 1


@pytest.mark.slow
def test_a_lora_goes_on_from_a_file_is_validated_and_a_rate_is_found_for_it(place, capsys, monkeypatch):
    monkeypatch.setattr(rates, "COUNT", 4)
    settings = SETTINGS.replace("kind: full", "kind: lora, rank: 2, validation_share: 0.3, validation_every: 1")
    text = f"model: pixart.safetensors\nfeatures: features\noutput: runs\nname: lora\n{settings}"
    (place / "lora.yaml").write_text(text)
    assert run(train, place / "lora.yaml", "--find-rate", "--device", "cpu") == 0
    said = capsys.readouterr().out
    assert "change" in said and "drawn in" in said and (place / "runs" / "lora_rates.png").is_file()
    assert run(train, place / "lora.yaml", "--device", "cpu") == 0
    first = place / "runs" / "lora_001" / "lora_001.safetensors"
    (place / "more.yaml").write_text(text.replace("name: lora", "name: more").replace("rank: 2", "rank: 8"))
    assert run(train, place / "more.yaml", "--start-from", first, "--device", "cpu") == 0
    second = place / "runs" / "more_001" / "more_001.safetensors"
    assert {each.rank for each in read_lora(second).factors.values()} == {2}
