"""A stranger's file can do no harm: the process lives on, nothing hangs, and the answer is one short line."""

import os
from random import Random

import pytest
import torch

from pixart_pack.pixart.training.state import Checkpoints
from pixart_pack.pixart.weights.pickles import check_pth
from pixart_pack.tests.hostile import FILES, PROTOCOL, random_program, read_in_child, write_pickle

pytestmark = pytest.mark.skipif("sys.platform == 'win32'", reason="limits of a process are set as on Unix")


@pytest.mark.slow
def test_every_hostile_file_is_refused_in_words(tmp_path):
    paths = [write(tmp_path) for write in FILES.values()]
    results = read_in_child(paths)
    for name, path, (seconds, said) in zip(FILES, paths, results, strict=True):
        assert said.startswith(("ValueError: ", "FileNotFoundError: ")), f"{name}: {said}"
        assert path.name in said and len(said) < 500 and said.isprintable(), f"{name}: {said}"
        assert "expected" in said and "weights_only" not in said, f"{name}: {said}"
        assert seconds < 4, f"{name}: {seconds} s"


@pytest.mark.slow
def test_an_adapter_is_read_by_the_same_rules(tmp_path):
    names = ("deep key", "shared key", "expanded tensor", "overflowing shape", "pipe")
    paths = [FILES[name](tmp_path) for name in names]
    for path, (_, said) in zip(paths, read_in_child(paths, "read_tensors, read_lora, ")[1::2], strict=True):
        assert said.startswith("ValueError: ") and path.name in said and len(said) < 500, said


def test_a_training_passes_over_what_only_looks_like_its_checkpoint(tmp_path, caplog):
    checkpoints = Checkpoints(tmp_path, keep_last=9)
    names = ("step", "seconds", "settings", "sampler", "parameters", "extra", "sanity")
    optimizer = {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"betas": (0.9, 0.99)}]}
    state = {**dict.fromkeys(names, 1), "optimizer": optimizer}
    checkpoints.save(1, state)
    for step, name in enumerate(("shared key", "negative stride", "pipe", "entries of one name"), 2):
        os.replace(FILES[name](tmp_path), tmp_path / f"step-{step:08d}.pt")
    torch.save({"step": tmp_path}, tmp_path / "step-00000009.pt")
    assert checkpoints.load() == state
    assert "Foreign objects" in caplog.text and "weights_only" not in caplog.text
    assert len(caplog.records) == 5


def test_what_trainings_hold_is_no_harm(tmp_path):
    weight = torch.nn.Parameter(torch.zeros(2, 2))
    optimizer = torch.optim.AdamW([weight])
    weight.sum().backward()
    optimizer.step()
    content = {
        "optimizer": optimizer.state_dict(),
        "random": torch.get_rng_state(),
        "buckets": {(512, 512): 3, (256, 1024): 1, 0.5: "half", None: "none"},
        "tied": [weight, weight.t()],
        "losses": [0.5] * 1000,
    }
    for zipped in (True, False):
        torch.save(content, tmp_path / "state.pt", _use_new_zipfile_serialization=zipped)
        check_pth(tmp_path / "state.pt")


@pytest.mark.slow
def test_random_programs_end_in_words(tmp_path):
    count = 3000
    random, paths = Random(count), []
    for index in range(count):
        program = random_program(random)
        paths += [write_pickle(tmp_path / f"{index}.pth", program), tmp_path / f"{index}.bin"]
        paths[-1].write_bytes(PROTOCOL + program + b".")
    results = read_in_child(paths, "read_checkpoint, read_tensors, ", timeout_s=count / 5, memory=2**28)
    for path, (seconds, said) in zip([path for path in paths for _ in range(2)], results, strict=True):
        assert said == "read" or said.startswith("ValueError: ") and path.name in said, said
        assert len(said) < 700 and seconds < 1, f"{seconds} s, {said}"
    assert 20 < sum(said == "read" for _, said in results) < len(results) / 2  # neither all sound nor all refused early
