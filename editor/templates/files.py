"""The official model files that the workflows name, and what stands in for each when the demo model runs them."""

CONTROL_REPO = "https://huggingface.co/PixArt-alpha/PixArt-ControlNet/resolve/main"
ALPHA_REPO = "https://huggingface.co/PixArt-alpha/PixArt-alpha/resolve/main"
SIGMA_REPO = "https://huggingface.co/PixArt-alpha/PixArt-Sigma/resolve/main"
T5_REPO = "https://huggingface.co/comfyanonymous/flux_text_encoders/resolve/main"

ALPHA_1024 = "PixArt-XL-2-1024-MS.pth"
ALPHA_512 = "PixArt-XL-2-512x512.pth"
ALPHA_256 = "PixArt-XL-2-256x256.pth"
SIGMA_1024 = "PixArt-Sigma-XL-2-1024-MS.pth"
LCM_1024 = "PixArt-LCM-XL-2-1024-MS.safetensors"
DMD_512 = "PixArt-Alpha-DMD-XL-2-512x512.safetensors"
CONTROL_1024 = "PixArt-XL-2-1024-ControlNet.pth"
HED = "ControlNetHED.pth"
T5_FP16 = "t5xxl_fp16.safetensors"
T5_FP8 = "t5xxl_fp8_e4m3fn.safetensors"
ALPHA_VAE = "vae-ft-ema-560000-ema-pruned.safetensors"
SIGMA_VAE = "sdxl_vae.safetensors"

DEMO_MODEL, DEMO_T5, DEMO_VAE = "pixart_demo.safetensors", "pixart_demo_t5.safetensors", "pixart_demo_vae.safetensors"
DEMO_CONTROL = "pixart_demo_control.safetensors"


def _file(url: str, directory: str) -> dict:
    return {"url": url, "directory": directory}


def _transformer_of(repository: str) -> dict:
    place = "resolve/main/transformer/diffusion_pytorch_model.safetensors"
    return _file(f"https://huggingface.co/PixArt-alpha/{repository}/{place}", "diffusion_models")


# By name: what the editor's dialog of missing models shows.
FILES = {
    ALPHA_1024: _file(f"{ALPHA_REPO}/{ALPHA_1024}", "diffusion_models"),
    ALPHA_512: _file(f"{ALPHA_REPO}/{ALPHA_512}", "diffusion_models"),
    ALPHA_256: _file(f"{ALPHA_REPO}/{ALPHA_256}", "diffusion_models"),
    SIGMA_1024: _file(f"{SIGMA_REPO}/{SIGMA_1024}", "diffusion_models"),
    LCM_1024: _transformer_of("PixArt-LCM-XL-2-1024-MS"),
    DMD_512: _transformer_of("PixArt-Alpha-DMD-XL-2-512x512"),
    CONTROL_1024: _file(f"{CONTROL_REPO}/{CONTROL_1024}", "controlnet"),
    HED: _file(f"https://huggingface.co/lllyasviel/Annotators/resolve/main/{HED}", "controlnet"),
    T5_FP16: _file(f"{T5_REPO}/{T5_FP16}", "text_encoders"),
    T5_FP8: _file(f"{T5_REPO}/{T5_FP8}", "text_encoders"),
    ALPHA_VAE: _file(f"https://huggingface.co/stabilityai/sd-vae-ft-ema-original/resolve/main/{ALPHA_VAE}", "vae"),
    SIGMA_VAE: _file(f"https://huggingface.co/stabilityai/sdxl-vae/resolve/main/{SIGMA_VAE}", "vae"),
}

# What stands in for a file of each folder; all the workflows run in the tests, and for their thumbnails, with these.
STAND_INS = {
    "diffusion_models": DEMO_MODEL,
    "text_encoders": DEMO_T5,
    "vae": DEMO_VAE,
    "controlnet": DEMO_CONTROL,
}


def stand_in(name: str) -> str:
    """The demo's file for an official one; any other name is its own."""
    return STAND_INS[FILES[name]["directory"]] if name in FILES else name


def where_to_put(*names: str) -> str:
    """Markdown that names files, their folders, and where to download them."""
    rows = []
    for name in names:
        source = FILES[name]["url"]
        page = source.split("/resolve/")[0]
        renamed = "" if source.endswith(f"/{name}") else f": save `{source.split('/main/')[1]}` under this name"
        rows.append(f"- `models/{FILES[name]['directory']}/`  \n`{name}`  \n[{page.split('.co/')[1]}]({page}){renamed}")
    return "**Files**\n\n" + "\n".join(rows)
