"""Nodes of the host that patch attention, blocks and noise levels, on a tiny PixArt in this process."""

import importlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pixart_pack.tests.host.graph import write_lora
from pixart_pack.tests.tiny_pixart import make_model, make_weights, tiny_config

CONFIG = tiny_config()
SIZES = [(8, 8), (9, 13)]
NOISE = {"atol": 2e-3, "rtol": 1e-4}  # float32 noise of the net, multiplied by sigma 157 and guidance 4.5


@pytest.fixture(scope="module")
def host_model(pack):
    return importlib.import_module("pixart_pack.nodes.host.denoiser.model")


@pytest.fixture(scope="module")
def patcher(host_model):
    return host_model.make_patcher(make_weights(CONFIG), CONFIG, dtype=torch.float32)


def caption(length, seed, keep=None, width=CONFIG.caption_channels):
    """One conditioning entry: states of `length` tokens, of which the first `keep` count."""
    states = torch.randn(1, length, width, generator=torch.Generator().manual_seed(seed))
    mask = {} if keep is None else {"attention_mask": (torch.arange(length) < keep)[None]}
    return [states, {"pooled_output": None, **mask}]


PROMPTS = caption(12, 1, keep=7), caption(3, 2)


def sample(model, positive=PROMPTS[0], negative=PROMPTS[1], size=(9, 13), batch=1, steps=2, **options):
    comfy_sample = importlib.import_module("comfy.sample")
    latent = torch.zeros(batch, 4, *size)
    noise = comfy_sample.prepare_noise(latent, 5)
    settings = {"cfg": 4.5, "sampler_name": "euler", "scheduler": "simple", "seed": 5, **options}
    with torch.inference_mode():
        return comfy_sample.sample(
            model, noise, steps, settings.pop("cfg"), settings.pop("sampler_name"), settings.pop("scheduler"),
            [positive], [negative], latent, **settings,
        )  # fmt: skip


def run(node, *given, **named):
    """The MODEL that a node of the host makes, of either of its kinds."""
    made = node()
    out = getattr(made, node.FUNCTION)(*given, **named)
    return getattr(out, "result", out)[0]


def changed(found, expected):
    assert found.isfinite().all()
    return not torch.allclose(found, expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(("size", "batch"), [(SIZES[0], 1), (SIZES[1], 4)])
def test_negative_guidance_without_cfg(core_nodes, patcher, size, batch):
    """NAGuidance: at cfg 1 the negative prompt acts, and only by this node."""
    guided = run(core_nodes["NAGuidance"], patcher, 5.0, 0.5, 1.5)
    other = caption(9, 3)
    plain = [sample(patcher, negative=each, size=size, batch=batch, cfg=1.0) for each in (PROMPTS[1], other)]
    assert torch.equal(*plain)
    found = [sample(guided, negative=each, size=size, batch=batch, cfg=1.0) for each in (PROMPTS[1], other)]
    assert changed(found[0], plain[0]) and changed(*found)
    # Nothing to be guided away from: the same prompt on both sides gives the picture without the node.
    same = sample(guided, negative=PROMPTS[0], size=size, batch=batch, cfg=1.0)
    expected = sample(patcher, negative=PROMPTS[0], size=size, batch=batch, cfg=1.0)
    torch.testing.assert_close(same, expected, **NOISE)


@pytest.mark.parametrize(("solver", "steps"), [("pixart_lcm", 4), ("pixart_dmd", 1)])
def test_negative_guidance_of_distilled_models(core_nodes, patcher, solver, steps):
    importlib.import_module("pixart_pack.nodes.host.denoiser.sampling").register_samplers()
    guided, other = run(core_nodes["NAGuidance"], patcher, 5.0, 0.5, 1.5), caption(9, 3)
    draw = {"cfg": 1.0, "sampler_name": solver, "scheduler": solver, "steps": steps, "batch": 2}
    found = [sample(guided, negative=each, **draw) for each in (PROMPTS[1], other)]
    assert changed(*found) and changed(found[0], sample(patcher, **draw))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", ["attn1", "attn2"])
def test_patches_around_attention_see_what_they_expect(patcher, kind, size):
    seen, model = [], patcher.clone()
    rows, columns = (-(-side // 2) for side in size)

    def before(query, context, values, told):
        seen.append((told["block_index"], tuple(query.shape), tuple(context.shape), told["n_heads"] * told["dim_head"]))
        assert told["original_shape"][-2:] == [rows, columns] and len(told["cond_or_uncond"]) == 2
        return query, context, values

    def behind(out, told):
        seen.append((told["block"], tuple(out.shape)))
        return out

    getattr(model, f"set_model_{kind}_patch")(before)
    getattr(model, f"set_model_{kind}_output_patch")(behind)
    expected = sample(patcher, size=size, batch=4, steps=1)
    assert torch.equal(sample(model, size=size, batch=4, steps=1), expected)
    tokens = (8, rows * columns, CONFIG.hidden_size)
    context = tokens if kind == "attn1" else (8, 7, CONFIG.hidden_size)
    assert seen[:2] == [(0, tokens, context, CONFIG.hidden_size), (("double_block", 0), tokens)]
    assert len(seen) == 2 * CONFIG.depth


def test_what_patches_return_is_used(patcher):
    """Each of the three that an attention reads, and what it gives."""
    expected = sample(patcher, steps=1)
    for kind in ("attn1", "attn2"):
        for place in range(3):
            model = patcher.clone()

            def halve(*given, place=place):
                return tuple(each * 0.5 if at == place else each for at, each in enumerate(given[:3]))

            getattr(model, f"set_model_{kind}_patch")(halve)
            assert changed(sample(model, steps=1), expected), (kind, place)
        model = patcher.clone()
        getattr(model, f"set_model_{kind}_output_patch")(lambda out, told: out * 0.5)
        assert changed(sample(model, steps=1), expected)


def test_patches_may_answer_by_name(patcher):
    model, expected = patcher.clone(), sample(patcher, steps=1)
    model.set_model_attn1_patch(lambda *given: {})
    assert torch.equal(sample(model, steps=1), expected)
    model.set_model_attn1_patch(lambda query, context, values, told: {"v": values * 2})
    assert changed(sample(model, steps=1), expected)


def test_tokens_that_a_patch_appends_to_the_caption_count(patcher):
    more = torch.randn(1, 2, CONFIG.hidden_size, generator=torch.Generator().manual_seed(3))
    model = patcher.clone()

    def append(query, context, values, told):
        longer = torch.cat([context, more.expand(len(context), -1, -1)], dim=1)
        return query, longer, longer

    model.set_model_attn2_patch(append)
    assert changed(sample(model, steps=1), sample(patcher, steps=1))


@pytest.mark.parametrize("kind", ["attn1", "attn2"])
@pytest.mark.parametrize("place", [("double_block", 1), ("middle", 0), ("middle", 0, 0)])
def test_replaced_attention_of_one_block(patcher, kind, place):
    calls, model = [], patcher.clone()
    attend = importlib.import_module("pixart_pack.pixart.layers").attend

    def again(q, k, v, told):
        calls.append(told["block_index"])
        return attend(q, k, v, told["n_heads"], told.get("attn_mask"))

    getattr(model, f"set_model_{kind}_replace")(again, *place)
    torch.testing.assert_close(sample(model, steps=1), sample(patcher, steps=1), **NOISE)
    assert calls == [1]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    ("node", "given"),
    [
        ("PerturbedAttentionGuidance", {"scale": 3.0}),
        ("SelfAttentionGuidance", {"scale": 0.5, "blur_sigma": 2.0}),
        ("TomePatchModel", {"ratio": 0.3}),
        ("SkipLayerGuidanceDiTSimple", {"double_layers": "1", "single_layers": "7", "start_percent": 0.0,
                                        "end_percent": 1.0}),
        ("SkipLayerGuidanceDiT", {"double_layers": "1", "single_layers": "", "scale": 3.0, "start_percent": 0.0,
                                  "end_percent": 1.0, "rescaling_scale": 0.2}),
        ("SkipLayerGuidanceSD3", {"layers": "0, 1", "scale": 3.0, "start_percent": 0.0, "end_percent": 1.0}),
        ("FreSca", {"scale_low": 1.0, "scale_high": 1.5, "freq_cutoff": 2}),
        ("RescaleCFG", {"multiplier": 0.7}),
    ],
)  # fmt: skip
def test_guidance_and_attention_nodes_act(core_nodes, patcher, node, given, size):
    model = run(core_nodes[node], model=patcher, **given)
    assert changed(sample(model, size=size, batch=4), sample(patcher, size=size, batch=4))


def test_renormed_guidance_acts(core_nodes, patcher):
    """The node itself takes one picture at a time."""
    model = run(core_nodes["RenormCFG"], model=patcher, cfg_trunc=100.0, renorm_cfg=1.0)
    assert changed(sample(model, steps=3), sample(patcher, steps=3))


def test_perturbed_attention_over_compressed_keys(core_nodes, host_model):
    config = tiny_config("sigma-1024", kv_compress_ratio=2, kv_compress_layers=(1, 2), learn_sigma=True)
    model = host_model.make_patcher(make_weights(config), config, dtype=torch.float32)
    for size in SIZES:
        guided = run(core_nodes["PerturbedAttentionGuidance"], model=model, scale=3.0)
        assert changed(sample(guided, size=size, steps=1), sample(model, size=size, steps=1))


@pytest.mark.parametrize(
    ("node", "given", "words"),
    [
        ("FreeU", {"b1": 1.1, "b2": 1.2, "s1": 0.9, "s2": 0.2}, "A node for U-Nets: got PixArt, .* remove the node"),
        ("FreeU_V2", {"b1": 1.1, "b2": 1.2, "s1": 0.9, "s2": 0.2}, "A node for U-Nets: got PixArt, .* remove the node"),
        ("ModelNoiseScale", {"noise_scale": 1.0}, "A node for flow models: .* remove the node"),
        ("PatchModelAddDownscale", {"block_number": 3, "downscale_factor": 2.0, "start_percent": 0.0,
                                    "end_percent": 0.35, "downscale_after_skip": True, "downscale_method": "bicubic",
                                    "upscale_method": "bicubic"}, "A node for U-Nets: got a patch of input_block"),
        ("HyperTile", {"tile_size": 32, "swap_size": 1, "max_depth": 0, "scale_depth": False}, "Attention in tiles"),
        ("SkipLayerGuidanceSD3", {"layers": "7", "scale": 3.0, "start_percent": 0.0, "end_percent": 1.0},
         "No such block: got 7, expected 0 to 2"),
        ("ScaleROPE", {"scale_x": 2.0, "shift_x": 0.0, "scale_y": 1.0, "shift_y": 0.0, "scale_t": 1.0, "shift_t": 0.0},
         "Rotary positions: got a change of scale_x, .* remove ScaleROPE"),
        ("ModelSamplingSD3", {"shift": 3.0}, "Noise levels of another model: got those of a flow model"),
        ("ModelSamplingAuraFlow", {"shift": 1.7}, "Noise levels of another model: got those of a flow model"),
        ("ModelSamplingFlux", {"max_shift": 1.15, "base_shift": 0.5, "width": 64, "height": 64}, "of a flow model"),
        ("ModelSamplingStableCascade", {"shift": 2.0}, "got those of 'StableCascadeSampling'"),
        ("ModelSamplingContinuousEDM", {"sampling": "eps", "sigma_max": 120.0, "sigma_min": 0.002},
         "got those of 'ModelSamplingContinuousEDM'"),
    ],
)  # fmt: skip
def test_nodes_of_other_models_are_refused_in_words(core_nodes, patcher, node, given, words):
    if node not in core_nodes:
        pytest.skip(f"this host has no {node}")
    with pytest.raises((ValueError, AttributeError), match=words):
        sample(run(core_nodes[node], model=patcher, **given), size=(16, 16), steps=1)


def test_patches_of_a_unets_blocks_are_refused(patcher):
    model = patcher.clone()
    model.set_model_attn2_replace(lambda q, k, v, told: q, "input", 4)
    with pytest.raises(ValueError, match=r"A node for U-Nets: got a patch of the block \('input', 4\)"):
        sample(model, steps=1)


@pytest.mark.parametrize("sampling", ["lcm", "eps"])
def test_discrete_noise_levels_suit(core_nodes, patcher, sampling):
    model = run(core_nodes["ModelSamplingDiscrete"], patcher, sampling, False)
    assert sample(model, steps=1).isfinite().all()


@pytest.mark.parametrize("node", ["NAGuidance", "TomePatchModel"])
def test_patches_act_in_compiled_models(core_nodes, patcher, node):
    """Blocks that are patched run uncompiled among the compiled ones."""
    given = {"NAGuidance": (5.0, 0.5, 1.5), "TomePatchModel": (0.3,)}[node]
    compilation = importlib.import_module("pixart_pack.nodes.host.denoiser.compilation")
    compiled = patcher.clone()
    blocks = compilation.CompiledBlocks(backend="eager")
    compiled.model_options["transformer_options"][compilation.COMPILED] = blocks
    torch.manual_seed(0)  # token merging picks at random
    expected = sample(run(core_nodes[node], patcher, *given))
    torch.manual_seed(0)
    torch.testing.assert_close(sample(run(core_nodes[node], compiled, *given)), expected, **NOISE)
    assert changed(expected, sample(compiled)) and not blocks.failed


def test_without_patches_nothing_is_run_for_them(patcher, monkeypatch):
    """The same kernels in the same order as the plain model, which knows of no patches."""
    patches = importlib.import_module("pixart_pack.nodes.host.denoiser.patches")
    monkeypatch.setattr(patches, "AroundAttention", None)
    monkeypatch.setattr(patches.BlockPatches, "place", None)
    profiler = importlib.import_module("torch.profiler")
    latent, timestep, states = torch.randn(1, 4, 8, 8), torch.tensor([500.0]), PROMPTS[0][0]
    plain, counts = make_model(CONFIG), []
    for net in (plain, patcher.model.diffusion_model):
        with torch.no_grad():
            net(latent, timestep, states)
            with profiler.profile(activities=[profiler.ProfilerActivity.CPU]) as profile:
                net(latent, timestep, states)
        counts.append({event.key: event.count for event in profile.key_averages() if "mm" in event.key})
    assert counts[0] == counts[1]


def test_attention_multiply_acts_on_its_part_alone(core_nodes, patcher):
    generator = torch.Generator().manual_seed(0)
    latent, timestep = torch.randn(1, 4, 9, 13, generator=generator), torch.tensor([500.0])
    given, width = {"q": 0.5, "k": 2.0, "v": 3.0, "out": 0.25}, CONFIG.hidden_size
    names = {"UNetSelfAttentionMultiply": ("attn.qkv", "attn.proj"),
             "UNetCrossAttentionMultiply": ("cross_attn.kv_linear", "cross_attn.proj")}  # fmt: skip
    for node, (packed, out) in names.items():
        model, weights = run(core_nodes[node], model=patcher, **given), make_weights(CONFIG)
        for index in range(CONFIG.depth):
            for end in ("weight", "bias"):
                rows = weights[f"blocks.{index}.{packed}.{end}"]
                factors = (0.5, 2.0, 3.0) if len(rows) == 3 * width else (2.0, 3.0)
                for part, factor in zip(rows.split(width), factors, strict=True):
                    part *= factor
                weights[f"blocks.{index}.{out}.{end}"] *= 0.25
                if len(rows) == 2 * width:
                    weights[f"blocks.{index}.cross_attn.q_linear.{end}"] *= 0.5
        importlib.import_module("comfy.model_management").load_models_gpu([model])
        plain = make_model(CONFIG)
        plain.load_state_dict(weights)
        with torch.no_grad():
            found = model.model.diffusion_model(latent, timestep, PROMPTS[0][0])
            torch.testing.assert_close(found, plain(latent, timestep, PROMPTS[0][0])[:, :4], atol=2e-5, rtol=1e-5)
        assert changed(sample(model), sample(patcher))


def test_names_of_parts_stay_out_of_merges_and_files(patcher):
    names = {f"diffusion_model.{name}" for name in patcher.model.diffusion_model.state_dict()}
    assert set(patcher.get_key_patches("diffusion_model.")) == names
    assert set(patcher.get_key_patches()) == set(patcher.model.state_dict())
    assert set(patcher.model_state_dict("diffusion_model.")) == names
    assert set(patcher.model_state_dict()) > names
    assert not [name for name in patcher.state_dict_for_saving() if ".to_q." in name]


def test_a_twin_of_another_class_knows_the_parts(patcher):
    """As the host makes one of a model with dynamic memory that is to be compiled, or to run on the CPU."""
    module = importlib.import_module("pixart_pack.nodes.host.denoiser.patcher")
    plain = importlib.import_module("comfy.model_patcher").ModelPatcher

    class Dynamic(plain):
        def clone(self, disable_dynamic=False):
            return plain(self.model, self.load_device, self.offload_device)

    named = module.name_parts(Dynamic(patcher.model, patcher.load_device, patcher.offload_device))
    twin = named.clone(disable_dynamic=True)
    assert isinstance(twin, plain) and not isinstance(twin, Dynamic)
    assert twin.model_state_dict().keys() == patcher.model_state_dict().keys()
    assert type(twin.clone()) is type(twin) is type(patcher)
    packed = importlib.import_module("pixart_pack.nodes.host.weights.patcher")
    clip = packed.know_packed_weights(Dynamic(patcher.model, patcher.load_device, patcher.offload_device))
    assert isinstance(clip.clone(), packed.PackedWeights) and not isinstance(clip.clone(), Dynamic)


def test_a_part_and_a_slice_are_patched_alike(patcher):
    generator, width = torch.Generator().manual_seed(0), CONFIG.hidden_size
    change = torch.randn(width, width, generator=generator)
    part, whole = "transformer_blocks.1.attn1.to_k.weight", "blocks.1.attn.qkv.weight"
    places = [f"diffusion_model.{part}", (f"diffusion_model.{whole}", (0, width, width))]
    pictures = []
    for place in places:
        model = patcher.clone()
        assert model.add_patches({place: (change,), "diffusion_model.nothing": (change,)}, 0.5) == [place]
        pictures.append(sample(model))
    assert torch.equal(*pictures) and changed(pictures[0], sample(patcher))


def windowed(core_nodes, model, dim, length=10, **given):
    usual = {"context_overlap": 4, "context_schedule": "standard_static", "context_stride": 1, "closed_loop": False,
             "fuse_method": "pyramid", "freenoise": False}  # fmt: skip
    return run(core_nodes["ContextWindowsManual"], model=model, context_length=length, dim=dim, **{**usual, **given})


@pytest.mark.parametrize("dim", [2, 3])
def test_windows_of_rows_or_columns_are_pictures_of_their_own(core_nodes, patcher, dim):
    """Each is told its own size, and no caption is cut where its length happens to be the picture's."""
    seen, extension = [], importlib.import_module("comfy.patcher_extension")
    size = (24, 9) if dim == 2 else (9, 24)
    model = windowed(core_nodes, patcher, dim)

    def note(executor, x, timesteps, context, *given, **conds):
        assert context.shape[1:] == (24, CONFIG.caption_channels)
        assert torch.equal(conds["c_size"], conds["c_size"].new_tensor([[side * 8 for side in x.shape[2:]]] * 2))
        assert abs(conds["c_ar"][0].item() - x.shape[2] / x.shape[3] * 1e6) < 1
        seen.append(x.shape[dim])
        return executor(x, timesteps, context, *given, **conds)

    model.add_wrapper_with_key(extension.WrappersMP.DIFFUSION_MODEL, "note", note)
    prompts = caption(24, 1), caption(24, 2)
    assert changed(sample(model, *prompts, size=size), sample(patcher, *prompts, size=size))
    assert len(seen) == 2 * 4 and set(seen) <= {10, 11}  # one more where the host puts a column in front
    seen.clear()
    small = 8, 9
    assert torch.equal(sample(model, *prompts, size=small), sample(patcher, *prompts, size=small))


def test_a_size_that_was_chosen_stays_in_windows(core_nodes, patcher):
    sizes, extension = [], importlib.import_module("comfy.patcher_extension")
    model = windowed(core_nodes, patcher, 3)

    def note(executor, *given, **conds):
        sizes.extend(conds["c_size"].tolist())
        return executor(*given, **conds)

    model.add_wrapper_with_key(extension.WrappersMP.DIFFUSION_MODEL, "note", note)
    chosen = [[states, {**extra, "pixart_size": (512, 768)}] for states, extra in PROMPTS]
    sample(model, *chosen, size=(9, 24), steps=1)
    assert sizes == [[512, 768]] * len(sizes)


@pytest.fixture(scope="module")
def lora_name(comfy):
    folder_paths = importlib.import_module("folder_paths")
    folder = Path(folder_paths.get_folder_paths("loras")[0])
    write_lora(folder / "patches_hook.safetensors", CONFIG, "transformer.", strength=0.2)
    return "patches_hook.safetensors"


def hooked(core_nodes, lora_name, prompt, strength=1.0, keyframes=(), timesteps=None):
    hooks = run(core_nodes["CreateHookLoraModelOnly"], lora_name=lora_name, strength_model=strength)
    chain = None
    for multiplier, start in keyframes:
        frame = core_nodes["CreateHookKeyframe"]().create_hook_keyframe
        (chain,) = frame(multiplier, start, chain)
    hooks = run(core_nodes["SetHookKeyframes"], hooks=hooks, hook_kf=chain)
    given = {"strength": 1.0, "set_cond_area": "default", "hooks": hooks, "timesteps": timesteps}
    return run(core_nodes["ConditioningSetProperties"], cond_NEW=[prompt], **given)[0]


@pytest.mark.parametrize(("size", "batch"), [(SIZES[0], 1), (SIZES[1], 4)])
def test_hooks_put_a_lora_on_one_prompt(core_nodes, patcher, lora_name, size, batch):
    draw = {"size": size, "batch": batch, "steps": 4}
    plain = sample(patcher, **draw)
    everywhere = run(core_nodes["LoraLoaderModelOnly"], patcher, lora_name, 1.0)
    both = [hooked(core_nodes, lora_name, prompt) for prompt in PROMPTS]
    torch.testing.assert_close(sample(patcher, *both, **draw), sample(everywhere, **draw), **NOISE)
    one = sample(patcher, both[0], **draw)
    assert changed(one, plain) and changed(one, sample(everywhere, **draw))
    late = hooked(core_nodes, lora_name, PROMPTS[0], keyframes=[(0.0, 0.0), (1.0, 0.5)])
    found = sample(patcher, late, **draw)
    assert changed(found, plain) and changed(found, one)
    never = hooked(core_nodes, lora_name, PROMPTS[0], keyframes=[(0.0, 0.0)])
    torch.testing.assert_close(sample(patcher, never, **draw), plain, **NOISE)
    assert torch.equal(sample(patcher, **draw), plain)  # and the model is as it was


def test_prompts_with_timestep_ranges_and_hooks(core_nodes, patcher, lora_name):
    """An early prompt with a LoRA and a late one without, as the host combines them."""
    comfy_sample = importlib.import_module("comfy.sample")
    early = hooked(core_nodes, lora_name, PROMPTS[0], timesteps=(0.0, 0.5))
    late = run(core_nodes["ConditioningSetTimestepRange"], [caption(9, 4)], 0.5, 1.0)
    combined = run(core_nodes["ConditioningCombine"], [early], late)
    latent = torch.zeros(1, 4, *SIZES[1])
    noise = comfy_sample.prepare_noise(latent, 5)
    with torch.inference_mode():
        found = comfy_sample.sample(
            patcher, noise, 4, 4.5, "euler", "simple", combined, [PROMPTS[1]], latent, seed=5
        )  # fmt: skip
    others = [sample(patcher, each, steps=4) for each in (PROMPTS[0], hooked(core_nodes, lora_name, PROMPTS[0]))]
    assert all(changed(found, other) for other in others)


@pytest.mark.parametrize("size", SIZES)
def test_a_lora_that_runs_beside_the_weights(core_nodes, patcher, lora_name, size, caplog):
    """LoraLoaderBypassModelOnly: the host leaves slices out, and says so; a whole matrix acts as in the weights."""
    folder_paths, name = importlib.import_module("folder_paths"), "patches_whole.safetensors"
    folder, width = Path(folder_paths.get_folder_paths("loras")[0]), CONFIG.hidden_size
    generator = torch.Generator().manual_seed(2)
    tensors = {}
    for index in range(CONFIG.depth):
        key = f"diffusion_model.blocks.{index}.attn.qkv"
        tensors[f"{key}.lora_A.weight"] = torch.randn(4, width, generator=generator) * 0.2
        tensors[f"{key}.lora_B.weight"] = torch.randn(3 * width, 4, generator=generator) * 0.2
    save_file(tensors, folder / name)
    draw = {"size": size, "batch": 2}
    beside = run(core_nodes["LoraLoaderBypassModelOnly"], patcher, name, 0.7)
    within = run(core_nodes["LoraLoaderModelOnly"], patcher, name, 0.7)
    found = sample(beside, **draw)
    torch.testing.assert_close(found, sample(within, **draw), **NOISE)
    assert changed(found, sample(patcher, **draw))
    assert "not in model state_dict" not in caplog.text
    run(core_nodes["LoraLoaderBypassModelOnly"], patcher, lora_name, 1.0)
    assert "not in model state_dict" in caplog.text
