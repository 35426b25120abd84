"""Datasets on disk: every layout, paths of every system, and the table of what is wrong."""

import gzip
import io
import json
import tarfile
from random import Random
from unicodedata import normalize

import numpy as np
import pytest
import torch
from PIL import Image

from pixart_pack.pixart.data.pictures import FilePicture, TensorPicture, measure_picture, read_picture
from pixart_pack.pixart.data.records import Record, check_records
from pixart_pack.pixart.data.sources import Columns, detect_kind, read_dataset
from pixart_pack.tests.training_data import interrupting


def draw(path, size=(40, 30), seed=0, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(noise).save(path, **options)
    return path


def captions(records):
    return {record.name: record.caption for record in records}


def test_folder(tmp_path):
    draw(tmp_path / "a.png")
    draw(tmp_path / "sub" / "Ünïcode 猫.JPG", seed=1)
    draw(tmp_path / ".hidden" / "no.png")
    draw(tmp_path / "bare.webp", seed=2)
    draw(tmp_path / "DSC_1.JPG", seed=3)
    (tmp_path / "DSC_1.TXT").write_text("loud")
    (tmp_path / "a.txt").write_text("a cat\n", encoding="utf-8")
    (tmp_path / "sub" / "Ünïcode 猫.txt").write_text("ein Kätzchen", encoding="utf-16")
    (tmp_path / "bare.caption").write_bytes("café".encode("cp1252"))
    records = read_dataset(tmp_path)
    assert captions(records) == {
        "DSC_1.JPG": "loud",
        "a.png": "a cat\n",
        "bare.webp": "café",
        "sub/Ünïcode 猫.JPG": "ein Kätzchen",
    }
    dataset = check_records(records)
    assert len(dataset) == 4 and dataset.records[1].caption == "a cat"


def test_folder_with_control_pictures_inside(tmp_path, monkeypatch):
    draw(tmp_path / "a.png")
    control = draw(tmp_path / "edges" / "a.jpg")
    (record,) = read_dataset(tmp_path, control_folder=tmp_path / "edges")
    assert record.control == FilePicture(control)
    monkeypatch.chdir(tmp_path.parent)
    (record,) = read_dataset(tmp_path.name, control_folder=tmp_path / "edges")  # one relative, one not
    assert record.control == FilePicture(control)
    with pytest.raises(FileNotFoundError, match="Control folder not found"):
        read_dataset(tmp_path, control_folder=tmp_path / "none")


@pytest.mark.parametrize("separator", [",", ";"])
def test_csv_of_mindone_with_windows_paths(tmp_path, separator):
    draw(tmp_path / "images" / "one.png")
    draw(tmp_path / "two.png", seed=1)
    rows = ["dir,text".replace(",", separator), f'images\\one.png{separator}"a cat{separator} sitting"']
    (tmp_path / "table.csv").write_text("\r\n".join([*rows, f"two.png{separator}a dog"]), encoding="utf-8-sig")
    assert detect_kind(tmp_path) == "csv"
    records = read_dataset(tmp_path)
    assert captions(records) == {"images\\one.png": f"a cat{separator} sitting", "two.png": "a dog"}
    assert len(check_records(records, policy="error")) == 2


def test_csv_with_chosen_columns_and_control(tmp_path):
    draw(tmp_path / "x.png")
    draw(tmp_path / "edge.png", seed=2)
    table = tmp_path / "t.tsv"
    table.write_text("Bild\tWorte\tKante\nx.png\tein Hund\tedge.png\n", encoding="utf-8")
    (record,) = read_dataset(table, columns=Columns("Bild", "Worte", "Kante"))
    assert record.caption == "ein Hund" and record.control == FilePicture(tmp_path / "edge.png")
    with pytest.raises(ValueError, match="No picture column in t.tsv: got the columns 'Bild', 'Worte', 'Kante'"):
        read_dataset(table)
    with pytest.raises(ValueError, match="No caption column in t.tsv: .* expected 'words'"):
        read_dataset(table, columns=Columns("Bild", "words"))


def test_csv_of_an_old_mac_with_headings_of_its_own(tmp_path):
    draw(tmp_path / "x.png")
    (tmp_path / "t.csv").write_bytes(b"Image, Caption\rx.png, a cat\r")
    (tmp_path / "README.txt").write_text("about this dataset")
    assert captions(check_records(read_dataset(tmp_path)).records) == {"x.png": "a cat"}


def test_rows_that_name_no_picture_are_told(tmp_path):
    draw(tmp_path / "x.png")
    draw(tmp_path / "edges" / "x.png")
    rows = ["dir,text", "x.png,a", ",b", ".,c", "..,d", f"{'long ' * 100},e"]  # the last one: columns taken for another
    (tmp_path / "t.csv").write_text("\n".join(rows))
    dataset = check_records(read_dataset(tmp_path, control_folder=tmp_path / "edges"))
    assert [record.caption for record in dataset.records] == ["a"]
    assert "unreadable: 4" in dataset.report and "the table names no picture" in dataset.report


def test_csv_that_is_damaged_is_told(tmp_path):
    draw(tmp_path / "x.png")
    (tmp_path / "t.csv").write_text('dir,text\nx.png,"once" is 5" long\ny.png,"and all that follows\nz.png,is lost')
    with pytest.raises(ValueError, match=r"got a quote that is never closed in t\.csv, expected"):
        read_dataset(tmp_path)
    (tmp_path / "t.csv").write_text('dir,text\nx.png,"' + "a" * 200_000, encoding="utf-8")
    with pytest.raises(ValueError, match=r"Dataset cannot be read: got line 2 .*field larger than .* in t\.csv"):
        read_dataset(tmp_path)


@pytest.mark.parametrize("forms", [("NFC", "NFD"), ("NFD", "NFC")])
def test_letters_that_are_written_in_two_ways(tmp_path, forms):
    """An accent within its letter, or behind it as macOS has it in names of files."""
    on_disk, in_table = (normalize(form, "Süße.png") for form in forms)
    draw(tmp_path / on_disk)
    edges = draw(tmp_path / "edges" / in_table)
    (tmp_path / "t.csv").write_text(f"dir,text\n{in_table},a\n", encoding="utf-8")
    (record,) = check_records(read_dataset(tmp_path, control_folder=tmp_path / "edges")).records
    assert record.control == FilePicture(edges)
    sam = tmp_path / "sam"
    draw(sam / "images" / on_disk)
    for place in ("captions", "partition"):
        (sam / place).mkdir()
    (sam / "captions" / in_table).with_suffix(".txt").write_text("b")
    (sam / "partition" / "part0.txt").write_text(on_disk.removesuffix(".png"), encoding="utf-8")
    (record,) = check_records(read_dataset(sam)).records
    assert record.caption == "b"


def test_links_that_lead_in_a_circle(tmp_path):
    draw(tmp_path / "set" / "inner" / "a.png")
    (tmp_path / "set" / "inner" / "back").symlink_to(tmp_path / "set", target_is_directory=True)
    (tmp_path / "set" / "again").symlink_to(tmp_path / "set", target_is_directory=True)
    draw(tmp_path / "elsewhere" / "b.png", seed=1)
    (tmp_path / "set" / "linked").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    assert list(captions(read_dataset(tmp_path / "set"))) == ["inner/a.png", "linked/b.png"]


def test_jsonl(tmp_path):
    draw(tmp_path / "x.png")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "x.png", "text": "one"}\n\n', encoding="utf-8")
    assert captions(read_dataset(tmp_path)) == {"x.png": "one"}
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "x.png", "text": "one"}\n{"a\n', encoding="utf-8")
    with pytest.raises(ValueError, match="line 2 that is no JSON"):
        read_dataset(tmp_path)


def test_several_captions_and_a_stray_table(tmp_path):
    draw(tmp_path / "x.png")
    (tmp_path / "x.jsonl").write_text('{"file_name": "x.png", "caption": ["one", "two"]}', encoding="utf-8")
    assert captions(read_dataset(tmp_path)) == {"x.png": "one"}
    (tmp_path / "x.txt").write_text("mine")
    assert captions(read_dataset(tmp_path)) == {"x.png": "mine"}


@pytest.mark.parametrize("where", ["", "partition"])
def test_pixarts_json(tmp_path, where):
    root = tmp_path / "InternData"
    rows = [{"path": "dir/x.png", "prompt": "one", "height": 30, "width": 40, "ratio": 0.75}]
    (root / where).mkdir(parents=True)
    (root / where / "data_info.json").write_text(json.dumps(rows), encoding="utf-8")
    picture = draw(tmp_path / "InternImgs" / "dir" / "x.png")
    for confined in (False, True):
        (record,) = read_dataset(root, confined=confined)
        assert record.picture == FilePicture(picture) and record.caption == "one"
    draw(tmp_path / "x.png")
    (root / where / "data_info.json").write_text(json.dumps([{"path": "../x.png", "prompt": ""}]), encoding="utf-8")
    (record,) = read_dataset(root, confined=True)
    assert record.picture is None and record.problem


def test_a_folder_above_the_dataset_that_is_called_like_pixarts_leads_nowhere(tmp_path):
    root = tmp_path / "InternData" / "input" / "set"
    root.mkdir(parents=True)
    (root / "data_info.json").write_text(json.dumps([{"path": "x.png", "prompt": "one"}]), encoding="utf-8")
    picture = draw(tmp_path / "InternImgs" / "input" / "set" / "x.png")
    (own,), (confined,) = (read_dataset(root, confined=confined) for confined in (False, True))
    assert own.picture == FilePicture(picture)
    assert confined.picture is None and confined.problem


def test_sam_layout(tmp_path):
    for number in range(3):
        draw(tmp_path / "images" / f"sa_{number}.jpg", seed=number)
        (tmp_path / "captions").mkdir(exist_ok=True)
        (tmp_path / "captions" / f"sa_{number}.txt").write_text(f"number {number}", encoding="utf-8")
    assert len(read_dataset(tmp_path)) == 3
    (tmp_path / "partition").mkdir()
    (tmp_path / "partition" / "part0.txt").write_text("sa_1\nsa_2.jpg\nsa_9\n../../etc\n", encoding="utf-8")
    records = read_dataset(tmp_path)
    assert captions(records) == {"sa_1": "number 1", "sa_2": "number 2", "sa_9": None, "../../etc": None}
    assert len(check_records(records)) == 2


def test_hugging_face_dataset(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    files = [draw(tmp_path / f"{number}.png", seed=number) for number in range(2)]
    columns = {"image": [{"bytes": file.read_bytes(), "path": None} for file in files], "text": ["one", "two"]}
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    datasets.Dataset.from_dict(columns, features).save_to_disk(str(tmp_path / "set"))
    (tmp_path / "hub" / "data").mkdir(parents=True)
    for split, number in (("train", 2), ("test", 1)):
        rows = datasets.Dataset.from_dict({name: cells[:number] for name, cells in columns.items()}, features)
        rows.to_parquet(str(tmp_path / "hub" / "data" / f"{split}-00000-of-00001.parquet"))
    (tmp_path / "hub" / "README.md").write_text("as downloaded from the hub")
    for place in ("set", "hub", "hub/data/train-00000-of-00001.parquet"):
        records = read_dataset(tmp_path / place)
        assert captions(records) == {"row 1": "one", "row 2": "two"}
        assert torch.equal(read_picture(records[1].picture), read_picture(FilePicture(files[1])))
    (tmp_path / "hub" / "data" / "train-00000-of-00001.parquet").write_bytes(b"no parquet")
    with pytest.raises(ValueError, match="Dataset cannot be read: got another content"):
        read_dataset(tmp_path / "hub")
    with pytest.raises(ValueError, match="expected one that save_to_disk wrote, or .parquet files"):
        read_dataset(tmp_path, "datasets")


def test_tables_do_not_lead_out_of_a_confined_dataset(tmp_path):
    draw(tmp_path / "secret.png")
    folder = tmp_path / "set"
    draw(folder / "in.png", seed=1)
    rows = ["dir,text", "../secret.png,a", "..\\secret.png,b", f"{tmp_path / 'secret.png'},c", "in.png,d"]
    (folder / "t.csv").write_text("\n".join(rows), encoding="utf-8")
    dataset = check_records(read_dataset(folder, confined=True))
    assert [record.caption for record in dataset.records] == ["d"]
    assert dataset.report.count("leads out of the dataset's folder") == 2
    assert "no such file: '..\\\\secret.png'" in dataset.report  # where a backslash is a letter like others
    assert len(check_records(read_dataset(folder))) == 4


def test_what_is_no_dataset(tmp_path):
    with pytest.raises(FileNotFoundError, match="Dataset not found"):
        read_dataset(tmp_path / "none")
    with pytest.raises(ValueError, match="Unknown dataset kind: got 'zip'"):
        read_dataset(tmp_path, "zip")
    with pytest.raises(ValueError, match="Unknown dataset file: got 'a.zip'"):
        (tmp_path / "a.zip").write_bytes(b"")
        read_dataset(tmp_path / "a.zip")
    with pytest.raises(ValueError, match=f"Empty dataset: got no pictures in .*{tmp_path.name}.*expected files such"):
        read_dataset(tmp_path)
    (tmp_path / "empty.csv").write_text("", encoding="utf-8")
    with pytest.raises(ValueError, match="Empty dataset: got no pictures in .*empty.csv', expected a row for each"):
        read_dataset(tmp_path / "empty.csv")


def make_faulty(folder):
    draw(folder / "good.png", (64, 64), seed=1)
    draw(folder / "twin.png", (64, 64), seed=1)
    draw(folder / "small.png", (64, 20), seed=2)
    draw(folder / "narrow.png", (300, 64), seed=3)
    draw(folder / "mute.png", (64, 64), seed=4)
    cut = draw(folder / "cut.jpg", (64, 64), seed=5, quality=95)
    cut.write_bytes(cut.read_bytes()[:2000])
    (folder / "page.png").write_text("<html>")
    for name in ("good", "twin", "small", "narrow", "cut", "page"):
        (folder / f"{name}.txt").write_text("a shape")
    (folder / "mute.txt").write_text("  \n")
    return read_dataset(folder)


def test_one_table_names_every_problem(tmp_path):
    dataset = check_records(make_faulty(tmp_path), smallest_px=32)
    assert [record.name for record in dataset.records] == ["good.png"]
    lines = dataset.report.splitlines()
    assert lines[0] == "1 pictures; 6 left out"
    assert lines[1] == "duplicate: 1, no caption: 1, too narrow: 1, too small: 1, unreadable: 2"
    kinds = {line[:12].strip() for line in lines[3:]}
    assert kinds == {"duplicate", "no caption", "too narrow", "too small", "unreadable"}
    assert "small.png   64 x 20 px, expected at least 32 on the shorter side" in dataset.report
    with pytest.raises(ValueError, match=r"Dataset with problems:\n1 pictures; 6 left out"):
        check_records(make_faulty(tmp_path), smallest_px=32, policy="error")


def test_a_fallback_caption_and_another_caption_for_the_same_picture(tmp_path):
    draw(tmp_path / "a.png")
    draw(tmp_path / "b.png")
    (tmp_path / "b.txt").write_text("mine")
    dataset = check_records(read_dataset(tmp_path), fallback_caption="a photo of sks dog", is_prior=True)
    assert [record.caption for record in dataset.records] == ["a photo of sks dog", "mine"]
    assert all(record.is_prior for record in dataset.records)
    assert "with another caption: kept" in dataset.report and "left out" not in dataset.report


def test_only_captions_or_only_bad_pictures(tmp_path):
    (tmp_path / "t.csv").write_text("dir,text\nnone.png,a\n")
    with pytest.raises(ValueError, match=r"No usable picture: got 1 entries[\s\S]*no such file: 'none.png'"):
        check_records(read_dataset(tmp_path))


def encoded(image, kind="PNG", **options):
    class Encoded:
        def content(self):
            buffer = io.BytesIO()
            image.save(buffer, kind, **options)
            return buffer.getvalue()

        def open(self, content):
            return Image.open(io.BytesIO(content))

    return Encoded()


def test_picture_modes_become_rgb():
    half = np.full((4, 6), 128, np.uint8)
    wide = np.full((4, 6), 32896, np.uint16)  # 128 / 255 in 16 bits
    for image in (
        Image.fromarray(half),
        Image.fromarray(wide),
        Image.fromarray(np.full((4, 6), 128 / 255, np.float32)),
    ):
        kind = "TIFF" if image.mode == "F" else "PNG"
        pixels = read_picture(encoded(image, kind))
        assert pixels.shape == (4, 6, 3) and torch.allclose(pixels, torch.full_like(pixels, 128 / 255), atol=1e-6)
    palette = Image.fromarray(np.dstack([half, half, half])).quantize(4)
    assert read_picture(encoded(palette)).sub(128 / 255).abs().max() < 0.02
    cmyk = Image.new("CMYK", (6, 4), (0, 255, 255, 0))
    assert read_picture(encoded(cmyk, "JPEG", quality=95))[0, 0].sub(torch.tensor([1.0, 0, 0])).abs().max() < 0.05


def test_transparency_is_laid_over_white():
    pixels = read_picture(encoded(Image.new("RGBA", (2, 2), (255, 0, 0, 0))))
    assert torch.equal(pixels, torch.ones(2, 2, 3))
    half = read_picture(TensorPicture(torch.tensor([1.0, 0.0, 0.0, 0.5]).expand(2, 2, 4)))
    assert torch.equal(half[0, 0], torch.tensor([1.0, 0.5, 0.5]))
    keyed = Image.new("P", (2, 2), 0)
    keyed.putpalette([9, 9, 9])
    assert torch.equal(read_picture(encoded(keyed, transparency=0)), torch.ones(2, 2, 3))


def test_exif_rotation():
    image = Image.new("RGB", (6, 4), "black")
    image.putpixel((0, 0), (255, 255, 255))
    exif = Image.Exif()
    exif[0x0112] = 6
    picture = encoded(image, "PNG", exif=exif)
    pixels = read_picture(picture)
    assert pixels.shape == (6, 4, 3) and pixels[0, -1].sum() == 3
    assert measure_picture(picture, picture.content()) == (6, 4)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "WEBP"])
def test_every_rotation_in_every_format(kind):
    """The corners, row by row, of a wide picture whose first is white."""
    corners = {1: "1000", 2: "0100", 3: "0001", 4: "0010", 5: "1000", 6: "0100", 7: "0001", 8: "0010"}
    image = Image.new("RGB", (48, 32))
    image.paste("white", (0, 0, 16, 16))
    for orientation, expected in corners.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        picture = encoded(image, kind, exif=exif)
        pixels = read_picture(picture)
        assert "".join(str(int(pixels[y, x, 0] > 0.5)) for y in (2, -3) for x in (2, -3)) == expected
        size = (32, 48) if orientation < 5 else (48, 32)
        assert measure_picture(picture, picture.content()) == tuple(pixels.shape[:2]) == size


@pytest.mark.slow
def test_a_huge_picture_is_shrunk_before_it_becomes_floats():
    image = Image.fromarray(np.tile(np.arange(256, dtype=np.uint8), (4200, 17))[:, :4300])
    pixels = read_picture(encoded(image.convert("RGB"), compress_level=1), least_px=(512, 512))
    assert pixels.shape == (1050, 1075, 3)
    assert read_picture(encoded(image, compress_level=1)).shape == (4200, 4300, 3)
    wide = Image.fromarray(np.full((4200, 4300), 32896, np.uint16))
    pixels = read_picture(encoded(wide, compress_level=1), least_px=(512, 512))
    assert pixels.shape == (4200, 4300, 3)  # a mode that PIL cannot average


@pytest.mark.slow
def test_a_picture_beyond_what_pil_decodes_is_named_and_left_out(tmp_path):
    Image.new("1", (20000, 20000)).save(tmp_path / "bomb.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "good.png")
    for name in ("bomb", "good"):
        (tmp_path / f"{name}.txt").write_text("a picture")
    dataset = check_records(read_dataset(tmp_path))
    assert [record.name for record in dataset.records] == ["good.png"]
    assert "unreadable: 1" in dataset.report and "Image size (400000000 pixels) exceeds limit" in dataset.report


def damaged(kind, seed):
    """A small picture with EXIF, with some bytes overwritten, cut off or put in."""
    rng, buffer, exif = Random(f"{kind} {seed}"), io.BytesIO(), Image.Exif()
    exif[0x0112], exif[0x010F], exif[0x011A] = 6, "a camera", 72.0
    noise = np.random.default_rng(0).integers(0, 255, (10, 12, 3), dtype=np.uint8)
    Image.fromarray(noise).save(buffer, kind, exif=exif)
    data = bytearray(buffer.getvalue())
    for _ in range(rng.randint(1, 3)):
        place = rng.randrange(min(len(data), rng.choice([200, 10**6])))
        data[place : place + rng.randint(0, 2)] = rng.randbytes(rng.randint(0, 2))
    return bytes(data)


@pytest.mark.filterwarnings("ignore")  # PIL's, of damaged files
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", "AVIF"])
def test_a_damaged_picture_is_named_or_can_be_read(tmp_path, kind):
    Image.new("RGB", (8, 8)).save(tmp_path / "good.png")
    for seed in range(60):
        (tmp_path / f"{seed}.png").write_bytes(damaged(kind, seed))
    for record in check_records(read_dataset(tmp_path), fallback_caption="x").records:
        assert read_picture(record.picture, (4, 4)).isfinite().all()


def test_a_broken_tag_beside_the_rotation_does_no_harm(tmp_path):
    exif, path = Image.Exif(), tmp_path / "a.jpg"
    exif[0x0112], exif[0x011A] = 6, 72.0
    draw(path, exif=exif)
    data = path.read_bytes()
    resolution = next(tag for tag in (b"\x1a\x01\x05\x00", b"\x01\x1a\x00\x05") if tag in data)
    path.write_bytes(data.replace(resolution, resolution.replace(b"\x05", b"\x02")))  # a fraction turned into text
    (record,) = check_records(read_dataset(tmp_path), fallback_caption="x").records
    assert read_picture(record.picture).shape == (40, 30, 3)


def test_what_is_wrong_with_a_picture_is_told_in_words(tmp_path):
    draw(tmp_path / "good.png")
    draw(tmp_path / "hinted.png", seed=1)
    (tmp_path / "phone.HEIC").write_bytes(b"\0\0\0\x18ftypheic")
    (tmp_path / "edges").mkdir()
    (tmp_path / "edges" / "hinted.png").write_text("<html>")
    dataset = check_records(read_dataset(tmp_path, control_folder=tmp_path / "edges"), fallback_caption="x")
    lines = dataset.report.splitlines()
    assert "unreadable  hinted.png  control picture: no format that can be read here" in lines
    assert "unreadable  phone.HEIC  no format that can be read here" in lines


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP"])
def test_of_a_moving_picture_the_first_frame_counts(tmp_path, kind):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    path = tmp_path / f"a.{kind.lower()}"
    frames[0].save(path, kind, save_all=True, append_images=frames[1:], lossless=True)
    assert read_picture(FilePicture(path))[3, 3].tolist() == [1, 0, 0]


def test_a_picture_that_changes_meanwhile_is_noticed(tmp_path):
    picture = FilePicture(draw(tmp_path / "a.png"))
    with pytest.raises(ValueError, match="Picture has changed while it was encoded"):
        read_picture(picture, expected="0" * 40)


def test_record_without_picture():
    with pytest.raises(ValueError, match="No usable picture"):
        check_records([Record("x", None, "a")])


def test_the_check_can_be_interrupted(tmp_path):
    for number in range(30):
        draw(tmp_path / f"{number}.png", seed=number)
    seen, stop = interrupting(3)
    with pytest.raises(KeyboardInterrupt):
        check_records(read_dataset(tmp_path), fallback_caption="x", progress=stop)
    assert seen == [(1, 30, None), (2, 30, None), (3, 30, None)]


SECRET = "root:x:0:0"


@pytest.mark.parametrize(
    ("name", "text"), [("t.csv", f"{SECRET},b\n{SECRET},c\n"), ("t.jsonl", f'{{"{SECRET}": 1}}\n')]
)
def test_the_content_of_a_file_that_is_not_to_be_told_is_not(name, text, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=r"No picture column in t.\w+: got \d columns without it") as error:
        read_dataset(tmp_path / name, shows_cells=False)
    assert SECRET not in str(error.value)
    draw(tmp_path / "in.png")
    for picture in (f"{SECRET}/x", "in.png", f"../{SECRET}", ""):
        (tmp_path / name).write_text(f"picture,text\n{picture},{SECRET}\n")
        (record,) = read_dataset(tmp_path / name, "csv", Columns("picture", "text"), confined=True, shows_cells=False)
        assert record.name == ("in.png" if picture == "in.png" else "row 1")
        assert SECRET not in record.name + (record.problem or "")


def test_a_table_of_a_million_columns_is_refused(tmp_path):
    (tmp_path / "t.csv").write_text("a," * 10**6 + "\n" + "x\n" * 1000)
    with pytest.raises(ValueError, match="got 1000001 columns in t.csv, expected at most 1000"):
        read_dataset(tmp_path / "t.csv")


@pytest.mark.parametrize("content", ["[" * 100_000, '{"a":' * 100_000])
@pytest.mark.parametrize("name", ["t.jsonl", "data_info.json"])
def test_deep_tables_are_refused_in_words(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match="that is no JSON|no JSON"):
        read_dataset(tmp_path / name)


def test_a_row_with_more_cells_than_columns_is_named_and_not_cut(tmp_path):
    """As commas in texts without quotes make them."""
    for name in ("1.png", "2.png"):
        draw(tmp_path / name, seed=int(name[0]))
    (tmp_path / "t.csv").write_text('dir,text\n1.png,a cat, sitting, grey\n2.png,"a dog, lying"\n', encoding="utf-8")
    dataset = check_records(read_dataset(tmp_path))
    assert [record.caption for record in dataset.records] == ["a dog, lying"]
    assert "1.png" in dataset.report and "2 more cells than the table has columns; put texts with" in dataset.report


def test_of_two_tables_none_is_passed_over_silently(tmp_path):
    draw(tmp_path / "1.png")
    for name in ("a.csv", "metadata.jsonl"):
        (tmp_path / name).write_text("dir,text\n1.png,one\n", encoding="utf-8")
    with pytest.raises(ValueError, match="Which table is meant: got a.csv, metadata.jsonl in .*expected one table"):
        read_dataset(tmp_path)
    assert read_dataset(tmp_path / "a.csv")[0].caption == "one"
    assert read_dataset(tmp_path, "csv")[0].caption == "one" and len(read_dataset(tmp_path, "folder")) == 1
    (tmp_path / "1.txt").write_text("two", encoding="utf-8")  # then the tables are about something else
    assert read_dataset(tmp_path)[0].caption == "two"


def test_a_caption_of_nothing_that_is_seen_is_none(tmp_path):
    for number, text in enumerate(["\u200b", "\ufeff\u200d \u2060", "\u2800\u3164", "\u200bx"]):
        draw(tmp_path / f"{number}.png", seed=number)
        (tmp_path / f"{number}.txt").write_text(text, encoding="utf-8")
    dataset = check_records(read_dataset(tmp_path))
    assert len(dataset.records) == 1 and dataset.report.count("no caption") == 4  # a line for each, and how many
    assert [record.caption for record in check_records(read_dataset(tmp_path), fallback_caption="y").records][0] == "y"


def _picture_bytes(number):
    file = io.BytesIO()
    Image.new("RGB", (32, 16), (number, 0, 0)).save(file, "PNG")
    return file.getvalue()


def _tar(path, **files):
    with tarfile.open(path, "w") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def test_tar_files_in_webdatasets_form(tmp_path):
    _tar(
        tmp_path / "b.tar",
        **{"x/7.png": _picture_bytes(7), "x/7.json": b'{"caption": "seven", "prompt": ["first", "second"]}'},
    )
    _tar(
        tmp_path / "a.tar",
        **{"1.txt": "eins é".encode(), "1.png": _picture_bytes(1), "1.control.png": _picture_bytes(9)},
        **{"2.png": _picture_bytes(2), "3.txt": b"without", "4.left.png": b"", "4.right.png": b"", "5.png": b"broken"},
    )
    records = read_dataset(tmp_path)
    assert [record.name for record in records] == [
        "a.tar/1",
        *(f"a.tar/{number}" for number in range(2, 6)),
        "b.tar/x/7",
    ]
    assert [record.caption for record in records] == ["eins é", None, "without", None, None, "first"]
    assert [bool(record.control) for record in records] == [True, False, False, False, False, False]
    assert read_picture(records[5].picture)[0, 0, 0] == 7 / 255 and records[0].control.content() == _picture_bytes(9)
    assert "no picture of its name" in records[2].problem and "left.png" in records[3].problem
    chosen = read_dataset(tmp_path / "b.tar", columns=Columns(caption="caption", picture="png"))
    assert [record.caption for record in chosen] == ["seven"]
    checked = check_records(records, fallback_caption="any")
    assert len(checked) == 3 and "a.tar/5" in checked.report


def test_sa1b_with_captions_beside_its_tar_files(tmp_path):
    """Its tar files hold sa_N.jpg and sa_N.json with masks; captions of it are published as text files."""
    annotations = json.dumps({"image": {"image_id": 1, "file_name": "sa_1.jpg"}, "annotations": [{"area": 3}]})
    _tar(tmp_path / "sa_000000.tar", **{"./sa_1.jpg": _picture_bytes(3), "./sa_1.json": annotations.encode()})
    (tmp_path / "captions").mkdir()
    (tmp_path / "captions" / "sa_1.txt").write_text("A red wall.")
    (record,) = read_dataset(tmp_path)
    assert record.caption == "A red wall." and record.name == "sa_000000.tar/sa_1" and record.problem is None


def test_all_captions_of_a_list_in_a_tar_file_are_read(tmp_path):
    listed = json.dumps({"caption": ["a wall", "red bricks", "a house"]}).encode()
    _tar(tmp_path / "a.tar", **{"1.png": _picture_bytes(1), "1.json": listed})
    (record,) = read_dataset(tmp_path)
    assert (record.caption, record.others) == ("a wall", ("red bricks", "a house"))


def test_tar_files_that_are_cut_or_none_are_named(tmp_path):
    whole = _tar(tmp_path / "a.tar", **{"1.png": _picture_bytes(1) * 100, "1.txt": b"a"}).read_bytes()
    for data in (whole[:900], b"no tar file" * 100, gzip.compress(whole)):
        (tmp_path / "a.tar").write_bytes(data)
        with pytest.raises(
            ValueError, match="Dataset cannot be read: got no tar file .* in a.tar, expected one that is"
        ):
            read_dataset(tmp_path)


@pytest.mark.slow
def test_parquet_by_other_programs_with_pictures_inside(tmp_path):
    parquet, pa = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    cells = [_picture_bytes(number) for number in range(2)]
    for name, column in (("plain", cells), ("struct", [{"bytes": cell, "path": None} for cell in cells])):
        parquet.write_table(pa.table({"image": column, "text": ["a", "b"]}), tmp_path / f"{name}.parquet")
        records = read_dataset(tmp_path / f"{name}.parquet")
        assert [record.caption for record in records] == ["a", "b"]
        assert read_picture(records[1].picture)[0, 0, 0] == 1 / 255
