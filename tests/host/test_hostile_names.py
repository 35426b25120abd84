"""Names and paths of strangers, in every text and list of every node: nothing outside the host's folders is touched."""

import importlib
import math
import os
import shutil
import sys
import sysconfig
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from pixart_pack.tests.host.hostile import SECRET, names_for, write_decoy
from pixart_pack.tests.tiny_pixart import make_weights, tiny_config
from pixart_pack.tests.training_data import make_features

ROOT = Path(__file__).resolve().parent.parent.parent
CONFIG = tiny_config()
_EVENTS = {"open", "os.listdir", "os.scandir", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.chmod"}
_seen: list[tuple[str, str]] | None = None  # what was opened while it is watched


def _watch(event: str, values: tuple) -> None:
    if _seen is not None and event in _EVENTS and values and isinstance(values[0], str | bytes | os.PathLike):
        _seen.append((event, os.fsdecode(values[0])))


@pytest.fixture
def opened():
    """A list of (event, path) that grows while the test runs. A hook cannot be taken away again; it is idle later."""
    global _seen
    if not hasattr(sys, "_pixart_watched"):
        sys._pixart_watched = True
        sys.addaudithook(_watch)
    _seen = []
    yield _seen
    _seen = None


@pytest.fixture(scope="module")
def places(pack):
    """The host's folders by their names, a decoy beside them, and a link to the decoy in the input folder."""
    folder_paths = importlib.import_module("folder_paths")
    base = Path(folder_paths.base_path)
    decoy = write_decoy(base.parent / f"{base.name}_outside")
    found = {
        "input": Path(folder_paths.get_input_directory()),
        "output": Path(folder_paths.get_output_directory()),
        "models": Path(folder_paths.models_dir),
        "base": base,
        "decoy": decoy,
    }
    found["input"].mkdir(parents=True, exist_ok=True)
    (found["input"] / "way_out").symlink_to(decoy / "table.csv")
    yield found
    (found["input"] / "way_out").unlink()
    shutil.rmtree(decoy)


@pytest.fixture
def exposed(monkeypatch, comfy):
    """The host as one that others can reach."""
    monkeypatch.setattr(importlib.import_module("comfy.cli_args").args, "listen", "0.0.0.0")


@pytest.fixture
def private(monkeypatch, comfy):
    monkeypatch.setattr(importlib.import_module("comfy.cli_args").args, "listen", "127.0.0.1,::1")


@pytest.fixture(scope="module")
def connected(pack):
    """A value for each kind of link, as far as texts and lists are read with it."""
    denoiser = importlib.import_module("pixart_pack.nodes.host.denoiser.model")
    dataset = importlib.import_module("pixart_pack.nodes.host.training.dataset")
    t5 = importlib.import_module("pixart_pack.nodes.host.text.t5")
    image = torch.rand(1, 64, 64, 3)
    caption = [[torch.randn(1, 3, CONFIG.caption_channels), {"pooled_output": None}]]
    with torch.inference_mode():
        model = denoiser.make_patcher(make_weights(CONFIG), CONFIG, torch.float32)
    return {
        "MODEL": model,
        "CLIP": t5.load_t5(ROOT / "demo" / "models" / "text_encoders" / "pixart_demo_t5.safetensors"),
        "VAE": SimpleNamespace(latent_channels=4, latent_dim=2, vae_dtype=torch.float32),
        "IMAGE": image,
        "LATENT": {"samples": torch.zeros(1, 4, 8, 8)},
        "CONDITIONING": caption,
        "PIXART_DATASET": dataset.dataset_of_images([image], ["a caption"]),
        "PIXART_FEATURES": make_features(count=4, hint=True),
    }


FEW = {"steps": 1, "rank": 1, "max_tokens": 1, "control_blocks": 1, "caption_length": 20, "resolution": 64}


def usual(node, connected) -> dict:
    """Inputs that a node runs with, or could."""
    fields = node.GET_SCHEMA()
    values = {}
    for field in fields.inputs:
        kind, default = field.get_io_type(), getattr(field, "default", None)
        if kind == "COMBO":
            values[field.id] = default if default is not None else next(iter(field.options), "x")
        elif kind in ("INT", "FLOAT", "BOOLEAN"):
            values[field.id] = default if default is not None else 1
            if field.id in FEW and kind == "INT":
                values[field.id] = FEW[field.id]
        elif kind == "STRING":
            values[field.id] = default if default is not None else "x"
        elif kind in connected:
            values[field.id] = connected[kind]
        elif not field.optional:
            values[field.id] = None
    return {name: [value] for name, value in values.items()} if fields.is_input_list else values


# Inputs that name files and folders.
NAMING = (
    *("path", "control_folder", "embeddings", "name", "folder", "filename_prefix", "checkpoint", "vae", "decoder"),
    *("text_encoder", "tokenizer", "lora", "control_net", "controlnet", "pipeline", "model", "hed_model", "place"),
)


def texts_of(pack) -> list[tuple]:
    """(node, input) for every text and list."""
    kinds = ("STRING", "COMBO")
    return [(node, field.id) for node in pack for field in node.GET_SCHEMA().inputs if field.get_io_type() in kinds]


def outside(opened, places) -> list[tuple[str, str]]:
    """What was touched that is neither the host's nor of the programs themselves."""
    programs = (sys.prefix, sys.base_prefix, sysconfig.get_path("stdlib"), os.environ["PIXART_COMFYUI"], ROOT)
    allowed = [Path(os.path.realpath(each)) for each in (*programs, places["base"], "/proc", "/sys", "/dev")]
    found = []
    for event, path in opened:
        real = Path(os.path.realpath(path))
        if real.is_relative_to(os.path.realpath(places["decoy"])) or not any(map(real.is_relative_to, allowed)):
            found.append((event, path))
    return found


def test_no_text_of_any_node_leads_out(pack, places, connected, exposed, opened):
    inputs, names = texts_of(pack), names_for(places["decoy"], [places[each] for each in ("input", "output", "models")])
    names += ["way_out"]
    assert len(inputs) > 80 and len(names) > 30
    told = []
    compiling = next(node for node in pack if node.GET_SCHEMA().node_id == "PixArtCompile")
    compiling.EXECUTE_NORMALIZED(**usual(compiling, connected))  # once PyTorch tries the compiler, in temporary folders
    opened.clear()  # of the test itself
    for number, (node, name) in enumerate(inputs):
        plain, is_list = usual(node, connected), node.GET_SCHEMA().is_input_list
        # What names no file gets every fourth of them, each of the four in turn.
        for hostile in names if name in NAMING else names[number % 4 :: 4]:
            values = {**plain, name: [hostile] if is_list else hostile}
            try:
                with torch.inference_mode():
                    result = node.EXECUTE_NORMALIZED(**values)
                told.append(str(result.ui.as_dict() if hasattr(result.ui, "as_dict") else result.ui))
            except Exception as error:
                told.append(str(error))
            assert not outside(opened, places), (node.__name__, name, hostile)
            assert SECRET not in told[-1], (node.__name__, name, hostile)
            opened.clear()
            if "fingerprint_inputs" in vars(node):
                with_name = {name: hostile} if name in ("path", "embeddings") else {"path": "", name: hostile}
                node.fingerprint_inputs(**with_name)
                assert not outside(opened, places), (node.__name__, name, hostile)
                opened.clear()
    base = str(places["base"]) + os.sep
    assert not [text for text in told if base in text]


PLAIN = "$HOME/x"  # nothing expands it: an ordinary folder below the output folder
FILES = {
    ("PixArtDataset", "path"),
    ("PixArtDataset", "control_folder"),
    ("PixArtLoadFeatures", "path"),
    ("PixArtLoadPromptEmbeddings", "embeddings"),
    ("PixArtEncodeDataset", "name"),
    ("PixArtRunLog", "folder"),
}


def test_names_of_files_are_refused_in_the_houses_words(pack, places, connected, exposed):
    """All names: typed paths, outputs and what is chosen from lists of files."""
    names = names_for(places["decoy"], [places["input"]])
    lists = ("checkpoint", "vae", "decoder", "text_encoder", "tokenizer", "lora", "control_net", "filename_prefix")
    inputs = [
        (node, name)
        for node, name in texts_of(pack)
        if (node.GET_SCHEMA().node_id, name) in FILES or name in lists or name == "name"
    ]
    assert len(inputs) > 15
    strange = []
    for node, name in inputs:
        plain, is_list = usual(node, connected), node.GET_SCHEMA().is_input_list
        for hostile in names:
            if hostile == PLAIN and name in ("filename_prefix", "name", "folder"):
                continue
            said = None
            try:
                with torch.inference_mode():
                    node.EXECUTE_NORMALIZED(**{**plain, name: [hostile] if is_list else hostile})
            except (ValueError, FileNotFoundError) as error:
                said = str(error)
            except Exception as error:
                said = repr(error)
            in_words = said is not None and ": got " in said and "expected" in said and said.isprintable()
            if not in_words:
                strange.append((node.__name__, name, hostile, said))
    assert not strange


def test_a_private_host_reads_other_folders_and_tells_nothing_of_them(run_node, places, private):
    table = places["decoy"] / "table.csv"
    for columns in ({}, {"picture_column": SECRET}, {"caption_column": "x"}):
        with pytest.raises(ValueError, match="No usable picture|No caption column") as error:
            run_node("PixArtDataset", path=str(table), kind="csv", **columns)
        given = columns.get("picture_column", "")
        assert SECRET not in str(error.value).replace(repr(given), "")


@pytest.mark.parametrize("way", ["variable", "file"])
def test_the_owner_opens_a_folder(run_node, places, exposed, monkeypatch, way):
    folder_paths = importlib.import_module("folder_paths")
    table = str(places["decoy"] / "table.csv")
    with pytest.raises(ValueError, match=r"Dataset is not open to prompts: got .*pixart_folders\.txt"):
        run_node("PixArtDataset", path=table, kind="csv")
    file = Path(folder_paths.get_user_directory(), "pixart_folders.txt")
    if way == "variable":
        monkeypatch.setenv("PIXART_FOLDERS", os.pathsep.join(["/nowhere", str(places["decoy"])]))
    else:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"# of the owner\n\n{places['decoy']}\n", encoding="utf-8")
    try:
        for path in (table, "way_out"):
            with pytest.raises(ValueError, match="No usable picture"):
                run_node("PixArtDataset", path=path, kind="csv")
    finally:
        file.unlink(missing_ok=True)


@pytest.mark.parametrize(
    ("listen", "is_private"),
    [
        ("127.0.0.1", True),
        ("::1", True),
        ("localhost", True),
        ("127.0.0.1, [::1],127.9.9.9", True),
        ("0.0.0.0,::", False),
        ("127.0.0.1,192.168.1.2", False),
        ("", False),
        ("my-host", False),
        ("::", False),
    ],
)
def test_who_can_send_prompts(pack, monkeypatch, listen, is_private):
    folders = importlib.import_module("pixart_pack.nodes.host.folders")
    monkeypatch.setattr(folders.args, "listen", listen)
    assert folders.is_private() == is_private
    monkeypatch.setattr(folders.args, "listen", "127.0.0.1")
    for name, value in (("multi_user", True), ("enable_cors_header", "*")):
        with monkeypatch.context() as patch:
            patch.setattr(folders.args, name, value)
            assert not folders.is_private()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_none_are_refused(pack, connected, value):
    inputs = [(node, field.id) for node in pack for field in node.GET_SCHEMA().inputs if field.get_io_type() == "FLOAT"]
    assert len(inputs) > 20
    for node, name in inputs:
        given = [value] if node.GET_SCHEMA().is_input_list else value
        with pytest.raises(ValueError, match=f"Number that is none: got {name} = "):
            node.EXECUTE_NORMALIZED(**{**usual(node, connected), name: given})


def test_paths_are_shown_from_the_hosts_folders(pack, places):
    folders = importlib.import_module("pixart_pack.nodes.host.folders")
    file = places["output"] / "loras" / "a b.safetensors"
    assert folders.show_path(file) == "output/loras/a b.safetensors"
    assert folders.show_path(places["models"] / "vae" / "x.pt") == "models/vae/x.pt"
    assert folders.show_path("/somewhere/else/x.csv") == "x.csv"
    text = f"cannot open '{file}' of {places['output']}, and {places['base']}x stays"
    assert (
        folders.hide_paths(text) == f"cannot open 'output/loras/a b.safetensors' of output, and {places['base']}x stays"
    )


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such modes")
def test_what_holds_prompts_is_the_accounts_alone(run_node, connected, places):
    (name,) = run_node(
        "PixArtSavePromptEmbeddings", conditioning=connected["CONDITIONING"], filename_prefix="private/prompt"
    )
    run_node("PixArtRunLog", images=[connected["IMAGE"]], folder=["private_log"], prompt=["a prompt"])
    output = places["output"]
    try:
        for folder in ("private", "private_log"):
            assert (output / folder).stat().st_mode & 0o777 == 0o700
        for file in (output / name.removeprefix("output/"), output / "private_log" / "log.jsonl"):
            assert file.stat().st_mode & 0o777 == 0o600
    finally:
        for folder in ("private", "private_log"):
            shutil.rmtree(output / folder)


@pytest.mark.skipif(os.name == "nt", reason="Windows makes links for administrators alone")
def test_links_lead_no_prompt_out(run_node, places, exposed, opened):
    """A picture, a caption and a folder that are links to what lies outside."""
    folder, decoy = places["input"] / "linked", places["decoy"]
    folder.mkdir()
    try:
        Image.new("RGB", (64, 64)).save(folder / "a.png")
        Image.new("RGB", (64, 64)).save(decoy / "b.png")
        (decoy / "b.txt").write_text(SECRET)
        (folder / "a.txt").symlink_to(decoy / "b.txt")
        (folder / "c.png").symlink_to(decoy / "b.png")
        (folder / "further").symlink_to(decoy, target_is_directory=True)
        opened.clear()
        try:
            said = str(run_node("PixArtDataset", path="linked", kind="folder"))
        except ValueError as error:
            said = str(error)
        read = [path for event, path in opened if event == "open" and Path(path).resolve().is_relative_to(decoy)]
        assert not read and SECRET not in said
    finally:
        shutil.rmtree(folder)
        for name in ("b.png", "b.txt"):
            (decoy / name).unlink()


def test_what_nodes_say_is_bounded_and_hides_the_servers_folders(pack, places):
    schema = importlib.import_module("pixart_pack.nodes.host.schema")
    latest = importlib.import_module("comfy_api.latest")
    place, long = places["output"], schema.MOST_LETTERS * 2
    secret = f"{place}/loras/a.safetensors" + "x" * long

    class Talking(latest.io.ComfyNode):
        @classmethod
        def define_schema(cls):
            return latest.io.Schema(node_id="PixArtTalking", category="PixArt", inputs=[])

        @classmethod
        def execute(cls, how):
            if how == "error":
                raise RuntimeError(secret)
            return latest.io.NodeOutput(ui=latest.ui.PreviewText(secret) if how == "text" else {"text": [secret]})

    run = schema.guard(Talking).execute
    said = [run(how="text").ui.value, run(how="list").ui["text"][0]]
    with pytest.raises(RuntimeError) as caught:
        run(how="error")
    for text in (*said, str(caught.value)):
        assert text.startswith("output/loras/a.safetensorsxx") and "letters more" in text[-30:]
        assert str(place) not in text and len(text) < long
