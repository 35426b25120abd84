"""Logging runs in the host: when and how long it sampled, where its files are, its output folder."""

import time
from pathlib import Path

import comfy.model_management
import comfy.patcher_extension
import comfy.samplers
import folder_paths
import torch

from ...pixart.tracking.run_log import HASHES, Hashes, describe_workflow, track, write_run
from ...pixart.tracking.weights_and_biases import OFF, check_tracking, describe_mode
from .folders import is_inner, output_folder, show_path
from .pictures import to_pil
from .server.users import own_output

_WRAPPER = comfy.patcher_extension.WrappersMP.OUTER_SAMPLE
_KEY = "pixart_run_timer"
_KIND_OF_INPUT = (("lora", "loras"), ("vae", "vae"), ("decoder", "vae"), ("text_encoder", "text_encoders"),
                  ("clip", "text_encoders"), ("t5", "text_encoders"), ("control", "controlnet"))  # fmt: skip


class Timer:
    """What was sampled with a model, a run after the other: seconds, steps, seed and guidance as they were."""

    def __init__(self):
        self.runs: list[dict] = []

    def take(self, count: int) -> list[dict]:
        """What was sampled since the last call, for each of `count` results that the host made by one graph.

        The host goes through all results at each sampler before it goes on to the next. A result that it had kept has
        no times: then all are empty.
        """
        runs, self.runs = self.runs, []
        if not runs or len(runs) % count:
            return [{} for _ in range(count)]
        return [_sum_up(runs[index::count]) for index in range(count)]


def _sum_up(runs: list[dict]) -> dict:
    seconds = sum(run["seconds"] for run in runs)
    per_step = seconds / sum(run["steps"] for run in runs)
    return {**runs[-1], "seconds": round(seconds, 3), "seconds_per_step": round(per_step, 4)}


def time_model(model) -> tuple:
    """(the MODEL with a timer, the timer)."""
    timer, timed = Timer(), model.clone()

    def measure(executor, noise, latent_image, sampler, sigmas, *args, **kwargs):
        start = time.perf_counter()
        result = executor(noise, latent_image, sampler, sigmas, *args, **kwargs)
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # the host returns before the device is done
        seconds, steps = time.perf_counter() - start, max(1, len(sigmas) - 1)
        seed = kwargs.get("seed", args[3] if len(args) > 3 else None)
        run = {"seed": seed, "steps": steps, "guidance": getattr(executor.class_obj, "cfg", None)}
        timer.runs.append({key: value for key, value in {**run, "seconds": seconds}.items() if value is not None})
        return result

    timed.remove_wrappers_with_key(_WRAPPER, _KEY)
    timed.add_wrapper_with_key(_WRAPPER, _KEY, measure)
    return timed, timer


def log_runs(
    images: list[torch.Tensor], folder_name: str, hidden, given: dict, timer: Timer | None, mode: str, hashes: bool
) -> tuple[list[dict], dict]:
    """Write runs into the log of an output folder: IMAGEs, a run each. Returns (entries, what the editor shows).

    hidden: the node's, with the workflow. given: lists of what overrules what is read off it; of one for each run or
    one for all, empty for nothing.
    Raises ValueError for a name that leads out of the output folder, or a mode that cannot work.
    """
    folder = output_folder(folder_name, own_output())
    check_tracking(mode)
    workflow, node = getattr(hidden, "prompt", None) or {}, str(getattr(hidden, "unique_id", None))
    known = describe_workflow(workflow, node)
    if hashes:
        _add_hashes(known, Hashes(folder / HASHES, comfy.model_management.throw_exception_if_processing_interrupted))
    times = timer.take(len(images)) if timer else [{}] * len(images)
    entries = []
    for index, image in enumerate(images):
        own = {key: texts[index if len(texts) == len(images) else 0] for key, texts in given.items() if texts}
        own = {key: text for key, text in own.items() if text}
        entries.append(write_run(folder, {**known, **times[index], **own}, to_pil(image)))
        track(folder, entries[-1], mode)
    names = [name for entry in entries for name in entry["pictures"]]
    place = show_path(folder)
    subfolder = place.removeprefix("output/")
    shown = {"images": [{"filename": each, "subfolder": subfolder, "type": "output"} for each in names]}
    if mode != OFF:
        shown["text"] = [describe_mode(mode, f"{place}/wandb")]
    return entries, shown


def _add_hashes(entry: dict, hashes: Hashes) -> None:
    for file in [*entry.get("models", ()), *entry.get("loras", ())]:
        path = _find(file["name"], file["input"])
        file["sha256"] = None if path is None else hashes.of(path)


def _find(name: str, input_name: str) -> Path | None:
    """The file or folder that a loader calls so; folders that its input speaks of are searched first."""
    if not is_inner(name):
        return None
    likely = [kind for word, kind in _KIND_OF_INPUT if word in input_name.lower()]
    for kind in dict.fromkeys([*likely, *folder_paths.folder_names_and_paths]):
        if kind not in folder_paths.folder_names_and_paths or kind == "custom_nodes":
            continue
        for root in folder_paths.get_folder_paths(kind):
            path = Path(root, name)
            if path.exists():
                return path
    return None
