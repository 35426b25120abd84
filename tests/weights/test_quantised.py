"""Quantised weights: what each form's numbers mean, and that what no form knows is refused by name."""

import json

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from pixart_pack.pixart.checkpoint import to_diffusers
from pixart_pack.pixart.weights.quantised.forms import expand, is_quantised
from pixart_pack.pixart.weights.quantised.packed import Packed
from pixart_pack.pixart.weights.reading import read_checkpoint
from pixart_pack.pixart.weights.t5 import read_encoder
from pixart_pack.tests.tiny_pixart import make_weights, tiny_config
from pixart_pack.tests.tiny_t5 import make_t5, weights_of

WIDE = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
ROWS = WIDE.abs().amax(1, keepdim=True)
BYTES = (WIDE / ROWS * 127).round().to(torch.int8)
FP8 = (WIDE / ROWS * 448).to(torch.float8_e4m3fn)
BLOCKS = torch.rand(2, 1) + 0.5
NORM = {"a.norm.weight": torch.ones(3, dtype=torch.bfloat16)}


def int8(**parts):
    return {f"a.{name}": tensor for name, tensor in {"weight": BYTES, **parts}.items()}


FORMS = {
    "bitsandbytes": (int8(SCB=ROWS[:, 0], weight_format=torch.tensor(0, dtype=torch.uint8)), BYTES * ROWS / 127),
    "one scale": (int8(weight_scale=torch.tensor(0.5)), BYTES * 0.5),
    "a scale for all rows, one number": (int8(weight_scale=torch.tensor([0.5])), BYTES * 0.5),
    "rows": (int8(weight_scale=ROWS, input_scale=torch.ones(())), BYTES * ROWS),
    "rows without columns": (int8(weight_scale=ROWS[:, 0]), BYTES * ROWS),
    "groups": (
        int8(weight_scale=torch.arange(1.0, 129.0).reshape(64, 2)),
        BYTES * torch.arange(1.0, 129.0).reshape(64, 2).repeat_interleave(16, 1),
    ),
    "zero points": (
        int8(weight_scale=ROWS, weight_zero_point=torch.full((64, 1), -3, dtype=torch.int8)),
        (BYTES + 3.0) * ROWS,
    ),
    "fp8 of modelopt": (
        {"a.weight": FP8, "a.weight_scale": torch.tensor(0.25), "a.input_scale": torch.tensor(1.0)},
        FP8.float() * 0.25,
    ),
    "fp8 of ComfyUI": (
        {"a.weight": FP8, "a.scale_weight": torch.tensor(0.25), "scaled_fp8": torch.empty(2)},
        FP8.float() * 0.25,
    ),
    "comfy_quant": (
        {
            "a.weight": FP8,
            "a.weight_scale": torch.tensor(0.25),
            "a.comfy_quant": torch.tensor(list(b'{"format": "float8_e4m3fn"}'), dtype=torch.uint8),
        },
        FP8.float() * 0.25,
    ),
    "quanto": (
        {
            "a.weight._data": BYTES,
            "a.weight._scale": ROWS,
            "a.input_scale": torch.ones(()),
            "a.output_scale": torch.ones(()),
        },
        BYTES * ROWS,
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_what_the_numbers_mean(form):
    stored, expected = FORMS[form]
    assert is_quantised(stored) and not is_quantised(NORM)
    plain = expand({**stored, **NORM}, "t5.safetensors", dtype=torch.float32)
    assert plain.keys() == {"a.weight", "a.norm.weight"}
    torch.testing.assert_close(plain["a.weight"], expected.float())
    # The type of the other weights, where none is asked for.
    assert expand({**stored, **NORM}, "t5.safetensors")["a.weight"].dtype == torch.bfloat16


@pytest.mark.parametrize("form", FORMS)
def test_what_may_stay_packed_means_the_same(form):
    stored, expected = FORMS[form]
    found = expand({**stored, **NORM}, "t5.safetensors", dtype=torch.float32, keep_packed=True)["a.weight"]
    if form == "zero points":
        assert torch.equal(found, expected.float())
        return
    assert isinstance(found, Packed) and tuple(found.shape) == (64, 32)
    assert found.nbytes <= 64 * 32 + 4 * 64 * (2 if form == "groups" else 1)
    assert torch.equal(found.expand(), expand({**stored, **NORM}, "t5.safetensors", dtype=torch.float32)["a.weight"])
    rows = torch.tensor([[5, 0], [63, 5]])
    assert torch.equal(found.packing.rows_of(found.data, rows), found.expand()[rows])


def four_bits(shape, block=64):
    """As bitsandbytes has nf4, after the format that its package writes."""
    generator = torch.Generator().manual_seed(0)
    count = shape[0] * shape[1]
    state = json.dumps({"shape": list(shape), "blocksize": block, "quant_type": "nf4", "dtype": "float32"})
    return {
        "a.weight": torch.randint(0, 256, ((count + 1) // 2, 1), dtype=torch.uint8, generator=generator),
        "a.weight.absmax": torch.rand(-(-count // block), generator=generator),
        "a.weight.quant_map": torch.linspace(-1, 1, 16),
        "a.weight.quant_state.bitsandbytes__nf4": torch.tensor(list(state.encode()), dtype=torch.uint8),
    }


@pytest.mark.parametrize("shape, packed", [((6, 128), True), ((4, 64), True), ((8, 32), False), ((3, 24), False)])
def test_four_bits_stay_packed_in_whole_blocks(shape, packed):
    stored = four_bits(shape)
    plain = expand(stored, "f")["a.weight"]
    found = expand(stored, "f", keep_packed=True)["a.weight"]
    assert plain.shape == shape and isinstance(found, Packed) == packed
    assert torch.equal(found.expand() if packed else found, plain)
    codes = torch.stack((stored["a.weight"] >> 4, stored["a.weight"] & 15), 1).flatten()[: plain.numel()]
    largest = stored["a.weight.absmax"].repeat_interleave(64)[: plain.numel()]
    assert torch.equal(plain, (stored["a.weight.quant_map"][codes.long()] * largest).reshape(shape))


def test_blocks_of_128_at_the_edges():
    weight = torch.randn(200, 130).to(torch.float8_e4m3fn)
    scale = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    plain = expand({"a.weight": weight, "a.weight_scale_inv": scale}, "f", keep_packed=True)["a.weight"]
    assert torch.equal(plain[:128, :128], weight[:128, :128].float())
    assert torch.equal(plain[128:, 128:], weight[128:, 128:].float() * 4)
    small = expand(
        {"a.weight": weight, "a.weight_scale_inv": torch.ones(4, 3)}, "f", settings={"weight_block_size": [64, 64]}
    )
    assert torch.equal(small["a.weight"], weight.float())
    whole = {"a.weight": torch.randn(200, 256).to(torch.float8_e4m3fn), "a.weight_scale_inv": scale}
    packed = expand(whole, "f", keep_packed=True)["a.weight"]
    assert isinstance(packed, Packed) and torch.equal(packed.expand(), expand(whole, "f")["a.weight"])


REFUSED = {
    "integers without a scale": (int8(), "without a scale: got torch.int8 for 'a.weight' in 'f.safetensors'"),
    "an unknown scale": (int8(weight_scales_v3=ROWS), "got 'a.weight_scales_v3' in 'f.safetensors'"),
    "a scale below a float weight": ({"a.weight": WIDE, "a.weight.absmax": ROWS}, "got 'a.weight.absmax'"),
    "a scale on float weights": ({"a.weight": WIDE, "a.weight_scale": ROWS}, "got torch.float32 weights for 'a'"),
    "GPTQ": ({"a.qweight": BYTES, "a.qzeros": BYTES, "a.scales": ROWS}, r"\(GPTQ or AWQ\)"),
    "NVFP4": (int8(weight_scale=ROWS, weight_scale_2=ROWS), r"\(NVFP4\)"),
    "a form of ComfyUI's that is no scale": (
        int8(weight_scale=ROWS, comfy_quant=torch.tensor(list(b'{"format": "mxfp8"}'), dtype=torch.uint8)),
        "ComfyUI 'mxfp8'",
    ),
    "scales that do not fit": (int8(weight_scale=torch.ones(7)), r"got scales of \(7,\)"),
    "half of the parts": ({"a.weight._scale": ROWS}, "got no weight._data._data"),
    "4 bits without their shape": (
        {"a.weight": torch.zeros(8, 1, dtype=torch.uint8), "a.weight.absmax": torch.ones(1),
         "a.weight.quant_map": torch.ones(16),
         "a.weight.quant_state.bitsandbytes__nf4": torch.tensor(list(b'{"shape": [-1]}'), dtype=torch.uint8)},
        "got the sizes",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_by_name(case):
    stored, message = REFUSED[case]
    with pytest.raises(ValueError, match=message) as refused:
        expand({**stored, **NORM}, "f.safetensors")
    assert "complete" not in str(refused.value)


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_damaged_parts_end_in_words(data):
    stored = dict(FORMS[data.draw(st.sampled_from(sorted(FORMS)))][0])
    for _ in range(data.draw(st.integers(1, 2))):
        key = data.draw(st.sampled_from(sorted(stored)))
        match data.draw(st.integers(0, 3)):
            case 0:
                del stored[key]
            case 1:
                stored[f"{key}_x"] = stored.pop(key)
            case 2:
                stored[key] = torch.zeros(data.draw(st.lists(st.integers(0, 5), max_size=3)))
            case 3:
                stored[key] = torch.zeros(stored[key].shape, dtype=data.draw(st.sampled_from([torch.int8, torch.bool])))
        if not stored:
            return
    try:
        plain = expand(stored, "f.safetensors")
    except ValueError as error:
        assert "f.safetensors" in str(error)
        return
    assert all(tensor.is_floating_point() for name, tensor in plain.items() if name.endswith("weight"))


def quantise(weights, names, scale="weight_scale"):
    """As compressed-tensors has int8: (file's tensors, the same as plain numbers)."""
    stored, plain = dict(weights), dict(weights)
    for name in names:
        rows = weights[name].abs().amax(1, keepdim=True) / 127
        stored[name] = (weights[name] / rows).round().to(torch.int8)
        stored[f"{name.removesuffix('weight')}{scale}"] = rows
        plain[name] = stored[name] * rows
    return stored, plain


@pytest.fixture(scope="module")
def transformer():
    config = tiny_config(micro_condition=True)
    weights = to_diffusers(make_weights(config))
    return {name: tensor.contiguous() for name, tensor in weights.items()}


def test_a_quantised_transformer(transformer, tmp_path):
    stored, plain = quantise(transformer, [n for n in transformer if ".attn" in n and n.endswith("weight")])
    path = tmp_path / "int8.safetensors"
    save_file(stored, path)
    save_file({name: tensor.contiguous() for name, tensor in plain.items()}, tmp_path / "plain.safetensors")
    found, expected = read_checkpoint(path), read_checkpoint(tmp_path / "plain.safetensors")
    assert found.config == expected.config
    for name, tensor in expected.state_dict.items():
        torch.testing.assert_close(found.state_dict[name], tensor)
    stored["pos_embed.proj.strange_scale"] = torch.ones(1)
    save_file(stored, path)
    with pytest.raises(ValueError, match="Unknown quantised weights: got 'pos_embed.proj.strange_scale'"):
        read_checkpoint(path)
    save_file({name: tensor for name, tensor in stored.items() if "scale" not in name or "table" in name}, path)
    with pytest.raises(ValueError, match="Integer weights without a scale"):
        read_checkpoint(path)


def test_a_quantised_text_encoder(tmp_path):
    weights = weights_of(make_t5(vocab_size=64))
    stored, plain = quantise(weights, [n for n in weights if "DenseReluDense" in n])
    save_file(stored, tmp_path / "model.safetensors")
    found, config = read_encoder(tmp_path / "model.safetensors")
    assert config["vocab_size"] == 64
    for name, tensor in plain.items():
        torch.testing.assert_close(found[name], tensor)
    save_file({**weights, "encoder.extra.table": torch.ones(2)}, tmp_path / "more.safetensors")
    with pytest.raises(ValueError, match="Tensors that nothing reads: got encoder.extra.table in more.safetensors"):
        read_encoder(tmp_path / "more.safetensors")


def test_the_block_size_of_the_folder(tmp_path):
    weights = weights_of(make_t5(vocab_size=64))
    name = "encoder.block.0.layer.1.DenseReluDense.wo.weight"
    weights[name] = weights[name].to(torch.float8_e4m3fn)
    rows, columns = weights[name].shape
    scale = torch.arange(1.0, 1 + -(-rows // 16) * -(-columns // 16)).reshape(-(-rows // 16), -1)
    save_file({**weights, name.replace("weight", "weight_scale_inv"): scale}, tmp_path / "model.safetensors")
    config = {"model_type": "t5", "quantization_config": {"weight_block_size": [16, 16]}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    spread = scale.repeat_interleave(16, 0)[:rows].repeat_interleave(16, 1)[:, :columns]
    torch.testing.assert_close(read_encoder(tmp_path)[0][name], weights[name].float() * spread)
