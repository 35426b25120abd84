"""The workflows that prepare data and train, each with a picture of what was learned."""

from ..format.graph import Workflow
from ..format.node import Node
from . import files
from .blocks import Loaded, load
from .blueprints import make_a_picture
from .pictures import TEAPOT

SUBJECT, CLASS = "my_pictures", "class_pictures"
PROMPT = "a photo of sks toy on a wooden table"
SUBJECT_CAPTION, CLASS_CAPTION = "a photo of sks toy", "a photo of toy"
SAMPLE_EVERY = 250
PICTURES_NOTE = (
    f"**Pictures**: a folder `{SUBJECT}` in ComfyUI's `input` folder. A caption for each stands in a .txt file of the "
    "same name; **caption** is for those that have none."
)


def _dataset(workflow: Workflow, path: str = SUBJECT, caption: str = SUBJECT_CAPTION, **settings) -> Node:
    return workflow.node("PixArtDataset", path=path, caption=caption, **settings)


def _encode(workflow: Workflow, loaded: Loaded, dataset: Node, **settings) -> Node:
    links = {"clip": loaded.clip, "vae": loaded.vae, "model": loaded.model}
    return workflow.node("PixArtEncodeDataset", dataset=dataset, **links, **settings)


def _train(
    workflow: Workflow, node_type: str, loaded: Loaded, features: Node, is_tall: bool = False, **settings
) -> Node:
    """is_tall: a node that has no room for its validation pictures below it."""
    workflow.group("Training", "training")
    links = {"model": loaded.model, "features": features, "vae": loaded.vae}
    trained = workflow.node(node_type, **links, sample_every=SAMPLE_EVERY, **settings)
    if is_tall:
        workflow.column()
    workflow.node("PreviewImage", "Validation pictures", images=trained["samples"])
    return trained


def _note(title: str, text: str) -> str:
    return f"### {title}\n\n{text}\n\n{PICTURES_NOTE}"


def dataset_to_features(workflow: Workflow) -> None:
    """Encode a dataset once."""
    text = "Encodes captions and pictures once, into a cache below `output/pixart_cache`, which every training can use."
    loaded = load(workflow, _note("Dataset to features", text), files.SIGMA_1024, files.SIGMA_VAE)
    workflow.group("Data", "training")
    encoded = _encode(workflow, loaded, _dataset(workflow))
    workflow.column()
    workflow.node("PreviewAny", "Report", source=encoded["report"], height_px=220)


def lora_training(workflow: Workflow) -> None:
    """Train a LoRA and use it."""
    text = (
        "Teaches the model a thing or a style from 10 to 30 pictures, and makes a picture with what it learned. "
        "Cancel ends the training alone and keeps what is there. The file is in `output/loras`."
    )
    loaded = load(workflow, _note("LoRA: train and use", text), files.SIGMA_1024, files.SIGMA_VAE)
    workflow.group("Data", "training")
    features = _encode(workflow, loaded, _dataset(workflow))
    trained = _train(workflow, "PixArtTrainLoRA", loaded, features, name="my_lora", steps=1000, rank=16)
    make_a_picture(workflow, loaded, trained, PROMPT, 1024)


def dreambooth(workflow: Workflow) -> None:
    """Train all weights on one subject."""
    text = (
        f"Trains all weights on a few pictures of one subject. Pictures of its class, in the folder `{CLASS}`, keep "
        "the model from forgetting what else there is."
    )
    loaded = load(workflow, _note("DreamBooth", text), files.ALPHA_512, files.ALPHA_VAE)
    workflow.group("Data", "training")
    subject = _dataset(workflow)
    both = _dataset(workflow, CLASS, CLASS_CAPTION, is_prior=True, add_to=subject)
    workflow.column()
    features = _encode(workflow, loaded, both)
    settings = {"name": "my_dreambooth", "method": "DreamBooth", "steps": 800, "learning_rate": 5e-6}
    trained = _train(workflow, "PixArtTrain", loaded, features, **settings)
    make_a_picture(workflow, loaded, trained, PROMPT, 512)


def lcm_distillation(workflow: Workflow) -> None:
    """Distil a model to four steps."""
    text = (
        "Makes an LCM LoRA: four steps and no guidance. Some thousand varied pictures do better than few. The picture "
        "is made in four steps with what was learned."
    )
    loaded = load(workflow, _note("LCM distillation", text), files.ALPHA_1024, files.ALPHA_VAE)
    workflow.group("Data", "training")
    features = _encode(workflow, loaded, _dataset(workflow))
    trained = _train(workflow, "PixArtDistillLCM", loaded, features, is_tall=True, name="my_lcm", steps=2000)
    make_a_picture(workflow, loaded, trained, PROMPT, 1024, preset="alpha LCM 4")


def controlnet_training(workflow: Workflow) -> None:
    """Train a ControlNet and use it."""
    text = (
        "Trains a ControlNet on edges that are drawn from the pictures. It takes thousands of pictures and steps: "
        "control appears late, and then suddenly. At the end it is used with a picture's edges."
    )
    loaded = load(workflow, _note("ControlNet training", text), files.SIGMA_1024, files.SIGMA_VAE)
    workflow.group("Data", "training")
    features = _encode(workflow, loaded, _dataset(workflow), control="soft edges")
    trained = _train(workflow, "PixArtTrainControlNet", loaded, features, name="my_controlnet", steps=10000)
    workflow.group("A picture to follow", "picture")
    picture = workflow.node("LoadImage", image="example.png")
    edges = workflow.node("PixArtHEDPreprocessor", image=picture, method="soft edges", fit="1024")
    sides = edges["width"], edges["height"]
    control = {"control_net": trained["control_net"], "image": edges["edges"]}
    make_a_picture(workflow, loaded, loaded.model, TEAPOT, sides, control=control)


TRAINING = {
    each.__name__: each
    for each in (dataset_to_features, lora_training, dreambooth, lcm_distillation, controlnet_training)
}
