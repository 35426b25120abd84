"""The transformer against the original's numbers, and on every input that a picture tool can send."""

import itertools

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.nn import functional as F

from pixart_pack.pixart.config import CONFIGS, PixArtConfig
from pixart_pack.pixart.layers import LENGTH_STEPS, LONG_SEQUENCE, attend, gather_heads, position_grid, split_heads
from pixart_pack.pixart.sampling import Captions, GuidedModel
from pixart_pack.pixart.transformer import PixArt, caption_bias, initialize_weights
from pixart_pack.tests.goldens import load_golden, take
from pixart_pack.tests.rounding import assert_equal_to_rounding

CASES = [
    "alpha_256",
    "alpha_512",
    "alpha_lewei2",
    "alpha_ms_512",
    "alpha_ms_1024",
    "sigma_256",
    "sigma_1024",
    "sigma_micro",
    "sigma_qknorm",
    "sigma_kvcompress",
]
POSITION_NOISE = 3e-8  # the original divides the positions in float32
TINY = PixArtConfig(
    depth=3, hidden_size=48, num_heads=4, caption_channels=32, caption_length=24, base_size=16, pe_scale=1.0
)


def config_of(case):
    """A golden's hyper-parameters, spelled as ours."""
    given = case["config"]
    compress = given.get("kv_compress_config") or {}
    return PixArtConfig(
        depth=given["depth"],
        hidden_size=given["hidden_size"],
        num_heads=given["num_heads"],
        caption_channels=given["caption_channels"],
        caption_length=given["model_max_length"],
        base_size=given["input_size"] // given["patch_size"],
        pe_scale=given.get("lewei_scale", given.get("pe_interpolation")),
        learn_sigma=given["pred_sigma"],
        micro_condition=given.get("micro_condition", given.get("class", case["class"]) == "PixArtMS"),
        qk_norm=given.get("qk_norm", False),
        kv_compress_ratio=compress.get("scale_factor", 1),
        kv_compress_layers=tuple(compress.get("kv_compress_layer", ())),
    )


def golden_runs():
    for name in CASES:
        case, _ = load_golden(f"transformer_{name}")
        for run in case["runs"]:
            if run.rsplit(".", 1)[1] in ("mask", "nomask"):
                yield name, run


def tiny_model(seed=0, **changes):
    """A tiny model with random weights everywhere, so that every path counts."""
    generator = torch.Generator().manual_seed(seed)
    model = PixArt(PixArtConfig(**{**TINY.__dict__, **changes})).eval()
    state = {k: torch.randn(v.shape, generator=generator) * 0.15 for k, v in model.state_dict().items()}
    model.load_state_dict(state)
    return model


def tiny_inputs(batch, height, width, lengths, seed=1):
    generator = torch.Generator().manual_seed(seed)
    latent = torch.randn(batch, 4, height, width, generator=generator)
    timestep = torch.rand(batch, generator=generator) * 999
    caption = torch.randn(batch, max(lengths), 32, generator=generator)
    mask = torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]
    return latent, timestep, caption, mask


@pytest.mark.parametrize(("name", "run"), list(golden_runs()))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
def test_matches_the_original(name, run, dtype):
    case, tensors = load_golden(f"transformer_{name}")
    size, masked = run.rsplit(".", 1)
    inputs = take(tensors, f"input.{size}")
    model = PixArt(config_of(case)).to(dtype).eval()
    model.load_state_dict(take(tensors, "weights"))
    with torch.no_grad():
        output = model(
            inputs["x"].to(dtype),
            inputs["timestep"].to(dtype),
            inputs["y"].squeeze(1).to(dtype),
            inputs["mask"].flatten(1).bool() if masked == "mask" else None,
            resolution=inputs["img_hw"].to(dtype) if "img_hw" in inputs else None,
            aspect_ratio=inputs["aspect_ratio"].to(dtype) if "aspect_ratio" in inputs else None,
        )
    if dtype == torch.float64:
        expected = tensors[f"output_f64.{run}"].double()
        relative = (output - expected).norm() / expected.norm()
        assert relative < 1e-6  # the reference is float64 stored as float32: 6e-8
    else:
        tight = case["tolerance"]["tight_atol_vs_output_f32"]
        torch.testing.assert_close(output, tensors[f"output.{run}"], atol=tight, rtol=0)


def test_position_grid_has_the_published_values():
    square = position_grid(64, 64, 1152, 64, 2.0)[0]
    published = {
        (1, 0): 0.47942554,
        (1, 1): 0.46555606,
        (1, 2): 0.45201316,
        (1, 288): 0.87758256,
        (64, 576): 0.47942554,
    }
    for (token, channel), value in published.items():
        assert square[token, channel].item() == pytest.approx(value, abs=POSITION_NOISE)
    assert square[1, 576:579].tolist() == [0, 0, 0]
    portrait = position_grid(72, 52, 1152, 64, 2.0)[0]
    assert portrait[1, 0].item() == pytest.approx(0.57727264, abs=POSITION_NOISE)
    assert portrait[52, 576].item() == pytest.approx(0.42995637, abs=POSITION_NOISE)


def test_positions_are_exact_in_half_precision_and_computed_once():
    model = tiny_model()
    exact = position_grid(8, 6, 48, 16, 1.0)
    for dtype in (torch.float16, torch.bfloat16):
        assert torch.equal(model.positions((8, 6), dtype, exact.device), exact.to(dtype))
    first = model.positions((8, 6), torch.float32, exact.device)
    assert model.positions((8, 6), torch.float32, exact.device) is first
    for size in range(1, 40):
        model.positions((size, 1), torch.float32, exact.device)
    assert len(model._positions) <= 8


def test_memory_for_positions_is_bounded(monkeypatch):
    model, one = tiny_model(), 8 * 6 * 48 * 4
    monkeypatch.setattr("pixart_pack.pixart.transformer.POSITION_CACHE_BYTES", 2 * one)
    tables = [model.positions((8, 6), torch.float32, torch.device("cpu"))]
    tables.append(model.positions((6, 8), torch.float32, torch.device("cpu")))
    assert [*model._positions.values()] == tables
    large = model.positions((16, 16), torch.float32, torch.device("cpu"))
    assert [*model._positions.values()] == [large]  # the size at hand is always kept


@pytest.mark.parametrize("length", [1, 7, 8, 9, 120])
def test_masks_lie_as_the_attention_of_a_gpu_wants_them(length):
    keep = torch.rand(3, length, generator=torch.Generator().manual_seed(length)) < 0.5
    bias = caption_bias(keep, torch.bfloat16)
    assert bias.shape == (3, 1, 1, length) and bias.stride(3) == 1
    assert all(bias.stride(axis) % 8 == 0 for axis in range(3))
    assert torch.equal(bias[:, 0, 0], torch.where(keep, 0.0, torch.finfo(torch.bfloat16).min).bfloat16())


@pytest.mark.parametrize("lengths", [(5, 2), (7, 7), (8, 1), (1, 9)])
@pytest.mark.parametrize("keep", [False, True])
@torch.no_grad()
def test_lengthened_captions_give_the_same(lengths, keep, monkeypatch):
    """As on a GPU, where lengths under a mask are rounded up: through the model, and through a guided step."""
    model, longest = tiny_model(), max(lengths)
    latent, timestep, caption, mask = tiny_inputs(2, 10, 7, list(lengths))
    caption, mask = caption[:, :longest], mask[:, :longest]
    each = [Captions(caption[[i], :n], mask[[i], :n]) for i, n in enumerate(lengths)]

    def results():
        guided = GuidedModel(model, *each, 3.0, keep=keep)
        found = [model(latent, timestep, caption, mask), guided(latent[:1], torch.tensor([2.5]))]
        found.append(guided._predict(latent[:1], torch.tensor(2.5), 1)[0])  # the first caption alone
        return guided.states.shape[1], found

    exact, expected = results()
    monkeypatch.setitem(LENGTH_STEPS, "cpu", 8)
    rounded, found = results()
    assert (exact, rounded) == (longest, longest if lengths[0] == lengths[1] else longest + -longest % 8)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)  # sums of more addends, some of them 0


@torch.no_grad()
def test_whole_timesteps_are_the_same_in_any_type():
    model = tiny_model()
    latent, _, caption, mask = tiny_inputs(2, 10, 7, [5, 2])
    whole = model(latent, torch.tensor([999, 20]), caption, mask)
    assert torch.equal(whole, model(latent, torch.tensor([999.0, 20.0]), caption, mask))


@pytest.mark.parametrize(("height", "width"), list(itertools.product((1, 2, 7, 8), (1, 6, 9))))
@torch.no_grad()
def test_any_latent_size(height, width):
    latent, timestep, caption, mask = tiny_inputs(2, height, width, [5, 2])
    output = tiny_model()(latent, timestep, caption, mask)
    assert output.shape == (2, 8, height, width)
    assert output.isfinite().all()


@torch.no_grad()
def test_odd_size_is_the_padded_one_cropped():
    model = tiny_model(micro_condition=False)
    latent, timestep, caption, mask = tiny_inputs(1, 7, 9, [5])
    padded = torch.nn.functional.pad(latent, (0, 1, 0, 1), mode="reflect")
    expected = model(padded, timestep, caption, mask)[:, :, :7, :9]
    torch.testing.assert_close(model(latent, timestep, caption, mask), expected, atol=0, rtol=0)


@torch.no_grad()
def test_batch_of_different_captions_equals_each_alone():
    model = tiny_model()
    lengths = [1, 7, 3, 12]
    latent, timestep, caption, mask = tiny_inputs(4, 8, 6, lengths)
    together = model(latent, timestep, caption, mask)
    for i, length in enumerate(lengths):
        alone = model(latent[i : i + 1], timestep[i : i + 1], caption[i : i + 1, :length])
        # Summation order differs with the batch: a few units in the last place of values up to about 10.
        torch.testing.assert_close(together[i : i + 1], alone, atol=2e-5, rtol=1e-5)


@torch.no_grad()
def test_padding_has_no_influence():
    model = tiny_model()
    latent, timestep, caption, mask = tiny_inputs(2, 8, 8, [4, 9])
    poisoned = torch.where(mask[..., None], caption, torch.full_like(caption, 1e4))
    expected = model(latent, timestep, caption, mask)
    torch.testing.assert_close(model(latent, timestep, poisoned, mask), expected, atol=0, rtol=0)


@torch.no_grad()
def test_fewer_rows_are_tiled():
    model = tiny_model()
    latent, timestep, caption, mask = tiny_inputs(4, 8, 8, [5, 3, 5, 3])
    latent, timestep = latent[:1].repeat(4, 1, 1, 1), timestep[:1]
    output = model(latent, timestep, caption[:2], mask[:2], resolution=torch.tensor([[64, 64]]))
    torch.testing.assert_close(output[:2], output[2:], atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="Batch mismatch: got 3 rows"):
        model(latent, timestep, caption[:3], mask[:3])


@torch.no_grad()
def test_a_caption_without_tokens_gives_no_nan():
    latent, timestep, caption, mask = tiny_inputs(1, 4, 4, [5])
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        output = tiny_model().to(dtype)(latent.to(dtype), timestep, caption.to(dtype), torch.zeros_like(mask))
        assert output.isfinite().all()


@torch.no_grad()
def test_size_defaults_to_the_latents_own():
    model = tiny_model()
    latent, timestep, caption, mask = tiny_inputs(2, 6, 8, [5, 5])
    named = model(latent, timestep, caption, mask, torch.tensor([[48.0, 64.0]]), torch.tensor([[0.75]]))
    torch.testing.assert_close(model(latent, timestep, caption, mask), named, atol=1e-6, rtol=1e-6)
    other = model(latent, timestep, caption, mask, torch.tensor([[96.0, 64.0]]))
    assert (other - named).abs().max() > 1e-3


@torch.no_grad()
def test_control_is_added_before_the_next_block():
    model = tiny_model()
    latent, timestep, caption, mask = tiny_inputs(1, 8, 8, [5])
    plain = model(latent, timestep, caption, mask)
    zeros = [torch.zeros(1, 16, 48)] * 2
    assert torch.equal(model(latent, timestep, caption, mask, control=zeros), plain)
    seen = []
    model.blocks[1].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(latent, timestep, caption, mask)
    model(latent, timestep, caption, mask, control=[torch.ones(1, 16, 48), None])
    torch.testing.assert_close(seen[1] - seen[0], torch.ones(1, 16, 48), atol=1e-5, rtol=0)


def test_sigma_loads_without_null_caption_and_ignores_a_foreign_grid():
    model = tiny_model()
    state = model.state_dict()
    state["pos_embed"] = torch.zeros(1, 4096, 48)
    model.load_state_dict(state)
    assert model.has_null_caption
    del state["y_embedder.y_embedding"]
    model.load_state_dict(state)
    assert not model.has_null_caption
    state["blocks.0.unknown"] = torch.zeros(1)
    with pytest.raises(RuntimeError, match=r"blocks\.0\.unknown"):
        model.load_state_dict(state)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"latent": torch.zeros(1, 16, 8, 8)}, r"Latent shape mismatch: got \(1, 16, 8, 8\)"),
        ({"caption": torch.zeros(1, 5, 768)}, "Caption width mismatch: got 768, expected 32"),
        ({"caption_mask": torch.ones(1, 9)}, "Caption mask length mismatch: got 9, expected 5"),
    ],
)
def test_wrong_shapes_say_what_to_do(change, message):
    latent, timestep, caption, mask = tiny_inputs(1, 8, 8, [5])
    inputs = {"latent": latent, "timestep": timestep, "caption": caption, "caption_mask": mask, **change}
    with pytest.raises(ValueError, match=message):
        tiny_model()(**inputs)


def test_config_refuses_impossible_widths():
    for change, message in (
        ({"num_heads": 5}, "Attention width mismatch"),
        ({"hidden_size": 50, "num_heads": 5}, "Position grid width mismatch"),
        ({"hidden_size": 64}, "Size embedder width mismatch"),
    ):
        with pytest.raises(ValueError, match=message):
            PixArtConfig(**{**TINY.__dict__, **change})


@pytest.mark.slow
def test_full_size_parameter_counts():
    published = {"alpha-256": 610_856_096, "alpha-1024": 611_349_152, "sigma-2048": 610_856_096}
    for name, count in published.items():
        model = PixArt(CONFIGS[name], device="meta")
        assert sum(p.numel() for p in model.parameters()) == count
    assert set(CONFIGS) == {
        "alpha-256", "alpha-512", "alpha-1024", "sigma-256", "sigma-512", "sigma-1024", "sigma-2048",
    }  # fmt: skip


def test_a_fresh_model_predicts_nothing_and_learns():
    torch.manual_seed(0)
    model = PixArt(TINY)
    initialize_weights(model, torch.Generator().manual_seed(0))
    latent, timestep, caption, mask = tiny_inputs(2, 8, 8, [5, 3])
    output = model(latent, timestep, caption, mask)
    assert not output.any()
    (model(latent, timestep, caption, mask)[:, :4] - latent).square().mean().backward()
    assert model.final_layer.linear.weight.grad.abs().max() > 0


@torch.no_grad()
def test_matches_the_original_under_guidance():
    """One caption's mask over both halves, as the original's scripts do it."""
    case, tensors = load_golden("transformer_alpha_256")
    inputs = take(tensors, "input.32x32")
    model = PixArt(config_of(case)).eval()
    model.load_state_dict(take(tensors, "weights"))
    latent = inputs["x"][:1].repeat(2, 1, 1, 1)
    null = model.y_embedder.y_embedding[None]
    caption = torch.cat([inputs["y"].squeeze(1)[:1], null])
    conditional, unconditional = model(latent, inputs["timestep"][:1], caption, inputs["mask"].flatten(1)[:1]).chunk(2)
    guided = unconditional[:, :3] + 4.5 * (conditional[:, :3] - unconditional[:, :3])
    expected = tensors["output.32x32.forward_with_cfg"]
    # Guidance multiplies the noise of one forward (2e-5) by up to 2 * 4.5 - 1.
    torch.testing.assert_close(guided, expected[:1, :3], atol=1.6e-4, rtol=1e-5)
    torch.testing.assert_close(conditional[:, 3:], expected[:1, 3:], atol=2e-5, rtol=0)


def rows_and_caption(config, batch=2, length=9):
    generator = torch.Generator().manual_seed(4)
    latent = torch.randn(batch, 4, 6, 8, generator=generator)
    states = torch.randn(batch, length, config.caption_channels, generator=generator)
    return latent, states, torch.arange(length) < torch.tensor([[length], [3]])


@pytest.mark.parametrize("keep_keys", [True, False])
def test_projected_caption_changes_nothing(keep_keys):
    model = tiny_model()
    latent, states, mask = rows_and_caption(TINY)
    with torch.no_grad():
        projected = model.project_caption(states, keep_keys=keep_keys)
        assert (projected.keys_values is not None) == keep_keys
        for time in (3.0, 900.0):
            timestep = torch.full((2,), time)
            expected = model(latent, timestep, states, mask)
            assert torch.equal(model(latent, timestep, projected, mask), expected)
        one = model.project_caption(states[:1], keep_keys=keep_keys)
        # The keys of one row against those of two; two kinds of kernels were measured 33 units apart.
        assert_equal_to_rounding(model(latent, timestep, one), model(latent, timestep, states[:1]), units=128)


def test_projected_caption_gives_gradients():
    model = tiny_model()
    latent, states, _ = rows_and_caption(TINY)
    states.requires_grad_()
    model(latent, torch.full((2,), 5.0), model.project_caption(states)).sum().backward()
    assert states.grad.abs().sum() > 0
    assert all(parameter.grad is not None for parameter in model.blocks.parameters())


def test_projected_caption_of_another_width_is_refused():
    with pytest.raises(ValueError, match="Caption width mismatch: got 16, expected 32"):
        PixArt(TINY).project_caption(torch.zeros(1, 4, 16))


@pytest.mark.parametrize("micro_condition", [False, True])
def test_rows_that_are_alike_are_modulated_at_once(micro_condition, monkeypatch):
    """The same prediction as with a modulation of its own for every row, but for float noise."""
    model = tiny_model(micro_condition=micro_condition)
    latent, states, mask = rows_and_caption(TINY)
    timestep, sizes, ratios = torch.full((2,), 400.5), torch.tensor([[64, 48]] * 2), torch.full((2, 1), 1.3)
    with torch.no_grad():
        assert model.embed_condition(latent, timestep, sizes, ratios).shape[0] == 1
        differing = torch.tensor([[64, 48], [64, 56]])
        assert model.embed_condition(latent, timestep, differing, ratios).shape[0] == 1 + micro_condition
        together = model(latent, timestep, states, mask, sizes, ratios)
        monkeypatch.setattr("pixart_pack.pixart.transformer.common_row", lambda values: values)
        apart = model(latent, timestep, states, mask, sizes, ratios)
    torch.testing.assert_close(together, apart, atol=1e-5, rtol=0)  # float32, values of a few units


def test_rows_from_one_are_known_to_be_alike_without_a_look(monkeypatch):
    """As on a GPU, where a look would wait."""
    monkeypatch.setattr(torch, "equal", lambda *_: pytest.fail("compared"))
    model, (latent, _, _) = tiny_model(), rows_and_caption(TINY)
    sizes, ratios = torch.tensor([[64.0, 48.0]]), torch.tensor([[1.3]])
    one, expanded = torch.tensor([400.5]), torch.tensor([400.5]).expand(2)
    with torch.no_grad():
        found = model.embed_condition(latent, one, sizes, ratios)
        assert found.shape[0] == 1
        again = model.embed_condition(latent, expanded, sizes.expand(2, -1), ratios.expand(2, -1))
    assert torch.allclose(again, found, atol=0) and again.shape == found.shape


def test_tokens_are_contiguous():
    """Every norm behind would copy another layout first."""
    model = PixArt(TINY)
    tokens, _ = model.embed_latent(torch.randn(2, 4, 6, 8))
    assert tokens.is_contiguous()


def test_only_the_wanted_channels_are_put_together():
    model = tiny_model()
    latent, _, _ = rows_and_caption(TINY)
    with torch.no_grad():
        tokens, grid = model.embed_latent(latent)
        condition = model.embed_condition(latent, torch.full((2,), 1.0))
        whole = model.project(tokens, condition, grid, latent.shape)
        assert torch.equal(model.project(tokens, condition, grid, latent.shape, channels=4), whole[:, :4])


@pytest.mark.parametrize("tokens", [LONG_SEQUENCE - 1, LONG_SEQUENCE])
def test_attention_over_long_sequences_is_laid_out_anew_and_the_same(tokens):
    q, k, v = torch.randn(1, tokens, 3 * 16, generator=torch.Generator().manual_seed(0)).chunk(3, dim=2)
    heads = [split_heads(each, 4) for each in (q, k, v)]
    assert gather_heads(heads[1]).is_contiguous() == (tokens >= LONG_SEQUENCE)
    expected = F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
    torch.testing.assert_close(attend(q, k, v, 4), expected, atol=1e-6, rtol=0)


@pytest.mark.slow
def test_a_compiled_model_is_compiled_once():
    model, counter = PixArt(TINY).eval(), CompileCounter()
    compiled = torch.compile(model, backend=counter)
    given = torch.randn(2, 4, 6, 8), torch.tensor([500.0]), torch.randn(2, 5, TINY.caption_channels)
    with torch.inference_mode():
        found = [compiled(*given) for _ in range(3)]
        torch.testing.assert_close(found[2], model(*given))
    assert counter.frame_count == 1


@pytest.mark.parametrize("ratio", [2, 4])
@pytest.mark.parametrize("side", [(1, 1), (2, 2), (1, 9), (3, 5)])
def test_compressed_keys_of_a_picture_smaller_than_their_window(ratio, side):
    config = PixArtConfig(
        depth=1, hidden_size=48, num_heads=4, caption_channels=8, base_size=16, micro_condition=False,
        kv_compress_ratio=ratio, kv_compress_layers=(0,),
    )  # fmt: skip
    torch.manual_seed(0)
    model = PixArt(config).eval()
    initialize_weights(model)
    latent = torch.randn(1, 4, *side)
    with torch.no_grad():
        assert model(latent, torch.tensor([5.0]), torch.randn(1, 3, 8)).shape == (1, 8, *side)
        tokens = torch.randn(1, 1, 48)
        alone = model.blocks[0].attn.compress_tokens(tokens, (1, 1))  # the average of one token is the token
        torch.testing.assert_close(alone, model.blocks[0].attn.norm(tokens), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("mask_rows", [1, 2])
def test_what_is_not_finite_behind_a_mask_is_hidden(value, mask_rows):
    torch.manual_seed(0)
    model = PixArt(TINY).eval()
    latent, caption = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 32)
    mask = torch.tensor([[True, True, True, False, False]]).expand(mask_rows, -1)
    broken = caption.clone()
    broken[:, 3:] = value
    with torch.no_grad():
        outputs = [model(latent, torch.full((2,), 5.0), states, mask) for states in (caption, broken)]
    assert torch.equal(*outputs) and outputs[0].isfinite().all()


def test_tokens_that_somebody_holds_are_not_written_into():
    """Blocks write into their tokens where nobody else can hold them; a hook may, and a caller of a block does."""
    model, held = tiny_model(), []
    latent, caption = torch.randn(2, 4, 8, 8), torch.randn(2, 5, model.config.caption_channels)
    given = latent, torch.tensor([500.0]), caption
    with torch.no_grad():
        expected = model(*given)
        hooks = [
            block.register_forward_hook(
                lambda _module, args, out: held.append((args[0], args[0].clone(), out, out.clone()))
            )
            for block in model.blocks
        ]
        assert torch.equal(model(*given), expected)
        for before, before_then, after, after_then in held:
            assert torch.equal(before, before_then) and torch.equal(after, after_then)
        for hook in hooks:
            hook.remove()
        x, grid = model.embed_latent(latent)
        condition = model.embed_condition(latent, given[1])
        inputs = model.prepare_blocks(x, grid, condition, caption, None, model.attention)
        before = x.clone()
        inputs.run_block(model.blocks[0], x, 0)
        inputs._replace(overwrites=True).run_copy(model.blocks[0], x)
        assert torch.equal(x, before)
