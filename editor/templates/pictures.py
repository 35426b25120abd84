"""The workflows that make pictures, each written by one function; the table PICTURES names them."""

from dataclasses import dataclass

from . import files
from .graph import Node, Output, Workflow

CACTUS = "A small cactus with a happy face in the Sahara desert, soft morning light, highly detailed"
LIGHTHOUSE = "A lighthouse on a cliff above a stormy sea at dusk, a warm light in its window, oil painting"
TEAPOT = "A blue porcelain teapot on a wooden table beside an open window, photograph, shallow depth of field"
DEMO_CAPTION = "a large red circle in the top left and a small blue square on the right on a white background"
LONG_CAPTION = (
    "A quiet harbour town in northern Europe on a winter morning. In the foreground a fisherman in a yellow raincoat "
    "mends a green net on the stone quay; beside him a grey cat sleeps on a coil of rope. Behind them three wooden "
    "boats, one red, one white and one blue, lie in still water that mirrors their masts. Narrow houses with steep "
    "snow-covered roofs climb the hill, smoke rising from their chimneys, and above them stands a small church with a "
    "copper spire. The sky is pale pink near the horizon and deep blue above. Wide-angle photograph, crisp detail"
)
FOUR_PROMPTS = "\n".join((CACTUS, LIGHTHOUSE, TEAPOT, "A paper boat on a puddle after the rain, macro photograph"))

WEIGHTED = "A (tiny:1.2) cactus with a (happy face:1.3) in the Sahara desert, (photograph:0.8)"
AVOIDED = "blurry, low quality, watermark, text, deformed"


@dataclass
class Loaded:
    """The loaders' outputs."""

    model: Node
    clip: Node
    vae: Node


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
    named = [name for name in (checkpoint, t5, vae, *more) if name in files.FILES]
    workflow.group("Read me", "notes")
    workflow.note(f"{note}\n\n{files.where_to_put(*named)}" if named else note)
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


def sample(workflow: Workflow, model: Node, prompts: tuple[Node, Node], latent: Node | Output, **settings) -> Node:
    """A KSampler with PixArt's usual settings, unless `settings` say otherwise."""
    usual = {"seed": 1, "steps": 20, "cfg": 4.5, "sampler_name": "pixart_dpm_solver", "scheduler": "pixart_uniform"}
    links = {"model": model, "positive": prompts[0], "negative": prompts[1], "latent_image": latent}
    return workflow.node("KSampler", **{**links, **usual, **settings})


def sample_preset(workflow: Workflow, model: Node, prompts: tuple[Node, Node], latent: Node, preset: str) -> Node:
    """A published setting and the sampler that it drives."""
    chosen = workflow.node("PixArtSamplingPreset", model=model, preset=preset)
    return workflow.node(
        "SamplerCustom",
        model=model,
        positive=prompts[0],
        negative=prompts[1],
        sampler=chosen["sampler"],
        sigmas=chosen["sigmas"],
        cfg=chosen["guidance"],
        latent_image=latent,
        noise_seed=1,
    )


def empty(workflow: Workflow, side_px: int, batch_size: int = 1) -> Node:
    return workflow.node("EmptyLatentImage", "Picture size", width=side_px, height=side_px, batch_size=batch_size)


def save(workflow: Workflow, latent: Node, vae: Node, prefix: str = "pixart") -> Node:
    """The last group: decode and save."""
    workflow.group("Picture", "result")
    pictures = workflow.node("VAEDecode", samples=latent, vae=vae)
    return workflow.node("SaveImage", images=pictures, filename_prefix=prefix)


def make_picture(
    workflow: Workflow,
    loaded: Loaded,
    prompts: tuple,
    side_px: int,
    batch_size: int = 1,
    model: Node | None = None,
    **settings,
) -> None:
    """The last two groups of most workflows: sample a square picture, decode and save it. model: default the loaded."""
    workflow.group("Sampling", "sampling")
    latent = sample(workflow, model or loaded.model, prompts, empty(workflow, side_px, batch_size), **settings)
    save(workflow, latent, loaded.vae)


def demo(workflow: Workflow) -> None:
    """The built-in model: needs no download."""
    note = (
        "### The built-in demo model\n\nNothing to download: press **Run**. It needs the files of the pack's "
        "`demo/models/`, which `python dev.py serve` finds by itself; in your own ComfyUI copy the three folders in it "
        "into `ComfyUI/models/`.\n\nIt knows circles, squares, triangles and crosses, small or large, red, green, "
        "blue, yellow, purple or cyan, at nine places, on white, black, gray, pink or brown: change the words and run "
        "again. Sizes of about 128x128 px suit it."
    )
    loaded = load(workflow, note, files.DEMO_MODEL, files.DEMO_VAE, files.DEMO_T5)
    prompts = describe(workflow, loaded, DEMO_CAPTION)
    make_picture(workflow, loaded, prompts, 128, cfg=4.0)


def _text_to_image(workflow: Workflow, title: str, checkpoint: str, vae: str, side_px: int, text: str) -> None:
    note = f"### {title}\n\nWrite what the picture shows in **Prompt** and press **Run**. PixArt reads whole sentences."
    loaded = load(workflow, note, checkpoint, vae)
    prompts = describe(workflow, loaded, text)
    make_picture(workflow, loaded, prompts, side_px)


def text_to_image_1024(workflow: Workflow) -> None:
    """PixArt-Sigma at 1024 px."""
    _text_to_image(workflow, "PixArt-Sigma, 1024 px", files.SIGMA_1024, files.SIGMA_VAE, 1024, CACTUS)


def text_to_image_512(workflow: Workflow) -> None:
    """PixArt-alpha at 512 px."""
    _text_to_image(workflow, "PixArt-alpha, 512 px", files.ALPHA_512, files.ALPHA_VAE, 512, LIGHTHOUSE)


def text_to_image_256(workflow: Workflow) -> None:
    """PixArt-alpha at 256 px."""
    _text_to_image(workflow, "PixArt-alpha, 256 px", files.ALPHA_256, files.ALPHA_VAE, 256, TEAPOT)


def sigma_300_tokens(workflow: Workflow) -> None:
    """A long caption for PixArt-Sigma."""
    note = (
        "### Long captions\n\nPixArt-Sigma reads up to 300 tokens, about 220 words; PixArt-alpha 120. The Prompt node "
        "shows how many it took, and what was cut off."
    )
    loaded = load(workflow, note, files.SIGMA_1024, files.SIGMA_VAE)
    prompts = describe(workflow, loaded, LONG_CAPTION, caption_length="300")
    make_picture(workflow, loaded, prompts, 1024)


def _with_preset(workflow: Workflow, note: str, checkpoint: str, preset: str, side_px: int, text: str) -> None:
    loaded = load(workflow, note, checkpoint, files.ALPHA_VAE)
    prompts = describe(workflow, loaded, text)
    workflow.group("Sampling", "sampling")
    latent = sample_preset(workflow, loaded.model, prompts, empty(workflow, side_px), preset)
    save(workflow, latent, loaded.vae)


def sa_solver_25(workflow: Workflow) -> None:
    """SA-Solver, the paper's sampler of best quality."""
    note = (
        "### SA-Solver, 25 steps\n\nThe stochastic solver that PixArt-alpha's authors recommend for quality: 25 "
        "steps, guidance 3. The preset brings sampler, noise levels and guidance; **PixArt SA-Solver** has every "
        "setting of it."
    )
    _with_preset(workflow, note, files.ALPHA_1024, "alpha SA-Solver 25", 1024, LIGHTHOUSE)


def lcm_4_steps(workflow: Workflow) -> None:
    """PixArt-LCM in four steps."""
    note = (
        "### LCM, 4 steps\n\nDistilled weights: four steps, no guidance, so a picture in a tenth of the time. The "
        "negative has no effect. 1 to 8 steps work: choose them in **PixArt Scheduler** with the schedule lcm."
    )
    _with_preset(workflow, note, files.LCM_1024, "alpha LCM 4", 1024, CACTUS)


def dmd_1_step(workflow: Workflow) -> None:
    """PixArt-DMD in one step."""
    note = "### DMD, 1 step\n\nDistilled weights for 512 px: a single step, no guidance. The negative has no effect."
    _with_preset(workflow, note, files.DMD_512, "alpha DMD 1", 512, TEAPOT)


def any_aspect_ratio(workflow: Workflow) -> None:
    """Sizes that PixArt was trained at."""
    note = (
        "### Any aspect ratio\n\nPixArt was trained at 33 to 40 sizes from 1:4 to 4:1. Choose one by its ratio in "
        "**PixArt Resolution**, or let it find the nearest to a size or to a picture. **base** is the size that the "
        "model was trained at."
    )
    loaded = load(workflow, note, files.SIGMA_1024, files.SIGMA_VAE)
    prompts = describe(workflow, loaded, LIGHTHOUSE)
    workflow.group("Sampling", "sampling")
    size = workflow.node("PixArtResolution", base="1024", mode="by ratio", ratio="0.57 (7:4)")
    latent = sample(workflow, loaded.model, prompts, size["latent"])
    save(workflow, latent, loaded.vae)


def image_to_image(workflow: Workflow) -> None:
    """Start from a picture."""
    note = (
        "### Image to image\n\nChoose a picture in **Load Image**. It is cropped to the nearest size that PixArt was "
        "trained at, changed, and brought back to its own size. **denoise** in KSampler: 0.3 keeps nearly all, 0.8 "
        "nearly nothing."
    )
    loaded = load(workflow, note, files.SIGMA_1024, files.SIGMA_VAE)
    workflow.group("Your picture", "picture")
    picture = workflow.node("LoadImage", image="example.png")
    fitted = workflow.node("PixArtFitImage", image=picture, mode="into the nearest bin", base="1024")
    latent = workflow.node("VAEEncode", pixels=fitted, vae=loaded.vae)
    prompts = describe(workflow, loaded, LIGHTHOUSE)
    workflow.group("Sampling", "sampling")
    latent = sample(workflow, loaded.model, prompts, latent, denoise=0.6)
    workflow.group("Picture", "result")
    pictures = workflow.node("VAEDecode", samples=latent, vae=loaded.vae)
    sides = {"width": fitted["original_width"], "height": fitted["original_height"]}
    restored = workflow.node("PixArtFitImage", "Back to its size", image=pictures, mode="to a size", **sides)
    workflow.node("SaveImage", images=restored, filename_prefix="pixart")


def inpaint(workflow: Workflow) -> None:
    """Change one part of a picture."""
    note = (
        "### Inpaint\n\nChoose a picture, open it with a right click in the **MaskEditor** and paint over what is to "
        "change: only that is made anew. Pictures are taken at their own size; 512 to 1536 px a side suit the 1024 "
        "model. A picture whose transparent part is the mask works as well."
    )
    loaded = load(workflow, note, files.SIGMA_1024, files.SIGMA_VAE)
    workflow.group("Your picture and its mask", "picture")
    picture = workflow.node("LoadImage", image="example.png")
    latent = workflow.node("VAEEncode", pixels=picture, vae=loaded.vae)
    mask = workflow.node("GrowMask", mask=picture["MASK"], expand=8)
    latent = workflow.node("SetLatentNoiseMask", samples=latent, mask=mask)
    prompts = describe(workflow, loaded, TEAPOT)
    workflow.group("Sampling", "sampling")
    latent = sample(workflow, loaded.model, prompts, latent, denoise=0.9)
    save(workflow, latent, loaded.vae)


def hires_fix(workflow: Workflow) -> None:
    """Two passes for large pictures."""
    note = (
        "### Hires fix, two passes\n\nThe first pass lays the picture out at the trained size; the second enlarges "
        "its latent by 1.5 and works the details out. The second **denoise**: 0.3 to 0.6; more invents, less stays "
        "soft."
    )
    loaded = load(workflow, note, files.SIGMA_1024, files.SIGMA_VAE)
    prompts = describe(workflow, loaded, CACTUS)
    workflow.group("First pass", "sampling")
    latent = sample(workflow, loaded.model, prompts, empty(workflow, 1024))
    workflow.group("Second pass, enlarged", "sampling")
    latent = workflow.node("LatentUpscaleBy", samples=latent, upscale_method="bicubic", scale_by=1.5)
    latent = sample(workflow, loaded.model, prompts, latent, seed=2, denoise=0.45)
    save(workflow, latent, loaded.vae)


def negative_prompts(workflow: Workflow) -> None:
    """Negative prompts and prompt weights."""
    note = (
        "### Negative prompts and weights\n\n**Negative** says what the picture is to avoid (mode text). `(word:1.3)` "
        "strengthens a word of the prompt and `(word:0.7)` weakens it; 0.5 to 1.5 are sensible. The official cleaning "
        "(clean_caption) would remove the brackets: leave it off here."
    )
    loaded = load(workflow, note, files.SIGMA_1024, files.SIGMA_VAE)
    prompts = describe(workflow, loaded, WEIGHTED, {"mode": "text", "text": AVOIDED})
    make_picture(workflow, loaded, prompts, 1024, cfg=5.0)


def low_memory(workflow: Workflow) -> None:
    """Small graphics memory."""
    note = (
        "### Low memory\n\n- T5 in fp8, run on the CPU: it takes no graphics memory, and it runs once for a prompt; "
        "as long as the words stay, ComfyUI keeps what it said.\n- The transformer in fp8: 0.6 GB.\n- Decoding in "
        "tiles.\n\nWith more memory set **weight_dtype** and **device** back to default: the result is better and "
        "quicker."
    )
    options = {"device": "cpu", "weight_dtype": "fp8_e4m3fn"}
    loaded = load(workflow, note, files.SIGMA_1024, files.SIGMA_VAE, files.T5_FP8, **options)
    prompts = describe(workflow, loaded, TEAPOT)
    workflow.group("Sampling", "sampling")
    latent = sample(workflow, loaded.model, prompts, empty(workflow, 1024))
    workflow.group("Picture", "result")
    pictures = workflow.node("VAEDecodeTiled", samples=latent, vae=loaded.vae, tile_size=512, overlap=64)
    workflow.node("SaveImage", images=pictures, filename_prefix="pixart")


def batch_of_prompts(workflow: Workflow) -> None:
    """Several prompts in one run."""
    note = (
        "### A batch of prompts\n\nEvery line of **Prompt** is a prompt of its own, for one picture of the batch: as "
        "many lines as **batch_size**. They are sampled together."
    )
    loaded = load(workflow, note, files.SIGMA_1024, files.SIGMA_VAE)
    prompts = describe(workflow, loaded, FOUR_PROMPTS, batch_lines=True)
    make_picture(workflow, loaded, prompts, 1024, batch_size=4)


def compare_settings(workflow: Workflow) -> None:
    """A table of pictures by steps and guidance."""
    note = (
        "### Compare settings\n\nOne picture for each combination of the values in **PixArt Compare Axes**, on one "
        "labelled sheet. Link x and y to whatever is to vary: steps, cfg, a sampler's name, a LoRA's strength, a "
        "prompt."
    )
    loaded = load(workflow, note, files.SIGMA_1024, files.SIGMA_VAE)
    prompts = describe(workflow, loaded, CACTUS)
    workflow.group("Sampling", "sampling")
    names = {"x_name": "steps", "y_name": "guidance"}
    axes = workflow.node("PixArtCompareAxes", x_values="8, 14, 20", y_values="2.0, 4.5, 7.0", **names)
    varying = {"steps": axes["x"], "cfg": axes["y"]}
    latent = sample(workflow, loaded.model, prompts, empty(workflow, 1024), **varying)
    workflow.group("Sheet", "result")
    pictures = workflow.node("VAEDecode", samples=latent, vae=loaded.vae)
    sheet = workflow.node("PixArtCompareSheet", images=pictures, grid=axes["grid"], title="Steps and guidance")
    workflow.column()
    workflow.node("SaveImage", images=sheet, filename_prefix="pixart_sheet")


def styles(workflow: Workflow) -> None:
    """One prompt in several styles."""
    note = (
        "### Styles\n\nA style is a template around the prompt, with its own negative. The run makes one picture for "
        "each style; `*` in **more_styles** takes all. Your own styles go into the file that the node's help names."
    )
    loaded = load(workflow, note, files.SIGMA_1024, files.SIGMA_VAE)
    workflow.group("Prompt", "prompt")
    styled = workflow.node("PixArtStyle", text=TEAPOT, style="Photograph", more_styles="Anime\nPixel Art")
    links = {"clip": loaded.clip, "model": loaded.model}
    positive = workflow.node("PixArtTextEncode", "Prompt", text=styled, **links)
    workflow.column()
    negative = {"mode": "text", "text": styled["negative"], "positive": positive, **links}
    prompts = positive, workflow.node("PixArtNegative", "Negative", **negative)
    workflow.group("Sampling", "sampling")
    latent = sample(workflow, loaded.model, prompts, empty(workflow, 1024))
    workflow.group("Sheet", "result")
    pictures = workflow.node("VAEDecode", samples=latent, vae=loaded.vae)
    sheet = workflow.node("PixArtCompareSheet", images=pictures, labels=styled["style"])
    workflow.column()
    workflow.node("SaveImage", images=sheet, filename_prefix="pixart_styles")


PICTURES = {
    each.__name__: each
    for each in (
        demo,
        text_to_image_1024,
        text_to_image_512,
        text_to_image_256,
        sigma_300_tokens,
        sa_solver_25,
        lcm_4_steps,
        dmd_1_step,
        any_aspect_ratio,
        image_to_image,
        inpaint,
        hires_fix,
        negative_prompts,
        low_memory,
        batch_of_prompts,
        compare_settings,
        styles,
    )
}
