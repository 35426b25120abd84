"""Files of weights by a stranger who means harm, and a process of its own in which they are read within limits.

`FILES` holds functions that write one such file into a folder and give its path; any loader must refuse each in words,
within about a second and without taking memory.
"""

import ast
import json
import os
import struct
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from random import Random

ROOT = Path(__file__).resolve().parent.parent
NAME = "blocks.0.mlp.fc1.bias"
PROTOCOL = b"\x80\x02"
FILES: dict[str, Callable[[Path], Path]] = {}


def text(value: str) -> bytes:
    """The opcodes that put a text on the stack."""
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def number(value: int) -> bytes:
    """The opcodes that put an integer on the stack."""
    data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def tensor(shape: Sequence[int], stride: Sequence[int], *, count: int = 4, offset: int = 0, key: str = "0") -> bytes:
    """The opcodes of a float32 tensor in a storage that is said to hold `count` numbers."""
    storage = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text(key) + text("cpu") + number(count) + b"tQ"
    sizes = b"".join(b"(" + b"".join(map(number, each)) + b"t" for each in (shape, stride))
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + number(offset) + sizes + b"\x89}tR"


def write_pickle(path: Path, program: bytes, entries: Iterable[tuple[str, bytes]] = (("data/0", bytes(16)),)) -> Path:
    """A file as by torch.save whose pickle is this program."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", PROTOCOL + program + b".")
        for name, data in entries:
            archive.writestr(f"archive/{name}", data)
    return path


def _add(name: str, write: Callable[[Path], Path]) -> None:
    FILES[name] = write


def _program(name: str, program: Callable[[], bytes]) -> None:
    """Adds a pickle in a zip archive, and a short one at the start of a file of the older format too."""
    file = name.replace(" ", "-")
    _add(name, lambda folder: write_pickle(folder / f"{file}.pth", program()))
    if not name.startswith(("deep", "endless")) or name == "deep key":
        older = f"{file}-older.pth"
        _add(f"{name}, older format", lambda folder: _written(folder / older, PROTOCOL + program() + b"."))


def _written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


_DEEP = b")" + b"\x85" * 150_000  # (((...)))
_SHARED = b")" + b"2\x86" * 500  # each tuple holds the one before twice
_COLLIDING = b"(" + b"".join(number(index * (2**61 - 1)) + b"N" for index in range(100_000)) + b"u"

for _name, _build in {
    "deep key": lambda: b"}" + _DEEP + b"Ns",
    "shared key": lambda: b"}" + _SHARED + b"Ns",
    "deep key of many": lambda: b"}(" + _DEEP + b"Nu",
    "deep key of a marked dict": lambda: b"(" + _DEEP + b"Nd",
    "deep member of a set": lambda: b"\x8f(" + _DEEP + b"\x90",
    "shared member of a frozen set": lambda: b"(" + _SHARED + b"\x91",
    "deep key of an OrderedDict": lambda: b"ccollections\nOrderedDict\n((" + _DEEP + b"N\x86ltR",
    "deep size as a key": lambda: b"}ctorch\nSize\n(" + _DEEP + b"tRNs",
    "shared persistent id": lambda: b"}(" + text("storage") + b"ctorch\nFloatStorage\n" + _SHARED + b"NK\x04tQNs",
    "deep value": lambda: b"}" + text("state_dict") + _DEEP + b"s",
    "shared value": lambda: b"}" + text("state_dict") + _SHARED + b"s",
    "list in itself": lambda: b"]q\x00h\x00a",
    "dict in itself": lambda: b"}q\x00" + text("state_dict") + b"h\x00s",
    "numbers with one hash": lambda: b"}" + _COLLIDING,
    "endless steps": lambda: b"N0" * 3_000_000,
    "endless stack": lambda: b"]" * 3_000_000,
    "unknown names": lambda: b"".join(b"cx" + b"y" * 500 + b"\n%d\n0" % index for index in range(20_000)) + b"Na",
    "copied dicts": lambda: (
        b"(" + b"".join(text(f"{index}") + b"N\x86" for index in range(10_000)) + b"lq\x000"
        + b"ccollections\nOrderedDict\nh\x00\x85R" * 10_000
    ),
    "memo at the far end": lambda: b"Nr" + struct.pack("<I", 2**32 - 1),
    "text longer than the file": lambda: b"\x8d" + struct.pack("<Q", 2**62),
    "integer longer than the file": lambda: b"\x8b" + struct.pack("<i", 2**31 - 1),
    "long integer": lambda: b"\x8b" + struct.pack("<i", 2**20) + b"\x7f" * 2**20,
    "integer of many digits": lambda: b"I" + b"9" * 10**6 + b"\n",
    "longest name": lambda: b"}" + text("x" * 10**6) + tensor((4,), (1,)) + b"s",
}.items():  # fmt: skip
    _program(_name, _build)


_PICKLED = text(NAME)


def _archive(path: Path, entries: Sequence[tuple[str, bytes]]) -> Path:
    with warnings.catch_warnings(), zipfile.ZipFile(path, "w") as archive:
        warnings.simplefilter("ignore")  # zipfile warns of a name that is there
        for entry, data in entries:
            archive.writestr(entry, data)
    return path


def _lying_archive(path: Path) -> Path:
    """An entry that is said to hold 1 GB."""
    write_pickle(path, b"}")
    content = bytearray(path.read_bytes())
    place = content.index(b"PK\x01\x02")
    content[place + 20 : place + 28] = struct.pack("<II", 2**30, 2**30)
    return _written(path, bytes(content))


def _header(path: Path, header: bytes, data: bytes = b"", length: int | None = None) -> Path:
    return _written(path, struct.pack("<Q", len(header) if length is None else length) + header + data)


def _pipe(path: Path) -> Path:
    os.mkfifo(path)
    return path


def _link(path: Path, target: str) -> Path:
    path.symlink_to(target)
    return path


def _one(shape: Sequence[int], dtype: str = "F32", end: int = 16) -> bytes:
    return json.dumps({NAME: {"dtype": dtype, "shape": shape, "data_offsets": [0, end]}}).encode()


_HUGE = tensor((2**20, 10**5), (0, 1), count=10**5)
for _name, _write in {
    "expanded tensor": lambda path: write_pickle(
        path, b"}" + _PICKLED + _HUGE + b"s", [("data/0", bytes(4 * 10**5))]
    ),
    "overlapping rows": lambda path: write_pickle(
        path, b"}" + _PICKLED + tensor((5000, 5000), (1, 1), count=10**4) + b"s", [("data/0", bytes(4 * 10**4))]
    ),
    "many names of one storage": lambda path: write_pickle(
        path,
        b"}" + tensor((10**5,), (1,), count=10**5) + b"q\x000("
        + b"".join(text(f"{index}.weight") + b"h\x00" for index in range(10_000)) + b"u",
        [("data/0", bytes(4 * 10**5))],
    ),
    "negative stride": lambda path: write_pickle(path, b"}" + _PICKLED + tensor((2, 2), (-1, 1), offset=2) + b"s"),
    "product beyond all numbers": lambda path: write_pickle(
        path, b"}" + _PICKLED + tensor((0, 2**61, 2**61), (0, 0, 0)) + b"s"
    ),
    "entries of one name": lambda path: _archive(path, [("a/data.pkl", b"\x80\x02}."), ("a/data.pkl", b"\x80\x02].")]),
    "a lying archive": _lying_archive,
    "unknown type.safetensors": lambda path: _header(path, _one([4], "F7"), bytes(16)),
    "overflowing shape.safetensors": lambda path: _header(path, _one([2**40, 2**40]), bytes(16)),
    "offsets beyond the end.safetensors": lambda path: _header(path, _one([2**30], end=2**32), bytes(16)),
    "header beyond the end.safetensors": lambda path: _header(path, _one([4]), length=2**24),
    "vast header.safetensors": lambda path: _header(path, b"{" + b" " * 2**26 + b"}"),
    "deep header.safetensors": lambda path: _header(path, b'{"__metadata__":' + b"[" * 10**5),
    "name of a megabyte.safetensors": lambda path: _header(path, _one([4]).replace(b"fc1", b"x" * 10**6), bytes(16)),
    "pipe": _pipe,
    "device": lambda path: _link(path, "/dev/zero"),
}.items():  # fmt: skip
    _file = _name.replace(" ", "-") + ("" if "." in _name else ".pth")
    _add(_name.removesuffix(".safetensors"), lambda folder, file=_file, write=_write: write(folder / file))


# Pieces of pickles: what torch.save writes, and what it never would.
_PIECES = [
    b"(", b")", b"]", b"}", b"\x8f", b"N", b"\x88", b"K\x01", b"M\x01\x02", b"J\xff\xff\xff\xff", b"G" + bytes(8),
    b"t", b"\x85", b"\x86", b"\x87", b"l", b"d", b"a", b"e", b"s", b"u", b"\x90", b"\x91", b"R", b"b", b"\x81", b"\x92",
    b"o", b"Q", b"0", b"1", b"2", b"\x94", b"q\x00", b"h\x00", b"q\x01", b"h\x01", b"r\xff\xff\xff\x7f", b"p7\n",
    b"g7\n", b"I5\n", b"L5L\n", b"F1e400\n", b"S'a'\n", b"Va\n", b"\x8c\x01a", b"C\x01a", b"\x96" + bytes(8), b"\x97",
    b"\x98", b"\x8b\xff\xff\xff\x7f", b"\x8d" + b"\xff" * 8, b"\x95" + b"\xff" * 8, b"\x82\x01", b"P0\n",
    b"ios\nsystem\n", b"\x93",
    b"cos\nsystem\n", b"ctorch\nSize\n", b"ccollections\nOrderedDict\n", b"ctorch._tensor\n_rebuild_from_type_v2\n",
    b"ctorch._utils\n_rebuild_parameter\n", b"ctorch\nfloat16\n", b"c__builtin__\nset\n", text("state_dict"), _PICKLED,
    tensor((4,), (1,)), tensor((2, 2), (1, 2)), tensor((2**20, 4), (0, 1)), tensor((2**40,), (2**40,)),
    number(2**61 - 1),
    b"2\x86" * 40, b"\x85" * 1000, b"]" * 1000, b"(" * 1000,
]  # fmt: skip


def random_program(random: Random) -> bytes:
    """A pickle's program: a sound one with pieces lost, doubled, changed or put in, or pieces alone."""
    program = [b"}", b"("]
    for name in ("x_embedder.proj.bias", NAME, "epoch"):
        program += [text(name), random.choice(_PIECES) if random.random() < 0.1 else tensor((4,), (1,))]
    program += [b"u"]
    if random.random() < 0.3:
        program = random.choices(_PIECES, k=random.randrange(40))
    for _ in range(random.choice((0, 1, 2, 5))):
        place = random.randrange(len(program) + 1)
        program[place : place + random.randrange(3)] = random.choices(_PIECES, k=random.randrange(4))
    data = bytearray(b"".join(program))
    for _ in range(random.choice((0, 0, 1, 3)) if data else 0):
        data[random.randrange(len(data))] = random.randrange(256)
    return bytes(data)


_CHILD = """
import logging, resource, sys, time
sys.path.insert(0, {root!r})
import torch
from pixart.weights.reading import read_checkpoint, read_tensors
from pixart.lora.reading import read_lora
torch.set_num_threads(1)
torch.zeros(8).sum()
def used(field):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field)) * 1024
limit = used("VmSize:") + {memory}
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
for path in sys.stdin.read().splitlines():
    print("begin", path, flush=True)
    began = time.process_time()
    for read in ({readers}):
        try:
            read(path)
            said = "read"
        except (ValueError, FileNotFoundError) as error:
            said = f"{{type(error).__name__}}: {{error}}"
        print("end", round(time.process_time() - began, 3), ascii(said), flush=True)
"""


def read_in_child(
    paths: Sequence[Path], readers: str = "read_checkpoint, ", timeout_s: float = 60, memory: int = 2**30
) -> list[tuple[float, str]]:
    """[(seconds of CPU, what was said)] of reading each file by each reader, in one process.

    memory: bytes that the process may take beyond what its imports took.
    Raises AssertionError naming the file at which the process ended or time was over.
    """
    script = _CHILD.format(root=str(ROOT), memory=memory, readers=readers)
    given = "\n".join(map(str, paths))
    command = [sys.executable, "-X", "faulthandler", "-c", script]
    process = subprocess.Popen(command, text=True, **dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE))
    try:
        output, errors = process.communicate(given, timeout=timeout_s)
    except subprocess.TimeoutExpired:
        process.kill()
        output, errors = process.communicate()
        errors = f"no end in {timeout_s} s\n{errors}"
    begun = [line for line in output.splitlines() if line.startswith("begin ")]
    assert process.returncode == 0, f"{process.returncode} at {begun[-1] if begun else 'the start'}:\n{errors[-3000:]}"
    ends = [line.split(" ", 2)[1:] for line in output.splitlines() if line.startswith("end ")]
    return [(float(seconds), ast.literal_eval(said)) for seconds, said in ends]
