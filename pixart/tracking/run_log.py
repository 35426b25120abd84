"""The log of runs: what made a picture, read off its workflow, in lines of JSON with the pictures beside them."""

import hashlib
import json
import logging
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ..files.atomic import append_line, write_atomically
from ..files.documents import load_json
from .notes import KEY, to_parameters
from .weights_and_biases import OFF, open_run

log = logging.getLogger(__name__)

OWN_KEY = "pixart_run"  # of the whole entry in a picture
LOG, HASHES = "log.jsonl", "hashes.json"
WEIGHT_SUFFIXES = (".safetensors", ".sft", ".pth", ".pt", ".bin", ".ckpt", ".gguf")
TEXT_INPUTS = ("text", "prompt", "caption", "string", "value", "text_g", "t5xxl")
# What a setting is called in nodes, best first.
SETTINGS = {
    "seed": ("seed", "noise_seed"),
    "steps": ("steps",),
    "guidance": ("cfg", "guidance"),
    "solver": ("sampler_name",),
    "schedule": ("scheduler", "schedule"),
    "preset": ("preset",),
    "denoise": ("denoise",),
}
_ELSEWHERE = frozenset({"model", "positive", "negative", "latent_image", "vae", "clip", "conditioning"})
_CHUNK_BYTES = 2**22


def describe_workflow(workflow: dict, node: str, start: str = "images") -> dict:
    """What made the pictures that a node of a workflow (in API format) gets: settings, prompts, files.

    start: the node's input with the pictures. Of several samplers the last counts. What runs decide, such as the seed
    of a loop, is left out. Returns prompt, negative, those of SETTINGS that are found, the size in pixels that is
    sampled at, and models and loras: [{name, node, input}], the latter with strength.
    """
    first = _link(workflow, workflow.get(node, {}).get("inputs", {}).get(start))
    above = list(_upstream(workflow, first))
    sampler = next((number for number in above if "latent_image" in workflow[number]["inputs"]), None)
    entry = {} if sampler is None else _settings(workflow, sampler)
    return {**entry, **_files(workflow, above)}


def _link(workflow: dict, value) -> str | None:
    """The node that an input is linked to, None for values."""
    is_link = isinstance(value, list) and len(value) == 2 and str(value[0]) in workflow
    return str(value[0]) if is_link else None


def _upstream(workflow: dict, start: str | None, without: frozenset = frozenset()) -> Iterator[str]:
    """A node and all that it is made of, nearest first, not going through inputs of some names."""
    waiting, seen = deque([start] if start else []), {start}
    while waiting:
        number = waiting.popleft()
        yield number
        for name, value in workflow[number].get("inputs", {}).items():
            linked = _link(workflow, value)
            if linked and linked not in seen and name not in without:
                seen.add(linked)
                waiting.append(linked)


def _settings(workflow: dict, sampler: str) -> dict:
    near = list(_upstream(workflow, sampler, _ELSEWHERE))
    entry = {}
    for side, names in (("prompt", ("positive", "conditioning")), ("negative", ("negative",))):
        starts = (_link(workflow, workflow[each]["inputs"].get(name)) for each in near for name in names)
        text = _text(workflow, next(filter(None, starts), None))
        if text is not None:
            entry[side] = text
    for key, names in SETTINGS.items():
        values = (_value(workflow, workflow[each]["inputs"].get(name)) for each in near for name in names)
        found = next((value for value in values if value is not None), None)
        if found is not None:
            entry[key] = found
    entry |= _size(workflow, _link(workflow, workflow[sampler]["inputs"]["latent_image"]))
    node = next(filter(None, (_link(workflow, workflow[each]["inputs"].get("sampler")) for each in near)), None)
    if "solver" not in entry and node:
        entry["solver"] = workflow[node]["class_type"]
    return entry


def _size(workflow: dict, latent: str | None) -> dict:
    """Width and height in pixels of an empty latent, where they are its own; nothing of others."""
    inputs = workflow[latent]["inputs"] if latent and workflow[latent]["class_type"].startswith("Empty") else {}
    found = {name: _value(workflow, inputs.get(name)) for name in ("width", "height")}
    return found if all(isinstance(value, int) for value in found.values()) else {}


def _value(workflow: dict, value):
    """A value, or that of the single-valued node which it is linked to; None where the run decides it."""
    linked = _link(workflow, value)
    if linked is None:
        return None if isinstance(value, list | dict) else value
    inputs = workflow[linked].get("inputs", {})
    return inputs.get("value") if set(inputs) == {"value"} and _link(workflow, inputs["value"]) is None else None


def _text(workflow: dict, start: str | None) -> str | None:
    """The nearest text that a conditioning is made of."""
    for number in _upstream(workflow, start, frozenset({"clip", "model", "vae"})):
        inputs = workflow[number].get("inputs", {})
        text = next((inputs[name] for name in TEXT_INPUTS if isinstance(inputs.get(name), str)), None)
        if text is not None:
            return text
    return None


def _files(workflow: dict, nodes: Sequence[str]) -> dict:
    found = {"models": [], "loras": []}
    for number in sorted(nodes, key=lambda each: (len(each), each)):
        kind, inputs = workflow[number]["class_type"], workflow[number].get("inputs", {})
        for name, value in inputs.items():
            if not isinstance(value, str) or not value.endswith((*WEIGHT_SUFFIXES, "/")) or name in TEXT_INPUTS:
                continue
            entry = {"name": value, "node": kind, "input": name}
            if "lora" in name.lower():
                strengths = (_value(workflow, inputs.get(each)) for each in ("strength_model", "strength"))
                entry["strength"] = next((each for each in strengths if each is not None), None)
                found["loras"].append(entry)
            else:
                found["models"].append(entry)
    return found


class Hashes:
    """SHA-256 of model files; each is read once, until its size or time changes. Kept in a file."""

    def __init__(self, path: Path, on_chunk: Callable[[], None] | None = None):
        """on_chunk: called every few megabytes; what it raises ends the reading."""
        self.path, self._on_chunk = path, on_chunk
        try:
            known = load_json(path)
        except (OSError, ValueError):
            known = {}
        self._known = known if isinstance(known, dict) else {}

    def of(self, path: Path) -> str:
        """In hexadecimal; of a folder, that of the hashes of the weights below it, in the order of their names."""
        if path.is_dir():
            files = sorted(file for file in path.rglob("*") if file.suffix in WEIGHT_SUFFIXES)
            return hashlib.sha256("".join(map(self.of, files)).encode()).hexdigest()
        state = path.stat()
        key = f"{path.resolve()}|{state.st_size}|{state.st_mtime_ns}"
        if key not in self._known:
            self._known[key] = self._read(path)
            text = json.dumps(self._known, indent=1)
            write_atomically(self.path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
        return self._known[key]

    def _read(self, path: Path) -> str:
        state = hashlib.sha256()
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                state.update(chunk)
                if self._on_chunk:
                    self._on_chunk()
        return state.hexdigest()


def write_run(folder: Path, entry: dict, pictures: Sequence[Image.Image]) -> dict:
    """Add a run to the log of a folder: its pictures as PNG files, then one line. Returns the whole entry.

    entry: what is known of it. Added are the time, the pictures' names and their size in pixels.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # lines and pictures hold prompts
    now = datetime.now(timezone.utc)
    entry = {"time": now.isoformat(timespec="seconds"), **entry, "width": pictures[0].width}
    entry |= {"height": pictures[0].height, "pictures": []}
    for picture in pictures:
        path = _claim(folder)
        entry["pictures"].append(path.name)
        notes = PngInfo()
        notes.add_itxt(KEY, to_parameters(entry))
        notes.add_itxt(OWN_KEY, json.dumps(entry, ensure_ascii=False))
        try:
            write_atomically(path, lambda file, picture=picture, notes=notes: picture.save(file, "PNG", pnginfo=notes))
        except BaseException:
            path.unlink(missing_ok=True)  # the empty file that holds the name
            raise
    append_line(folder / LOG, json.dumps(entry, ensure_ascii=False))
    return entry


def _claim(folder: Path) -> Path:
    """The next numbered name, taken by an empty file, so that two who write at once do not take one."""
    numbers = (int(path.stem) for path in folder.glob("*.png") if path.stem.isdigit())
    number = max(numbers, default=0) + 1
    while True:
        path = folder / f"{number:05}.png"
        try:
            path.touch(exist_ok=False)
            return path
        except FileExistsError:
            number += 1


_WANDB_RUNS: dict[tuple[str, str], tuple] = {}


def track(folder: Path, entry: dict, mode: str, project: str = "pixart") -> None:
    """Hand a logged run to Weights & Biases: a row of a table with its pictures, and its numbers.

    mode: of WANDB_MODES. offline writes into the folder alone, whatever the environment says; `wandb sync` sends it.
    Raises ImportError without the package, ValueError for online without an account.
    """
    if mode == OFF:
        return
    run, table = _wandb_run(folder, mode, project)
    import wandb

    # Read at once, since wandb's own threads look at the files later.
    pictures = [wandb.Image(str(folder / name)) for name in entry["pictures"]]
    files = {kind: ", ".join(each["name"] for each in entry.get(kind, ())) for kind in ("models", "loras")}
    row = {**entry, **files}
    for picture in pictures:
        table.add_data(picture, *(row.get(column) for column in COLUMNS))
    numbers = {key: entry[key] for key in ("seconds", "seconds_per_step") if entry.get(key) is not None}
    run.log({"runs": table, "pictures": pictures, **numbers})


COLUMNS = (
    *("time", "prompt", "negative", "seed", "solver", "schedule", "steps", "guidance", "width", "height"),
    *("models", "loras", "seconds_per_step", "note"),
)


def _wandb_run(folder: Path, mode: str, project: str) -> tuple:
    """One run of W&B for each folder and mode while this process lives; it is ended when the process is."""
    key = (os.path.realpath(folder), mode)
    if key not in _WANDB_RUNS:
        run = open_run(folder, mode, project, reinit="create_new")
        import wandb

        _WANDB_RUNS[key] = run, wandb.Table(columns=["picture", *COLUMNS], log_mode="INCREMENTAL")
    return _WANDB_RUNS[key]


def close_tracking(folder: Path) -> None:
    """End the runs of W&B that belong to a folder."""
    for key in [key for key in _WANDB_RUNS if key[0] == os.path.realpath(folder)]:
        _WANDB_RUNS.pop(key)[0].finish()
