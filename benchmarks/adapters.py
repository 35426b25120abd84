"""Adapters of every kind as PEFT and LyCORIS save them, on a tiny diffusers PixArt: read, and compared with theirs.

`python -m benchmarks adapters` writes the table of docs/lora.md. The tests hold to the same cases.
"""

import importlib
import logging
import re
import tempfile
import warnings
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from ..pixart.checkpoint import NULL_CAPTION_KEY, expected_shapes, to_diffusers, to_original
from ..pixart.config import CONFIGS
from ..pixart.lora import describe_lora, merge, read_lora
from ..pixart.weights.saving import diffusers_config
from .report import markdown_table

PAGE = Path(__file__).resolve().parent.parent / "docs" / "lora.md"
BEGIN, END = "<!-- python -m benchmarks adapters -->\n", "<!-- end -->\n"
EVERYTHING = [
    *("to_q", "to_k", "to_v", "to_out.0"),
    *("ff.net.0.proj", "ff.net.2", "proj", "proj_out", "linear", "linear_1", "linear_2"),
]
CONFIG = replace(CONFIGS["alpha-1024"], depth=2, hidden_size=48, num_heads=4, caption_channels=32)
EVERYTHING = [
    *("to_q", "to_k", "to_v", "to_out.0"),
    *("ff.net.0.proj", "ff.net.2", "proj", "proj_out", "linear", "linear_1", "linear_2"),
]
_SHAPES = {key: shape for key, shape in expected_shapes(CONFIG).items() if key != NULL_CAPTION_KEY}
_GENERATOR = torch.Generator().manual_seed(0)
WEIGHTS = {key: torch.randn(shape, generator=_GENERATOR) * 0.08 for key, shape in _SHAPES.items()}
LINEAR = [name for name in EVERYTHING if name != "proj"]
SOME = ["to_q", "ff.net.2"]
# Rotations are solved for, or multiplied some ten times, in float32.
WIDE = {"atol": 2e-5, "rtol": 1e-4}


def make_transformer():
    fields = {key: value for key, value in diffusers_config(CONFIG).items() if not key.startswith("_")}
    with torch.device("meta"):
        model = importlib.import_module("diffusers").PixArtTransformer2DModel(**fields)
    copies = {key: value.clone() for key, value in to_diffusers(WEIGHTS).items()}  # a merge writes into them
    model.load_state_dict(copies, strict=True, assign=True)
    return model.eval()


def randomize(module, scale=0.2, seed=0):
    """Numbers other than those that leave the base as it is, in all that is trained."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        if parameter.requires_grad and parameter.is_floating_point():
            parameter.data = parameter.data + torch.randn(parameter.shape, generator=generator) * scale


def save_with_peft(folder, name, fields, scale=0.2):
    """(weights that PEFT merges its adapter to, in the original layout); the adapter is saved in `folder`."""
    peft = importlib.import_module("peft")
    model = peft.get_peft_model(make_transformer(), getattr(peft, name)(**fields))
    randomize(model, scale)
    model.save_pretrained(folder)
    return to_original(model.eval().merge_and_unload().state_dict())


PEFT_CASES = {
    "adalora": ("AdaLoraConfig", {"init_r": 6, "lora_alpha": 5, "total_step": 10, "target_modules": LINEAR}),
    "biases of all": ("LoraConfig", {"r": 4, "bias": "all", "target_modules": SOME}),
    "biases of its own": ("LoraConfig", {"r": 4, "bias": "lora_only", "target_modules": EVERYTHING}),
    "whole modules": (
        "LoraConfig",
        {"r": 4, "target_modules": SOME, "modules_to_save": ["adaln_single", "proj_out", "pos_embed"]},
    ),
    "layer norms' tuning": ("LNTuningConfig", {"target_modules": ["proj_out", "attn1.to_q", "linear"]}),
    "ia3": ("IA3Config", {"target_modules": EVERYTHING, "feedforward_modules": ["ff.net.2", "linear_1"]}),
    "ia3, columns of a convolution": ("IA3Config", {"target_modules": ["proj"], "feedforward_modules": ["proj"]}),
    "oft": ("OFTConfig", {"oft_block_size": 8, "r": 0, "target_modules": EVERYTHING}),
    "oft, exact": ("OFTConfig", {"r": 4, "oft_block_size": 0, "use_cayley_neumann": False, "target_modules": SOME}),
    "oft, bounded": ("OFTConfig", {"oft_block_size": 8, "coft": True, "eps": 0.3, "target_modules": SOME}),
    "oft, one block": ("OFTConfig", {"oft_block_size": 8, "block_share": True, "target_modules": SOME}),
    "oft, few terms": ("OFTConfig", {"oft_block_size": 8, "num_cayley_neumann_terms": 2, "target_modules": SOME}),
    "boft": ("BOFTConfig", {"boft_block_size": 4, "target_modules": EVERYTHING, "bias": "boft_only"}),
    "hra": ("HRAConfig", {"r": 4, "target_modules": EVERYTHING}),
    "hra, orthogonal": ("HRAConfig", {"r": 4, "apply_GS": True, "target_modules": SOME}),
    "vera": ("VeraConfig", {"r": 16, "target_modules": ["to_q", "to_k", "to_v", "to_out.0"]}),
    "vera of several widths": ("VeraConfig", {"r": 16, "target_modules": LINEAR}),
    "fourierft": ("FourierFTConfig", {"n_frequency": 60, "scaling": 20.0, "target_modules": LINEAR}),
}
# Kinds that the package itself has to merge.
PACKAGE_CASES = {
    "beft": ("BeftConfig", {"target_modules": LINEAR}),
    "c3a": ("C3AConfig", {"block_size": 8, "target_modules": SOME}),
    "deft": ("DeftConfig", {"r": 4, "target_modules": SOME}),
    "delora": ("DeloraConfig", {"r": 4, "target_modules": SOME}),
    "glora": ("GloraConfig", {"r": 4, "target_modules": LINEAR}),
    "gralora": ("GraloraConfig", {"r": 8, "target_modules": SOME}),
    "hira": ("HiraConfig", {"r": 4, "target_modules": SOME}),
    "miss": ("MissConfig", {"r": 8, "target_modules": SOME}),
    "peanut": ("PeanutConfig", {"r": 4, "target_modules": SOME}),
    "pvera": ("PveraConfig", {"r": 8, "target_modules": ["to_q"]}),
    "randlora": ("RandLoraConfig", {"r": 8, "target_modules": LINEAR}),
    "road": ("RoadConfig", {"group_size": 8, "target_modules": SOME}),
    "shira": ("ShiraConfig", {"r": 4, "target_modules": SOME}),
    "supertuning": ("SupertuningConfig", {"target_modules": SOME}),
    "tinylora": ("TinyLoraConfig", {"target_modules": SOME}),
    "unilora": ("UniLoraConfig", {"target_modules": LINEAR}),
    "vblora": ("VBLoRAConfig", {"vector_length": 8, "num_vectors": 16, "target_modules": LINEAR}),
    "vera without its projections": ("VeraConfig", {"r": 16, "save_projection": False, "target_modules": LINEAR}),
    "waveft": ("WaveFTConfig", {"n_frequency": 40, "target_modules": SOME}),
}


LYCORIS_CASES = {
    "locon": ("locon", {}),
    "locon with a core": ("locon", {"use_tucker": True}),
    "locon, rank stabilised": ("locon", {"rs_lora": True}),
    "dora": ("locon", {"dora_wd": True}),
    "dora by columns": ("locon", {"dora_wd": True, "wd_on_out": False}),
    "loha": ("loha", {}),
    "loha with a core": ("loha", {"use_tucker": True}),
    "lokr": ("lokr", {"factor": 4}),
    "lokr, both in factors": ("lokr", {"decompose_both": True, "factor": 8, "linear_dim": 2, "conv_dim": 2}),
    "lokr with a core": ("lokr", {"use_tucker": True, "linear_dim": 1, "conv_dim": 1}),
    "lokr, whole matrices": ("lokr", {"full_matrix": True}),
    "lokr, unbalanced": ("lokr", {"unbalanced_factorization": True}),
    "lokr with lengths": ("lokr", {"dora_wd": True}),
    "full": ("full", {}),
    "ia3 by rows": ("ia3", {}),
    "ia3 by columns": ("ia3", {"train_on_input": True}),
    "diag-oft": ("diag-oft", {"linear_alpha": 0, "conv_alpha": 0}),
    "diag-oft with lengths": ("diag-oft", {"rescaled": True}),
    "diag-oft, bounded": ("diag-oft", {"constraint": 0.01}),
    "boft": ("boft", {"linear_dim": 36, "conv_dim": 36}),
    "boft with lengths, bounded": ("boft", {"linear_dim": 36, "conv_dim": 36, "rescaled": True, "constraint": 0.01}),
    "glora": ("glora", {}),
}
# LyCORIS' merge has the scale of these twice, its forward once: they are compared at a scale of one, and below.
TWICE = ("loha", "lokr")


def save_with_lycoris(path, algorithm, options, scale=0.2):
    """(weights that LyCORIS merges its adapter to, in the original layout); the adapter is saved as `path`."""
    lycoris = importlib.import_module("lycoris")
    sizes = {"linear_dim": 4, "conv_dim": 4, "linear_alpha": 2, "conv_alpha": 2}
    sizes |= dict.fromkeys(("linear_alpha", "conv_alpha"), 0) if algorithm in TWICE else {}  # 0 is the rank
    lycoris.LycorisNetwork.apply_preset({"target_module": ["Linear", "Conv2d"], "target_name": []})
    model = make_transformer()
    network = lycoris.create_lycoris(model, 1.0, algo=algorithm, **{**sizes, **options})
    network.apply_to()
    randomize(network, scale)
    save_file({key: value.detach().clone() for key, value in network.state_dict().items()}, path)
    network.restore()
    with torch.no_grad():
        network.eval().merge_to(1.0)
    weights = {key.replace(".org_module.0", ""): value for key, value in model.state_dict().items()}
    return to_original({key: value for key, value in weights.items() if "lycoris" not in key})


def measure(merged: dict[str, torch.Tensor], lora) -> float:
    """The largest difference from the package's weights, as a share of its largest change."""
    ours = merge(WEIGHTS, lora)
    change = max(float((merged[key] - WEIGHTS[key]).abs().max()) for key in WEIGHTS)
    return max(float((merged[key] - ours[key]).abs().max()) for key in WEIGHTS) / change


def rows():
    """(package, case, what it is read as, the difference) of every case, in words."""
    plain = {
        "lora": ("LoraConfig", {"r": 4, "target_modules": EVERYTHING}),
        "rslora": ("LoraConfig", {"r": 4, "use_rslora": True, "target_modules": EVERYTHING}),
        "dora": ("LoraConfig", {"r": 4, "use_dora": True, "target_modules": EVERYTHING}),
        "loha": ("LoHaConfig", {"r": 4, "target_modules": EVERYTHING}),
        "lokr": ("LoKrConfig", {"r": 4, "target_modules": EVERYTHING}),
    }
    for package, save, cases in (
        ("PEFT", save_with_peft, {**plain, **PEFT_CASES, **PACKAGE_CASES}),
        ("LyCORIS", save_with_lycoris, LYCORIS_CASES),
    ):
        for case, (name, fields) in cases.items():
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) if package == "PEFT" else Path(folder, "some.safetensors")
                merged = save(path, name, fields)
                lora = read_lora(path, CONFIG, strict=True)
            kind = describe_lora(lora).splitlines()[0].removeprefix("kind: ")
            yield package, case, kind, f"{measure(merged, lora):.0e}"


def main(arguments):
    """Puts the table between its marks in docs/lora.md."""
    warnings.simplefilter("ignore")
    logging.getLogger("LyCORIS").setLevel(logging.ERROR)
    table = markdown_table(("written by", "kind", "read as", "largest difference, of the largest change"), rows())
    text = PAGE.read_text(encoding="utf-8")
    page = re.sub(f"{BEGIN}.*?{END}", lambda _: f"{BEGIN}\n{table}\n{END}", text, flags=re.DOTALL)
    PAGE.write_text(page, encoding="utf-8")
    logging.getLogger(__name__).info("%s", table)
