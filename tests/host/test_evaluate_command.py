"""`python -m pixart evaluate` with the demo model: in its own process and through a running ComfyUI."""

import json

import numpy as np
import pytest
from PIL import Image

from pixart_pack.pixart.commands import evaluate
from pixart_pack.pixart.commands.console import run_command
from pixart_pack.tests import processes
from pixart_pack.tests.host.graph import PictureGraph, write_pixart, write_t5
from pixart_pack.tests.host.test_sample_command import FILES, tokenizer  # noqa: F401
from pixart_pack.tests.tiny_pixart import tiny_config

MODELS = [part for flag, path in FILES.items() for part in (f"--{flag}", path)]
LOCAL = [*MODELS, "--dtype", "fp32", "--device", "cpu"]
CAPTIONS = (
    "a large red circle in the top left on a white background",
    "a small blue square in the center on a white background",
    "a large green star in the bottom right on a gray background",
    "a red circle",
    "a small yellow triangle in the top right and a large blue circle in the bottom left on a black background",
)


def run(prompts, output, *arguments):
    command = [str(each) for each in (prompts, "--output", output, *arguments)]
    return run_command(evaluate.main, evaluate.parse(), command)


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(CAPTIONS))
    return path


def pictures_of(output):
    return [np.asarray(Image.open(path), np.int16) for path in sorted((output / "samples").iterdir())]


def test_an_interrupted_process_goes_on_where_it_was(prompts, tmp_path):
    options, output = [*LOCAL, "--size", "64x64", "--steps", "20", "--per-prompt", "4"], tmp_path / "out"
    process = processes.Forked("pixart", "evaluate", prompts, "--output", output, *options)
    processes.wait_until(lambda: list(output.glob("samples/*.png")), process)
    processes.interrupt(process)
    _, error = processes.finish(process)
    assert process.returncode == 130, error
    made = {path: path.stat().st_mtime_ns for path in output.glob("samples/*")}
    assert 0 < len(made) < 20 and {path.suffix for path in made} == {".png"} and not (output / "report.md").exists()
    assert run(prompts, output, *options, "--batch", "8") == 0
    assert len(pictures_of(output)) == 20 and (output / "report.md").is_file()
    assert made == {path: path.stat().st_mtime_ns for path in made}


def test_a_picture_is_told_by_its_seed_and_not_by_its_batch(prompts, tmp_path):
    options, samples = [*LOCAL, "--size", "96x64", "--steps", "3", "--seed", "7"], tmp_path / "out" / "samples"
    assert run(prompts, tmp_path / "out", *options, "--solver", "sa_solver") == 0
    alone = pictures_of(tmp_path / "out")
    assert len(alone) == len(CAPTIONS)
    for number in (1, 3, 4):
        (samples / f"{number:06}.png").unlink()
    assert run(prompts, tmp_path / "out", *options, "--solver", "sa_solver", "--batch", "3") == 0
    for one, other in zip(alone, pictures_of(tmp_path / "out"), strict=True):
        # float32 in batches of other sizes: the last bits, and rounding to 255 levels
        assert np.abs(one - other).max() <= 1 and one.std() > 5


def test_through_a_server_each_prompt_has_its_picture(host, tmp_path):
    files = ("evaluate_tiny.safetensors", "evaluate_t5.safetensors")
    write_pixart(host.models / "diffusion_models" / files[0], tiny_config(base_size=4, pe_scale=1.0))
    write_t5(host.models / "text_encoders" / files[1])
    graph = PictureGraph(*files)
    latent = graph.sample(graph.empty())
    workflow, prompts = tmp_path / "flow.json", tmp_path / "prompts.txt"
    workflow.write_text(json.dumps(graph.save(latent)))
    prompts.write_text("a red dot\na blue dot\n")
    places = ["--prompt-node", f"{graph.positive[0]}.text", "--seed-node", f"{latent[0]}.seed"]
    arguments = ["--workflow", workflow, *places, "--server", host.url, "--per-prompt", 2]
    assert run(prompts, tmp_path / "out", *arguments) == 0
    pictures = [np.asarray(Image.open(path)) for path in sorted((tmp_path / "out" / "samples").iterdir())]
    assert len(pictures) == 4 and len({picture.tobytes() for picture in pictures}) == 4
    graph.nodes[graph.positive[0]]["inputs"]["text"] = "a blue dot"
    graph.nodes[latent[0]]["inputs"]["seed"] = 3
    assert np.array_equal(np.asarray(host.run(graph.nodes)[0].convert("RGB")), pictures[3])
