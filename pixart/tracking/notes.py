"""What made a picture, in the forms that programs read from pictures: AUTOMATIC1111's line, and SwarmUI's fields.

An entry is what `describe_workflow` returns, with what else is known: width and height in pixels, and others by words.
"""

import json
from collections.abc import Mapping
from pathlib import PurePosixPath

KEY = "parameters"  # of the text in a PNG, for both forms
FIELDS_KEY = "sui_image_params"  # by which programs know SwarmUI's form
_HASH_LETTERS = 10  # of a SHA-256, as model pages look files up
# What a file is, by the input that names it; those of models that are sampled with come first.
_ROLES = {
    "model": ("checkpoint", "ckpt_name", "unet_name", "model_name", "folder", "dit"),
    "vae": ("vae", "vae_name", "decoder"),
    "controlnetmodel": ("controlnet", "control_net_name"),
    "t5xxlmodel": ("text_encoder", "clip_name", "clip_name1"),
}
# (A1111's word, key of an entry)
_WORDS = (
    ("Steps", "steps"),
    ("Sampler", "solver"),
    ("Schedule type", "schedule"),
    ("CFG scale", "guidance"),
    ("Seed", "seed"),
)
_FIELDS = {
    "prompt": "prompt",
    "negativeprompt": "negative",
    "seed": "seed",
    "steps": "steps",
    "cfgscale": "guidance",
    "width": "width",
    "height": "height",
    "sampler": "solver",
    "comfyuisampler": "solver",
    "scheduler": "schedule",
}


def files_by_role(entry: Mapping) -> dict[str, dict]:
    """The files of an entry that are known by what they do: model, vae, controlnetmodel, t5xxlmodel."""
    found = {}
    for role, inputs in _ROLES.items():
        first = next((each for each in entry.get("models", ()) if each.get("input") in inputs), None)
        if first:
            found[role] = first
    return found


def to_parameters(entry: Mapping, more: Mapping[str, object] | None = None) -> str:
    """The text of a picture's `parameters` as AUTOMATIC1111's web UI writes it, of what is known.

    more: what it has no word for, by own words.
    """
    files, loras = files_by_role(entry), entry.get("loras", ())
    facts = {word: entry[key] for word, key in _WORDS if entry.get(key) is not None}
    if entry.get("width") and entry.get("height"):
        facts["Size"] = f"{entry['width']}x{entry['height']}"
    hashes = {}
    for role, word in (("model", "Model"), ("vae", "VAE")):
        if role in files:
            facts[word] = _stem(files[role]["name"])
            hashes |= _hash_of(role, files[role])
    if entry.get("denoise") not in (None, 1, 1.0):
        facts["Denoising strength"] = entry["denoise"]
    for number, lora in enumerate(loras):
        facts[f"Lora_{number} Model name"] = _stem(lora["name"])
        if lora.get("strength") is not None:
            facts[f"Lora_{number} Strength model"] = lora["strength"]
        hashes |= _hash_of(f"lora:{_stem(lora['name'])}", lora)
    if "model" in hashes:
        facts["Model hash"] = hashes["model"]
    line = ", ".join(f"{word}: {_quote(value)}" for word, value in {**facts, **(more or {})}.items())
    if hashes:
        line += f", Hashes: {json.dumps(hashes, ensure_ascii=False)}"
    negative = [f"Negative prompt: {entry['negative']}"] if entry.get("negative") else []
    return "\n".join([entry.get("prompt") or "", *negative, line])


def to_fields(entry: Mapping) -> dict:
    """The same as SwarmUI's fields, for writers that put JSON into a picture's `parameters`."""
    files, loras = files_by_role(entry), entry.get("loras", ())
    fields = {name: entry[key] for name, key in _FIELDS.items() if entry.get(key) is not None}
    fields = {"prompt": "", "negativeprompt": "", **fields, **{role: _name(each) for role, each in files.items()}}
    if loras:
        strengths = (1 if each.get("strength") is None else each["strength"] for each in loras)
        fields |= {"loras": [_name(each) for each in loras], "loraweights": [_show(each) for each in strengths]}
    models = [{"name": each["name"], "param": role} for role, each in files.items()]
    models += [{"name": each["name"], "param": "loras"} for each in loras]
    return {FIELDS_KEY: fields, "sui_models": models}


def _name(file: Mapping) -> str:
    """A file's name with its folders and without its ending, which is how SwarmUI names models."""
    folder, slash, _ = file["name"].replace("\\", "/").rstrip("/").rpartition("/")
    return f"{folder}{slash}{_stem(file['name'])}"


def _stem(name: str) -> str:
    last = PurePosixPath(name.replace("\\", "/")).name
    return last if name.endswith("/") else PurePosixPath(last).stem


def _hash_of(key: str, file: Mapping) -> dict[str, str]:
    return {key: file["sha256"][:_HASH_LETTERS]} if file.get("sha256") else {}


def _show(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _quote(value: object) -> str:
    text = _show(value)
    return json.dumps(text, ensure_ascii=False) if any(letter in text for letter in ",:\n") else text
