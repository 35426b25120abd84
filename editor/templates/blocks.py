"""What the workflows are built of: their first groups, the prompts, sampling, and the saved picture."""

from collections.abc import Sequence
from dataclasses import dataclass

from ..format.graph import Workflow
from ..format.node import Node, Output
from ..format.released import Released
from . import files


@dataclass
class Loaded:
    """The loaders' outputs; None for what a workflow does without."""

    model: Node | None = None
    clip: Node | None = None
    vae: Node | None = None


def read_me(workflow: Workflow, note: str, *names: str) -> None:
    """The first group: what this is, and where the files go. names: of files; those without a source are left out."""
    named = [name for name in names if isinstance(name, Released)]
    workflow.group("Read me", "notes")
    workflow.note(f"{note}\n\n{files.where_to_put(*named)}" if named else note)


def load(
    workflow: Workflow,
    note: str,
    checkpoint: str,
    vae: str,
    t5: str = files.T5_FP16,
    device: str = "default",
    more: tuple[str, ...] = (),
    **precision,
) -> Loaded:
    """The first two groups: what this is, with the files, and the loaders. device: of T5. more: files to name."""
    read_me(workflow, note, checkpoint, t5, vae, *more)
    return load_models(workflow, checkpoint, vae, t5, device, **precision)


def load_models(
    workflow: Workflow,
    checkpoint: str | Output,
    vae: str | Output,
    t5: str | Output = files.T5_FP16,
    device: str = "default",
    **precision,
) -> Loaded:
    """The group of the loaders alone."""
    workflow.group("Models", "models")
    model = workflow.node("PixArtLoadCheckpoint", checkpoint=checkpoint, **precision)
    clip = workflow.node("PixArtLoadT5", text_encoder=t5, device=device)
    return Loaded(model, clip, workflow.node("PixArtLoadVAE", vae=vae, model=model))


def describe(workflow: Workflow, loaded: Loaded, text: str, negative=None, **options) -> tuple[Node, Node]:
    """The group of the prompt and what stands against it. negative: inputs of its node. options: of the prompt's."""
    workflow.group("Prompt", "prompt")
    positive = workflow.node("PixArtTextEncode", "Prompt", clip=loaded.clip, model=loaded.model, text=text, **options)
    inputs = {"clip": loaded.clip, "model": loaded.model, "positive": positive, **(negative or {"mode": "empty"})}
    return positive, workflow.node("PixArtNegative", "Negative", **inputs)


def picture_size(workflow: Workflow, width: int | Output, height: int | Output, batch_size: int = 1) -> Node:
    """An empty latent. width, height: in pixels."""
    sides = {"width": width, "height": height}
    return workflow.node("EmptyLatentImage", "Picture size", **sides, batch_size=batch_size)


def sample(workflow: Workflow, model: Node, prompts: Sequence, latent: Node | Output, **settings) -> Node:
    """A KSampler with PixArt's usual settings, unless `settings` say otherwise."""
    usual = {"seed": 1, "steps": 20, "cfg": 4.5, "sampler_name": "pixart_dpm_solver", "scheduler": "pixart_uniform"}
    links = {"model": model, "positive": prompts[0], "negative": prompts[1], "latent_image": latent}
    return workflow.node("KSampler", **{**links, **usual, **settings})


def make_picture(
    workflow: Workflow,
    loaded: Loaded,
    prompts: Sequence,
    latent: Node | Output,
    model: Node | None = None,
    **settings,
) -> None:
    """Sample in the group that is open, and end with the picture's. model: default the loaded one."""
    save(workflow, sample(workflow, model or loaded.model, prompts, latent, **settings), loaded.vae)


def make_picture_by_preset(workflow: Workflow, loaded: Loaded, prompts: Sequence, latent: Node, preset: str) -> None:
    """The same as make_picture, by a published setting."""
    save(workflow, sample_preset(workflow, loaded, prompts, latent, preset), loaded.vae)


def sample_preset(
    workflow: Workflow, loaded: Loaded, prompts: Sequence, latent: Node, preset: str, seed: int | Output = 1
) -> Node:
    """A published setting, and the sampler that it drives."""
    chosen = workflow.node("PixArtSamplingPreset", model=loaded.model, preset=preset)
    return workflow.node(
        "SamplerCustom",
        model=loaded.model,
        positive=prompts[0],
        negative=prompts[1],
        sampler=chosen["sampler"],
        sigmas=chosen["sigmas"],
        cfg=chosen["guidance"],
        latent_image=latent,
        noise_seed=seed,
    )


def save(workflow: Workflow, latent: Node, vae: Node, prefix: str = "pixart") -> Node:
    """The last group: decode and save."""
    workflow.group("Picture", "result")
    pictures = workflow.node("VAEDecode", samples=latent, vae=vae)
    return workflow.node("SaveImage", images=pictures, filename_prefix=prefix)
