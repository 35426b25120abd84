"""NumPy's files: read as numpy reads them, and bounded by what they hold."""

import io
import os
import struct
import zipfile

import numpy as np
import pytest

from pixart_pack.pixart.files import arrays
from pixart_pack.pixart.files.arrays import read_array, read_arrays, read_shape


def npy(shape, content=b"", dtype="<f4", version=1):
    """A .npy file whose header says what it likes."""
    header = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY" + bytes([version, 0]) + struct.pack("<H", len(header)) + header + content


@pytest.mark.parametrize("dtype", ["float16", "float32", "int64"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_arrays_are_read_as_numpy_reads_them(tmp_path, dtype, order):
    one = np.asarray(np.arange(24).reshape(2, 3, 4), dtype=dtype, order=order)
    np.save(tmp_path / "a.npy", one)
    assert np.array_equal(read_array(tmp_path / "a.npy"), one) and read_shape(tmp_path / "a.npy") == (2, 3, 4)
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "a.npz", one=one, other=one + 1, third=one)
        found = read_arrays(tmp_path / "a.npz", "one", "other", "missing")
        assert found.keys() == {"one", "other"} and np.array_equal(found["other"], one + 1)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (npy((10**11,), b"\0" * 16), r"claims 1e\+11 numbers in a file of 16 bytes"),
        (npy((10**6, 10**6, 10**6)), r"claims 1e\+18 numbers"),
        (npy((-4, -4), b"\0" * 64), "claims 16 numbers"),
        (npy((2,), b"\0" * 16, "|O"), "Python objects"),
        (npy((2,), b"\0" * 8, version=9), r"an array of version \(9, 0\)"),
        (npy("(" * 9000), "[hH]eader"),
        (b"PK", "magic|EOF"),
        (b"", "magic|EOF"),
    ],
)
def test_what_claims_more_than_it_holds_is_refused(tmp_path, content, match):
    (tmp_path / "a.npy").write_bytes(content)
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("a.npy", content)
    readers = [(read_array, "a.npy"), (read_shape, "a.npy"), (lambda path: read_arrays(path, "a"), "a.npz")]
    for read, name in readers:
        with pytest.raises(ValueError, match=match):
            read(tmp_path / name)


@pytest.mark.slow
def test_archives_are_bounded(tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path / "bomb.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.npy", npy((10**8,), b"\0" * 10**8, "|u1"))
    assert (tmp_path / "bomb.npz").stat().st_size < 10**6
    with pytest.raises(ValueError, match=r"File too large: got 100\.0 MB in 'bomb\.npz', expected at most 64\.0 MB"):
        read_arrays(tmp_path / "bomb.npz", "a")
    with zipfile.ZipFile(tmp_path / "many.npz", "w") as archive:
        for number in range(65):
            archive.writestr(f"{number}.npy", b"")
    with pytest.raises(ValueError, match="an archive of 65 arrays"):
        read_arrays(tmp_path / "many.npz", "0")
    monkeypatch.setattr(arrays, "ARRAY_BYTES", 100)
    np.save(tmp_path / "large.npy", np.zeros(100))
    for read in (read_array, read_shape):
        with pytest.raises(ValueError, match="File too large"):
            read(tmp_path / "large.npy")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names on this system")
def test_pipes_are_refused(tmp_path):
    os.mkfifo(tmp_path / "a.npy")
    for read in (read_array, read_shape, read_arrays):
        with pytest.raises(ValueError, match="Not a file: got a pipe"):
            read(tmp_path / "a.npy")


def test_a_cut_file_is_refused(tmp_path):
    buffer = io.BytesIO()
    np.save(buffer, np.zeros(100))
    (tmp_path / "a.npy").write_bytes(buffer.getvalue()[:-1])
    for read in (read_array, read_shape):
        with pytest.raises(ValueError, match="claims 100 numbers"):
            read(tmp_path / "a.npy")
