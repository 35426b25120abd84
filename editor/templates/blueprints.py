"""The blueprints: what many workflows are made of, as one node each with the few inputs that matter."""

from collections.abc import Sequence

from ..format.graph import Workflow
from ..format.node import Node, Output
from ..format.subgraph import Subgraph
from . import files
from .blocks import Loaded, describe, load_models, picture_size, sample, sample_preset
from .pictures import CACTUS, PAINTED, TEAPOT

PICTURES_CATEGORY, TRAINING_CATEGORY = "PixArt", "PixArt/training"


def _models(inside: Subgraph, checkpoint: str, vae: str) -> Loaded:
    """The loaders, whose files are inputs."""
    chosen = [
        inside.input("checkpoint", "PixArtLoadCheckpoint", "checkpoint", checkpoint),
        inside.input("vae", "PixArtLoadVAE", "vae", vae),
        inside.input("text_encoder", "PixArtLoadT5", "text_encoder", files.T5_FP16),
    ]
    return load_models(inside, *chosen)


def _prompts(inside: Subgraph, loaded: Loaded, text: str) -> tuple[Node, Node]:
    return describe(inside, loaded, inside.input("prompt", "PixArtTextEncode", "text", text))


def _sampling(inside: Subgraph, *names: str, **values) -> dict[str, Output]:
    """Inputs for settings of KSampler."""
    usual = {"seed": 1, "steps": 20, "cfg": 4.5, **values}
    return {name: inside.input(name, "KSampler", name, usual[name]) for name in names}


def _size(inside: Subgraph, side_px: int) -> Node:
    return picture_size(
        inside, *(inside.input(name, "EmptyLatentImage", name, side_px) for name in ("width", "height"))
    )


def _decode(inside: Subgraph, latent: Node, vae: Node) -> Node:
    inside.group("Picture", "result")
    return inside.node("VAEDecode", samples=latent, vae=vae)


def text_to_image(workflow: Workflow) -> Subgraph:
    """A picture of a prompt."""
    inside = Subgraph(workflow, "PixArt text to image", "Makes a picture of a prompt with PixArt.", PICTURES_CATEGORY)
    loaded = _models(inside, files.SIGMA_1024, files.SIGMA_VAE)
    prompts = _prompts(inside, loaded, CACTUS)
    inside.group("Sampling", "sampling")
    latent = sample(inside, loaded.model, prompts, _size(inside, 1024), **_sampling(inside, "seed", "steps", "cfg"))
    inside.output("image", _decode(inside, latent, loaded.vae))
    return inside


def with_controlnet(workflow: Workflow) -> Subgraph:
    """A picture of a prompt with the outlines of another."""
    inside = Subgraph(
        workflow,
        "PixArt text to image with ControlNet",
        "Makes a picture of a prompt that keeps the outlines of another picture.",
        PICTURES_CATEGORY,
    )
    picture = inside.input("image", "IMAGE")
    loaded = _models(inside, files.ALPHA_1024, files.ALPHA_VAE)
    chosen = inside.input("controlnet", "PixArtLoadControlNet", "controlnet", files.CONTROL_1024)
    control = inside.node("PixArtLoadControlNet", controlnet=chosen)
    positive, negative = _prompts(inside, loaded, TEAPOT)
    inside.group("What steers the picture", "picture")
    method = inside.input("edges", "PixArtHEDPreprocessor", "method", "soft edges")
    fit = inside.input("fit", "PixArtHEDPreprocessor", "fit", "1024")
    edges = inside.node("PixArtHEDPreprocessor", image=picture, method=method, fit=fit)
    strength = inside.input("strength", "PixArtControlNetApply", "strength", 0.9)
    links = {"control_net": control, "image": edges, "vae": loaded.vae, "strength": strength}
    applied = inside.node("PixArtControlNetApply", positive=positive, negative=negative, **links)
    inside.group("Sampling", "sampling")
    size = picture_size(inside, edges["width"], edges["height"])
    settings = _sampling(inside, "seed", "steps", "cfg")
    latent = sample(inside, loaded.model, (applied["positive"], applied["negative"]), size, **settings)
    inside.output("image", _decode(inside, latent, loaded.vae))
    inside.output("edges", edges)
    return inside


def image_to_image(workflow: Workflow) -> Subgraph:
    """A picture changed by a prompt."""
    inside = Subgraph(
        workflow,
        "PixArt image to image",
        "Changes a picture by a prompt, and gives it back at its own size.",
        PICTURES_CATEGORY,
    )
    picture = inside.input("image", "IMAGE")
    loaded = _models(inside, files.SIGMA_1024, files.SIGMA_VAE)
    prompts = _prompts(inside, loaded, PAINTED)
    inside.group("Your picture", "picture")
    base = inside.input("base", "PixArtFitImage", "base", "1024")
    fitted = inside.node("PixArtFitImage", image=picture, mode="into the nearest bin", base=base)
    latent = inside.node("VAEEncode", pixels=fitted, vae=loaded.vae)
    inside.group("Sampling", "sampling")
    settings = _sampling(inside, "seed", "steps", "cfg", "denoise", denoise=0.6)
    latent = sample(inside, loaded.model, prompts, latent, **settings)
    pictures = _decode(inside, latent, loaded.vae)
    sides = {"width": fitted["original_width"], "height": fitted["original_height"]}
    restored = inside.node("PixArtFitImage", "Back to its size", image=pictures, mode="to a size", **sides)
    inside.output("image", restored)
    return inside


def in_two_passes(workflow: Workflow) -> Subgraph:
    """A large picture, laid out small first."""
    inside = Subgraph(
        workflow,
        "PixArt upscale in two passes",
        "Makes a picture at the trained size, enlarges it and works its details out.",
        PICTURES_CATEGORY,
    )
    loaded = _models(inside, files.SIGMA_1024, files.SIGMA_VAE)
    prompts = _prompts(inside, loaded, CACTUS)
    inside.group("First pass", "sampling")
    settings = _sampling(inside, "seed", "steps", "cfg")
    latent = sample(inside, loaded.model, prompts, _size(inside, 1024), **settings)
    inside.group("Second pass, enlarged", "sampling")
    scale = inside.input("scale_by", "LatentUpscaleBy", "scale_by", 1.5)
    latent = inside.node("LatentUpscaleBy", samples=latent, upscale_method="bicubic", scale_by=scale)
    second = {**settings, "denoise": inside.input("denoise", "KSampler", "denoise", 0.45)}
    latent = sample(inside, loaded.model, prompts, latent, **second)
    inside.output("image", _decode(inside, latent, loaded.vae))
    return inside


def train_lora(workflow: Workflow) -> Subgraph:
    """A LoRA of a folder of pictures."""
    inside = Subgraph(
        workflow,
        "Train a PixArt LoRA",
        "Teaches a PixArt a thing or a style from the pictures of a folder; the file goes into output/loras.",
        TRAINING_CATEGORY,
    )
    loaded = _models(inside, files.SIGMA_1024, files.SIGMA_VAE)
    inside.group("Data", "training")
    folder = inside.input("pictures", "PixArtDataset", "path", "my_pictures")
    caption = inside.input("caption", "PixArtDataset", "caption", "a photo of sks toy")
    dataset = inside.node("PixArtDataset", path=folder, caption=caption)
    resolution = inside.input("resolution", "PixArtEncodeDataset", "resolution", 1024)
    links = {"clip": loaded.clip, "vae": loaded.vae, "model": loaded.model}
    features = inside.node("PixArtEncodeDataset", dataset=dataset, resolution=resolution, **links)
    inside.group("Training", "training")
    values = {"name": "my_lora", "steps": 1000, "learning_rate": 1e-4, "rank": 16}
    chosen = {name: inside.input(name, "PixArtTrainLoRA", name, value) for name, value in values.items()}
    trained = inside.node(
        "PixArtTrainLoRA", model=loaded.model, features=features, vae=loaded.vae, sample_every=250, **chosen
    )
    for name in ("model", "file", "loss_curve", "samples"):
        inside.output(name, trained[name])
    for name, source in (("clip", loaded.clip), ("vae", loaded.vae)):
        inside.output(name, source)
    return inside


BLUEPRINTS = (text_to_image, with_controlnet, image_to_image, in_two_passes, train_lora)


def make_a_picture(
    workflow: Workflow,
    loaded: Loaded,
    model: Node,
    text: str,
    sides: int | Sequence[Output],
    preset: str | None = None,
    control: dict | None = None,
) -> None:
    """The last group of a training's workflow: one node that makes a picture with what was learned, and the picture.

    sides: width and height, from outputs or both alike. preset: a published setting in place of KSampler's. control:
    the links of PixArt ControlNet Apply besides the prompts.
    """
    inside = Subgraph(workflow, "Make a picture", "A picture of a prompt with a loaded model.", PICTURES_CATEGORY)
    ends = {"model": "MODEL", "clip": "CLIP", "vae": "VAE"}
    inner = Loaded(*(inside.input(name, kind) for name, kind in ends.items()))
    fed = {name: inside.input(name, end.node.info["output"][end.slot]) for name, end in (control or {}).items()}
    prompts = describe(inside, inner, inside.input("prompt", "PixArtTextEncode", "text", text))
    if fed:
        links = {"positive": prompts[0], "negative": prompts[1], "vae": inner.vae}
        applied = inside.node("PixArtControlNetApply", **links, **fed)
        prompts = applied["positive"], applied["negative"]
    inside.group("Sampling", "sampling")
    values = (sides, sides) if isinstance(sides, int) else (1024, 1024)
    lengths = [
        inside.input(name, "EmptyLatentImage", name, value)
        for name, value in zip(("width", "height"), values, strict=True)
    ]
    size = picture_size(inside, *lengths)
    if preset:
        latent = sample_preset(inside, inner, prompts, size, preset, seed=inside.input("seed", "KSampler", "seed", 1))
    else:
        latent = sample(inside, inner.model, prompts, size, **_sampling(inside, "seed", "steps", "cfg"))
    inside.output("image", _decode(inside, latent, inner.vae))
    workflow.group("Use it", "result")
    given = {"model": model, "clip": loaded.clip, "vae": loaded.vae, **(control or {})}
    if not isinstance(sides, int):
        given |= dict(zip(("width", "height"), sides, strict=True))
    made = workflow.insert(inside, **given)
    workflow.node("SaveImage", images=made, filename_prefix="pixart")
