"""Damaged, odd and hostile files: whatever they hold, the loader runs none of it and names the file."""

import io
import json
import os
import random
import struct
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file

from pixart_pack.pixart import PixArtConfig
from pixart_pack.pixart.checkpoint import NULL_CAPTION_KEY, expected_shapes, to_diffusers
from pixart_pack.pixart.weights.detection import detect
from pixart_pack.pixart.weights.reading import finish_checkpoint, read_checkpoint, read_tensors
from pixart_pack.pixart.weights.saving import diffusers_config
from pixart_pack.pixart.weights.wrappers import identify_pixart

pytestmark = pytest.mark.slow

CONFIG = PixArtConfig(depth=1, hidden_size=12, num_heads=1, caption_channels=4, caption_length=6, micro_condition=False)
WEIGHTS = {name: torch.full(shape, 0.5) for name, shape in expected_shapes(CONFIG).items()}
NAMES = sorted(WEIGHTS)

fuzz = settings(
    max_examples=40,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def torch_bytes(content, zipped=True):
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


FILES = {
    "zip": torch_bytes({"state_dict": WEIGHTS}),
    "legacy": torch_bytes({"state_dict": WEIGHTS}, zipped=False),
    "safetensors": save(WEIGHTS),
    "diffusers": save({name: tensor.clone() for name, tensor in to_diffusers(WEIGHTS).items()}),
}


def read_or_refuse(path):
    """The weights of a file, or None when it was refused as it should be: a ValueError that names it."""
    try:
        checkpoint = read_checkpoint(path)
    except ValueError as error:
        assert path.name in str(error)
        return None
    for name, tensor in checkpoint.state_dict.items():
        assert tuple(tensor.shape) == expected_shapes(checkpoint.config)[name]
        tensor.float().sum()  # every byte is there to be read
    return checkpoint.state_dict


@pytest.fixture
def canary(tmp_path, monkeypatch):
    """The file that every hostile pickle here would make, by a command in the working folder."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "canary"
    yield path
    assert not path.exists(), "the file ran code"


@pytest.mark.parametrize("form", FILES)
@fuzz
@given(data=st.data())
def test_truncated_files(tmp_path, form, data):
    content = FILES[form]
    length = data.draw(st.integers(0, len(content) - 1))
    path = tmp_path / "cut.bin"
    path.write_bytes(content[:length])
    weights = read_or_refuse(path)
    # Only the archive's closing comment can be missing without any weight missing.
    assert weights is None or form == "zip" and length > len(content) - 64


@pytest.mark.parametrize("form", FILES)
@fuzz
@given(data=st.data())
def test_flipped_bytes(tmp_path, form, data):
    content = bytearray(FILES[form])
    # The structure lies at the ends and is a small part of the file, so half of the changes go there.
    places = st.one_of(
        st.integers(0, len(content) - 1), st.integers(0, 3000), st.integers(len(content) - 3000, len(content) - 1)
    )
    for place, value in data.draw(st.lists(st.tuples(places, st.integers(0, 255)), min_size=1, max_size=8)):
        content[place] = value
    path = tmp_path / "flipped.bin"
    path.write_bytes(bytes(content))
    read_or_refuse(path)


@fuzz
@given(content=st.binary(max_size=600))
@example(content=b"\x80\x02}q\x00.")
@example(content=b"\x00" * 8 + b"{")
@example(content=struct.pack("<Q", 2) + b"{}")
def test_random_bytes(tmp_path, content):
    path = tmp_path / "random.bin"
    path.write_bytes(content)
    assert read_or_refuse(path) is None


HOSTILE_PIECES = [
    b"cos\nsystem\n", b"cbuiltins\neval\n", b"c__builtin__\ngetattr\n", b"csubprocess\nPopen\n",
    b"ctorch._utils\n_rebuild_tensor_v2\n", b"ccollections\nOrderedDict\n", b"ctorch\nFloatStorage\n",
    b"ctorch._tensor\n_rebuild_from_type_v2\n", b"ctorch._utils\n_rebuild_parameter\n", b"ctorch\nSize\n",
    b"\x8c\x02os\x8c\x06system\x93", b"\x8c\x05torch\x8c\x0ajit.script\x93",
    b"Vtouch canary\n", b"Vstate_dict\n", b"Vstorage\n", b"V0\n", b"K\x01", b"J\xff\xff\xff\xff",
    b"cfunctools\npartial\n",
    b"(", b")", b"]", b"}", b"N", b"\x88", b"t", b"\x85", b"\x86", b"\x87", b"R", b"b", b"\x81", b"\x92", b"o", b"Q",
    b"a", b"e", b"s", b"u", b"0", b"2", b"1", b"d", b"l", b"\x8f", b"\x90", b"\x91", b"\x94", b"h\x00", b"q\x00",
    b"ios\nsystem\n", b"\x82\x01", b"P0\n", b"\x8a\x02\xff\xff", b"\x95\x08\x00\x00\x00\x00\x00\x00\x00",
]  # fmt: skip


@settings(fuzz, max_examples=200)
@given(pieces=st.lists(st.sampled_from(HOSTILE_PIECES), max_size=40), protocol=st.sampled_from([2, 4]))
def test_random_programs_run_nothing(tmp_path, canary, pieces, protocol):
    program = b"".join([b"\x80", bytes([protocol]), *pieces, b"."])
    path = tmp_path / "program.pth"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", program)
        archive.writestr("x/data/0", bytes(64))
    assert read_or_refuse(path) is None
    path.write_bytes(program)
    assert read_or_refuse(path) is None
    assert not canary.exists()


class Call:
    """Pickles as a call of any function with any arguments."""

    def __init__(self, function, arguments, state):
        self.function, self.arguments, self.state = function, arguments, state

    def __reduce__(self):
        return self.function, self.arguments, self.state


FUNCTIONS = [os.system, eval, exec, getattr, __import__, os.popen, print, dict]
values = st.recursive(
    st.one_of(st.none(), st.integers(), st.floats(allow_nan=False), st.text(max_size=4), st.just("touch canary")),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.tuples(inner, inner),
        st.dictionaries(st.text(max_size=3), inner, max_size=3),
        st.builds(Call, st.sampled_from(FUNCTIONS), st.tuples(inner), st.one_of(st.none(), inner)),
    ),
    max_leaves=12,
)


@fuzz
@given(
    extras=st.dictionaries(st.sampled_from(["args", "scheduler", "epoch", "optimizer"]), values), zipped=st.booleans()
)
def test_whatever_lies_next_to_the_weights_is_inert(tmp_path, canary, extras, zipped):
    path = tmp_path / "training.pth"
    path.write_bytes(torch_bytes({**extras, "state_dict": WEIGHTS}, zipped))
    weights = read_or_refuse(path)
    assert weights is not None and all(torch.equal(weights[name], WEIGHTS[name]) for name in NAMES)
    assert not canary.exists()


def write(path, weights):
    if path.suffix == ".pth":
        torch.save({"state_dict": weights}, path)
    else:
        save_file({name: tensor.clone() for name, tensor in weights.items()}, path)


endings = st.sampled_from(["odd.pth", "odd.safetensors"])


@fuzz
@given(name=st.sampled_from(NAMES), layout=st.sampled_from(["original", "diffusers"]), file=endings)
def test_missing_weights_are_named(tmp_path, name, layout, file):
    weights = {key: tensor for key, tensor in WEIGHTS.items() if key != name}
    write(tmp_path / file, to_diffusers(weights) if layout == "diffusers" else weights)
    if name == "y_embedder.y_embedding":
        assert read_or_refuse(tmp_path / file) is not None
        return
    with pytest.raises(ValueError) as caught:
        read_checkpoint(tmp_path / file)
    assert file in str(caught.value)
    assert name in str(caught.value) or "blocks" in str(caught.value).lower()


@fuzz
@given(name=st.from_regex(r"(blocks\.[0-9]\.)?[a-z_.]{1,12}", fullmatch=True), file=endings)
def test_extra_weights_are_named(tmp_path, name, file):
    write(tmp_path / file, WEIGHTS | {name: torch.zeros(2)})
    if name in WEIGHTS or name == "pos_embed":
        return
    with pytest.raises(ValueError) as caught:
        read_checkpoint(tmp_path / file)
    assert file in str(caught.value)
    assert name in str(caught.value) or "Blocks are missing" in str(caught.value)


@fuzz
@given(
    name=st.sampled_from(NAMES),
    shape=st.lists(st.sampled_from([0, 1, 2, 3, 11, 12, 13, 24, 36]), max_size=5).map(tuple),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.bool]),
    layout=st.sampled_from(["original", "diffusers"]),
    file=endings,
)
def test_wrong_shapes_and_types_are_refused(tmp_path, name, shape, dtype, layout, file):
    changed = WEIGHTS | {name: torch.ones(shape, dtype=dtype)}
    try:
        weights = to_diffusers(changed, keep_null_caption=True) if layout == "diffusers" else changed
    except ValueError as error:
        assert name in str(error)
        return
    write(tmp_path / file, weights)
    loaded = read_or_refuse(tmp_path / file)
    if loaded is not None:  # the change gave another PixArt: of another caption length, say
        assert dtype.is_floating_point


@fuzz
@given(dtypes=st.lists(st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2]), min_size=2))
def test_mixed_types_are_kept(tmp_path, dtypes):
    weights = {name: WEIGHTS[name].to(dtypes[index % len(dtypes)]) for index, name in enumerate(NAMES)}
    write(tmp_path / "odd.safetensors", weights)
    loaded = read_or_refuse(tmp_path / "odd.safetensors")
    assert {name: tensor.dtype for name, tensor in loaded.items()} == {name: weights[name].dtype for name in NAMES}


json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.just(10**400), st.floats(), st.text(max_size=5)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
    max_leaves=8,
)
config_fields = sorted(diffusers_config(CONFIG)) + ["scaling_factor", "weight_map"]


@fuzz
@given(config=st.dictionaries(st.sampled_from(config_fields), json_values), vae=json_values)
def test_odd_configurations_are_refused_or_overruled(tmp_path, config, vae):
    folder = tmp_path / "pipeline"
    for part, content in (("transformer", config), ("vae", vae)):
        (folder / part).mkdir(parents=True, exist_ok=True)
        (folder / part / "config.json").write_text(json.dumps(content))
    (folder / "transformer" / "diffusion_pytorch_model.safetensors").write_bytes(FILES["diffusers"])
    try:
        read_checkpoint(folder)
    except ValueError as error:
        assert any(name in str(error) for name in ("pipeline", "transformer", "config.json"))


@fuzz
@given(index=json_values, weight_map=json_values)
def test_odd_indices_are_refused(tmp_path, index, weight_map):
    folder = tmp_path / "transformer"
    folder.mkdir(exist_ok=True)
    path = folder / "diffusion_pytorch_model.safetensors.index.json"
    for content in (index, {"weight_map": weight_map}, {"weight_map": {"a": weight_map}}):
        path.write_text(json.dumps(content))
        with pytest.raises((ValueError, FileNotFoundError), match="index.json"):
            read_checkpoint(folder)


@fuzz
@given(header=json_values, tail=st.binary(max_size=64))
def test_odd_safetensors_headers(tmp_path, header, tail):
    for content in (header, {"__metadata__": header}, {"x_embedder.proj.weight": header}):
        text = json.dumps(content).encode()
        (tmp_path / "odd.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + tail)
        assert read_or_refuse(tmp_path / "odd.safetensors") is None


def test_archive_whose_entries_begin_before_it(tmp_path):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive, zipfile.ZipFile(io.BytesIO(FILES["zip"])) as source:
        for entry in source.infolist():
            archive.writestr(entry.filename, source.read(entry))
    (tmp_path / "plain.pth").write_bytes(buffer.getvalue())
    assert read_or_refuse(tmp_path / "plain.pth") is not None
    content = bytearray(buffer.getvalue())
    place = content.rfind(b"PK\x05\x06") + 16  # where the list of entries is said to begin
    content[place : place + 4] = struct.pack("<I", struct.unpack_from("<I", content, place)[0] + 5000)
    (tmp_path / "shifted.pth").write_bytes(content)
    assert read_or_refuse(tmp_path / "shifted.pth") is None


def test_deeply_nested_pickle(tmp_path):
    program = b"\x80\x02" + b"(" * 10_000 + b"]" + b"\x85" * 10_000 + b"."
    with zipfile.ZipFile(tmp_path / "deep.pth", "w") as archive:
        archive.writestr("x/data.pkl", program)
    assert read_or_refuse(tmp_path / "deep.pth") is None


def test_claims_of_huge_sizes_allocate_nothing(tmp_path):
    path = tmp_path / "huge.pth"
    bytes_of_2_60, memo_of_2_30 = b"\x8e" + struct.pack("<Q", 2**60), b"Nr" + struct.pack("<I", 2**30)
    for program in (bytes_of_2_60, b"\x8b" + struct.pack("<i", 2**31 - 1), memo_of_2_30, b"Np9999999999\n"):
        path.write_bytes(b"\x80\x04" + program + b".")
        with pytest.raises(ValueError, match=r"huge\.pth"):
            read_tensors(path)


# Key sets


def numbered(start):
    """The tiny model with numbers of its own in every tensor."""
    return {name: torch.full_like(tensor, start + number) for number, (name, tensor) in enumerate(WEIGHTS.items())}


ONE, TWO = numbered(1.0), numbered(1001.0)
PLACES = ("model", "ema", "state_dict", "module", "net", "x.y", "generator", "teacher", "shadow_params", "_orig_mod")


def in_a_layout(weights, draw):
    """Weights under the names of one program."""
    tensors = dict(weights)
    if draw.random() < 0.5:
        tensors = to_diffusers(weights, keep_null_caption=draw.random() < 0.5)
    if "transformer_blocks.0.attn1.to_q.weight" in tensors and draw.random() < 0.5:
        stem = "transformer_blocks.0.attn1."
        for kind in ("weight", "bias"):
            tensors[f"{stem}to_qkv.{kind}"] = weights[f"blocks.0.attn.qkv.{kind}"]
            if draw.random() < 0.7:
                for part in "qkv":
                    del tensors[f"{stem}to_{part}.{kind}"]
    return tensors


def mutilated(tensors, draw):
    """The same with a few names gone, changed, or doubled in another place."""
    tensors = dict(tensors)
    for _ in range(draw.choice([0, 0, 1, 2])):
        name = draw.choice(sorted(tensors))
        value = tensors.pop(name)
        new = draw.choice([None, f"{name}_", f"module.{name}", f"ema.{name}", name.replace(".", "_"), name[1:], "x"])
        if new is not None:
            tensors[new] = value
        if draw.random() < 0.2:
            tensors[name] = value
    return tensors


def wrapped(tensors, draw):
    for _ in range(draw.choice([0, 1, 2])):
        place = draw.choice(PLACES)
        if draw.random() < 0.5:
            tensors = {place: tensors, "step": 3}
        else:
            tensors = {f"{place}.{name}": value for name, value in tensors.items()}
    return tensors


@pytest.mark.parametrize("first", range(0, 1000, 100))
def test_key_sets_give_the_whole_of_one_model_or_are_refused(first):
    assert 20 < sum(is_read_right(random.Random(seed)) for seed in range(first, first + 100)) < 90


def is_read_right(draw):
    """Whether a set of keys was read; False where it was refused as it should be."""
    content = wrapped(mutilated(in_a_layout(ONE, draw), draw), draw)
    if draw.random() < 0.5:
        content = {**content, draw.choice(PLACES): wrapped(mutilated(in_a_layout(TWO, draw), draw), draw)}
    try:
        found = identify_pixart(content, draw.choice(["ema", "model"]))
        read = finish_checkpoint(Path("x"), found, detect(found)).state_dict
    except ValueError:
        return False
    names = set(read) - {NULL_CAPTION_KEY}
    assert names == set(WEIGHTS) - {NULL_CAPTION_KEY}
    assert any(all(torch.equal(read[name], model[name]) for name in names) for model in (ONE, TWO))
    return True


def test_most_of_the_unharmed_key_sets_are_read():
    """Lest the test above passes by refusing all."""
    read = 0
    for seed in range(100):
        draw = random.Random(seed)
        read += len(identify_pixart(wrapped(in_a_layout(ONE, draw), draw)).tensors) >= len(WEIGHTS) - 1
    assert read == 100
