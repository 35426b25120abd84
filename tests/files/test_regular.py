"""What is no regular file, or too large, is refused in words and at once."""

import os

import pytest

from pixart_pack.pixart.files.regular import open_regular, read_bytes, read_text


@pytest.fixture
def pipe(tmp_path):
    if not hasattr(os, "mkfifo"):
        pytest.skip("no pipes with names on this system")
    os.mkfifo(tmp_path / "pipe.txt")
    return tmp_path / "pipe.txt"


def test_a_pipe_does_not_hang(pipe):
    with pytest.raises(ValueError, match=r"got a pipe named 'pipe.txt', expected a regular file"):
        read_bytes(pipe, 10)


@pytest.mark.skipif(os.name == "nt", reason="devices are no files there")
def test_a_link_to_a_device_is_not_read(tmp_path):
    (tmp_path / "1.txt").symlink_to("/dev/zero")
    with pytest.raises(ValueError, match=r"got a device named '1.txt'"):
        read_bytes(tmp_path / "1.txt", 10)


def test_a_folder_and_nothing(tmp_path):
    with pytest.raises((ValueError, PermissionError)):  # Windows opens no folder at all
        open_regular(tmp_path)
    with pytest.raises(FileNotFoundError):
        open_regular(tmp_path / "none")


def test_the_limit_counts_what_is_read(tmp_path):
    file = tmp_path / "a.txt"
    file.write_bytes(b"12345")
    assert read_bytes(file, 5) == b"12345"
    with pytest.raises(ValueError, match=r"File too large: got 0\.0 MB in 'a.txt', expected at most 0\.0 MB"):
        read_bytes(file, 4)
    file.write_bytes("\ufeffä".encode())
    assert read_text(file) == "ä"


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="only Linux has files that say they are empty")
def test_a_file_that_says_it_is_empty_is_bounded():
    with pytest.raises(ValueError, match="File too large"):
        read_bytes("/proc/self/maps", 20)
