"""Which room may import from which: one table, read by the import test and drawn on the architecture page."""

# room: (what is in it, the rooms that it may import from, and the libraries beside the standard one)
ROOMS = {
    "samplers": ("the maths of one solver per file", (), ("torch", "tqdm")),
    "pixart": ("the model, and what describes it", ("samplers",), ("torch", "numpy", "safetensors")),
    "pixart.files": (
        "strangers' files in bounds, own files whole",
        ("pixart",),
        ("torch", "numpy", "safetensors", "yaml"),
    ),
    "pixart.weights": (
        "files of weights",
        ("pixart", "pixart.files"),
        ("torch", "numpy", "safetensors"),
    ),
    "pixart.lora": (
        "adapters",
        ("pixart", "pixart.files", "pixart.weights"),
        ("torch", "safetensors"),
    ),
    "pixart.acceleration": ("the same numbers in less time", ("pixart",), ("torch",)),
    "pixart.reference": ("attention to another picture", ("pixart",), ("torch",)),
    "pixart.stages": (
        "what a training begins with",
        ("pixart", "pixart.weights"),
        ("torch",),
    ),
    "pixart.encoders": (
        "networks beside the transformer",
        ("pixart", "pixart.files", "pixart.weights"),
        ("torch", "safetensors"),
    ),
    "pixart.drawing": ("pictures with words", ("pixart",), ("PIL",)),
    "pixart.tracking": (
        "what made a picture or a training",
        ("pixart", "pixart.files"),
        ("PIL", "wandb"),
    ),
    "pixart.data": (
        "data sets",
        ("pixart", "pixart.files", "pixart.weights"),
        ("torch", "numpy", "safetensors", "PIL"),
    ),
    "pixart.training": (
        "objectives and the loop",
        (
            *("pixart", "pixart.files", "pixart.weights", "pixart.lora"),
            *("pixart.drawing", "pixart.tracking", "pixart.data"),
        ),
        ("torch", "numpy", "safetensors", "PIL", "accelerate", "tqdm", "wandb", "yaml"),
    ),
    "pixart.scores": (
        "how good pictures are",
        ("pixart", "pixart.files", "pixart.weights", "pixart.drawing", "pixart.data"),
        ("torch", "numpy", "PIL", "tqdm"),
    ),
    "pixart.commands": (
        "`python -m pixart <command>`",
        (
            *("pixart", "pixart.files", "pixart.weights", "pixart.lora", "pixart.acceleration", "pixart.encoders"),
            *("pixart.drawing", "pixart.data", "pixart.training", "pixart.stages", "pixart.scores", "pixart.reference"),
            "pixart.tracking",
        ),
        ("torch", "numpy", "safetensors", "PIL", "tqdm"),
    ),
    "nodes.host": ("all that reaches into ComfyUI", ("samplers", "pixart.*"), None),
    "nodes": ("thin nodes", ("nodes.host", "samplers", "pixart.*"), ("comfy_api", "torch")),
    "demo": ("the small built-in model", ("samplers", "pixart.*"), None),
    "benchmarks": ("what the published numbers come from", ("samplers", "pixart.*", "nodes.host", "demo"), None),
    "devtools": ("what dev.py is made of", (), ()),
    "editor.format": ("how a workflow is saved", ("devtools",), ()),
    "editor": (
        "writes workflows and help pages",
        ("samplers", "pixart.*", "demo", "devtools", "editor.format"),
        ("numpy", "PIL"),
    ),
}
# What single modules may import beyond their room's row.
DOORS = {
    "pixart.checkpoint": ("pixart.weights",),  # the public names of a lower floor
    "pixart.styles": ("pixart.files",),
    "pixart.__main__": ("pixart.commands",),
    "pixart.text": ("pixart.files",),
}
# Within the model, each knows only those before it.
LADDER = ("pixart.config", "pixart.layers", "pixart.transformer", "pixart.controlnet")
# Optional libraries of single modules.
OPTIONAL = {
    "samplers.from_diffusers": {"scipy"},
    "editor.screenshots": {"playwright"},
    "pixart.text": {"transformers", "sentencepiece", "ftfy"},
    "pixart.resolution": {"PIL"},
    "pixart.scores.measures": {"torchmetrics", "transformers"},
    "pixart.scores.finding": {"transformers", "torchvision"},
    "pixart.scores.asking": {"transformers"},
    "pixart.weights.quantised.gguf_file": {"gguf"},
    "pixart.weights.quantised.gguf_saving": {"gguf"},
    "pixart.encoders.t5": {"transformers"},
    "pixart.encoders.autoencoder": {"diffusers"},
    "pixart.encoders.consistency_decoder": {"diffusers"},
    "pixart.encoders.captioner": {"transformers", "PIL"},
    "pixart.encoders.chat_process": {"jinja2"},
    "pixart.encoders.edges": {"kornia"},
    "pixart.data.sources": {"datasets"},
    "pixart.data.hugging_face": {"datasets"},
    "pixart.data.streams.places": {"fsspec"},
    "pixart.tracking.hub": {"huggingface_hub"},
    "editor.site_hooks": {"mkdocs"},
    "editor.lettering": {"fontTools"},  # comes with matplotlib
}


def room_of(module: str) -> str:
    """The room of a module: the longest row that it lies in."""
    parts = module.split(".")
    rooms = (".".join(parts[:count]) for count in range(len(parts), 0, -1))
    return next((room for room in rooms if room in ROOMS), "")


def allowed(room: str) -> set[str]:
    """The rooms that a room may import from, itself among them; `pixart.*` stands for the model and all over it."""
    rooms = {room}
    for name in ROOMS[room][1]:
        rooms |= {each for each in ROOMS if f"{each}.".startswith("pixart.")} if name == "pixart.*" else {name}
    return rooms


def arrows() -> list[tuple[str, str]]:
    """The pairs (room, room that it may import from) that the others do not imply: enough for a picture."""
    reach = {room: allowed(room) - {room} for room in ROOMS}
    return [
        (room, target)
        for room, targets in reach.items()
        for target in sorted(targets)
        if not any(target in reach[between] for between in targets - {target})
    ]
