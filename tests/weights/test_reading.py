"""Files of weights: every published form is read, nothing in them is run, and writing is whole or not at all."""

import argparse
import dataclasses
import io
import json
import os
import pathlib
import pickle
import subprocess
import sys
import tarfile
import zipfile

import pytest
import torch
from safetensors.torch import load_file, save_file

from pixart_pack.pixart import CONFIGS, PixArt, PixArtConfig
from pixart_pack.pixart.checkpoint import CONFIG_KEY, NULL_CAPTION_KEY, expected_shapes, to_diffusers
from pixart_pack.pixart.files.atomic import write_atomically
from pixart_pack.pixart.weights.folders import TEXT_ENCODER_STEMS
from pixart_pack.pixart.weights.reading import open_weights, read_checkpoint, read_tensors
from pixart_pack.pixart.weights.saving import diffusers_config, save_checkpoint
from pixart_pack.pixart.weights.wrappers import identify

CONFIG = PixArtConfig(
    depth=2, hidden_size=72, num_heads=1, caption_channels=16, caption_length=120, micro_condition=False, base_size=32,
    pe_scale=1.0,
)  # fmt: skip
ROOT = pathlib.Path(__file__).resolve().parents[2]


def random_weights(config=CONFIG, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in expected_shapes(config).items()}


def original_file(config=CONFIG, **kwargs):
    """Weights as in an original file: with the position grid, which tells the trained size."""
    return random_weights(config, **kwargs) | {"pos_embed": torch.zeros(1, config.base_size**2, config.hidden_size)}


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def as_bytes(tensors):
    return {name: tensor.contiguous().flatten().view(torch.uint8) for name, tensor in tensors.items()}


def lies_in_a_mapping(tensor, path):
    """Whether the tensor's bytes are a mapped file at or under `path`."""
    for line in pathlib.Path("/proc/self/maps").read_text().splitlines():
        start, end = (int(number, 16) for number in line.split()[0].split("-"))
        if start <= tensor.data_ptr() < end:
            return str(path) in line
    return False


# PyTorch files


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("wrap", [dict, lambda weights: {"state_dict": weights, "epoch": 3, "step": 17}])
def test_pth_is_read(tmp_path, zipped, wrap):
    torch.save(wrap(original_file()), tmp_path / "model.pth", _use_new_zipfile_serialization=zipped)
    checkpoint = read_checkpoint(tmp_path / "model.pth")
    assert same(checkpoint.state_dict, random_weights())
    assert checkpoint.config == CONFIG and checkpoint.has_null_caption
    PixArt(checkpoint.config, device="meta").load_state_dict(checkpoint.state_dict, assign=True)


class Schedule:
    """A foreign object with state of its own, as a training checkpoint holds them."""

    def __init__(self):
        self.base_lrs = [2e-5]
        self.table = {"a": (1, 2.0, None), "path": pathlib.Path("x")}


@pytest.mark.filterwarnings("ignore:Detected pickle protocol 4")
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("protocol", [2, 4])
def test_foreign_objects_are_skipped(tmp_path, zipped, protocol, caplog):
    caplog.set_level("INFO")
    averaged = original_file(seed=2)
    content = {
        "args": argparse.Namespace(lr=2e-5, nested=argparse.Namespace(names=["a", "b"], schedule=Schedule())),
        "state_dict": original_file(seed=1),
        "state_dict_ema": averaged,
        "optimizer": torch.optim.AdamW([torch.nn.Parameter(torch.zeros(2))]).state_dict(),
        "scheduler": Schedule(),
        "dtype": torch.bfloat16,
        "shape": torch.Size([1, 2]),
    }
    torch.save(content, tmp_path / "x.pth", _use_new_zipfile_serialization=zipped, pickle_protocol=protocol)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "x.pth", weights_only=True)
    checkpoint = read_checkpoint(tmp_path / "x.pth")
    assert torch.equal(checkpoint.state_dict["t_block.1.weight"], averaged["t_block.1.weight"])
    trained = random_weights(seed=1)
    assert torch.equal(checkpoint.state_dict[NULL_CAPTION_KEY], trained[NULL_CAPTION_KEY])
    assert same(read_checkpoint(tmp_path / "x.pth", weights="model").state_dict, trained)
    assert "argparse.Namespace" in caplog.text


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_every_kind_of_tensor_is_read_as_torch_reads_it(tmp_path, zipped):
    base = torch.arange(24.0)
    content = {
        "view": base[4:16].view(3, 4),
        "transposed": base.view(4, 6).t(),
        "expanded": torch.ones(1, 3).expand(5, 3),
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 3),
        "parameter": torch.nn.Parameter(torch.randn(3)),
        "double": torch.randn(2, dtype=torch.float64),
        "half": torch.randn(3).half(),
        "bfloat": torch.randn(3).bfloat16(),
        "float8": torch.randn(3).to(torch.float8_e4m3fn),
        "integer": torch.arange(3),
        "flags": torch.tensor([True, False]),
    }
    content["parameter"].note = "an attribute"
    torch.save(content, tmp_path / "x.pth", _use_new_zipfile_serialization=zipped)
    tensors, _ = read_tensors(tmp_path / "x.pth")
    for name, expected in content.items():
        assert tensors[name].dtype == expected.dtype and tensors[name].shape == expected.shape, name
    assert same(as_bytes(tensors), as_bytes({name: tensor.detach() for name, tensor in content.items()}))


@pytest.mark.skipif(not pathlib.Path("/proc/self/maps").exists(), reason="Linux tells what is mapped")
def test_all_is_mapped_but_what_is_merged(tmp_path):
    weights = random_weights()
    for name, tensors in (("original", weights), ("split", to_diffusers(weights))):
        torch.save(tensors, tmp_path / f"{name}.pth")
        save_file(tensors, tmp_path / f"{name}.safetensors")
    for ending in ("pth", "safetensors"):
        file = tmp_path / f"original.{ending}"
        mapped = read_checkpoint(file).state_dict["t_block.1.weight"]
        assert lies_in_a_mapping(mapped, file)
        mapped.zero_()  # the map is private: the file keeps its numbers
        assert same(read_checkpoint(file).state_dict, weights)
        file = tmp_path / f"split.{ending}"
        read = read_checkpoint(file).state_dict
        owned = {name for name, tensor in read.items() if not lies_in_a_mapping(tensor, file)}
        assert {name.rpartition(".")[0].partition(".")[2].partition(".")[2] for name in owned} == {
            "attn.qkv",
            "cross_attn.kv_linear",
        }


def test_whole_pickled_model_says_what_is_wrong(tmp_path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "x.pth")
    with pytest.raises(ValueError, match=r"x\.pth: No weights in this file: got a whole pickled object.*state_dict"):
        read_checkpoint(tmp_path / "x.pth")


# Hostile files


class Call:
    """Pickles as a call of any function."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


def hostile_objects(canary):
    """Objects whose unpickling by pickle.load makes the file `canary`."""
    code = f"open({str(canary)!r}, 'w').close()"
    return {
        "os.system": Call(os.system, f"touch {canary}"),
        "eval": Call(eval, code),
        "exec": Call(exec, code),
        "popen": Call(subprocess.Popen, ["touch", str(canary)]),
        "import": Call(getattr, Call(__import__, "pathlib"), "Path"),
        "getattr": Call(getattr, Call(__import__, "os"), "system"),
        "decoded": Call(eval, Call(str, code.encode(), "utf-8")),
        "nested": argparse.Namespace(inner=[{"deep": (Call(eval, code),)}]),
        "key": {Call(eval, code): 1},
    }


@pytest.fixture
def canary(tmp_path):
    path = tmp_path / "canary"
    yield path
    assert not path.exists(), "the file ran code"


def test_the_canary_would_sing(tmp_path):
    for name, thing in hostile_objects(tmp_path / "canary").items():
        if name in ("os.system", "eval", "exec", "decoded", "nested"):
            with pytest.MonkeyPatch.context() as patch:
                patch.delattr(argparse.Namespace, "__eq__")  # hashable, so that pickle.loads accepts it anywhere
                pickle.loads(pickle.dumps(thing))
            (tmp_path / "canary").unlink()


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("name", hostile_objects("x"))
def test_hostile_file_runs_nothing(tmp_path, canary, name, zipped):
    weights = original_file()
    torch.save({"args": hostile_objects(canary)[name], "state_dict": weights}, tmp_path / "evil.pth",
               _use_new_zipfile_serialization=zipped)  # fmt: skip
    del weights["pos_embed"]
    assert same(read_checkpoint(tmp_path / "evil.pth").state_dict, weights)
    torch.save(weights | {"t_block.1.weight": hostile_objects(canary)[name]}, tmp_path / "evil.pth",
               _use_new_zipfile_serialization=zipped)  # fmt: skip
    with pytest.raises(ValueError, match=r"evil\.pth.*t_block\.1\.weight"):
        read_checkpoint(tmp_path / "evil.pth")


def write_zip(path, pickled, entries=()):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        for name, data in entries:
            archive.writestr(f"archive/{name}", data)


PROTOCOL = b"\x80\x02"
HAND_WRITTEN = {
    "getattr chain": (
        b"c__builtin__\ngetattr\n(c__builtin__\n__import__\n(S'os'\ntRS'system'\ntR(S'touch CANARY'\ntR."
    ),
    "global": b"cos\nsystem\n(S'touch CANARY'\ntR.",
    "python 2 name": b"c__builtin__\neval\n(S\"open('CANARY','w')\"\ntR.",
    "instance": b"(S'touch CANARY'\nios\nsystem\n.",
    "object": b"(cos\nsystem\nS'touch CANARY'\no.",
    "dotted": b"\x80\x04\x8c\x05torch\x8c\x1aserialization.pickle.loads\x93\x8c\x01x\x85R.",
    "dotted builtins": b"\x80\x04\x8c\x08builtins\x8c\x0eeval.__call__\x93\x8c\x011\x85R.",
    "new object": b"csubprocess\nPopen\n(S'touch CANARY'\nt\x81.",
    "build": b"ctorch._utils\n_rebuild_tensor_v2\n}S'_call'\ncos\nsystem\nsb(S'touch CANARY'\ntR.",
    "build class": b"ccollections\nOrderedDict\n}S'__setitem__'\ncos\nsystem\nsb.",
    "subclass": b"ctorch._tensor\n_rebuild_from_type_v2\n(cos\nsystem\nN(S'touch CANARY'\ntNtR.",
    "storage": b"(S'module'\ncos\nsystem\nS'touch CANARY'\nNtQ.",
    "storage type": b"(S'storage'\ncos\nsystem\nS'0'\nS'cpu'\nI4\ntQ.",
    "persistent text": b"Pstorage\n.",
    "extension": b"\x82\x01.",
}


@pytest.mark.parametrize("name", HAND_WRITTEN)
def test_hand_written_pickle_runs_nothing(tmp_path, canary, name):
    opcodes = HAND_WRITTEN[name].replace(b"CANARY", str(canary).encode())
    write_zip(tmp_path / "evil.pth", opcodes if opcodes[:1] == b"\x80" else PROTOCOL + opcodes)
    with pytest.raises(ValueError, match=r"evil\.pth"):
        read_checkpoint(tmp_path / "evil.pth")
    (tmp_path / "legacy.pth").write_bytes(PROTOCOL + opcodes.removeprefix(b"\x80\x04"))
    with pytest.raises(ValueError, match=r"legacy\.pth"):
        read_checkpoint(tmp_path / "legacy.pth")


def test_hostile_file_leaves_the_reader_as_it_was(tmp_path):
    write_zip(tmp_path / "evil.pth", PROTOCOL + HAND_WRITTEN["build"])
    with pytest.raises(ValueError, match="evil"):
        read_checkpoint(tmp_path / "evil.pth")
    torch.save(original_file(), tmp_path / "good.pth")
    assert same(read_checkpoint(tmp_path / "good.pth").state_dict, random_weights())


@pytest.mark.parametrize(
    "change",
    [
        {"shape": (9, 9)},
        {"stride": (2**40, 1)},
        {"offset": 5},
        {"offset": -1},
        {"shape": (-2, -2)},
        {"shape": (2,)},
        {"shape": (2.0, 2.0)},
        {"count": 2**61},
        {"count": -4},
        {"key": "missing"},
        {"key": ["unhashable"]},
    ],
)
def test_tensor_that_reaches_beyond_its_storage_is_refused(tmp_path, change):
    class Stored:
        def __reduce__(self):
            return torch._utils._rebuild_tensor_v2, (
                Bytes(), change.get("offset", 0), change.get("shape", (2, 2)), change.get("stride", (2, 1)), False, {},
            )  # fmt: skip

    class Bytes:
        pass

    class Pickler(pickle.Pickler):
        def persistent_id(self, thing):
            if isinstance(thing, Bytes):
                return "storage", torch.FloatStorage, change.get("key", "0"), "cpu", change.get("count", 4)
            return None

    buffer = io.BytesIO()
    Pickler(buffer, 2).dump({"blocks.0.mlp.fc1.bias": Stored()})
    write_zip(tmp_path / "x.pth", buffer.getvalue(), [("data/0", bytes(16))])
    with pytest.raises(ValueError, match=r"x\.pth"):
        read_tensors(tmp_path / "x.pth")


# Files that are something else


def tar_bytes():
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("storages"))
    return buffer.getvalue()


def zip_bytes(name, compression=zipfile.ZIP_STORED):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        archive.writestr(name, pickle.dumps({}, 2) + bytes(100))
    return buffer.getvalue()


OTHER_FILES = {
    "empty": (b"", "Empty file"),
    "web page": (b"\n<!DOCTYPE html><html><body>Sign in</body></html>", "got a web page"),
    "lfs": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
        "got a Git LFS pointer",
    ),
    "gguf": (b"GGUF\x03\x00\x00\x00" + bytes(64), "No weights in this file"),
    "gzip": (b"\x1f\x8b\x08" + bytes(64), "got a gzip archive"),
    "tar": (tar_bytes(), "tar archive"),
    "zip": (zip_bytes("readme.txt"), "zip archive of other files"),
    "packed": (zip_bytes("archive/data.pkl", zipfile.ZIP_DEFLATED), "compressed or locked"),
    "json": (b'{"error": "not found"}', "unknown kind"),
    "pickle": (pickle.dumps({"a": 1}, 2), "a pickle of something else"),
    "noise": (bytes(range(256)), "unknown kind"),
}


@pytest.mark.parametrize("name", OTHER_FILES)
@pytest.mark.parametrize("ending", ["pth", "safetensors"])
def test_other_files_are_told(tmp_path, name, ending):
    content, message = OTHER_FILES[name]
    (tmp_path / f"strange.{ending}").write_bytes(content)
    with pytest.raises(ValueError, match=f"(?s)(strange.*{message}|{message}.*strange)"):
        read_checkpoint(tmp_path / f"strange.{ending}")


def test_torchscript_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "program.pth", "w") as archive:
        for name in ("data.pkl", "constants.pkl", "code/program.py"):
            archive.writestr(f"program/{name}", pickle.dumps({}, 2))
    with pytest.raises(ValueError, match=r"TorchScript program in 'program\.pth'"):
        read_checkpoint(tmp_path / "program.pth")


def test_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.pth"):
        read_checkpoint(tmp_path / "nowhere.pth")


@pytest.mark.parametrize("ending", ["pth", "legacy.pth", "safetensors"])
@pytest.mark.parametrize("part", [0.001, 0.3, 0.9, 0.9999])
def test_truncated_file_is_named(tmp_path, ending, part):
    file = tmp_path / f"part.{ending}"
    if ending == "safetensors":
        save_file(original_file(), file)
    else:
        torch.save(original_file(), file, _use_new_zipfile_serialization=ending == "pth")
    file.write_bytes(file.read_bytes()[: int(file.stat().st_size * part)])
    with pytest.raises(ValueError, match=rf"part\.{ending}"):
        read_checkpoint(file)


def test_content_counts_and_not_the_ending(tmp_path):
    save_file(original_file(), tmp_path / "a.pth")
    torch.save(original_file(), tmp_path / "b.safetensors")
    for name in ("a.pth", "b.safetensors"):
        assert same(read_checkpoint(tmp_path / name).state_dict, random_weights())


def test_wrong_weights_are_named_with_their_file(tmp_path):
    save_file(original_file() | {"blocks.0.attn.proj.bias": torch.zeros(71)}, tmp_path / "odd.safetensors")
    with pytest.raises(ValueError, match=r"odd\.safetensors: .*blocks\.0\.attn\.proj\.bias"):
        read_checkpoint(tmp_path / "odd.safetensors")
    save_file({"a.lora_A.weight": torch.zeros(1)}, tmp_path / "style.safetensors")
    with pytest.raises(ValueError, match=r"style\.safetensors: .*a LoRA.*Load PixArt LoRA"):
        read_checkpoint(tmp_path / "style.safetensors")


@pytest.mark.parametrize(("rows", "kept"), [(120, True), (60, False)])
def test_null_caption_that_says_nothing_is_left_out(tmp_path, rows, kept):
    zeros = original_file() | {NULL_CAPTION_KEY: torch.zeros(120, 16)}
    save_file(zeros, tmp_path / "zeros.safetensors")
    assert not read_checkpoint(tmp_path / "zeros.safetensors").has_null_caption
    save_file(original_file() | {NULL_CAPTION_KEY: torch.ones(rows, 16)}, tmp_path / "ones.safetensors")
    assert read_checkpoint(tmp_path / "ones.safetensors", variant="alpha-512").has_null_caption == kept
    shorter = read_checkpoint(tmp_path / "ones.safetensors", caption_length=40)
    assert shorter.state_dict[NULL_CAPTION_KEY].shape == (40, 16)


# Diffusers folders


def make_folder(path, *, name="diffusion_pytorch_model.safetensors", root=True, vae_scale=None, **fields):
    """A pipeline folder around the tiny model; returns the transformer's folder."""
    folder = path / "transformer" if root else path
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(diffusers_config(CONFIG) | fields))
    if root:
        (path / "model_index.json").write_text('{"_class_name": "PixArtAlphaPipeline"}')
    if vae_scale:
        (path / "vae").mkdir()
        (path / "vae" / "config.json").write_text(json.dumps({"scaling_factor": vae_scale}))
    if name:
        write = torch.save if name.endswith(".bin") else save_file
        write({key: tensor.clone() for key, tensor in to_diffusers(random_weights()).items()}, folder / name)
    return folder


def without_null(weights):
    return {name: tensor for name, tensor in weights.items() if name != NULL_CAPTION_KEY}


@pytest.mark.parametrize(
    "name",
    [
        "diffusion_pytorch_model.safetensors",
        "diffusion_pytorch_model.fp16.safetensors",
        "diffusion_pytorch_model.bin",
        "pixart.safetensors",
    ],
)
def test_folder_is_read_from_its_root_or_itself(tmp_path, name):
    folder = make_folder(tmp_path / "pipeline", name=name, vae_scale=0.18215)
    for path in (tmp_path / "pipeline", folder):
        checkpoint = read_checkpoint(path)
        assert same(checkpoint.state_dict, without_null(random_weights()))
        assert checkpoint.config == CONFIG and not checkpoint.has_null_caption
        assert checkpoint.detection.signs["family"] == "autoencoder next to it"


def test_bare_transformer_folder_and_its_vae(tmp_path):
    make_folder(tmp_path / "bare", root=False)
    assert read_checkpoint(tmp_path / "bare").config.base_size == 32
    make_folder(tmp_path / "sigma", vae_scale=0.13025, use_additional_conditions=None, interpolation_scale=None)
    sigma = read_checkpoint(tmp_path / "sigma").config
    assert sigma == dataclasses.replace(CONFIG, caption_length=300, vae_scale=0.13025)


def test_file_variant_is_chosen(tmp_path):
    folder = make_folder(tmp_path / "both")
    halves = {name: tensor.half().clone() for name, tensor in to_diffusers(random_weights()).items()}
    save_file(halves, folder / "diffusion_pytorch_model.fp16.safetensors")
    assert read_checkpoint(folder).state_dict["t_block.1.bias"].dtype == torch.float32
    assert read_checkpoint(folder, file_variant="fp16").state_dict["t_block.1.bias"].dtype == torch.float16
    with pytest.raises(FileNotFoundError, match=r"diffusion_pytorch_model\.bf16\.safetensors"):
        read_checkpoint(folder, file_variant="bf16")


def write_shards(folder, ending="safetensors", index=True, infix="", count=3, prefix=""):
    weights = {f"{prefix}{name}": tensor for name, tensor in to_diffusers(random_weights()).items()}
    names = list(weights)
    weight_map = {}
    for number in range(count):
        shard = f"diffusion_pytorch_model{infix}-{number + 1:05d}-of-{count:05d}.{ending}"
        content = {name: weights[name].clone() for name in names[number::count]}
        (torch.save if ending == "bin" else save_file)(content, folder / shard)
        weight_map |= dict.fromkeys(content, shard)
    if index:
        text = json.dumps({"metadata": {}, "weight_map": weight_map})
        (folder / f"diffusion_pytorch_model.{ending}.index{infix}.json").write_text(text)
    return weight_map


@pytest.mark.parametrize("ending", ["safetensors", "bin"])
@pytest.mark.parametrize("index", [True, False])
@pytest.mark.parametrize("infix", ["", ".fp16"])
def test_shards_are_read(tmp_path, ending, index, infix):
    folder = make_folder(tmp_path / "sharded", name=None)
    write_shards(folder, ending, index, infix)
    assert same(read_checkpoint(tmp_path / "sharded").state_dict, without_null(random_weights()))


@pytest.mark.parametrize("index", [True, False])
def test_missing_shard_is_named(tmp_path, index):
    folder = make_folder(tmp_path / "sharded", name=None)
    write_shards(folder, index=index)
    (folder / "diffusion_pytorch_model-00002-of-00003.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="00002-of-00003" if index else "expected number 2"):
        read_checkpoint(tmp_path / "sharded")


def test_shard_without_what_the_index_promises_is_named(tmp_path):
    folder = make_folder(tmp_path / "sharded", name=None)
    shard = folder / write_shards(folder)["proj_out.bias"]
    save_file({name: tensor for name, tensor in load_file(shard).items() if name != "proj_out.bias"}, shard)
    with pytest.raises(ValueError, match=rf"proj_out\.bias.*{shard.name}"):
        read_checkpoint(folder)


def test_shards_of_every_kind_of_model_are_checked(tmp_path):
    shards = [tmp_path / f"model-{number:05d}-of-00002.safetensors" for number in (1, 2)]
    for shard, name in zip(shards, ("shared.weight", "final.weight"), strict=True):
        save_file({name: torch.zeros(2)}, shard, metadata={name: "kept"})
    tensors, metadata = read_tensors(tmp_path, TEXT_ENCODER_STEMS)
    assert set(tensors) == set(metadata) == {"shared.weight", "final.weight"}
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"lost.weight": shards[0].name, "final.weight": shards[1].name}}))
    with pytest.raises(ValueError, match=rf"Truncated shard: got no 'lost\.weight' in '{shards[0].name}'"):
        read_tensors(tmp_path, TEXT_ENCODER_STEMS)
    index.unlink()
    save_file({"shared.weight": torch.ones(2)}, shards[1])
    with pytest.raises(ValueError, match=rf"Tensor twice.*shared\.weight.*{shards[0].name}.*{shards[1].name}"):
        read_tensors(tmp_path, TEXT_ENCODER_STEMS)


def test_shards_with_a_prefix_are_unwrapped_as_a_whole(tmp_path):
    folder = make_folder(tmp_path / "sharded", name=None)
    write_shards(folder, prefix="transformer.")
    assert same(read_checkpoint(folder).state_dict, without_null(random_weights()))


@pytest.mark.parametrize("ending", ["safetensors", "pth"])
def test_a_file_is_told_by_what_describes_its_tensors(tmp_path, ending):
    weights = to_diffusers(original_file())
    path = tmp_path / f"model.{ending}"
    save_file(weights, path) if ending == "safetensors" else torch.save({"state_dict": weights}, path)
    opened = open_weights(path)
    found = identify(opened.content)
    assert found.layout == "diffusers"
    assert not any(isinstance(value, torch.Tensor) for value in found.tensors.values())
    assert {name: value.shape for name, value in found.tensors.items()} == {k: v.shape for k, v in weights.items()}
    assert same(opened.read({"bias": found.tensors["proj_out.bias"]}), {"bias": weights["proj_out.bias"]})


def test_tensor_in_two_shards_is_named(tmp_path):
    folder = make_folder(tmp_path / "sharded", name=None)
    weight_map = write_shards(folder)
    other = folder / next(name for name in weight_map.values() if name != weight_map["proj_out.bias"])
    save_file(load_file(other) | {"proj_out.bias": torch.zeros(32)}, other)
    with pytest.raises(ValueError, match=r"Tensor twice.*proj_out\.bias"):
        read_checkpoint(folder)


@pytest.mark.parametrize(
    "name",
    ["../outside.safetensors", "/etc/outside.safetensors", "..\\outside.safetensors", "C:x.safetensors", "x", 3, None],
)
def test_index_never_leads_out_of_the_folder(tmp_path, name):
    folder = make_folder(tmp_path / "sharded", name=None)
    save_file({"a": torch.zeros(1)}, tmp_path / "sharded" / "outside.safetensors")
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(ValueError, match=r"Unsafe index 'diffusion_pytorch_model\.safetensors\.index\.json'"):
        read_checkpoint(folder)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": []}', "<html>", "[" * 9999])
def test_unreadable_index_is_named(tmp_path, text):
    folder = make_folder(tmp_path / "sharded", name=None)
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match=r"diffusion_pytorch_model\.safetensors\.index\.json"):
        read_checkpoint(folder)


def test_two_sets_of_shards_are_refused(tmp_path):
    folder = make_folder(tmp_path / "sharded", name=None)
    write_shards(folder, index=False)
    write_shards(folder, index=False, count=2)
    with pytest.raises(ValueError, match="Several sets of shards"):
        read_checkpoint(folder)


def test_folder_of_something_else_is_told(tmp_path):
    folder = make_folder(tmp_path / "flux", _class_name="FluxTransformer2DModel")
    with pytest.raises(ValueError, match="got a FluxTransformer2DModel in 'transformer'"):
        read_checkpoint(folder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="No weights in folder 'empty': got no model file"):
        read_checkpoint(tmp_path / "empty")
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="a LoRA folder"):
        read_checkpoint(tmp_path / "lora")
    (tmp_path / "sd").mkdir()
    (tmp_path / "sd" / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    with pytest.raises(ValueError, match="StableDiffusionPipeline without a transformer in 'sd'"):
        read_checkpoint(tmp_path / "sd")


# Memory

MEASURE = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
from pixart import PixArt, PixArtConfig
from pixart.weights.reading import read_checkpoint

def memory(field):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(field + ":"))

def peak(path):
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak starts anew
    baseline = memory("VmRSS")
    checkpoint = read_checkpoint(path)
    model = PixArt(checkpoint.config, device="meta")
    model.load_state_dict(checkpoint.state_dict, assign=True)
    del checkpoint
    size = sum(tensor.nbytes for tensor in model.state_dict().values())
    assert size > 3e8
    for tensor in model.state_dict().values():
        tensor.flatten().view(torch.uint8)[::1024].sum()  # every page is read
    return (memory("VmHWM") - baseline) / size

torch.set_num_threads(1)
PixArt(PixArtConfig(depth=1, hidden_size=12, num_heads=1, caption_channels=4), device="meta")  # imports what it needs
for path in sys.stdin:
    print(peak(path.strip()), flush=True)
"""


@pytest.fixture(scope="module")
def peak():
    """A function: a file -> the peak of memory of loading it over its weights, by one process for all."""
    command, pipes = [sys.executable, "-c", MEASURE, str(ROOT)], {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, text=True, **pipes) as process:

        def measure(path):
            process.stdin.write(f"{path}\n")
            process.stdin.flush()
            return float(process.stdout.readline())

        yield measure
        process.stdin.close()
    assert process.returncode == 0


@pytest.mark.slow
@pytest.mark.skipif(not pathlib.Path("/proc/self/clear_refs").exists(), reason="Linux tells the peak of a process")
@pytest.mark.parametrize("form", ["pth", "legacy", "safetensors", "diffusers", "diffusers bin"])
def test_loading_blocks_of_the_full_width_takes_little_more_than_the_weights(tmp_path, peak, form):
    config = dataclasses.replace(CONFIGS["sigma-1024"], depth=8)
    weights = {name: torch.full(shape, 0.5).half() for name, shape in expected_shapes(config).items()}
    if form.startswith("diffusers"):
        weights = {name: tensor.clone() for name, tensor in to_diffusers(weights).items()}
    path = tmp_path / ("model.safetensors" if form in ("safetensors", "diffusers") else "model.pth")
    try:
        if path.suffix == ".safetensors":
            save_file(weights, path)
        else:
            torch.save({"state_dict": weights}, path, _use_new_zipfile_serialization=form != "legacy")
        del weights
        assert peak(path) <= 1.15
    finally:
        path.unlink(missing_ok=True)


# Writing


@pytest.mark.parametrize("name", ["model.safetensors", "model.pth"])
@pytest.mark.parametrize("layout", ["original", "diffusers"])
def test_saved_file_reads_back_whole(tmp_path, name, layout):
    config = dataclasses.replace(CONFIG, num_heads=8, base_size=8, pe_scale=0.25, vae_scale=0.9)
    weights = random_weights(config)
    save_checkpoint(tmp_path / name, weights, config, layout=layout, metadata={"title": "a model"})
    checkpoint = read_checkpoint(tmp_path / name)
    assert same(checkpoint.state_dict, weights) and checkpoint.config == config
    assert checkpoint.detection.layout == layout
    assert checkpoint.metadata["title"] == "a model"
    assert json.loads(checkpoint.metadata[CONFIG_KEY])["num_heads"] == 8
    assert os.listdir(tmp_path) == [name]
    # What was mapped can be written again without growing, and over itself.
    size = (tmp_path / name).stat().st_size
    save_checkpoint(tmp_path / name, checkpoint.state_dict, config, layout=layout, metadata=checkpoint.metadata)
    assert (tmp_path / name).stat().st_size == size
    assert same(read_checkpoint(tmp_path / name).state_dict, weights)


def test_saved_dtype(tmp_path):
    weights = random_weights(dtype=torch.bfloat16)
    save_checkpoint(tmp_path / "kept.safetensors", weights, CONFIG)
    save_checkpoint(tmp_path / "half.safetensors", weights, CONFIG, dtype=torch.float16)
    assert {tensor.dtype for tensor in load_file(tmp_path / "kept.safetensors").values()} == {torch.bfloat16}
    assert {tensor.dtype for tensor in load_file(tmp_path / "half.safetensors").values()} == {torch.float16}


def test_tied_tensors_are_written_apart(tmp_path):
    weights = random_weights()
    weights["blocks.1.attn.proj.weight"] = weights["blocks.0.attn.proj.weight"]
    for name in ("tied.safetensors", "tied.pth"):
        save_checkpoint(tmp_path / name, weights, CONFIG)
        assert same(read_checkpoint(tmp_path / name).state_dict, weights)


@pytest.mark.parametrize("shard_bytes", [None, 200_000])
def test_saved_folder_reads_back(tmp_path, shard_bytes):
    weights = random_weights()
    save_checkpoint(tmp_path / "out", weights, CONFIG, metadata={"title": "x"}, shard_bytes=shard_bytes)
    checkpoint = read_checkpoint(tmp_path / "out")
    assert same(checkpoint.state_dict, without_null(weights)) and checkpoint.config == CONFIG
    assert checkpoint.metadata["title"] == "x"
    shards = list((tmp_path / "out" / "transformer").glob("*-of-*.safetensors"))
    assert (len(shards) > 1) == bool(shard_bytes)
    with pytest.raises(ValueError, match="Folder is not empty"):
        save_checkpoint(tmp_path / "out", weights, CONFIG)


@pytest.mark.peer
@pytest.mark.parametrize("variant", ["alpha-256", "alpha-1024", "sigma-256", "sigma-2048"])
def test_saved_folder_is_what_diffusers_reads(tmp_path, variant):
    diffusers = pytest.importorskip("diffusers")
    config = dataclasses.replace(CONFIGS[variant], depth=2, hidden_size=144, num_heads=2, caption_channels=32)
    weights = random_weights(config)
    save_checkpoint(tmp_path / "out", weights, config)
    model, report = diffusers.PixArtTransformer2DModel.from_pretrained(
        tmp_path / "out", subfolder="transformer", output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert model.pos_embed.base_size == config.base_size
    assert model.pos_embed.interpolation_scale == config.pe_scale
    assert model.use_additional_conditions == config.micro_condition
    model.save_pretrained(tmp_path / "back" / "transformer")
    back = read_checkpoint(tmp_path / "back", vae_scale=config.vae_scale, caption_length=config.caption_length)
    assert back.config == config and same(back.state_dict, without_null(weights))


def test_weights_are_checked_before_they_are_written(tmp_path):
    weights = random_weights()
    del weights["t_block.1.bias"]
    with pytest.raises(ValueError, match=r"t_block\.1\.bias"):
        save_checkpoint(tmp_path / "x.safetensors", weights, CONFIG)
    with pytest.raises(ValueError, match="Unknown layout: got 'comfy'"):
        save_checkpoint(tmp_path / "x.safetensors", random_weights(), CONFIG, layout="comfy")
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_failed_write_leaves_the_old_file_alone(tmp_path, error):
    (tmp_path / "model.pth").write_bytes(b"old")

    def fail(temporary):
        temporary.write_bytes(b"half")
        assert temporary.parent == tmp_path
        raise error

    with pytest.raises(error):
        write_atomically(tmp_path / "model.pth", fail)
    assert os.listdir(tmp_path) == ["model.pth"] and (tmp_path / "model.pth").read_bytes() == b"old"


def test_failed_folder_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("pixart_pack.pixart.weights.saving.diffusers_config", lambda config: {"unwritable": object()})
    with pytest.raises(TypeError):
        save_checkpoint(tmp_path / "out", random_weights(), CONFIG)
    assert not os.listdir(tmp_path / "out")


def test_written_file_has_ordinary_permissions(tmp_path):
    save_checkpoint(tmp_path / "a.safetensors", random_weights(), CONFIG)
    save_checkpoint(tmp_path / "b.pth", random_weights(), CONFIG)
    (tmp_path / "plain").write_bytes(b"")
    modes = {entry.stat().st_mode for entry in tmp_path.iterdir()}
    assert len(modes) == 1
