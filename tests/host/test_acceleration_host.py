"""What is kept across the steps of a run: nothing stale, nothing left behind, and the dials do what they say."""

import gc
import importlib

import pytest
import torch

from pixart_pack.demo.train import VAE_FILE
from pixart_pack.pixart.weights.controlnets import ControlNetCheckpoint
from pixart_pack.tests.host.test_controlnet_host import control_weights
from pixart_pack.tests.host.test_model import CONFIG, caption, count_forwards, sample
from pixart_pack.tests.tiny_pixart import make_weights, tiny_config

FLOAT_NOISE = {"atol": 2e-3, "rtol": 1e-4}  # float32 noise of the net, multiplied by sigma 157 and guidance 4.5


@pytest.fixture(scope="module")
def host_model(pack):
    return importlib.import_module("pixart_pack.nodes.host.denoiser.model")


@pytest.fixture(scope="module")
def host_attention(pack):
    return importlib.import_module("pixart_pack.nodes.host.denoiser.attention")


@pytest.fixture(scope="module")
def acceleration(pack):
    return importlib.import_module("pixart_pack.nodes.host.denoiser.acceleration")


@pytest.fixture(scope="module")
def patcher(host_model):
    return host_model.make_patcher(make_weights(CONFIG), CONFIG, dtype=torch.float32)


@pytest.fixture
def projections(patcher):
    """A list that grows by one whenever a block of the model reads a caption anew."""
    calls = []
    layers = [block.cross_attn.kv_linear for block in patcher.model.diffusion_model.blocks]
    hooks = [layer.register_forward_hook(lambda *_: calls.append(1)) for layer in layers]
    yield calls
    for hook in hooks:
        hook.remove()


def forget(patcher, monkeypatch):
    monkeypatch.setattr(patcher.model, "_remember", lambda caption: None)


PROMPTS = {"positive": caption(12, 1, keep=9), "negative": caption(3, 2)}
REGIONS = [
    [caption(5, 3)[0], {"area": (4, 6, 2, 3), "strength": 0.7}],
    [
        caption(8, 4)[0],
        {"mask": torch.linspace(0, 1, 13).expand(1, 9, 13), "mask_strength": 1.0},
    ],
    [caption(7, 5)[0], {"start_percent": 0.5, "end_percent": 1.0}],
]


def test_captions_are_read_once_a_run(comfy, patcher, projections, monkeypatch):
    kept = sample(comfy, patcher, **PROMPTS, steps=4, batch=2)
    assert len(projections) == CONFIG.depth
    gc.collect()
    assert not list(patcher.model._captions.items())  # gone with the run
    forget(patcher, monkeypatch)
    exact = sample(comfy, patcher, **PROMPTS, steps=4, batch=2)
    assert len(projections) == CONFIG.depth * (1 + 4)
    torch.testing.assert_close(kept, exact, **FLOAT_NOISE)


def test_captions_in_forwards_of_their_own_are_each_read_once(comfy, patcher, projections, monkeypatch):
    """As on a card that cannot hold both prompts at once."""
    together = sample(comfy, patcher, **PROMPTS, steps=3)
    projections.clear()
    monkeypatch.setattr(patcher.model, "memory_required", lambda *_, **__: float("inf"))
    alone = sample(comfy, patcher, **PROMPTS, steps=3)
    assert len(projections) == CONFIG.depth * 2
    torch.testing.assert_close(alone, together, **FLOAT_NOISE)


def test_memory_for_captions_is_bounded(comfy, patcher, host_model, projections, monkeypatch):
    expected = sample(comfy, patcher, **PROMPTS, steps=2)
    projections.clear()
    monkeypatch.setattr(host_model, "CAPTION_MEMORY_BYTES", 1000)
    assert torch.equal(sample(comfy, patcher, **PROMPTS, steps=2), expected)
    assert len(projections) == CONFIG.depth * 2


def test_weights_between_runs_count(comfy, patcher, monkeypatch):
    plain = sample(comfy, patcher, **PROMPTS)
    weighty = patcher.clone()
    weighty.add_patches({"diffusion_model.blocks.1.cross_attn.kv_linear.weight": (torch.full((96, 48), 0.05),)}, 1.0)
    changed = sample(comfy, weighty, **PROMPTS)
    again = sample(comfy, patcher, **PROMPTS)
    assert torch.equal(plain, again)
    forget(patcher, monkeypatch)
    torch.testing.assert_close(changed, sample(comfy, weighty, **PROMPTS), **FLOAT_NOISE)
    assert (changed - plain).abs().max() > 0.1


def test_weights_that_change_within_a_run_keep_nothing(comfy, patcher, projections):
    """Hooks patch the weights between steps."""
    patched = patcher.clone()
    hooks = importlib.import_module("comfy.hooks")
    patch = {"diffusion_model.blocks.1.cross_attn.kv_linear.weight": torch.full((96, 48), 0.05)}
    group = hooks.create_hook_model_as_lora(patch, None, 1.0, 0.0)
    keyframes = hooks.HookKeyframeGroup()
    keyframes.add(hooks.HookKeyframe(strength=1.0))
    keyframes.add(hooks.HookKeyframe(strength=0.0, start_percent=0.5))
    group.set_keyframes_on_hooks(keyframes)
    hooked = [PROMPTS["positive"][0], {**PROMPTS["positive"][1], "hooks": group}]
    sample(comfy, patched, hooked, PROMPTS["negative"], steps=4)
    assert len(projections) == CONFIG.depth * 2 * 4


def test_a_wrapper_may_put_another_caption(comfy, patcher, projections):
    extension = importlib.import_module("comfy.patcher_extension")
    model, other = patcher.clone(), caption(5, 9)[0]

    def swap(executor, x, timesteps, context, *args, **kwargs):
        kwargs.pop("attention_mask")
        return executor(x, timesteps, other.expand(len(x), -1, -1), *args, **kwargs)

    model.add_wrapper_with_key(extension.WrappersMP.DIFFUSION_MODEL, "swap", swap)
    swapped = sample(comfy, model, **PROMPTS)
    torch.testing.assert_close(swapped, sample(comfy, patcher, caption(5, 9), caption(5, 9)), **FLOAT_NOISE)


def test_a_patch_may_change_the_projected_caption(comfy, patcher, monkeypatch):
    model = patcher.clone()
    model.set_model_patch(lambda args: {**args, "txt": args["txt"] * 0.5}, "post_input")
    halved = sample(comfy, model, **PROMPTS)
    assert (halved - sample(comfy, patcher, **PROMPTS)).abs().max() > 0.01
    forget(patcher, monkeypatch)
    torch.testing.assert_close(halved, sample(comfy, model, **PROMPTS), **FLOAT_NOISE)


def test_attention_on_the_cpu_is_exact_and_can_be_chosen(comfy, patcher, host_attention, monkeypatch):
    fast = sample(comfy, patcher, **PROMPTS)
    assert host_attention._backend("cpu") is host_attention.host_backends.attention_pytorch
    monkeypatch.setattr(host_attention.args, "use_quad_cross_attention", True)
    assert host_attention._backend("cpu") is host_attention.host_backends.optimized_attention
    torch.testing.assert_close(fast, sample(comfy, patcher, **PROMPTS), **FLOAT_NOISE)


FIRST_BLOCKS, FORECAST, INPUT = MODES = ("first blocks", "first blocks, forecast", "input, forecast")


def cached(acceleration, model, threshold=0.5, **changes):
    settings = {"first_block": 1, "last_block": 0, "start_percent": 0.0, "end_percent": 1.0, "most_reuses": 100}
    return acceleration.cache_blocks(model, threshold, **{**settings, **changes})


@pytest.fixture
def blocks_run(patcher):
    """A list that grows by the number of each block that runs."""
    ran = []
    blocks = enumerate(patcher.model.diffusion_model.blocks)
    hooks = [block.register_forward_hook(lambda *_, i=i: ran.append(i)) for i, block in blocks]
    yield ran
    for hook in hooks:
        hook.remove()


def test_cache_that_never_reuses_is_exact(comfy, patcher, acceleration, blocks_run):
    expected = sample(comfy, patcher, **PROMPTS, steps=4)
    blocks_run.clear()
    assert torch.equal(sample(comfy, cached(acceleration, patcher, 0.0), **PROMPTS, steps=4), expected)
    assert len(blocks_run) == 4 * CONFIG.depth


def test_cache_skips_the_blocks_that_it_is_told(comfy, patcher, acceleration, blocks_run):
    sample(comfy, cached(acceleration, patcher, 1e9), **PROMPTS, steps=3)
    assert blocks_run == [0, 1, 2, 0, 0]
    blocks_run.clear()
    sample(comfy, cached(acceleration, patcher, 1e9, last_block=2), **PROMPTS, steps=3)
    assert blocks_run == [0, 1, 2, 0, 2, 0, 2]
    blocks_run.clear()
    sample(comfy, cached(acceleration, patcher, 1e9, most_reuses=1), **PROMPTS, steps=4)
    assert blocks_run == [0, 1, 2, 0, 0, 1, 2, 0]
    blocks_run.clear()
    sample(comfy, cached(acceleration, patcher, 1e9, start_percent=0.99), **PROMPTS, steps=3)
    assert blocks_run.count(1) == 3


@pytest.fixture(scope="module")
def block_cache(pack):
    return importlib.import_module("pixart_pack.nodes.host.denoiser.block_cache")


def on_a_line(positions, bend=0.0):
    """(probe, added) of whole evaluations of two pictures, moving along a line in each, and away from it by `bend`."""
    generator = torch.Generator().manual_seed(0)
    start, way, other_start, other_way, aside = torch.randn(5, 2, 6, 8, generator=generator)
    return [(start + p * way, other_start + p * other_way + bend * p * p * aside) for p in positions]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_skipped_goes_on_along_the_line(block_cache, dtype):
    """The third evaluation has shown that the line holds; the fourth, wherever on it, is foretold."""
    whole = [[t.to(dtype) for t in pair] for pair in on_a_line([0.0, 0.1, 0.2])]
    memory = block_cache._Memory(*whole[0])
    assert torch.equal(memory.predict(whole[1][0]), whole[0][1])
    memory = memory.follow(*whole[1])
    assert torch.equal(memory.predict(whole[2][0]), whole[1][1])  # not yet checked, so not followed
    memory = memory.follow(*whole[2])
    rounding = {torch.float32: 1e-5, torch.bfloat16: 0.15, torch.float16: 0.02}[dtype]  # of the steps, eight times less
    for place in (0.25, 0.3, 0.4):
        probe, added = (t.to(dtype) for t in on_a_line([place])[0])
        assert (memory.predict(probe) - added).abs().max() < rounding
    back, far = on_a_line([0.1])[0][0].to(dtype), on_a_line([9.0])[0][0].to(dtype)
    assert torch.equal(memory.predict(back), whole[2][1])  # a solver that looks back
    reach = (memory.predict(far) - whole[2][1]).abs().max() / (whole[2][1] - whole[1][1]).abs().max()
    assert 2.5 < reach < block_cache.LONGEST_LINE + 0.2


def test_a_line_that_did_not_hold_is_not_followed(block_cache):
    """What went back and forth is reused as it was."""
    probes = [probe for probe, _ in on_a_line([0.0, 1.0, 2.0, 3.0])]
    swing = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(9))
    memory = block_cache._Memory(probes[0], swing).follow(probes[1], -swing).follow(probes[2], swing)
    assert torch.equal(memory.predict(probes[3]), swing)


def test_large_numbers_in_half_precision_stay_finite(block_cache):
    pairs = [[(t * 3000).half() for t in pair] for pair in on_a_line([0.0, 0.5, 1.0])]
    memory = block_cache._Memory(*pairs[0]).follow(*pairs[1]).follow(*pairs[2])
    assert memory.predict(pairs[2][0] + pairs[1][0] * 0.1).isfinite().all()
    still = block_cache._Memory(*pairs[0]).follow(*pairs[0]).follow(*pairs[0])
    assert torch.equal(still.predict(pairs[0][0]), pairs[0][1])


@pytest.mark.parametrize("name", ["euler_ancestral", "dpm_2", "heun", "dpmpp_2s_ancestral", "pixart_sa_solver"])
def test_cache_under_samplers_that_evaluate_out_of_order(comfy, patcher, acceleration, blocks_run, name):
    exact = sample(comfy, patcher, **PROMPTS, steps=6, sampler_name=name)
    whole, nothing = len(blocks_run), torch.zeros_like(exact)
    for mode in MODES:
        blocks_run.clear()
        model = cached(acceleration, patcher, 0.6, most_reuses=1, mode=mode)
        found = sample(comfy, model, **PROMPTS, steps=6, sampler_name=name)
        assert len(blocks_run) < whole, mode
        assert (found - exact).square().mean() < 0.2 * (nothing - exact).square().mean(), mode


@pytest.mark.parametrize("name", ["_Forecast", "_InputForecast"])
def test_a_forecast_goes_on_with_the_noise_level(block_cache, name):
    """By its distance from the last two whole evaluations, whatever the probe does."""
    generator = torch.Generator().manual_seed(0)
    probe, start, way = torch.randn(3, 2, 6, 8, generator=generator)
    memory = getattr(block_cache, name)(probe, start, place=3.0)
    assert torch.equal(memory.predict(probe, 2.0), start)
    memory = memory.follow(probe, start + way, 2.0)
    torch.testing.assert_close(memory.predict(probe, 1.5), start + 1.5 * way)
    assert torch.equal(memory.predict(probe, 2.5), start + way)  # a solver that looks back
    again = memory.follow(probe, start + 1.1 * way, 2.0)  # at the same level, as Heun's solver does
    torch.testing.assert_close(again.predict(probe, 1.0), start + 2.1 * way)
    memory = memory.follow(probe, start + 2 * way, 1.0)
    torch.testing.assert_close(memory.predict(probe, 0.0), start + 3 * way)
    far = memory.predict(probe, -100.0)
    torch.testing.assert_close(far, start + (2 + block_cache.LONGEST_FORECAST) * way)
    swung = memory.follow(probe, start, 0.0)  # the line did not hold
    assert torch.equal(swung.predict(probe, -1.0), start)


def test_changes_of_the_input_are_summed_up(block_cache):
    memory = block_cache._InputForecast(torch.ones(1, 2, 4), torch.ones(1, 2, 4), place=2.0)
    for step in (1.1, 1.2, 1.3):
        memory.note(torch.full((1, 2, 4), step))
    assert abs(float(memory.drift) - (0.1 + 0.1 / 1.1 + 0.1 / 1.2)) < 1e-6
    assert float(memory.follow(torch.ones(1, 2, 4), memory.added, 1.0).drift) == 0.0


def test_the_input_tells_without_a_block(comfy, patcher, acceleration, blocks_run):
    """Also with a patch that replaces what all blocks read, and the other dials."""
    model = cached(acceleration, patcher, 1e9, mode=INPUT)
    sample(comfy, model, **PROMPTS, steps=3)
    assert blocks_run == [0, 1, 2]
    blocks_run.clear()
    sample(comfy, cached(acceleration, patcher, 1e9, mode=INPUT, last_block=2), **PROMPTS, steps=3)
    assert blocks_run == [0, 1, 2, 2, 2]
    exact = sample(comfy, patcher, **PROMPTS, steps=4)
    for mode in MODES:
        assert torch.equal(sample(comfy, cached(acceleration, patcher, 0.0, mode=mode), **PROMPTS, steps=4), exact)


def test_tiles_have_memories_of_their_own(comfy, patcher, acceleration, blocks_run):
    """A node that evaluates a picture in tiles calls the model several times for one prompt at one noise level."""

    def halves(apply_model, given):
        x, c = given["input"], given["c"]
        return torch.cat([apply_model(part, given["timestep"], **c) for part in x.chunk(2, dim=3)], dim=3)

    tiled = patcher.clone()
    tiled.set_model_unet_function_wrapper(halves)
    exact = sample(comfy, tiled, **PROMPTS, size=(8, 16), steps=3)
    for mode in MODES:
        blocks_run.clear()
        model = cached(acceleration, tiled, 1e9, mode=mode, most_reuses=1)
        found = sample(comfy, model, **PROMPTS, size=(8, 16), steps=3)
        probes = [] if mode == INPUT else [0, 0]
        assert blocks_run == [0, 1, 2, 0, 1, 2, *probes, 0, 1, 2, 0, 1, 2], mode
        assert found.isfinite().all() and not torch.equal(found, exact)


def test_two_models_in_turn_and_one_within_the_other(comfy, patcher, acceleration, host_model):
    """Each run has memories of its own, also one that begins while another is on its way."""
    other = host_model.make_patcher(make_weights(CONFIG, seed=7), CONFIG, dtype=torch.float32)
    models = [cached(acceleration, each, 0.6, mode=INPUT) for each in (patcher, other)]
    alone = [sample(comfy, each, **PROMPTS, steps=4) for each in models]
    within = []

    def begin(step, *_):
        if step == 1:
            within.append(sample(comfy, models[1], **PROMPTS, steps=4))

    assert torch.equal(sample(comfy, models[0], **PROMPTS, steps=4, callback=begin), alone[0])
    assert torch.equal(within[0], alone[1])


def test_cache_does_not_depend_on_how_prompts_are_batched(comfy, patcher, acceleration, monkeypatch):
    model = cached(acceleration, patcher, 1e9)
    together = sample(comfy, model, **PROMPTS, steps=4, batch=2)
    monkeypatch.setattr(patcher.model, "memory_required", lambda *_, **__: float("inf"))
    torch.testing.assert_close(sample(comfy, model, **PROMPTS, steps=4, batch=2), together, **FLOAT_NOISE)


def test_every_run_has_a_cache_of_its_own(comfy, patcher, acceleration):
    """Also after one that was interrupted, and when the model is sampled at another size."""
    model = cached(acceleration, patcher, 1e9)
    first = sample(comfy, model, **PROMPTS, steps=4)
    options = dict(model.model_options["transformer_options"])

    class Stop(RuntimeError):
        pass

    def stop(step, *_):
        if step == 1:
            raise Stop

    with pytest.raises(Stop):
        sample(comfy, model, **PROMPTS, steps=4, callback=stop)
    sample(comfy, model, **PROMPTS, steps=4, size=(8, 8))
    assert torch.equal(sample(comfy, model, **PROMPTS, steps=4), first)
    assert model.model_options["transformer_options"].keys() == options.keys()


def test_a_control_that_ends_is_not_reused(patcher, acceleration):
    cache_module = importlib.import_module("pixart_pack.nodes.host.denoiser.block_cache")
    cache = cache_module.BlockCache(1e9, 1, 3, lambda sigma: True, 100)
    options = {"uuids": ["a"], "sigmas": torch.ones(1), cache_module.BLOCK_CACHE: cache}
    net, states = patcher.model.diffusion_model, caption(5, 1)[0]
    latent, timestep = torch.randn(1, 4, 8, 8), torch.tensor([500.0])
    steered = {"output": [torch.randn(1, 16, 48)]}
    with torch.no_grad():
        for control in (None, steered, None, steered):
            net(latent, timestep, states, control=control, transformer_options=options)
    assert (cache.evaluations, cache.skipped) == (4, 2)


@pytest.mark.parametrize(("first", "last"), [(1, 2), (2, 3), (1, 3), (1, 4), (3, 5), (4, 6), (1, 0)])
def test_cache_beside_a_control(comfy, pack, acceleration, host_model, first, last):
    """A control reads its copies one after another: none is left out that a later one needs."""
    config, copies = tiny_config(depth=6), 3
    controls = importlib.import_module("pixart_pack.nodes.host.controlnet")
    checkpoint = ControlNetCheckpoint("edges", control_weights(config, copies=copies), config, copies, None, None)
    control = controls.make_control(checkpoint, torch.float32)
    model = host_model.make_patcher(make_weights(config), config, dtype=torch.float32)
    ran = []
    for index, block in enumerate(model.model.diffusion_model.blocks):
        block.register_forward_hook(lambda *_, index=index: ran.append(index))
    hint = torch.rand(1, 72, 104, 3).round()
    vae = importlib.import_module("pixart_pack.nodes.host.loading").read_vae(VAE_FILE)
    positive, negative = controls.apply_control(
        [PROMPTS["positive"]], [PROMPTS["negative"]], control, hint, vae, 1.0, 0.0, 1.0
    )
    exact = sample(comfy, model, positive[0], negative[0], steps=2)
    ran.clear()
    model = cached(acceleration, model, 1e9, first_block=first, last_block=last)
    found = sample(comfy, model, positive[0], negative[0])
    behind = max(last, copies + 1) if last else 6
    assert ran == [*range(6), *range(first), *range(behind, 6)]
    assert found.isfinite().all() and not torch.equal(found, exact)


def test_wrong_blocks_are_refused(patcher, acceleration):
    with pytest.raises(ValueError, match=r"Wrong blocks: got 2 to 9, expected 1 <= first_block < last_block <= 3"):
        cached(acceleration, patcher, first_block=2, last_block=9)
    with pytest.raises(ValueError, match="Empty interval: got start 0.8 and end 0.5"):
        cached(acceleration, patcher, start_percent=0.8, end_percent=0.5)


def test_guidance_in_an_interval(comfy, patcher, acceleration):
    model, seen = count_forwards(acceleration.limit_guidance(patcher, 0.0, 0.5))
    sample(comfy, model, **PROMPTS, steps=4)
    assert sorted(shape[0] for shape, _ in seen) == [1, 1, 2, 2]
    assert [shape[0] for shape, _ in seen] == [2, 2, 1, 1]
    everywhere = acceleration.limit_guidance(patcher, 0.0, 1.0)
    assert torch.equal(sample(comfy, everywhere, **PROMPTS), sample(comfy, patcher, **PROMPTS))
    with pytest.raises(ValueError, match="Empty interval"):
        acceleration.limit_guidance(patcher, 0.5, 0.5)


@pytest.mark.parametrize("kind", ["CFGGuider", "PerpNegGuider", "DualCFGGuider", "BasicGuider"])
def test_interval_under_every_guider(comfy, core_nodes, patcher, acceleration, kind):
    """Outside of it the positive prompt alone is computed, however many others the guider has."""
    samplers, positive = importlib.import_module("comfy.samplers"), [PROMPTS["positive"]]
    others = {
        "CFGGuider": ([PROMPTS["negative"]], 4.5),
        "PerpNegGuider": ([PROMPTS["negative"]], [caption(1, 7)], 4.5, 1.0),
        "DualCFGGuider": ([caption(6, 8)], [PROMPTS["negative"]], 4.5, 3.0, "regular"),
        "BasicGuider": (),
    }

    def run(model, *conds, kind=kind):
        model, seen = count_forwards(model)
        guider = core_nodes[kind].execute(model, *conds)[0]
        noise = torch.randn(2, 4, 9, 13, generator=torch.Generator().manual_seed(5))
        sampler, sigmas = samplers.sampler_object("euler"), acceleration_sigmas(patcher)
        with torch.inference_mode():
            latent = guider.sample(noise, torch.zeros_like(noise), sampler, sigmas, disable_pbar=True, seed=5)
        return latent, [shape[0] for shape, _ in seen]

    def acceleration_sigmas(model):
        return samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", 4)

    exact, rows = run(patcher, positive, *others[kind])
    everywhere, _ = run(acceleration.limit_guidance(patcher, 0.0, 1.0), positive, *others[kind])
    assert torch.equal(everywhere, exact)
    _, found = run(acceleration.limit_guidance(patcher, 0.0, 0.5), positive, *others[kind])
    assert found == [*rows[:2], 2, 2]
    unguided, _ = run(acceleration.limit_guidance(patcher, 0.999, 1.0), positive, *others[kind])
    assert torch.equal(unguided, run(patcher, positive, kind="BasicGuider")[0])


def test_interval_under_samplers_that_read_the_negative(comfy, patcher, acceleration):
    """They ask for it where guidance is off, too."""
    model, seen = count_forwards(acceleration.limit_guidance(patcher, 0.0, 0.5))
    found = sample(comfy, model, **PROMPTS, steps=4, sampler_name="euler_cfg_pp", cfg=1.5)
    assert [shape[0] for shape, _ in seen] == [2] * 4 and found.isfinite().all()


GUIDERS = {
    "CFGGuider": ([PROMPTS["negative"]], 4.5),
    "PerpNegGuider": ([PROMPTS["negative"]], [caption(1, 7)], 4.5, 1.0),
    "DualCFGGuider": ([caption(6, 8)], [PROMPTS["negative"]], 4.5, 3.0, "regular"),
    "BasicGuider": (),
}


def guide(core_nodes, model, kind="CFGGuider", conds=None, name="euler", steps=4):
    """(latents of two pictures, the rows of each forward pass) under a guider of the host."""
    samplers = importlib.import_module("comfy.samplers")
    model, seen = count_forwards(model)
    guider = core_nodes[kind].execute(model, [PROMPTS["positive"]], *(conds or GUIDERS[kind]))[0]
    noise = torch.randn(2, 4, 9, 13, generator=torch.Generator().manual_seed(5))
    sigmas = samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", steps)
    with torch.inference_mode():
        given = noise, torch.zeros_like(noise), samplers.sampler_object(name), sigmas
        latent = guider.sample(*given, disable_pbar=True, seed=5)
    return latent, [shape[0] for shape, _ in seen]


def reused(acceleration, model, every=2, forecast="as it was", start=0.0, end=1.0):
    return acceleration.reuse_guidance(model, every, forecast, start, end)[0]


@pytest.mark.parametrize("kind", GUIDERS)
def test_reuse_under_every_guider(core_nodes, patcher, acceleration, kind):
    """In every second step the positive prompt alone is computed, and the others follow it."""
    exact, rows = guide(core_nodes, patcher, kind)
    same, _ = guide(core_nodes, reused(acceleration, reused(acceleration, patcher), 1), kind)
    assert torch.equal(same, exact)
    found, fewer = guide(core_nodes, reused(acceleration, patcher), kind)
    assert fewer == [rows[0], 2, rows[2], 2] and found.isfinite().all()
    assert torch.equal(found, exact) == (kind == "BasicGuider")
    assert torch.equal(guide(core_nodes, reused(acceleration, patcher), kind)[0], found)  # nothing was left behind
    _, late = guide(core_nodes, reused(acceleration, patcher, start=0.5), kind)
    assert late == [*rows[:3], 2]


SOLVERS = ("heun", "dpm_2", "euler_ancestral", "dpmpp_sde", "euler_cfg_pp", "uni_pc", "pixart_sa_solver")


@pytest.mark.parametrize("name", SOLVERS)
def test_reuse_under_solvers_that_call_twice_or_draw_noise(comfy, core_nodes, patcher, acceleration, name):
    """Both prompts alike: their difference is naught, wherever and however often a solver looks."""
    both = {"kind": "CFGGuider", "conds": ([PROMPTS["positive"]], 4.5), "name": name, "steps": 5}
    exact, rows = guide(core_nodes, patcher, **both)
    found, fewer = guide(core_nodes, reused(acceleration, patcher, 3, "along a line"), **both)
    assert sum(fewer) < 0.8 * sum(rows)
    torch.testing.assert_close(found, exact, **FLOAT_NOISE)
    assert reused(acceleration, patcher).model_options["transformer_options"].keys() >= {
        "pixart_guidance_reuse_settings"
    }


def test_reuse_says_where_it_cannot_act(comfy, core_nodes, patcher, acceleration, caplog):
    """NAG reads the negative prompt in the blocks of every step: it is not to lose it in silence."""
    nag = core_nodes["NAGuidance"].execute(patcher, 5.0, 0.5, 1.5)[0]
    model, notice = acceleration.reuse_guidance(nag, 2, "as it was", 0.0, 1.0)
    assert "reads the negative prompt" in notice
    assert torch.equal(sample(comfy, model, **PROMPTS, steps=4), sample(comfy, nag, **PROMPTS, steps=4))
    said = []
    later, notice = acceleration.reuse_guidance(patcher, 2, "as it was", 0.0, 1.0, said.append)
    assert notice == ""
    caplog.clear()
    later = core_nodes["NAGuidance"].execute(later, 5.0, 0.5, 1.5)[0]
    assert torch.equal(sample(comfy, later, **PROMPTS, steps=4), sample(comfy, nag, **PROMPTS, steps=4))
    assert "reads the negative prompt" in caplog.text and said == [acceleration.IN_THE_WAY]
    sample(comfy, reused(acceleration, patcher), **PROMPTS, steps=4, cfg=1.0)
    assert "had nothing to do" in caplog.text
    with pytest.raises(ValueError, match="Empty interval"):
        reused(acceleration, patcher, start=0.5, end=0.5)


def test_reuse_where_prompts_are_evaluated_apart(comfy, core_nodes, patcher, acceleration, blocks_run):
    """By a guider of two models, and a node that skips layers for the negative prompt alone."""
    apart = [PROMPTS["negative"]]
    skipping = core_nodes["SkipLayerGuidanceDiTSimple"].execute(
        patcher, double_layers="1", single_layers="", start_percent=0.0, end_percent=1.0
    )[0]
    exact, rows = guide(core_nodes, skipping)
    found, fewer = guide(core_nodes, reused(acceleration, skipping))
    assert (rows, fewer) == ([2, 2] * 4, [2, 2, 2] * 2)
    assert found.isfinite().all() and not torch.equal(found, exact)
    samplers = importlib.import_module("comfy.samplers")
    if "DualModelGuider" not in core_nodes:
        return  # hosts before it
    blocks_run.clear()
    model = cached(acceleration, reused(acceleration, patcher), 0.0)
    guider = core_nodes["DualModelGuider"].execute(model, [PROMPTS["positive"]], 4.5, patcher.clone(), apart)[0]
    noise = torch.randn(1, 4, 9, 13, generator=torch.Generator().manual_seed(5))
    sigmas = samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", 4)
    with torch.inference_mode():
        guider.sample(noise, torch.zeros_like(noise), samplers.sampler_object("euler"), sigmas, disable_pbar=True)
    assert len(blocks_run) == CONFIG.depth * (4 + 2)


def test_reuse_with_regions_hooks_and_all_other_dials(comfy, patcher, acceleration, blocks_run):
    """A prompt that begins halfway has a difference of its own, which is computed when it begins."""
    comfy_sample, conditions = importlib.import_module("comfy.sample"), [PROMPTS["positive"], *REGIONS]

    def run(model, steps=6):
        latent = torch.zeros(2, 4, 9, 13)
        blocks_run.clear()
        with torch.inference_mode():
            return comfy_sample.sample(
                model, comfy_sample.prepare_noise(latent, 5), steps, 4.5, "euler", "simple", conditions,
                [PROMPTS["negative"]], latent, seed=5, disable_pbar=True,
            )  # fmt: skip

    exact = run(patcher)
    assert torch.equal(run(reused(acceleration, patcher, 9, start=0.0, end=0.001)), exact)
    assert len(blocks_run) == 36
    found = run(reused(acceleration, patcher))
    assert found.isfinite().all() and not torch.equal(found, exact)
    model = cached(acceleration, reused(acceleration, patcher), 1e9, most_reuses=1)
    model = acceleration.limit_guidance(model, 0.0, 0.6)
    together = run(model)
    # Block Cache alone runs 26: here steps with all prompts and steps with the positive one have memories of their own.
    assert together.isfinite().all() and len(blocks_run) == 28
    assert torch.equal(run(model), together)
    assert not list(patcher.model._captions.items())


@pytest.fixture(scope="module")
def sigma(host_model):
    """A model whose second block compresses its keys itself."""
    config = tiny_config("sigma-512", kv_compress_ratio=2, kv_compress_layers=(1,))
    return host_model.make_patcher(make_weights(config), config, dtype=torch.float32)


@pytest.fixture
def attended(comfy, monkeypatch, host_attention):
    """A list that grows by (queries, keys) with each attention."""
    seen, attend = [], host_attention._host_attend

    def note(options, q, k, v, num_heads, mask=None):
        assert k.shape == v.shape
        seen.append((q.shape[1], k.shape[1]))
        return attend(options, q, k, v, num_heads, mask)

    monkeypatch.setattr(host_attention, "_host_attend", note)
    return seen


def compressed(acceleration, model, factor=2, blocks="all", start=0.0, end=1.0):
    return acceleration.compress_attention(model, factor, blocks, start, end)


def test_compression_by_one_is_exact(comfy, patcher, acceleration):
    same = compressed(acceleration, compressed(acceleration, patcher, 3), 1)
    assert torch.equal(sample(comfy, same, **PROMPTS), sample(comfy, patcher, **PROMPTS))


@pytest.mark.parametrize(
    ("size", "tokens", "keys"), [((9, 13), 35, 12), ((8, 8), 16, 4), ((1, 2), 1, 1), ((2, 12), 6, 3)]
)
def test_compression_at_any_size(comfy, patcher, acceleration, attended, size, tokens, keys):
    found = sample(comfy, compressed(acceleration, patcher), **PROMPTS, size=size, batch=3, steps=1)
    assert found.shape == (3, 4, *size) and found.isfinite().all()
    assert attended == [(tokens, keys), (tokens, 9)] * CONFIG.depth


def test_compression_in_chosen_blocks_and_a_part_of_the_sampling(comfy, patcher, acceleration, attended):
    sample(comfy, compressed(acceleration, patcher, blocks="every other"), **PROMPTS, size=(8, 8), steps=1)
    assert [keys for _, keys in attended[::2]] == [16, 4, 16]
    attended.clear()
    sample(comfy, compressed(acceleration, patcher, blocks="later half", end=0.5), **PROMPTS, size=(8, 8), steps=4)
    assert [keys for _, keys in attended[::2]] == [16, 4, 4] * 2 + [16, 16, 16] * 2
    with pytest.raises(ValueError, match="Empty interval"):
        compressed(acceleration, patcher, start=0.5, end=0.5)


def test_compression_leaves_trained_compression_and_replacements_alone(comfy, sigma, acceleration, attended):
    model = compressed(acceleration, sigma)
    sample(comfy, model, **PROMPTS, size=(8, 8), steps=1)
    assert [keys for _, keys in attended[::2]] == [4, 4, 4]
    seen = []

    def replaced(q, k, v, options):
        seen.append((q.shape, k.shape))
        return v

    model.set_model_attn1_replace(replaced, "double_block", 2)
    attended.clear()
    sample(comfy, model, **PROMPTS, size=(8, 8), steps=1)
    assert len(seen) == 1 and seen[0][0] == seen[0][1]
    assert [keys for queries, keys in attended if keys != 9] == [4, 4]


def test_compression_equals_attention_over_means(comfy, patcher, acceleration, attended):
    """As an attention override of the host sees it, which is given the fewer keys."""
    model = compressed(acceleration, patcher)
    expected = sample(comfy, model, **PROMPTS, size=(8, 6), steps=1)
    called = []

    def override(attend, *args, **kwargs):
        called.append(args[1].shape[1])
        return attend(*args, **kwargs)

    model.model_options["transformer_options"]["optimized_attention_override"] = override
    torch.testing.assert_close(sample(comfy, model, **PROMPTS, size=(8, 6), steps=1), expected, **FLOAT_NOISE)
    assert called[::2] == [4] * CONFIG.depth
    uniform = torch.ones(1, 12, 5).cumsum(1)
    layers = importlib.import_module("pixart_pack.pixart.layers")
    means = layers.average_windows(uniform, (4, 3), 2)[0, :, 0]
    assert means.tolist() == [3.0, 4.5, 9.0, 10.5]  # of 1 2 4 5, 3 6, 7 8 10 11, 9 12


def test_dials_compose(comfy, patcher, acceleration, blocks_run):
    model = compressed(acceleration, cached(acceleration, patcher, 1e9, most_reuses=1), start=0.3)
    model = acceleration.limit_guidance(model, 0.0, 0.5)
    found = sample(comfy, model, **PROMPTS, steps=4, batch=2)
    assert found.isfinite().all() and blocks_run == [0, 1, 2, 0, 0, 1, 2, 0]
    assert torch.equal(sample(comfy, model, **PROMPTS, steps=4, batch=2), found)


@pytest.mark.parametrize(
    "settings",
    [
        {"batch": 4, "denoise": 0.6},
        {"size": (5, 16), "cfg": 1.0},
        {"sampler_name": "dpmpp_sde", "batch": 2},
        {"sampler_name": "dpmpp_2m_sde", "scheduler": "karras", "size": (1, 2)},
    ],
)
def test_neutral_dials_are_exact_and_others_run(comfy, patcher, acceleration, settings):
    def turn(threshold, factor, interval):
        model = cached(acceleration, compressed(acceleration, patcher, factor), threshold)
        return acceleration.limit_guidance(model, *interval)

    exact = sample(comfy, patcher, **PROMPTS, steps=5, **settings)
    assert torch.equal(sample(comfy, turn(0.0, 1, (0.0, 1.0)), **PROMPTS, steps=5, **settings), exact)
    found = sample(comfy, turn(1e9, 2, (0.4, 0.8)), **PROMPTS, steps=5, **settings)
    assert found.isfinite().all() and not torch.equal(found, exact)


def test_cache_of_regions_and_parts_of_the_sampling(comfy, patcher, acceleration):
    """Each prompt has memories of its own, whatever part of the picture and of the time is its."""
    comfy_sample, conditions = importlib.import_module("comfy.sample"), [PROMPTS["positive"], *REGIONS]

    def run(model):
        latent = torch.zeros(2, 4, 9, 13)
        noise = comfy_sample.prepare_noise(latent, 5)
        with torch.inference_mode():
            return comfy_sample.sample(
                model, noise, 6, 4.5, "euler", "simple", conditions, [PROMPTS["negative"]], latent, seed=5,
                disable_pbar=True,
            )  # fmt: skip

    exact = run(patcher)
    assert torch.equal(run(cached(acceleration, patcher, 0.0)), exact)
    for mode in MODES:
        model = cached(acceleration, patcher, 1e9, most_reuses=1, mode=mode)
        found = run(model)
        assert found.isfinite().all() and not torch.equal(found, exact)
        assert torch.equal(run(model), found)
    assert not list(patcher.model._captions.items())
