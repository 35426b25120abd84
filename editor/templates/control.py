"""The workflows with ControlNets, and with files that other workflows make."""

from ..format.graph import Workflow
from . import files
from .blocks import describe, load, make_picture, picture_size, sample
from .pictures import CACTUS, TEAPOT
from .training import PROMPT


def _control(workflow: Workflow, note: str, more: tuple[str, ...]):
    loaded = load(workflow, note, files.ALPHA_1024, files.ALPHA_VAE, more=more)
    control = workflow.node("PixArtLoadControlNet", controlnet=files.CONTROL_1024)
    workflow.group("What steers the picture", "picture")
    return loaded, control, workflow.node("LoadImage", image="example.png")


def controlnet_hed(workflow: Workflow) -> None:
    """The official ControlNet with its HED edges."""
    note = (
        "### ControlNet with HED edges\n\nThe picture in **Load Image** gives the outlines, **Prompt** the rest. "
        "**strength** of PixArt ControlNet Apply: 0.5 to 1. Without ControlNetHED.pth choose the method soft edges, "
        "which needs no file."
    )
    loaded, control, picture = _control(workflow, note, (files.CONTROL_1024, files.HED))
    edges = workflow.node("PixArtHEDPreprocessor", image=picture, method="hed", hed_model=files.HED, fit="1024")
    workflow.node("PreviewImage", "Edges", images=edges)
    positive, negative = describe(workflow, loaded, TEAPOT)
    size = picture_size(workflow, edges["width"], edges["height"])
    workflow.group("Control and sampling", "sampling")
    links = {"control_net": control, "image": edges, "vae": loaded.vae}
    applied = workflow.node("PixArtControlNetApply", positive=positive, negative=negative, **links, strength=0.9)
    make_picture(workflow, loaded, (applied["positive"], applied["negative"]), size)


def two_controlnets(workflow: Workflow) -> None:
    """Two controls of one picture."""
    note = (
        "### Two ControlNets\n\nTwo control pictures, chained: soft edges over the whole run, thin lines for its "
        "first half. Their strengths add up, so each is lower than alone."
    )
    loaded, control, picture = _control(workflow, note, (files.CONTROL_1024,))
    edges = workflow.node("PixArtHEDPreprocessor", "Soft edges", image=picture, method="soft edges", fit="1024")
    lines = workflow.node("PixArtHEDPreprocessor", "Thin lines", image=picture, method="canny", fit="1024")
    prompts = describe(workflow, loaded, TEAPOT)
    size = picture_size(workflow, edges["width"], edges["height"])
    workflow.group("Control", "sampling")
    for title, image, settings in (
        ("First control", edges, {"strength": 0.6}),
        ("Second control", lines, {"strength": 0.4, "end_percent": 0.5}),
    ):
        links = {"control_net": control, "image": image, "vae": loaded.vae}
        ends = {"positive": prompts[0], "negative": prompts[1]}
        applied = workflow.node("PixArtControlNetApply", title, **ends, **links, **settings)
        prompts = applied["positive"], applied["negative"]
    workflow.group("Picture", "result")  # the sampler too: below two controls there is no room for it
    latent = sample(workflow, loaded.model, prompts, size)
    pictures = workflow.node("VAEDecode", samples=latent, vae=loaded.vae)
    workflow.node("SaveImage", images=pictures, filename_prefix="pixart")


def lora(workflow: Workflow) -> None:
    """A LoRA on the model."""
    note = (
        "### LoRA\n\nPut a LoRA of any layout into `models/loras/`; those that the training workflows make are in the "
        "list already (press R). **info** says how many of its keys fitted. **strength**: 0.5 to 1. Chain the node "
        "for several."
    )
    loaded = load(workflow, note, files.SIGMA_1024, files.SIGMA_VAE)
    workflow.group("LoRA", "models")
    changed = workflow.node("PixArtLoadLoRA", model=loaded.model, lora="my_lora_001.safetensors", strength=0.9)
    workflow.node("PreviewAny", "What fitted", source=changed["info"], height_px=160)
    prompts = describe(workflow, loaded, PROMPT)
    workflow.group("Sampling", "sampling")
    make_picture(workflow, loaded, prompts, picture_size(workflow, 1024, 1024), model=changed)


def convert_a_checkpoint(workflow: Workflow) -> None:
    """Write a model in another layout."""
    note = (
        "### Convert a checkpoint\n\nLoads a PixArt of any layout and writes it in another: for ComfyUI, for PixArt's "
        "own scripts, or for diffusers. LoRAs and merges on the model go into the file. A picture shows that all is "
        "well. The files are written below ComfyUI's `output` folder."
    )
    loaded = load(workflow, note, files.ALPHA_1024, files.ALPHA_VAE)
    workflow.node("PixArtModelInfo", model=loaded.model, height_px=260)
    workflow.group("Files", "result")
    for title, layout in (("For ComfyUI", "original (.safetensors)"), ("For diffusers", "diffusers (.safetensors)")):
        workflow.node("PixArtSaveCheckpoint", title, model=loaded.model, layout=layout, dtype="fp16")
    prompts = describe(workflow, loaded, CACTUS)
    workflow.group("Sampling", "sampling")
    make_picture(workflow, loaded, prompts, picture_size(workflow, 1024, 1024))


CONTROL = {each.__name__: each for each in (controlnet_hed, two_controlnets, lora, convert_a_checkpoint)}
