"""LoRAs on the host's MODEL, in this process: the same weights as merged ones, whatever else is on it."""

import importlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pixart_pack.pixart.lora import LoRA, Target, load_lora, merge, read_lora, relative, save_lora
from pixart_pack.tests.lora.test_reading import NOISE, one_lora, same_weights
from pixart_pack.tests.lora.test_saving import CONFIG, WIDTH, low_rank, others, packed, shared
from pixart_pack.tests.tiny_pixart import make_weights, tiny_config

TABLE = "scale_shift_table"


@pytest.fixture(scope="module")
def host_lora(pack):
    return importlib.import_module("pixart_pack.nodes.host.lora")


@pytest.fixture(scope="module")
def loras(comfy):
    folder_paths = importlib.import_module("folder_paths")
    folder = Path(folder_paths.get_folder_paths("loras")[0])
    folder.mkdir(parents=True, exist_ok=True)
    saved = Path(folder_paths.get_output_directory(), "loras")
    saved.mkdir(parents=True, exist_ok=True)
    folder_paths.add_model_folder_path("loras", str(saved))  # as ComfyUI's main does
    return folder


@pytest.fixture
def make_patcher(pack):
    module = importlib.import_module("pixart_pack.nodes.host.denoiser.model")
    return lambda seed=0, config=CONFIG, dtype=torch.float32: module.make_patcher(
        make_weights(config, seed), config, dtype
    )


def placed(factors):
    return {Target.of(place) if isinstance(place, str) else place: factor for place, factor in factors.items()}


def weights_of(patcher):
    """The weights that a MODEL runs with, by their original names: patched, read, and taken back."""
    with torch.inference_mode():
        patcher.patch_model()
        state = patcher.model.diffusion_model.state_dict()
        found = {name: tensor.clone() for name, tensor in state.items()}
        patcher.unpatch_model()
    bare = {name: name.removesuffix(".weight") for name in found}
    return {bare[n] if bare[n].endswith((TABLE, "y_embedding")) else n: tensor for n, tensor in found.items()}


@pytest.mark.parametrize("strength", [1.0, -0.7, 2.5])
@pytest.mark.parametrize(
    "factors", [packed(), shared(), packed(magnitude=True), others()], ids=["packed", "shared", "dora", "others"]
)
def test_patches_are_the_merged_weights(host_lora, make_patcher, factors, strength):
    patcher = make_patcher()
    patched = host_lora.add_lora(patcher, placed(factors), strength)
    same_weights(weights_of(patched), merge(make_weights(CONFIG), LoRA(placed(factors)), strength), **NOISE)
    same_weights(weights_of(patcher), make_weights(CONFIG), atol=0, rtol=0)  # and the given MODEL is as it was


def relatives():
    """Changes that depend on the weight, of every kind."""
    generator = torch.Generator().manual_seed(3)

    def random(*shape, scale=0.3):
        return torch.randn(*shape, generator=generator) * scale

    turned = torch.linalg.qr(random(6, 8, 8)).Q
    stages = torch.linalg.qr(random(2, 6, 32, 32)).Q
    return {
        "blocks.0.attn.proj": relative.Rotated(turned, lengths=random(WIDTH) + 1),
        Target("blocks.0.attn.qkv.weight", 1, 3): relative.Rotated(turned, by_rows=True),
        "blocks.0.mlp.fc1": relative.Butterfly(stages, random(4 * WIDTH) + 1),
        "blocks.0.mlp.fc2": relative.Reflected(random(4 * WIDTH, 3)),
        "blocks.1.attn.proj": relative.Scaled(random(1, WIDTH)),
        Target("blocks.1.attn.proj.bias"): relative.Replacement(random(WIDTH)),
        "blocks.1.mlp.fc2": relative.Generalized(
            random(4 * WIDTH, 2), random(2, 4 * WIDTH), random(WIDTH, 2), random(2, 4 * WIDTH), alpha=3.0
        ),
        "blocks.1.mlp.fc1": relative.Shared(random(5, 4 * WIDTH), random(4 * WIDTH, 5), random(5), random(4 * WIDTH)),
        "final_layer.linear": relative.Frequencies(random(40, scale=3.0), 7, 20.0),
        "x_embedder.proj": relative.Rotated(turned[:2], by_rows=False),
    }


@pytest.mark.parametrize("strength", [1.0, -0.7, 2.5])
def test_changes_that_depend_on_the_weight_stack(host_lora, make_patcher, strength):
    """Each is made to the weight as the patches before it left it, as merging one after another does."""
    stack = [(packed(), 0.5), (relatives(), strength), (packed(magnitude=True), 0.6), (shared(), 1.0)]
    patched, expected = make_patcher(), make_weights(CONFIG)
    for factors, each in stack:
        patched = host_lora.add_lora(patched, placed(factors), each)
        before, expected = expected, merge(expected, LoRA(placed(factors)), each)
        assert all(not torch.equal(before[target.name], expected[target.name]) for target in placed(factors))
    # Some ten float32 rotations and products, of weights that strength makes larger.
    same_weights(weights_of(patched), expected, atol=5e-5, rtol=1e-4)


def test_what_is_made_of_the_base_is_made_of_the_weight_without_loras(host_lora, make_patcher):
    target, generator = Target("blocks.0.attn.proj.weight"), torch.Generator().manual_seed(2)
    left, sizes, right = torch.linalg.svd(make_weights(CONFIG)[target.name])
    up = left[:, :3] + 0.05 * torch.randn(WIDTH, 3, generator=generator)
    factor = relative.Started(right[:3].clone(), up, sizes[:3].clone(), target, alpha=2.0)
    under, over = {target: factor}, placed({"blocks.0.attn.proj": low_rank(WIDTH)})
    alone = merge(make_weights(CONFIG), LoRA(under), 0.7)
    for order in ((under, over), (over, under)):
        patched = make_patcher()
        for factors in order:
            patched = host_lora.add_lora(patched, factors, 0.7)
        same_weights(weights_of(patched), merge(alone, LoRA(over), 0.7), atol=1e-5, rtol=1e-4)
    patches = {host_lora.host_key(target.name): [(torch.ones(4, 4, dtype=torch.int8), lambda weight, **_: weight)]}
    with pytest.raises(ValueError, match="its base's weights: got int8 numbers .*Load the PixArt model unquantised"):
        host_lora._unpatched(patches, target)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_patches_of_narrow_weights(host_lora, make_patcher, dtype):
    patched = host_lora.add_lora(make_patcher(dtype=dtype), placed(packed(magnitude=True)), 0.8)
    narrow = {name: weight.to(dtype).float() for name, weight in make_weights(CONFIG).items()}
    exact = merge(narrow, LoRA(placed(packed(magnitude=True))), 0.8)
    for name, weight in weights_of(patched).items():
        if "table" not in name and "embedding" not in name:
            assert weight.dtype == dtype
            # The host rounds at random to either neighbour, which are one step of the dtype apart.
            torch.testing.assert_close(weight.float(), exact[name], rtol=2 * torch.finfo(dtype).eps, atol=1e-2)


def test_two_loras_add_up_and_strength_nought_is_nothing(host_lora, make_patcher):
    patcher = make_patcher()
    none = host_lora.add_lora(patcher, placed(packed()), 0.0)
    assert not none.patches
    both = host_lora.add_lora(host_lora.add_lora(patcher, placed(packed()), 0.5), placed(shared()), -1.0)
    expected = merge(merge(make_weights(CONFIG), LoRA(placed(packed())), 0.5), LoRA(placed(shared())), -1.0)
    same_weights(weights_of(both), expected, **NOISE)


def test_dora_while_weights_stay_elsewhere(host_lora):
    """With little memory the host patches weights on the way, in the dtype of the sums."""
    lora = importlib.import_module("comfy.lora")
    [(target, factor)] = placed({"blocks.0.attn.qkv": packed(magnitude=True)["blocks.0.attn.qkv"]}).items()
    weight = make_weights(CONFIG)[target.name]
    patches = [(0.5, host_lora._to_patch(factor), 1.0, None, None)]
    found = lora.calculate_weight(patches, weight.to(torch.bfloat16), "key", intermediate_dtype=torch.bfloat16)
    torch.testing.assert_close(found.float(), factor.apply(weight, 0.5), rtol=1e-2, atol=1e-2)
    if hasattr(lora, "prefetch_prepared_value"):  # hosts since 0.30 move a patch's tensors through one buffer
        counter = [0]
        lora.prefetch_prepared_value(patches[0][1], counter, None, None, False)
        assert counter[0] > factor.up.nbytes + factor.down.nbytes
        buffer = torch.empty(counter[0], dtype=torch.uint8)
        moved = lora.prefetch_prepared_value(patches[0][1], [0], buffer, None, True)
        found = lora.calculate_weight([(0.5, moved, 1.0, None, None)], weight.clone(), "key")
        torch.testing.assert_close(found, factor.apply(weight, 0.5), **NOISE)


def test_weights_that_are_patched_as_each_layer_is_called(host_lora, make_patcher):
    """What a MODEL does that does not fit into memory."""
    generator = torch.Generator().manual_seed(1)
    latent, time = torch.randn(1, 4, 8, 6, generator=generator), torch.tensor([500.0])
    caption = torch.randn(1, 5, CONFIG.caption_channels, generator=generator)
    outputs = []
    for how in ({"full_load": True}, {"lowvram_model_memory": 1}):  # bytes
        model = make_patcher()
        for factors, strength in ((packed(magnitude=True), 0.5), (shared(), 0.3), (others(), 0.2), (relatives(), 0.1)):
            model = host_lora.add_lora(model, placed(factors), strength)
        model.load(torch.device("cpu"), **how)
        with torch.inference_mode():
            outputs.append(model.model.diffusion_model(latent, time, caption))
    torch.testing.assert_close(*outputs, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(outputs[0], make_patcher().model.diffusion_model(latent, time, caption), atol=0.1)


@pytest.mark.parametrize("layout", ["host", "kohya"])
@pytest.mark.parametrize("factors", [packed(), shared()], ids=["packed", "shared"])
def test_the_hosts_own_loader_reads_what_is_saved(core_nodes, make_patcher, loras, layout, factors, caplog):
    save_lora(loras / "saved.safetensors", factors, layout=layout)
    [patched] = core_nodes["LoraLoaderModelOnly"]().load_lora_model_only(make_patcher(), "saved.safetensors", 0.6)
    assert "not loaded" not in caplog.text
    same_weights(weights_of(patched), merge(make_weights(CONFIG), LoRA(placed(factors)), 0.6), **NOISE)


def test_the_hosts_own_loader_reads_other_kinds(core_nodes, make_patcher, loras, caplog):
    factors = {place: factor for place, factor in others().items() if factor.magnitude is None}
    save_lora(loras / "saved.safetensors", factors)
    [patched] = core_nodes["LoraLoaderModelOnly"]().load_lora_model_only(make_patcher(), "saved.safetensors", 1.0)
    assert "not loaded" not in caplog.text
    same_weights(weights_of(patched), merge(make_weights(CONFIG), LoRA(placed(factors))), **NOISE)


def test_over_a_lora_of_the_hosts_loader(run_node, core_nodes, make_patcher, loras):
    save_file(one_lora("base_model.model."), loras / "ours.safetensors")
    save_lora(loras / "theirs.safetensors", packed())
    [model] = core_nodes["LoraLoaderModelOnly"]().load_lora_model_only(make_patcher(), "theirs.safetensors", 0.5)
    model, info = run_node("PixArtLoadLoRA", model=model, lora="ours.safetensors", strength=0.25)
    expected = merge(make_weights(CONFIG), LoRA(placed(packed())), 0.5)
    same_weights(weights_of(model), merge(expected, load_lora(one_lora()), 0.25), **NOISE)
    assert "alpha: 8 (PEFT's default" in info


def test_nodes_load_a_peft_folder_and_name_what_does_not_fit(run_node, make_patcher, loras):
    folder = loras / "style" / "peft"
    save_lora(folder, packed(), layout="peft")
    tensors = load_file(folder / "adapter_model.safetensors")
    strange = {"base_model.model.nothing.lora_A.weight": torch.ones(2, 2), "lora_te_x.alpha": torch.ones(1)}
    save_file({**tensors, **strange}, folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    config["lora_alpha"] = 2 * config["lora_alpha"]
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    host_lora = importlib.import_module("pixart_pack.nodes.host.lora")
    assert "style/peft/" in host_lora.list_loras()
    model, info = run_node("PixArtLoadLoRA", model=make_patcher(), lora="style/peft/", strength=1.0)
    expected = merge(make_weights(CONFIG), read_lora(folder))
    same_weights(weights_of(model), expected, **NOISE)
    for line in ("kind: LoRA", "names: PEFT", "adapter_config.json", *(f": {key}" for key in strange)):
        assert line in info
    assert f"loaded in part: {len(tensors)} of {len(tensors) + 2} keys; what is missing changes the result" in info
    with pytest.raises(ValueError, match="fits only in part.*nothing"):
        run_node("PixArtLoadLoRA", model=make_patcher(), lora="style/peft/", strength=1.0, strict=True)
    override = run_node("PixArtLoadLoRA", model=make_patcher(), lora="style/peft/", strength=1.0, alpha=1.0)[1]
    assert "alpha: 1 (chosen by you)" in override


@pytest.mark.parametrize("layout", ["host", "peft", "kohya"])
def test_converting_twice_overwrites_nothing(run_node, make_patcher, loras, layout):
    tensors = one_lora("lora_transformer_", "transformer_blocks_0_ff_net_2", alpha=torch.tensor(3.0))
    save_file(tensors, loras / "a.safetensors", metadata={"trigger": "sks"})
    texts = [
        run_node("PixArtConvertLoRA", lora="a.safetensors", layout=layout, filename_prefix=f"loras/{layout}")[0]
        for _ in range(2)
    ]
    paths = [saved_file(text) for text in texts]
    assert len(set(paths)) == 2
    assert all(path.exists() and path.parent.name == "loras" for path in paths)
    assert {"trigger": "sks", "pixart_converted_from": "a.safetensors"}.items() <= read_lora(paths[0]).metadata.items()
    name = f"{paths[0].name}/" if layout == "peft" else paths[0].name
    model = run_node("PixArtLoadLoRA", model=make_patcher(), lora=name, strength=1.0)[0]
    same_weights(weights_of(model), merge(make_weights(CONFIG), read_lora(loras / "a.safetensors")), **NOISE)


@pytest.mark.parametrize("layout", ["host", "peft", "kohya"])
def test_dora_survives_conversion_and_warns_of_other_loaders(run_node, make_patcher, loras, layout):
    save_lora(loras / "dora.safetensors", packed(magnitude=True))
    [text] = run_node(
        "PixArtConvertLoRA", lora="dora.safetensors", layout=layout, filename_prefix="loras/dora", dtype="fp32"
    )
    assert ("ComfyUI's own loaders" in text) == (layout != "peft")
    name = Path(text.splitlines()[0]).name + "/" * (layout == "peft")
    model, info = run_node("PixArtLoadLoRA", model=make_patcher(), lora=name, strength=0.5)
    same_weights(weights_of(model), merge(make_weights(CONFIG), LoRA(placed(packed(magnitude=True))), 0.5), **NOISE)
    assert "kind: DoRA" in info


@pytest.mark.parametrize("prefix", ["../out", "loras/../../out", "/tmp/out", "", "loras/", "a:b", "loras/..", "x\0y"])
def test_names_stay_in_the_output_folder(run_node, loras, prefix):
    save_file(one_lora(), loras / "a.safetensors")
    with pytest.raises(ValueError, match="Unusable file name"):
        run_node("PixArtConvertLoRA", lora="a.safetensors", layout="host", filename_prefix=prefix)


@pytest.mark.parametrize("name", ["../secret.safetensors", "missing.safetensors", "../", "missing/"])
def test_names_stay_in_the_lora_folders(run_node, make_patcher, name):
    with pytest.raises(FileNotFoundError):
        run_node("PixArtLoadLoRA", model=make_patcher(), lora=name, strength=1.0)


def test_a_lora_of_another_width_is_refused_at_any_strength(run_node, make_patcher, loras):
    save_lora(loras / "wide.safetensors", {"blocks.0.attn.proj": low_rank(64, (64,))})
    for strength in (1.0, 0.0):
        with pytest.raises(ValueError, match=r"wide\.safetensors: LoRA width mismatch at 'blocks\.0\.attn\.proj"):
            run_node("PixArtLoadLoRA", model=make_patcher(), lora="wide.safetensors", strength=strength)


def test_another_model_is_refused(run_node, loras):
    save_file(one_lora(), loras / "a.safetensors")

    class Other:
        model = object()

    with pytest.raises(ValueError, match="Not a PixArt model of this pack: got object"):
        run_node("PixArtLoadLoRA", model=Other(), lora="a.safetensors", strength=1.0)


def saved_file(text):
    """The file that the first line of a node's text names, from the host's folder."""
    return Path(importlib.import_module("folder_paths").base_path, text.splitlines()[0].removeprefix("saved: "))


# -- extraction -------------------------------------------------------------------------------------------------------


def extract(run_node, model, base, **settings):
    usual = {"rank": 192, "energy": 1.0, "filename_prefix": "loras/extracted", "biases": True, "dtype": "fp32"}
    patched, text = run_node("PixArtExtractLoRA", model=model, base=base, **{**usual, **settings})
    return patched, text, saved_file(text)


def test_a_full_rank_extraction_gives_the_model_back(run_node, core_nodes, make_patcher, loras):
    patched, text, path = extract(run_node, make_patcher(1), make_patcher())
    tuned = make_weights(CONFIG, 1)
    wide = {"atol": 2e-5, "rtol": 1e-4}  # a singular value decomposition in float32, of some hundred directions
    same_weights(weights_of(patched), tuned, **wide)
    assert "100.00%" in text
    [theirs] = core_nodes["LoraLoaderModelOnly"]().load_lora_model_only(make_patcher(), path.name, 1.0)
    same_weights(weights_of(theirs), tuned, **wide)  # the tables and the null caption too


def test_a_lora_on_a_model_is_found_again(run_node, host_lora, make_patcher):
    base = make_patcher()
    tuned = host_lora.add_lora(base, placed(packed()), 0.5)
    patched, text, path = extract(run_node, tuned, base, rank=8)
    same_weights(weights_of(patched), weights_of(tuned), atol=2e-5, rtol=1e-4)
    assert {str(target.name): factor.rank for target, factor in read_lora(path, CONFIG).factors.items()} == {
        target.name: factor.rank for target, factor in placed(packed()).items()
    }
    assert "rank: 2 to 4, on 5 weights" in text
    assert "whole: 0" in text


def test_rank_and_energy_are_limits(run_node, make_patcher):
    lowest = extract(run_node, make_patcher(1), make_patcher(), rank=1, biases=False, dtype="bf16")
    some = extract(run_node, make_patcher(1), make_patcher(), rank=1152, energy=0.5, biases=False)
    first, second = (read_lora(path, CONFIG) for _, _, path in (lowest, some))
    assert {factor.rank for factor in first.factors.values()} == {1}
    assert next(iter(first.factors.values())).up.dtype == torch.bfloat16
    assert max(factor.rank for factor in second.factors.values()) < WIDTH
    shares = [float(text.rsplit(": ", 1)[1].rstrip("%")) for _, text, _ in (lowest, some)]
    assert 0 < shares[0] < 50 <= shares[1] < 75


@pytest.mark.parametrize(
    ("model", "base", "message"),
    [
        ((0, CONFIG), (0, CONFIG), "No difference between the models"),
        ((0, CONFIG), (0, tiny_config(depth=3)), "Models of different shapes"),
        (
            (0, tiny_config(depth=2, micro_condition=False)),
            (1, CONFIG),
            r"got None and \(16, 256\) for 'csize_embedder",
        ),
    ],
)
def test_models_that_cannot_be_compared(run_node, make_patcher, model, base, message):
    with pytest.raises(ValueError, match=message):
        extract(run_node, make_patcher(*model), make_patcher(*base))


def test_an_interrupt_leaves_nothing(run_node, make_patcher, monkeypatch):
    management = importlib.import_module("comfy.model_management")
    folder_paths = importlib.import_module("folder_paths")
    calls = []

    def interrupt_at_the_third():
        calls.append(1)
        if len(calls) == 3:
            raise management.InterruptProcessingException()

    monkeypatch.setattr(management, "throw_exception_if_processing_interrupted", interrupt_at_the_third)
    with pytest.raises(management.InterruptProcessingException):
        extract(run_node, make_patcher(1), make_patcher(), filename_prefix="loras/interrupted")
    assert not list(Path(folder_paths.get_output_directory(), "loras").glob("*interrupted*"))
