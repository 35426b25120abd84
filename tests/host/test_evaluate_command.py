"""`python -m pixart.evaluate` with the demo model: in its own process and through a running ComfyUI."""

import json

import numpy as np
from PIL import Image

from pixart_pack.pixart import evaluate
from pixart_pack.pixart.command import run_command
from pixart_pack.tests.host.graph import PictureGraph, write_pixart, write_t5
from pixart_pack.tests.host.test_sample_command import FILES, tokenizer  # noqa: F401
from pixart_pack.tests.tiny_pixart import tiny_config


def run(prompts, output, *arguments):
    command = [str(each) for each in (prompts, "--output", output, *arguments)]
    return run_command(evaluate.main, evaluate.parse(), command)


def test_in_process_the_demo_model_is_scored_by_its_own_scorer(tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(
        "a large red circle in the top left on a white background\n"
        "a small blue square in the center on a white background\n"
    )
    models = [part for flag, path in FILES.items() for part in (f"--{flag}", path)]
    options = ["--dtype", "fp32", "--device", "cpu", "--size", "128x128", "--steps", "20", "--guidance", "4"]
    scorer = ["--scorer", "pixart_pack.demo.prompt_scorer:score"]
    assert run(prompts, tmp_path / "out", *models, *options, *scorer) == 0
    means = json.loads((tmp_path / "out" / "scores.json").read_text())["means"]
    assert means["background"] == means["colour"] == means["position"] == 1
    assert "| colour | 1.0000 |" in (tmp_path / "out" / "report.md").read_text()


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
