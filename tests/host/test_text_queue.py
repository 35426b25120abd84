"""The text and size nodes through the prompt queue of a real server."""

import pytest
from safetensors.torch import save_file

from pixart_pack.demo.client import PromptError
from pixart_pack.tests import tiny_t5


def node(class_type, **inputs):
    return {"class_type": class_type, "inputs": inputs}


@pytest.fixture(scope="module")
def encoder(start_host):
    """The name of a T5 file in the server's folders."""
    save_file(tiny_t5.weights_of(tiny_t5.make_t5()), start_host().models / "text_encoders" / "tiny_t5.safetensors")
    return "tiny_t5.safetensors"


def encode_workflow(encoder, **inputs):
    return {
        "t5": node("PixArtLoadT5", text_encoder=encoder),
        "size": node("PixArtResolution", base="512", mode="by ratio", ratio="0.57 (7:4)"),
        "positive": node("PixArtTextEncode", clip=["t5", 0], width=["size", 0], height=["size", 1], **inputs),
        "negative": node("PixArtNegative", mode="empty", clip=["t5", 0], positive=["positive", 0]),
        "core": node("CLIPTextEncode", clip=["t5", 0], text="a dog"),
        "both": node("ConditioningConcat", conditioning_to=["positive", 0], conditioning_from=["core", 0]),
        "show": node("PreviewAny", source=["both", 0]),
        "show_negative": node("PreviewAny", source=["negative", 0]),
    }


def test_the_editor_is_told_what_was_cut(host, encoder):
    workflow = encode_workflow(encoder, text="a tall lighthouse " * 80, caption_length="120")
    outputs = {event["node"]: event["output"] for name, event in host.events(workflow, 120) if name == "executed"}
    (notice,) = outputs["positive"]["text"]
    assert "tokens cut (limit 120)" in notice and notice.endswith("a tall lighthouse'")
    assert outputs["negative"]["text"] == ["1 of 300 tokens"]
    assert "pixart_size" in outputs["show"]["text"][0] and "(384, 672)" in outputs["show_negative"]["text"][0]


def test_wrong_files_end_the_prompt_with_their_name(host):
    (host.models / "text_encoders" / "empty.safetensors").write_bytes(b"")
    workflow = {"t5": node("PixArtLoadT5", text_encoder="empty.safetensors")}
    workflow["show"] = node("PreviewAny", source=["t5", 0])
    with pytest.raises(PromptError, match="PixArtLoadT5 failed: .*got 0 bytes in 'empty.safetensors'"):
        host.run(workflow, timeout_s=60)
