"""Styles, axes and sheets through the queue of a real server."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from pixart_pack.demo.client import PromptError
from pixart_pack.pixart.commands import compare
from pixart_pack.pixart.commands.console import run_command
from pixart_pack.tests.host.graph import PictureGraph, write_pixart, write_t5
from pixart_pack.tests.tiny_pixart import tiny_config

ROUNDING = 1  # of 255: Save Image rounds down, a sheet to the nearest
FILES = ("compare_tiny.safetensors", "compare_t5.safetensors")


@pytest.fixture
def server(host):
    if not (host.models / "diffusion_models" / FILES[0]).exists():
        write_pixart(host.models / "diffusion_models" / FILES[0], tiny_config(base_size=4, pe_scale=1.0))
        write_t5(host.models / "text_encoders" / FILES[1])
    return host


def apart(one, other):
    return np.abs(one.astype(int) - other).max()


def decode(graph, latent):
    return graph.add("VAEDecode", samples=latent, vae=graph.vae)


def sheet_of(host, graph, **inputs):
    sheet = graph.add("PixArtCompareSheet", **inputs)
    graph.add("SaveImage", images=sheet, filename_prefix="sheet")
    return [np.asarray(picture.convert("RGB")) for picture in host.run(graph.nodes, timeout_s=300)][-1]


def test_a_grid_holds_the_picture_of_each_combination(server):
    graph = PictureGraph(*FILES)
    axes = graph.add("PixArtCompareAxes", x_values="1, 2, 3", x_name="steps", y_values="1\n4.5", y_name="cfg")
    image = decode(graph, graph.sample(graph.empty(64, 40), steps=axes, cfg=[axes[0], 1]))
    sheet = sheet_of(server, graph, images=image, grid=[axes[0], 3], title="steps against cfg")
    single = PictureGraph(*FILES)
    single.save(single.sample(single.empty(64, 40), steps=3, cfg=4.5))
    expected = np.asarray(server.run(single.nodes, timeout_s=300)[0].convert("RGB"))
    # The last cell: right below, with a margin of 16 pixels.
    assert apart(sheet[-56:-16, -80:-16], expected) <= ROUNDING
    assert apart(sheet[-56:-16, -160:-96], expected) > ROUNDING


def test_an_axis_of_names_and_prompts_drives_combos_and_texts(server):
    graph = PictureGraph(*FILES)
    axes = graph.add("PixArtCompareAxes", x_values="euler, pixart_dpm_solver", y_values="a red dot, big\na blue dot")
    positive = graph.add("PixArtTextEncode", clip=graph.clip, text=[axes[0], 1])
    latent = graph.add(
        "KSampler", model=graph.model, positive=positive, negative=graph.negative, latent_image=graph.empty(batch=2),
        seed=1, steps=2, cfg=2.0, sampler_name=axes, scheduler="normal", denoise=1.0,
    )  # fmt: skip
    sheet = sheet_of(server, graph, images=decode(graph, latent), grid=[axes[0], 3])
    assert sheet.shape[0] > 2 * 64 and sheet.shape[1] > 2 * 2 * 64  # two cells of two pictures beside each other


def test_many_styles_run_the_graph_once_each_under_their_names(server):
    graph = PictureGraph(*FILES)
    style = graph.add("PixArtStyle", text="a fox", style="Macro", more_styles="Anime, Pixel Art")
    positive = graph.add("PixArtTextEncode", clip=graph.clip, text=style)
    negative = graph.add("PixArtNegative", mode="text", clip=graph.clip, text=[style[0], 1])
    image = decode(graph, graph.sample(graph.empty(), positive=positive, negative=negative))
    sheet = sheet_of(server, graph, images=image, labels=[style[0], 2], columns=3)
    assert sheet.shape[1] == 3 * 80 + 16


def test_a_sheet_with_labels_that_do_not_fit_says_so(server):
    graph = PictureGraph(*FILES)
    style = graph.add("PixArtStyle", text="a fox", style="Macro", more_styles="Anime")
    graph.add("PixArtCompareSheet", images=decode(graph, graph.empty(batch=3)), labels=[style[0], 2])
    with pytest.raises(PromptError, match="got 3 pictures for 2 labels"):
        server.run(graph.nodes)


def test_flags_choose_the_size(run_node):
    text = "a dog --ar 3:4 --hw 600:800"
    assert run_node("PixArtStyle", text=text, style="No style", prompt_flags=True, base="512") == (
        ["a dog"], [""], ["No style"], 576, 416, 800, 600,
    )  # fmt: skip
    assert run_node("PixArtStyle", text=text, style="No style")[0] == [text]


def test_the_users_styles_lie_in_the_hosts_user_folder(pack, monkeypatch, tmp_path):
    import folder_paths

    from pixart_pack.nodes import styles

    monkeypatch.setattr(folder_paths, "get_user_directory", lambda: str(tmp_path))
    (tmp_path / "pixart_styles.json").write_text(json.dumps([{"name": "Tin", "prompt": "tin {prompt}"}]))
    combo = next(each for each in styles.Style.define_schema().inputs if each.id == "style")
    assert "Tin" in combo.options and "Macro" in combo.options


def test_a_broken_file_of_the_user_leaves_the_node_in_the_list(pack, monkeypatch, tmp_path):
    from pixart_pack.nodes import styles

    def broken(files):
        raise ValueError("not JSON")

    monkeypatch.setattr(styles, "load_styles", broken)
    combo = next(each for each in styles.Style.define_schema().inputs if each.id == "style")
    assert combo.options == ["No style"]


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_pictures_of_any_number_of_channels(pack, channels):
    from pixart_pack.nodes.host.pictures import draw_sheet, to_pil

    image = torch.rand(2, 8, 6, channels)
    assert [picture.size for picture in to_pil(image)] == [(6, 8)] * 2
    assert isinstance(to_pil(image)[0], Image.Image)
    assert draw_sheet([image, image], ["one", "two"], 0).shape[0] == 1


def compare_command(*arguments):
    return run_command(compare.main, compare.parse(), [str(each) for each in arguments])


def test_the_command_line_makes_the_same_sheet(server, tmp_path, capsys):
    graph = PictureGraph(*FILES)
    latent = graph.sample(graph.empty(64, 40))
    graph.save(latent)
    workflow, output, cells = tmp_path / "flow.json", tmp_path / "sheet.png", tmp_path / "cells"
    workflow.write_text(json.dumps(graph.nodes))
    axes = ["--x", f"{latent[0]}.steps=1,2", "--y", f"{latent[0]}.sampler_name=euler,pixart_dpm_solver"]
    arguments = [workflow, *axes, "--output", output, "--cells", cells, "--server", server.url]
    assert compare_command(*arguments) == 0, capsys.readouterr().err
    assert len(list(cells.glob("*.png"))) == 4
    sheet = np.asarray(Image.open(output))
    assert np.array_equal(sheet[-56:-16, -80:-16], np.asarray(Image.open(cells / "0003.png").convert("RGB")))
    assert compare_command(*arguments) == 1 and "Exists already" in capsys.readouterr().err
    assert compare_command(*arguments, "--force", "--server", "http://127.0.0.1:9") == 0  # all cells are there


@pytest.mark.parametrize(
    ("axis", "message"),
    [("steps=1,2", "expected NODE.INPUT=VALUES"), ("99.steps=1", "No such input: got 99.steps"), ("1.x=1", "got 1.x")],
)
def test_a_wrong_axis_is_one_line(tmp_path, capsys, axis, message):
    graph = PictureGraph(*FILES)
    (tmp_path / "flow.json").write_text(json.dumps(graph.nodes))
    assert compare_command(tmp_path / "flow.json", "--x", axis, "--output", tmp_path / "out.png") == 1
    assert message in capsys.readouterr().err


def test_the_editors_format_is_told_apart(tmp_path, capsys):
    (tmp_path / "flow.json").write_text('{"nodes": [], "links": []}')
    assert compare_command(tmp_path / "flow.json", "--x", "1.a=1", "--output", tmp_path / "out.png") == 1
    assert "Export (API)" in capsys.readouterr().err
