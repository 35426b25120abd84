"""Data sets of strangers: links, pipes, devices, names that lead out, and pictures that would fill the memory."""

import io
import json
import os
import struct
import zlib

import pytest
from PIL import Image

from pixart_pack.pixart.data import pictures, sources
from pixart_pack.pixart.data.pictures import FilePicture, decode_picture
from pixart_pack.pixart.data.records import check_records
from pixart_pack.pixart.data.sources import read_dataset
from pixart_pack.pixart.lora.reading import read_lora

needs_pipes = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names on this system")


def draw(path, colour=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (40, 30), (colour, 50, 90)).save(path)
    return path


@pytest.fixture
def secret(tmp_path):
    path = tmp_path / "secret.txt"
    path.write_text("dir,text\na.png,root:x:0:0")
    return path


def sam(root):
    draw(root / "images" / "1.png")
    draw(root / "images" / "2.png", 9)
    (root / "captions").mkdir()
    (root / "captions" / "2.txt").write_text("two")
    return root / "captions" / "1.txt"


def folder(root):
    draw(root / "2.png", 9).with_suffix(".txt").write_text("two")
    return draw(root / "1.png").with_suffix(".txt")


@pytest.mark.parametrize("layout", [sam, folder])
@pytest.mark.parametrize("confined", [False, True])
def test_a_caption_that_is_a_link_out_is_a_problem_of_its_row(tmp_path, secret, layout, confined):
    layout(tmp_path / "set").symlink_to(secret)
    records = read_dataset(tmp_path / "set", confined=confined)
    assert "root:" not in repr(records)
    dataset = check_records(records)
    assert [record.caption for record in dataset.records] == ["two"]
    assert "caption: A link leads out of its folder: got '1.txt'" in dataset.report


@needs_pipes
@pytest.mark.parametrize("layout", [sam, folder])
def test_a_caption_that_is_a_pipe_or_a_device_is_a_problem_of_its_row(tmp_path, layout):
    caption = layout(tmp_path / "set")
    os.mkfifo(caption)
    assert "got a pipe named '1.txt'" in check_records(read_dataset(tmp_path / "set")).report
    caption.unlink()
    caption.symlink_to("/dev/zero")
    assert "1.txt" in check_records(read_dataset(tmp_path / "set")).report


def test_a_caption_of_a_gigabyte_is_a_problem_of_its_row(tmp_path):
    with open(folder(tmp_path), "wb") as file:
        file.truncate(10**9)
    report = check_records(read_dataset(tmp_path)).report
    assert "File too large: got 1,000.0 MB in '1.txt', expected at most 1.0 MB" in report and len(report) < 500


def test_a_caption_cut_within_a_letter_is_read(tmp_path):
    folder(tmp_path).write_bytes("ab".encode("utf-16")[:-1])
    assert read_dataset(tmp_path)[0].caption == "a\ufffd"


@needs_pipes
def test_a_picture_that_is_a_pipe_or_a_device_is_a_problem_of_its_row(tmp_path):
    folder(tmp_path).write_text("one")
    os.mkfifo(tmp_path / "3.png")
    (tmp_path / "4.png").symlink_to("/dev/zero")
    dataset = check_records(read_dataset(tmp_path), fallback_caption="x")
    assert len(dataset) == 2
    assert "got a pipe named '3.png'" in dataset.report and "got a device named '4.png'" in dataset.report


def test_a_confined_picture_may_not_be_a_link_out(tmp_path):
    draw(tmp_path / "private.png")
    (folder(tmp_path / "set")).write_text("one")
    (tmp_path / "set" / "3.png").symlink_to(tmp_path / "private.png")
    (tmp_path / "set" / "sub").symlink_to(tmp_path, target_is_directory=True)
    dataset = check_records(read_dataset(tmp_path / "set", confined=True), fallback_caption="x")
    assert {record.name for record in dataset.records} == {"1.png", "2.png"}
    table = tmp_path / "set" / "t.csv"
    table.write_text("dir,text\n3.png,x\n1.png,y")
    problems = [record.problem for record in read_dataset(table, confined=True)]
    assert "leads out of the dataset's folder" in problems[0] and problems[1] is None
    assert read_dataset(table)[0].problem is None  # the owner's own links are followed


@pytest.mark.parametrize("name", ["t.csv", "t.jsonl", "data_info.json"])
def test_a_table_in_a_folder_may_not_be_a_link_out(tmp_path, secret, name):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / name).symlink_to(secret)
    with pytest.raises(ValueError, match="A link leads out of its folder") as caught:
        read_dataset(tmp_path / "set")
    assert "root:" not in str(caught.value)


def test_a_partition_may_not_be_a_link_out(tmp_path, secret):
    sam(tmp_path / "set").write_text("one")
    (tmp_path / "set" / "partition").mkdir()
    (tmp_path / "set" / "partition" / "a.txt").symlink_to(secret)
    with pytest.raises(ValueError, match="A link leads out of its folder"):
        read_dataset(tmp_path / "set", sources.SAM)


def saved(path, text="mine"):
    datasets = pytest.importorskip("datasets")
    content = io.BytesIO()
    Image.new("RGB", (9, 9)).save(content, "PNG")
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    columns = {"image": [{"bytes": content.getvalue(), "path": None}], "text": [text]}
    datasets.DatasetDict({"train": datasets.Dataset.from_dict(columns, features)}).save_to_disk(str(path))
    return path / "train" / "state.json"


@pytest.mark.parametrize("place", ["../../other", "{}/other"])
def test_a_state_file_names_only_files_of_its_folder(tmp_path, place):
    saved(tmp_path / "other", "stolen")
    state = saved(tmp_path / "set")
    content = json.loads(state.read_text())
    assert read_dataset(tmp_path / "set")[0].caption == "mine"
    content["_data_files"][0]["filename"] = f"{place.format(tmp_path)}/train/data-00000-of-00001.arrow"
    state.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="arrow' in state.json, which leads out of the folder"):
        read_dataset(tmp_path / "set")


@pytest.mark.parametrize("split", ["../other/train", "{}/other/train", "train::http://127.0.0.1:9/x", 3])
def test_a_list_of_splits_names_only_folders_in_it(tmp_path, split):
    saved(tmp_path / "other", "stolen")
    saved(tmp_path / "set")
    splits = [split.format(tmp_path) if isinstance(split, str) else split]
    (tmp_path / "set" / "dataset_dict.json").write_text(json.dumps({"splits": splits}))
    with pytest.raises(ValueError, match="in dataset_dict.json, which leads out of the folder"):
        read_dataset(tmp_path / "set")


def test_a_saved_dataset_has_no_links_out_and_needs_no_format(tmp_path):
    saved(tmp_path / "other", "stolen")
    state = saved(tmp_path / "set")
    content = json.loads(state.read_text())
    state.write_text(json.dumps(content | {"_format_type": "numpy"}))
    (record,) = check_records(read_dataset(tmp_path / "set")).records
    assert record.caption == "mine"
    data = state.with_name("data-00000-of-00001.arrow")
    data.unlink()
    data.symlink_to(tmp_path / "other" / "train" / data.name)
    with pytest.raises(ValueError, match="A link leads out of its folder"):
        read_dataset(tmp_path / "set")


def test_an_adapters_folder_has_no_links_out(tmp_path):
    (tmp_path / "adapter").mkdir()
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        (tmp_path / name).write_bytes(b"{}")
        (tmp_path / "adapter" / name).symlink_to(tmp_path / name)
        with pytest.raises(ValueError, match=f"A link leads out of its folder: got '{name}'"):
            read_lora(tmp_path / "adapter")
        (tmp_path / "adapter" / name).unlink()
        (tmp_path / "adapter" / "adapter_model.safetensors").write_bytes(b"{}")


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width, height, *others, depth=1, lines=b""):
    """A PNG in grey of any size, with other chunks before its lines."""
    head = struct.pack(">IIBBBBB", width, height, depth, 0, 0, 0, 0)
    chunks = [chunk(b"IHDR", head), *others, chunk(b"IDAT", zlib.compress(lines)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


BOMBS = {
    "a size of gigapixels": (png(2**31 - 1, 2**31 - 1), "exceeds limit|too large"),
    "a size above the limit": (png(20000, 20000), "exceeds limit|too large: 20000 x 20000 px"),
    "a text that unpacks to 64 MB": (png(8, 8, chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(2**26)))), "too large"),
    "a picture cut off": (png(4000, 4000, lines=bytes(10)), "truncated|broken|decoder"),
    "PostScript, which PIL gives to a program": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "no format"),
    "a drawing in XML": (b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"/>', "no format"),
    "nothing": (b"", "no format"),
}


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("lifted", [False, True])
@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_named_in_words(tmp_path, monkeypatch, name, lifted):
    content, expected = BOMBS[name]
    if lifted:  # as other programs in the process do
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    (tmp_path / "1.png").write_bytes(content)
    picture = FilePicture(tmp_path / "1.png")
    with pytest.raises(ValueError, match=expected) as caught:
        decode_picture(picture, picture.content())
    assert len(str(caught.value)) <= 200
    draw(tmp_path / "2.png")
    dataset = check_records(read_dataset(tmp_path), fallback_caption="x")
    assert [record.name for record in dataset.records] == ["2.png"] and "1.png" in dataset.report


def test_of_an_animation_the_first_frame_is_read(tmp_path):
    frames = [Image.new("RGB", (8, 8), (shade, 0, 0)) for shade in (255, 0)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:] * 50)
    assert pictures.read_picture(FilePicture(tmp_path / "a.gif"))[0, 0].tolist() == [1, 0, 0]


def test_a_picture_file_has_a_limit(tmp_path):
    with open(draw(tmp_path / "a.png"), "ab") as file:
        file.truncate(pictures.PICTURE_BYTES + 1)
    with pytest.raises(ValueError, match="File too large"):
        FilePicture(tmp_path / "a.png").content()
