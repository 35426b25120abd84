"""PixArt as the host's MODEL, in this process: what it computes, what it batches, and what may patch it."""

import importlib

import pytest
import torch

from pixart_pack.tests.tiny_pixart import make_model, make_weights, tiny_config

CONFIG = tiny_config()
FLOAT_NOISE = 2e-5  # float32 sums in another order, values of a few units


@pytest.fixture(scope="module")
def host_model(pack):
    return importlib.import_module("pixart_pack.nodes.host.denoiser.model")


@pytest.fixture(scope="module")
def patcher(host_model):
    return host_model.make_patcher(make_weights(CONFIG), CONFIG, dtype=torch.float32)


def caption(length, seed, keep=None):
    """One conditioning entry: states of `length` tokens, of which the first `keep` count."""
    states = torch.randn(1, length, CONFIG.caption_channels, generator=torch.Generator().manual_seed(seed))
    mask = {} if keep is None else {"attention_mask": (torch.arange(length) < keep)[None]}
    return [states, {"pooled_output": None, **mask}]


def sample(comfy, model, positive, negative, size=(9, 13), batch=1, steps=2, **options):
    comfy_sample = importlib.import_module("comfy.sample")
    latent = torch.zeros(batch, 4, *size)
    noise = comfy_sample.prepare_noise(latent, 5)
    settings = {"cfg": 4.5, "sampler_name": "euler", "scheduler": "simple", "seed": 5, **options}
    with torch.inference_mode():
        return comfy_sample.sample(
            model, noise, steps, settings.pop("cfg"), settings.pop("sampler_name"), settings.pop("scheduler"),
            [positive], [negative], latent, **settings,
        )  # fmt: skip


def sample_all(comfy, model, positive, negative, size=(9, 13), batch=1, steps=2, cfg=4.5):
    """As `sample`, of several conditioning entries a side."""
    comfy_sample = importlib.import_module("comfy.sample")
    latent = torch.zeros(batch, 4, *size)
    noise = comfy_sample.prepare_noise(latent, 5)
    with torch.inference_mode():
        return comfy_sample.sample(
            model, noise, steps, cfg, "euler", "simple", positive, negative, latent, seed=5, disable_pbar=True
        )


def count_forwards(model):
    """A clone of the MODEL, and the list of the shapes that its network is called with."""
    extension = importlib.import_module("comfy.patcher_extension")
    seen, clone = [], model.clone()

    def note(executor, *args, **kwargs):
        seen.append((tuple(args[0].shape), tuple(args[2].shape)))
        return executor(*args, **kwargs)

    clone.add_wrapper_with_key(extension.WrappersMP.DIFFUSION_MODEL, "note", note)
    return clone, seen


@pytest.mark.parametrize("solver", ["euler", "pixart_dpm_solver", "pixart_sa_solver"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_behind_a_mask_is_hidden_in_batches_under_guidance(comfy, patcher, solver, value):
    """A batch of two captions of unequal length, the shorter of which is filled up with what no model wrote."""
    states = torch.randn(2, 6, CONFIG.caption_channels, generator=torch.Generator().manual_seed(3))
    mask = torch.arange(6)[None] < torch.tensor([[6], [2]])
    broken = torch.where(mask[..., None], states, value)
    positive = [[each, {"pooled_output": None, "attention_mask": mask}] for each in (states, broken)]
    whole, short = caption(4, 2, keep=3), caption(4, 2, keep=3)
    short[0] = short[0].masked_fill(torch.arange(4)[None, :, None] > 2, value)
    expected, found = (
        sample(comfy, patcher, *prompts, batch=2, sampler_name=solver)
        for prompts in zip(positive, (whole, short), strict=True)
    )
    assert found.isfinite().all() and torch.equal(found, expected)


def test_long_sequences_are_laid_out_anew_and_the_same(comfy, patcher, monkeypatch):
    from pixart_pack.nodes.host.denoiser import attention

    seen, model, prompts = [], patcher.clone(), (caption(7, 1), caption(3, 2))

    def override(attend, *args, **kwargs):
        seen.append(kwargs.get("skip_reshape", False))
        return attend(*args, **kwargs)

    model.model_options["transformer_options"]["optimized_attention_override"] = override
    monkeypatch.setattr(attention, "LONG_SEQUENCE", 40)
    found = sample(comfy, model, *prompts, size=(14, 14), steps=1)  # 49 tokens
    assert seen == [True, False] * CONFIG.depth  # self-attention, and the short caption's
    monkeypatch.undo()
    expected = sample(comfy, patcher, *prompts, size=(14, 14), steps=1)
    # float32 noise of the net, multiplied by sigma 157 and guidance 4.5
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=1e-4)


@pytest.mark.parametrize(
    ("options", "rows"),
    [
        ({}, 1),
        ({"sampler_name": "pixart_sa_solver", "batch": 3}, 1),
        ({"batch": 3}, 6),
        ({"wrapper": True}, 2),
        ({"apply": True}, 2),
        ({"other_size": True}, 2),
    ],
)
def test_time_and_size_are_embedded_once_without_a_look(comfy, pack, patcher, monkeypatch, options, rows):
    """On a GPU, where to compare rows would be to wait: known of one picture, and of the pack's solvers' batches."""
    importlib.import_module("pixart_pack.nodes.host.denoiser.sampling").register_samplers()
    extension, model, options = importlib.import_module("comfy.patcher_extension"), patcher.clone(), dict(options)
    positive, negative, seen = caption(7, 1), caption(3, 2), []
    if options.pop("wrapper", False):
        model.set_model_unet_function_wrapper(lambda run, given: run(given["input"], given["timestep"], **given["c"]))
    if options.pop("apply", False):
        apply_model = extension.WrappersMP.APPLY_MODEL
        model.add_wrapper_with_key(apply_model, "same", lambda executor, *args, **given: executor(*args, **given))
    if options.pop("other_size", False):
        negative[1]["pixart_size"] = (512, 256)
    expected = sample(comfy, model, positive, negative, steps=2, **options)
    hook = model.model.diffusion_model.t_block.register_forward_hook(lambda _, given, __: seen.append(len(given[0])))
    monkeypatch.setattr(torch, "equal", lambda *_: False)  # what common_row would ask on a CPU
    found = sample(comfy, model, positive, negative, steps=2, **options)
    hook.remove()
    monkeypatch.undo()
    assert set(seen) == {rows}
    # float32 noise of the net, multiplied by sigma 157 and guidance 4.5
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=1e-4)


def test_a_compiled_model_is_compiled_once(comfy, patcher):
    testing = importlib.import_module("torch._dynamo.testing")
    helpers = importlib.import_module("comfy_api.torch_helpers")
    counter, model, prompts = testing.CompileCounter(), patcher.clone(), (caption(7, 1), caption(3, 2))
    helpers.set_torch_compile_wrapper(model=model, backend=counter)
    found = sample(comfy, model, *prompts, size=(10, 14), steps=4)
    assert counter.frame_count == 1
    torch.testing.assert_close(found, sample(comfy, patcher, *prompts, size=(10, 14), steps=4), atol=2e-3, rtol=1e-4)


def test_tables_are_read_once_a_run_and_copied_never(comfy, host_model, patcher, monkeypatch):
    """All blocks' modulation is one addition; the last layer's table alone is read at every step."""
    reads, owners, forward = [], {}, host_model.Table.forward

    def read(table, x):
        reads.append((table, forward(table, x)))
        return reads[-1][1]

    monkeypatch.setattr(host_model.Table, "forward", read)
    sample(comfy, patcher, caption(7, 1), caption(3, 2), steps=4)
    for table, rows in reads:
        owners[table] = owners.get(table, 0) + 1
        assert rows is table.weight  # in place, in the dtype that the model computes in
    net = patcher.model.diffusion_model
    assert owners == {**{block.scale_shift_table: 1 for block in net.blocks}, net.final_layer.scale_shift_table: 4}


@pytest.mark.parametrize("size", [(8, 8), (9, 13), (1, 2)])
def test_equals_the_plain_model(patcher, size):
    generator = torch.Generator().manual_seed(1)
    latent, timestep = torch.randn(2, 4, *size, generator=generator), torch.tensor([927.643, 3.25])
    states, mask = caption(7, 2)[0], torch.tensor([[1, 1, 1, 1, 1, 0, 0]])
    with torch.no_grad():
        ours = patcher.model.diffusion_model(latent, timestep, states.repeat(2, 1, 1), attention_mask=mask)
        plain = make_model(CONFIG)(latent, timestep, states, mask)
    torch.testing.assert_close(ours, plain[:, :4], atol=FLOAT_NOISE, rtol=0)


@pytest.mark.parametrize(
    ("lengths", "options", "masked"),
    [
        ((7, 3), {}, True),
        ((7, 3), {"cfg": 1.0, "batch": 2}, False),
        ((7, 7), {}, False),
        (((12, 9), 9), {}, False),  # twelve tokens, of which nine count
    ],
)
def test_captions_with_nothing_to_hide_get_no_mask(comfy, patcher, lengths, options, masked):
    """Flash attention takes none."""
    (first, keep), second = (lengths[0] if isinstance(lengths[0], tuple) else (lengths[0], None)), lengths[1]
    model, seen, prompts = patcher.clone(), [], (caption(first, 1, keep), caption(second, 2))
    expected = sample(comfy, model, *prompts, **options)

    def override(attend, q, k, v, heads, mask=None, **kwargs):
        seen.append(mask is not None)
        return attend(q, k, v, heads, mask=mask, **kwargs)

    model.model_options["transformer_options"]["optimized_attention_override"] = override
    assert torch.equal(sample(comfy, model, *prompts, **options), expected)
    assert seen == [False, masked] * CONFIG.depth * 2


def batch_of(lengths, seed):
    """One conditioning entry of several captions, padded to the longest under a mask."""
    states = torch.randn(
        len(lengths), max(lengths), CONFIG.caption_channels, generator=torch.Generator().manual_seed(seed)
    )
    mask = torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]
    return [states, {"pooled_output": None, "attention_mask": mask}]


REGION = [caption(5, 3)[0], {"area": (9, 13, 0, 0), "strength": 0.7}]  # of the whole picture: one batch with the rest
LENGTHENED = {
    "odd lengths": (lambda: ([caption(31, 1)], [caption(3, 2)]), {"batch": 2}, {32}),
    "regions": (lambda: ([caption(9, 1), REGION], [caption(3, 2)]), {}, {16}),
    "a batch of several lengths": (lambda: ([batch_of((7, 2), 1)], [batch_of((5, 4), 2)]), {"batch": 2}, {8}),
    "several lengths without guidance": (lambda: ([batch_of((7, 2), 1)], []), {"batch": 2, "cfg": 1.0}, {8}),
    "one length": (lambda: ([caption(7, 1)], [caption(7, 2)]), {}, {7}),
    "one caption": (lambda: ([caption(9, 1)], []), {"cfg": 1.0}, {9}),
}


@pytest.mark.parametrize(("prompts", "options", "lengths"), LENGTHENED.values(), ids=LENGTHENED)
def test_captions_under_a_mask_are_lengthened_to_the_same_picture(
    comfy, patcher, monkeypatch, prompts, options, lengths
):
    """As on a GPU. The tokens that are added are hidden, and the projection of a caption is still made once a run."""
    layers = importlib.import_module("pixart_pack.pixart.layers")
    given = prompts()
    positive, negative = given[0], given[1] or [caption(1, 9)]
    expected = sample_all(comfy, patcher, positive, negative, **options)
    monkeypatch.setitem(layers.LENGTH_STEPS, "cpu", 8)
    model, seen = count_forwards(patcher)
    projected = []
    monkeypatch.setattr(
        model.model.diffusion_model, "project_caption",
        lambda states, **fields: projected.append(1) or type(model.model.diffusion_model).project_caption(
            model.model.diffusion_model, states, **fields
        ),
    )  # fmt: skip
    found = sample_all(comfy, model, positive, negative, **options)
    # The first level, 157, multiplies what the network says.
    torch.testing.assert_close(found, expected, atol=157 * FLOAT_NOISE, rtol=0)
    assert {shape[1] for _, shape in seen} == lengths and len(projected) == 1


def test_captions_of_different_length_make_one_forward(comfy, patcher):
    model, seen = count_forwards(patcher)
    together = sample(comfy, model, caption(40, 1, keep=31), caption(3, 2, keep=1), batch=2)
    assert seen == [((4, 4, 9, 13), (4, 31, CONFIG.caption_channels))] * 2
    for positive, negative in [(caption(31, 1), caption(3, 2, keep=1)), (caption(40, 1, keep=31), caption(3, 2))]:
        assert positive[0].shape != negative[0].shape
        sample(comfy, model, positive, negative)
    # The same numbers as with each prompt in a forward of its own, as the host does without enough memory.
    alone = sample(comfy, model, caption(40, 1, keep=31), caption(3, 2, keep=1), batch=2, cfg=4.5)
    torch.testing.assert_close(together, alone)


def test_padding_is_hidden_whatever_it_holds(comfy, patcher):
    short, padded = caption(5, 1), caption(12, 1, keep=5)
    padded[0][:, :5], padded[0][:, 5:] = short[0], 50.0
    negative = caption(9, 2)
    # cfg 4.5 and sigma 157 multiply the network's float32 noise in the first step.
    torch.testing.assert_close(
        sample(comfy, patcher, short, negative), sample(comfy, patcher, padded, negative), atol=2e-3, rtol=1e-4
    )


def test_conditioning_is_not_changed(comfy, patcher):
    positive, negative = caption(12, 1, keep=5), caption(3, 2)
    before = [(entry[0].clone(), dict(entry[1])) for entry in (positive, negative)]
    sample(comfy, patcher, positive, negative)
    for entry, (states, extra) in zip((positive, negative), before, strict=True):
        assert torch.equal(entry[0], states)
        assert entry[1].keys() == extra.keys()


def test_size_reaches_the_model_exactly(patcher):
    kwargs = {"cross_attn": caption(3, 1)[0], "width": 1032, "height": 1048, "device": torch.device("cpu")}
    conds = patcher.model.extra_conds(noise=torch.zeros(1, 4, 131, 129), **kwargs)
    assert conds["c_size"].cond.tolist() == [[1048, 1032]]  # height first
    assert conds["c_ar"].cond.item() == round(1048 / 1032 * 1_000_000)
    named = patcher.model.extra_conds(pixart_size=(832, 1216), pixart_ratio=0.68, noise=None, **kwargs)
    assert named["c_size"].cond.tolist() == [[832, 1216]]
    assert named["c_ar"].cond.item() == 680_000
    assert all(not conds[key].cond.is_floating_point() for key in ("c_size", "c_ar", "attention_mask"))


@pytest.mark.parametrize("null", [False, True])
def test_conditions_are_where_the_model_computes(patcher, null):
    """Sent there once a run, and not at each step."""
    states, extra = caption(7, 1, keep=4)
    there = torch.device("meta")
    conds = patcher.model.extra_conds(
        cross_attn=states, attention_mask=extra["attention_mask"], width=64, height=64, noise=None, device=there,
        pixart_null=null,
    )  # fmt: skip
    assert {name: cond.cond.device for name, cond in conds.items()} == dict.fromkeys(
        ("c_crossattn", "attention_mask", "c_size", "c_ar"), there
    )
    assert conds["c_crossattn"].cond.shape[1] == conds["attention_mask"].cond.shape[1] == 4


def test_a_prompt_without_text_is_refused(comfy, patcher):
    with pytest.raises(ValueError, match="No caption: got a conditioning without text"):
        sample(comfy, patcher, caption(5, 1), [None, {}])


def test_learned_null_caption(comfy, patcher):
    positive = caption(10, 1, keep=6)
    learned = [torch.zeros(1, 10, CONFIG.caption_channels), {**positive[1], "pixart_null": True}]
    written = [patcher.model.diffusion_model.y_embedder.y_embedding.weight[None, :10], dict(positive[1])]
    assert torch.equal(sample(comfy, patcher, positive, learned), sample(comfy, patcher, positive, written))


def test_a_file_without_null_caption_says_so(comfy, host_model):
    weights = make_weights(CONFIG)
    del weights["y_embedder.y_embedding"]
    model = host_model.make_patcher(weights, CONFIG, dtype=torch.float32)
    assert not model.model.has_null_caption
    positive = caption(4, 1)
    with pytest.raises(ValueError, match="has no learned null caption"):
        sample(comfy, model, positive, [positive[0], {"pixart_null": True}])


def test_appended_tokens_count(patcher):
    """ConditioningConcat makes the caption longer than its mask."""
    states = caption(12, 1)[0]
    conds = patcher.model.extra_conds(
        cross_attn=states, attention_mask=torch.tensor([[1, 1, 1, 0, 0]]), width=64, height=64, noise=None,
        device=states.device,
    )  # fmt: skip
    assert conds["attention_mask"].cond.tolist() == [[1, 1, 1, 0, 0] + [1] * 7]


def test_times_are_fractional_and_exact(patcher):
    sampling = patcher.model.model_sampling
    table = importlib.import_module("pixart_pack.samplers.schedules")
    times = torch.tensor([0.0, 3.25, 71.357, 279.0, 927.643, 999.0])
    levels = table.sigmas(times)
    torch.testing.assert_close(sampling.sigma(times).double(), levels, atol=0, rtol=2e-7)
    torch.testing.assert_close(sampling.timestep(levels.float()), times, atol=1e-4, rtol=0)
    assert sampling.timestep(torch.tensor(1e9)) == 999
    assert sampling.timestep(sampling.sigma_max) == 999


def test_wrong_text_encoder_is_refused_before_sampling(comfy, patcher):
    wrong = [torch.zeros(1, 77, 768), {}]
    with pytest.raises(ValueError, match=r"Caption width mismatch: got 768, expected 24\. Connect the T5"):
        sample(comfy, patcher, wrong, wrong)


def test_weights_are_loaded_strictly(host_model):
    weights = make_weights(CONFIG)
    weights.pop("blocks.1.attn.qkv.bias")
    with pytest.raises(ValueError, match=r"blocks\.1\.attn\.qkv\.bias"):
        host_model.make_patcher(weights, CONFIG)


def test_nothing_is_left_without_memory(patcher):
    tensors = [*patcher.model.named_parameters(), *patcher.model.named_buffers()]
    assert not [name for name, tensor in tensors if tensor.is_meta]


@pytest.mark.parametrize(
    ("file_dtype", "chosen", "has_bf16", "kept", "maths"),
    [
        (torch.bfloat16, None, True, torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, None, False, torch.float32, torch.float32),
        (torch.float16, None, True, torch.float32, torch.float32),  # of more digits than bfloat16 holds
        (torch.float32, None, True, torch.float32, torch.float32),
        (torch.float32, torch.bfloat16, True, torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.bfloat16, False, torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.float32, True, torch.float32, torch.float32),
        (torch.bfloat16, torch.float16, True, torch.float16, torch.float32),
        (torch.float32, torch.float8_e4m3fn, True, torch.float8_e4m3fn, torch.bfloat16),
        (torch.float32, torch.float8_e4m3fn, False, torch.float8_e4m3fn, torch.float32),
    ],
)
def test_a_cpu_computes_in_bf16_where_it_has_that(host_model, monkeypatch, file_dtype, chosen, has_bf16, kept, maths):
    precision = importlib.import_module("pixart_pack.nodes.host.weights.precision")
    monkeypatch.setattr(precision, "has_bf16", lambda: has_bf16)
    weights = {name: weight.to(file_dtype) for name, weight in make_weights(CONFIG).items()}
    net = host_model.make_patcher(weights, CONFIG, dtype=chosen).model
    assert (net.get_dtype(), net.get_dtype_inference()) == (kept, maths)
    monkeypatch.setattr(precision.args, "force_fp32", True)
    assert precision.choose_dtypes(make_weights(CONFIG), torch.device("cpu"), [torch.float32], torch.bfloat16)[1] == (
        torch.float32
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2])
def test_low_precision_weights(comfy, host_model, patcher, dtype):
    model = host_model.make_patcher(make_weights(CONFIG), CONFIG, dtype=dtype)
    table = model.model.diffusion_model.blocks[0].scale_shift_table.weight
    assert table.dtype == (torch.float16 if dtype.itemsize == 1 else dtype)
    result = sample(comfy, model, caption(9, 1), caption(2, 2), size=(8, 8))
    exact = sample(comfy, patcher, caption(9, 1), caption(2, 2), size=(8, 8))
    relative = (result - exact).norm() / exact.norm()
    # eps of the format (2**-8, 2**-11, 2**-4, 2**-3), through 3 blocks and guidance 4.5
    assert relative < {torch.bfloat16: 0.1, torch.float16: 0.01}.get(dtype, 1.0)
    assert result.isfinite().all()


def test_attention_override_sees_every_attention(comfy, patcher):
    calls, model = [], patcher.clone()

    def override(function, *args, **kwargs):
        calls.append(args[0].shape[1])
        return function(*args, **kwargs)

    model.model_options["transformer_options"]["optimized_attention_override"] = override
    expected = sample(comfy, patcher, caption(5, 1), caption(5, 2))
    assert torch.equal(sample(comfy, model, caption(5, 1), caption(5, 2)), expected)
    assert len(calls) == 2 * CONFIG.depth * 2


def test_block_replacement_and_patches(comfy, patcher):
    seen, model = [], patcher.clone()

    def skip(args, _):
        seen.append(sorted(args))
        return args

    def note(args):
        seen.append((args["block_index"], args["transformer_options"]["total_blocks"]))
        return args

    model.set_model_patch_replace(skip, "dit", "double_block", 1)
    model.set_model_patch(note, "double_block")
    skipped = sample(comfy, model, caption(5, 1), caption(5, 2), steps=1)
    assert seen == [(0, 3), ["img", "transformer_options", "txt", "vec"], (1, 3), (2, 3)]
    assert not torch.allclose(skipped, sample(comfy, patcher, caption(5, 1), caption(5, 2), steps=1))

    same = patcher.clone()
    same.set_model_patch_replace(lambda args, extra: extra["original_block"](args), "dit", "double_block", 1)
    expected = sample(comfy, patcher, caption(5, 1), caption(5, 2))
    assert torch.equal(sample(comfy, same, caption(5, 1), caption(5, 2)), expected)


def test_self_attention_replacement(comfy, patcher, core_nodes):
    """The host's PerturbedAttentionGuidance replaces "attn1" of the middle block."""
    shapes, model = [], patcher.clone()

    def values(q, k, v, options):
        shapes.append((tuple(v.shape), options["n_heads"], options["dim_head"]))
        return v

    model.set_model_attn1_replace(values, "middle", 0)
    sample(comfy, model, caption(5, 1), caption(5, 2), size=(8, 8), steps=1)
    assert shapes == [((2, 16, 48), 4, 12)]
    guided = core_nodes["PerturbedAttentionGuidance"].execute(patcher, 3.0)[0]
    positive, negative = caption(5, 1), caption(5, 2)
    result = sample(comfy, guided, positive, negative)
    assert not torch.allclose(result, sample(comfy, patcher, positive, negative))


def test_control_residuals_go_before_the_next_block(patcher):
    net = patcher.model.diffusion_model
    latent, timestep, states = torch.randn(1, 4, 8, 8), torch.tensor([500.0]), caption(5, 1)[0]
    residuals = [torch.randn(1, 16, 48) for _ in range(2)]
    with torch.no_grad():
        ours = net(latent, timestep, states, control={"output": residuals})
        plain = make_model(CONFIG)(latent, timestep, states, control=residuals)
    torch.testing.assert_close(ours, plain[:, :4], atol=FLOAT_NOISE, rtol=0)


def test_tables_are_merged_and_patched(patcher, host_model):
    other = host_model.make_patcher(make_weights(CONFIG, seed=1), CONFIG, dtype=torch.float32)
    names = set(patcher.model.diffusion_model.state_dict())
    merged = patcher.clone()
    merged.add_patches(other.get_key_patches("diffusion_model."), 0.75, 0.25)
    assert {f"diffusion_model.{name}" for name in names} == set(merged.patches)
    importlib.import_module("comfy.model_management").load_models_gpu([merged])  # as every saving node does
    saved = merged.state_dict_for_saving()
    for name, weight in make_weights(CONFIG).items():
        expected = 0.25 * weight + 0.75 * make_weights(CONFIG, seed=1)[name]
        found = saved[f"model.diffusion_model.{name}"]
        torch.testing.assert_close(found.to("cpu").float(), expected, atol=1e-6, rtol=0)


def test_streamed_weights_of_a_small_card(patcher, host_model):
    """What --lowvram does to a model that does not fit: weights are cast and patched as each layer is called."""
    latent, timestep, states = torch.randn(1, 4, 8, 8), torch.tensor([500.0]), caption(5, 1)[0]
    patch = {"diffusion_model.blocks.1.attn.qkv.weight": (torch.full((144, 48), 0.02),),
             "diffusion_model.blocks.0.scale_shift_table.weight": (torch.full((6, 48), 0.1),)}  # fmt: skip
    predictions = []
    for how in ({"full_load": True}, {"lowvram_model_memory": 1}):  # bytes
        model = host_model.make_patcher(make_weights(CONFIG), CONFIG, dtype=torch.float32)
        model.add_patches(patch, 1.0)
        model.load(torch.device("cpu"), **how)
        layer = model.model.diffusion_model.blocks[1].attn.qkv
        assert bool(layer.weight_function) == ("lowvram_model_memory" in how)
        with torch.no_grad():
            predictions.append(model.model.diffusion_model(latent, timestep, states))
    plain = patcher.model.diffusion_model(latent, timestep, states)
    torch.testing.assert_close(*predictions, atol=FLOAT_NOISE, rtol=0)
    assert (predictions[0] - plain).abs().max() > 0.01


def test_saving_names_are_the_original_ones(patcher):
    saved = patcher.state_dict_for_saving()
    checkpoint = importlib.import_module("pixart_pack.pixart.checkpoint")
    state = checkpoint.unwrap(saved)
    assert checkpoint.detect_config(saved) == CONFIG
    original = checkpoint.to_original(state)
    assert set(original) >= set(make_weights(CONFIG)) - {"pixart_config"}


def evaluate(model, seed=0):
    """The network's answer to a batch of two, with the MODEL's patches in its weights."""
    generator = torch.Generator().manual_seed(seed)
    latent, states = (
        torch.randn(2, *shape, generator=generator) for shape in ((4, 9, 12), (5, CONFIG.caption_channels))
    )
    with torch.inference_mode():  # as the host runs nodes
        importlib.import_module("comfy.model_management").load_models_gpu([model])
        return model.model.diffusion_model(latent, torch.full((2,), 300.0), states)


def distance(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


@pytest.fixture(scope="module")
def in_8_bits(host_model):
    return host_model.make_patcher(make_weights(CONFIG), CONFIG, dtype=torch.int8)


def test_blocks_are_multiplied_in_8_bits(comfy, patcher, in_8_bits, monkeypatch):
    """Six products a block and its caption's one, by the host's kernel, whose sums are whole numbers."""
    products, original = [], torch._int_mm
    monkeypatch.setattr(torch, "_int_mm", lambda a, b: products.append(a.dtype) or original(a, b))
    found = evaluate(in_8_bits)
    assert products == [torch.int8] * 7 * CONFIG.depth
    assert 1e-4 < distance(found, evaluate(patcher)) < 0.02  # 8 bits of a row's largest: 0.4 % of it each
    net = in_8_bits.model.diffusion_model
    assert net.blocks[0].scale_shift_table.weight.dtype == net.t_block[1].weight.dtype == torch.float32
    assert in_8_bits.model_size() < 0.6 * patcher.model_size()
    assert torch.isfinite(sample(comfy, in_8_bits, caption(7, 1), caption(3, 2))).all()
    loading = importlib.import_module("pixart_pack.nodes.host.loading")
    assert "\nweights: int8 in the blocks, else float32" in loading.describe_model(in_8_bits)


@pytest.mark.parametrize("inside", [False, True])
def test_weights_in_8_bits_go_where_the_host_sends_them(comfy, host_model, inside):
    """Loaded without gradients, as nodes are, and with them; then sampled, unloaded, and sampled again."""
    with torch.inference_mode(inside):
        model = host_model.make_patcher(make_weights(CONFIG), CONFIG, dtype=torch.int8)
    first = sample(comfy, model, caption(7, 1), caption(3, 2))
    with torch.inference_mode():
        importlib.import_module("comfy.model_management").unload_all_models()
    assert torch.equal(sample(comfy, model, caption(7, 1), caption(3, 2)), first)


def test_patches_change_weights_in_8_bits(patcher, in_8_bits):
    """As a LoRA's: the weight is made of numbers, changed and brought into 8 bits again."""
    key = "diffusion_model.blocks.1.mlp.fc2.weight"
    change = torch.randn(CONFIG.hidden_size, 4 * CONFIG.hidden_size, generator=torch.Generator().manual_seed(3)) * 0.2
    before = evaluate(in_8_bits)
    patched = []
    for model in (patcher, in_8_bits):
        clone = model.clone()
        assert clone.add_patches({key: ("diff", (change,))}) == [key]
        patched.append(evaluate(clone))
    assert distance(patched[1], patched[0]) < 0.02 < distance(patched[0], before)
    assert torch.equal(evaluate(in_8_bits), before)


def test_weights_in_8_bits_are_saved_as_what_they_stand_for(in_8_bits):
    lora = importlib.import_module("pixart_pack.nodes.host.lora")
    key = "blocks.1.attn.qkv.weight"
    saved = lora.patched_weight(in_8_bits.get_key_patches(lora.PREFIX), lora.host_key(key), torch.device("cpu"))
    exact = make_weights(CONFIG)[key]
    assert type(saved) is torch.Tensor and saved.dtype == torch.float32
    assert ((saved - exact).abs() <= exact.abs().amax(1, keepdim=True) / 127 * 0.51).all()


def test_8_bits_are_refused_where_the_host_has_no_kernels(host_model, monkeypatch):
    monkeypatch.setattr(importlib.import_module("comfy.ops"), "QUANT_ALGOS", {})
    with pytest.raises(ValueError, match=r"No products in 8 bits here: .* Update ComfyUI, or choose bf16, fp16 or fp8"):
        host_model.make_patcher(make_weights(CONFIG), CONFIG, dtype=torch.int8)
