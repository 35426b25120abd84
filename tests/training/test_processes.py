"""Training on several processes, really launched: the same losses as one process with the same global batch."""

import signal
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from pixart_pack.pixart.commands.train import run_config
from pixart_pack.pixart.data.buckets import BucketSampler
from pixart_pack.pixart.data.cache import DatasetEncoder, EncodeSettings
from pixart_pack.pixart.data.features import open_features
from pixart_pack.pixart.data.records import check_records
from pixart_pack.pixart.data.sources import read_dataset
from pixart_pack.pixart.data.variety.captions import CaptionVariety
from pixart_pack.pixart.data.variety.records import Variety, vary
from pixart_pack.pixart.data.variety.views import ViewVariety
from pixart_pack.pixart.lora import read_lora
from pixart_pack.pixart.training.processes import _check_sharded
from pixart_pack.pixart.training.report import read_log
from pixart_pack.pixart.training.settings import RunConfig, read_config, write_config
from pixart_pack.pixart.training.state import Checkpoints
from pixart_pack.pixart.training.validation import ValidationPrompt, write_prompts
from pixart_pack.pixart.weights.saving import save_checkpoint
from pixart_pack.tests import processes
from pixart_pack.tests.tiny_pixart import make_weights, tiny_config
from pixart_pack.tests.training_data import WIDTH, tiny_settings

pytest.importorskip("accelerate")
STEPS = 4
VAE = processes.ROOT / "demo" / "models" / "vae" / "pixart_demo_vae.safetensors"
FSDP = "--use_fsdp --fsdp_version 2 --fsdp_auto_wrap_policy TRANSFORMER_BASED_WRAP"  # as the README has it
SHARDED = "the weights are shared out (FSDP)"
LAUNCHERS = {
    "one": processes.ALONE,
    "ddp": processes.accelerate(),
    "fsdp": processes.accelerate(*FSDP.split(), "--fsdp_transformer_layer_cls_to_wrap", "PixArtBlock"),
    "torchrun": processes.TORCHRUN,
}


def encode_text(captions):
    generator = torch.Generator().manual_seed(len(captions[0]))
    return [torch.randn(len(caption.split()) + 1, WIDTH, generator=generator) for caption in captions]


def encode_image(pixels):
    means = torch.nn.functional.avg_pool2d(pixels.movedim(-1, 1), 8) * 4
    return torch.cat([means, means.sum(1, keepdim=True)], 1), None


def encode(records, folder, settings):
    encoder = DatasetEncoder(records, folder, settings, "text", "image")
    encoder.encode_captions(encode_text)
    encoder.encode_pictures(encode_image)
    encoder.features()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model and an encoded dataset on disk."""
    folder = tmp_path_factory.mktemp("processes")
    config = tiny_config()
    save_checkpoint(folder / "model.safetensors", make_weights(config), config)
    pictures = folder / "pictures"
    pictures.mkdir()
    for number in range(10):
        size = (64, 64) if number % 3 else (96, 64)
        noise = np.random.default_rng(number).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(noise).save(pictures / f"{number}.png")
        (pictures / f"{number}.txt").write_text("a word " * (number % 4 + 1))
    records = [
        replace(each, is_prior=number % 4 == 1, control=each.picture)
        for number, each in enumerate(read_dataset(pictures))
    ]
    encode(records, folder / "features", EncodeSettings(base_px=64))
    tags = CaptionVariety(shuffle=True, variants=3, separator=" ", suffix="big")
    variety = Variety(tags, ViewVariety(2, zoom=1.5, flip=0.5, colour=0.5), repeats=1.5, weight=0.7)
    masked = [replace(each, mask=each.picture, control=None, is_prior=False) for each in records[:6]]
    encode(vary(check_records(masked), variety).records, folder / "sizes", EncodeSettings(64, more_px=(96, 128)))
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(shape, generator=generator)

    prompts = [ValidationPrompt(random(3, WIDTH), (8, width), random(4, 8, width)) for width in (8, 10)]
    write_prompts(folder / "prompts.safetensors", prompts)
    return folder


def configuration(place, name, model="model.safetensors", features="features", **fields):
    """Write a configuration, which the test's place gets, with validation pictures; returns its file."""
    usual = {"steps": STEPS, "batch_size": 4, "checkpoint_every": 2, "ema_decay": 0.9, "accumulation": 2,
             "dropout": 0.1}  # fmt: skip
    if fields.get("kind", "lora") == "lora":
        usual["prior_target"] = "model"  # which asks the frozen model in some batches and not in others
    settings = tiny_settings(**{**usual, "sample_every": 2, "sample_steps": 2, **fields})
    more = {"output": "runs", "name": name, "validation": "prompts.safetensors", "vae": str(VAE)}
    file = place / f"{name}.yaml"
    write_config(file, RunConfig(model, features, settings, **more))
    return file


def begin(launcher, *files, really=False):
    """Start the trainings of these files, one after another in the same processes.

    really: by the launcher itself, in new processes; otherwise forked, with the variables that it gives to each.
    """
    device = ["--device", "cpu"] if launcher == "one" else []
    if really:
        return processes.start("pixart", "train", *files, *device, launcher=LAUNCHERS[launcher])
    each = [{}] if launcher == "one" else processes.ranks(LAUNCHERS[launcher])
    return processes.Forked("pixart", "train", *files, *device, each=each)


def launch(launcher, *files):
    """Run the trainings of these files; returns what was printed, each training's part apart."""
    process = begin(launcher, *files)
    said, errors = processes.finish(process)
    assert process.returncode == 0, said[-2000:] + errors[-4000:]
    *parts, _ = (said + errors).split("steps are done")
    assert len(parts) == len(files)
    return parts


def folder_of(place, name):
    return place / "runs" / f"{name}_001"


@pytest.fixture(scope="module")
def alone(place):
    """A function: a name and settings -> the folder of that training in this process, each made once."""
    made = {}

    def folder(name, **fields):
        if name not in made:
            threads = torch.get_num_threads()
            torch.set_num_threads(1)  # as the processes have
            try:
                run_config(read_config(configuration(place, f"alone_{name}", **fields)), "cpu")
            finally:
                torch.set_num_threads(threads)
            made[name] = folder_of(place, f"alone_{name}")
        return made[name]

    return folder


def losses(folder):
    return [entry["loss"] for entry in read_log(folder / "log.jsonl")]


def assert_like_one(folder, alone):
    # float32: the mean over four pictures, or of two means over two
    assert losses(folder) == pytest.approx(losses(alone), rel=1e-5)
    given, expected = (Checkpoints(each / "checkpoints", 1).load() for each in (folder, alone))
    for part in ("parameters", "average", "extra"):
        ours, theirs = (each[part]["shadow"] if part == "average" else each[part] for each in (given, expected))
        for key in ours:
            torch.testing.assert_close(ours[key], theirs[key], rtol=1e-3, atol=1e-5)  # Adam divides by small numbers
    for path in (folder / "samples").glob("*.png"):
        one, other = (np.asarray(Image.open(each / "samples" / path.name), np.int16) for each in (folder, alone))
        assert np.abs(one - other).max() <= 1 and one.std() > 1


def assert_equal(folder, whole):
    assert losses(folder) == losses(whole)
    given, expected = (Checkpoints(each / "checkpoints", 1).load()["parameters"] for each in (folder, whole))
    assert all(torch.equal(given[name], expected[name]) for name in expected)


PLAIN = {"sample_every": 0}
CUT = {"checkpoint_every": 0, "sample_every": 0}
NARROW = {"kind": "lora", "dtype": "bf16", "base_dtype": "fp8", "targets": "all-linear", "checkpointing": True}
# What two processes train in the same launch: pictures of three sizes with variants, masks and repeats; distribution
# matching, whose two networks are trained by one step.
FURTHER = {
    "sizes": {**PLAIN, "features": "sizes", "steps": 16, "prior_target": "picture"},
    "dmd_lora": {**PLAIN, "kind": "dmd_lora"},
    "dmd": {**PLAIN, "kind": "dmd", "dmd_fake": "full", "steps": 2},
}
SHARED = ("lcm", "lcm_lora", "controlnet")  # a teacher, an average, copied blocks


def cut(place, launcher):
    """Interrupt a training by Ctrl-C or, in one process, SIGTERM; returns the steps at which it shall end."""
    name, batch_size = f"cut_{launcher}", 4 if launcher == "one" else 2
    file = configuration(place, name, steps=100_000, batch_size=batch_size, **CUT)
    process = begin(launcher, file, really=launcher == "fsdp")
    folder = folder_of(place, name)
    processes.wait_until(lambda: len(read_log(folder / "log.jsonl")) > 2, process)
    process.send_signal(signal.SIGTERM) if launcher == "one" else processes.interrupt(process)
    said, errors = processes.finish(process)
    steps = len(losses(folder))
    assert steps > 2 and (launcher != "one" or process.returncode == 0), said + errors
    assert [path.name for path in (folder / "checkpoints").iterdir()] == [f"step-{steps:08d}.pt"]
    assert not read_lora(folder / f"{folder.name}.safetensors").unmatched, said + errors
    configuration(place, name, steps=steps + 2, batch_size=batch_size, **CUT)
    return steps + 2


@pytest.fixture(scope="module")
def several(place):
    """A function: launcher -> (the steps of its interrupted training, what was printed by name).

    All trainings of a launcher go in one launch: a new process takes longer than they do.
    """

    @cache
    def run(launcher):
        steps = cut(place, launcher) if launcher in ("ddp", "fsdp") else None
        files = {f"cut_{launcher}": place / f"cut_{launcher}.yaml"} if steps else {}
        for kind in {"ddp": ["lora"], "torchrun": ["full"], "fsdp": ["lora", "full"]}[launcher]:
            files[kind] = configuration(place, f"{launcher}_{kind}", kind=kind, batch_size=2)
        if launcher == "ddp":
            files |= {
                name: configuration(place, f"ddp_{name}", **FURTHER[name], batch_size=size)
                for name, size in (("sizes", 2), ("dmd_lora", 1), ("dmd", 1))
            }
        if launcher == "fsdp":
            for kind in SHARED:
                files[f"{kind} begins"] = configuration(place, f"begun_{kind}", kind=kind, batch_size=2, steps=2)
            files["narrow"] = configuration(place, "fsdp_narrow", **NARROW, batch_size=2)
        printed = dict(zip(files, launch(launcher, *files.values()), strict=True))
        if launcher == "fsdp":
            goes_on = [
                configuration(place, f"begun_{kind}", kind=kind, batch_size=2, sample_every=0) for kind in SHARED
            ]
            printed |= zip(SHARED, launch(launcher, *goes_on), strict=True)
        return steps, printed

    return run


@pytest.mark.slow
@pytest.mark.parametrize("launcher, kind", [("ddp", "lora"), ("torchrun", "full"), ("fsdp", "lora"), ("fsdp", "full")])
def test_two_processes_train_as_one_does(place, alone, several, launcher, kind):
    _, printed = several(launcher)
    folder = folder_of(place, f"{launcher}_{kind}")
    assert len(losses(folder)) == STEPS
    assert len(list(folder.glob("samples/*.png"))) == 3
    assert_like_one(folder, alone(kind, kind=kind))
    assert printed[kind].count(SHARDED) == (launcher == "fsdp")
    if kind == "lora":
        assert not read_lora(folder / f"{folder.name}.safetensors").unmatched


@pytest.mark.slow
@pytest.mark.parametrize("name", FURTHER)
def test_two_processes_train_several_sizes_and_match_distributions_as_one_does(place, alone, several, name):
    _, printed = several("ddp")
    folder, fields = folder_of(place, f"ddp_{name}"), FURTHER[name]
    one = {} if name == "sizes" else {"batch_size": 2}
    assert_like_one(folder, alone(name, **{**fields, **one}))
    assert "has all weights (DDP)" in printed[name] and len(losses(folder)) == fields.get("steps", STEPS)
    if name == "sizes":
        features = open_features(place / "sizes")
        sampler = BucketSampler(features.bins, 4, repeats=features.repeats)
        seen = {features.bins[next(sampler)[0]] for _ in range(2 * 16)}  # of all forward passes
        assert len(seen) == len({*features.bins}) == 6 and "other size than the model's" in printed[name]


@pytest.mark.slow
@pytest.mark.parametrize("kind", SHARED)
def test_sharded_teachers_averages_and_copied_blocks_train_and_go_on_as_one_process_does(place, alone, several, kind):
    _, printed = several("fsdp")
    assert SHARDED in printed[kind] and "goes on after step 2" in printed[kind]
    folders = folder_of(place, f"begun_{kind}"), alone(kind, kind=kind)
    assert_like_one(*folders)
    given, expected = (load_file(each / f"{each.name}.safetensors") for each in folders)
    for name, tensor in expected.items():
        torch.testing.assert_close(given[name], tensor, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    "fields, is_second, match",
    [
        ({}, False, "FSDP of the first version: got fsdp_version 1, expected 2. Launch with --fsdp_version 2"),
        ({"optimizer": "came"}, True, "Optimiser cannot be sharded: got 'came', expected adamw or lion"),
        ({"dtype": "fp16"}, True, "fp16 cannot be sharded: got dtype fp16 .* Set dtype to bf16"),
    ],
)
def test_what_cannot_be_sharded_is_told_before_any_work(fields, is_second, match):
    with pytest.raises(ValueError, match=match):
        _check_sharded(tiny_settings(**fields), is_second)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["ddp", "fsdp"])
def test_ctrl_c_ends_a_training_of_two_processes_with_its_result_and_it_goes_on(place, alone, several, launcher):
    steps, _ = several(launcher)
    folder = folder_of(place, f"cut_{launcher}")
    assert len(losses(folder)) == steps
    assert_like_one(folder, alone(f"cut_{launcher}", steps=steps, **CUT))


@pytest.mark.slow
def test_a_signal_ends_a_training_with_its_result_and_it_goes_on(place, alone):
    steps = cut(place, "one")
    # In a new process, and after a training that fails, as if somebody had left it in the queue overnight.
    broken = configuration(place, "broken", model="missing.safetensors")
    process = begin("one", broken, place / "cut_one.yaml")
    said, errors = processes.finish(process)
    assert process.returncode == 1 and "error: broken: " in errors and "got 1 of 2 ('broken')" in errors
    folder = folder_of(place, "cut_one")
    assert len(losses(folder)) == steps
    assert_equal(folder, alone("cut_one", steps=steps, **CUT))


@pytest.mark.slow
def test_a_killed_training_goes_on_from_its_last_checkpoint(place, alone):
    fields = {"checkpoint_every": 3, "sample_every": 0}
    process = begin("one", configuration(place, "alone_killed", steps=100_000, **fields))
    folder = folder_of(place, "alone_killed")
    checkpoints = Checkpoints(folder / "checkpoints", 1)
    processes.wait_until(lambda: len(checkpoints.all()) > 1, process)
    process.kill()
    processes.finish(process)
    steps = checkpoints.load()["step"]
    assert steps > 3 and not (folder / "result.json").exists()
    assert alone("killed", steps=steps + 2, **fields) == folder
    assert_equal(folder, alone("unbroken", steps=steps + 2, **fields))


@pytest.mark.slow
def test_sharded_weights_of_several_precisions(place, alone, several):
    """A base in bf16 and 8 bits under adapters in fp32, as a large model is trained."""
    _, printed = several("fsdp")
    assert SHARDED in printed["narrow"]
    given, expected = losses(folder_of(place, "fsdp_narrow")), losses(alone("narrow", **NARROW))
    assert given == pytest.approx(expected, rel=1e-2)  # bfloat16 has 8 bits
