"""What the server's /object_info says of a node's widgets and sockets, as the editor reads it."""

from dataclasses import dataclass
from typing import Any

WIDGET_TYPES = frozenset({"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO", "COLOR"})
SEED_NAMES = ("seed", "noise_seed")
VIRTUAL_TYPES = frozenset({"Note", "MarkdownNote", "Reroute", "PrimitiveNode"})


@dataclass(frozen=True)
class Input:
    """An input of a node. type: COMBO for every list of choices. options: the rest of its description."""

    name: str
    type: str
    options: dict
    optional: bool

    @property
    def is_widget(self) -> bool:
        return self.type in WIDGET_TYPES and not self.options.get("forceInput")

    @property
    def is_multiline(self) -> bool:
        return self.type == "STRING" and bool(self.options.get("multiline"))

    @property
    def is_advanced(self) -> bool:
        return bool(self.options.get("advanced"))

    @property
    def default(self) -> Any:
        if self.type == "COMBO":
            choices = self.options.get("options") or [""]
            return self.options.get("default", choices[0])
        return self.options.get("default", {"INT": 0, "FLOAT": 0.0, "BOOLEAN": False}.get(self.type, ""))

    @property
    def extra_values(self) -> tuple:
        """What the editor keeps behind this widget's value, and never sends to the server."""
        upload = any(self.options.get(name) for name in ("image_upload", "video_upload", "audio_upload"))
        if upload:
            return ("image",)
        controlled = self.options.get("control_after_generate", self.name in SEED_NAMES)
        return ("randomize",) if self.type == "INT" and controlled else ()


def inputs_of(info: dict) -> list[Input]:
    """The inputs of a node's object_info, required ones first, hidden ones left out."""
    inputs = []
    for kind in ("required", "optional"):
        described = info["input"].get(kind, {})
        for name in info.get("input_order", {}).get(kind, described):
            kind_of, *options = described[name]
            options = dict(options[0]) if options else {}
            if isinstance(kind_of, list):
                kind_of, options = "COMBO", {**options, "options": kind_of}
            inputs.append(Input(name, kind_of, options, kind == "optional"))
    return inputs


def widget_names(info: dict) -> list[str | None]:
    """The input that each entry of a node's widgets_values is for; None where it is for none of the server's."""
    names = []
    for each in inputs_of(info):
        if each.is_widget:
            names += [each.name, *(None for _ in each.extra_values)]
    return names
