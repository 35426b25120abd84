"""The official model files that the workflows name, and what stands in for each when the demo model runs them."""

from ..format.released import Released

CONTROL_REPO = "https://huggingface.co/PixArt-alpha/PixArt-ControlNet/resolve/main"
ALPHA_REPO = "https://huggingface.co/PixArt-alpha/PixArt-alpha/resolve/main"
SIGMA_REPO = "https://huggingface.co/PixArt-alpha/PixArt-Sigma/resolve/main"
VAE_REPO = "https://huggingface.co/stabilityai"
T5_REPO = "https://huggingface.co/comfyanonymous/flux_text_encoders/resolve/main"


def _transformer_of(repository: str) -> Released:
    place = "resolve/main/transformer/diffusion_pytorch_model.safetensors"
    return Released(f"https://huggingface.co/PixArt-alpha/{repository}/{place}", "diffusion_models")


ALPHA_1024 = Released(f"{ALPHA_REPO}/PixArt-XL-2-1024-MS.pth", "diffusion_models")
ALPHA_512 = Released(f"{ALPHA_REPO}/PixArt-XL-2-512x512.pth", "diffusion_models")
ALPHA_256 = Released(f"{ALPHA_REPO}/PixArt-XL-2-256x256.pth", "diffusion_models")
SIGMA_1024 = Released(f"{SIGMA_REPO}/PixArt-Sigma-XL-2-1024-MS.pth", "diffusion_models")
LCM_1024 = _transformer_of("PixArt-LCM-XL-2-1024-MS")
DMD_512 = _transformer_of("PixArt-Alpha-DMD-XL-2-512x512")
CONTROL_1024 = Released(f"{CONTROL_REPO}/PixArt-XL-2-1024-ControlNet.pth", "controlnet")
HED = Released("https://huggingface.co/lllyasviel/Annotators/resolve/main/ControlNetHED.pth", "controlnet")
T5_FP16 = Released(f"{T5_REPO}/t5xxl_fp16.safetensors", "text_encoders")
T5_FP8 = Released(f"{T5_REPO}/t5xxl_fp8_e4m3fn.safetensors", "text_encoders")
ALPHA_VAE = Released(f"{VAE_REPO}/sd-vae-ft-ema-original/resolve/main/vae-ft-ema-560000-ema-pruned.safetensors", "vae")
SIGMA_VAE = Released(f"{VAE_REPO}/sdxl-vae/resolve/main/sdxl_vae.safetensors", "vae")
_ALL = (
    *(ALPHA_1024, ALPHA_512, ALPHA_256, SIGMA_1024, LCM_1024, DMD_512),
    *(CONTROL_1024, HED, T5_FP16, T5_FP8, ALPHA_VAE, SIGMA_VAE),
)
# What the editor is told of a file, by its name; of some there are several of one name.
ENTRIES: dict[str, list[dict]] = {}
for _file in _ALL:
    ENTRIES.setdefault(str(_file), []).append(_file.entry())

DEMO_MODEL, DEMO_T5, DEMO_VAE = "pixart_demo.safetensors", "pixart_demo_t5.safetensors", "pixart_demo_vae.safetensors"
DEMO_GUIDANCE = 2.0  # at which its outlines are best
DEMO_CONTROL = "pixart_demo_control.safetensors"

# What stands in for a file of each folder; all the workflows run in the tests, and for their thumbnails, with these.
STAND_INS = {
    "diffusion_models": DEMO_MODEL,
    "text_encoders": DEMO_T5,
    "vae": DEMO_VAE,
    "controlnet": DEMO_CONTROL,
}


def stand_in(name: str) -> str:
    """The demo's file for an official one; any other name is its own."""
    return STAND_INS[ENTRIES[name][0]["directory"]] if name in ENTRIES else name


def where_to_put(*names: Released) -> str:
    """Markdown that names files, their folders, and where to download them."""
    rows = []
    for name in names:
        page = name.url.split("/resolve/")[0]
        rows.append(f"- `models/{name.directory}/`  \n`{name}`  \n[{page.split('.co/')[1]}]({page})")
    return "**Files**\n\n" + "\n".join(rows)
