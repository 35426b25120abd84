"""Objectives: against the original's losses, and what each option does."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from pixart_pack.pixart.data.examples import collate
from pixart_pack.pixart.diffusion import Diffusion
from pixart_pack.pixart.solvers import boundary_scalings
from pixart_pack.pixart.training.build import make_objective
from pixart_pack.pixart.training.draws import draw_batch
from pixart_pack.pixart.training.objectives import (
    Distillation,
    huber,
    replace_captions,
    timestep_weights,
)
from pixart_pack.tests.goldens import load_golden, take
from pixart_pack.tests.tiny_pixart import tiny_config
from pixart_pack.tests.training_data import WIDTH, make_features, tiny_model, tiny_settings

LCM, LCM_TENSORS = load_golden("losses_lcm")
LOSSES, LOSS_TENSORS = load_golden("losses_training")


class Fixed(nn.Module):
    """A model that predicts what it was told, in the order of its calls."""

    def __init__(self, *predictions, learn_sigma=True):
        super().__init__()
        self.predictions, self.calls = list(predictions), []
        self.config = replace(tiny_config(learn_sigma=learn_sigma), vae_scale=1.0)
        self.has_null_caption = False
        self.dummy = nn.Parameter(torch.zeros(()))

    def forward(self, latent, timestep, caption, **_):
        self.calls.append((latent, timestep, caption))
        return self.predictions[len(self.calls) - 1]


def batch_of(latents, **fields):
    features = make_features(count=len(latents), sizes=((8, 8),))
    batch = collate([features[index] for index in range(len(features))])
    size = {"deviation": None, "latent": latents}
    return replace(batch, **{**size, **fields})


def draws_of(noise, timestep):
    draws = draw_batch(tiny_settings(), 0, range(len(noise)), noise.shape[1:])
    return replace(draws, noise=noise, timestep=timestep, dropped=torch.zeros(len(noise), dtype=torch.bool))


@pytest.mark.parametrize("run, train_variance", [("default", True), ("no_sigma", False)])
def test_noise_prediction_equals_the_original(run, train_variance):
    inputs = take(LOSS_TENSORS, "input")
    settings = tiny_settings(kind="full", train_variance=train_variance)
    timestep = torch.tensor(LOSSES["runs"][run]["t_index_used"])
    objective = make_objective(tiny_model(), settings)
    objective.model, objective.vae_scale = Fixed(inputs["model_output"]), 1.0
    loss = objective(batch_of(inputs["x0"]), draws_of(inputs["noise"], timestep))
    expected = LOSS_TENSORS[f"output.{run}.loss"].mean()
    tolerance = {name: LOSSES["tolerance"][f"suggested_{name}"] for name in ("rtol", "atol")}
    torch.testing.assert_close(loss.total, expected, **tolerance)
    torch.testing.assert_close(objective.model.calls[0][0], LOSS_TENSORS[f"output.{run}.x_t"], **tolerance)
    torch.testing.assert_close(loss.error, LOSS_TENSORS[f"output.{run}.mse"].mean(), **tolerance)


def lcm_objective(loss):
    given = take(take(LCM_TENSORS, "input"), "lcm")
    student = Fixed(given["eps_student"])
    objective = Distillation(student, tiny_settings(kind="lcm", loss=loss), torch.float32, torch.zeros(1, WIDTH))
    teacher = Fixed(given["eps_teacher_cond"], given["eps_teacher_uncond"])
    target = Fixed(given["eps_target"])
    objective.as_teacher = lambda: _within(teacher)
    objective.as_target = lambda: _within(target)
    return objective, given, (student, teacher, target)


class _within:
    def __init__(self, model):
        self.model = model

    def __enter__(self):
        return self.model

    def __exit__(self, *_):
        pass


@pytest.mark.parametrize("loss, name", [("huber", "loss_huber"), ("mse", "loss_l2")])
def test_consistency_distillation_equals_the_original(loss, name):
    objective, given, (student, teacher, target) = lcm_objective(loss)
    timestep = torch.tensor(LCM["lcm_loss"]["start_timesteps"])
    result = objective(batch_of(given["latents"]), draws_of(given["noise"], timestep))
    expected = take(take(LCM_TENSORS, "output"), "lcm")
    close = {"rtol": LCM["tolerance"]["suggested_rtol"], "atol": 1e-5}
    torch.testing.assert_close(student.calls[0][0], expected["x_t"], **close)
    torch.testing.assert_close(target.calls[0][0], expected["x_prev"], **close)
    assert target.calls[0][1].tolist() == LCM["lcm_loss"]["end_timesteps"]
    assert len(teacher.calls) == 2 and not torch.equal(teacher.calls[0][2], teacher.calls[1][2])
    torch.testing.assert_close(result.total, expected[name][0], **close)


def test_boundary_scalings_and_solver_equal_the_original():
    c_skip, c_out = boundary_scalings(LCM_TENSORS["input.t"])
    torch.testing.assert_close(c_skip, LCM_TENSORS["output.c_skip"])
    torch.testing.assert_close(c_out, LCM_TENSORS["output.c_out"])
    objective, *_ = lcm_objective("mse")
    assert torch.equal(objective.grid, LCM_TENSORS["output.ddim_timesteps"])
    timestep = LCM_TENSORS["output.ddim_timesteps"][LCM_TENSORS["input.index"]]
    step = objective.diffusion.q_sample(
        LCM_TENSORS["input.pred_x0"], objective.previous_timestep(timestep), LCM_TENSORS["input.pred_noise"]
    )
    torch.testing.assert_close(step, LCM_TENSORS["output.ddim_step"])


def test_min_snr_and_other_weights():
    kept = Diffusion().alphas_cumprod
    snr = (kept / (1 - kept)).float()
    weights = timestep_weights(tiny_settings(weighting="min_snr", min_snr_gamma=5.0), kept)
    torch.testing.assert_close(weights, torch.clamp(5.0 / snr, max=1.0))
    velocity = timestep_weights(tiny_settings(weighting="velocity"), kept)
    assert velocity[0] == pytest.approx(1.0001, abs=1e-4) and velocity.max() == 200
    points = timestep_weights(tiny_settings(timestep_weights=[[800, 3.0], [200, 1.0], [600, 2.0]]), kept)
    assert points[[0, 200, 400, 600, 700, 800, 999]].tolist() == [1.0, 1.0, 1.5, 2.0, 2.5, 3.0, 3.0]


def test_huber_is_the_square_near_zero_and_linear_far_off():
    near, far = torch.full((1, 4), 1e-3), torch.full((1, 4), 100.0)
    assert huber(near, 0.1).item() == pytest.approx(1e-6, rel=1e-3)
    assert huber(far, 0.1).item() == pytest.approx(2 * 0.1 * 100, rel=1e-2)


@pytest.mark.parametrize("fields", [{}, {"weighting": "min_snr"}, {"weighting": "velocity", "loss": "huber"}])
def test_the_loss_is_a_distance_to_the_noise_weighted_by_timestep(fields):
    generator = torch.Generator().manual_seed(0)
    prediction, noise, latents = (torch.randn(3, 4, 8, 8, generator=generator) for _ in range(3))
    timestep, settings = torch.tensor([10, 500, 990]), tiny_settings(kind="full", **fields)
    objective = make_objective(tiny_model(), settings)
    objective.model = Fixed(prediction, learn_sigma=False)
    difference = prediction - noise
    distance = difference.square().flatten(1).mean(1) if settings.loss == "mse" else huber(difference, 0.1)
    expected = (timestep_weights(settings, Diffusion().alphas_cumprod)[timestep] * distance).mean()
    loss = objective(batch_of(latents), draws_of(noise, timestep))
    torch.testing.assert_close(loss.total, expected)
    torch.testing.assert_close(loss.error, difference.square().mean())


def losses_of(**fields):
    features = make_features(count=4, sizes=((8, 8),), prior=(2, 3))
    settings = tiny_settings(kind="full", caption_dropout=0.0, **fields)
    objective = make_objective(tiny_model(), settings)
    batch = collate([features[index] for index in range(4)])
    return objective(batch, draw_batch(settings, 0, range(4), batch.latent.shape[1:])).total.item()


@pytest.mark.parametrize("fields", [{}, {"loss": "huber"}, {"train_variance": True}])
def test_what_lies_outside_of_a_mask_counts_for_little(fields):
    """The gradient at each place: as without a mask within it, its share outside, and none for a floor of 0."""
    latents = torch.randn(2, 4, 8, 8)
    draws = draws_of(torch.randn(2, 4, 8, 8), torch.tensor([100, 700]))
    mask = torch.zeros(2, 1, 8, 8)
    mask[:, :, :4] = 1
    gradients = {}
    for name, floor, given in (("whole", 0.1, None), ("masked", 0.25, mask), ("none", 0.0, mask)):
        guess = torch.full((2, 8, 8, 8), 0.3, requires_grad=True)
        settings = tiny_settings(kind="full", mask_floor=floor, caption_dropout=0.0, **fields)
        objective = make_objective(Fixed(guess), settings)
        loss = objective(batch_of(latents, mask=given), draws)
        (gradients[name],) = torch.autograd.grad(loss.total, guess)
    factor = 0.25 + 0.75 * mask
    torch.testing.assert_close(gradients["masked"], gradients["whole"] * factor, rtol=1e-5, atol=1e-9)
    assert not gradients["none"][:, :, 4:].any() and gradients["none"][:, :4, :4].all()


def test_a_pictures_weight_multiplies_its_loss():
    latents, draws = torch.randn(2, 4, 8, 8), draws_of(torch.randn(2, 4, 8, 8), torch.tensor([100, 700]))
    guess = torch.zeros(2, 4, 8, 8)

    def loss(weight):
        settings = tiny_settings(kind="full", caption_dropout=0.0)
        objective = make_objective(Fixed(guess, learn_sigma=False), settings)
        return objective(batch_of(latents, weight=weight), draws).total.item()

    first, second = loss(torch.tensor([2.0, 0.0])), loss(torch.tensor([0.0, 2.0]))
    assert loss(None) == pytest.approx((first + second) / 2, rel=1e-6) and first != second


def test_prior_pictures_weigh_as_much_as_is_said():
    one, none, two = (losses_of(prior_weight=weight) for weight in (1.0, 0.0, 2.0))
    assert 0 < none < one and two - one == pytest.approx(one - none, rel=1e-5)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_lora_may_be_held_to_what_the_model_made_of_prior_pictures(dropout):
    features = make_features(count=4, sizes=((8, 8),), prior=(1, 3))
    settings = tiny_settings(prior_target="model", prior_weight=100.0, caption_dropout=0.3, dropout=dropout)
    objective = make_objective(tiny_model(), settings)
    batch, draws = collate([features[index] for index in range(4)]), draw_batch(settings, 0, range(4), (4, 8, 8))
    untouched = objective(batch, draws)  # the LoRA adds nothing yet
    noise = make_objective(tiny_model(), tiny_settings(prior_weight=0.0, caption_dropout=0.3))(batch, draws)
    assert untouched.total.item() == pytest.approx(noise.total.item(), rel=1e-5)
    generator = torch.Generator().manual_seed(0)
    for adapter in objective.adapters.values():
        nn.init.normal_(adapter.lora_up, std=0.1, generator=generator)
    changed = objective(batch, draws)
    changed.total.backward()
    assert changed.total > untouched.total and all(a.lora_up.grad.any() for a in objective.adapters.values())
    none = replace(batch, is_prior=torch.zeros(4, dtype=torch.bool))
    assert objective.target(draws.noise, draws.timestep, {}, none, draws) is draws.noise


@pytest.mark.parametrize("kind", ["full", "dreambooth", "lcm_lora"])
def test_only_a_lora_has_a_model_to_be_held_to(kind):
    with pytest.raises(ValueError, match="No frozen model"):
        tiny_settings(kind=kind, prior_target="model")


def test_noise_offset_moves_whole_channels():
    features = draw_batch(tiny_settings(noise_offset=1.0), 0, range(200), (4, 8, 8))
    plain = draw_batch(tiny_settings(), 0, range(200), (4, 8, 8))
    assert features.noise.mean((2, 3)).std() > 0.8 and plain.noise.mean((2, 3)).std() < 0.2


def test_timesteps_are_drawn_as_asked():
    def draw(**fields):
        return draw_batch(tiny_settings(**fields), 1, range(2000), (1, 1, 1)).timestep

    uniform = draw()
    assert uniform.min() < 10 and uniform.max() > 989 and abs(uniform.float().mean() - 499.5) < 20
    window = draw(timestep_min=200, timestep_max=300)
    assert window.min() >= 200 and window.max() <= 300 and len(window.unique()) > 90
    middle = draw(timesteps="log_normal", timestep_mean=0.0, timestep_std=0.5)
    assert abs(middle.float().mean() - 500) < 20 and middle.float().std() < 150
    late = draw(timesteps="log_normal", timestep_mean=2.0)
    assert late.float().mean() > 750 and late.max() <= 999


def test_the_steps_of_a_distillation_are_drawn_as_asked():
    def draw(**fields):
        settings = tiny_settings(kind="lcm_lora", lcm_steps=10, **fields)
        grid = make_objective(tiny_model(), settings).grid
        drawn = draw_batch(settings, 1, range(500), (1, 1, 1), grid).timestep
        assert set(drawn.tolist()) <= set(grid.tolist())
        return drawn.float().mean()

    assert abs(draw() - 549) < 50 and draw(timesteps="log_normal", timestep_mean=1.5) > 700
    assert draw(timestep_max=600) < 400


def test_draws_are_told_by_the_picture_and_not_by_its_process():
    settings = tiny_settings(caption_dropout=0.5)
    whole = draw_batch(settings, 7, range(6), (4, 8, 8))
    part = draw_batch(settings, 7, range(3, 6), (4, 8, 8))
    for name in ("noise", "posterior_noise", "timestep", "dropped"):
        assert torch.equal(getattr(whole, name)[3:], getattr(part, name)), name
    assert not torch.equal(whole.noise, draw_batch(settings, 8, range(6), (4, 8, 8)).noise)
    assert 0.4 < draw_batch(settings, 0, range(1000), (1, 1, 1)).dropped.float().mean() < 0.6


@pytest.mark.parametrize("is_learned", [True, False])
def test_dropped_captions_become_the_null_caption(is_learned):
    caption, null = torch.randn(2, 5, 8), torch.randn(120 if is_learned else 1, 8)
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    found, kept = replace_captions(caption, mask, torch.tensor([False, True]), null, is_learned)
    assert torch.equal(found[0], caption[0]) and torch.equal(found[1, :1], null[:1])
    assert kept.tolist() == [[True] * 5, [True] * 3 + [False] * 2 if is_learned else [True] + [False] * 4]


def test_without_any_null_caption_dropout_is_refused():
    models = [tiny_model(), tiny_model()]
    for model in models:
        model.has_null_caption = False
    with pytest.raises(ValueError, match="No null caption: .* set caption dropout to 0"):
        make_objective(models[0], tiny_settings())
    assert make_objective(models[1], tiny_settings(caption_dropout=0.0)).null_caption is None


def test_a_model_without_variance_has_none_to_train():
    with pytest.raises(ValueError, match="No variance to train"):
        make_objective(tiny_model(learn_sigma=False), tiny_settings(train_variance=True))


def test_a_new_controlnet_predicts_what_the_base_predicts():
    features = make_features(count=4, sizes=((8, 8),), hint=True)
    batch = collate([features[index] for index in range(4)])
    totals = []
    for kind in ("controlnet", "full"):
        settings = tiny_settings(kind=kind)
        objective = make_objective(tiny_model(), settings)
        totals.append(objective(batch, draw_batch(settings, 0, range(4), (4, 8, 8))).total.item())
    assert totals[0] == pytest.approx(totals[1], rel=1e-6)
    with pytest.raises(ValueError, match="Control pictures are missing"):
        make_objective(tiny_model(), tiny_settings(kind="controlnet"))(
            replace(batch, hint=None), draw_batch(settings, 0, range(4), (4, 8, 8))
        )


def test_the_target_follows_the_student():
    settings = tiny_settings(kind="lcm", lcm_decay=0.75)
    objective = make_objective(tiny_model(), settings)
    before = objective.target.t_block[1].weight.clone()
    objective.model.t_block[1].weight.data.add_(1.0)
    objective.finish_step()
    torch.testing.assert_close(objective.target.t_block[1].weight, before + 0.25)
    assert torch.equal(objective.teacher.t_block[1].weight, before)
    assert math.isclose(objective.settings.lcm_guidance, 4.5)
