"""`python -m pixart convert`: every kind of file into every layout and back, and nothing lost on the way."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from pixart_pack.pixart.checkpoint import NULL_CAPTION_KEY, config_to_tensor
from pixart_pack.pixart.commands import convert
from pixart_pack.pixart.commands.console import run_command
from pixart_pack.pixart.controlnet import PixArtControlNet
from pixart_pack.pixart.lora import merge, read_lora
from pixart_pack.pixart.transformer import PixArt
from pixart_pack.pixart.weights.controlnets import read_controlnet, save_controlnet
from pixart_pack.pixart.weights.reading import read_checkpoint
from pixart_pack.tests import processes
from pixart_pack.tests.tiny_pixart import make_weights, tiny_config
from pixart_pack.tests.tiny_t5 import make_t5, weights_of

CONFIG = tiny_config()


def run(*arguments):
    return run_command(convert.main, convert.parse(), [str(each) for each in arguments])


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.fixture
def model(tmp_path):
    weights = make_weights(CONFIG)
    save_file({**weights, "pixart_config": config_to_tensor(CONFIG)}, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def test_a_checkpoint_goes_through_every_layout_and_comes_back(tmp_path, model, capsys):
    steps = ["model.pth", "folder", "again.safetensors", "diffusers.safetensors", "last.safetensors"]
    source = model
    for name in steps:
        more = ["--to", "diffusers"] if name.startswith("diffusers") else []
        assert run(source, tmp_path / name, *more) == 0, capsys.readouterr().err
        source = tmp_path / name
    assert (tmp_path / "folder" / "transformer" / "config.json").is_file()
    first, last = read_checkpoint(model).state_dict, read_checkpoint(source).state_dict
    assert same(
        last, {name: tensor for name, tensor in first.items() if name != NULL_CAPTION_KEY}
    )  # diffusers has none
    assert read_checkpoint(source).config == CONFIG
    assert "PixArt-alpha" in capsys.readouterr().out


def test_the_precision_is_changed_when_asked(tmp_path, model):
    assert run(model, tmp_path / "half.safetensors", "--dtype", "fp16") == 0
    assert {tensor.dtype for tensor in read_checkpoint(tmp_path / "half.safetensors").state_dict.values()} == {
        torch.float16
    }


def test_a_controlnet_keeps_its_base_where_the_layout_can_hold_it(tmp_path):
    base = PixArt(CONFIG)
    control = PixArtControlNet.from_base(base, 1)
    path = tmp_path / "control.pth"
    save_controlnet(path, control.state_dict(), CONFIG, base=base.state_dict())
    assert run(path, tmp_path / "copy.safetensors") == 0
    assert run(path, tmp_path / "folder") == 0
    copy, folder = read_controlnet(tmp_path / "copy.safetensors"), read_controlnet(tmp_path / "folder")
    assert copy.base is not None and folder.base is None
    assert same(copy.state_dict, folder.state_dict)


@pytest.mark.parametrize("layout", ["host", "kohya", "peft"])
def test_a_lora_means_the_same_in_every_layout(tmp_path, layout):
    source = write_peft(tmp_path / "peft_in")
    target = tmp_path / ("out" if layout == "peft" else "out.safetensors")
    assert run(source, target, "--to", layout) == 0
    weights = make_weights(CONFIG)
    one, other = merge(weights, read_lora(source)), merge(weights, read_lora(target))
    assert not same(one, weights)
    assert all(torch.allclose(one[name], other[name], rtol=1e-6) for name in one)


def test_a_lora_that_is_read_in_part_says_so_and_strict_refuses_it(tmp_path, capsys):
    source = write_peft(tmp_path / "peft_in")
    path = next(source.glob("*.safetensors"))
    save_file({**load_file(path), "transformer.nothing.lora_A.weight": torch.ones(2, 2)}, path)
    assert run(source, tmp_path / "out.safetensors", "--to", "host") == 0
    assert "converted in part: " in capsys.readouterr().err
    assert run(source, tmp_path / "strict.safetensors", "--to", "host", "--strict") == 1
    assert "fits only in part" in capsys.readouterr().err and not (tmp_path / "strict.safetensors").exists()


def test_t5_becomes_one_file_and_a_folder_again(tmp_path):
    network = make_t5(vocab_size=64)
    network.save_pretrained(tmp_path / "text_encoder", max_shard_size="20KB")
    assert run(tmp_path / "text_encoder", tmp_path / "t5.safetensors", "--dtype", "bf16") == 0
    weights = load_file(tmp_path / "t5.safetensors")
    assert same(weights, {name: tensor.bfloat16() for name, tensor in weights_of(network).items()})
    assert run(tmp_path / "t5.safetensors", tmp_path / "folder") == 0
    loaded = type(network).from_pretrained(tmp_path / "folder")
    assert torch.equal(loaded.shared.weight, network.shared.weight.bfloat16().float())


def test_nothing_is_replaced_without_force_and_a_failure_leaves_the_old(tmp_path, model, capsys):
    folder = tmp_path / "folder"
    assert run(model, folder) == 0
    before = (folder / "transformer" / "config.json").stat().st_mtime_ns
    assert run(model, folder) == 1
    assert "Exists already" in capsys.readouterr().err
    save_file({"x": torch.zeros(2)}, tmp_path / "other.safetensors")
    assert run(tmp_path / "other.safetensors", folder, "--force") == 1
    assert (folder / "transformer" / "config.json").stat().st_mtime_ns == before
    assert run(model, folder, "--force") == 0
    assert (folder / "transformer" / "config.json").stat().st_mtime_ns != before
    (folder / "diary.txt").write_text("mine")
    assert run(model, folder, "--force") == 1
    assert "diary.txt" in capsys.readouterr().err and (folder / "diary.txt").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.pth", "out.pth"], "Not found: got 'nowhere.pth'"),
        (["{model}", "{model}", "--force"], "Source and target are the same"),
        (["{model}", "out.pth", "--to", "kohya"], "expected original or diffusers for this file"),
    ],
)
def test_bad_input_is_one_line(model, capsys, arguments, message):
    assert run(*(each.replace("{model}", str(model)) for each in arguments)) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def convert_in_a_process(*arguments):
    """(exit code, what it says, its errors)."""
    process = processes.start("pixart", "convert", *arguments)
    said, errors = processes.finish(process)
    return process.returncode, said, errors


def write_peft(folder):
    width, key = CONFIG.hidden_size, "base_model.model.transformer_blocks.0.attn1.to_q"
    tensors = {f"{key}.lora_A.weight": torch.randn(4, width), f"{key}.lora_B.weight": torch.randn(width, 4)}
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 2, "peft_type": "LORA"}))
    return folder


def write_control(path):
    control = PixArtControlNet.from_base(PixArt(CONFIG), 1)
    save_controlnet(path, control.state_dict(), CONFIG)
    return path


def write_t5(folder):
    make_t5(vocab_size=64).save_pretrained(folder)
    return folder


def merged(path):
    return merge(make_weights(CONFIG), read_lora(path))


def t5_weights(path):
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


# What a kind is written as, the other way and back, and how it is read.
WAYS = {
    "checkpoint": (None, "folder", "back.pth", lambda path: read_checkpoint(path).state_dict),
    "controlnet": (write_control, "folder", "back.safetensors", lambda path: read_controlnet(path).state_dict),
    "lora": (write_peft, "kohya.safetensors", "back", merged),
    "t5": (write_t5, "t5.safetensors", "back", t5_weights),
}


@pytest.mark.parametrize("kind", WAYS)
def test_each_kind_goes_both_ways_and_replaces_nothing_unasked(tmp_path, model, kind, capsys):
    write, there, back, read = WAYS[kind]
    source = write(tmp_path / ("control.pth" if kind == "controlnet" else "source")) if write else model
    more = ["--to", "kohya"] if kind == "lora" else []
    capsys.readouterr()
    assert run(source, tmp_path / there, *more) == 0
    said, errors = capsys.readouterr()
    assert errors == "" and said.startswith(f"{tmp_path / there}: ")
    assert run(tmp_path / there, tmp_path / back) == 0
    expected, found = read(source), read(tmp_path / back)
    for weights in (expected, found):
        weights.pop(NULL_CAPTION_KEY, None)  # diffusers has none
    assert expected.keys() == found.keys()
    # A LoRA's alpha is multiplied in and out in another order; all else is copied.
    assert all(
        torch.allclose(expected[name], found[name], rtol=1e-6 if kind == "lora" else 0, atol=0) for name in found
    )
    stamps = {path: path.stat().st_mtime_ns for path in [tmp_path / back, *(tmp_path / back).rglob("*")]}
    capsys.readouterr()
    assert run(tmp_path / there, tmp_path / back) == 1
    said, errors = capsys.readouterr()
    assert said == "" and errors.startswith("error: Exists already: got") and errors.count("\n") == 1
    assert stamps == {path: path.stat().st_mtime_ns for path in stamps}
    assert run(tmp_path / there, tmp_path / back, "--force") == 0


@pytest.mark.slow
def test_a_real_process_converts_and_says_so(tmp_path, model):
    code, said, errors = convert_in_a_process(model, tmp_path / "folder")
    assert (code, errors) == (0, "") and said.startswith(f"{tmp_path / 'folder'}: ")
    code, said, errors = convert_in_a_process(model, tmp_path / "folder")
    assert (code, said) == (1, "") and errors.startswith("error: Exists already: got") and errors.count("\n") == 1


@pytest.mark.slow
def test_a_real_process_with_help():
    code, shown, _ = convert_in_a_process("--help")
    assert code == 0 and "python -m pixart convert peft-folder/" in shown
    code, _, errors = convert_in_a_process("only-one")
    assert code == 2 and "the following arguments are required: target" in errors


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"qk_norm": True}, "no qk norm"),
        ({"kv_compress_ratio": 2, "kv_compress_layers": (1,)}, "no key and value compression"),
        ({"mlp_ratio": 2.0}, "would refuse 2"),
        ({}, None),
    ],
)
def test_what_diffusers_would_lose_is_said(tmp_path, capsys, fields, message):
    config = tiny_config(**fields)
    save_file({**make_weights(config), "pixart_config": config_to_tensor(config)}, tmp_path / "model.safetensors")
    assert run(tmp_path / "model.safetensors", tmp_path / "folder") == 0
    told = capsys.readouterr().err
    assert message in told if message else not told
