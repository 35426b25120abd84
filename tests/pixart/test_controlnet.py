"""The ControlNet against the original's numbers, and over every base that it may steer."""

import pytest
import torch

from pixart_pack.pixart.config import CONFIGS
from pixart_pack.pixart.controlnet import PixArtControlNet
from pixart_pack.pixart.transformer import PixArt
from pixart_pack.tests.goldens import load_golden, take
from pixart_pack.tests.pixart.test_transformer import config_of, tiny_inputs, tiny_model

CASES = ["controlnet_half_512", "controlnet_half_2copies", "controlnet_ms_half_1024"]
RUNS = ["c", "c_none", "c_one_row", "c_nomask"]


def golden_models(name, dtype):
    case, tensors = load_golden(name)
    given = {**case, "class": case["base_class"]}
    base = PixArt(config_of(given)).to(dtype).eval()
    base.load_state_dict(take(tensors, "weights.base_model"))
    control = PixArtControlNet(base.config, case["copy_blocks_num"]).to(dtype).eval()
    control.load_state_dict(take(tensors, "weights.controlnet"))
    return case, tensors, base, control


def golden_inputs(tensors, run, dtype):
    inputs = take(tensors, "input")
    given = {
        "latent": inputs["x"].to(dtype),
        "timestep": inputs["timestep"].to(dtype),
        "caption": inputs["y"].squeeze(1).to(dtype),
        "caption_mask": None if run == "c_nomask" else inputs["mask"].bool(),
        "resolution": inputs["img_hw"].to(dtype) if "img_hw" in inputs else None,
        "aspect_ratio": inputs["aspect_ratio"].to(dtype) if "aspect_ratio" in inputs else None,
    }
    condition = {"c_none": None, "c_one_row": inputs["c"][:1]}.get(run, inputs["c"])
    return given, None if condition is None else condition.to(dtype)


def tiny_control(base, num_copies, seed=2):
    """A control branch with random weights everywhere."""
    control = PixArtControlNet(base.config, num_copies).eval()
    generator = torch.Generator().manual_seed(seed)
    state = {k: torch.randn(v.shape, generator=generator) * 0.15 for k, v in control.state_dict().items()}
    control.load_state_dict(state)
    return control


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("attached", [False, True], ids=["residuals", "attached"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
def test_matches_the_original(name, run, attached, dtype):
    case, tensors, base, control = golden_models(name, dtype)
    given, condition = golden_inputs(tensors, run, dtype)
    with torch.no_grad():
        if condition is None:
            steering = None
        elif attached:
            steering = control.attach(base, condition)
        else:
            steering = control(base, condition=condition, **given)
        output = base(**given, control=steering)
    if dtype == torch.float64:
        expected = tensors[f"output_f64.{run}"].double()
        relative = (output - expected).norm() / expected.norm()
        assert relative < 1e-6  # the reference is float64 stored as float32: 6e-8
    else:
        tight = case["tolerance"]["tight_atol_vs_output_f32"]
        torch.testing.assert_close(output, tensors[f"output.{run}"], atol=tight, rtol=0)


def test_the_goldens_tell_control_from_none():
    _, tensors, _, _ = golden_models(CASES[0], torch.float32)
    assert (tensors["output.c"] - tensors["output.c_none"]).std() > 0.1


@pytest.mark.parametrize("num_copies", [1, 2])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"micro_condition": False},
        {"qk_norm": True},
        {"kv_compress_ratio": 2, "kv_compress_layers": (0, 1)},
        {"vae_scale": CONFIGS["sigma-512"].vae_scale, "micro_condition": False, "pe_scale": 0.5},
    ],
    ids=["multi-scale", "single-scale", "qk norm", "compressed", "sigma"],
)
def test_attached_equals_residuals_over_any_base(changes, num_copies):
    base = tiny_model(**changes)
    control = tiny_control(base, num_copies)
    latent, timestep, caption, mask = tiny_inputs(2, 12, 8, [3, 7])
    condition = torch.randn(2, 4, 12, 8, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        plain = base(latent, timestep, caption, mask)
        residuals = control(base, latent, timestep, caption, condition, mask)
        steered = base(latent, timestep, caption, mask, control=residuals)
        attached = base(latent, timestep, caption, mask, control=control.attach(base, condition))
    assert [tuple(r.shape) for r in residuals] == [(2, 24, 48)] * num_copies
    assert torch.equal(attached, steered)
    assert (steered - plain).abs().max() > 1e-2


def test_odd_sizes_and_one_condition_for_a_batch():
    base = tiny_model()
    control = tiny_control(base, 2)
    latent, timestep, caption, mask = tiny_inputs(4, 11, 7, [1, 9, 4, 2])
    condition = torch.randn(1, 4, 11, 7, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        one = base(latent, timestep, caption, mask, control=control.attach(base, condition))
        four = base(latent, timestep, caption, mask, control=control.attach(base, condition.repeat(4, 1, 1, 1)))
    assert one.shape == (4, 8, 11, 7)
    torch.testing.assert_close(one, four, atol=1e-5, rtol=0)  # one row or four: another order of the sums


def test_conditions_are_tiled_as_guidance_stacks_them():
    base = tiny_model()
    control = tiny_control(base, 2)
    latent, timestep, caption, mask = tiny_inputs(4, 8, 8, [1, 9, 4, 2])
    condition = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        two = control(base, latent, timestep, caption, condition, mask)
        four = control(base, latent, timestep, caption, torch.cat([condition, condition]), mask)
    assert all(torch.allclose(ours, theirs, atol=1e-5) for ours, theirs in zip(two, four, strict=True))
    with pytest.raises(ValueError, match="got 3 rows of conditioning, expected 4"):
        control(base, latent, timestep, caption, condition[[0, 1, 0]], mask)


def test_the_first_block_and_the_embeddings_run_once():
    base = tiny_model()
    control = tiny_control(base, 2)
    calls = []
    base.blocks[0].register_forward_hook(lambda *_: calls.append("block"))
    base.t_embedder.register_forward_hook(lambda *_: calls.append("time"))
    base.y_embedder.register_forward_hook(lambda *_: calls.append("caption"))
    base.x_embedder.register_forward_hook(lambda *_: calls.append("patches"))
    latent, timestep, caption, mask = tiny_inputs(1, 8, 8, [3])
    with torch.no_grad():
        base(latent, timestep, caption, mask, control=control.attach(base, latent))
    assert sorted(calls) == ["block", "caption", "patches", "patches", "time"]  # patches of latent and condition


def test_an_attached_branch_serves_every_step():
    base = tiny_model()
    control = tiny_control(base, 2)
    latent, timestep, caption, mask = tiny_inputs(1, 8, 8, [3])
    steering = control.attach(base, latent)
    with torch.no_grad():
        for time in (timestep, timestep / 2, timestep):
            expected = control(base, latent, time, caption, latent, mask)
            given = base(latent, time, caption, mask, control=steering)
            assert torch.equal(given, base(latent, time, caption, mask, control=expected))


def test_captions_are_read_once_while_the_base_keeps_them():
    base = tiny_model()
    control = tiny_control(base, 2)
    reads = []
    for block in control.controlnet:
        block.copied_block.cross_attn.kv_linear.register_forward_hook(lambda *_: reads.append(1))
    latent, timestep, caption, mask = tiny_inputs(2, 8, 8, [3, 5])
    steering = control.attach(base, latent)
    with torch.no_grad():
        expected = base(latent, timestep, caption, mask, control=control.attach(base, latent))
        reads.clear()
        for _ in range(2):
            kept = base.project_caption(caption)
            for _ in range(3):
                assert torch.equal(base(latent, timestep, kept, mask, control=steering), expected)
    assert len(reads) == 2 * 2  # once for each copy and each caption that the base keeps
    steering[0].func.__self__.captions.clear()
    reads.clear()
    with torch.no_grad():  # neither raw captions nor tiled ones are kept
        base(latent, timestep, caption, mask, control=steering)
        one = base.project_caption(caption[:1])
        for _ in range(2):
            base(latent, timestep, one, mask[:1], control=steering)
    assert len(reads) == 2 * 3 and not list(steering[0].func.__self__.captions.items())


def test_a_fresh_branch_changes_nothing():
    base = tiny_model()
    control = PixArtControlNet.from_base(base)
    assert control.num_copies == 2  # all that a base of three blocks allows
    latent, timestep, caption, mask = tiny_inputs(2, 8, 8, [3, 5])
    with torch.no_grad():
        plain = base(latent, timestep, caption, mask)
        steered = base(latent, timestep, caption, mask, control=control.attach(base, latent))
    assert torch.equal(plain, steered)
    for block, original in zip(control.controlnet, base.blocks, strict=False):
        for name, tensor in original.state_dict().items():
            copied = block.copied_block.state_dict()[name]
            assert torch.equal(copied, tensor) and copied.data_ptr() != tensor.data_ptr()


def test_gradients_reach_the_branch_and_checkpointing_keeps_them():
    base = tiny_model().requires_grad_(False)
    control = tiny_control(base, 2)
    latent, timestep, caption, mask = tiny_inputs(1, 8, 8, [3])

    def gradients():
        control.zero_grad()
        base(latent, timestep, caption, mask, control=control.attach(base, latent)).square().mean().backward()
        return [parameter.grad.clone() for parameter in control.parameters()]

    plain = gradients()
    for block in control.controlnet:
        inner = block.forward
        block.forward = lambda *args, inner=inner: torch.utils.checkpoint.checkpoint(inner, *args, use_reentrant=False)
    for ours, theirs in zip(gradients(), plain, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert all(gradient.abs().max() > 0 for gradient in plain)
    assert all(parameter.grad is None for parameter in base.parameters())


def test_names_are_the_original_files():
    control = tiny_control(tiny_model(), 2)
    names = set(control.state_dict())
    assert "controlnet.0.before_proj.weight" in names and "controlnet.1.before_proj.weight" not in names
    assert "controlnet.1.copied_block.cross_attn.kv_linear.bias" in names
    again = PixArtControlNet(control.config, 2)
    again.load_state_dict({name.removeprefix("controlnet."): tensor for name, tensor in control.state_dict().items()})
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in control.state_dict().items())
    with pytest.raises(RuntimeError, match="Unexpected"):
        again.load_state_dict({**control.state_dict(), "2.after_proj.weight": torch.zeros(48, 48)})


def test_heads_are_those_of_the_base():
    base = tiny_model(num_heads=2)
    guessed, known = tiny_control(tiny_model(), 2), tiny_control(base, 2)
    latent, timestep, caption, mask = tiny_inputs(1, 8, 8, [3])
    for other in (guessed, known):
        other.residual = other(base, latent, timestep, caption, latent, mask)[1]
    assert torch.equal(guessed.residual, known.residual)


@pytest.mark.parametrize("num_copies", [0, 3, 13])
def test_refuses_more_copies_than_the_base_allows(num_copies):
    with pytest.raises(ValueError, match=rf"copied blocks: got {num_copies}, expected 1 to 2"):
        PixArtControlNet(tiny_model().config, num_copies)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 96}, "got hidden_size 48, expected 96"),
        ({"kv_compress_ratio": 2, "kv_compress_layers": (1,)}, r"got kv_compress_ratio \[1, 1\], expected \[1, 2\]"),
        ({"qk_norm": True}, "got qk_norm False, expected True"),
        ({"depth": 2}, "got 2 copied blocks over a base model of 2, expected at most 1"),
    ],
)
def test_refuses_another_base(changes, message):
    control = tiny_control(tiny_model(), 2)
    other = tiny_model(**changes)
    with pytest.raises(ValueError, match=message):
        control.attach(other, torch.zeros(1, 4, 8, 8))
