"""Make the demo's pictures on a running ComfyUI: PNG files and one contact sheet with the captions under them.

Run by `python dev.py demo`.
"""

import argparse
import io
import json
import re
import sys
import time
import webbrowser
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from ..pixart.drawing.sheets import labelled_sheet
from .client import ComfyClient, PromptError

WORKFLOW = Path(__file__).resolve().parent.parent / "workflows" / "api" / "demo.json"
# Each names only combinations of shape, colour and place that the model was never shown.
CAPTIONS = (
    "a small red circle in the bottom right on a brown background",
    "a large cyan triangle at the top on a gray background",
    "a large blue square in the top left on a black background",
    "a small blue cross in the center on a gray background",
    "a large cyan circle on the right and a small green cross on the left on a white background",
    "a large red circle in the top left and a large yellow cross on the right on a gray background",
    "a large purple triangle in the bottom right and a small red square in the bottom left on a pink background",
    "a large green triangle on the right and a large yellow circle on the left on a brown background",
)
CELL_PX = 256
COLUMNS = 4


def find_prompt_node(workflow: dict) -> dict:
    """The node whose `text` makes the positive conditioning, found by going up from an input named `positive`."""
    queue = [node["inputs"]["positive"][0] for node in workflow.values() if "positive" in node["inputs"]]
    seen = set()
    while queue:
        name = queue.pop(0)
        inputs = workflow[name]["inputs"]
        if isinstance(inputs.get("text"), str):
            return workflow[name]
        seen.add(name)
        links = [value[0] for value in inputs.values() if isinstance(value, list)]
        queue += [link for link in links if link not in seen]
    raise ValueError("No prompt in the workflow: expected a node with a text that leads to an input named positive")


def set_inputs(workflow: dict, names: tuple[str, ...], value: float) -> None:
    """Set every input of these names that no link feeds. Raises ValueError when there is none."""
    found = False
    for node in workflow.values():
        for name in names:
            if name in node["inputs"] and not isinstance(node["inputs"][name], list):
                node["inputs"][name] = value
                found = True
    if not found:
        raise ValueError(f"No {' or '.join(names)} in the workflow: cannot set it to {value}")


def fill_workflow(template: str, caption: str, options: argparse.Namespace) -> dict:
    """A workflow with the caption and with those settings that were given."""
    workflow = json.loads(template)
    find_prompt_node(workflow)["inputs"]["text"] = caption
    settings = {("seed", "noise_seed"): options.seed, ("steps",): options.steps, ("cfg",): options.guidance}
    if options.size:
        settings |= {("width",): options.size[0], ("height",): options.size[1]}
    for names, value in settings.items():
        if value is not None:
            set_inputs(workflow, names, value)
    return workflow


def read_inputs(workflow: dict, names: tuple[str, ...]) -> list:
    """The values of every input of these names that no link feeds."""
    inputs = [node["inputs"] for node in workflow.values()]
    return [each[name] for each in inputs for name in names if name in each and not isinstance(each[name], list)]


def describe_run(workflow: dict) -> str:
    """What pictures were made with, for the head of their sheet: model, steps, guidance, seed."""
    model = read_inputs(workflow, ("checkpoint", "ckpt_name", "unet_name"))
    parts = [str(name).removesuffix(".safetensors") for name in model]
    for word, names in (("steps", ("steps",)), ("guidance", ("cfg",)), ("seed", ("seed", "noise_seed"))):
        parts += [f"{word} {value}" for value in read_inputs(workflow, names)]
    return ", ".join(parts)


class Progress:
    """Shows a run's sampling as a progress bar, and measures it."""

    def __init__(self, title: str):
        self.bar = tqdm(desc=title, unit="step", mininterval=0.2, bar_format="{l_bar}{bar:20}| {n_fmt}/{total_fmt}")
        self.sampling_s = 0.0
        self._node_began = time.perf_counter()
        self._samples = False

    def __call__(self, kind: str, data: dict) -> None:
        if kind == "progress":
            self._samples = True
            self.bar.total = data["max"]
            self.bar.update(data["value"] - self.bar.n)
        elif kind == "executing":
            if self._samples:
                self.sampling_s += time.perf_counter() - self._node_began
            self._node_began, self._samples = time.perf_counter(), False


def make_pictures(client: ComfyClient, options: argparse.Namespace) -> list[tuple[str, Image.Image]]:
    """Run the workflow once for each caption, write the files, and return the captions with their pictures."""
    template = options.workflow.read_text(encoding="utf-8")
    captions = options.prompt or CAPTIONS
    options.output.mkdir(parents=True, exist_ok=True)
    pictures = []
    for number, caption in enumerate(captions, start=1):
        began = time.perf_counter()
        progress = Progress(f"{number}/{len(captions)} {caption[:60]}")
        with progress.bar:
            prompt_id = client.queue(fill_workflow(template, caption, options))
            entry = client.wait(prompt_id, timeout_s=3600, on_event=progress)
        taken_s = time.perf_counter() - began
        for index, content in enumerate(client.images(entry)):
            words = re.sub(r"[^a-z0-9]+", "-", caption.lower()).strip("-")[:40].strip("-")
            path = options.output / f"demo_{number:02}{f'_{index}' if index else ''}_{words}.png"
            path.write_bytes(content)
            pictures.append((caption, Image.open(io.BytesIO(content)).convert("RGB")))
            tqdm.write(f"{path}  {taken_s:.1f} s, of which sampling {progress.sampling_s:.1f} s")
    return pictures


def size(text: str) -> tuple[int, int]:
    width_px, height_px = text.split("x")
    return int(width_px), int(height_px)


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", required=True, help="the server's address, such as http://127.0.0.1:8188")
    parser.add_argument("--output", type=Path, default=Path("output"), help="the folder for the pictures")
    parser.add_argument("--workflow", type=Path, default=WORKFLOW, help="the workflow to run, in API format")
    parser.add_argument("--prompt", action="append", help="a caption; may be given several times")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--guidance", type=float)
    parser.add_argument("--size", type=size, metavar="WIDTHxHEIGHT")
    parser.add_argument("--open", action="store_true", help="show the contact sheet when it is made")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    began = time.perf_counter()
    try:
        with ComfyClient(options.url) as client:
            pictures = make_pictures(client, options)
    except (PromptError, ValueError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    except KeyboardInterrupt:
        return 130
    if not pictures:
        sys.stderr.write("error: The workflow gave no pictures: expected a SaveImage node in it\n")
        return 1
    path = options.output / "demo_contact_sheet.png"
    captions, images = zip(*pictures, strict=True)
    title = describe_run(fill_workflow(options.workflow.read_text(encoding="utf-8"), captions[0], options))
    labelled_sheet(images, captions, COLUMNS, (CELL_PX, CELL_PX), title).save(path)
    sys.stdout.write(f"{path}\n{len(pictures)} pictures in {time.perf_counter() - began:.1f} s\n")
    if options.open and not webbrowser.open(path.resolve().as_uri()):
        sys.stdout.write("No program to show pictures was found here. Open the file yourself.\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
