"""Every solver and preset through a real server's queue, as a user runs them, on a tiny PixArt with random weights."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from pixart_pack.demo.client import Interrupted, PromptError
from pixart_pack.demo.train import VAE_FILE
from pixart_pack.samplers import SAMPLERS
from pixart_pack.samplers.presets import PRESETS
from pixart_pack.samplers.schedules import SCHEDULES
from pixart_pack.tests.tiny_pixart import make_weights, tiny_config
from pixart_pack.tests.tiny_t5 import make_t5, weights_of

FILES = {"checkpoint": "tiny_sampling.safetensors", "t5": "tiny_sampling_t5.safetensors", "vae": VAE_FILE.name}
LORA = "tiny_sampling_lora.safetensors"
NODES = {
    "sa_solver": "PixArtSASolver",
    "dpm_solver": "PixArtDPMSolver",
    "iddpm": "PixArtIDDPM",
    "ddim": "PixArtDDIM",
    "lcm": "PixArtLCM",
    "dmd": "PixArtDMD",
}
STEPS = {"dmd": 1, "lcm": 4, "iddpm": 6, "ddim": 5}
CODING_ERROR = 3.0  # of 255: a picture's way into PNG and back through the autoencoder's neighbourhood


class Graph:
    """A workflow in API format, grown node by node."""

    def __init__(self):
        self.nodes = {}
        self.model = self.add("PixArtLoadCheckpoint", checkpoint=FILES["checkpoint"], weight_dtype="default")
        self.vae = self.add("PixArtLoadVAE", vae=FILES["vae"])
        clip = self.add("PixArtLoadT5", text_encoder=FILES["t5"])
        self.positive = self.add("PixArtTextEncode", clip=clip, text="a red circle on a white background")
        self.negative = self.add("PixArtTextEncode", clip=clip, text="")

    def add(self, class_type, **inputs):
        """A node; returns the link to its first output."""
        number = str(len(self.nodes) + 1)
        self.nodes[number] = {"class_type": class_type, "inputs": inputs}
        return [number, 0]

    def empty(self, width=64, height=64, batch=1):
        return self.add("EmptyLatentImage", width=width, height=height, batch_size=batch)

    def scheduler(self, name, denoise=1.0, steps=None):
        schedule = name if name in SCHEDULES else "uniform"
        steps = STEPS.get(name, 6) if steps is None else steps
        return self.add("PixArtScheduler", schedule=schedule, steps=steps, denoise=denoise, model=self.model)

    def sample(self, sampler, sigmas, latent, cfg=2.0, seed=7):
        """Sample, decode and save under the pictures' number."""
        latent = self.add(
            "SamplerCustom", model=self.model, add_noise=True, noise_seed=seed, cfg=cfg, positive=self.positive,
            negative=self.negative, sampler=sampler, sigmas=sigmas, latent_image=latent,
        )  # fmt: skip
        self.save(latent)

    def save(self, latent):
        self.add("SaveImage", images=self.add("VAEDecode", samples=latent, vae=self.vae), filename_prefix="sampling")

    def every_solver(self, latent, denoise=1.0):
        for name, node_id in NODES.items():
            self.sample(self.add(node_id), self.scheduler(name, denoise), latent)

    def every_preset(self, latent, denoise=1.0):
        for preset in PRESETS:
            number, _ = self.add("PixArtSamplingPreset", model=self.model, preset=preset, denoise=denoise)
            self.sample([number, 0], [number, 1], latent, cfg=[number, 2])

    def masked(self, latent):
        """The latent of 64 x 64 px with a mask that leaves its right side, from 40 px on, to be painted."""
        left = self.add("SolidMask", value=0.0, width=64, height=64)
        right = self.add("SolidMask", value=1.0, width=24, height=64)
        mask = self.add("MaskComposite", destination=left, source=right, x=40, y=0, operation="add")
        return self.add("SetLatentNoiseMask", samples=latent, mask=mask)

    def with_lora(self):
        self.model = self.add("LoraLoaderModelOnly", model=self.model, lora_name=LORA, strength_model=1.0)


def run(host, graph):
    """The pictures of a run that does not use cached results."""
    host.unload()
    return [np.asarray(picture.convert("RGB"), np.float32) for picture in host.run(graph.nodes)]


@pytest.fixture(scope="module")
def host(start_host):
    """The server, with the tiny model's files."""
    host = start_host()
    config = tiny_config("alpha-512")
    save_file(make_weights(config), host.models / "diffusion_models" / FILES["checkpoint"])
    save_file(weights_of(make_t5()), host.models / "text_encoders" / FILES["t5"])
    shutil.copy(VAE_FILE, host.models / "vae" / FILES["vae"])
    width, generator = config.hidden_size, torch.Generator().manual_seed(1)
    lora = {
        "diffusion_model.blocks.0.attn.qkv.lora_up.weight": torch.randn(3 * width, 4, generator=generator),
        "diffusion_model.blocks.0.attn.qkv.lora_down.weight": torch.randn(4, width, generator=generator),
    }
    save_file(lora, host.models / "loras" / LORA)
    return host


@pytest.fixture(scope="module")
def photo(host):
    """The name of an uploaded picture of 64 x 64 px."""
    ramp = np.linspace(40, 200, 64)
    pixels = np.stack([np.tile(ramp, (64, 1)), np.tile(ramp[:, None], (1, 64)), np.full((64, 64), 90)], -1)
    return host.upload(Image.fromarray(pixels.astype(np.uint8)), "sampling_photo.png")


def test_every_solver_has_a_node():
    assert NODES.keys() == SAMPLERS.keys()


@pytest.mark.parametrize(("width", "height", "batch"), [(64, 64, 4), (88, 104, 1)])
def test_every_solver_and_the_same_seed_twice(host, width, height, batch):
    graph = Graph()
    graph.every_solver(graph.empty(width, height, batch))
    first = run(host, graph)
    assert [picture.shape for picture in first] == [(height, width, 3)] * (batch * len(NODES))
    assert all(picture.std() > 1.0 for picture in first)
    assert all(np.array_equal(a, b) for a, b in zip(first, run(host, graph), strict=True))


def test_a_batch_holds_the_pictures_of_its_samples(host):
    """Sample 2 of a batch of 4 alone, by ComfyUI's own node for that."""
    graph = Graph()
    latent = graph.empty(batch=4)
    graph.sample(graph.add("PixArtSASolver"), graph.scheduler("sa_solver"), latent)
    alone = graph.add("LatentFromBatch", samples=latent, batch_index=2, length=1)
    graph.sample(graph.add("PixArtSASolver"), graph.scheduler("sa_solver"), alone)
    pictures = run(host, graph)
    assert np.abs(pictures[2] - pictures[4]).max() <= 1.0
    assert np.abs(pictures[1] - pictures[4]).max() > 10.0


def test_every_preset_in_a_batch_at_an_odd_size_and_the_same_seed_twice(host):
    graph = Graph()
    graph.every_preset(graph.empty(88, 104, batch=4))
    graph.every_preset(graph.empty())
    first = run(host, graph)
    batches, alone = first[: 4 * len(PRESETS)], first[4 * len(PRESETS) :]
    assert [picture.shape for picture in batches] == [(104, 88, 3)] * (4 * len(PRESETS))
    assert [picture.shape for picture in alone] == [(64, 64, 3)] * len(PRESETS)
    assert all(picture.std() > 1.0 for picture in first)
    assert all(np.array_equal(a, b) for a, b in zip(first, run(host, graph), strict=True))


def test_every_preset_on_a_picture_with_a_mask_and_a_lora(host, photo):
    """At half strength, and on the right side of the picture only; the LoRA changes what is drawn there."""
    graph = Graph()
    latent = graph.add("VAEEncode", pixels=graph.add("LoadImage", image=photo), vae=graph.vae)
    graph.save(latent)
    graph.every_preset(latent, denoise=0.5)
    masked = graph.masked(latent)
    graph.every_preset(masked, denoise=0.5)
    graph.with_lora()
    graph.every_preset(masked, denoise=0.5)
    unchanged, *pictures = run(host, graph)
    count = len(PRESETS)
    kinds = pictures[:count], pictures[count : 2 * count], pictures[2 * count :]
    for name, whole, right, taught in zip(PRESETS, *kinds, strict=True):
        assert np.abs(whole - unchanged).mean() > 1.0, name
        assert np.abs(right[:, :8] - unchanged[:, :8]).mean() < CODING_ERROR, name
        assert np.abs(taught[:, :8] - unchanged[:, :8]).mean() < CODING_ERROR, name
        assert np.abs(taught - right).max() > 1.0, name


def test_image_to_image(host, photo):
    graph = Graph()
    image = graph.add("LoadImage", image=photo)
    latent = graph.add("VAEEncode", pixels=image, vae=graph.vae)
    graph.save(latent)
    graph.every_solver(latent, denoise=0.1)
    graph.every_solver(latent, denoise=0.8)
    unchanged, *pictures = run(host, graph)
    weak, strong = pictures[: len(NODES)], pictures[len(NODES) :]
    for name, little, much in zip(NODES, weak, strong, strict=True):
        if name != "dmd":
            assert np.abs(little - unchanged).mean() < np.abs(much - unchanged).mean(), name


def test_inpainting_keeps_what_the_mask_leaves_out(host, photo):
    graph = Graph()
    image = graph.add("LoadImage", image=photo)
    latent = graph.add("VAEEncode", pixels=image, vae=graph.vae)
    graph.save(latent)
    graph.every_solver(graph.masked(latent))
    unchanged, *pictures = run(host, graph)
    for name, picture in zip(NODES, pictures, strict=True):
        assert np.abs(picture[:, :8] - unchanged[:, :8]).mean() < CODING_ERROR, name
        assert np.abs(picture[:, 48:] - unchanged[:, 48:]).mean() > 10.0, name


def test_with_a_lora(host):
    plain, changed = Graph(), Graph()
    plain.every_solver(plain.empty())
    changed.with_lora()
    changed.every_solver(changed.empty())
    for name, before, after in zip(NODES, run(host, plain), run(host, changed), strict=True):
        assert np.abs(before - after).max() > 1.0, name


@pytest.mark.parametrize("name", NODES)
def test_ksampler_offers_it(host, name):
    offered = host.object_info("KSampler")["input"]["required"]
    schedule = f"pixart_{name if name in SCHEDULES else 'uniform'}"
    assert f"pixart_{name}" in offered["sampler_name"][0]
    assert schedule in offered["scheduler"][0]
    graph = Graph()
    latent = graph.add(
        "KSampler", model=graph.model, seed=1, steps=STEPS.get(name, 6), cfg=2.0, sampler_name=f"pixart_{name}",
        scheduler=schedule, positive=graph.positive, negative=graph.negative, latent_image=graph.empty(), denoise=1.0,
    )  # fmt: skip
    graph.save(latent)
    (picture,) = run(host, graph)
    assert picture.std() > 1.0


@pytest.mark.parametrize("name", ["sa_solver", "dpm_solver", "iddpm", "ddim"])  # the others have at most 50 steps
def test_interrupted_midway_and_the_next_prompt_runs(host, name):
    graph = Graph()
    graph.sample(graph.add(NODES[name]), graph.scheduler(name, steps=1000), graph.empty())
    steps = []

    def stop(kind, data):
        if kind == "progress":
            if not steps:
                host.interrupt()
            steps.append((data["value"], data["max"]))

    host.unload()
    with pytest.raises(Interrupted, match="SamplerCustom"):
        host.wait(host.queue(graph.nodes), on_event=stop)
    assert steps[0][1] == 1000 and steps[-1][0] < 1000
    following = Graph()
    following.sample(following.add("PixArtSASolver"), following.scheduler("sa_solver"), following.empty())
    assert len(host.run(following.nodes)) == 1


def test_a_wrong_schedule_is_explained(host):
    graph = Graph()
    graph.sample(graph.add("PixArtDMD"), graph.scheduler("uniform"), graph.empty())
    with pytest.raises(PromptError, match="DMD takes one step to sigma 0: got 6 steps"):
        host.run(graph.nodes)
