"""The captioning node in this process and through the queue."""

import importlib
from pathlib import Path

import pytest
import torch

from pixart_pack.pixart.encoders.captioner import DESCRIBE, DESCRIBE_CAPTION, CaptionSettings, load_captioner
from pixart_pack.tests.host.graph import Graph
from pixart_pack.tests.tiny_llava import write_llava

NODE = "PixArtCaptionImages"
LISTS = {"max_tokens": [8], "temperature": [0.0]}


@pytest.fixture
def model(comfy, pack):
    paths = importlib.import_module("folder_paths")
    folder = Path(paths.get_folder_paths("LLM")[0], "tiny-llava")
    if not folder.exists():
        write_llava(folder)
    return folder


def test_lists_of_pictures_of_any_size_get_a_caption_each(model, run_node):
    from pixart_pack.nodes.host.pictures import to_pil

    images = [torch.rand(2, 24, 40, 3), torch.rand(1, 33, 17, 4)]
    captions = run_node(NODE, images=images, model=["tiny-llava/"], batch_size=[2], **LISTS)[0]
    pictures = [picture for image in images for picture in to_pil(image)]
    assert captions == load_captioner(model)(pictures, [DESCRIBE] * 3, CaptionSettings(8, 0))
    shorts = ["a fox", "", "a red dot"]
    refined = run_node(NODE, images=images, model=["tiny-llava/"], captions=shorts, **LISTS)[0]
    asked = [DESCRIBE_CAPTION.replace("{}", "a fox"), DESCRIBE, DESCRIBE_CAPTION.replace("{}", "a red dot")]
    assert refined == load_captioner(model)(pictures, asked, CaptionSettings(8, 0))
    with pytest.raises(ValueError, match="Wrong number of short captions: got 2, expected 3"):
        run_node(NODE, images=images, model=["tiny-llava/"], captions=shorts[:2], **LISTS)


def test_an_interrupt_ends_it(model, comfy, run_node):
    management = importlib.import_module("comfy.model_management")
    management.interrupt_current_processing()
    with pytest.raises(management.InterruptProcessingException):
        run_node(NODE, images=[torch.rand(1, 8, 8, 3)], model=["tiny-llava/"], **LISTS)


def test_names_stay_in_the_folders(model, run_node):
    with pytest.raises(FileNotFoundError, match="Folder not found: got '../tiny-llava/'"):
        run_node(NODE, images=[torch.rand(1, 8, 8, 3)], model=["../tiny-llava/"], **LISTS)


def test_through_the_queue_a_caption_becomes_a_text(host):
    write_llava(host.models / "LLM" / "tiny-llava")
    graph = Graph()
    image = graph.add("EmptyImage", width=40, height=24, batch_size=2, color=0x336699)
    captions = graph.add(NODE, images=image, model="tiny-llava/", max_tokens=8, temperature=0.0)
    graph.add("PreviewAny", source=captions)
    entry = host.wait(host.queue(graph.nodes), 300)
    texts = [text for output in entry["outputs"].values() for text in output.get("text", ())]
    assert len(texts) == 2 and texts[0] == texts[1] != ""
