"""Adapters of every kind that PEFT and LyCORIS merge: the same weights as the package itself gives."""

import json
import random

import pytest
import torch
from safetensors.torch import load_file, save_file

from pixart_pack.pixart.checkpoint import to_diffusers, to_original
from pixart_pack.pixart.lora import load_lora, merge, read_lora
from pixart_pack.pixart.weights.saving import diffusers_config
from pixart_pack.tests.lora.test_reading import CONFIG, EVERYTHING, same_weights
from pixart_pack.tests.tiny_pixart import make_weights

diffusers = pytest.importorskip("diffusers")
peft = pytest.importorskip("peft")

NULL = "y_embedder.y_embedding"
WEIGHTS = {key: value for key, value in make_weights(CONFIG).items() if key != NULL}
LINEAR = [name for name in EVERYTHING if name != "proj"]
SOME = ["to_q", "ff.net.2"]
# Rotations are solved for, or multiplied some ten times, in float32.
WIDE = {"atol": 2e-5, "rtol": 1e-4}


def make_transformer():
    fields = {key: value for key, value in diffusers_config(CONFIG).items() if not key.startswith("_")}
    with torch.device("meta"):
        model = diffusers.PixArtTransformer2DModel(**fields)
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
    "unilora": ("UniLoraConfig", {"target_modules": ["to_q", "adaln_single.linear"]}),
    "vblora": ("VBLoRAConfig", {"vector_length": 8, "num_vectors": 16, "target_modules": LINEAR}),
    "vera without its projections": ("VeraConfig", {"r": 16, "save_projection": False, "target_modules": LINEAR}),
    "waveft": ("WaveFTConfig", {"n_frequency": 40, "target_modules": SOME}),
}
PEFT_CASES |= PACKAGE_CASES


@pytest.mark.parametrize("case", PEFT_CASES)
def test_merges_as_peft_does(case, tmp_path):
    expected = save_with_peft(tmp_path, *PEFT_CASES[case])
    lora = read_lora(tmp_path, CONFIG)
    assert not lora.unmatched, lora.unmatched
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert lora.matched == len(tensors)
    assert sum(not torch.equal(expected[key], WEIGHTS[key]) for key in WEIGHTS) >= len(lora.factors) / 3
    same_weights(merge(WEIGHTS, lora), expected, **WIDE)


# -- LyCORIS ----------------------------------------------------------------------------------------------------------

LYCORIS_CASES = {
    "locon": ("locon", {}),
    "locon with a core": ("locon", {"use_tucker": True}),
    "locon, rank stabilised": ("locon", {"rs_lora": True}),
    "dora": ("locon", {"weight_decompose": True}),
    "dora by columns": ("locon", {"weight_decompose": True, "wd_on_out": False}),
    "loha": ("loha", {}),
    "loha with a core": ("loha", {"use_tucker": True}),
    "lokr": ("lokr", {"factor": 4}),
    "lokr, both in factors": ("lokr", {"decompose_both": True, "factor": 8, "linear_dim": 2, "conv_dim": 2}),
    "lokr with a core": ("lokr", {"use_tucker": True, "linear_dim": 1, "conv_dim": 1}),
    "lokr, whole matrices": ("lokr", {"full_matrix": True}),
    "lokr, unbalanced": ("lokr", {"unbalanced_factorization": True}),
    "lokr with lengths": ("lokr", {"weight_decompose": True}),
    "full": ("full", {}),
    "ia3 by rows": ("ia3", {}),
    "ia3 by columns": ("ia3", {"train_on_input": True}),
    "diag-oft": ("diag-oft", {"linear_alpha": 0, "conv_alpha": 0}),
    "diag-oft with lengths": ("diag-oft", {"rescaled": True}),
    "diag-oft, bounded": ("diag-oft", {"constraint": 0.01}),
    "boft": ("boft", {"linear_dim": 36, "conv_dim": 36}),
    "boft with lengths, bounded": ("boft", {"linear_dim": 36, "conv_dim": 36, "rescaled": True, "constraint": 0.01}),
    "glora": ("glora", {}),
    "t-lora": ("tlora", {}),
    "t-lora of the last vectors": ("tlora", {"sig_type": "last"}),
    "t-lora of the middle vectors": ("tlora", {"sig_type": "middle"}),
}
# LyCORIS' merge has the scale of these twice, its forward once: they are compared at a scale of one, and below.
TWICE = ("loha", "lokr")


def save_with_lycoris(path, algorithm, options, scale=0.2):
    """(weights that LyCORIS merges its adapter to, in the original layout); the adapter is saved as `path`."""
    lycoris = pytest.importorskip("lycoris")
    model = make_transformer()
    sizes = {"linear_dim": 4, "conv_dim": 4, "linear_alpha": 2, "conv_alpha": 2}
    sizes |= dict.fromkeys(("linear_alpha", "conv_alpha"), 0) if algorithm in TWICE else {}  # 0 is the rank
    kinds = ["Linear"] if algorithm == "tlora" else ["Linear", "Conv2d"]  # its convolutions touch one corner alone
    lycoris.LycorisNetwork.apply_preset({"target_module": kinds, "target_name": []})
    network = lycoris.create_lycoris(model, 1.0, algo=algorithm, **{**sizes, **options})
    network.apply_to()
    randomize(network, scale)
    save_file({key: value.detach().clone() for key, value in network.state_dict().items()}, path)
    network.restore()
    with torch.no_grad():
        network.eval().merge_to(1.0)
    weights = {key.replace(".org_module.0", ""): value for key, value in model.state_dict().items()}
    return to_original({key: value for key, value in weights.items() if "lycoris" not in key})


@pytest.mark.parametrize("case", LYCORIS_CASES)
def test_merges_as_lycoris_does(case, tmp_path):
    path = tmp_path / "some.safetensors"
    expected = save_with_lycoris(path, *LYCORIS_CASES[case], scale=0.01 if "t-lora" in case else 0.2)
    lora = read_lora(path, CONFIG)
    assert not lora.unmatched, lora.unmatched
    assert len(lora.factors) > 20
    assert sum(not torch.equal(expected[key], WEIGHTS[key]) for key in WEIGHTS) >= len(lora.factors) / 3
    same_weights(merge(WEIGHTS, lora), expected, **WIDE)


@pytest.mark.parametrize("algorithm", TWICE)
def test_runs_as_lycoris_does_at_another_scale(algorithm):
    lycoris = pytest.importorskip("lycoris.modules")
    kind = {"loha": lycoris.LohaModule, "lokr": lycoris.LokrModule}[algorithm]
    layer = torch.nn.Linear(48, 192)
    layer.load_state_dict({name: WEIGHTS[f"blocks.0.mlp.fc1.{name}"] for name in ("weight", "bias")})
    module = kind("lycoris_blocks_0_mlp_fc1", layer, lora_dim=4, alpha=2, factor=4)
    randomize(module)
    tensors = {f"lycoris_blocks_0_mlp_fc1.{key}": value for key, value in module.state_dict().items()}
    changed = merge(WEIGHTS, load_lora(tensors, config=CONFIG))
    module.apply_to()
    found = torch.nn.functional.linear(torch.eye(48), changed["blocks.0.mlp.fc1.weight"], layer.bias)
    torch.testing.assert_close(found, module.eval()(torch.eye(48)), **WIDE)


# -- parts of real files, under other names ---------------------------------------------------------------------------

FUZZED_WITH_PEFT = ("adalora", "biases of all", "whole modules", "ia3", "oft", "vera", "hira", "randlora")
FUZZED_WITH_LYCORIS = (
    "locon",
    "dora",
    "loha",
    "lokr, both in factors",
    "diag-oft with lengths",
    "glora",
    "ia3 by rows",
)
# Roles without which a module is another adapter, as valid as before.
OPTIONAL = ("alpha", "dora_scale", "rescale", "lora_mid", "magnitude")
PREFIXES = ("", "transformer.", "diffusion_model.", "lora_unet_", "base_model.model.", "unet.base_model.model.")


@pytest.fixture(scope="module")
def real_files(tmp_path_factory):
    """case -> (tensors, PEFT's configuration or None, the weights with all of it in them)."""
    made = {}

    def get(case):
        if case not in made:
            folder = tmp_path_factory.mktemp("real")
            if case in PEFT_CASES:
                weights = save_with_peft(folder, *PEFT_CASES[case])
                tensors = load_file(folder / "adapter_model.safetensors")
                config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
                made[case] = tensors, config, weights
            else:
                weights = save_with_lycoris(folder / "some.safetensors", *LYCORIS_CASES[case])
                made[case] = load_file(folder / "some.safetensors"), None, weights
        return made[case]

    return get


def mutate(tensors, draw):
    """Some of a file's tensors, some of them under other names. Of OPTIONAL all stay."""
    share, renamed = draw.choice([0, 0.1, 0.5]), {}
    for key, value in tensors.items():
        chance = draw.random()
        if is_optional(key):
            chance = 1
        elif draw.random() < share:
            continue
        if chance < 0.05:
            place = draw.randrange(len(key))
            key = key[:place] + draw.choice("x._") + key[place + 1 :]
        elif chance < 0.1:
            key = key.replace("base_model.model.", draw.choice(PREFIXES))
        elif chance < 0.13:
            value = value.to(torch.int32) if value.ndim else value
        elif chance < 0.16:
            renamed[f"{draw.choice(PREFIXES)}{key}"] = value
        renamed[key] = value
    return renamed


def is_optional(key):
    return any(role in key for role in OPTIONAL)


@pytest.mark.parametrize("case", [*FUZZED_WITH_PEFT, *FUZZED_WITH_LYCORIS])
def test_parts_of_a_file_change_what_it_changes_or_nothing(real_files, case):
    """Rows are as the whole file makes them or as they were, or the file is refused; what is left out is named."""
    tensors, config, whole = real_files(case)
    draw, refused = random.Random(case), 0
    for _ in range(12):
        given = mutate(tensors, draw)
        try:
            lora = load_lora(given, config, config=CONFIG)
        except ValueError as error:
            assert ": got " in str(error) and len(str(error)) < 700
            refused += 1
            continue
        assert lora.matched + len(lora.unmatched) + len(lora.text_encoder) == len(given)
        assert bool(lora.shortfall) >= (lora.matched < len(given))
        if any(map(is_optional, lora.unmatched)):
            continue
        merged = merge(WEIGHTS, lora)
        for name, weight in merged.items():
            rows = weight.flatten(1) if weight.ndim > 1 else weight[:, None]
            same = [(rows - other[name].reshape(rows.shape)).abs().amax(1) < 1e-4 for other in (whole, WEIGHTS)]
            assert bool((same[0] | same[1]).all()), name
    assert refused < 12
