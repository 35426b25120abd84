"""PixArt's ControlNet as the host's CONTROL_NET, in this process: what it computes and with what it combines."""

import importlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pixart_pack.demo.train import VAE_FILE
from pixart_pack.pixart.controlnet import PixArtControlNet
from pixart_pack.pixart.weights.controlnets import save_controlnet
from pixart_pack.tests.gguf_files import matrices, write_gguf
from pixart_pack.tests.host.test_model import caption, count_forwards, sample
from pixart_pack.tests.tiny_pixart import make_model, make_weights, tiny_config

CONFIG = tiny_config(depth=4)
COPIES = 2
NOISE = 2e-3  # cfg 4.5 and sigma 157 multiply the network's float32 noise in the first step


def control_weights(config=CONFIG, seed=3, copies=COPIES):
    """Random everywhere, and strong enough to be seen."""
    generator = torch.Generator().manual_seed(seed)
    shapes = PixArtControlNet(config, copies, device="meta").state_dict()
    return {name: torch.randn(like.shape, generator=generator) * 0.15 for name, like in shapes.items()}


def zeroed(weights):
    return {
        name: torch.zeros_like(t) if "_proj." in name.split("copied_block")[0] else t for name, t in weights.items()
    }


@pytest.fixture(scope="module")
def adapter(pack):
    return importlib.import_module("pixart_pack.nodes.host.controlnet")


@pytest.fixture(scope="module")
def host_model(pack):
    return importlib.import_module("pixart_pack.nodes.host.denoiser.model")


@pytest.fixture(scope="module")
def patcher(host_model):
    return host_model.make_patcher(make_weights(CONFIG), CONFIG, dtype=torch.float32)


@pytest.fixture(scope="module")
def vae(pack):
    return importlib.import_module("pixart_pack.nodes.host.loading").read_vae(VAE_FILE)


@pytest.fixture
def make_control(adapter, tmp_path):
    """A function that writes a ControlNet and loads it: make_control(weights, dtype) -> CONTROL_NET."""

    def make(weights=None, dtype=torch.float32, config=CONFIG, name="edges"):
        save_controlnet(tmp_path / f"{name}.safetensors", weights or control_weights(config), config)
        return adapter.make_control(adapter.read_controlnet(tmp_path / f"{name}.safetensors"), dtype)

    return make


def picture(seed=0, size=(9, 13), batch=1):
    """A hint as large as the latent's picture, (B, H, W, 3)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(batch, size[0] * 8, size[1] * 8, 3, generator=generator).round()


def prompts(lengths=(12, 3)):
    return caption(lengths[0], 1, keep=lengths[0] - 2), caption(lengths[1], 2)


def apply(adapter, control, vae, hint=None, conds=None, strength=1.0, start=0.0, end=1.0):
    positive, negative = conds or prompts()
    hint = picture() if hint is None else hint
    found = adapter.apply_control([positive], [negative], control, hint, vae, strength, start, end)
    return found[0][0], found[1][0]


def watch(model):
    """A clone of the MODEL, and a list of (x, timesteps, context, control, conds, prediction) of each forward."""
    extension = importlib.import_module("comfy.patcher_extension")
    seen, clone = [], model.clone()

    def note(executor, x, timesteps, context, control, options, **conds):
        out = executor(x, timesteps, context, control, options, **conds)
        seen.append((x, timesteps, context, control, conds, out))
        return out

    clone.add_wrapper_with_key(extension.WrappersMP.DIFFUSION_MODEL, "watch", note)
    return clone, seen


def plain_prediction(seen, branches, base_weights=None):
    """The same forward outside any host. branches: pairs of control weights and hint latent (rows as x's)."""
    x, timesteps, context, _, conds, _ = seen
    base = make_model(CONFIG)
    if base_weights is not None:
        base.load_state_dict(base_weights)
    residuals = None
    for weights, hint in branches:
        control = PixArtControlNet(CONFIG, COPIES).eval()
        control.load_state_dict(weights)
        found = control(
            base, x, timesteps, context, hint, conds["attention_mask"], conds["c_size"].float(),
            (conds["c_ar"].double() / 1_000_000).float(),
        )  # fmt: skip
        residuals = found if residuals is None else [one + other for one, other in zip(residuals, found, strict=True)]
    return base(x, timesteps, context, conds["attention_mask"], conds["c_size"].float(),
                (conds["c_ar"].double() / 1_000_000).float(), control=residuals)[:, :4]  # fmt: skip


@pytest.fixture
def reads():
    """A function that gives a list, which grows whenever a copy in this CONTROL_NET reads a caption anew."""

    def watch_reads(control):
        calls = []
        for block in control.control_model.controlnet:
            block.copied_block.cross_attn.kv_linear.register_forward_hook(lambda *_: calls.append(1))
        return calls

    return watch_reads


def forget_captions(patcher, monkeypatch):
    monkeypatch.setattr(patcher.model, "_remember", lambda caption: None)


def test_captions_are_read_once_a_run(comfy, adapter, patcher, vae, make_control, reads, monkeypatch):
    control = make_control()
    calls = reads(control)
    conds = apply(adapter, control, vae)
    kept = sample(comfy, patcher, *conds, steps=4, batch=2)
    assert len(calls) == COPIES and not list(control.control_model.captions.items())
    assert torch.equal(sample(comfy, patcher, *conds, steps=4, batch=2), kept)
    assert len(calls) == COPIES * 2  # every run reads its own
    other = apply(adapter, control, vae, conds=(caption(12, 8), caption(3, 2)))
    changed = sample(comfy, patcher, *other, steps=4, batch=2)
    forget_captions(patcher, monkeypatch)
    torch.testing.assert_close(kept, sample(comfy, patcher, *conds, steps=4, batch=2), atol=NOISE, rtol=1e-4)
    torch.testing.assert_close(changed, sample(comfy, patcher, *other, steps=4, batch=2), atol=NOISE, rtol=1e-4)
    assert len(calls) == COPIES * (3 + 4 + 4)
    assert (changed - kept).abs().max() > 0.1


def test_other_weights_and_patches_are_read_anew(comfy, adapter, patcher, vae, make_control, reads, monkeypatch):
    control = make_control()
    conds = apply(adapter, control, vae)
    plain = sample(comfy, patcher, *conds)
    weight = control.control_model.controlnet[1].copied_block.cross_attn.kv_linear.weight
    weight.mul_(1.5)
    weighty = sample(comfy, patcher, *conds)
    assert (weighty - plain).abs().max() > 0.1
    patched = patcher.clone()
    patched.set_model_patch(lambda args: {**args, "txt": args["txt"] * 0.5}, "post_input")
    calls = reads(control)
    halved = sample(comfy, patched, *conds)
    assert len(calls) == COPIES * 2  # two steps: a caption that a patch has changed is not kept
    forget_captions(patcher, monkeypatch)
    torch.testing.assert_close(weighty, sample(comfy, patcher, *conds), atol=NOISE, rtol=1e-4)
    torch.testing.assert_close(halved, sample(comfy, patched, *conds), atol=NOISE, rtol=1e-4)
    assert (halved - weighty).abs().max() > 0.1


def test_copies_compress_where_their_blocks_do(comfy, adapter, patcher, vae, make_control, monkeypatch):
    acceleration, attention = (
        importlib.import_module(f"pixart_pack.nodes.host.denoiser.{n}") for n in ("acceleration", "attention")
    )
    keys, attend = [], attention._host_attend

    def note(options, q, k, *rest, **named):
        keys.append(k.shape[1])
        return attend(options, q, k, *rest, **named)

    monkeypatch.setattr(attention, "_host_attend", note)
    model = acceleration.compress_attention(patcher, 2, "every other", 0.0, 1.0)
    sample(comfy, model, *apply(adapter, make_control(), vae, picture(size=(8, 8))), size=(8, 8), steps=1)
    assert keys[::2] == [16, 16, 4, 4, 16, 4]  # two blocks, each before its copy, and two more


def encode(vae, hint):
    with torch.inference_mode():
        return vae.encode(hint) * CONFIG.vae_scale


@pytest.mark.parametrize("size", [(8, 8), (9, 13)])
def test_equals_the_plain_control(comfy, adapter, patcher, vae, make_control, size):
    hint = picture(size=size)
    model, seen = watch(patcher)
    sample(comfy, model, *apply(adapter, make_control(), vae, hint), size=size)
    assert [tuple(each[0].shape) for each in seen] == [(2, 4, *size)] * 2  # both prompts in one forward
    with torch.inference_mode():
        expected = plain_prediction(seen[0], [(control_weights(), encode(vae, hint))])
        torch.testing.assert_close(seen[0][-1], expected, atol=2e-5, rtol=0)
        assert (seen[0][-1] - plain_prediction(seen[0], [])).abs().max() > 0.1


def test_two_chained_add_up_with_their_strengths(comfy, adapter, patcher, vae, make_control):
    one, other = control_weights(seed=3), control_weights(seed=4)
    model, seen = watch(patcher)
    conds = apply(adapter, make_control(one), vae, picture(1), strength=0.5)
    conds = apply(adapter, make_control(other, name="other"), vae, picture(2), conds, strength=1.5)
    sample(comfy, model, *conds)

    def scaled(weights, strength):
        return {n: t * strength if "after_proj" in n else t for n, t in weights.items()}

    with torch.inference_mode():
        branches = [(scaled(one, 0.5), encode(vae, picture(1))), (scaled(other, 1.5), encode(vae, picture(2)))]
        torch.testing.assert_close(seen[0][-1], plain_prediction(seen[0], branches), atol=5e-5, rtol=0)


def test_the_same_net_twice_with_two_hints(comfy, adapter, patcher, vae, make_control):
    control = make_control()
    model, seen = watch(patcher)
    conds = apply(adapter, control, vae, picture(1))
    sample(comfy, model, *apply(adapter, control, vae, picture(2), conds))
    with torch.inference_mode():
        branches = [(control_weights(), encode(vae, picture(seed))) for seed in (1, 2)]
        torch.testing.assert_close(seen[0][-1], plain_prediction(seen[0], branches), atol=5e-5, rtol=0)


def test_a_batch_of_hints_over_guidance(comfy, adapter, patcher, vae, make_control):
    hints = picture(batch=2)
    model, seen = watch(patcher)
    together = sample(comfy, model, *apply(adapter, make_control(), vae, hints), batch=2)
    assert [len(each[0]) for each in seen] == [4, 4]
    with torch.inference_mode():
        expected = plain_prediction(seen[0], [(control_weights(), encode(vae, hints).repeat(2, 1, 1, 1))])
    torch.testing.assert_close(seen[0][-1], expected, atol=2e-5, rtol=0)
    assert together.shape == (2, 4, 9, 13)
    four = sample(comfy, patcher, *apply(adapter, make_control(), vae, picture()), batch=4)
    assert four.isfinite().all()


def test_strength_zero_and_fresh_weights_give_the_picture_of_none(
    comfy, core_nodes, adapter, patcher, vae, make_control
):
    none = sample(comfy, patcher, *prompts())
    assert torch.equal(sample(comfy, patcher, *apply(adapter, make_control(), vae, strength=0.0)), none)
    assert torch.equal(sample(comfy, patcher, *apply(adapter, make_control(zeroed(control_weights())), vae)), none)
    conds = apply(adapter, make_control(), vae)
    conds[0][1]["control"].strength = 0.0  # as a strength that a schedule brings to zero
    assert torch.equal(sample(comfy, patcher, *conds), none)
    assert not torch.equal(sample(comfy, patcher, *apply(adapter, make_control(), vae)), none)


def test_the_hosts_apply_node_does_the_same(comfy, core_nodes, adapter, patcher, vae, make_control):
    ours = sample(comfy, patcher, *apply(adapter, make_control(), vae, strength=0.7))
    node = core_nodes["ControlNetApplyAdvanced"]()
    positive, negative = prompts()
    found = node.apply_controlnet([positive], [negative], make_control(), picture(), 0.7, 0.0, 1.0, vae=vae)
    assert torch.equal(sample(comfy, patcher, found[0][0], found[1][0]), ours)


def test_start_and_end(comfy, adapter, patcher, vae, make_control):
    model, seen = watch(patcher)
    sample(comfy, model, *apply(adapter, make_control(), vae, start=0.3, end=0.7), steps=10)
    controlled = [each[3] is not None for each in seen]
    assert 2 <= sum(controlled) <= 5 and not controlled[0] and not controlled[-1]


def test_embeddings_and_first_block_run_once_a_step(comfy, adapter, patcher, vae, make_control):
    net, calls = patcher.model.diffusion_model, []
    modules = {"block": net.blocks[0], "time": net.t_embedder, "caption": net.y_embedder, "adaln": net.t_block}
    handles = [m.register_forward_hook(lambda *_, name=name: calls.append(name)) for name, m in modules.items()]
    model, seen = watch(patcher)
    sample(comfy, model, *apply(adapter, make_control(), vae), steps=3)
    for handle in handles:
        handle.remove()
    assert len(seen) == 3
    # The caption is projected once for all steps.
    assert {name: calls.count(name) for name in modules} == dict.fromkeys(modules, 3) | {"caption": 1}


def test_prompts_in_forwards_of_their_own(comfy, monkeypatch, adapter, patcher, vae, make_control):
    """As the host does it where memory is short."""
    together = sample(comfy, patcher, *apply(adapter, make_control(), vae, picture(batch=2)), batch=2)
    monkeypatch.setattr(type(patcher.model), "memory_required", lambda *_, **__: 1e18)
    model, seen = count_forwards(patcher)
    alone = sample(comfy, model, *apply(adapter, make_control(), vae, picture(batch=2)), batch=2)
    assert [shape[0] for shape, _ in seen] == [2] * 4
    torch.testing.assert_close(alone, together, atol=NOISE, rtol=1e-4)


def test_masked_prompts_with_a_control_each(comfy, adapter, patcher, vae, make_control):
    left = torch.zeros(1, 72, 104)
    left[:, :, :48] = 1
    conds = apply(adapter, make_control(), vae)
    masked = [conds[0][0], {**conds[0][1], "mask": left, "mask_strength": 1.0}]
    rest = [caption(5, 9)[0], {**caption(5, 9)[1], "mask": 1 - left, "mask_strength": 1.0}]
    comfy_sample = importlib.import_module("comfy.sample")
    latent = torch.zeros(1, 4, 9, 13)
    with torch.inference_mode():
        found = comfy_sample.sample(
            patcher,
            comfy_sample.prepare_noise(latent, 5),
            1,
            1.0,
            "euler",
            "simple",
            [masked, rest],
            [conds[1]],
            latent,
        )
        without = comfy_sample.sample(
            patcher, comfy_sample.prepare_noise(latent, 5), 1, 1.0, "euler", "simple",
            [[prompts()[0][0], {**prompts()[0][1], "mask": left, "mask_strength": 1.0}], rest], [conds[1]], latent,
        )  # fmt: skip
    change = (found - without).abs().amax(dim=(0, 1))  # (9, 13)
    assert change[:, :6].max() > 100 and change[:, 6:].max() < 0.01  # the noise of values near 1000


@pytest.mark.parametrize(
    ("base_dtype", "control_dtype", "noise"),
    [
        (torch.float32, torch.bfloat16, 0.05),
        (torch.float32, torch.float8_e4m3fn, 0.3),
        (torch.bfloat16, torch.bfloat16, 0.1),
        (torch.bfloat16, torch.float32, 0.1),
        (torch.float8_e4m3fn, torch.float8_e4m3fn, 0.3),
        (torch.float16, torch.float8_e5m2, 0.5),
    ],
)
def test_precisions(comfy, adapter, host_model, patcher, vae, make_control, base_dtype, control_dtype, noise):
    """Weights of 8 and 3 bits of mantissa are off by 2^-9 and 2^-4 each; random signs average that out."""
    exact = sample(comfy, patcher, *apply(adapter, make_control(), vae))
    other = host_model.make_patcher(make_weights(CONFIG), CONFIG, dtype=base_dtype)
    control = make_control(dtype=control_dtype)
    weights = {p.dtype for name, p in control.control_model.named_parameters() if "scale_shift_table" not in name}
    assert weights == {control_dtype}
    found = sample(comfy, other, *apply(adapter, control, vae))
    assert found.isfinite().all()
    assert (found.float() - exact).norm() / exact.norm() < noise


def test_with_a_lora(comfy, adapter, patcher, vae, make_control):
    """The base's patched block is what control reads; the copies keep their own weights."""
    model, seen = watch(patcher)
    change = torch.randn(144, 48, generator=torch.Generator().manual_seed(8)) * 0.05
    model.add_patches({"diffusion_model.blocks.0.attn.qkv.weight": ("diff", (change,))})
    conds = apply(adapter, make_control(), vae)
    before = sample(comfy, patcher, *conds)
    sample(comfy, model, *conds)
    weights = make_weights(CONFIG)
    weights["blocks.0.attn.qkv.weight"] += change
    with torch.inference_mode():
        expected = plain_prediction(seen[0], [(control_weights(), encode(vae, picture()))], weights)
    torch.testing.assert_close(seen[0][-1], expected, atol=2e-5, rtol=0)
    assert torch.equal(sample(comfy, patcher, *conds), before)  # unpatched again


def test_attention_patches_see_base_and_copies(comfy, adapter, patcher, vae, make_control):
    calls, model = [], patcher.clone()

    def override(function, q, k, v, heads, **kwargs):
        calls.append(q.shape[1])
        return function(q, k, v, heads, **kwargs)

    model.model_options["transformer_options"]["optimized_attention_override"] = override
    found = sample(comfy, model, *apply(adapter, make_control(), vae), steps=1)
    assert len(calls) == 2 * (CONFIG.depth + COPIES)
    assert torch.equal(found, sample(comfy, patcher, *apply(adapter, make_control(), vae), steps=1))


def test_with_every_solver(comfy, pack, adapter, patcher, vae, make_control):
    names = importlib.import_module("comfy.samplers").KSampler.SAMPLERS
    ours = [name for name in names if name.startswith("pixart")]
    assert ours
    control = make_control()
    for name in [*ours, "euler_ancestral", "dpmpp_2m_sde", "uni_pc", "heun"]:
        settings = {"sampler_name": name, "steps": 1 if "dmd" in name else 4}
        found = sample(comfy, patcher, *apply(adapter, control, vae), **settings)
        assert found.isfinite().all(), name
        assert not torch.equal(found, sample(comfy, patcher, *prompts(), **settings)), name


def test_memory_management_knows_its_weights(comfy, adapter, vae, make_control):
    control = make_control()
    conds = apply(adapter, control, vae)
    twin = conds[0][1]["control"]
    assert twin.get_models() == [control.control_model_wrapped]
    held = sum(p.nbytes for p in control.control_model.parameters())
    assert control.control_model_wrapped.model_size() == held


def test_a_clone_for_another_device_has_weights_of_its_own(comfy, adapter, patcher, vae, make_control):
    positive, negative = apply(adapter, make_control(), vae)
    control = positive[1]["control"]
    if not hasattr(importlib.import_module("comfy.controlnet").ControlBase, "deepclone_multigpu"):
        pytest.skip("this ComfyUI samples on one device")
    clone = control.deepclone_multigpu(torch.device("cpu"))
    assert clone.vae is vae and clone.family == control.family
    weights, others = control.control_model.state_dict(), clone.control_model.state_dict()
    assert all(torch.equal(weights[name], others[name]) for name in weights)
    assert all(weights[name].data_ptr() != others[name].data_ptr() for name in weights)
    cloned = [[entry[0], {**entry[1], "control": clone}] for entry in (positive, negative)]
    # The copied weights lie elsewhere, where a matrix product may begin its sums at another value.
    torch.testing.assert_close(
        sample(comfy, patcher, *cloned), sample(comfy, patcher, positive, negative), atol=NOISE, rtol=1e-4
    )


@pytest.fixture(scope="module")
def on_two_devices(pack, tmp_path_factory):
    """A MODEL from a file, and a function that gives one a copy on a second device as MultiGPU CFG Split does.

    PyTorch takes any number of CPUs for different devices, and computes on the one that there is.
    """
    multigpu = importlib.import_module("comfy.multigpu")
    path = tmp_path_factory.mktemp("two") / "pixart.safetensors"
    save_file(make_weights(CONFIG), path)
    model = importlib.import_module("pixart_pack.nodes.host.loading").load_patcher(path, dtype="fp32")

    def split(model):
        model = model.clone()
        copy = model.deepclone_multigpu(new_load_device=torch.device("cpu", 1))
        copy.is_multigpu_base_clone = True
        model.set_additional_models("multigpu", [copy])
        model.match_multigpu_clones()
        multigpu.GPUOptionsGroup().register(model)
        assert model.get_additional_models_with_key("multigpu")[0].model is not model.model
        return model

    return model, split


@pytest.fixture(scope="module")
def with_all_dials(pack):
    acceleration = importlib.import_module("pixart_pack.nodes.host.denoiser.acceleration")

    def turn(model):
        # Reused wherever it may be: below that a cache decides for the prompts that are evaluated together.
        model = acceleration.cache_blocks(model, 1e9, 1, 0, 0.0, 1.0, 2)
        return acceleration.reuse_guidance(model, 2, "as it was", 0.0, 1.0)[0]

    return turn


@pytest.fixture(scope="module")
def compiled(pack):
    compilation = importlib.import_module("pixart_pack.nodes.host.denoiser.compilation")

    def compile_blocks(model):
        model = model.clone()
        blocks = compilation.blocks_for({"backend": "eager"})
        model.model_options["transformer_options"][compilation.COMPILED] = blocks
        return model

    return compile_blocks


def with_weight(model):
    model = model.clone()
    model.add_patches({"diffusion_model.blocks.1.attn.qkv.weight": (torch.full((3 * 48, 48), 0.05),)}, 1.0)
    return model


@pytest.mark.parametrize(
    "kind", ["batch", "two controls", "weights", "dials", "solver", pytest.param("compiled", marks=pytest.mark.slow)]
)
def test_the_hosts_devices_share_the_prompts(
    comfy, adapter, on_two_devices, with_all_dials, compiled, vae, make_control, kind
):
    importlib.import_module("pixart_pack.nodes.host.denoiser.sampling").register_samplers()
    (model, split), conds = on_two_devices, prompts()
    settings = {"steps": 6 if kind == "dials" else 2, "batch": 3 if kind == "batch" else 1}
    if kind == "two controls":
        for seed in (1, 2):
            conds = apply(adapter, make_control(control_weights(seed=seed)), vae, picture(seed), conds)
    if kind == "solver":
        settings["sampler_name"] = "pixart_iddpm"
    changes = {"weights": with_weight, "dials": with_all_dials, "compiled": compiled}
    model = changes.get(kind, lambda same: same)(model)
    (model, seen), (both, shared) = count_forwards(model), count_forwards(split(model))
    expected = sample(comfy, model, *conds, **settings)
    found = sample(comfy, both, *conds, **settings)
    torch.testing.assert_close(found, expected, atol=NOISE, rtol=1e-4)
    rows = [shape[0][0] for shape in shared]
    assert len(shared) > len(seen) and max(rows) == settings["batch"]
    if kind == "dials":  # which every run begins anew
        assert torch.equal(sample(comfy, both, *conds, **settings), found)


def test_streamed_weights_of_a_small_card(patcher, make_control):
    """What --lowvram does to a control that does not fit: weights are cast as each layer is called."""
    latent, timestep, states = torch.randn(2, 4, 8, 8), torch.tensor([500.0]), caption(5, 1)[0]
    net, predictions = patcher.model.diffusion_model, []
    for how in ({"full_load": True}, {"lowvram_model_memory": 1}):  # bytes
        wrapped = make_control().control_model_wrapped
        wrapped.load(torch.device("cpu"), **how)
        assert wrapped.model.model_lowvram == ("lowvram_model_memory" in how)
        with torch.no_grad():
            control = wrapped.model(latent, latent, None, None, base_model=net)
            predictions.append(net(latent, timestep, states, control))
    assert torch.equal(*predictions)
    with torch.no_grad():
        assert (predictions[0] - net(latent, timestep, states)).abs().max() > 0.1


def test_sampling_leaves_nothing_behind(comfy, adapter, patcher, vae, make_control):
    conds = apply(adapter, make_control(), vae)
    first = sample(comfy, patcher, *conds)
    twin = conds[0][1]["control"]
    assert "base_model" not in twin.extra_args and twin.cond_hint is None
    assert torch.equal(sample(comfy, patcher, *conds), first)


def test_a_hint_of_another_size_is_scaled_and_cropped(comfy, adapter, patcher, vae, make_control):
    wide = picture(size=(9, 30))
    torch.testing.assert_close(
        sample(comfy, patcher, *apply(adapter, make_control(), vae, wide)),
        sample(comfy, patcher, *apply(adapter, make_control(), vae, wide[:, :, 68:172])),
    )
    large = picture().repeat_interleave(2, 1).repeat_interleave(2, 2)
    torch.testing.assert_close(
        sample(comfy, patcher, *apply(adapter, make_control(), vae, large)),
        sample(comfy, patcher, *apply(adapter, make_control(), vae)),
    )


def test_grey_and_transparent_hints(comfy, adapter, patcher, vae, make_control):
    grey = picture()[..., :1]
    colour = sample(comfy, patcher, *apply(adapter, make_control(), vae, grey.repeat(1, 1, 1, 3)))
    found = sample(comfy, patcher, *apply(adapter, make_control(), vae, grey))
    torch.testing.assert_close(found, colour, atol=NOISE, rtol=1e-4)  # one channel expanded: another layout
    clear = torch.cat([grey.repeat(1, 1, 1, 3), torch.rand_like(grey)], dim=-1)
    found = sample(comfy, patcher, *apply(adapter, make_control(), vae, clear))
    torch.testing.assert_close(found, colour, atol=NOISE, rtol=1e-4)


def test_the_hint_is_scaled_as_the_model_is(comfy, adapter, host_model, vae, make_control):
    config = tiny_config("sigma-512", depth=4)
    model, seen = watch(host_model.make_patcher(make_weights(config), config, dtype=torch.float32))
    hints = []
    control = make_control(config=config)
    embed = control.control_model.embed
    control.control_model.embed = lambda base, latent: hints.append(latent) or embed(base, latent)
    sample(comfy, model, *apply(adapter, control, vae))
    with torch.inference_mode():
        torch.testing.assert_close(hints[0], vae.encode(picture()) * config.vae_scale)
    assert config.vae_scale != CONFIG.vae_scale


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (tiny_config("sigma-512", depth=4), "got one of PixArt-alpha, expected one of PixArt-sigma"),
        (tiny_config(depth=4, hidden_size=96), "got hidden_size 48, expected 96"),
        (tiny_config(depth=2), "got 2 copied blocks over a base model of 2"),
        (tiny_config(depth=4, qk_norm=True), "got qk_norm False, expected True"),
    ],
)
def test_another_base_is_refused_before_the_first_step(comfy, adapter, host_model, vae, make_control, config, message):
    model, seen = watch(host_model.make_patcher(make_weights(config), config, dtype=torch.float32))
    with pytest.raises(ValueError, match=f"{message}.*Connect"):
        sample(comfy, model, *apply(adapter, make_control(), vae))
    assert not seen


def test_what_must_be_connected_is_said(comfy, core_nodes, adapter, patcher, vae, make_control):
    with pytest.raises(ValueError, match="got str, expected the CONTROL_NET of Load PixArt ControlNet"):
        apply(adapter, "control", vae)
    with pytest.raises(ValueError, match="Control ends before it starts: got start_percent 0.8"):
        apply(adapter, make_control(), vae, start=0.8, end=0.2)
    positive, negative = prompts()
    node = core_nodes["ControlNetApplyAdvanced"]()
    found = node.apply_controlnet([positive], [negative], make_control(), picture(), 1.0, 0.0, 1.0)
    with pytest.raises(ValueError, match="ControlNet image without a VAE.*Connect it"):
        sample(comfy, patcher, found[0][0], found[1][0])


def test_loading_by_node(comfy, run_node, adapter):
    folders = importlib.import_module("folder_paths")
    folder = Path(folders.get_folder_paths("controlnet")[0])
    folder.mkdir(parents=True, exist_ok=True)
    save_controlnet(folder / "both.pth", control_weights(), CONFIG, base=make_weights(CONFIG))
    save_controlnet(folder / "alone.safetensors", control_weights(), CONFIG)
    save_controlnet(folder / "diffusers_edges", control_weights(), CONFIG)
    save_file({"control_model.input_hint_block.0.weight": torch.zeros(1)}, folder / "sd.safetensors")
    save_file(make_weights(CONFIG), folder / "model.safetensors")
    names = adapter.list_controlnets()
    assert {"both.pth", "alone.safetensors", "sd.safetensors", "diffusers_edges/"} <= set(names)
    control, model = run_node("PixArtLoadControlNet", controlnet="both.pth")
    assert model.model.pixart_config == CONFIG and control.family == "alpha"
    function, arguments = model.cached_patcher_init[:2]
    assert function(*arguments, disable_dynamic=True).model.pixart_config == CONFIG
    for name in ("alone.safetensors", "diffusers_edges/"):
        control, model = run_node("PixArtLoadControlNet", controlnet=name, weight_dtype="fp8_e4m3fn")
        assert "Load PixArt Checkpoint" in model.message
        assert control.control_model.num_copies == COPIES
    with pytest.raises(ValueError, match=r"sd\.safetensors: Not a PixArt ControlNet: got ControlNet .of another model"):
        run_node("PixArtLoadControlNet", controlnet="sd.safetensors")
    with pytest.raises(ValueError, match="got a PixArt model.*Load it with Load PixArt Checkpoint"):
        run_node("PixArtLoadControlNet", controlnet="model.safetensors")
    for outside in ("../both.pth", "nowhere.pth", "../", "nowhere/"):
        with pytest.raises(FileNotFoundError):
            run_node("PixArtLoadControlNet", controlnet=outside)


@pytest.mark.parametrize("with_base", [False, True])
def test_gguf_stays_packed(comfy, run_node, adapter, host_model, vae, with_base):
    config = tiny_config("alpha-1024", depth=3, hidden_size=96, num_heads=4)
    folder = Path(importlib.import_module("folder_paths").get_folder_paths("controlnet")[0])
    folder.mkdir(parents=True, exist_ok=True)
    weights = control_weights(config)
    if with_base:
        weights |= {f"base_model.{name}": weight for name, weight in make_weights(config).items()}
    path = folder / f"edges_alpha_{with_base}.gguf"
    write_gguf(path, weights, matrices("Q8_0"), "pixart")
    assert path.name in adapter.list_controlnets()
    base = host_model.make_patcher(make_weights(config), config, dtype=torch.float32)
    found = []
    for dtype in ("default", "fp32"):
        control, model = run_node("PixArtLoadControlNet", controlnet=path.name, weight_dtype=dtype)
        packed_layers = importlib.import_module("pixart_pack.nodes.host.weights.packed").packed_layers
        packed = [layer.is_packed() for layer in packed_layers(control.control_model)]
        assert all(packed) and len(packed) == (dtype == "default") * (2 * 7 + 3)  # of the blocks, and the projections
        bytes_of_base = packed_layers(model.model) if with_base else []
        assert bool(bytes_of_base) == (with_base and dtype == "default")
        found.append(sample(comfy, base, *apply(adapter, control, vae)))
    # Tables, norms and biases are fp16 beside packed weights; guidance of 4.5 at a sigma of 157 multiplies that.
    assert torch.nn.functional.cosine_similarity(found[0].flatten(), found[1].flatten(), dim=0) > 0.9999
    path.unlink()


def test_windows_of_a_wide_picture_see_their_part_of_the_image(comfy, core_nodes, adapter, patcher, vae, make_control):
    """ContextWindowsManual: each window is steered by what lies under it, not by the whole image squeezed into it."""
    size, seen, control = (8, 24), [], make_control()
    windows = core_nodes["ContextWindowsManual"].execute(
        patcher, 10, 4, "standard_static", 1, False, "pyramid", 3, False
    ).result[0]  # fmt: skip
    conds = apply(adapter, control, vae, picture(size=size))
    control.control_model.register_forward_pre_hook(
        lambda _, given, named: seen.append(named["hint"]), with_kwargs=True
    )
    sample(comfy, patcher, *conds, size=size, steps=1)
    [whole] = seen
    seen.clear()
    found = sample(comfy, windows, *conds, size=size, steps=1)
    assert found.isfinite().all() and len(seen) == 4
    for hint, start in zip(seen, [0, 6, 12, 14], strict=True):
        before = hint.shape[3] - 10  # a column that hosts since 0.30 put in front of windows that do not begin at 0
        assert before in (0, 1) and torch.equal(hint[:1], whole[:1, :, :, start - before : start + 10]), start
