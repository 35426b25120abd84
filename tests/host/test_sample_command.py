"""`python -m pixart sample`: the pictures that ComfyUI makes, without it."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pixart_pack.pixart.commands import evaluate, sample
from pixart_pack.pixart.commands.console import run_command
from pixart_pack.pixart.solvers import PRESETS, SAMPLERS
from pixart_pack.pixart.text import clean_prompt
from pixart_pack.tests import processes
from pixart_pack.tests.host.graph import Graph

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "demo" / "models"
NAMES = {"model": "diffusion_models/pixart_demo", "t5": "text_encoders/pixart_demo_t5", "vae": "vae/pixart_demo_vae"}
FILES = {flag: f"{DEMO / name}.safetensors" for flag, name in NAMES.items()}
CAPTION = "a large red circle in the top left on a gray background"
# Of 255. Both compute in float32, in other orders; one more for the rounding of Save Image, which is always down.
ROUNDING = 3


@pytest.fixture(autouse=True)
def tokenizer(comfyui, monkeypatch):
    monkeypatch.setenv("COMFYUI_PATH", str(comfyui))


def arguments(output, *more):
    models = [part for flag, path in FILES.items() for part in (f"--{flag}", path)]
    return [*models, "--dtype", "fp32", "--device", "cpu", "--output", str(output), *more]


def run(output, *more):
    return run_command(sample.main, sample.parse(), arguments(output, *more))


def pixels(path):
    return np.asarray(Image.open(path).convert("RGB"), np.int16)


class DemoGraph(Graph):
    """The demo model up to its conditioning; `picture` ends it."""

    def __init__(self, host, text, negative):
        super().__init__()
        self.host = host
        for name in NAMES.values():
            target = host.models / f"{name}.safetensors"
            if not target.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes((DEMO / f"{name}.safetensors").read_bytes())
        self.model = model = self.add("PixArtLoadCheckpoint", checkpoint="pixart_demo.safetensors")
        clip = self.add("PixArtLoadT5", text_encoder="pixart_demo_t5.safetensors")
        self.positive = positive = self.add("PixArtTextEncode", clip=clip, text=text, model=model)
        self.negative = self.add(
            "PixArtNegative", mode="text", text=negative, clip=clip, positive=positive, model=model
        )

    def picture(self, node, width, height, **settings):
        """What a sampling node makes of noise."""
        links = {"model": self.model, "positive": self.positive, "negative": self.negative}
        empty = self.add("EmptyLatentImage", width=width, height=height, batch_size=1)
        latent = self.add(node, latent_image=empty, **links, **settings)
        vae = self.add("VAELoader", vae_name="pixart_demo_vae.safetensors")
        self.add("SaveImage", images=self.add("VAEDecode", samples=latent, vae=vae), filename_prefix="sample")
        return np.asarray(self.host.run(self.nodes, timeout_s=300)[0].convert("RGB"), np.int16)


def in_comfyui(host, text, negative, width, height, **settings):
    return DemoGraph(host, text, negative).picture("KSampler", width, height, denoise=1.0, **settings)


def assert_same(found, expected):
    assert found.shape == expected.shape and found.std() > 5
    assert np.abs(found - expected).max() <= ROUNDING


# solver, schedule, steps, guidance, negative, width and height; 21 and 13 latent pixels a side are odd
CASES = [
    ("dpm_solver", "uniform", 10, 4.0, "", 160, 96),
    ("dpm_solver", "karras", 6, 1.0, "", 168, 104),
    ("sa_solver", "uniform", 8, 3.0, "a blue square", 160, 96),
    ("sa_solver", "kl_optimal", 6, 4.5, "a blue square", 104, 168),
    ("iddpm", "iddpm", 12, 4.0, "", 160, 96),
    ("iddpm", "iddpm", 9, 2.0, "a green star", 88, 72),
    ("ddim", "ddim", 8, 4.0, "a blue square", 168, 104),
    ("lcm", "lcm", 4, 1.0, "", 160, 96),
    ("dmd", "dmd", 1, 1.0, "", 72, 88),
]


def test_every_solver_is_compared():
    assert {case[0] for case in CASES} == set(SAMPLERS)


@pytest.mark.parametrize(("solver", "schedule", "steps", "guidance", "negative", "width", "height"), CASES)
def test_the_picture_is_comfyuis(host, tmp_path, solver, schedule, steps, guidance, negative, width, height):
    settings = {"sampler_name": f"pixart_{solver}", "scheduler": f"pixart_{schedule}"}
    expected = in_comfyui(host, CAPTION, negative, width, height, seed=5, steps=steps, cfg=guidance, **settings)
    flags = ["--solver", solver, "--schedule", schedule, "--steps", str(steps), "--guidance", str(guidance)]
    more = ["--negative", negative, "--size", f"{width}x{height}", "--seed", "5"]
    assert run(tmp_path, "--prompt", CAPTION, *more, *flags) == 0
    assert_same(pixels(next(tmp_path.glob("*.png"))), expected)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_published_setting_is_comfyuis(host, tmp_path, preset):
    graph = DemoGraph(host, CAPTION, "")
    chosen = graph.add("PixArtSamplingPreset", model=graph.model, preset=preset, denoise=1.0)
    settings = {"sampler": chosen, "sigmas": [chosen[0], 1], "cfg": [chosen[0], 2]}
    expected = graph.picture("SamplerCustom", 72, 64, add_noise=True, noise_seed=5, **settings)
    assert run(tmp_path, "--prompt", CAPTION, "--size", "72x64", "--seed", "5", "--preset", preset) == 0
    assert_same(pixels(next(tmp_path.glob("*.png"))), expected)


def test_each_of_a_batch_is_comfyuis_picture_of_its_seed(host, tmp_path):
    texts = [CAPTION, "a blue square", "a small green star in the center and a red circle in the bottom left"]
    flags = [part for text in texts for part in ("--prompt", text)]
    more = ["--solver", "sa_solver", "--steps", "6", "--guidance", "3", "--negative", "a star", "--seed", "8"]
    assert run(tmp_path, *flags, *more, "--size", "104x72", "--batch", "3") == 0
    for number, path in enumerate(sorted(tmp_path.glob("*.png"))):
        settings = {"sampler_name": "pixart_sa_solver", "scheduler": "pixart_uniform", "steps": 6, "cfg": 3.0}
        expected = in_comfyui(host, texts[number], "a star", 104, 72, seed=8 + number, **settings)
        assert_same(pixels(path), expected)
        assert f"Seed: {8 + number}" in Image.open(path).text["parameters"]


def test_a_real_process_with_a_file_of_prompts_of_several_sizes(tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(f"{CAPTION}\n\n{CAPTION} --ar 9:16\na blue square\n", encoding="utf-8")
    output = tmp_path / "pictures"
    command = [sys.executable, "-m", "pixart", "sample", *arguments(output, "--prompts", str(prompts), "--steps", "2")]
    done = subprocess.run([*command, "--batch", "2"], cwd=ROOT, env=os.environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = sorted(output.glob("*.png"))
    assert [path.name[:9] for path in found] == ["00000_a-l", "00001_a-l", "00002_a-b"]
    sizes = [Image.open(path).size for path in found]
    assert sizes[0] == sizes[2] and sizes[1][0] > sizes[1][1]
    assert CAPTION in Image.open(found[0]).text["parameters"]


def test_a_picture_does_not_depend_on_the_batch(tmp_path):
    prompts = ["--prompt", CAPTION, "--prompt", "a blue square", "--size", "64x64", "--steps", "3"]
    assert run(tmp_path / "one", *prompts) == run(tmp_path / "two", *prompts, "--batch", "2") == 0
    for one, two in zip(*(sorted((tmp_path / name).glob("*.png")) for name in ("one", "two")), strict=True):
        assert np.abs(pixels(one) - pixels(two)).max() <= 1


def test_the_negative_prompt_is_cleaned_as_the_others(tmp_path):
    """The caption is clean already, so that only the negative can differ."""
    usual = ["--prompt", CAPTION, "--steps", "2", "--guidance", "4"]
    dirty = "A  BLUE&nbsp;square https://example.com <b>here</b>"
    assert run(tmp_path / "cleaned", *usual, "--negative", dirty, "--clean") == 0
    assert run(tmp_path / "clean", *usual, "--negative", clean_prompt(dirty)) == 0
    assert run(tmp_path / "dirty", *usual, "--negative", dirty) == 0
    cleaned, clean, kept = (next((tmp_path / name).glob("*.png")) for name in ("cleaned", "clean", "dirty"))
    assert np.array_equal(pixels(cleaned), pixels(clean)) and not np.array_equal(pixels(cleaned), pixels(kept))
    assert f"Negative prompt: {clean_prompt(dirty)}" in Image.open(cleaned).text["parameters"]


def test_nothing_is_overwritten_without_force(tmp_path, capsys):
    settings = ["--prompt", CAPTION, "--size", "64x64", "--steps", "1"]
    assert run(tmp_path, *settings) == 0
    assert run(tmp_path, *settings) == 1
    assert "Picture exists" in capsys.readouterr().err
    assert run(tmp_path, *settings, "--force") == 0


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--prompt", "a", "--size", "100x100"], "expected multiples of 8"),
        (["--prompt", ""], "No prompts"),
        (["--prompt", "a", "--steps", "0"], "Too few steps"),
        (["--prompt", "a", "--batch", "0"], "Batch size out of range: got 0"),
        (["--prompts", "/nowhere/prompts.txt"], "prompts.txt"),
        (["--prompt", "a", "--vae", FILES["t5"]], "Not an autoencoder"),
        (["--prompt", "a", "--model", FILES["vae"]], "pixart_demo_vae"),
    ],
)
def test_bad_input_is_one_line(tmp_path, capsys, more, message):
    assert run(tmp_path, *more) == 1
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


@pytest.mark.slow
def test_compiled_pictures_are_the_same(tmp_path, caplog):
    prompts = ["--prompt", f"{CAPTION} --ar 9:16", "--steps", "2"]
    assert run(tmp_path / "plain", *prompts) == run(tmp_path / "compiled", *prompts, "--compile") == 0
    for one, two in zip(*(sorted((tmp_path / name).glob("*.png")) for name in ("plain", "compiled")), strict=True):
        assert_same(pixels(one), pixels(two))
    assert "runs uncompiled" not in caplog.text


def test_a_reference_is_encoded_and_read(tmp_path, capsys):
    """Its brown goes into a background that the caption leaves open."""
    Image.new("RGB", (96, 72), (110, 70, 40)).save(tmp_path / "brown.png")
    more = ["--prompt", "a large red circle in the center", "--steps", "8", "--size", "64x64", "--guidance", "1"]
    given = ["--reference", str(tmp_path / "brown.png"), "--reference-strength", "3"]
    assert run(tmp_path / "plain", *more) == 0
    assert run(tmp_path / "off", *more, *given[:2], "--reference-strength", "0") == 0
    assert run(tmp_path / "like", *more, *given) == 0
    plain, off, like = (pixels(next((tmp_path / name).glob("*.png"))) for name in ("plain", "off", "like"))
    assert np.array_equal(plain, off)
    brown = np.array([110, 70, 40])
    far, near = (np.abs(np.median(picture.reshape(-1, 3), 0) - brown).mean() for picture in (plain, like))
    assert near < far - 5
    said = Image.open(next((tmp_path / "like").glob("*.png"))).text["parameters"]
    assert said.endswith('Reference: "brown.png (strength 3, 0:1)"')
    for wrong, message in (
        (["--reference", "none.png"], "No reference"),
        ([*given, "--reference-range", "0.5:0.2"], "Part of the sampling out of range"),
        ([*given[:3], "-1"], "Strength out of range"),
    ):
        assert run(tmp_path / "wrong", *more, *wrong) == 1
        assert message in capsys.readouterr().err


@pytest.fixture
def one_thread():
    """As many as each of the processes that torchrun starts has."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


SHARED = {
    # command, the options of both ways, those of two processes alone
    "odd": ("sample", ["--batch", "2", "--seed", "3", "--clean"], []),
    "alone": ("sample", ["--seed", "9"], []),
    "guided": ("sample", ["--batch", "2", "--guidance", "3", "--negative", "a star"], ["--parallel", "guidance"]),
    "scored": ("evaluate", ["--batch", "2", "--scorer", "demo.prompt_scorer:score"], []),
}


@pytest.mark.slow
def test_two_processes_make_the_pictures_of_one(tmp_path, one_thread, monkeypatch):
    """One launch for all of it: five prompts in batches of two, one prompt for two processes, two at each picture,
    an evaluation, and a process that fails while the other one waits for it."""
    texts = [CAPTION, "a blue square", "a small green star in the center", "a red circle", "a blue circle"]
    scored = tmp_path / "prompts.txt"
    scored.write_text(f"{CAPTION}\na small blue square in the center on a white background\n{CAPTION}")
    prompts = {"odd": texts, "alone": texts[:1], "guided": texts[:3], "fails": texts[:2]}

    def command(name, kind, output, *more):
        given = [part for text in prompts.get(name, ()) for part in ("--prompt", text)] or [str(scored)]
        return [kind, *given, *arguments(output, "--size", "64x64", "--steps", "2", *more)]

    (tmp_path / "fails" / "00001_a-blue-square.png").mkdir(parents=True)
    listed = [command(name, kind, tmp_path / name, *both, *two) for name, (kind, both, two) in SHARED.items()]
    listed.append(command("fails", "sample", tmp_path / "fails", "--force"))
    (tmp_path / "commands.json").write_text(json.dumps(listed))
    launched = processes.start(
        Path(__file__).with_name("launched.py"), tmp_path / "commands.json", launcher=processes.accelerate()
    )
    said, failure = processes.finish(launched)
    assert launched.returncode != 0 and f"error: rank 1: [Errno {errno.EISDIR}]" in failure, failure
    assert said.count("report.md") == 1, failure
    monkeypatch.syspath_prepend(ROOT)  # where the scorer is found in the pack's folder
    for name, (kind, both, _) in SHARED.items():
        module = {"sample": sample, "evaluate": evaluate}[kind]
        assert run_command(module.main, module.parse(), command(name, kind, tmp_path / "one" / name, *both)[1:]) == 0
        one, two = (sorted(folder.rglob("*.png")) for folder in (tmp_path / "one" / name, tmp_path / name))
        assert [path.name for path in one] == [path.name for path in two] and one
        for first, second in zip(one, two, strict=True):
            assert Image.open(first).text == Image.open(second).text
            # With a prompt and its negative apart, batches and captions have other sizes, which is float32 noise.
            assert np.abs(pixels(first) - pixels(second)).max() <= (name == "guided"), first
    for name in ("scores.json", "report.md", "settings.json"):
        assert (tmp_path / "one" / "scored" / name).read_text() == (tmp_path / "scored" / name).read_text()
