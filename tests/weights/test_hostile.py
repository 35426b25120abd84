"""A stranger's file can do no harm: the process lives on, nothing hangs, and the answer is one short line."""

import pytest

from pixart_pack.tests.hostile import FILES, read_in_child

pytestmark = pytest.mark.skipif("sys.platform == 'win32'", reason="limits of a process are set as on Unix")


def test_every_hostile_file_is_refused_in_words(tmp_path):
    paths = [write(tmp_path) for write in FILES.values()]
    results = read_in_child(paths)
    for name, path, (seconds, said) in zip(FILES, paths, results, strict=True):
        assert said.startswith(("ValueError: ", "FileNotFoundError: ")), f"{name}: {said}"
        assert path.name in said and len(said) < 500 and said.isprintable(), f"{name}: {said}"
        assert "expected" in said and "weights_only" not in said, f"{name}: {said}"
        assert seconds < 4, f"{name}: {seconds} s"
