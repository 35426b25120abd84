"""The demo's trainer: closed-form encoder, start as identity, resuming, exporting."""

import json
import re
from random import Random
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open

from pixart_pack.demo.autoencoder import Autoencoder, Encoder, average_latents, set_averaging_encoder
from pixart_pack.demo.decoder_stage import DecoderStage, reconstruction_psnr
from pixart_pack.demo.denoiser_stage import (
    CONFIG,
    DenoiserStage,
    Plan,
    attend_plainly,
    draw_timesteps,
    start_as_identity,
)
from pixart_pack.demo.generate import load_denoiser, load_text_encoder
from pixart_pack.demo.loop import cosine_factor, fit
from pixart_pack.demo.pool import Bucket, Pool, bucket_scenes
from pixart_pack.demo.scenes import describe, is_held_out
from pixart_pack.demo.text import END, PAD, make_text_batch
from pixart_pack.pixart.config import PixArtConfig
from pixart_pack.pixart.layers import attend
from pixart_pack.pixart.transformer import PixArt, initialize_weights

pytestmark = pytest.mark.slow

TINY = PixArtConfig(depth=2, hidden_size=48, num_heads=2, mlp_ratio=1.0, caption_channels=64, base_size=8, pe_scale=1.0)
SMALL = (Bucket(64, 64, 12, 1.0, (1, 1, 1)),)
FULL = (Bucket(64, 96, 12, 0.5, (1, 1, 0)), Bucket(72, 56, 12, 0.5, (1, 0, 0)))


def words_tokenizer(captions):
    """A stand-in for T5's: one id per word, the end after them."""
    return SimpleNamespace(
        input_ids=[[2 + sum(map(ord, word)) % 900 for word in re.findall(r"\w+", text)] + [END] for text in captions]
    )


def denoiser_stage(folder):
    return DenoiserStage(words_tokenizer, folder, config=TINY, batch_size=4, plan=Plan(SMALL, FULL))


def half_denoiser_stage(folder):
    return DenoiserStage(words_tokenizer, folder, config=TINY, batch_size=4, plan=Plan(FULL, FULL, 0.0), half=True)


def decoder_stage(folder):
    return DecoderStage(batch_size=2)


def tensors(state, path=""):
    """Every tensor in nested dicts and lists, by its place."""
    if isinstance(state, torch.Tensor):
        return {path: state}
    items = state.items() if isinstance(state, dict) else enumerate(state) if isinstance(state, list | tuple) else ()
    return {name: value for key, part in items for name, value in tensors(part, f"{path}/{key}").items()}


def test_encoder_computes_the_averages_exactly():
    encoder = Encoder()
    set_averaging_encoder(encoder)
    pictures = torch.rand(2, 3, 40, 56, generator=torch.Generator().manual_seed(0))
    # Sums of 64 float32 numbers, added in another order.
    torch.testing.assert_close(encoder(pictures), average_latents(pictures), rtol=0, atol=2e-5)


def test_decoder_starts_as_an_enlargement():
    assert reconstruction_psnr(DecoderStage().averaged(), count=6) > 20


def test_autoencoder_keys_are_taesds():
    shapes = {name: tuple(value.shape) for name, value in Autoencoder().state_dict().items()}
    assert shapes["taesd_encoder.0.weight"] == (64, 3, 3, 3)
    assert shapes["taesd_encoder.14.weight"] == (4, 64, 3, 3)
    assert shapes["taesd_decoder.1.weight"] == (64, 4, 3, 3)
    assert shapes["taesd_decoder.19.weight"] == (3, 64, 3, 3)
    assert shapes["vae_scale"] == shapes["vae_shift"] == ()
    assert not any("skip" in name for name in shapes)


def test_fresh_denoiser_returns_its_input():
    torch.manual_seed(0)
    model = PixArt(CONFIG)
    initialize_weights(model)
    start_as_identity(model)
    latent = torch.randn(2, 4, 16, 16)
    prediction = model(latent, torch.tensor([100.0, 900.0]), torch.randn(2, 5, 64))
    # The norm in front of the output layer divides by the tokens' own deviation, known only on average.
    assert (prediction[:, :4] - latent).square().mean() < 0.02
    assert not prediction[:, 4:].any()


@pytest.mark.parametrize("make", [denoiser_stage, half_denoiser_stage, decoder_stage])
def test_resumed_training_ends_alike(make, tmp_path):
    one = make(tmp_path)
    fit(one, tmp_path / "one", steps=2)
    two = make(tmp_path)
    assert fit(two, tmp_path / "two", steps=2, save_every_seconds=0) == 2
    half = make(tmp_path)
    half.load_state_dict(one.state_dict())
    stopped = make(tmp_path)
    stopped.step(0, cosine_factor(0.0), 0.0)
    resumed = make(tmp_path)
    resumed.load_state_dict(stopped.state_dict())
    resumed.step(1, cosine_factor(0.5), 0.5)
    expected = tensors(one.state_dict())
    for stage in (two, half, resumed):
        actual = tensors(stage.state_dict())
        assert actual.keys() == expected.keys()
        assert all(torch.equal(actual[name], expected[name]) for name in expected)


def test_fit_resumes_from_its_checkpoint(tmp_path):
    stage = decoder_stage(tmp_path)
    fit(stage, tmp_path, steps=1)
    seen = []
    stage.step = lambda number, factor, progress: seen.append((number, progress)) or {"loss": 0.0}
    assert fit(stage, tmp_path, steps=3) == 3
    assert seen == [(1, pytest.approx(1 / 3)), (2, pytest.approx(2 / 3))]
    assert not list(tmp_path.glob("*.part"))
    with pytest.raises(ValueError, match="Training budget"):
        fit(stage, tmp_path, steps=3, minutes=1)


def test_exported_denoiser_and_text_encoder_load(tmp_path):
    stage = denoiser_stage(tmp_path)
    stage.step(0, 1.0, 0.0)
    denoiser_file, text_file = tmp_path / "a" / "denoiser.safetensors", tmp_path / "text.safetensors"
    stage.export(denoiser_file, text_file)
    with safe_open(denoiser_file, "pt") as file:
        assert json.loads(file.metadata()["pixart_config"])["hidden_size"] == TINY.hidden_size
        assert all(file.get_tensor(name).dtype == torch.float16 for name in file.keys())
    denoiser, text = load_denoiser(denoiser_file), load_text_encoder(text_file)
    assert denoiser.config == TINY
    ids = torch.tensor([[END, PAD, PAD]])
    states = text(input_ids=ids, attention_mask=torch.tensor([[1, 0, 0]])).last_hidden_state[0]
    # Both went through fp16: 11 bits of states of up to about 4.
    torch.testing.assert_close(denoiser.y_embedder.y_embedding[:3], states, rtol=2e-3, atol=5e-3)


def test_training_goes_on_from_exported_weights(tmp_path):
    taught = denoiser_stage(tmp_path)
    for number in range(3):
        taught.step(number, 1.0, 0.9)
    files = tmp_path / "denoiser.safetensors", tmp_path / "text.safetensors"
    taught.export(*files)
    stage = half_denoiser_stage(tmp_path)
    stage.start_from(load_denoiser(files[0]), load_text_encoder(files[1]))
    for own, other in zip(stage.averaged(), taught.averaged(), strict=True):
        for name, value in other.state_dict().items():
            # Both went through fp16; the null caption is encoded anew.
            torch.testing.assert_close(own.state_dict()[name], value, rtol=1e-3, atol=2e-3, msg=name)
    before = stage.model["denoiser"].blocks[0].mlp.fc1.weight.detach().clone()
    losses = stage.step(0, 1.0, 0.0)
    moved = (stage.model["denoiser"].blocks[0].mlp.fc1.weight - before).abs().max()
    # One step of a 150th of the learning rate, all of whose numbers are of its size.
    assert 0 < moved < 1e-4 and losses["loss"] > 0


def test_bfloat16_gives_nearly_the_same_loss_and_gradients(tmp_path):
    one, other = (half_denoiser_stage(tmp_path) for _ in range(2))
    other.half = False
    losses = [stage.step(0, 1.0, 0.0) for stage in (one, other)]
    for name in ("loss", "gradient"):
        # bfloat16 has 8 bits.
        assert losses[0][name] == pytest.approx(losses[1][name], rel=0.03)


def test_plain_attention_is_the_models_own():
    q, k, v = (torch.randn(2, length, 24) for length in (6, 5, 5))
    mask = torch.zeros(2, 1, 1, 5)
    mask[0, ..., 3:] = torch.finfo(torch.float32).min
    torch.testing.assert_close(attend_plainly(q, k, v, 4, mask), attend(q, k, v, 4, mask))
    torch.testing.assert_close(attend_plainly(q, k, v, 4), attend(q, k, v, 4))


def test_text_batches_hold_every_kind_of_empty_caption():
    captions = ["a red circle on a white background"] * 200
    batch = make_text_batch(captions, words_tokenizer, Random(0), null_share=0.5)
    assert batch.ids.shape == batch.attended.shape == batch.kept.shape
    first = batch.ids[:, 0]
    rows = set(zip((first == END).tolist(), (first == PAD).tolist(), (batch.kept.sum(1) > 1).tolist(), strict=True))
    assert rows == {(False, False, True), (True, False, False), (True, False, True), (False, True, True)}
    assert not (batch.kept & (batch.attended == 0) & (batch.ids > END)).any()


def test_pool_is_repeatable_and_holds_nothing_held_out(tmp_path):
    pool, again = Pool(FULL, tmp_path), Pool(FULL, tmp_path / "new")
    bucket, scenes, latents = pool.draw(Random(1), 5)
    assert latents.shape == (5, 4, bucket.height_px // 8, bucket.width_px // 8)
    assert torch.equal(latents, again.draw(Random(1), 5)[2])
    assert scenes == again.draw(Random(1), 5)[1]
    assert not any(is_held_out(item) for part in pool.scenes for scene in part for item in scene.items)
    assert describe(scenes[0], Random(0))
    assert bucket_scenes(bucket, 0) != bucket_scenes(bucket, 1)


def test_timesteps_cover_the_range():
    drawn = draw_timesteps(20000, torch.Generator().manual_seed(0), 1000)
    assert drawn.min() == 0 and drawn.max() == 999
    assert 0.54 < drawn.float().mean() / 1000 < 0.56


def test_cosine_factor():
    assert cosine_factor(0.0, 0.4) == cosine_factor(0.4, 0.4) == 1.0
    assert cosine_factor(0.7, 0.4) == pytest.approx(0.51)
    assert cosine_factor(1.0, 0.4) == pytest.approx(0.02)
