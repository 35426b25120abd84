"""PixArt's ControlNet through the prompt queue of a real server, with all that users combine it with."""

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from pixart_pack.demo.client import PromptError
from pixart_pack.pixart.weights.controlnets import save_controlnet
from pixart_pack.tests.host.graph import PictureGraph, write_lora, write_pixart, write_t5
from pixart_pack.tests.host.test_controlnet_host import control_weights, zeroed
from pixart_pack.tests.tiny_pixart import make_weights, tiny_config

CONFIG = tiny_config(depth=4, base_size=4, pe_scale=1.0)
FILES = ("control_base.safetensors", "control_t5.safetensors")
ALONE, BOTH, FRESH, SIGMA, OTHER = (
    "control_alone.safetensors",
    "control_both.pth",
    "control_fresh.safetensors",
    "control_sigma.safetensors",
    "control_sd.safetensors",
)
LORA = "control_lora.safetensors"
ROUNDING = 1.0  # of 255: float32 noise can tip a value over to the next


@pytest.fixture
def server(host):
    folder = host.models / "controlnet"
    if not (folder / ALONE).exists():
        fill(host, folder)
    return host


def fill(host, folder):
    write_pixart(host.models / "diffusion_models" / FILES[0], CONFIG)
    write_t5(host.models / "text_encoders" / FILES[1])
    write_lora(host.models / "loras" / LORA, CONFIG, "transformer.")
    save_controlnet(folder / ALONE, control_weights(CONFIG), CONFIG)
    save_controlnet(folder / BOTH, control_weights(CONFIG), CONFIG, base=make_weights(CONFIG))
    save_controlnet(folder / FRESH, zeroed(control_weights(CONFIG)), CONFIG)
    save_controlnet(folder / "control_folder", control_weights(CONFIG), CONFIG)
    sigma = tiny_config("sigma-512", depth=4)
    save_controlnet(folder / SIGMA, control_weights(sigma), sigma)
    save_file({"control_model.input_hint_block.0.weight": torch.zeros(1)}, folder / OTHER)


def hint_of(host, size=(64, 64), seed=0):
    """The name of an uploaded picture of edges."""
    edges = np.random.default_rng(seed).integers(0, 2, (size[1], size[0]), dtype=np.uint8) * 255
    return host.upload(Image.fromarray(edges).convert("RGB"), f"control_{size[0]}_{size[1]}_{seed}.png")


class ControlGraph(PictureGraph):
    """A picture's workflow with controls on its prompts."""

    def __init__(self, **load):
        super().__init__(*FILES, **load)

    def steer(self, image, name=ALONE, node="PixArtControlNetApply", vae=True, control=None, **settings):
        """Puts a control on both prompts. Returns the loader's link."""
        control = control or self.add("PixArtLoadControlNet", controlnet=name)
        usual = {"strength": 1.0, "start_percent": 0.0, "end_percent": 1.0, **settings}
        found = self.add(
            node,
            positive=self.positive,
            negative=self.negative,
            control_net=control,
            image=self.add("LoadImage", image=image) if isinstance(image, str) else image,
            **({"vae": self.vae} if vae else {}),
            **usual,
        )
        self.positive, self.negative = found, [found[0], 1]
        return control


def pictures(host, graph, latent=None, **settings):
    """Sampled and decoded, float arrays of 0..255."""
    nodes = graph.save(graph.sample(latent or graph.empty(), **settings))
    return [np.asarray(image.convert("RGB"), np.float32) for image in host.run(nodes, timeout_s=300)]


def controlled(host, size=(64, 64), batch=1, load=None, sampling=None, **settings):
    graph = ControlGraph(**(load or {}))
    graph.steer(hint_of(host, size), **settings)
    return pictures(host, graph, graph.empty(*size, batch), **(sampling or {}))


def differ(one, other):
    return np.abs(one - other).max() > ROUNDING


def test_control_steers_the_picture_and_zero_does_not(server):
    none = pictures(server, ControlGraph())[0]
    assert differ(controlled(server)[0], none)
    assert np.array_equal(controlled(server, strength=0.0)[0], none)
    assert np.array_equal(controlled(server, name=FRESH)[0], none)
    assert np.array_equal(controlled(server, start_percent=1.0)[0], none)


def test_every_form_of_the_same_weights_gives_the_same_picture(server):
    expected = controlled(server)[0]
    for form in ({"name": BOTH}, {"name": "control_folder/"}, {"node": "ControlNetApplyAdvanced"}):
        assert not differ(controlled(server, **form)[0], expected), form  # weights of another file lie elsewhere
    graph = ControlGraph()
    graph.model = [graph.steer(hint_of(server), BOTH)[0], 1]  # the combined file's own base
    assert not differ(pictures(server, graph)[0], expected)


@pytest.mark.parametrize(("size", "batch"), [((72, 104), 1), ((64, 40), 4), ((104, 56), 2)])
def test_any_size_and_batch(server, size, batch):
    found = controlled(server, size, batch)
    assert [picture.shape for picture in found] == [(size[1], size[0], 3)] * batch
    graph = ControlGraph()
    for picture, none in zip(found, pictures(server, graph, graph.empty(*size, batch)), strict=True):
        assert differ(picture, none)


def test_a_hint_for_each_picture_of_a_batch(server):
    graph = ControlGraph()
    one, other = (graph.add("LoadImage", image=hint_of(server, seed=seed)) for seed in (0, 1))
    graph.steer(graph.add("ImageBatch", image1=one, image2=other))
    found = pictures(server, graph, graph.empty(batch=2))
    same = controlled(server, batch=2)
    assert not differ(found[0], same[0]) and differ(found[1], same[1])


def test_two_controls_one_after_the_other(server):
    graph = ControlGraph()
    control = graph.steer(hint_of(server), strength=0.6, end_percent=0.8)
    graph.steer(hint_of(server, seed=1), control=control, strength=0.4, start_percent=0.2)
    both = pictures(server, graph, steps=4)[0]
    only = controlled(server, sampling={"steps": 4}, strength=0.6, end_percent=0.8)[0]
    assert differ(both, only)
    mixed = ControlGraph()
    mixed.steer(hint_of(server), strength=0.6, end_percent=0.8, node="ControlNetApplyAdvanced")
    mixed.steer(hint_of(server, seed=1), strength=0.4, start_percent=0.2)
    assert not differ(pictures(server, mixed, steps=4)[0], both)


def test_masked_prompts_lora_and_guidance_of_one(server):
    graph = ControlGraph()
    graph.steer(hint_of(server))
    graph.model = graph.add("LoraLoaderModelOnly", model=graph.model, lora_name=LORA, strength_model=1.0)
    mask = graph.add("SolidMask", value=1.0, width=32, height=64)
    mask = graph.add(
        "MaskComposite", destination=graph.add("SolidMask", value=0.0, width=64, height=64), source=mask, x=0, y=0,
        operation="add",
    )  # fmt: skip
    area = graph.add(
        "ConditioningSetMask", conditioning=graph.positive, mask=mask, strength=1.0, set_cond_area="default"
    )
    other = graph.add("PixArtTextEncode", clip=graph.clip, text="a blue square")
    masked = graph.add("ConditioningCombine", conditioning_1=area, conditioning_2=other)
    for settings in ({"positive": masked}, {"positive": masked, "cfg": 1.0}, {}):
        assert pictures(server, graph, **settings)[0].std() > 1


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp8_e4m3fn"])
def test_precisions_of_base_and_control(server, dtype):
    exact = controlled(server)[0]
    control = {"class_type": "PixArtLoadControlNet", "inputs": {"controlnet": ALONE, "weight_dtype": dtype}}
    graph = ControlGraph(weight_dtype=dtype)
    graph.nodes["control"] = control
    graph.steer(hint_of(server), control=["control", 0])
    found = pictures(server, graph)[0]
    # Pictures of random weights magnify rounding; a control that is lost would be as far off as none.
    none = pictures(server, ControlGraph())[0]
    assert np.abs(found - exact).mean() < np.abs(none - exact).mean()


def test_every_solver(server):
    choices = server.object_info("KSampler")["input"]["required"]["sampler_name"][0]
    ours = [name for name in choices if name.startswith("pixart")]
    assert ours
    graph = ControlGraph()
    graph.steer(hint_of(server))
    for name in ours:
        graph.save(graph.sample(graph.empty(), sampler_name=name, steps=1 if "dmd" in name else 3))
    assert len(server.run(graph.nodes, timeout_s=300)) == len(ours)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": OTHER}, "Not a PixArt ControlNet: got ControlNet (of another model)"),
        ({"name": SIGMA}, "ControlNet of the other family: got one of PixArt-sigma"),
        ({"node": "ControlNetApplyAdvanced", "vae": False}, "ControlNet image without a VAE"),
        ({"start_percent": 0.9, "end_percent": 0.1}, "Control ends before it starts"),
    ],
)
def test_what_is_wrong_is_said(server, settings, message):
    with pytest.raises(PromptError) as error:
        controlled(server, **settings)
    assert message in str(error.value)


def test_a_missing_base_model_is_said(server):
    graph = ControlGraph()
    graph.model = [graph.steer(hint_of(server))[0], 1]
    events = server.events(graph.save(graph.sample(graph.empty())))
    errors = [data["exception_message"] for kind, data in events if kind == "execution_error"]
    assert errors and all("No base model in this ControlNet file" in message for message in errors)
