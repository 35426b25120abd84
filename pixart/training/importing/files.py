"""From the file of another trainer to a configuration of this pack."""

import os
from collections.abc import Mapping
from pathlib import Path

from ...files.documents import load_json
from ...files.regular import read_text
from ...quoting import shorten
from ..settings import RunConfig, settings_from_dict
from . import kohya, onetrainer, simpletuner
from .fields import Imported

MOST_CHARACTERS = 2**20


def import_config(path: str | os.PathLike) -> tuple[RunConfig, list[str]]:
    """(the configuration, what is to be done or was left out, in words). The file tells whose it is.

    Raises FileNotFoundError, and ValueError for a file of no known trainer, and for fields that mean another training.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"Configuration not found: got {shorten(str(path), 300)}, expected OneTrainer's or SimpleTuner's JSON, "
            f"SimpleTuner's config.env, or kohya's TOML. Correct the path."
        )
    whose, found = _read(path)
    settings = settings_from_dict(found.settings)
    run = dict(found.run)
    file = run.pop("file", "")
    if file:
        run |= {"name": Path(file).stem, "output": str(Path(file).parent)}
    lines = [f"read as a configuration of {whose}"]
    model = run.pop("model", "")
    if not model or not Path(model).exists():
        lines.append(f"model: put the path of its file or folder in place of {shorten(model or 'model.safetensors')}")
    lines.append("features: encode the pictures with `python -m pixart encode`, and name the folder")
    if run.get("prompts"):
        lines.append("prompts: name text_encoder and vae, or remove them")
    lines += [*found.notes, *(f"not taken: {each}" for each in found.left)]
    return RunConfig(model or "model.safetensors", "features", settings, **run), lines


def _read(path: Path) -> tuple[str, Imported]:
    if path.suffix == ".toml":
        return "kohya", kohya.read(_parse_toml(read_text(path, MOST_CHARACTERS), path.name))
    if path.suffix == ".env":
        return "SimpleTuner", simpletuner.read(simpletuner.parse_environment(read_text(path, MOST_CHARACTERS)))
    try:
        given = load_json(path)
    except ValueError as error:
        raise ValueError(
            f"Configuration cannot be read: got {shorten(path.name)} ({shorten(error, 200)}), expected JSON, TOML or "
            f"config.env. Correct it."
        ) from error
    if isinstance(given, Mapping):
        names = {name.lstrip("-") for name in given}
        if "training_method" in names:
            return "OneTrainer", onetrainer.read(given)
        if names & {"model_family", "model_type"}:
            return "SimpleTuner", simpletuner.read(given)
    raise ValueError(
        f"Configuration of no known trainer: got {shorten(path.name)}, expected training_method as OneTrainer has it, "
        f"or model_type and model_family as SimpleTuner has them. Choose the file that the program trains with."
    )


def _parse_toml(text: str, name: str) -> dict:
    try:
        import tomllib
    except ImportError as error:  # before Python 3.11
        raise ValueError(
            "TOML cannot be read: got Python below 3.11, expected a newer one. Use that, or write the YAML by hand."
        ) from error
    try:
        return tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise ValueError(
            f"Configuration cannot be read: got {shorten(name)} ({shorten(error, 200)}), expected TOML. Correct it."
        ) from error
