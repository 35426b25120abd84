"""Workflows as apps: the editor shows a page with the inputs that matter beside the pictures, in place of the graph."""

from collections.abc import Callable
from dataclasses import dataclass

from ..format.graph import Workflow
from .pictures import PICTURES
from .training import TRAINING


@dataclass(frozen=True)
class App:
    """A workflow with a page.

    inputs: in their order, node (its title, or its type), widget, and what the page calls it. outputs: of the pictures.
    """

    graph: Callable[[Workflow], None]
    inputs: tuple[tuple[str, str, str], ...]
    outputs: tuple[str, ...] = ("SaveImage",)

    def __call__(self, workflow: Workflow) -> None:
        self.graph(workflow)
        note = workflow.nodes[0]
        title, rest = note.values["text"].split("\n\n", 1)
        note.values["text"] = f"{title}\n\n{AS_AN_APP}\n\n{rest}"
        nodes = {node.title or node.type: node for node in workflow.nodes}
        inputs = [(nodes[node], widget, label) for node, widget, label in self.inputs]
        workflow.present(inputs, [nodes[each] for each in self.outputs])


AS_AN_APP = "An app: a page with the inputs that matter and the pictures. **Graph**, above left, shows the nodes."
PROMPT = ("Prompt", "text", "Prompt")
SIZE = ("Picture size", "width", "Width"), ("Picture size", "height", "Height")
SEED, STEPS = ("KSampler", "seed", "Seed"), ("KSampler", "steps", "Steps")
GUIDANCE = ("KSampler", "cfg", "Guidance")
APPS = {
    "demo_app": App(PICTURES["demo"], (PROMPT, *SIZE, SEED, STEPS, GUIDANCE)),
    "text_to_image_app": App(
        PICTURES["any_aspect_ratio"],
        (PROMPT, ("PixArtResolution", "ratio", "Height to width"), SEED, STEPS, GUIDANCE),
    ),
    "styles_app": App(
        PICTURES["styles"],
        (
            ("PixArtStyle", "text", "Prompt"),
            ("PixArtStyle", "style", "Style"),
            ("PixArtStyle", "more_styles", "More styles, one a line"),
            *SIZE,
            SEED,
        ),
    ),
    "image_to_image_app": App(
        PICTURES["image_to_image"],
        (("LoadImage", "image", "Your picture"), PROMPT, ("KSampler", "denoise", "Change"), SEED, STEPS, GUIDANCE),
    ),
    "lora_training_app": App(
        TRAINING["lora_training"],
        (
            ("PixArtDataset", "path", "Folder of pictures"),
            ("PixArtDataset", "caption", "Caption"),
            ("PixArtTrainLoRA", "name", "Name of the LoRA"),
            ("PixArtTrainLoRA", "steps", "Steps"),
            ("PixArtTrainLoRA", "rank", "Rank"),
            ("PixArtTrainLoRA", "learning_rate", "Learning rate"),
        ),
        ("PixArtTrainLoRA", "Validation pictures", "SaveImage"),
    ),
}
