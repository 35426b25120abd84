"""The workflows that make pictures. PLAIN holds those of one prompt and one run; each other one is a function."""

from dataclasses import dataclass, field

from ..format.graph import Workflow
from . import files
from .blocks import Loaded, describe, load, make_picture, make_picture_by_preset, picture_size, read_me, sample

CACTUS = "A small cactus with a happy face in the Sahara desert, soft morning light, highly detailed"
LIGHTHOUSE = "A lighthouse on a cliff above a stormy sea at dusk, a warm light in its window, oil painting"
TEAPOT = "A blue porcelain teapot on a wooden table beside an open window, photograph, shallow depth of field"
BOAT = "A paper boat on a puddle after the rain, autumn leaves around it, macro photograph"
KITE = "A red kite over a field of ripe wheat, a windy summer afternoon, watercolour"
DEMO_CAPTION = "a large purple square on the left and a small cyan cross in the bottom right on a white background"
LONG_CAPTION = (
    "A quiet harbour town in northern Europe on a winter morning. In the foreground a fisherman in a yellow raincoat "
    "mends a green net on the stone quay; beside him a grey cat sleeps on a coil of rope. Behind them three wooden "
    "boats, one red, one white and one blue, lie in still water that mirrors their masts. Narrow houses with steep "
    "snow-covered roofs climb the hill, smoke rising from their chimneys, and above them stands a small church with a "
    "copper spire. The sky is pale pink near the horizon and deep blue above. Wide-angle photograph, crisp detail"
)
PAINTED = "The same scene as an oil painting in warm colours, thick brush strokes, evening light"
FOUR_PROMPTS = "\n".join((CACTUS, LIGHTHOUSE, TEAPOT, BOAT))

WEIGHTED = "A (tiny:1.2) cactus with a (happy face:1.3) in the Sahara desert, (photograph:0.8)"
EMBEDDINGS = "embeds/prompt", "embeds/negative"  # where the prompts are saved, below the output folder
AVOIDED = "blurry, low quality, watermark, text, deformed"


@dataclass(frozen=True)
class Plain:
    """A workflow of one prompt and one run. Called with a Workflow, it adds its nodes to it."""

    note: str
    checkpoint: str
    vae: str
    side_px: int
    text: str
    t5: str = files.T5_FP16
    preset: str | None = None  # a published setting in place of KSampler's
    batch_size: int = 1
    prompt: dict = field(default_factory=dict)  # further inputs of the prompt's node
    negative: dict = field(default_factory=lambda: {"mode": "empty"})
    settings: dict = field(default_factory=dict)  # of KSampler

    def __call__(self, workflow: Workflow) -> None:
        loaded = load(workflow, self.note, self.checkpoint, self.vae, self.t5)
        prompts = describe(workflow, loaded, self.text, self.negative, **self.prompt)
        workflow.group("Sampling", "sampling")
        size = picture_size(workflow, self.side_px, self.side_px, self.batch_size)
        if self.preset:
            make_picture_by_preset(workflow, loaded, prompts, size, self.preset)
        else:
            make_picture(workflow, loaded, prompts, size, **self.settings)


SIGMA = {"checkpoint": files.SIGMA_1024, "vae": files.SIGMA_VAE, "side_px": 1024}
ALPHA = {"checkpoint": files.ALPHA_1024, "vae": files.ALPHA_VAE, "side_px": 1024}


# What diffusers calls each of its transformers.
_SAME_NAME = "The weights of LCM and DMD are files of one name: give one of them another to keep both, and choose it."


def _first(title: str) -> str:
    return f"### {title}\n\nWrite what the picture shows in **Prompt** and press **Run**. PixArt reads whole sentences."


PLAIN = {
    "demo": Plain(
        "### The built-in demo model\n\nNothing to download: press **Run**. The model came with the pack.\n\nIt knows "
        "circles, squares, triangles and crosses, small or large, red, green, blue, yellow, purple or cyan, at nine "
        "places, on white, black, gray, pink or brown: change the words and run again. Sizes of about 128x128 px suit "
        "it.",
        checkpoint=files.DEMO_MODEL,
        vae=files.DEMO_VAE,
        side_px=128,
        text=DEMO_CAPTION,
        t5=files.DEMO_T5,
        settings={"cfg": files.DEMO_GUIDANCE},
    ),
    "text_to_image_1024": Plain(_first("PixArt-Sigma, 1024 px"), **SIGMA, text=CACTUS),
    "text_to_image_512": Plain(
        _first("PixArt-alpha, 512 px"), files.ALPHA_512, files.ALPHA_VAE, side_px=512, text=LIGHTHOUSE
    ),
    "text_to_image_256": Plain(
        _first("PixArt-alpha, 256 px"), files.ALPHA_256, files.ALPHA_VAE, side_px=256, text=BOAT
    ),
    "sigma_300_tokens": Plain(
        "### Long captions\n\nPixArt-Sigma reads up to 300 tokens, about 220 words; PixArt-alpha 120. The Prompt node "
        "shows how many it took, and what was cut off.",
        **SIGMA,
        text=LONG_CAPTION,
        prompt={"caption_length": "300"},
    ),
    "sa_solver_25": Plain(
        "### SA-Solver, 25 steps\n\nThe stochastic solver that PixArt-alpha's authors recommend for quality: 25 "
        "steps, guidance 3. The preset brings sampler, noise levels and guidance; **PixArt SA-Solver** has every "
        "setting of it.",
        **ALPHA,
        text=LIGHTHOUSE,
        preset="alpha SA-Solver 25",
    ),
    "lcm_4_steps": Plain(
        "### LCM, 4 steps\n\nDistilled weights: four steps, no guidance, so a picture in a tenth of the time. The "
        "negative has no effect. 1 to 8 steps work: choose them in **PixArt Scheduler** with the schedule lcm. "
        f"{_SAME_NAME}",
        files.LCM_1024,
        files.ALPHA_VAE,
        side_px=1024,
        text=CACTUS,
        preset="alpha LCM 4",
    ),
    "dmd_1_step": Plain(
        "### DMD, 1 step\n\nDistilled weights for 512 px: a single step, no guidance. The negative has no effect. "
        f"{_SAME_NAME}",
        files.DMD_512,
        files.ALPHA_VAE,
        side_px=512,
        text=TEAPOT,
        preset="alpha DMD 1",
    ),
    "negative_prompts": Plain(
        "### Negative prompts and weights\n\n**Negative** says what the picture is to avoid (mode text). `(word:1.3)` "
        "strengthens a word of the prompt and `(word:0.7)` weakens it; 0.5 to 1.5 are sensible. The official cleaning "
        "(clean_caption) would remove the brackets: leave it off here.",
        **SIGMA,
        text=WEIGHTED,
        negative={"mode": "text", "text": AVOIDED},
        settings={"cfg": 5.0},
    ),
    "batch_of_prompts": Plain(
        "### A batch of prompts\n\nEvery line of **Prompt** is a prompt of its own, for one picture of the batch: as "
        "many lines as **batch_size**. They are sampled together.",
        **SIGMA,
        text=FOUR_PROMPTS,
        batch_size=4,
        prompt={"batch_lines": True},
    ),
}


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
    workflow.column()
    make_picture(workflow, loaded, prompts, size["latent"])


def image_to_image(workflow: Workflow) -> None:
    """Start from a picture."""
    note = (
        "### Image to image\n\nChoose a picture in **Load Image**. It is cropped to the nearest size that PixArt was "
        "trained at, changed, and brought back to its own size. **denoise** in KSampler: 0.3 keeps nearly all, 0.8 "
        "nearly nothing."
    )
    loaded = load(workflow, note, files.SIGMA_1024, files.SIGMA_VAE)
    prompts = describe(workflow, loaded, PAINTED)
    workflow.group("Your picture", "picture")
    picture = workflow.node("LoadImage", image="example.png")
    fitted = workflow.node("PixArtFitImage", image=picture, mode="into the nearest bin", base="1024")
    latent = workflow.node("VAEEncode", pixels=fitted, vae=loaded.vae)
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
        "change: only that is made again. Pictures are taken at their own size; 512 to 1536 px a side suit the 1024 "
        "model. A picture whose transparent part is the mask works as well."
    )
    loaded = load(workflow, note, files.SIGMA_1024, files.SIGMA_VAE)
    prompts = describe(workflow, loaded, TEAPOT)
    workflow.group("Your picture and its mask", "picture")
    picture = workflow.node("LoadImage", image="example.png")
    latent = workflow.node("VAEEncode", pixels=picture, vae=loaded.vae)
    mask = workflow.node("GrowMask", mask=picture["MASK"], expand=8)
    latent = workflow.node("SetLatentNoiseMask", samples=latent, mask=mask)
    workflow.group("Sampling", "sampling")
    make_picture(workflow, loaded, prompts, latent, denoise=0.9)


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
    latent = sample(workflow, loaded.model, prompts, picture_size(workflow, 1024, 1024))
    workflow.group("Second pass, enlarged", "sampling")
    latent = workflow.node("LatentUpscaleBy", samples=latent, upscale_method="bicubic", scale_by=1.5)
    make_picture(workflow, loaded, prompts, latent, seed=2, denoise=0.45)


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
    prompts = describe(workflow, loaded, BOAT)
    workflow.group("Sampling", "sampling")
    latent = sample(workflow, loaded.model, prompts, picture_size(workflow, 1024, 1024))
    workflow.group("Picture", "result")
    pictures = workflow.node("VAEDecodeTiled", samples=latent, vae=loaded.vae, tile_size=512, overlap=64)
    workflow.node("SaveImage", images=pictures, filename_prefix="pixart")


def compare_settings(workflow: Workflow) -> None:
    """A table of pictures by steps and guidance."""
    note = (
        "### Compare settings\n\nOne picture for each combination of the values in **PixArt Compare Axes**, on one "
        "labelled sheet. Link x and y to whatever is to vary: steps, cfg, a sampler's name, a LoRA's strength, a "
        "prompt."
    )
    loaded = load(workflow, note, files.SIGMA_1024, files.SIGMA_VAE)
    prompts = describe(workflow, loaded, CACTUS)
    workflow.group("What varies", "picture")
    names = {"x_name": "steps", "y_name": "guidance"}
    axes = workflow.node("PixArtCompareAxes", x_values="8, 14, 20", y_values="2.0, 4.5, 7.0", **names)
    varying = {"steps": axes["x"], "cfg": axes["y"]}
    size = picture_size(workflow, 1024, 1024)
    workflow.group("Sampling", "sampling")
    latent = sample(workflow, loaded.model, prompts, size, **varying)
    workflow.group("Sheet", "result")
    pictures = workflow.node("VAEDecode", samples=latent, vae=loaded.vae)
    sheet = workflow.node("PixArtCompareSheet", images=pictures, grid=axes["grid"], title="Steps and guidance")
    workflow.node("SaveImage", images=sheet, filename_prefix="pixart_sheet")


def styles(workflow: Workflow) -> None:
    """One prompt in several styles."""
    note = (
        "### Styles\n\nA style is a template around the prompt, with its own negative. The run makes one picture for "
        "each style; `*` in **more_styles** takes all. Your own styles go into the file that the node's help names."
    )
    loaded = load(workflow, note, files.SIGMA_1024, files.SIGMA_VAE)
    workflow.group("Prompt", "prompt")
    styled = workflow.node("PixArtStyle", text=BOAT, style="Photograph", more_styles="Anime\nPixel Art")
    links = {"clip": loaded.clip, "model": loaded.model}
    workflow.column()
    positive = workflow.node("PixArtTextEncode", "Prompt", text=styled, **links)
    negative = {"mode": "text", "text": styled["negative"], "positive": positive, **links}
    prompts = positive, workflow.node("PixArtNegative", "Negative", **negative)
    workflow.group("Sampling", "sampling")
    latent = sample(workflow, loaded.model, prompts, picture_size(workflow, 1024, 1024))
    workflow.group("Sheet", "result")
    pictures = workflow.node("VAEDecode", samples=latent, vae=loaded.vae)
    sheet = workflow.node("PixArtCompareSheet", images=pictures, labels=styled["style"])
    workflow.node("SaveImage", images=sheet, filename_prefix="pixart_styles")


def save_prompt_embeddings(workflow: Workflow) -> None:
    """Encode prompts once, and keep them."""
    note = (
        "### Save prompt embeddings\n\nEncodes a prompt and its negative with T5, once, into files in ComfyUI's "
        "output folder. The workflow **Prompts in files, use without T5** makes pictures of them with no T5 in memory. "
        "**caption_length**: 300 for Sigma, 120 for alpha."
    )
    read_me(workflow, note, files.T5_FP16)
    workflow.group("Models", "models")
    loaded = Loaded(clip=workflow.node("PixArtLoadT5", text_encoder=files.T5_FP16))
    prompts = describe(workflow, loaded, KITE, caption_length="300")
    workflow.group("Files", "result")
    for title, prompt, prefix in zip(("Save the prompt", "Save the negative"), prompts, EMBEDDINGS, strict=True):
        workflow.node("PixArtSavePromptEmbeddings", title, conditioning=prompt, filename_prefix=prefix)


def load_prompt_embeddings(workflow: Workflow) -> None:
    """A picture of saved prompts, without T5."""
    note = (
        "### Load prompt embeddings\n\nMakes a picture of prompts that the workflow **Prompts in files, save** wrote: "
        "the nine gigabytes of T5 are not needed. Press R after saving some, and choose them."
    )
    read_me(workflow, note, files.SIGMA_1024, files.SIGMA_VAE)
    workflow.group("Models", "models")
    model = workflow.node("PixArtLoadCheckpoint", checkpoint=files.SIGMA_1024)
    loaded = Loaded(model, vae=workflow.node("PixArtLoadVAE", vae=files.SIGMA_VAE, model=model))
    workflow.group("Prompt", "prompt")
    names = [f"output/{prefix}_00001_.safetensors" for prefix in EMBEDDINGS]
    titles = "Saved prompt", "Saved negative"
    prompts = [
        workflow.node("PixArtLoadPromptEmbeddings", title, embeddings=name)
        for title, name in zip(titles, names, strict=True)
    ]
    workflow.group("Sampling", "sampling")
    make_picture(workflow, loaded, prompts, picture_size(workflow, 1024, 1024))


PICTURES = PLAIN | {
    each.__name__: each
    for each in (
        any_aspect_ratio,
        image_to_image,
        inpaint,
        hires_fix,
        low_memory,
        save_prompt_embeddings,
        load_prompt_embeddings,
        compare_settings,
        styles,
    )
}
