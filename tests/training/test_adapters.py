"""Adapters: their maths, against PEFT's on the same weights, and what they are saved as."""

import pytest
import torch
from torch import nn

from pixart_pack.pixart.checkpoint import to_diffusers
from pixart_pack.pixart.data.examples import collate
from pixart_pack.pixart.lora import merge, read_lora, save_lora
from pixart_pack.pixart.training.adapters import (
    AdaptedConv,
    AdaptedLinear,
    adapters_disabled,
    add_adapters,
)
from pixart_pack.pixart.training.adapting.base import BASES, Fp8Linear, Nf4Linear, freeze
from pixart_pack.pixart.training.build import make_objective
from pixart_pack.pixart.training.draws import Chances, draw_batch
from pixart_pack.pixart.training.run import lora_factors, save_result
from pixart_pack.tests.training_data import make_features, tiny_model, tiny_settings


def randomize(objective, seed=3):
    """Weights as in the middle of a training."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in objective.named_parameters():
        if parameter.requires_grad and "dora" not in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)


def one_batch(settings, features=None):
    features = features or make_features(count=4, sizes=((8, 8),))
    batch = collate([features[index] for index in range(len(features))])
    return batch, draw_batch(settings, 0, range(len(batch)), batch.latent.shape[1:])


@pytest.mark.parametrize("parts, activated", [(1, False), (3, False), (1, True)])
def test_gradients_equal_those_of_autograd(parts, activated):
    torch.manual_seed(0)
    settings = tiny_settings(rank=3, alpha=5.0)
    layer = AdaptedLinear(freeze_linear(nn.Linear(7, 6 * parts)), settings, parts).double()
    layer.activated = activated
    nn.init.normal_(layer.lora_up)
    x = torch.randn(2, 5, 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *args: layer(args[0]), (x, layer.lora_down, layer.lora_up))
    given = nn.functional.gelu(x, approximate="tanh") if activated else x
    expected = nn.functional.linear(given, layer.base.weight + layer.delta(), layer.base.bias)
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)


def freeze_linear(layer):
    return layer.requires_grad_(False)


PEFT_CASES = {
    "lora": ({}, 3 * 8),
    "rslora": ({"rslora": True}, 3 * 8),
    "dora": ({"dora": True}, 3 * 8),
    "with the GELU computed again": ({"targets": "blocks"}, 3 * 10),
    "every linear layer": ({"targets": "all-linear"}, 3 * 10 + 10),
    "every linear layer with DoRA": ({"targets": "all-linear", "dora": True}, 3 * 10 + 10),
    "recomputed blocks": ({"targets": "blocks", "checkpointing": True}, 3 * 10),
    "every layer": ({"targets": "custom", "target_pattern": ".*"}, 3 * 10 + 11),
    "patch embedding with DoRA": ({"targets": "custom", "target_pattern": r"x_embedder\.proj", "dora": True}, 1),
}


@pytest.mark.peer
@pytest.mark.parametrize("fields, count", PEFT_CASES.values(), ids=PEFT_CASES)
def test_gradients_equal_those_of_peft(fields, count):
    """The same weights, batch and noise through diffusers' model with PEFT's adapters."""
    peft, diffusers = pytest.importorskip("peft"), pytest.importorskip("diffusers")
    settings = tiny_settings(rank=4, alpha=6.0, caption_dropout=0.0, **fields)
    model = tiny_model()
    other = diffusers_twin(diffusers, model)
    other.requires_grad_(False)
    objective = make_objective(model, settings)
    randomize(objective)
    ours = dict(objective.named_parameters())
    weights = {name: parameter.detach() for name, parameter in ours.items() if parameter.requires_grad}
    factors = lora_factors(objective, weights)
    config = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=[target.diffusers_module for target in factors],
        use_dora=bool(fields.get("dora")), use_rslora=bool(fields.get("rslora")),
    )  # fmt: skip
    other = peft.get_peft_model(other, config)
    twins = match(other, factors)
    batch, draws = one_batch(settings)
    objective(batch, draws).total.backward()
    peft_loss(objective, other, batch, draws).backward()
    gradients = {name: ours[name].grad for name in weights}
    checked = 0
    for target, factor in lora_factors(objective, gradients).items():
        twin = twins[target]
        for mine, parameter in zip((factor.down, factor.up, factor.magnitude), twin, strict=True):
            if mine is not None:
                # float32: two orders of the same sums through three blocks
                torch.testing.assert_close(mine.reshape(parameter.shape), parameter.grad, rtol=2e-4, atol=2e-6)
                checked += 1
    assert checked == len(twins) * (3 if "dora" in fields else 2) and len(twins) == count


def diffusers_twin(diffusers, model):
    from pixart_pack.pixart.weights.saving import diffusers_config

    config = {key: value for key, value in diffusers_config(model.config).items() if not key.startswith("_")}
    twin = diffusers.PixArtTransformer2DModel(**config)
    twin.caption_projection = type(twin.caption_projection)(model.config.caption_channels, model.config.hidden_size)
    twin.load_state_dict(to_diffusers(model.state_dict(), keep_null_caption=False))
    return twin


def match(other, factors):
    """{target: PEFT's parameters (A, B, magnitude)}, set to our values."""
    found = {}
    for target, factor in factors.items():
        layer = other.base_model.model.get_submodule(target.diffusers_module)
        magnitude = getattr(layer, "lora_magnitude_vector", None)
        places = [layer.lora_A["default"].weight, layer.lora_B["default"].weight]
        places.append(magnitude["default"].weight if magnitude else None)
        for place, value in zip(places, (factor.down, factor.up, factor.magnitude), strict=True):
            if place is not None:
                place.data.copy_(value.reshape(place.shape))
        found[target] = tuple(places)
    return found


def peft_loss(objective, other, batch, draws):
    start = objective.start(batch, draws)
    noisy = objective.diffusion.q_sample(start, draws.timestep, draws.noise)
    predicted = other(
        noisy,
        encoder_hidden_states=batch.caption,
        encoder_attention_mask=batch.caption_mask,
        timestep=draws.timestep,
        added_cond_kwargs={"resolution": batch.resolution, "aspect_ratio": batch.aspect_ratio},
        return_dict=False,
    )[0]
    return (predicted[:, :4] - draws.noise).square().mean()


@pytest.mark.parametrize("fields", [{}, {"dora": True}, {"rslora": True, "alpha": 3.0}], ids=["lora", "dora", "rslora"])
@pytest.mark.parametrize("targets", ["attention", "blocks", "all-linear", "custom"])
def test_the_saved_file_merged_into_the_weights_is_the_trained_model(fields, targets, tmp_path):
    settings = tiny_settings(targets=targets, target_pattern=".*", **fields)
    objective = make_objective(tiny_model(), settings)
    randomize(objective)
    weights = {n: p.detach().clone() for n, p in objective.named_parameters() if p.requires_grad}
    save_result(tmp_path / "lora.safetensors", objective, weights, settings)
    lora = read_lora(tmp_path / "lora.safetensors")
    assert not lora.unmatched
    plain = tiny_model()
    plain.load_state_dict(merge(plain.state_dict(), lora))
    batch, draws = one_batch(settings)
    inputs = objective.conditioned(batch, draws.dropped)
    with torch.no_grad():
        adapted = objective.model(draws.noise, draws.timestep.float(), **inputs)
        merged = plain(draws.noise, draws.timestep.float(), **inputs)
        with adapters_disabled({n: m for n, m in objective.model.named_modules() if isinstance(m, AdaptedLinear)}):
            before = objective.model(draws.noise, draws.timestep.float(), **inputs)
    assert not torch.allclose(before, adapted, atol=1e-2)
    torch.testing.assert_close(adapted, merged, rtol=1e-4, atol=1e-5)  # float32, sums in another order


@pytest.mark.peer
@pytest.mark.parametrize("fields", [{}, {"dora": True}, {"rslora": True, "alpha": 3.0}], ids=["lora", "dora", "rslora"])
def test_the_saved_file_is_for_peft_and_diffusers_too(fields, tmp_path):
    peft, diffusers = pytest.importorskip("peft"), pytest.importorskip("diffusers")
    settings = tiny_settings(targets="custom", target_pattern=".*", **fields)
    objective = make_objective(tiny_model(), settings)
    randomize(objective)
    weights = {n: p.detach().clone() for n, p in objective.named_parameters() if p.requires_grad}
    save_result(tmp_path / "lora.safetensors", objective, weights, settings)
    save_lora(tmp_path / "peft", read_lora(tmp_path / "lora.safetensors").factors, layout="peft")
    other = peft.PeftModel.from_pretrained(diffusers_twin(diffusers, tiny_model()).eval(), tmp_path / "peft")
    batch, draws = one_batch(settings)
    inputs = objective.conditioned(batch, draws.dropped)
    with torch.no_grad():
        adapted = objective.model(draws.noise, draws.timestep.float(), **inputs)
        found = other(
            draws.noise,
            encoder_hidden_states=inputs["caption"],
            encoder_attention_mask=inputs["caption_mask"],
            timestep=draws.timestep,
            added_cond_kwargs={name: inputs[name] for name in ("resolution", "aspect_ratio")},
            return_dict=False,
        )[0]
    torch.testing.assert_close(found, adapted, rtol=1e-4, atol=1e-5)  # float32, sums in another order


def test_a_fresh_adapter_changes_nothing():
    for fields in ({}, {"dora": True}, {"dropout": 0.5}):
        model, adapted = tiny_model(), tiny_model()
        settings = tiny_settings(**fields)
        add_adapters(freeze(adapted, torch.float32), settings)
        batch, draws = one_batch(settings)
        args = (draws.noise, draws.timestep.float(), batch.caption, batch.caption_mask)
        torch.testing.assert_close(adapted(*args), model(*args), rtol=1e-4, atol=1e-5)


def test_dropout_is_told_by_the_picture_and_not_by_its_batch():
    layer = AdaptedLinear(freeze_linear(nn.Linear(6, 5)), tiny_settings(dropout=0.4), 1, number=3)
    nn.init.normal_(layer.lora_up)
    x = torch.randn(4, 600, 6)

    def output(x, positions, name="0 7", number=3):
        layer.chances, layer.number = Chances(name, positions), number
        return layer(x)

    whole = output(x, range(4))
    parts = [output(x[:1], range(1)), output(x[1:3], range(1, 3)), output(x[3:], range(3, 4))]
    torch.testing.assert_close(torch.cat(parts), whole)
    torch.testing.assert_close(output(x[:, :9], range(4)), whole[:, :9])  # a batch of shorter captions
    for more in ({"name": "0 8"}, {"number": 4}, {"positions": range(4, 8)}):
        assert not torch.allclose(output(x, **{"positions": range(4), **more}), whole, atol=1e-2)
    sizes = output(torch.cat([x[0, :1]] * 4), range(2))  # rows of timesteps and sizes, which pictures may share
    torch.testing.assert_close(sizes, output(x[0, :1], range(1)).expand(4, -1))
    kept = Chances("0 1", range(2)).drop(torch.ones(2, 300, 50), 0.4, 0)
    assert kept.unique().tolist() == pytest.approx([0, 1 / 0.6])
    assert kept.mean() == pytest.approx(1, abs=0.03) and not torch.equal(kept[0], kept[1])
    layer.eval()
    torch.testing.assert_close(layer(x), layer.base(x) + x @ layer.delta().T)


def test_dropout_of_the_patch_embedding_is_told_by_the_picture():
    conv = freeze_linear(nn.Conv2d(4, 6, 2, 2))
    layer = AdaptedConv(conv, tiny_settings(dropout=0.4), 1, number=3)
    nn.init.normal_(layer.lora_up)
    x = torch.randn(4, 4, 8, 10)

    def output(x, positions):
        layer.chances = Chances("0 7", positions)
        return layer(x)

    whole = output(x, range(4))
    torch.testing.assert_close(torch.cat([output(x[:1], range(1)), output(x[1:], range(1, 4))]), whole)
    assert not torch.allclose(output(x, range(4, 8)), whole, atol=1e-2)
    layer.eval()
    expected = nn.functional.conv2d(x, conv.weight + layer.delta().view_as(conv.weight), conv.bias, 2)
    torch.testing.assert_close(layer(x), expected)


def test_convolutions_are_adapted_where_a_custom_pattern_asks_for_them():
    """And never those of single channels, which compress keys and values."""

    def adapted(targets, pattern=""):
        model = tiny_model(kv_compress_ratio=2, kv_compress_layers=(1,))
        return add_adapters(model, tiny_settings(targets=targets, target_pattern=pattern))

    assert "x_embedder.proj" not in adapted("all-linear")
    found = adapted("custom", ".*")
    assert isinstance(found["x_embedder.proj"], AdaptedConv) and "blocks.1.attn.sr" not in found
    with pytest.raises(ValueError, match=r"No layer for the LoRA: .* such as x_embedder\.proj, "):
        adapted("custom", r"blocks\.1\.attn\.sr")


def test_frozen_weights_get_no_gradients_and_early_layers_no_backward():
    settings = tiny_settings(targets="custom", target_pattern=r"blocks\.2\.attn\.qkv")
    objective = make_objective(tiny_model(), settings)
    entered = []
    for index, block in enumerate(objective.model.blocks):
        block.register_full_backward_hook(lambda *_, index=index: entered.append(index))
    objective(*one_batch(settings)).total.backward()
    graded = [name for name, parameter in objective.named_parameters() if parameter.grad is not None]
    assert graded == ["model.blocks.2.attn.qkv.lora_down", "model.blocks.2.attn.qkv.lora_up"]
    assert entered == [2]


def test_what_is_kept_for_the_backward_pass_holds_no_frozen_copies():
    """Adapters under bf16: no activation is kept in fp32, and none twice."""
    settings = tiny_settings(dtype="bf16", rank=2)
    objective = make_objective(tiny_model(), settings)
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        objective(*one_batch(settings))
    weights = {p.untyped_storage().data_ptr() for p in objective.parameters()}
    tokens = 4 * 16 * tiny_model().config.hidden_size
    large = [t for where, t in kept.items() if where not in weights and t.numel() >= tokens]
    assert large and all(tensor.dtype == torch.bfloat16 for tensor in large)


@pytest.mark.parametrize("pattern, match", [("nothing", "No layer for the LoRA"), ("", "Target pattern is missing")])
def test_patterns_without_a_layer_are_refused(pattern, match):
    with pytest.raises(ValueError, match=match):
        add_adapters(tiny_model(), tiny_settings(targets="custom", target_pattern=pattern))


def test_a_base_in_8_bits_is_near_the_full_one_and_takes_adapters():
    settings = tiny_settings(dtype="bf16", base_dtype="fp8", targets="blocks")
    objective = make_objective(tiny_model(), settings)
    packed = [module for module in objective.modules() if isinstance(module, Fp8Linear)]
    assert len(packed) == 7 * 3 and all(module.weight.dtype == torch.float8_e4m3fn for module in packed)
    exact = make_objective(tiny_model(), tiny_settings(targets="blocks"))
    batch, draws = one_batch(settings)
    losses = [each(batch, draws).total for each in (objective, exact)]
    torch.testing.assert_close(losses[0], losses[1], rtol=0.02, atol=0)  # 3 mantissa bits in three blocks
    losses[0].backward()
    losses[1].backward()
    given, expected = (
        torch.cat([p.grad.flatten() for p in each.parameters() if p.requires_grad]) for each in (objective, exact)
    )
    assert torch.cosine_similarity(given, expected, dim=0) > 0.98


@pytest.mark.parametrize("name", BASES)
def test_few_bits_without_an_adapter_have_the_right_gradient(name):
    torch.manual_seed(1)
    linear = nn.Linear(6, 21)
    layer = BASES[name](linear)
    largest = {"fp8": 0.04, "int8": 0.005, "nf4": 0.16}[name]  # half a step, of the row's or the block's largest
    assert (layer.unpack(torch.float32) - linear.weight).abs().max() <= largest * linear.weight.abs().max()
    x = torch.randn(3, 6, requires_grad=True)
    layer(x).square().sum().backward()
    mine, x.grad = x.grad, None
    nn.functional.linear(x, layer.unpack(torch.float32), layer.bias).square().sum().backward()
    torch.testing.assert_close(mine, x.grad)


@pytest.mark.parametrize("base_dtype", ["int8", "nf4"])
@pytest.mark.parametrize("adapter", ["lora", "oft"])
def test_adapters_train_on_a_base_in_few_bits(base_dtype, adapter):
    settings = tiny_settings(base_dtype=base_dtype, adapter=adapter, targets="blocks")
    objective = make_objective(tiny_model(), settings)
    exact = make_objective(tiny_model(), tiny_settings(adapter=adapter, targets="blocks"))
    batch, draws = one_batch(settings)
    losses = [each(batch, draws).total for each in (objective, exact)]
    torch.testing.assert_close(*losses, rtol=0.05, atol=0)  # 16 values for a weight in three blocks
    losses[0].backward()
    assert all(parameter.grad is not None for parameter in objective.parameters() if parameter.requires_grad)


@pytest.mark.slow
def test_gradients_on_nf4_equal_those_of_qlora():
    """PEFT's LoRA on bitsandbytes' layer: the same packed numbers, and the same gradients."""
    peft, bnb = pytest.importorskip("peft"), pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    linear = nn.Linear(128, 40)  # of whole blocks in a row: bitsandbytes on the CPU unpacks others by other scales
    ours = AdaptedLinear(Nf4Linear(linear).requires_grad_(False), tiny_settings(rank=4, alpha=6.0), 1)
    nn.init.normal_(ours.lora_up, std=0.1)
    packed, state = bnb.functional.quantize_4bit(linear.weight.data, blocksize=64, quant_type="nf4")
    assert torch.equal(packed.flatten(), ours.base.weight) and torch.equal(state.absmax, ours.base.scale)
    expected = bnb.functional.dequantize_4bit(packed, state)
    assert torch.equal(ours.base.unpack(torch.float32), expected)
    quantised = bnb.nn.Linear4bit(128, 40, compute_dtype=torch.float32, compress_statistics=False, quant_type="nf4")
    quantised.weight = bnb.nn.Params4bit(
        linear.weight.data, requires_grad=False, compress_statistics=False, quant_type="nf4", blocksize=64
    )
    quantised.bias = linear.bias
    other = nn.Sequential(quantised).to("cpu")
    other = peft.get_peft_model(other, peft.LoraConfig(r=4, lora_alpha=6, target_modules=["0"]))
    layer = other.base_model.model[0]
    layer.lora_A["default"].weight.data.copy_(ours.lora_down)
    layer.lora_B["default"].weight.data.copy_(ours.lora_up)
    found = []
    for model, factors in (
        (ours, (ours.lora_down, ours.lora_up)),
        (other, (layer.lora_A["default"].weight, layer.lora_B["default"].weight)),
    ):
        x = torch.randn(5, 128, generator=torch.Generator().manual_seed(2)).requires_grad_()
        out = model(x)
        found.append((out, *torch.autograd.grad(out.sin().sum(), (x, *factors))))
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)  # float32, sums in another order
