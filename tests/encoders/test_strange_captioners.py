"""Captioning models of strangers: no code, no pickles, no links out, no question on the terminal, and no advice."""

import json
import os
import shutil

import pytest
import torch
from PIL import Image

from pixart_pack.pixart.encoders import captioner as captioners
from pixart_pack.pixart.encoders import chat_templates
from pixart_pack.pixart.encoders.captioner import CaptionSettings, is_captioner_folder, load_captioner
from pixart_pack.tests.tiny_llava import write_llava

FOREVER = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return write_llava(tmp_path_factory.mktemp("llava"))


@pytest.fixture
def folder(original, tmp_path):
    return shutil.copytree(original, tmp_path / "model")


def change(file, **entries):
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))


def refuses(folder, expected):
    with pytest.raises(ValueError, match=expected) as caught:
        load_captioner(folder)
    message = str(caught.value)
    assert "trust_remote_code" not in message and "weights_only" not in message and len(message) < 600


@pytest.mark.parametrize("file", ["config.json", "processor_config.json", "tokenizer_config.json"])
def test_code_of_a_folder_is_never_run(folder, tmp_path, monkeypatch, file):
    def ask(*_):
        raise AssertionError("a question on the terminal")

    monkeypatch.setattr("builtins.input", ask)
    mark = tmp_path / "ran"
    (folder / "own.py").write_text(f"open({str(mark)!r}, 'w')\nclass Own: pass\n")
    classes = ("AutoConfig", "AutoModel", "AutoModelForImageTextToText", "AutoProcessor", "AutoTokenizer")
    change(folder / file, auto_map=dict.fromkeys(classes, "own.Own"), processor_class="Own", tokenizer_class="Own")
    change(folder / "config.json", model_type="own")
    refuses(folder, rf"got code of its own \(auto_map in {file}\), which is never run, in 'model', expected a kind")
    assert not mark.exists()


def test_a_map_of_code_that_nobody_needs_does_no_harm(folder):
    change(folder / "config.json", auto_map={"AutoModelForImageTextToText": "own.Own"})
    assert load_captioner(folder)


def test_pickles_alone_are_refused_in_words(folder):
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    refuses(folder, "got weights in .bin files alone in 'model', expected safetensors, which hold no program")


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        ({"attn_implementation": "me/evil-kernel"}, "got the attention 'me/evil-kernel' in config.json"),
        ({"text_config": {"_attn_implementation": "me/evil"}}, "got the attention 'me/evil' in config.json"),
        ({"backbone_config": {"use_pretrained_backbone": True}}, "got a backbone to download in config.json"),
        ({"transformers_weights": "../../other.safetensors"}, "got another name of the weights in config.json"),
    ],
)
def test_a_configuration_fetches_nothing(folder, entries, expected):
    change(folder / "config.json", **entries)
    refuses(folder, expected)


@pytest.mark.parametrize(
    ("file", "entries", "expected"),
    [
        ("processor_config.json", {"image_processor": {"size": {"shortest_edge": 10**9}}}, "shortest_edge 1000000000"),
        ("processor_config.json", {"num_additional_image_tokens": 10**12}, "num_additional_image_tokens 1000000000000"),
        ("config.json", {"image_seq_length": 10**12}, "image_seq_length 1000000000000 in config.json"),
        ("generation_config.json", {"num_beams": 10**6}, "num_beams 1000000 in generation_config.json"),
    ],
)
def test_numbers_that_would_fill_the_memory_are_refused(folder, file, entries, expected):
    change(folder / file, **entries)
    refuses(folder, f"got {expected}")


def test_adapters_that_name_another_model_are_refused(folder):
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "/etc"}')
    refuses(folder, "got an adapter in 'model', expected a whole model")


@pytest.mark.parametrize("shard", ["../other.safetensors", "/other.safetensors", "C:other.safetensors", 3])
def test_an_index_names_only_files_of_its_folder(folder, shard):
    (folder / "model.safetensors").rename(folder.parent / "other.safetensors")
    (folder / "model-00001-of-00001.safetensors").write_bytes(b"")
    index = {"metadata": {}, "weight_map": {"lm_head.weight": shard}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refuses(folder, "Unsafe index 'model.safetensors.index.json'")


def test_links_out_and_pipes_are_refused(folder):
    (folder / "model.safetensors").rename(folder.parent / "other.safetensors")
    (folder / "model.safetensors").symlink_to("../other.safetensors")
    refuses(folder, "A link leads out of its folder: got 'model.safetensors'")
    (folder / "model.safetensors").unlink()
    if hasattr(os, "mkfifo"):
        (folder / "config.json").unlink()
        os.mkfifo(folder / "config.json")
        assert not is_captioner_folder(folder)
        refuses(folder, "got a pipe named 'config.json'")


@pytest.mark.slow
def test_a_template_that_does_not_end_is_stopped(folder, monkeypatch):
    (folder / "chat_template.jinja").write_text(FOREVER)
    captioner = load_captioner(folder, torch.float32)
    monkeypatch.setattr(chat_templates, "SECONDS", 1.0)
    with pytest.raises(ValueError, match="Chat template cannot be used: got more than 1 seconds"):
        captioner([Image.new("RGB", (9, 9))], [captioners.DESCRIBE], CaptionSettings(2, 0))


def test_a_template_is_rendered_once_for_prompts_that_are_the_same(folder, monkeypatch):
    (folder / "chat_template.jinja").write_text("{{ messages[0].content[1].text }}<image>")
    captioner = load_captioner(folder, torch.float32)
    calls = []

    def render(template, chats, tokens):
        calls.append(len(chats))
        return chat_templates.render_chats(template, chats, tokens)

    monkeypatch.setattr(captioners, "render_chats", render)
    assert captioner._write_chats(["a", "b", "a"]) == ["a<image>", "b<image>", "a<image>"]
    assert captioner._write_chats(["b", "b"]) == ["b<image>", "b<image>"]
    assert calls == [2]
