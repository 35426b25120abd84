"""PixArt's MODEL with the host's own nodes, through the prompt queue of a real server."""

import io
import json
import shutil
import time

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from pixart_pack.demo.client import Interrupted, PromptError
from pixart_pack.tests.host.graph import VAE, PictureGraph, write_lora, write_pixart, write_t5
from pixart_pack.tests.tiny_pixart import make_weights, tiny_config

FILES = ("queue_tiny.safetensors", "queue_t5.safetensors")
OTHER = "queue_other.safetensors"
SIGMA = "queue_sigma.safetensors"
PEFT, DIFFUSERS = "queue_peft.safetensors", "queue_diffusers.safetensors"
CONFIG = tiny_config(base_size=4, pe_scale=1.0)
ROUNDING = 1.0  # of 255: float32 noise can tip a value over to the next


def fill(host):
    """Write the tiny models, once for each server."""
    folder = host.models / "diffusion_models"
    if (folder / FILES[0]).exists():
        return host
    write_pixart(folder / FILES[0], CONFIG)
    write_pixart(folder / OTHER, CONFIG, seed=1)
    write_pixart(folder / SIGMA, tiny_config("sigma-512"), dtype=torch.float16)
    write_t5(host.models / "text_encoders" / FILES[1])
    write_lora(host.models / "loras" / PEFT, CONFIG, "base_model.model.")
    write_lora(host.models / "loras" / DIFFUSERS, CONFIG, "transformer.")
    return host


@pytest.fixture
def server(host):
    return fill(host)


def pictures(host, nodes):
    """The pictures of a workflow, float arrays of 0..255."""
    return [np.asarray(image.convert("RGB"), np.float32) for image in host.run(nodes, timeout_s=300)]


def plain(host, batch=1, **settings):
    graph = PictureGraph(*FILES)
    return pictures(host, graph.save(graph.sample(graph.empty(batch=batch), **settings)))


def differ(one, other):
    return np.abs(one - other).max() > ROUNDING


@pytest.mark.parametrize(("width", "height", "batch"), [(64, 64, 1), (72, 104, 1), (64, 40, 4)])
def test_ksampler_at_any_size(server, width, height, batch):
    graph = PictureGraph(*FILES)
    found = pictures(server, graph.save(graph.sample(graph.empty(width, height, batch))))
    assert [picture.shape for picture in found] == [(height, width, 3)] * batch
    assert all(picture.std() > 1 for picture in found)


def test_same_seed_same_picture_after_unloading(server):
    before = plain(server)[0]
    server.unload()
    assert np.array_equal(plain(server)[0], before)
    assert differ(plain(server, seed=8)[0], before)


DEMO = ("pixart_demo.safetensors", "pixart_demo_t5.safetensors")  # which the pack offers itself


def test_previews_have_the_pictures_colours(host):
    graph = PictureGraph(*DEMO, text="a large yellow square in the center on a black background")
    previews = []
    queued = host.queue(graph.save(graph.sample(graph.empty(128, 128), steps=6)))
    entry = host.wait(queued, on_event=lambda kind, data: previews.append(data["image"]) if kind == "preview" else None)
    [picture] = host.images(entry)
    latent_px = (16, 16)
    shown = np.asarray(previews[-1].convert("RGB").resize(latent_px, Image.Resampling.BOX), np.float32)
    wanted = Image.open(io.BytesIO(picture)).convert("RGB").resize(latent_px, Image.Resampling.BOX)
    assert np.asarray(wanted).std() > 60
    assert np.abs(shown - np.asarray(wanted, np.float32)).mean() < 12  # of 255; by SD 1.5's factors 77


def test_custom_sampler_with_previews_and_interrupt(server):
    def graph(steps):
        made = PictureGraph(*FILES)
        latent = made.add(
            "SamplerCustomAdvanced",
            noise=made.add("RandomNoise", noise_seed=3),
            guider=made.add("CFGGuider", model=made.model, positive=made.positive, negative=made.negative, cfg=3.0),
            sampler=made.add("KSamplerSelect", sampler_name="euler"),
            sigmas=made.add("BasicScheduler", model=made.model, scheduler="simple", steps=steps, denoise=1.0),
            latent_image=made.empty(),
        )
        return made.save(latent)

    events = server.events(graph(4))
    assert [data for kind, data in events if kind == "preview"]
    interrupted = server.queue(graph(5000))
    with pytest.raises(Interrupted):
        server.wait(interrupted, 120, lambda kind, _: server.interrupt() if kind == "progress" else None)
    assert pictures(server, graph(3))


def test_image_to_image_and_inpainting(server):
    source = Image.new("RGB", (256, 64), (40, 160, 90))
    graph = PictureGraph(*FILES)
    pixels = graph.add("LoadImage", image=server.upload(source, "queue_source.png"))
    latent = graph.add("VAEEncode", pixels=pixels, vae=graph.vae)
    changed = graph.sample(latent, denoise=0.5, steps=4)
    graph.save(changed)
    mask = graph.add("SolidMask", value=1.0, width=32, height=64)
    mask = graph.add(
        "MaskComposite", destination=graph.add("SolidMask", value=0.0, width=256, height=64), source=mask, x=0, y=0,
        operation="add",
    )  # fmt: skip
    graph.save(graph.sample(graph.add("SetLatentNoiseMask", samples=latent, mask=mask), steps=4))
    graph.save(latent)
    image, inpainted, original = pictures(server, graph.nodes)
    assert differ(image, original)
    # Away from the mask all is as it was: the decoder sees some twelve latent pixels (96 px) around each.
    assert np.abs(inpainted[:, 192:] - original[:, 192:]).max() <= ROUNDING
    assert np.abs(inpainted[:, :24] - original[:, :24]).mean() > 10


def test_area_and_timestep_range(server):
    graph = PictureGraph(*FILES)
    second = graph.add("PixArtTextEncode", clip=graph.clip, text="a blue square")
    area = graph.add("ConditioningSetArea", conditioning=second, width=64, height=64, x=32, y=8, strength=1.0)
    early = graph.add("ConditioningSetTimestepRange", conditioning=second, start=0.0, end=0.3)
    late = graph.add("ConditioningSetTimestepRange", conditioning=graph.positive, start=0.3, end=1.0)
    both = graph.add("ConditioningCombine", conditioning_1=graph.positive, conditioning_2=area)
    ranged = graph.add("ConditioningCombine", conditioning_1=early, conditioning_2=late)
    joined = graph.add("ConditioningConcat", conditioning_to=graph.positive, conditioning_from=second)
    average = graph.add(
        "ConditioningAverage", conditioning_to=graph.positive, conditioning_from=second, conditioning_to_strength=0.5
    )
    for positive in (graph.positive, both, ranged, joined, average):
        graph.save(graph.sample(graph.empty(128, 128), positive=positive))
    found = pictures(server, graph.nodes)
    changes = [np.abs(picture - found[0]).max() for picture in found[1:]]
    assert len(changes) == 4
    assert min(changes) > ROUNDING, changes


@pytest.mark.parametrize("name", [PEFT, DIFFUSERS])
def test_host_lora_loader(server, name):
    graph = PictureGraph(*FILES)
    strong = graph.add("LoraLoaderModelOnly", model=graph.model, lora_name=name, strength_model=1.0)
    none = graph.add("LoraLoaderModelOnly", model=graph.model, lora_name=name, strength_model=0.0)
    graph.save(graph.sample(graph.empty(), model=strong))
    graph.save(graph.sample(graph.empty(), model=none))
    patched, unpatched = pictures(server, graph.nodes)
    assert differ(patched, unpatched)
    assert np.array_equal(plain(server)[0], unpatched)  # and the model is as it was
    assert "lora key not loaded" not in server.log()


def test_merge_save_and_reload(server):
    graph = PictureGraph(*FILES)
    other = graph.add("PixArtLoadCheckpoint", checkpoint=OTHER)
    merged = graph.add("ModelMergeSimple", model1=graph.model, model2=other, ratio=0.25)
    graph.add("ModelSave", model=merged, filename_prefix="diffusion_models/queue_merged")
    expected = pictures(server, graph.save(graph.sample(graph.empty(), model=merged)))[0]
    [file] = server.output.glob("diffusion_models/queue_merged*.safetensors")
    saved = load_file(file)
    for name, weight in make_weights(CONFIG).items():  # the tables and the null caption too
        mean = 0.25 * weight + 0.75 * make_weights(CONFIG, seed=1)[name]
        torch.testing.assert_close(saved[f"model.diffusion_model.{name}"], mean, atol=1e-6, rtol=0)
    shutil.copy(file, server.models / "diffusion_models" / "queue_reloaded.safetensors")
    again = PictureGraph("queue_reloaded.safetensors", FILES[1])
    assert not differ(pictures(server, again.save(again.sample(again.empty())))[0], expected)


def test_model_patches_of_the_host(server):
    graph = PictureGraph(*FILES)
    patched = [
        graph.add(
            "SkipLayerGuidanceDiT", model=graph.model, double_layers="1", single_layers="", scale=3.0,
            start_percent=0.0, end_percent=1.0, rescaling_scale=0.0,
        ),
        graph.add("PerturbedAttentionGuidance", model=graph.model, scale=3.0),
        graph.add(
            "EasyCache", model=graph.model, reuse_threshold=3.0, start_percent=0.0, end_percent=1.0, verbose=False
        ),
    ]  # fmt: skip
    for model in (graph.model, *patched):
        graph.save(graph.sample(graph.empty(), model=model, steps=8))
    found = pictures(server, graph.nodes)
    assert all(differ(picture, found[0]) for picture in found[1:])
    assert "EasyCache - skipped" in server.log()


def test_lcm_by_the_hosts_nodes(server):
    graph = PictureGraph(*FILES)
    model = graph.add("ModelSamplingDiscrete", model=graph.model, sampling="lcm", zsnr=False)
    settings = {"steps": 4, "cfg": 1.0, "sampler_name": "lcm", "scheduler": "sgm_uniform"}
    assert pictures(server, graph.save(graph.sample(graph.empty(), model=model, **settings)))[0].std() > 1


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp8_e4m3fn", "fp8_e5m2"])
def test_weight_dtypes(server, dtype):
    graph = PictureGraph(*FILES, weight_dtype=dtype)
    model = graph.add("LoraLoaderModelOnly", model=graph.model, lora_name=PEFT, strength_model=0.5)
    graph.save(graph.sample(graph.empty()))
    graph.save(graph.sample(graph.empty(), model=model))
    found = pictures(server, graph.nodes)
    assert differ(*found)
    assert all(picture.std() > 1 for picture in found)


def test_two_models_in_one_graph(server):
    graph = PictureGraph(*FILES)
    other = graph.add("PixArtLoadCheckpoint", checkpoint=SIGMA)
    first = graph.sample(graph.empty())
    graph.save(first)
    graph.save(graph.sample(first, model=other, denoise=0.5))
    alone, both = pictures(server, graph.nodes)
    assert np.array_equal(plain(server)[0], alone)
    assert differ(alone, both)


def test_learned_null_and_sizes(server):
    graph = PictureGraph(*FILES)
    null = graph.add("PixArtNegative", mode="learned null", positive=graph.positive, model=graph.model)
    size = graph.add("PixArtResolution", base="256", mode="nearest to size", width=70, height=90, batch_size=1)
    told = graph.add("PixArtTextEncode", clip=graph.clip, text="a red circle on a white background",
                     model=graph.model, width=512, height=256, aspect_ratio=0.5)  # fmt: skip
    graph.save(graph.sample(graph.empty()))
    graph.save(graph.sample(graph.empty(), negative=null))
    graph.save(graph.sample(graph.empty(), positive=told))
    graph.save(graph.sample([size[0], 2]))
    found = pictures(server, graph.nodes)
    assert differ(found[0], found[1])
    assert differ(found[0], found[2])
    assert found[3].shape[0] > found[3].shape[1]


def test_model_info(server):
    graph = PictureGraph(*FILES)
    info = graph.add("PixArtModelInfo", model=graph.model)
    entry = server.wait(server.queue(graph.nodes), 120)
    text = "\n".join(entry["outputs"][info[0]]["text"])
    for part in (FILES[0], "PixArt-alpha", "64 x 64 px", "120 tokens of width 24", "0.18215", "layers: 3"):
        assert part in text


def test_two_prompts_after_another_and_the_speed_of_the_second(server):
    plain(server)
    began = time.monotonic()
    plain(server, seed=99)
    assert time.monotonic() - began < 60  # nothing is loaded again


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: path.write_bytes(b""), "queue_wrong"),
        (lambda path: path.write_bytes(b"\x80\x02broken"), "queue_wrong"),
        (lambda path: write_lora(path, CONFIG, "base_model.model."), "LoRA"),
        (lambda path: write_t5(path), "queue_wrong"),
    ],
    ids=["empty", "broken", "lora", "t5"],
)
def test_wrong_files_are_named(server, write, message):
    path = server.models / "diffusion_models" / "queue_wrong.safetensors"
    write(path)
    graph = PictureGraph(path.name, FILES[1])
    with pytest.raises(PromptError, match=message) as caught:
        server.run(graph.save(graph.sample(graph.empty())))
    assert "PixArtLoadCheckpoint" in str(caught.value)
    path.unlink()
    assert plain(server)  # the server goes on


def test_wrong_wiring_says_what_to_connect(server):
    graph = PictureGraph(SIGMA, FILES[1])
    graph.vae = graph.add("PixArtLoadVAE", vae=VAE, model=graph.model)
    with pytest.raises(PromptError, match=r"VAE of another family.*0\.182.*expected 0\.13025"):
        server.run(graph.save(graph.sample(graph.empty())))


@pytest.mark.slow
def test_compiled_model(server):
    if not shutil.which("gcc") and not shutil.which("cl"):
        pytest.skip("needs a C compiler: torch.compile's inductor makes C++ on the CPU")
    graph = PictureGraph(*FILES)
    graph.model = graph.add("TorchCompileModel", model=graph.model, backend="inductor")
    compiled = pictures(server, graph.save(graph.sample(graph.empty())))[0]
    # Fused kernels round differently; sigma 157 and guidance 3 multiply that in the first step.
    assert np.abs(compiled - plain(server)[0]).max() < 4


def test_half_precision_between_nodes(start_host, server):
    frugal = fill(start_host("--fp16-intermediates", "--use-pytorch-cross-attention"))
    expected, other_seed = plain(server, batch=2), plain(server, batch=2, seed=8)
    found = plain(frugal, batch=2)
    for one, same, other in zip(found, expected, other_seed, strict=True):
        # Latents travel in half precision, which random weights and guidance enlarge; another seed is far further off.
        assert np.abs(one - same).mean() < 0.25 * np.abs(one - other).mean()
    graph = PictureGraph(*FILES)
    model = graph.add("LoraLoaderModelOnly", model=graph.model, lora_name=PEFT, strength_model=1.0)
    assert pictures(frugal, graph.save(graph.sample(graph.empty(72, 40), model=model)))


def told(host, nodes, **written):
    """What the pictures of a workflow say of themselves, where the editor sends it with what goes into them."""
    extra = {"extra_pnginfo": {"workflow": {}, **written}}
    answer = host.post("/prompt", {"prompt": nodes, "client_id": host.client_id, "extra_data": extra})
    outputs = host.wait(answer["prompt_id"])["outputs"]
    shown = [each for number in sorted(outputs) for each in outputs[number].get("images", ())]
    return [Image.open(io.BytesIO(host.get("/view", **each))).text for each in shown]


def test_pictures_of_the_editor_name_model_and_lora_for_other_programs(server):
    graph = PictureGraph(*FILES)
    graph.model = graph.add("PixArtLoadLoRA", model=graph.model, lora=PEFT, strength=0.5)
    [text] = told(server, graph.save(graph.sample(graph.empty(height=72))))
    fields = json.loads(text["parameters"])["sui_image_params"]
    expected = {"model": FILES[0].removesuffix(".safetensors"), "loras": [PEFT.removesuffix(".safetensors")]}
    expected |= {"loraweights": ["0.5"], "seed": 7, "steps": 2, "cfgscale": 3.0, "sampler": "euler", "width": 64}
    assert fields.items() >= {**expected, "height": 72, "prompt": "a red circle on a white background"}.items()
    assert json.loads(text["prompt"]) == graph.nodes  # which the editor opens, as before
    for node in graph.nodes.values():
        node["inputs"] |= {"seed": 9} if node["class_type"] == "KSampler" else {}
    [kept] = told(server, graph.nodes, parameters="its own")
    assert kept["parameters"] == '"its own"'


def test_pictures_of_several_kinds_in_one_graph_are_not_mixed_up(server):
    graph = PictureGraph(*FILES)
    graph.save(graph.sample(graph.empty()))
    both = told(server, graph.save(graph.sample(graph.empty(), seed=8)))
    assert len(both) == 2 and not any("parameters" in text for text in both)
