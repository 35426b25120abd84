"""Writing weights: on a file system that takes no more, the error says so and nothing is left."""

import errno
import json

import pytest
import torch

from pixart_pack.pixart.files.atomic import write_atomically
from pixart_pack.pixart.lora import LowRank, save_lora
from pixart_pack.pixart.weights.saving import save_checkpoint
from pixart_pack.tests.tiny_pixart import make_weights, tiny_config

CONFIG = tiny_config()
LIMIT_BYTES = 2**15


@pytest.fixture
def limited():
    """A limit of the kernel on the size of files, in place of a full disk."""
    resource = pytest.importorskip("resource")
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT_BYTES, limit[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limit)


def save_factors(path):
    width = CONFIG.hidden_size
    factor = LowRank(torch.zeros(256, width), torch.zeros(3 * width, 256))
    save_lora(path, {"blocks.0.attn.qkv": factor}, layout="peft" if path.suffix == "" else "kohya")


@pytest.mark.parametrize(
    "name", ["a.safetensors", "a.pth", "folder", "shards", "lora.safetensors", "lora", "text.json"]
)
def test_a_full_disk_is_an_error_of_the_system(tmp_path, name, limited):
    path = tmp_path / name
    with pytest.raises(OSError) as raised:
        if name.startswith("lora"):
            save_factors(path)
        elif name == "text.json":
            write_atomically(path, lambda file: file.write_text(json.dumps("x" * 2 * LIMIT_BYTES)))
        else:
            shards = {"shard_bytes": 2 * LIMIT_BYTES} if name == "shards" else {}
            save_checkpoint(path, make_weights(CONFIG), CONFIG, **shards)
    assert raised.value.errno == errno.EFBIG and "File too large" in str(raised.value)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_other_failures_stay_what_they_are(tmp_path):
    def fail(file):
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        write_atomically(tmp_path / "a.pth", fail)
    assert not list(tmp_path.iterdir())
