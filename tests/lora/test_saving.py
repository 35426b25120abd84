"""What is written is the same LoRA again: for PEFT itself, and for every layout read back."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from pixart_pack.pixart.checkpoint import to_original
from pixart_pack.pixart.lora import (
    LAYOUTS,
    Difference,
    Hadamard,
    Kronecker,
    LoRA,
    LowRank,
    Target,
    export_lora,
    export_notes,
    load_lora,
    merge,
    read_lora,
    save_lora,
)
from pixart_pack.pixart.lora.relative import Scaled
from pixart_pack.tests.lora.test_reading import CONFIG, NOISE, diffusers_model, same_weights
from pixart_pack.tests.tiny_pixart import make_weights

WIDTH = CONFIG.hidden_size
SHARES = [Target("blocks.0.attn.qkv.weight", part, 3) for part in range(3)]


def low_rank(rows, columns=(WIDTH,), rank=4, alpha=None, seed=0, magnitude=False, **more):
    generator = torch.Generator().manual_seed(seed)
    kernel = [1] * (len(columns) - 1)
    down = torch.randn(rank, *columns, generator=generator) * 0.3
    up = torch.randn(rows, rank, *kernel, generator=generator) * 0.3
    lengths = torch.rand(rows, 1, generator=generator) + 0.5 if magnitude else None
    return LowRank(down, up, alpha=alpha, magnitude=lengths, **more)


def packed(magnitude=False):
    """As the trainer has them: on whole modules of the original layout, by their names."""
    return {
        "blocks.0.attn.qkv": low_rank(3 * WIDTH, alpha=8.0, magnitude=magnitude),
        "blocks.1.cross_attn.kv_linear": low_rank(2 * WIDTH, rank=2, alpha=3.0, seed=1, magnitude=magnitude),
        "blocks.1.mlp.fc1": low_rank(4 * WIDTH, rank=4, seed=2, magnitude=magnitude),
        "x_embedder.proj": low_rank(WIDTH, (4, 2, 2), alpha=8.0, seed=3, magnitude=magnitude),
        "final_layer.linear": low_rank(32, alpha=2.5, seed=4, magnitude=magnitude),
    }


def shared():
    """As files of the diffusers layout have them: q, k, v apart, of different rank and alpha, and k left out."""
    return {
        SHARES[0]: low_rank(WIDTH, alpha=8.0),
        SHARES[2]: low_rank(WIDTH, rank=2, alpha=3.0, seed=1),
        Target("blocks.0.attn.proj.weight"): low_rank(WIDTH, rank=6, seed=2),
    }


def merged(factors, strength=1.0):
    placed = {Target.of(place) if isinstance(place, str) else place: factor for place, factor in factors.items()}
    return merge(make_weights(CONFIG), LoRA(placed), strength)


def reread(path):
    lora = read_lora(path, CONFIG)
    assert not lora.unmatched
    return lora


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("factors", [packed(), shared(), packed(magnitude=True)], ids=["packed", "shared", "dora"])
def test_reads_back_as_the_same_change(tmp_path, layout, factors):
    path = tmp_path / ("folder" if layout == "peft" else "some.safetensors")
    save_lora(path, factors, layout=layout, metadata={"caption": "ein größerer Kreis"})
    same_weights(merge(make_weights(CONFIG), reread(path)), merged(factors), **NOISE)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]  # nothing temporary stays
    with safe_open(path / "adapter_model.safetensors" if layout == "peft" else path, "pt") as file:
        assert file.metadata()["caption"] == "ein größerer Kreis"


@pytest.mark.peer
@pytest.mark.parametrize("magnitude", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("factors", [packed, shared])
def test_peft_loads_it(tmp_path, factors, magnitude):
    peft = pytest.importorskip("peft")
    given = factors(magnitude) if factors is packed else shared()
    save_lora(tmp_path / "adapter", given, layout="peft")
    weights = {key: value for key, value in make_weights(CONFIG).items() if key != "y_embedder.y_embedding"}
    model = peft.PeftModel.from_pretrained(diffusers_model(weights), tmp_path / "adapter")
    found = to_original(model.merge_and_unload().state_dict())
    expected = {key: value for key, value in merged(given).items() if key in weights}
    same_weights(found, expected, **NOISE)


def test_a_peft_file_keeps_its_alphas_without_its_folder(tmp_path):
    save_lora(tmp_path / "adapter", packed(), layout="peft")
    alone = (tmp_path / "adapter" / "adapter_model.safetensors").rename(tmp_path / "alone.safetensors")
    same_weights(merge(make_weights(CONFIG), reread(alone)), merged(packed()), **NOISE)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("config", "given"),
    [
        ({"lora_alpha": 6, "use_rslora": True}, "rslora"),
        ({"lora_alpha": 6, "alpha_pattern": {"attn1.to_q": 3}}, "patterns"),
        ({"peft_type": "ADALORA", "lora_alpha": 6}, "adalora"),
        (None, "no configuration"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_converted_adapter_means_the_same(tmp_path, layout, config, given):
    module, generator = "base_model.model.transformer_blocks.0.attn1.to_q", torch.Generator().manual_seed(0)
    ending = "" if given == "adalora" else ".weight"
    tensors = {
        f"{module}.lora_A{ending}": torch.randn(4, WIDTH, generator=generator),
        f"{module}.lora_B{ending}": torch.randn(WIDTH, 4, generator=generator),
    }
    if given == "adalora":
        tensors[f"{module}.lora_E"] = torch.randn(4, 1, generator=generator)
    lora = load_lora(tensors, config, config=CONFIG)
    path = tmp_path / ("folder" if layout == "peft" else "some.safetensors")
    save_lora(path, lora.factors, layout=layout)
    same_weights(merge(make_weights(CONFIG), reread(path)), merge(make_weights(CONFIG), lora), **NOISE)
    assert export_notes(lora, layout) == ([f"assumed: {each}" for each in lora.assumed])
    assert bool(lora.assumed) == (config is None)


def test_a_change_that_depends_on_its_weight_is_not_converted(tmp_path):
    scaled = {"blocks.0.attn.proj": Scaled(torch.rand(1, WIDTH))}
    for layout, message in (
        ("host", "depends on its weight: got IA3"),
        ("kohya", "IA3"),
        ("peft", "Not for PEFT: got IA3"),
    ):
        with pytest.raises(ValueError, match=message):
            save_lora(tmp_path / "some", scaled, layout=layout)


def test_packed_rows_are_split_exactly():
    tensors, config = export_lora({"blocks.0.attn.qkv": packed()["blocks.0.attn.qkv"]}, "peft")
    names = [f"base_model.model.transformer_blocks.0.attn1.to_{part}" for part in "qkv"]
    assert sorted(tensors) == sorted(f"{name}.lora_{side}.weight" for name in names for side in "AB")
    assert all(torch.equal(tensors[f"{name}.lora_A.weight"], tensors[f"{names[0]}.lora_A.weight"]) for name in names)
    assert config["target_modules"] == [f"transformer_blocks.0.attn1.to_{part}" for part in "kqv"]
    assert (config["r"], config["lora_alpha"]) == (4, 8)
    json.dumps(config)


def others():
    """Kinds that ComfyUI and LyCORIS know and PEFT's LoRA does not."""
    generator = torch.Generator().manual_seed(5)

    def random(*shape):
        return torch.randn(*shape, generator=generator) * 0.4

    return {
        "blocks.0.attn.qkv": Hadamard(random(144, 3), random(3, 48), random(144, 3), random(3, 48), alpha=2.0),
        "blocks.1.mlp.fc1": Kronecker(w1=random(4, 4), w2_a=random(48, 2), w2_b=random(2, 12), alpha=1.0),
        "blocks.1.mlp.fc2": Kronecker(w1=random(4, 4), w2=random(12, 48)),
        "x_embedder.proj": LowRank(random(3, 4), random(48, 3), random(3, 3, 2, 2), alpha=6.0),
        "blocks.1.attn.proj": low_rank(WIDTH, magnitude=True),
        "blocks.1.scale_shift_table": Difference(random(6, 48)),
        Target("blocks.1.attn.proj.bias"): Difference(random(48)),
        SHARES[1]._replace(name="blocks.1.attn.qkv.weight"): Kronecker(w1=random(4, 4), w2=random(12, 12)),
    }


@pytest.mark.parametrize("layout", ["host", "kohya"])
def test_other_kinds_read_back(tmp_path, layout):
    factors = others()
    if layout == "kohya":
        factors.popitem()  # its names have no place for a share of rows
    save_lora(tmp_path / "some.safetensors", factors, layout=layout)
    same_weights(merge(make_weights(CONFIG), reread(tmp_path / "some.safetensors")), merged(factors), **NOISE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize("alphas", [(8.0, 4.0), (7.0, 0.3)], ids=["one scale", "two scales"])
def test_joined_rows_lose_no_digits(dtype, alphas):
    factors = {
        SHARES[0]: low_rank(WIDTH, rank=4, alpha=alphas[0]).to(dtype),
        SHARES[2]: low_rank(WIDTH, rank=2, alpha=alphas[1], seed=1).to(dtype),
    }
    tensors, _ = export_lora(factors, "kohya")
    if alphas == (8.0, 4.0):
        assert {tensor.dtype for name, tensor in tensors.items() if not name.endswith("alpha")} == {dtype}
    found = merge(make_weights(CONFIG), load_lora(tensors, config=CONFIG))
    same_weights(found, merged(factors), **NOISE)


def test_what_a_file_says_of_itself_is_kept_but_not_anothers_alphas(tmp_path):
    save_lora(tmp_path / "adapter", packed(), layout="peft", metadata={"trigger": "Ünïcode"})
    lora = read_lora(tmp_path / "adapter")
    assert lora.metadata["trigger"] == "Ünïcode"
    save_lora(tmp_path / "some.safetensors", lora.factors, metadata=lora.metadata)
    assert read_lora(tmp_path / "some.safetensors").metadata == {"trigger": "Ünïcode", "format": "pt"}


@pytest.mark.parametrize(
    ("factors", "layout", "message"),
    [
        ({}, "host", "Nothing to save"),
        (packed(), "LyCORIS", "Unknown layout: got 'LyCORIS', expected one of host, peft, kohya"),
        ({"blocks.0.mlp.fc1": others()["blocks.1.mlp.fc1"]}, "peft", r"LoKr of 'blocks\.0\.mlp\.fc1\.weight'.*'host'"),
        ({"blocks.0.scale_shift_table": Difference(torch.ones(6, 48))}, "peft", "Not for PEFT: got difference"),
        ({**packed(), "t_block.1": low_rank(6 * WIDTH, magnitude=True)}, "peft", "DoRA and LoRA in one"),
        ({SHARES[0]: low_rank(WIDTH, magnitude=True)}, "kohya", "got DoRA, expected plain LoRA"),
    ],
)
def test_what_a_layout_cannot_hold(tmp_path, factors, layout, message):
    with pytest.raises(ValueError, match=message):
        save_lora(tmp_path / "some.safetensors", factors, layout=layout)
    assert not list(tmp_path.iterdir())


def test_a_file_is_replaced_and_a_folder_is_not(tmp_path):
    save_lora(tmp_path / "some.safetensors", packed())
    save_lora(tmp_path / "some.safetensors", shared())
    assert len(reread(tmp_path / "some.safetensors").factors) == len(shared())
    save_lora(tmp_path / "folder", packed(), layout="peft")
    with pytest.raises(ValueError, match="Folder is not empty"):
        save_lora(tmp_path / "folder", shared(), layout="peft")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["folder", "some.safetensors"]


def test_nothing_is_left_by_a_failed_write(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError("No space left on device")

    monkeypatch.setattr("pixart_pack.pixart.lora.saving.save_file", fail)
    for name, layout in (("some.safetensors", "host"), ("folder", "peft")):
        with pytest.raises(OSError, match="No space"):
            save_lora(tmp_path / name, packed(), layout=layout)
    assert not list(tmp_path.iterdir())


def test_dtype_leaves_alpha_alone(tmp_path):
    save_lora(tmp_path / "some.safetensors", {"final_layer.linear": low_rank(32, alpha=2.7)}, dtype=torch.bfloat16)
    saved = load_file(tmp_path / "some.safetensors")
    assert {key.rsplit(".", 1)[1]: str(value.dtype) for key, value in saved.items()} == {
        "alpha": "torch.float32",
        "weight": "torch.bfloat16",
    }
    assert load_lora(saved, config=CONFIG).factors[Target.of("final_layer.linear")].alpha == pytest.approx(2.7)
