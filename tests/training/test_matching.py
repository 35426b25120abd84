"""Distribution matching: the gradient of its paper, what is trained and what stays, and the teacher's pairs."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from pixart_pack.pixart.commands import pairs as pairs_command
from pixart_pack.pixart.commands.console import run_command
from pixart_pack.pixart.data.cache import DatasetEncoder, EncodeSettings
from pixart_pack.pixart.data.examples import ListFeatures, collate
from pixart_pack.pixart.data.features import open_features
from pixart_pack.pixart.data.pairs import PAIRS, noise_of
from pixart_pack.pixart.data.pictures import TensorPicture
from pixart_pack.pixart.data.records import Record
from pixart_pack.pixart.sampling import Captions, Settings, sample_latents
from pixart_pack.pixart.training.build import make_objective
from pixart_pack.pixart.training.draws import draw_batch
from pixart_pack.pixart.training.processes import _check_sharded
from pixart_pack.pixart.training.run import train
from pixart_pack.pixart.weights.reading import read_checkpoint
from pixart_pack.pixart.weights.saving import save_checkpoint
from pixart_pack.tests.rounding import assert_equal_to_rounding
from pixart_pack.tests.tiny_pixart import make_model, make_weights, tiny_config
from pixart_pack.tests.training_data import make_features, tiny_model, tiny_settings

ALL = [(kind, fake) for kind in ("dmd", "dmd_lora") for fake in ("lora", "full")]


def inputs(settings, objective, noise=False):
    features = make_features(count=2, sizes=((8, 8),))
    batch = collate([features[0], features[1]])
    if noise:
        batch = replace(batch, noise=torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(5)))
    draws = draw_batch(settings, 0, range(2), (4, 8, 8), objective.grid)
    return batch, replace(draws, dropped=torch.zeros(2, dtype=torch.bool))


def alpha_of(objective, timestep):
    return objective.diffusion.alphas_cumprod[timestep].float()[:, None, None, None]


@pytest.mark.parametrize(("kind", "fake"), ALL)
def test_the_generators_gradient_is_the_difference_of_the_scores(kind, fake):
    """Written again from the paper's equations 4, 7 and 8, with the models called one by one."""
    settings = tiny_settings(kind=kind, dmd_fake=fake, dmd_guidance=3.0)
    objective = make_objective(tiny_model(), settings)
    with torch.no_grad():  # so that the fake score is not the teacher's
        for name, parameter in objective.named_parameters():
            if parameter.requires_grad and name.startswith("fake."):
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    batch, draws = inputs(settings, objective)
    loss = objective(batch, draws)
    loss.total.backward()
    found = [p.grad.clone() for n, p in objective.named_parameters() if p.requires_grad and n.startswith("model.")]

    teacher, conditions = tiny_model(), objective.conditioned(batch, draws.dropped)
    empty = objective.conditioned(batch, torch.ones(2, dtype=torch.bool))
    t, a400 = draws.timestep, objective.diffusion.alphas_cumprod[400].float()
    noise_out = objective.model(draws.noise, torch.full((2,), 400.0), **conditions)[:, :4]
    x = (draws.noise - (1 - a400).sqrt() * noise_out) / a400.sqrt()
    a = alpha_of(objective, t)
    with torch.no_grad():
        x_t = a.sqrt() * x + (1 - a).sqrt() * draws.posterior_noise
        with_, without = (teacher(x_t, t.float(), **given)[:, :4] for given in (conditions, empty))
        fake_noise = objective.fake(x_t, t.float(), **conditions)[:, :4]
        real = (x_t - (1 - a).sqrt() * (without + 3.0 * (with_ - without))) / a.sqrt()
        fake_start = (x_t - (1 - a).sqrt() * fake_noise) / a.sqrt()
        step = (fake_start - real) / (x - real).abs().mean((1, 2, 3), keepdim=True)
    objective.zero_grad()
    (step * x).sum().div(x.numel()).backward()
    own = [p.grad for n, p in objective.named_parameters() if p.requires_grad and n.startswith("model.")]
    for one, other in zip(found, own, strict=True):
        other = torch.zeros_like(one) if other is None else other
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)  # differences of near scores, in float32
    assert_equal_to_rounding(loss.error, (fake_noise - draws.posterior_noise).square().mean(), 64)


@pytest.mark.parametrize(("kind", "fake"), ALL)
def test_the_teacher_stays_what_it_was(kind, fake):
    settings = tiny_settings(kind=kind, dmd_fake=fake)
    objective = make_objective(tiny_model(), settings)
    batch, draws = inputs(settings, objective)
    with torch.no_grad():
        for parameter in objective.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
        conditions = objective.conditioned(batch, draws.dropped)
        with objective.as_teacher() as teacher:
            found = teacher(draws.noise, draws.timestep.float(), **conditions)
        assert torch.equal(found, tiny_model()(draws.noise, draws.timestep.float(), **conditions))
        assert not torch.equal(found, objective.fake(draws.noise, draws.timestep.float(), **conditions))


@pytest.mark.parametrize(
    ("kind", "fake", "models"),
    [("dmd_lora", "lora", 1), ("dmd_lora", "full", 2), ("dmd", "lora", 2), ("dmd", "full", 3)],
)
def test_how_many_models_it_takes(kind, fake, models):
    objective = make_objective(tiny_model(), tiny_settings(kind=kind, dmd_fake=fake))
    own = {tensor.data_ptr(): tensor.numel() for name, tensor in objective.named_parameters() if "lora_" not in name}
    assert sum(own.values()) == models * sum(tensor.numel() for tensor in tiny_model().parameters())


def test_pairs_hold_the_generator_to_the_teachers_pictures():
    settings = tiny_settings(kind="dmd_lora", dmd_regression=2.0)
    objective = make_objective(tiny_model(), settings)
    batch, draws = inputs(settings, objective, noise=True)
    held, free = objective(batch, draws), objective(replace(batch, noise=None), draws)
    pictures = objective.generate(batch.noise, objective.conditioned(batch, draws.dropped))
    expected = 2.0 * (pictures - objective.start(batch, draws)).square().mean()
    assert_equal_to_rounding(held.total - free.total, expected, 256)
    assert torch.equal(
        make_objective(tiny_model(), replace(settings, dmd_regression=0.0))(batch, draws).total, free.total
    )


@pytest.mark.parametrize(("kind", "fake"), ALL)
def test_the_result_is_the_generator_alone(kind, fake, tmp_path):
    settings = tiny_settings(kind=kind, dmd_fake=fake, steps=2, checkpointing=True)
    result = train(tiny_model(), make_features(count=4), settings, tmp_path)
    weights = load_file(result.file)
    assert not [name for name in weights if "fake" in name]
    if kind == "dmd":
        assert read_checkpoint(result.file).config == tiny_config()
        for name, tensor in result.objective.model.state_dict().items():
            assert torch.equal(weights[name], tensor), name
    else:
        assert len(weights) == len(load_file(train(
            tiny_model(), make_features(count=4), tiny_settings(kind="lora", steps=1), tmp_path / "lora"
        ).file))  # fmt: skip


def test_it_is_not_sharded():
    with pytest.raises(ValueError, match="Cannot be sharded"):
        _check_sharded(tiny_settings(kind="dmd"), True)


def test_no_noise_level_to_compare_at():
    with pytest.raises(ValueError, match="No noise level to compare at"):
        make_objective(tiny_model(), tiny_settings(kind="dmd", timestep_max=10))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder, config = tmp_path_factory.mktemp("pairs"), tiny_config("alpha-512")
    save_checkpoint(folder / "model.safetensors", make_weights(config), config)
    records = [Record(f"{n}", TensorPicture(torch.rand(64, 64 + 32 * (n % 2), 3)), f"picture {n}") for n in range(3)]
    encoder = DatasetEncoder(records, folder / "features", EncodeSettings(64), "t5", "vae")
    encoder.encode_captions(lambda texts: [torch.randn(len(text) + 1, config.caption_channels) for text in texts])
    encoder.encode_pictures(lambda pixels: (torch.randn(len(pixels), 4, *(s // 8 for s in pixels.shape[1:3])), None))
    encoder.features()
    return folder


def make_pairs(place, *more):
    arguments = ["--model", place / "model.safetensors", "--features", place / "features", "--output", place / "pairs"]
    arguments += ["--steps", "3", "--guidance", "2", "--device", "cpu", "--dtype", "fp32", "--seed", "7", *more]
    return run_command(pairs_command.main, pairs_command.parse(), [str(each) for each in arguments])


def test_the_command_writes_what_the_teacher_makes_of_noises(place, capsys):
    assert make_pairs(place, "--count", "5", "--batch", "2") == 0
    features, pairs = open_features(place / "features"), open_features(place / "pairs")
    assert len(pairs) == 5 and len(set(pairs.bins)) == 2
    model, config = make_model(tiny_config("alpha-512")), tiny_config("alpha-512")
    for number in (0, 4):
        source, pair = features[number % 3], pairs[number]
        assert torch.equal(pair.noise, noise_of(7 + number, pair.latent.shape))
        assert (pair.text, pair.size_px) == (source.text, source.size_px)
        given = Captions.of([source.caption.float()]), Captions.of([features.null_caption.float()])
        size = [side * 8 for side in pair.latent.shape[-2:]]
        expected = sample_latents(model, *given, *size, [7 + number], Settings(steps=3, guidance=2.0))[0]
        torch.testing.assert_close(pair.latent, expected, rtol=1e-4, atol=1e-4 / config.vae_scale)  # other batches
    written = {path.name for path in (place / "pairs").glob("*.safetensors")}
    assert make_pairs(place, "--count", "5") == 0
    assert {path.name for path in (place / "pairs").glob("*.safetensors")} == written
    assert make_pairs(place, "--count", "6") == 0
    assert len(open_features(place / "pairs")) == 6
    assert make_pairs(place, "--count", "0") == 1


def test_damaged_pairs_are_refused(place, tmp_path):
    make_pairs(place)
    (tmp_path / PAIRS).write_text((place / "pairs" / PAIRS).read_text())
    with pytest.raises(FileNotFoundError, match="Pairs are not complete: got 4 of 4"):
        open_features(tmp_path)
    (tmp_path / PAIRS).write_text("{}")
    with pytest.raises(ValueError, match="Not a list of pairs"):
        open_features(tmp_path)


def test_a_training_on_pairs_is_bound_to_them(place):
    pairs = open_features(place / "pairs")
    again = ListFeatures([pairs[index] for index in range(len(pairs))])
    moved = ListFeatures([replace(pairs[index], noise=pairs[index].noise + 1) for index in range(len(pairs))])
    assert again.identity != moved.identity
