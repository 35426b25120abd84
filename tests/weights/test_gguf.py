"""GGUF files, written by the package `gguf`: read bit for bit as that package reads them, and hostile ones refused."""

import struct

import gguf
import numpy
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from pixart_pack.pixart.__main__ import main
from pixart_pack.pixart.checkpoint import to_diffusers
from pixart_pack.pixart.encoders.t5 import read_network
from pixart_pack.pixart.weights.quantised.blocks import BLOCK_TYPES
from pixart_pack.pixart.weights.quantised.gguf_file import llama_name, open_gguf
from pixart_pack.pixart.weights.quantised.packed import Packed
from pixart_pack.pixart.weights.reading import read_checkpoint, read_tensors
from pixart_pack.pixart.weights.t5 import read_encoder
from pixart_pack.tests.gguf_files import matrices, write_gguf
from pixart_pack.tests.tiny_pixart import make_weights, tiny_config
from pixart_pack.tests.tiny_t5 import make_t5, weights_of

KINDS = {kind.name: kind for kind in BLOCK_TYPES.values()}


def random_blocks(kind, rows, columns):
    """Bytes of a row-wise weight whose scales are finite."""
    generator = numpy.random.default_rng(0)
    blocks = generator.integers(0, 256, (rows * columns // kind.count, kind.size), dtype=numpy.uint8)
    places = {"Q2_K": (80, 82), "Q3_K": (108,), "Q6_K": (208,)}.get(kind.name, (0, 2))
    for place in places if kind.count > 1 else ():
        if kind.name in ("Q4_0", "Q5_0", "Q8_0", "IQ4_NL", "IQ4_XS") and place:
            continue
        scales = generator.normal(size=(len(blocks), 1)).astype(numpy.float16)
        blocks[:, place : place + 2] = scales.view(numpy.uint8)
    return blocks.reshape(rows, -1)


@pytest.mark.parametrize("name", [name for name, kind in KINDS.items() if kind.count > 1])
def test_blocks_are_those_numbers(name):
    kind = KINDS[name]
    stored = random_blocks(kind, 3, 512)
    expected = gguf.quants.dequantize(stored, gguf.GGMLQuantizationType[name])
    found = kind.expand(torch.from_numpy(stored.reshape(-1, kind.size))).reshape(3, 512)
    assert (kind.count, kind.size) == gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]]
    assert numpy.array_equal(found.numpy(), expected)


@pytest.fixture(scope="module")
def t5():
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(0)
    sizes = {"d_model": 64, "d_ff": 96, "d_kv": 16, "num_heads": 4, "num_layers": 2, "vocab_size": 64}
    return T5EncoderModel(T5Config(**sizes, feed_forward_proj="gated-gelu")).eval()


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0"])
def test_a_text_encoder_of_llama_cpp(t5, tmp_path, kind):
    weights, path = weights_of(t5), tmp_path / "t5.gguf"
    write_gguf(path, {llama_name(name): tensor for name, tensor in weights.items()}, matrices(kind))
    found, config = read_encoder(path, torch.float32)
    assert config["d_ff"] == 96 and found.keys() == weights.keys()
    for tensor in gguf.GGUFReader(path).tensors:
        expected = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        name = next(name for name in weights if llama_name(name) == tensor.name)
        assert numpy.array_equal(found[name].float().numpy(), expected), name
    packed = read_encoder(path, packed=True)[0]
    assert isinstance(packed["shared.weight"], Packed) == (kind not in ("F16", "BF16"))
    assert sum(tensor.nbytes for tensor in packed.values()) < path.stat().st_size


def test_an_encoder_outside_the_host_keeps_its_blocks(tmp_path):
    model = make_t5(d_model=32, d_ff=64)
    weights, path = weights_of(model), tmp_path / "t5.gguf"
    write_gguf(path, {llama_name(name): tensor for name, tensor in weights.items()}, matrices("Q8_0"))
    network = read_network(path)
    plain = read_encoder(path, torch.float32)[0]
    model.load_state_dict({**plain, "encoder.embed_tokens.weight": plain["shared.weight"]})
    ids = torch.tensor([[5, 9, 1]])
    expected, found = (net(input_ids=ids).last_hidden_state for net in (model, network))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.fixture(scope="module")
def transformer():
    config = tiny_config("sigma-1024", hidden_size=64, caption_channels=32)
    return config, make_weights(config)


@pytest.mark.parametrize("layout", ["original", "diffusers", "prefixed"])
def test_a_transformer_under_any_names(transformer, tmp_path, layout):
    config, weights = transformer
    named = to_diffusers(weights) if layout == "diffusers" else dict(weights)
    if layout == "prefixed":
        named = {f"model.diffusion_model.{name}": tensor for name, tensor in weights.items()}
    named = {name: tensor.contiguous() for name, tensor in named.items()}
    # Types as mixed as programs have them: values better than queries and keys.
    kinds = lambda name, tensor: matrices("Q8_0" if "to_v" in name else "Q5_1")(name, tensor)  # noqa: E731
    path = tmp_path / "pixart.gguf"
    write_gguf(path, named, kinds, "pixart")
    plain, packed = read_checkpoint(path), read_checkpoint(path, packed=True)
    assert plain.config.depth == config.depth and plain.state_dict.keys() == packed.state_dict.keys()
    assert isinstance(packed.state_dict["blocks.0.attn.qkv.weight"], Packed)
    for name, tensor in packed.state_dict.items():
        numbers = tensor.expand() if isinstance(tensor, Packed) else tensor
        assert torch.equal(numbers, plain.state_dict[name])
        assert torch.nn.functional.cosine_similarity(numbers.flatten(), weights[name].flatten(), dim=0) > 0.99


@pytest.mark.parametrize("kind", ["F16", "Q8_0", "Q4_1"])
def test_convert_writes_both(transformer, t5, tmp_path, kind):
    config, weights = transformer
    save_file(weights, tmp_path / "PixArt-Sigma-1024.safetensors")
    save_file(weights_of(t5), tmp_path / "t5.safetensors")
    for source in ("PixArt-Sigma-1024", "t5"):
        main(
            ["convert", str(tmp_path / f"{source}.safetensors"), str(tmp_path / f"{source}.gguf"), "--gguf-type", kind]
        )
    read = gguf.GGUFReader(tmp_path / "t5.gguf")
    assert read.fields["general.architecture"].contents() == "t5encoder"
    found = read_checkpoint(tmp_path / "PixArt-Sigma-1024.gguf")
    assert found.config == read_checkpoint(tmp_path / "PixArt-Sigma-1024.safetensors").config
    encoder = read_encoder(tmp_path / "t5.gguf", torch.float32)[0]
    for ours, theirs in ((found.state_dict, weights), (encoder, weights_of(t5))):
        for name, tensor in ours.items():
            assert torch.nn.functional.cosine_similarity(tensor.float().flatten(), theirs[name].flatten(), dim=0) > 0.97
    main(["convert", str(tmp_path / "t5.gguf"), str(tmp_path / "again.safetensors"), "--dtype", "fp32"])
    assert torch.equal(read_tensors(tmp_path / "again.safetensors")[0]["shared.weight"], encoder["shared.weight"])


def test_types_that_only_the_package_knows(tmp_path):
    path = tmp_path / "rare.gguf"
    kind = gguf.GGMLQuantizationType.TQ2_0
    write_gguf(path, {"a.weight": torch.randn(2, 256)}, lambda *_: kind.name)
    expected = gguf.quants.dequantize(gguf.GGUFReader(path).tensors[0].data, kind)
    assert numpy.allclose(read_tensors(path)[0]["a.weight"].float().numpy(), expected, rtol=1e-3)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "small.gguf"
    write_gguf(path, {"a.weight": torch.randn(4, 64), "b": torch.randn(3)}, matrices("Q4_0"), "pixart", [("x", "y")])
    return path.read_bytes()


def refused_or_read(path):
    try:
        opened = open_gguf(path)
        tensors = opened.read(opened.content)
    except ValueError as error:
        assert path.name in str(error)
        return
    for tensor in tensors.values():
        numbers = tensor.expand() if isinstance(tensor, Packed) else tensor
        assert numbers.nbytes < 2**20


@pytest.mark.slow
@settings(deadline=None, max_examples=150, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_hostile_headers_are_refused_in_words(small, tmp_path, data):
    content = bytearray(small)
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, min(len(content), 400) - 9))
        number = data.draw(st.sampled_from([0, 1, 2**16, 2**31, 2**32 - 1, 2**62, 2**64 - 1]) | st.integers(0, 255))
        size = data.draw(st.sampled_from([1, 4, 8]))
        content[place : place + size] = (number % 2 ** (8 * size)).to_bytes(size, "little")
    path = tmp_path / "hostile.gguf"
    path.write_bytes(content[: data.draw(st.integers(5, len(content)))] if data.draw(st.booleans()) else content)
    refused_or_read(path)


def header(tensors=b"", count=0, fields=b"", field_count=0):
    return b"GGUF" + struct.pack("<IQQ", 3, count, field_count) + fields + tensors


def tensor(name, shape, kind, offset):
    return (struct.pack("<Q", len(name)) + name + struct.pack("<I", len(shape))
            + b"".join(struct.pack("<Q", size) for size in shape) + struct.pack("<IQ", kind, offset))  # fmt: skip


HOSTILE = {
    "more tensors than any model": header(count=2**40),
    "a version of the future": b"GGUF" + struct.pack("<IQQ", 9, 0, 0),
    "big-endian": b"GGUF" + struct.pack(">IQQ", 3, 0, 0),
    "a list without end": header(fields=struct.pack("<Q1sIIQ", 1, b"x", 9, 8, 2**60), field_count=1),
    "lists in lists": header(
        fields=struct.pack("<Q1sIIQ", 1, b"x", 9, 9, 1) + struct.pack("<IQ", 9, 1) * 50, field_count=1
    ),
    "a tensor beyond the end": header(tensor(b"a.weight", (32, 2**20), 2, 0), 1) + bytes(100),
    "a tensor of all memory": header(tensor(b"a.weight", (2**40, 2**20), 2, 0), 1),
    "half a block": header(tensor(b"a.weight", (33, 2), 2, 0), 1) + bytes(100),
    "a type of the future": header(tensor(b"a.weight", (32, 2), 999, 0), 1) + bytes(100),
    "one place for many": header(b"".join(tensor(b"%d.weight" % i, (32, 8), 2, 0) for i in range(64)), 64) + bytes(200),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_files(tmp_path, case):
    path = tmp_path / "hostile.gguf"
    path.write_bytes(HOSTILE[case])
    with pytest.raises(ValueError, match=r"hostile\.gguf"):
        read_checkpoint(path)
    with pytest.raises(ValueError, match=r"hostile\.gguf"):
        read_encoder(path)
