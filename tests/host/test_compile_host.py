"""PixArt under the host's own compiling node: what decides between blocks goes on deciding, and few graphs do."""

import importlib
import logging
import re

import pytest
import torch

from pixart_pack.demo.train import VAE_FILE
from pixart_pack.pixart.weights.controlnets import ControlNetCheckpoint
from pixart_pack.tests.host.test_controlnet_host import control_weights
from pixart_pack.tests.host.test_model import CONFIG, caption, sample
from pixart_pack.tests.tiny_pixart import make_weights, tiny_config

FLOAT_NOISE = {"atol": 2e-3, "rtol": 1e-4}  # float32 noise of the net, multiplied by sigma 157 and guidance 4.5
PROMPTS = {"positive": caption(12, 1, keep=9), "negative": caption(3, 2)}
WEIGHT = "diffusion_model.blocks.1.attn.qkv.weight"


@pytest.fixture(scope="module")
def host_model(pack):
    return importlib.import_module("pixart_pack.nodes.host.denoiser.model")


@pytest.fixture(scope="module")
def acceleration(pack):
    return importlib.import_module("pixart_pack.nodes.host.denoiser.acceleration")


@pytest.fixture(scope="module")
def patcher(host_model):
    with torch.inference_mode():  # as the host runs its nodes: weights of before and of within would be a graph each
        return host_model.make_patcher(make_weights(CONFIG), CONFIG, dtype=torch.float32)


@pytest.fixture(scope="module")
def compile_as_host(comfy):
    """A function of (MODEL, backend) that compiles as the host's TorchCompileModel does, with a backend of any kind."""
    node = importlib.import_module("comfy_extras.nodes_torch_compile")
    helpers = importlib.import_module("comfy_api.torch_helpers")

    def compile_model(model, backend="eager", **settings):
        model = model.clone(disable_dynamic=True)
        filtered = {"guard_filter_fn": node.skip_torch_compile_dict}
        helpers.set_torch_compile_wrapper(model=model, backend=backend, options=filtered, **settings)
        return model

    return compile_model


def counter():
    return importlib.import_module("torch._dynamo.testing").CompileCounter()


@pytest.mark.parametrize("settings", [{}, {"fullgraph": True}, {"dynamic": True}])
def test_three_graphs_do_for_every_size_batch_and_prompt(comfy, patcher, compile_as_host, settings):
    count = counter()
    model = compile_as_host(patcher, count, **settings)
    other = {"positive": caption(8, 4), "negative": caption(1, 2)}
    for prompts, size, batch, cfg in [
        (PROMPTS, (9, 13), 1, 4.5),
        (PROMPTS, (9, 13), 1, 1.0),
        (other, (16, 6), 3, 4.5),
        (other, (2, 8), 4, 1.0),
        (PROMPTS, (7, 7), 1, 4.5),
    ]:
        given = {**prompts, "size": size, "batch": batch, "cfg": cfg, "steps": 1}
        torch.testing.assert_close(sample(comfy, model, **given), sample(comfy, patcher, **given), **FLOAT_NOISE)
    assert count.frame_count <= 3


def skips(caplog):
    return re.findall(r"PixArt Block Cache: (\d+ of \d+) evaluations", caplog.text)


def dials(acceleration, model, threshold=0.6, window=1, interval=(0.0, 1.0), mode="first blocks", every=1):
    model = acceleration.cache_blocks(model, threshold, 1, 0, 0.0, 1.0, 2, mode)
    model = acceleration.reuse_guidance(model, every, "as it was", 0.0, 1.0)[0]
    model = acceleration.compress_attention(model, window, "every other", 0.0, 0.6)
    return acceleration.limit_guidance(model, *interval)


def test_dials_decide_as_uncompiled(comfy, patcher, acceleration, compile_as_host, caplog):
    """One after another on the same net, whose graphs are the same: each setting counts, and the cache skips."""
    for settings in (
        {"window": 1},
        {"window": 2},
        {"window": 3, "threshold": 1e9},
        {"threshold": 0.0},
        {"threshold": 1e9, "interval": (0.0, 0.5)},
        {"mode": "input, forecast", "every": 2},
        {"mode": "first blocks, forecast", "every": 3},
    ):
        model, found = dials(acceleration, patcher, **settings), []
        with caplog.at_level(logging.INFO):
            for each in (model, compile_as_host(model)):
                found.append((sample(comfy, each, **PROMPTS, steps=6), skips(caplog)))
                caplog.clear()
        torch.testing.assert_close(found[1][0], found[0][0], **FLOAT_NOISE)
        assert len(found[0][1]) == 1 and found[0][1] == found[1][1]
        assert found[0][1][0].startswith("0 ") == (settings.get("threshold") == 0.0)


def weighted(patcher, strength):
    model = patcher.clone()
    model.add_patches({WEIGHT: (torch.full((3 * 48, 48), 0.05),)}, strength)
    return model


def test_other_weights_need_no_other_graph(comfy, patcher, compile_as_host):
    count, pictures = counter(), []
    for strength in (0.0, 1.0, -0.5):
        model = weighted(patcher, strength)
        pictures.append(sample(comfy, compile_as_host(model, count), **PROMPTS))
        torch.testing.assert_close(pictures[-1], sample(comfy, model, **PROMPTS), **FLOAT_NOISE)
    assert count.frame_count == 1
    assert min((pictures[0] - other).abs().max() for other in pictures[1:]) > 0.1


def with_post_input(model):
    model.set_model_patch(lambda args: {**args, "txt": args["txt"] * 0.5}, "post_input")


def with_double_block(model):
    model.set_model_patch(lambda args: {**args, "img": args["img"] * (1 + args["block_index"])}, "double_block")


def with_replaced_block(model):
    def run(given, extra):
        out = extra["original_block"](given)
        return {**out, "img": out["img"] + 0.5 * given["img"]}

    model.set_model_patch_replace(run, "dit", "double_block", 1)


def with_replaced_attention(model):
    model.set_model_attn1_replace(lambda q, k, v, options: v * options["n_heads"], "double_block", 1)


def with_override(model):
    def override(attend, *args, transformer_options, **kwargs):
        out = attend(*args, **kwargs, transformer_options=transformer_options)
        return out * (1 + 0.1 * transformer_options["block_index"])

    model.model_options["transformer_options"]["optimized_attention_override"] = override


def with_wrapper(model):
    """It decides by a number of its own, which no guard of a compiler sees."""
    extension, calls = importlib.import_module("comfy.patcher_extension"), []

    def halve_every_other(executor, x, *args, **kwargs):
        calls.append(1)
        return executor(x, *args, **kwargs) * (1.0 if len(calls) % 2 else 0.5)

    model.add_wrapper_with_key(extension.WrappersMP.DIFFUSION_MODEL, "halve", halve_every_other)


PATCHES = (
    with_post_input,
    with_double_block,
    with_replaced_block,
    with_replaced_attention,
    with_override,
    with_wrapper,
)


@pytest.mark.parametrize("patch", PATCHES)
def test_patches_work_as_uncompiled(comfy, patcher, compile_as_host, patch):
    plain, model = sample(comfy, patcher, **PROMPTS), patcher.clone()
    patch(model)
    expected = sample(comfy, model, **PROMPTS)
    assert not torch.equal(expected, plain)
    torch.testing.assert_close(sample(comfy, compile_as_host(model), **PROMPTS), expected, **FLOAT_NOISE)
    torch.testing.assert_close(sample(comfy, compile_as_host(patcher), **PROMPTS), plain, **FLOAT_NOISE)


def test_controlnets_steer_as_uncompiled(comfy, pack, patcher, compile_as_host):
    """Chained, scaled, in a part of the sampling; the base and both branches by the same graphs."""
    controls = importlib.import_module("pixart_pack.nodes.host.controlnet")
    vae, count = importlib.import_module("pixart_pack.nodes.host.loading").read_vae(VAE_FILE), counter()
    sides = [[PROMPTS["positive"]], [PROMPTS["negative"]]]
    plain = sample(comfy, patcher, **PROMPTS, steps=3)
    for seed, (strength, end) in enumerate([(1.0, 1.0), (0.6, 0.5)]):
        weights = control_weights(CONFIG, copies=2)
        checkpoint = ControlNetCheckpoint("edges", weights, CONFIG, 2, None, None)
        hint = torch.rand(1, 72, 104, 3, generator=torch.Generator().manual_seed(seed)).round()
        control = controls.make_control(checkpoint, torch.float32)
        sides = controls.apply_control(*sides, control, hint, vae, strength, 0.0, end)
    given = {"positive": sides[0][0], "negative": sides[1][0], "steps": 3}
    expected = sample(comfy, patcher, **given)
    assert (expected - plain).abs().max() > 0.01
    for _ in range(2):
        found = sample(comfy, compile_as_host(patcher, count), **given)
        torch.testing.assert_close(found, expected, **FLOAT_NOISE)
    assert count.frame_count <= 2  # a control's layers cast their weights, the base's need not


def test_a_reference_is_read_as_uncompiled(comfy, host_model, compile_as_host):
    """In the steps that read it blocks run uncompiled; the others go on by the graphs."""
    steering = importlib.import_module("pixart_pack.nodes.host.steering.reference")
    vae = importlib.import_module("pixart_pack.nodes.host.loading").read_vae(VAE_FILE)
    image = torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(3))
    config = tiny_config(base_size=4)  # to whose 64 px the reference is fitted
    patcher = host_model.make_patcher(make_weights(config), config, dtype=torch.float32)
    model, count = steering.add_reference(patcher, image, vae, 1.0, 0.0, 0.6), counter()
    found = sample(comfy, compile_as_host(model, count), **PROMPTS, steps=4)
    torch.testing.assert_close(found, sample(comfy, model, **PROMPTS, steps=4), **FLOAT_NOISE)
    assert count.frame_count == 1 and not torch.allclose(found, sample(comfy, patcher, **PROMPTS, steps=4), atol=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["inductor", "cudagraphs"])
def test_the_hosts_own_node(comfy, patcher, acceleration, backend, caplog):
    """As it stands. Fused kernels round differently: within the float noise all the same."""
    node = importlib.import_module("comfy_extras.nodes_torch_compile").TorchCompileModel
    model = dials(acceleration, patcher)
    compiled = node.execute(model, backend).args[0]
    with caplog.at_level(logging.INFO):
        for size, cfg in [((9, 13), 4.5), ((12, 6), 4.5)]:
            given = {**PROMPTS, "size": size, "cfg": cfg, "steps": 4}
            torch.testing.assert_close(sample(comfy, compiled, **given), sample(comfy, model, **given), **FLOAT_NOISE)
            assert skips(caplog)[0] == skips(caplog)[1]
            caplog.clear()


@pytest.fixture
def compile_node(pack):
    return next(node for node in pack if node.__name__ == "Compile")


@pytest.fixture
def compilation(pack):
    return importlib.import_module("pixart_pack.nodes.host.denoiser.compilation")


@pytest.fixture
def no_compiler(compilation):
    """As on a machine without one: PyTorch finds none, and nothing that was compiled before."""
    inductor = importlib.import_module("torch._inductor.config")
    compilation.try_compiler.cache_clear()
    with inductor.patch({"cpp.cxx": ("/no/compiler/here",), "force_disable_caches": True}):
        yield
    compilation.try_compiler.cache_clear()


def test_the_node_says_what_is_missing_and_goes_on(compile_node, patcher, no_compiler, caplog):
    with caplog.at_level(logging.WARNING):
        found = compile_node.execute(patcher)
    said = found.ui.as_dict()["text"][0]
    assert said.startswith("PixArt runs uncompiled: got ") and "install a C++ compiler" in said
    assert said in caplog.text
    assert found.args[0] is patcher


def test_a_block_that_cannot_be_compiled_runs_all_the_same(comfy, patcher, compilation, monkeypatch):
    """Found out in the first step: the picture is made, and the next model tries again."""

    def broken(*_):
        raise RuntimeError("no kernel for this")

    said, settings = [], {"backend": broken, "on_failure": compilation.explain_failure}
    monkeypatch.setattr(compilation, "try_compiler", lambda _: "")
    blocks = compilation.blocks_for(settings)
    assert compilation.blocks_for(settings) is blocks
    monkeypatch.setattr(compilation, "blocks_for", lambda _: blocks)
    model, trouble = compilation.compile_model(patcher, say=said.append)
    monkeypatch.undo()
    assert trouble == ""
    expected = sample(comfy, patcher, **PROMPTS)
    assert torch.equal(sample(comfy, model, **PROMPTS), expected)
    assert blocks.failed and compilation.blocks_for(settings) is not blocks
    assert torch.equal(sample(comfy, model, **PROMPTS), expected)
    assert len(said) == 2 and said[0] == said[1] and "no kernel for this" in said[0]
    assert said[0].startswith("PixArt runs uncompiled")


@pytest.mark.slow
def test_the_node_compiles(comfy, compile_node, patcher, acceleration, caplog):
    """With a LoRA behind it and one before it, dials, and a second size; nothing is compiled for other weights."""
    if not importlib.import_module("shutil").which("g++"):
        pytest.skip("needs a C compiler: torch.compile's inductor makes C++ on the CPU")
    counters = importlib.import_module("torch._dynamo.utils").counters
    graphs = []
    for strength in (0.0, 1.0):
        model = dials(acceleration, weighted(patcher, strength))
        compiled = compile_node.execute(model)
        assert compiled.ui is None
        for size in ((9, 13), (12, 6)):
            given = {**PROMPTS, "size": size, "steps": 4}
            expected = sample(comfy, model, **given)
            torch.testing.assert_close(sample(comfy, compiled.args[0], **given), expected, **FLOAT_NOISE)
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] == graphs[1] and "runs uncompiled" not in caplog.text
