"""Puts any node of the host into a small PixArt graph: in front of the sampler, or behind it, by its outputs."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from pixart_pack.demo.client import PromptError
from pixart_pack.tests.host.graph import PictureGraph

TABLE = Path(__file__).with_name("core_nodes.json")
CONFIG_FILE = "demo/models/diffusion_models/pixart_demo.safetensors"
FILES = ("pixart_demo.safetensors", "pixart_demo_t5.safetensors")
CONTROL, LORA, OTHER = "pixart_demo_control.safetensors", "core_lora.safetensors", "core_other.safetensors"
SIDE_PX = 128
TYPES = {"MODEL", "CONDITIONING", "LATENT", "SIGMAS", "GUIDER", "CONTROL_NET"}
WIDGETS = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}
MASKED = ("DifferentialDiffusion",)
WITH_LATENT = ("InpaintModelConditioning",)  # whose latent belongs to its conditioning
ROUNDING = 1.0  # of 255: float32 noise can tip a value over to the next
# What a node of the table means on PixArt.
ACTS, KEEPS, REFUSED, OTHER_MODEL, OTHER_TYPE = MEANINGS = ("acts", "keeps", "refused", "other model", "other type")
# What became of its graph: another picture, the same, an end without one, an error; or nothing to put into an input.
CHANGES, SAME, RUNS, FAILS, UNFILLED = "changes", "same", "runs", "fails", "unfilled"
FITTING = {
    ACTS: (CHANGES, RUNS),
    KEEPS: (SAME, RUNS),
    REFUSED: (FAILS,),
    OTHER_MODEL: (SAME, FAILS, UNFILLED, RUNS),
    OTHER_TYPE: (UNFILLED,),
}
SMALL = {"width": SIDE_PX // 2, "height": SIDE_PX // 2, "length": 1}  # where a node of another model asks for its size
SECOND = ("_from", "_NEW", "_B", "cond2", "_2", "source", "samples2")  # inputs that take what the first has not


class CoreGraph(PictureGraph):
    """A graph around one node of the host. info: what /object_info says of it. given: inputs in place of defaults."""

    def __init__(self, info: dict, picture: str, given: dict):
        super().__init__(*FILES, text="a red circle on a white background")
        self.info, self.picture, self.given = info, picture, given
        self.negative = self.add("PixArtTextEncode", clip=self.clip, text="a blue square")

    def source(self, kind: str, name: str):
        """A link to something of a type, None where PixArt's graphs have nothing of it."""
        makers = {
            "MODEL": self._model,
            "CONDITIONING": self._prompt,
            "LATENT": self._latent,
            "CLIP": lambda _: self.clip,
            "VAE": lambda _: self.vae,
            "IMAGE": lambda _: self.add("LoadImage", image=self.picture),
            "MASK": lambda _: self.mask(),
            "SIGMAS": lambda _: self.sigmas(),
            "SAMPLER": lambda _: self.add("KSamplerSelect", sampler_name="euler"),
            "NOISE": lambda _: self.add("RandomNoise", noise_seed=3),
            "GUIDER": lambda _: self.guider(),
            "CONTROL_NET": lambda _: self.add("PixArtLoadControlNet", controlnet=CONTROL),
            "HOOKS": lambda _: self.hooks(),
            "TIMESTEPS_RANGE": lambda _: self.add("ConditioningTimestepsRange", start_percent=0.0, end_percent=0.6),
            "LATENT_OPERATION": lambda _: self.add("LatentOperationTonemapReinhard", multiplier=1.0),
        }
        return makers[kind](name) if kind in makers else None

    def _model(self, name):
        return self.add("PixArtLoadCheckpoint", checkpoint=OTHER) if name == "model2" else self.model

    def _prompt(self, name):
        if "empty" in name:
            return self.add("PixArtNegative", mode="empty", clip=self.clip)
        if any(end in name for end in SECOND) and "negative" not in name:
            return self.add("PixArtTextEncode", clip=self.clip, text="a green triangle on a black background")
        return self.negative if "negative" in name else self.positive

    def _latent(self, name):
        if any(end in name for end in SECOND):
            return self.add("LatentFlip", samples=self.latent(), flip_method="y-axis: horizontally")
        return self.latent()

    def mask(self):
        """White in the left half."""
        half = self.add("SolidMask", value=1.0, width=SIDE_PX // 2, height=SIDE_PX)
        black = self.add("SolidMask", value=0.0, width=SIDE_PX, height=SIDE_PX)
        return self.add("MaskComposite", destination=black, source=half, x=0, y=0, operation="add")

    def latent(self):
        return self.add("VAEEncode", pixels=self.add("LoadImage", image=self.picture), vae=self.vae)

    def sigmas(self):
        return self.add("BasicScheduler", model=self.model, scheduler="simple", steps=4, denoise=1.0)

    def guider(self, **links):
        usual = {"model": self.model, "positive": self.positive, "negative": self.negative, "cfg": 3.0}
        return self.add("CFGGuider", **{**usual, **links})

    def hooks(self):
        return self.add("CreateHookLoraModelOnly", lora_name=LORA, strength_model=1.0)

    def node(self) -> list:
        """The node with a default or a source for each input. Raises KeyError naming a type that PixArt has not."""
        inputs = {}
        for section in ("required", "optional"):
            for name, (kind, *options) in self.info["input"].get(section, {}).items():
                value = self._value(kind, options[0] if options else {}, name)
                if value is not None:
                    inputs[name] = value
                elif section == "required" and name not in self.given:
                    raise KeyError(str(kind))
        return self.add(self.info["name"], **{**inputs, **self.given})

    def _value(self, kind, options, name):
        if isinstance(kind, list):
            return options.get("default", kind[0] if kind else None)
        if kind in WIDGETS:
            choices = options.get("options")
            if kind == "INT" and name in SMALL:
                return max(SMALL[name], options.get("min", 0))
            return options.get("default", choices[0] if choices else {"STRING": "", "BOOLEAN": False}.get(kind, 0))
        links = [self.source(each, name) for each in kind.split(",")]
        return next((link for link in links if link is not None), None)

    def finish(self, link) -> str:
        """Ends the graph behind the node. Returns the type of the output that the picture depends on."""
        outputs = self.info["output"]
        first = next((kind for kind in outputs if kind in (*TYPES, "IMAGE", "SAMPLER", "NOISE")), None)
        at = [link[0], outputs.index(first)] if first else link
        if first == "IMAGE":
            self.add("PreviewImage", images=at)
        elif first is not None:
            self.preview(self._sampled(first, at, outputs))
        elif not self.info["output_node"]:
            self.add("PreviewAny", source=at)
        return first or "nothing"

    def preview(self, latent) -> None:
        self.add("PreviewImage", images=self.add("VAEDecode", samples=latent, vae=self.vae))

    def _sampled(self, kind, at, outputs):
        if kind == "MODEL":
            return self.masked(model=at) if self.info["name"] in MASKED else self.drawn(model=at)
        if kind == "CONDITIONING" and self.info["name"] in WITH_LATENT:
            links = {"positive": at, "negative": [at[0], at[1] + 1]}
            return self.sample([at[0], outputs.index("LATENT")], denoise=0.6, steps=4, **links)
        if kind == "CONDITIONING":
            second = [at[0], at[1] + 1] if outputs[at[1] + 1 : at[1] + 2] == [kind] else self.negative
            return self.drawn(positive=at, negative=second)
        if kind == "LATENT":
            return at if "latent_image" in self._inputs() else self.sample(at, denoise=0.6, steps=4)
        if kind == "CONTROL_NET":
            return self.controlled(at)
        return self.advanced(**{kind.lower(): at})

    def _inputs(self):
        return {name for section in ("required", "optional") for name in self.info["input"].get(section, {})}

    def controlled(self, control):
        given = {"positive": self.positive, "negative": self.negative, "control_net": control, "vae": self.vae}
        usual = {"strength": 1.0, "start_percent": 0.0, "end_percent": 1.0}
        image = self.add("LoadImage", image=self.picture)
        applied = self.add("ControlNetApplyAdvanced", image=image, **given, **usual)
        return self.drawn(positive=applied, negative=[applied[0], 1])

    def drawn(self, **links):
        return self.sample(self.empty(SIDE_PX, SIDE_PX), steps=4, **links)

    def masked(self, **links):
        """What DifferentialDiffusion and its like are for: a latent with a soft mask."""
        grey = self.add("SolidMask", value=0.5, width=SIDE_PX, height=SIDE_PX)
        latent = self.add("SetLatentNoiseMask", samples=self.latent(), mask=grey)
        return self.sample(latent, steps=4, **links)

    def advanced(self, **links):
        usual = {
            "noise": lambda: self.add("RandomNoise", noise_seed=3),
            "guider": self.guider,
            "sampler": lambda: self.add("KSamplerSelect", sampler_name="euler"),
            "sigmas": self.sigmas,
        }
        made = {name: links.get(name) or make() for name, make in usual.items()}
        return self.add("SamplerCustomAdvanced", latent_image=self.empty(SIDE_PX, SIDE_PX), **made)

    def plain(self, kind) -> None:
        """The picture without the node, for outputs of a type."""
        if self.info["name"] in MASKED:
            self.preview(self.masked())
        elif kind == "LATENT" or self.info["name"] in WITH_LATENT:
            self.preview(self.sample(self.latent(), denoise=0.6, steps=4))
        elif kind == "CONTROL_NET":
            self.preview(self.controlled(self.source(kind, "")))
        elif kind in ("MODEL", "CONDITIONING"):
            self.preview(self.drawn())
        else:
            self.preview(self.advanced())


def wanted(info: dict) -> bool:
    """Whether a node takes one of TYPES and is the host's own."""
    if not info["python_module"].startswith(("nodes", "comfy_extras")):
        return False
    kinds = {str(kind) for section in ("required", "optional") for kind, *_ in info["input"].get(section, {}).values()}
    return any(TYPES & set(kind.split(",")) for kind in kinds)


def try_node(host, info: dict, picture: str, given: dict, plain: dict) -> tuple[str, str]:
    """(what became of its graph, the message, or the type that the picture depends on).

    plain: pictures without the node, by what they depend on, filled in.
    """
    graph = CoreGraph(info, picture, given)
    try:
        link = graph.node()
    except KeyError as missing:
        return UNFILLED, missing.args[0]
    kind = graph.finish(link)
    try:
        found = pictures(host, graph.nodes)
    except PromptError as error:
        return FAILS, str(error)
    if kind in ("IMAGE", "nothing"):
        return RUNS, kind
    key = info["name"] if info["name"] in (*MASKED, *WITH_LATENT) else kind
    if key not in plain:
        other = CoreGraph(info, picture, {})
        other.plain(kind)
        plain[key] = pictures(host, other.nodes)
    alike = len(found) == len(plain[key]) and all(
        one.shape == other.shape and np.abs(one - other).max() <= ROUNDING
        for one, other in zip(found, plain[key], strict=True)
    )
    return (SAME if alike else CHANGES), kind


def pictures(host, nodes) -> list[np.ndarray]:
    """The pictures of a workflow, float arrays of 0 to 255."""
    return [np.asarray(image.convert("RGB"), np.float32) for image in host.run(nodes, timeout_s=300)]


def read_table() -> dict:
    return json.loads(TABLE.read_text(encoding="utf-8"))


def source_picture() -> Image.Image:
    """What is encoded, and what control looks at: a dark square on a light ground, left of the middle."""
    picture = Image.new("RGB", (SIDE_PX, SIDE_PX), (220, 210, 190))
    picture.paste((30, 60, 160), (16, 40, 72, 104))
    return picture
