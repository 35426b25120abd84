"""T5 v1.1 encoders: what is told from their weights alone."""

import json

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from pixart_pack.pixart.weights.t5 import MARKER, detect_t5_config, encoder_weights, is_t5_folder
from pixart_pack.tests.tiny_t5 import SIZES, make_t5, weights_of, with_decoder, write_shards

TINY = make_t5(vocab_size=64)
EXPECTED = {**SIZES, "vocab_size": 64}
BIAS = "encoder.block.{}.layer.0.SelfAttention.relative_attention_bias.weight"


@pytest.fixture(scope="module")
def weights():
    return weights_of(TINY)


@pytest.mark.parametrize("prefix", ["", "transformer.", "t5xxl.transformer.", "text_encoders.t5xxl.transformer."])
def test_any_prefix(weights, prefix):
    found = encoder_weights({"logit_scale": torch.zeros(()), **{prefix + k: v for k, v in weights.items()}}, "file")
    assert found.keys() - {"logit_scale"} == weights.keys()
    assert detect_t5_config(found, "file") == EXPECTED


def test_the_decoder_is_dropped(weights):
    assert encoder_weights(with_decoder(weights), "file").keys() == weights.keys()


def test_the_embedding_under_its_other_name(weights):
    renamed = dict(weights)
    renamed["encoder.embed_tokens.weight"] = renamed.pop("shared.weight")
    assert torch.equal(encoder_weights(renamed, "file")["shared.weight"], weights["shared.weight"])


OTHERS = {
    "a LoRA": {"lora_te1_encoder.lora_down.weight": 0},
    "CLIP text encoder": {"text_model.encoder.layers.0.mlp.fc1.weight": 0},
    "a T5 decoder without its encoder": {"decoder.block.0.layer.0.SelfAttention.q.weight": 0, "shared.weight": 0},
    "a PixArt model": {"t_block.1.weight": 0},
    "VAE": {"decoder.conv_in.weight": 0},
    "an unknown kind": {"something.weight": 0},
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_files_are_named(kind):
    state_dict = {key: torch.zeros(2, 2) for key in OTHERS[kind]}
    with pytest.raises(ValueError, match=f"got .*{kind}.* in some.safetensors, expected a T5 v1.1 encoder"):
        encoder_weights(state_dict, "some.safetensors")


def test_a_file_without_tensors():
    with pytest.raises(ValueError, match="got no tensors in some.bin"):
        encoder_weights({}, "some.bin")


def test_other_families(weights):
    with pytest.raises(ValueError, match="got UMT5 .* in a.bin"):
        detect_t5_config({**weights, BIAS.format(1): weights[BIAS.format(0)]}, "a.bin")
    old = {key.replace("wi_0", "wi"): value for key, value in weights.items()}
    with pytest.raises(ValueError, match="got T5 1.0 .* in a.bin"):
        detect_t5_config(old, "a.bin")


def test_incomplete_and_misshapen_weights(weights):
    for key in weights:
        if key != MARKER:
            with pytest.raises(ValueError, match="in a.bin|got a.bin"):
                detect_t5_config({k: v for k, v in weights.items() if k != key}, "a.bin")
        for shape in ((), (3,)):
            with pytest.raises(ValueError, match="in a.bin|got a.bin"):
                detect_t5_config({**weights, key: torch.zeros(shape)}, "a.bin")


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_damaged_shapes_never_end_otherwise(data):
    weights = weights_of(TINY)
    key = data.draw(st.sampled_from(sorted(weights)))
    shape = data.draw(st.lists(st.integers(0, 70), max_size=3))
    try:
        config = detect_t5_config({**weights, key: torch.zeros(shape)}, "a.bin")
    except ValueError as error:
        assert "a.bin" in str(error)
    else:
        assert set(config) == set(EXPECTED)


def test_the_config_must_agree(weights):
    assert detect_t5_config(weights, "a.bin", {"d_model": 24, "dropout_rate": 0.1}) == EXPECTED
    with pytest.raises(ValueError, match="got d_ff 1024 for a.bin, expected 56 from the weights"):
        detect_t5_config(weights, "a.bin", {"d_ff": 1024})


def test_folders(weights, tmp_path):
    sharded, single, other, root = (tmp_path / name for name in ("sharded", "single", "clip", "root"))
    write_shards(sharded, weights, ".bin")
    for folder in (single, other, root):
        folder.mkdir()
    save_file(weights, single / "model.fp16.safetensors")
    (single / "config.json").write_text(json.dumps({"model_type": "t5"}))
    save_file(weights, other / "model.safetensors")
    (other / "config.json").write_text(json.dumps({"model_type": "clip_text_model"}))
    (root / "model_index.json").write_text("{}")
    assert [is_t5_folder(folder) for folder in (sharded, single, other, root)] == [True, True, False, False]
    (single / "config.json").write_text("{")
    assert not is_t5_folder(single)
