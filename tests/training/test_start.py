"""A training that goes on from a LoRA file: the same numbers before its first step, and what is told or refused."""

import pytest
import torch

from pixart_pack.pixart.lora import Hadamard, LowRank, merge, read_lora, save_lora
from pixart_pack.pixart.training.adapting.start import begin_with, identity_of, settings_of_start
from pixart_pack.pixart.training.build import make_objective
from pixart_pack.pixart.training.run import lora_factors, train
from pixart_pack.tests.training_data import make_features, predict, tiny_model, tiny_settings


def begun(lora, settings):
    settings, told = settings_of_start(lora, settings)
    objective = make_objective(tiny_model(), settings)
    return objective, settings, [*told, *begin_with(objective.model, lora)]


def random_lora(path, ranks, layout="host", magnitude=False, alpha=3.0):
    generator, model = torch.Generator().manual_seed(1), tiny_model()
    factors = {}
    for name, rank in ranks.items():
        rows, columns = model.get_submodule(name).weight.shape
        down, up = (torch.randn(shape, generator=generator) * 0.2 for shape in ((rank, columns), (rows, rank)))
        lengths = model.get_submodule(name).weight.norm(dim=1, keepdim=True) * 1.1 if magnitude else None
        factors[name] = LowRank(down=down, up=up, alpha=alpha, magnitude=lengths.detach() if magnitude else None)
    save_lora(path, factors, layout=layout)
    return read_lora(path, model.config)


@pytest.mark.parametrize(
    ("ranks", "layout", "magnitude"),
    [
        ({"blocks.0.attn.qkv": 4, "blocks.1.attn.proj": 4}, "kohya", False),  # packed, as one layer
        ({"blocks.0.attn.qkv": 4, "blocks.1.cross_attn.q_linear": 2}, "peft", False),  # q, k, v apart; two ranks
        ({"blocks.0.mlp.fc2": 3, "final_layer.linear": 3}, "host", False),  # layers that the settings leave out
        ({"blocks.0.attn.qkv": 4, "blocks.2.attn.proj": 4}, "host", True),
    ],
    ids=["packed", "apart", "other layers", "dora"],
)
def test_a_training_begins_with_what_the_file_computes(ranks, layout, magnitude, tmp_path):
    lora = random_lora(tmp_path / ("lora" if layout == "peft" else "lora.safetensors"), ranks, layout, magnitude)
    objective, settings, told = begun(lora, tiny_settings(rank=7))
    plain = tiny_model()
    plain.load_state_dict(merge(plain.state_dict(), lora))
    found, expected = predict(objective.model, objective), predict(plain, objective)
    assert not torch.allclose(found, predict(tiny_model(), objective), atol=1e-2)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)  # float32, sums in another order
    assert settings.rank == max(ranks.values()) and settings.dora == magnitude
    assert f"rank {max(ranks.values())} of the file instead of 7" in told[0] and "begin anew" in told[1]


def test_a_result_goes_on_in_another_training_and_knows_where_it_began(tmp_path):
    first = train(tiny_model(), make_features(), tiny_settings(steps=2), tmp_path / "first")
    lora = read_lora(first.file)
    objective, settings, told = begun(lora, tiny_settings(steps=2))
    assert not told and settings == tiny_settings(steps=2, alpha=2.0)
    for target, factor in lora_factors(objective, dict(objective.named_parameters())).items():
        assert torch.equal(factor.down, lora.factors[target].down) and torch.equal(factor.up, lora.factors[target].up)
    again = train(tiny_model(), make_features(), tiny_settings(steps=1), tmp_path / "second", start=lora)
    assert not all(torch.equal(value, first.weights[name]) for name, value in again.weights.items())
    for start in (None, random_lora(tmp_path / "other.safetensors", {"blocks.0.attn.qkv": 2}, alpha=2.0)):
        with pytest.raises(ValueError, match="cannot be continued from another LoRA: got (no|another) start_from"):
            train(tiny_model(), make_features(), tiny_settings(steps=2, alpha=2.0), tmp_path / "second", start=start)
    assert identity_of(lora) == identity_of(read_lora(first.file))


def test_what_is_no_lora_of_this_model_is_refused(tmp_path):
    lora = random_lora(tmp_path / "lora.safetensors", {"blocks.0.attn.qkv": 2})
    with pytest.raises(ValueError, match="Nothing to begin with: got .* kind 'full'"):
        settings_of_start(lora, tiny_settings(kind="full"))
    with pytest.raises(ValueError, match="does not fit: got layers blocks.0.attn.qkv, expected those"):
        begin_with(torch.nn.Linear(2, 2), lora)
    loha = Hadamard(w1_a=torch.ones(12, 1), w1_b=torch.ones(1, 12), w2_a=torch.ones(12, 1), w2_b=torch.ones(1, 12))
    save_lora(tmp_path / "loha.safetensors", {"blocks.0.attn.proj": loha})
    with pytest.raises(ValueError, match="Not to be trained on: got LoHa of 'blocks.0.attn.proj.weight'"):
        settings_of_start(read_lora(tmp_path / "loha.safetensors"), tiny_settings())
