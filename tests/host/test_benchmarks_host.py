"""The benchmarks that run ComfyUI: on tiny models every rival runs, and what cannot run is said."""

import dataclasses
import json
from argparse import Namespace

import pytest
import torch

from pixart_pack.pixart.config import CONFIGS
from pixart_pack.tests.tiny_pixart import tiny_config

OPTIONS = Namespace(
    rounds=2, clock="cpu", threads=1, compiled=False, dtype="fp32", depth=0, steps=2, captions=[5, 1], caption=5
)
ALL = {"this pack", "ComfyUI", "diffusers"}


@pytest.fixture(scope="module")
def config():
    return tiny_config("alpha-512")


@pytest.fixture(scope="module")
def loops(comfy, config):
    from pixart_pack.benchmarks import denoiser

    return denoiser.make_loops(config, torch.float32, "cpu", compiled=False)


@pytest.mark.parametrize("lengths", [(5,), (5, 5), (5, 9)])
def test_forward_runs_three_ways(loops, config, lengths, tmp_path):
    from pixart_pack.benchmarks import cases, denoiser

    run = denoiser.measure(cases.Case(384, lengths, "fp32"), config, loops, OPTIONS, "cpu")
    assert {name: len(seconds) for name, seconds in run["seconds"].items()} == dict.fromkeys(ALL, 2)
    assert not run["failures"] and set(run["ratios"]) == ALL - {"this pack"}
    run["case"]["variant"] = "alpha-512"
    assert denoiser.publish([run], tmp_path).count("fp32, cpu, ") == 1


def test_forward_that_fails_is_told_and_the_others_run(loops, config, tmp_path):
    from pixart_pack.benchmarks import cases, denoiser

    run = denoiser.measure(cases.Case(256, (5, 5), "fp32"), config, loops, OPTIONS, "cpu")
    assert run["failures"] == {"ComfyUI": "ZeroDivisionError: division by zero"}
    assert set(run["seconds"]) == ALL - {"ComfyUI"}
    run["case"]["variant"] = "alpha-256"
    assert "| fails: ZeroDivisionError: division by zero |" in denoiser.publish([run], tmp_path)


@pytest.mark.parametrize("lengths", [(5,), (5, 9)])
def test_rivals_in_comfyui_predict_the_same(loops, config, lengths):
    """What they are timed on is the same work: captions of any length, guided or not."""
    from pixart_pack.benchmarks import peers

    captions, found = peers.make_captions(config, lengths, torch.float32), []
    for name in ("this pack", "ComfyUI"):
        loops[name].use_step(captions, 48, lambda predict: found.append((predict(), predict(40))))
    (whole, part), (their_whole, their_part) = found
    assert whole.shape == (1, 4, 48, 48) and part.shape == (1, 4, 40, 40)
    # Rounding of float32: the sums run in another order.
    torch.testing.assert_close(whole, their_whole, atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(part, their_part, atol=1e-3, rtol=1e-4)


def test_loop_runs_three_ways(comfy, monkeypatch, tmp_path):
    from pixart_pack.benchmarks import loop

    monkeypatch.setattr(loop, "make_config", lambda variant, depth: tiny_config(variant))
    runs = [loop.measure(variant, OPTIONS, "cpu") for variant in ("alpha-256", "alpha-512")]
    assert set(runs[0]["seconds"]) == ALL - {"ComfyUI"} and set(runs[1]["seconds"]) == ALL
    text = loop.publish(runs, tmp_path)
    assert "| alpha-256 | 3 | 2 | [5, 1] | fp32, cpu" in text and "| not run |" in text
    assert len(json.loads((tmp_path / "loop.json").read_text())["runs"]) == 2


@pytest.mark.slow
def test_caches_race_on_the_same_pictures(comfy, monkeypatch, tmp_path):
    """Uncached, diffusers' transformer gives our picture: all else that a row tells is the cache's doing."""
    from pixart_pack.benchmarks import caches, dials

    monkeypatch.setattr(dials, "make_config", lambda variant, depth: tiny_config(variant, mlp_ratio=2.0))
    monkeypatch.setattr(caches, "OURS", {mode: dials_[-1:] for mode, dials_ in caches.OURS.items()})
    monkeypatch.setattr(caches, "INTERVALS", (2,))
    monkeypatch.setattr(caches, "THRESHOLDS", (0.9,))
    given = "--variant alpha-512 --side-px 64 --steps 6 --rounds 1 --threads 1 --clock cpu --device cpu --out"
    caches.main([*given.split(), str(tmp_path)])
    (rows,) = json.loads((tmp_path / "caches_alpha-512_6.json").read_text()).values()
    found = {(row["curve"], row["setting"]): row for row in rows}
    assert found["diffusers", "exact"]["psnr_db"] > 70 and found["diffusers", "exact"]["work"] == 1.0
    assert found["ours: guidance reuse", "2"]["work"] == 0.75  # half the prompts in three of six steps
    saved = {curve for (curve, _), row in found.items() if row["work"] < 1}
    assert {"ours: input, forecast", "ours: fewer steps", "diffusers: TaylorSeerCache"} <= saved
    assert "| ours: fewer steps | 3 | 0.50 |" in (tmp_path / "caches_alpha-512_6.md").read_text()
    assert (tmp_path / "caches_alpha-512_6.svg").stat().st_size > 1000


def test_training_runs_both_ways(comfy, monkeypatch, tmp_path):
    pytest.importorskip("peft")
    from pixart_pack.benchmarks import train

    monkeypatch.setattr(train, "make_config", lambda variant, depth: tiny_config(variant))
    run = train.measure(3, 2, "attention", "fp32", "cpu", OPTIONS)
    host = {"case": {"trainer": "ComfyUI"}, "says": "fails: AssertionError"}
    text = train.publish([run, host], tmp_path)
    assert "| 3 | 2 | attention | fp32, cpu" in text and "on its own PixArt fails: AssertionError." in text


@pytest.mark.parametrize("kind", ["pth", "safetensors", "folder"])
def test_every_loader_loads_every_format(comfy, kind, monkeypatch, tmp_path):
    from pixart_pack.benchmarks import load

    # As wide as the released ones, which is how ComfyUI knows them.
    fields = {"depth": 1, "hidden_size": 1152, "num_heads": 16, "caption_channels": 4096}
    monkeypatch.setattr(load, "make_config", lambda variant, depth: tiny_config(variant, **fields))
    name, loaders = load.FORMATS[kind]
    size = load.write_weights(tmp_path / name, 1)
    found = {loader: load.load_once(loader, tmp_path / name, "cpu") for loader in loaders}
    measured = {field: {loader: [found[loader][field]] for loader in loaders} for field in ("seconds", "peak", "own")}
    case = {"format": kind, "blocks": 1, "threads": 1, "clock": "cpu"}
    text = load.publish([{"case": case, "weights_bytes": size, **measured}], tmp_path / "results")
    assert all(f"| {loader} |" in text for loader in loaders)


def test_a_prompt_seen_before_is_not_encoded(comfy, tmp_path):
    import folder_paths

    from pixart_pack.benchmarks import text

    user = folder_paths.get_user_directory()
    text.write_encoder(tmp_path / "t5.safetensors", {"d_model": 64, "d_ff": 96, "num_layers": 2, "num_heads": 4})
    run = text.measure(tmp_path, OPTIONS, "cpu")
    assert folder_paths.get_user_directory() == user
    assert len(list((tmp_path / "user").rglob("*.safetensors"))) == OPTIONS.rounds + 1  # one warmed up
    run["case"] = {"encoder": "T5", "layers": 2, "of": 24, "device": "cpu", "threads": 1, "clock": "cpu"}
    assert "| T5, 2 of 24 layers | 30 |" in text.publish([run], tmp_path)


@pytest.mark.slow
def test_decoding_runs_both_ways(comfy, tmp_path):
    from pixart_pack.benchmarks import vae
    from pixart_pack.pixart.encoders.autoencoder import KL_CONFIG

    ours, theirs = vae.make_pair(KL_CONFIG)
    runs = [vae.measure(ours, theirs, 64, is_tiled, OPTIONS) for is_tiled in (False, True)]
    text = vae.publish(runs, tmp_path)
    assert "| 64 px | fp32, cpu |" in text and "| 64 px, in tiles | fp32, cpu |" in text
    latent = torch.randn(1, 4, 8, 8)
    with torch.inference_mode():  # the host clamps
        pictures = theirs.decode(latent).sample.add(1).div(2).clamp(0, 1).movedim(1, -1)
        torch.testing.assert_close(ours.decode(latent), pictures, atol=1e-4, rtol=0)


@pytest.mark.slow
def test_precisions_of_weights_are_told_apart(comfy, tmp_path):
    from pixart_pack.benchmarks import weights

    given = {"variant": "alpha-256", "depth": 1, "captions": [5, 3], "scenes": 2, "weight_dtypes": ["int8"]}
    run = weights.measure(Namespace(**given, rounds=1, clock="cpu", device="cpu"))
    exact, found = run["rows"]["fp32"], run["rows"]["int8"]
    assert exact["off"] == 0 and 1e-3 < found["off"] < 0.1 and found["psnr_db"] > 35
    assert len(found["layers_off"]) == 6 and all(0.002 < off < 0.05 for off in found["layers_off"].values())
    assert found["weights_bytes"] < 0.5 * exact["weights_bytes"] and found["accuracy"] > 90
    assert "| int8 |" in weights.publish([run], tmp_path)


@pytest.mark.slow
def test_graphs_of_a_series_of_pictures_are_counted(comfy, tmp_path):
    """This pack needs three, without a break, and gives the same numbers; others are counted beside it."""
    from pixart_pack.benchmarks import compile as benchmark

    counts = benchmark.count_all(["this pack", "diffusers"], shrink=8)
    ours = counts["this pack"]
    assert [each.graphs for each in ours] == [1, 2, 2, 2, 2, 3, 3, 3, 3]
    # float32 noise of the net, multiplied by sigma 157 and guidance 4.5
    assert all(each.breaks == 0 and each.difference < 2e-3 for each in ours)
    assert counts["diffusers"][-1].graphs >= 3
    times = {"first_calls_s": [2.0, 1.0, 0.1], "later_call_s": 0.05}
    refused = [benchmark.Counted(0, 0, "RuntimeError: odd")] * len(benchmark.SITUATIONS)
    text = benchmark.describe({"counts": {**counts, "ComfyUI": refused}, "times": {"block": times}})
    assert "| the first again | 3 and 0 | fails: RuntimeError: odd |" in text
    assert "| block | 2.0 s | 1.0 s | 0.1 s | 50 ms |" in text


def test_a_text_encoder_in_blocks(pack, tmp_path):
    from pixart_pack.benchmarks import packed

    path, case = tmp_path / "t5.gguf", {"encoder": "T5", "layers": 1, "kind": "Q4_K", "threads": 1, "clock": "cpu"}
    packed.write_encoder(path, {**packed.SIZES["base"], "d_ff": 256, "num_layers": 1}, "Q4_K")
    run = packed.encode_once(path, "cpu")
    assert run["finite"] and 20 < run["tokens"] < 120
    text = packed.publish([{"case": case, "file_bytes": path.stat().st_size, "runs": [run]}], tmp_path)
    assert "| T5, 1 layers | Q4_K | 0.02 GB |" in text


def test_a_step_in_comfyui_is_counted_and_stays_lean(comfy):
    """At 1024 px, the whole model: 471 kernels, 22.4 GB and 127 MiB when this was written; ComfyUI's own has 1540."""
    from pixart_pack.benchmarks.count import HOST, OURS, count_whole

    config = CONFIGS["alpha-1024"]
    found, rival = (count_whole(program, config, torch.bfloat16, 1024) for program in (OURS, HOST))
    assert found.kernels <= 480 and found.bytes <= 22.6e9 and found.peak <= 130 * 2**20, found
    assert found.casts <= 10 and found.copies <= 8
    assert rival.kernels > 3 * found.kernels and rival.bytes > 1.4 * found.bytes
    packed = count_whole(OURS, config, torch.float8_e4m3fn, 1024)
    assert packed.casts > 10 * 28 and packed.peak <= 1.2 * found.peak  # a weight or a bias at a time becomes 16 bits


@pytest.mark.parametrize(
    ("dtype", "side_px", "batch", "copies"),
    [
        (torch.bfloat16, 256, 1, 0),
        (torch.bfloat16, 1024, 1, 0),
        (torch.float16, 2048, 8, 0),
        (torch.bfloat16, 256, 8, 2),
        (torch.bfloat16, 2048, 1, 2),
        (torch.float8_e4m3fn, 256, 1, 0),
    ],
)
def test_the_estimate_of_memory_covers_what_is_counted(comfy, dtype, side_px, batch, copies):
    """Too little is an out-of-memory, too much a model that is moved for nothing."""
    from pixart_pack.benchmarks.count import count_peak

    config = dataclasses.replace(CONFIGS["sigma-1024"], depth=3)
    counted, estimate = count_peak(config, dtype, side_px, batch, copies)
    assert counted <= estimate <= 1.25 * counted


def test_the_estimate_hears_of_captions_and_controls(comfy):
    from pixart_pack.nodes.host.weights import memory

    class Control:
        def __init__(self, copies, previous=None):
            self.previous_controlnet = previous
            self.control_model = Namespace(num_copies=copies)

    assert memory.count_controls(None) == (0, 0)
    assert memory.count_controls(Control(13, Control(2))) == (2, 15)
    config = CONFIGS["alpha-1024"]
    bare, long, controlled, cast = (
        memory.count_bytes(config, 2, (128, 128), 2, *rest)
        for rest in ((20,), (120,), (20, (1, 13)), (20, (0, 0), True))
    )
    assert long - bare == 2 * 100 * 1152 * 2 * 57
    assert controlled > bare + 3 * 2 * 4096 * 1152 * 2 and cast > bare + 2 * 4608 * 1152
