"""Uploads: only when asked, to a private repository, and never at the cost of the result."""

import sys
from types import SimpleNamespace

import pytest

from pixart_pack.pixart.tracking.hub import check_repository, upload


class Hub:
    """What is asked of the library; a failing one stands for a network that is away."""

    def __init__(self, fails=False):
        self.asked, self.fails = [], fails

    def create_repo(self, name, private, exist_ok):
        self.asked.append(("create", name, private, exist_ok))

    def upload_file(self, path_or_fileobj, path_in_repo, repo_id):
        if self.fails:
            raise ConnectionError("no route to the hub")
        self.asked.append(("upload", path_or_fileobj, path_in_repo, repo_id))
        return f"https://hub/{repo_id}/{path_in_repo}"


def test_a_file_goes_into_a_private_repository(tmp_path, monkeypatch):
    hub, file = Hub(), tmp_path / "mine.safetensors"
    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(HfApi=lambda: hub))
    check_repository("me/mine")
    assert upload(file, "me/mine") == "https://hub/me/mine/mine.safetensors"
    assert hub.asked == [
        ("create", "me/mine", True, True),
        ("upload", str(file), "mine.safetensors", "me/mine"),
    ]


def test_a_failure_says_where_the_result_is(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(HfApi=lambda: Hub(fails=True)))
    with pytest.raises(ValueError, match="Upload failed: got no route to the hub, .* kept here: .*mine.safetensors"):
        upload(tmp_path / "mine.safetensors", "me/mine")


@pytest.mark.parametrize("name", ["mine", "me/mine/x", "../x", "me/", "https://hub/me/x", "me/-"])
def test_what_is_no_repository_is_refused_before_the_training(name):
    with pytest.raises(ValueError, match="Not a repository"):
        check_repository(name)


def test_without_the_package_it_names_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match="pip install huggingface_hub"):
        check_repository("me/mine")
