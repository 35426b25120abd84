"""Blocks compiled once: as many graphs as are said, and the same numbers."""

import itertools
import logging

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from pixart_pack.pixart.acceleration.compilation import CompiledBlocks, compile_blocks, explain_failure
from pixart_pack.pixart.controlnet import PixArtControlNet
from pixart_pack.tests.pixart.test_transformer import tiny_inputs, tiny_model

pytestmark = pytest.mark.slow

SITUATIONS = [  # height, width, lengths of captions: other sizes, odd ones, a single row, guidance off, any batch
    (8, 8, [5, 8]),
    (8, 8, [5, 8]),
    (8, 12, [5, 8]),
    (12, 8, [9, 1]),
    (9, 13, [1, 1]),
    (9, 13, [4]),
    (8, 8, [1]),
    (2, 9, [24, 3]),
    (16, 6, [3, 20, 11, 8]),
    (8, 8, [8]),
    (8, 8, [16] * 16),
]


def both(model, blocks, given):
    """What the model predicts compiled and uncompiled."""
    with torch.inference_mode():
        model.compiled = None
        expected = model(*given)
        model.compiled = blocks
        return model(*given), expected


@pytest.mark.parametrize("situations", [SITUATIONS, pytest.param(SITUATIONS[::-1], marks=pytest.mark.slow)])
def test_three_graphs_do_for_every_size_batch_and_caption(situations):
    model, counter = tiny_model(), CompileCounter()
    blocks = compile_blocks(model, backend=counter, fullgraph=True)
    for height, width, lengths in situations:
        latent, timestep, caption, mask = tiny_inputs(len(lengths), height, width, lengths)
        for times, masked in itertools.product((timestep, timestep[:1]), (mask, None)):
            found, expected = both(model, blocks, (latent, times, caption, masked))
            torch.testing.assert_close(found, expected, atol=2e-6, rtol=0)  # float32, one or two kernels a modulation
    assert counter.frame_count == 3


def test_what_does_not_change_is_compiled_for_its_shapes_alone():
    model, counter = tiny_model(), CompileCounter()
    blocks = compile_blocks(model, backend=counter)
    for _ in range(3):
        both(model, blocks, tiny_inputs(2, 8, 8, [3, 5]))
    assert counter.frame_count == 1


@pytest.mark.slow
@pytest.mark.parametrize(("dynamic", "graphs"), [(True, 1), (False, 3)])
def test_what_changes_can_be_said_beforehand(dynamic, graphs):
    model, counter = tiny_model(), CompileCounter()
    blocks = compile_blocks(model, backend=counter, dynamic=dynamic)
    for side in (8, 6, 12):
        both(model, blocks, tiny_inputs(2, side, 8, [3, 5]))
    assert counter.frame_count == graphs


@pytest.mark.slow
def test_trained_compression_and_qk_norm_at_any_size():
    model, counter = tiny_model(depth=2, kv_compress_ratio=2, kv_compress_layers=(1,), qk_norm=True), CompileCounter()
    blocks = compile_blocks(model, backend=counter, fullgraph=True)
    for height, width in [(8, 8), (8, 12), (20, 16)]:
        found, expected = both(model, blocks, tiny_inputs(2, height, width, [5, 8]))
        torch.testing.assert_close(found, expected, atol=2e-6, rtol=0)
    assert counter.frame_count == 2 * 2  # blocks of two kinds


def test_a_controlnet_runs_its_copies_by_the_same_graphs():
    model, counter = tiny_model(), CompileCounter()
    control = PixArtControlNet.from_base(model).eval()
    for block in control.controlnet:
        torch.nn.init.normal_(block.after_proj.weight, std=0.1)
    blocks = compile_blocks(model, backend=counter, fullgraph=True)
    latent, timestep, caption, mask = tiny_inputs(2, 8, 8, [3, 5])
    for _ in range(2):
        given = (latent, timestep, caption, mask, None, None, control.attach(model, latent.flip(0)))
        found, expected = both(model, blocks, given)
        torch.testing.assert_close(found, expected, atol=2e-6, rtol=0)
    assert counter.frame_count == 1


def test_other_weights_need_no_other_graph():
    model, counter = tiny_model(), CompileCounter()
    blocks, given = compile_blocks(model, backend=counter), tiny_inputs(2, 8, 8, [3, 5])
    first, _ = both(model, blocks, given)
    with torch.no_grad():
        model.blocks[1].attn.qkv.weight.add_(0.1)
    model.blocks[2].mlp.fc1.weight = torch.nn.Parameter(model.blocks[2].mlp.fc1.weight * 1.5)
    found, expected = both(model, blocks, given)
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=0)
    assert (found - first).abs().max() > 1e-3
    found, expected = both(tiny_model(seed=1), blocks, given)
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=0)
    assert counter.frame_count == 1


@pytest.mark.slow
def test_gradients_are_those_of_the_uncompiled_model():
    model, given = tiny_model(), tiny_inputs(2, 8, 8, [3, 5])
    gradients = []
    for blocks in (None, CompiledBlocks(backend="aot_eager")):
        model.compiled = blocks
        model.zero_grad()
        model(*given).square().mean().backward()
        gradients.append({name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None})
    plain, compiled = gradients
    assert plain.keys() == compiled.keys() and "blocks.1.scale_shift_table" in plain
    for name, gradient in plain.items():
        torch.testing.assert_close(compiled[name], gradient, atol=1e-6, rtol=1e-4)


def test_a_compiler_that_fails_is_told_of_and_done_without(caplog):
    def broken(*_):
        raise RuntimeError("no C compiler here")

    model = tiny_model()
    blocks, given = compile_blocks(model, backend=broken, on_failure=explain_failure), tiny_inputs(1, 8, 8, [3])
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            found, expected = both(model, blocks, given)
            assert torch.equal(found, expected)
    assert caplog.text.count("PixArt runs uncompiled: got") == 1 and "no C compiler here" in caplog.text
    model.compiled = CompiledBlocks(backend=broken)
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="no C compiler here"):
        model(*given)


def test_a_failure_of_the_block_itself_is_raised():
    """The compiler meets it first; what runs uncompiled then says it in its own words."""
    model, told = tiny_model(), []
    compile_blocks(model, backend="eager", on_failure=told.append)
    model.blocks[1].attn.num_heads = 5  # of a width of 48
    with pytest.raises(RuntimeError, match="unflatten"):
        model(*tiny_inputs(2, 8, 8, [3, 5]))
    assert len(told) == 1


@pytest.mark.slow
def test_the_compiler_itself_gives_the_same_numbers():
    """inductor: fused kernels round differently, by 1e-6 of values of a few units."""
    model = tiny_model()
    blocks = compile_blocks(model, fullgraph=True)
    for height, width, lengths in [(8, 8, [5, 8]), (9, 13, [4, 1])]:
        found, expected = both(model, blocks, tiny_inputs(len(lengths), height, width, lengths))
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("dynamic", "graphs"), [(True, 2), (None, 5)])
def test_the_whole_model_has_no_breaks_and_looks_up_nothing_by_size(dynamic, graphs):
    """PyTorch learns what changes one axis at a time, where it is not told; odd sizes and positions add nothing."""
    model, counter = tiny_model(depth=1), CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=dynamic)
    for height, width, lengths in [(8, 12, [5, 7]), (12, 8, [9, 3]), (9, 13, [9, 4]), (7, 30, [20, 3]), (9, 13, [4])]:
        given = tiny_inputs(len(lengths), height, width, lengths)
        with torch.inference_mode():
            torch.testing.assert_close(compiled(*given), model(*given), atol=2e-6, rtol=0)
    assert counter.frame_count <= graphs
