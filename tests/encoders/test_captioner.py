"""Captions by a tiny LLaVA of the real classes, and the command that writes them where datasets are read."""

import json
import re
from itertools import count
from pathlib import Path

import pytest
import torch
from PIL import Image

from pixart_pack.pixart.__main__ import main
from pixart_pack.pixart.commands import caption
from pixart_pack.pixart.data.sources import SAM, read_dataset
from pixart_pack.pixart.encoders import captioner as captioners
from pixart_pack.pixart.encoders.captioner import (
    DESCRIBE,
    DESCRIBE_CAPTION,
    CaptionSettings,
    fill_prompt,
    load_captioner,
)
from pixart_pack.tests import processes
from pixart_pack.tests.tiny_llava import write_llava

GREEDY = CaptionSettings(max_tokens=24, temperature=0)
TEMPLATE = "{{ bos_token }}{% for m in messages %}Q {% for c in m.content %}{% if c.type == 'image' %}<image>{% else %}{{ c.text }}{% endif %}{% endfor %}{% endfor %} A"  # noqa: E501


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_llava(tmp_path_factory.mktemp("llava"))


@pytest.fixture(scope="module")
def captioner(folder):
    return load_captioner(folder, torch.float32)


def picture(seed, width=40, height=30):
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (height, width, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def fill(folder, names):
    folder.mkdir(exist_ok=True)
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(exist_ok=True)
        picture(number, 40 + number, 30).save(folder / name)
    return folder


def run(dataset, model, *arguments):
    usual = ["--model", model, "--max-tokens", 12, "--temperature", 0, "--device", "cpu", "--dtype", "fp32"]
    return main([str(each) for each in ("caption", dataset, *usual, *arguments)])


def start(dataset, model, *arguments, each=({},)):
    """The command in processes of its own."""
    usual = ["--model", model, "--temperature", 0, "--device", "cpu", "--dtype", "fp32", "--batch-size", 1]
    return processes.Forked("pixart", "caption", dataset, *usual, *arguments, each=each)


def captions_of(path, kind="auto"):
    return {record.name: record.caption for record in read_dataset(path, kind)}


def test_a_batch_gives_what_each_picture_gives_alone(captioner):
    pictures = [picture(1), picture(2, 700, 20), picture(3, 9, 900)]
    prompts = [DESCRIBE, "What?", "Say all that is to be seen in it, at length"]
    together = captioner(pictures, prompts, GREEDY)
    alone = [captioner([p], [t], GREEDY)[0] for p, t in zip(pictures, prompts, strict=True)]
    assert together == alone
    assert len(set(together)) == 3 and all(together)


def test_the_seed_decides_above_temperature_0_and_leaves_the_generator_alone(captioner):
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    one, again, other = (captioner([picture(1)], ["x"], CaptionSettings(24, 1.5, seed))[0] for seed in (1, 1, 2))
    assert one == again != other
    assert torch.rand(1) == expected


def test_a_template_is_used_and_begins_once(captioner, monkeypatch):
    seen = []
    monkeypatch.setattr(captioner.model, "generate", lambda **inputs: seen.append(inputs) or inputs["input_ids"])
    monkeypatch.setattr(captioner.processor, "chat_template", TEMPLATE)
    tokenizer = captioner.processor.tokenizer
    captioner([picture(1)], ["hello"], GREEDY)
    ids = seen[0]["input_ids"][0].tolist()
    assert ids.count(tokenizer.bos_token_id) == 1 and ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids[-7:]) == "hello A"


def test_long_pictures_are_shrunk_to_the_official_sizes():
    assert captioners.shrink(Image.new("L", (1600, 1000))).size == (640, 400)
    assert captioners.shrink(Image.new("RGBA", (3200, 400))).size == (800, 100)
    assert captioners.shrink(Image.new("RGB", (300, 200))).size == (300, 200)


def test_prompts():
    assert fill_prompt(DESCRIBE_CAPTION, "a {fox}") == DESCRIBE_CAPTION.replace("{}", "a {fox}")
    assert fill_prompt(DESCRIBE_CAPTION, " ") == fill_prompt(DESCRIBE_CAPTION, None) == DESCRIBE
    assert fill_prompt("Which colours?", "a fox") == "Which colours?"


def test_what_is_raised_at_a_token_ends_the_work(captioner):
    tokens = count()

    def stop():
        if next(tokens) == 2:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        captioner([picture(1)], ["x"], GREEDY, stop)
    assert next(tokens) == 3


def test_a_cut_caption_is_told(captioner, caplog):
    captioner([picture(1)], ["x"], CaptionSettings(2, 0))
    assert "1 of 1 captions end within a sentence, after 2 tokens" in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("content", [None, {}, {"model_type": "t5"}])
def test_other_folders_are_refused(tmp_path, content):
    if content is not None:
        (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="Not a captioning model: got"):
        load_captioner(tmp_path)
    assert not captioners.is_captioner_folder(tmp_path)
    with pytest.raises(FileNotFoundError, match="Captioning model not found"):
        load_captioner(tmp_path / "absent")


def test_text_files_beside_the_pictures_and_no_caption_twice(tmp_path, folder):
    pictures = fill(tmp_path / "p", ["a.png", "in/b.jpg", "c.png"])
    (pictures / "a.txt").write_text("mine")
    (pictures / "broken.png").write_bytes(b"no picture")
    assert run(pictures, folder, "--batch-size", 2) == 0
    captions = captions_of(pictures)
    assert captions["a.png"] == "mine" and captions["in/b.jpg"] and captions["broken.png"] is None
    times = {path: path.stat().st_mtime_ns for path in pictures.rglob("*.txt")}
    (pictures / "broken.png").unlink()
    assert run(pictures, tmp_path / "no model is needed") == 0
    assert times == {path: path.stat().st_mtime_ns for path in pictures.rglob("*.txt")}
    assert captioners.is_captioner_folder(folder)


@pytest.mark.parametrize("suffix", [".csv", ".json", ".jsonl"])
def test_tables_are_read_back_whole_and_go_on_after_an_interrupt(tmp_path, folder, suffix, monkeypatch):
    pictures, output = fill(tmp_path / "p", ["a.png", "b, c.png", "d.png"]), tmp_path / "p" / f"dense{suffix}"
    long = 'A "fox",\nor two;\u2028' + "very long " * 500
    asked = []

    def answer(pictures, prompts, settings, on_token=None):
        if len(asked) == 2:
            raise KeyboardInterrupt
        asked.append(prompts)
        return [long.strip()] * len(pictures)

    monkeypatch.setattr(caption, "load_captioner", lambda *_: answer)
    assert run(pictures, folder, "--output", output, "--batch-size", 1) == 130
    assert not output.exists() and len(asked) == 2
    asked.clear()
    assert run(pictures, folder, "--output", output, "--batch-size", 1) == 0
    assert len(asked) == 1
    assert captions_of(output) == dict.fromkeys(["a.png", "b, c.png", "d.png"], long.strip())
    assert sorted(path.name for path in pictures.iterdir()) == sorted(["a.png", "b, c.png", "d.png", output.name])
    fill(pictures, ["e.png"])
    asked.clear()
    assert run(pictures, folder, "--output", output) == 0
    assert len(asked) == 1 and len(captions_of(output)) == 4


def test_short_captions_are_refined_into_another_place(tmp_path, folder, capsys, monkeypatch):
    root = tmp_path / "sam"
    root.mkdir()
    fill(root / "images", ["a.png", "b.png"])
    table = root / "short.csv"
    table.write_text("dir,text\nimages/a.png,a fox\nimages/b.png,\n")
    assert run(table, folder, "--refine") == 1
    assert "Captions would be lost" in capsys.readouterr().err
    prompts = []
    monkeypatch.setattr(
        caption, "load_captioner", lambda *_: lambda pictures, texts, *_: prompts.extend(texts) or list(texts)
    )
    assert run(table, folder, "--refine", "--output", root / "captions") == 0
    assert prompts == [DESCRIBE_CAPTION.replace("{}", "a fox"), DESCRIBE]
    assert list(captions_of(root, SAM).values()) == prompts


def test_processes_share_the_work_and_the_last_writes_the_table(tmp_path, folder, monkeypatch):
    pictures, output = fill(tmp_path / "p", ["a.png", "b.png", "c.png"]), tmp_path / "out.jsonl"
    (pictures / "c.png").write_bytes(b"broken")
    monkeypatch.setattr(caption, "load_captioner", lambda *_: lambda pictures, texts, *_: list(texts))
    for rank in (0, 1):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
        assert not output.exists()
        assert run(pictures, folder, "--output", output) == 0
    assert len(captions_of(output)) == 2


@pytest.mark.parametrize("more", [["--refine"], ["--force"], []])
def test_captions_of_the_dataset_do_not_end_the_work_of_others(tmp_path, folder, monkeypatch, more):
    table, output = fill(tmp_path, ["a.png", "b.png"]) / "short.csv", tmp_path / "out.jsonl"
    table.write_text("dir,text\na.png,a fox\nb.png,an owl\n" if more else "dir,text\na.png,a fox\nb.png,\n")
    monkeypatch.setattr(caption, "load_captioner", lambda *_: lambda pictures, texts, *_: [f"dense {len(texts)}"])
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in (0, 1):
        monkeypatch.setenv("RANK", str(rank))
        assert not output.exists()
        assert run(table, folder, "--output", output, *more) == 0
    assert captions_of(output) == {"a.png": "dense 1" if more else "a fox", "b.png": "dense 1"}


def written(pictures, output):
    """How many captions are there, of a run that may be at work."""
    if output is None:
        return len(list(pictures.glob("*.txt")))
    journal = output.with_name(f".{output.name}.part0")
    return journal.read_text().count("\n") if journal.is_file() else 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dense.json", None])
def test_an_interrupted_process_goes_on_and_captions_nothing_twice(tmp_path, folder, name, captioner, caplog):
    """One that writes a table is followed by two processes of accelerate, which share what is left."""
    names = [f"{number:02}.png" for number in range(6)]
    pictures = fill(tmp_path / "p", names)
    output = tmp_path / name if name else None
    more = ["--max-tokens", 200, *(["--output", output] if output else [])]
    process = start(pictures, folder, *more)
    processes.wait_until(lambda: written(pictures, output), process)
    processes.interrupt(process)
    error = processes.finish(process)[1]
    assert process.returncode == 130, error
    count = written(pictures, output)
    assert 0 < count < len(names) and not (output and output.exists())
    if output:
        process = start(pictures, folder, *more, each=processes.ranks(processes.accelerate()))
        said = processes.finish(process)[1]
        assert process.returncode == 0, said
    else:
        caplog.set_level("INFO")
        assert run(pictures, folder, *more, "--batch-size", 1) == 0
        said = caplog.text
    shares = [int(share) for share in re.findall(rf"{len(names)} pictures, (\d+) to caption here", said)]
    assert sum(shares) == len(names) - count and len(shares) == (2 if output else 1)
    found = captions_of(output or pictures)
    assert {Path(each).name for each in found} == set(names)
    settings = CaptionSettings(max_tokens=200, temperature=0)
    expected = captioner([Image.open(pictures / each) for each in names], [DESCRIBE] * len(names), settings)
    assert list(found.values()) == expected and not list(tmp_path.glob(".*"))
    assert run(pictures, tmp_path / "no model is needed", *(["--output", output] if output else [])) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch-size", "0"], "Batch size out of range"),
        (["--temperature", "-1"], "Caption settings out of range"),
        (["--output", "x.xlsx"], "Unknown output"),
        (["--output", "TABLE"], "Table would be overwritten"),
    ],
)
def test_bad_input_is_told_before_the_model_is_loaded(tmp_path, arguments, message, capsys):
    table = fill(tmp_path, ["a.png"]) / "short.csv"
    table.write_text("dir,text\na.png,a fox\n")
    assert run(table, tmp_path, *[table if each == "TABLE" else each for each in arguments]) == 1
    assert message in capsys.readouterr().err


def test_two_pictures_of_one_name_need_a_table(tmp_path, folder, capsys):
    assert run(fill(tmp_path, ["a.png", "a.jpg"]), folder) == 1
    assert "Two captions in one file: got 'a.jpg' and 'a.png'" in capsys.readouterr().err
