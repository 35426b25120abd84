"""Finds the weights of a diffusers or transformers folder: one file, or shards with or without their index."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from ..files.documents import parse_json
from ..files.inside import check_inside, is_plain_name
from ..files.regular import CONFIG_BYTES, read_bytes
from ..quoting import list_names, shorten

TRANSFORMER_STEMS = ("diffusion_pytorch_model",)
TEXT_ENCODER_STEMS = ("model", "pytorch_model")
TRANSFORMER_CLASSES = ("Transformer2DModel", "PixArtTransformer2DModel")
_SUFFIXES = (".safetensors", ".bin")
# The variant stands before the number or after it, by the age of the library that wrote the file.
_SHARD = re.compile(
    r"(?P<stem>[^.]+)(?P<early>\.\w+)?-(?P<index>[0-9]{5})-of-(?P<count>[0-9]{5})(?P<late>\.\w+)?"
    r"(?P<suffix>\.safetensors|\.bin)"
)
_OTHER_FOLDERS = {
    "adapter_config.json": "a LoRA folder. Load its base model here, and the folder with Load PixArt LoRA.",
    "scheduler_config.json": "a scheduler folder. Choose the folder above it.",
    "spiece.model": "a tokenizer folder. Choose the folder above it.",
}


@dataclass(frozen=True)
class ModelFolder:
    """A transformer in diffusers' folder form.

    files: its weights, one file or all shards. model_config, vae_config: contents of the config.json of transformer
    and autoencoder, None where there is none. weight_map: tensor -> shard as the index says, empty without one.
    pipeline: the class that the root's model_index.json names, "" without one. scheduler_config: of the root, or None.
    """

    path: Path
    files: tuple[Path, ...]
    model_config: dict | None = None
    vae_config: dict | None = None
    weight_map: dict[str, str] = field(default_factory=dict)
    pipeline: str = ""
    scheduler_config: dict | None = None

    @property
    def remarks(self) -> tuple[str, ...]:
        """What config.json asks for and this package does not do, in words."""
        asked = {"activation_fn": "gelu-approximate", "norm_eps": 1e-6}
        config = self.model_config or {}
        return tuple(
            f"config.json asks for {name} {shorten(config[name])}; {own} is used"
            for name, own in asked.items()
            if config.get(name) not in (None, own)
        )


def open_folder(path: Path, variant: str | None = None) -> ModelFolder:
    """Find the transformer in a pipeline's root or in the transformer's own folder.

    variant: "fp16" and the like asks for `...fp16.safetensors`; None takes the plain file, or else the only variant.
    Raises FileNotFoundError when there is no folder or a shard is missing, ValueError for a folder of another kind.
    """
    path = Path(path)
    if not path.is_dir():
        raise FileNotFoundError(
            f"Folder not found: got {shorten(str(path), 300)}, expected a diffusers folder. Choose another one."
        )
    inner = path / "transformer"
    folder = inner if inner.is_dir() else path
    root = folder.parent if folder.name == "transformer" else folder
    if folder == path and (path / "model_index.json").is_file():
        kind = read_json(path / "model_index.json").get("_class_name")
        raise ValueError(
            f"Not a PixArt folder: got a {kind} without a transformer in {shorten(path.name)}, expected a PixArt "
            f"pipeline. Choose the folder of a PixArt-alpha or PixArt-Sigma model."
        )
    _refuse_other_models(folder)
    return _describe(path, folder, root, *find_weights(folder, TRANSFORMER_STEMS, variant))


def open_beside(path: Path) -> ModelFolder:
    """A file with what lies around it: of a diffusers folder its configurations, and for a shard all the others."""
    folder = path.parent
    shard = _SHARD.fullmatch(path.name)
    is_own = path.name.startswith(TRANSFORMER_STEMS) and path.name.endswith(_SUFFIXES)
    if not is_own or not (shard or (folder / "config.json").is_file()):
        return ModelFolder(path, (path,))
    if (folder / "config.json").is_file():
        _refuse_other_models(folder)
    files, weight_map = (path,), {}
    if shard:
        files, weight_map = find_weights(
            folder, TRANSFORMER_STEMS, (shard["early"] or shard["late"] or ".")[1:] or None
        )
    return _describe(path, folder, folder.parent if folder.name == "transformer" else folder, files, weight_map)


def _describe(path: Path, folder: Path, root: Path, files: tuple[Path, ...], weight_map: dict) -> ModelFolder:
    """A model with the configurations of its folder and of the pipeline's root."""

    def config(name: str) -> dict | None:
        return read_json(root / name) if (root / name).is_file() else None

    model_config = folder / "config.json"
    return ModelFolder(
        path,
        files,
        read_json(model_config) if model_config.is_file() else None,
        config("vae/config.json"),
        weight_map,
        str((config("model_index.json") or {}).get("_class_name", "")),
        config("scheduler/scheduler_config.json"),
    )


def find_weights(
    folder: Path, stems: Iterable[str], variant: str | None = None
) -> tuple[tuple[Path, ...], dict[str, str]]:
    """(files, weight_map) of the model in a folder: an index with its shards, a single file, or complete shards.

    stems: accepted file names without suffix, best first; safetensors are preferred over .bin.
    Raises FileNotFoundError naming what is missing, ValueError when the folder leaves open what to take, and for a
    name or a link that leads out of the folder.
    """
    files, weight_map = _find(folder, tuple(stems), variant)
    return tuple(check_inside(file, folder) for file in files), weight_map


def _find(folder: Path, stems: tuple[str, ...], variant: str | None) -> tuple[tuple[Path, ...], dict[str, str]]:
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_file())
    for suffix in _SUFFIXES:
        for stem in stems:
            for infix in _infixes(names, stem, suffix, variant):
                index = folder / f"{stem}{suffix}.index{infix}.json"
                if index.is_file():
                    return indexed_files(index)
                single = folder / f"{stem}{infix}{suffix}"
                if single.is_file():
                    return (single,), {}
    shards = _shards_without_index(folder, names, variant)
    if shards:
        return shards, {}
    others = [name for name in names if name.endswith(_SUFFIXES)]
    if len(others) == 1 and variant is None and not _SHARD.fullmatch(others[0]):
        return (folder / others[0],), {}
    wanted = f"'{stems[0]}{f'.{variant}' if variant else ''}.safetensors'"
    raise FileNotFoundError(
        f"No weights in folder {shorten(folder.name)}: got {list_names(others) or 'no model file'}, expected {wanted} "
        f"or an index of shards. Choose a folder with a complete model, or download the missing file."
    )


def read_json(path: Path) -> dict:
    """A JSON object from a file of a model's folder.

    Raises ValueError naming the file when it holds something else, is no regular file, is larger than 16 MB, or is a
    link that leads out of the folder.
    """
    data = read_bytes(check_inside(path, path.parent), CONFIG_BYTES)
    try:
        content = parse_json(data.decode("utf-8-sig"))
    except ValueError as error:
        raise ValueError(
            f"Unreadable {shorten(path.name)}: got no JSON ({shorten(error)}), expected a configuration. Download "
            f"{shorten(str(path), 300)} again."
        ) from error
    if not isinstance(content, dict):
        raise ValueError(
            f"Unreadable {shorten(path.name)}: got a {type(content).__name__}, expected a JSON object. Download "
            f"{shorten(str(path), 300)} again."
        )
    return content


def _refuse_other_models(folder: Path) -> None:
    for name, kind in _OTHER_FOLDERS.items():
        if (folder / name).is_file():
            raise ValueError(f"Not a PixArt folder: got {shorten(folder.name)}, {kind}")
    config = folder / "config.json"
    if not config.is_file():
        return
    content = read_json(config)
    architectures = content.get("architectures")
    kind = content.get("_class_name") or (
        architectures[0] if isinstance(architectures, list) and architectures else None
    )
    if kind is not None and kind not in TRANSFORMER_CLASSES:
        raise ValueError(
            f"Not a PixArt folder: got a {kind} in {shorten(folder.name)}, expected "
            f"{' or '.join(TRANSFORMER_CLASSES)}. Choose the folder of a PixArt-alpha or PixArt-Sigma model."
        )


def _infixes(names: list[str], stem: str, suffix: str, variant: str | None) -> list[str]:
    """The variants to try, as ".fp16": the asked one, or the plain file first and then those that lie there."""
    if variant is not None:
        return [f".{variant}"]
    start, end = re.escape(stem), re.escape(suffix)
    pattern = re.compile(rf"{start}(?:(\.\w+)?{end}|{end}\.index(\.\w+)?\.json)")
    return sorted({match[1] or match[2] or "" for match in map(pattern.fullmatch, names) if match})


def indexed_files(index: Path) -> tuple[tuple[Path, ...], dict[str, str]]:
    """(shards, weight_map) of an index. Raises ValueError for names that lead out, FileNotFoundError for a lost one."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(
            f"Unreadable {shorten(index.name)}: got no weight_map, expected an index of shards. Download it again."
        )
    shards = sorted({_plain_name(index, name) for name in weight_map.values()})
    for shard in shards:
        if not (index.parent / shard).is_file():
            raise FileNotFoundError(
                f"A shard is missing: got no {shorten(shard)}, expected all {len(shards)} files of "
                f"{shorten(index.name)}. Download it into {shorten(index.parent.name)}."
            )
    return tuple(index.parent / shard for shard in shards), weight_map


def _plain_name(index: Path, name: object) -> str:
    """A shard's name that cannot lead out of the folder."""
    if not is_plain_name(name) or not name.endswith(_SUFFIXES):
        raise ValueError(
            f"Unsafe index {shorten(index.name)}: got the shard name {shorten(name)}, expected a file of the same "
            f"folder. Download the model from a source that you trust."
        )
    return name


def _shards_without_index(folder: Path, names: list[str], variant: str | None) -> tuple[Path, ...]:
    """Shards that their own names show to be complete, `...-00001-of-00002...`; empty when there are none."""
    sets: dict[tuple, dict[int, str]] = {}
    for match in filter(None, map(_SHARD.fullmatch, names)):
        infix = match["early"] or match["late"] or ""
        if variant is None or infix == f".{variant}":
            key = (infix, _SUFFIXES.index(match["suffix"]), match["stem"], int(match["count"]))
            sets.setdefault(key, {})[int(match["index"])] = match[0]
    best = [key for key in sets if key[:2] == min(sets)[:2]]  # the plain set before a variant, safetensors before .bin
    if len(best) > 1:
        samples = ", ".join(sorted(sets[key][min(sets[key])] for key in best))
        raise ValueError(
            f"Several sets of shards in {shorten(folder.name)}: got {samples}, expected one set or an index. Choose a "
            f"folder with one model."
        )
    if not best:
        return ()
    shards, count = sets[best[0]], best[0][3]
    missing = sorted(set(range(1, count + 1)) - set(shards))
    if missing or len(shards) != count:
        raise FileNotFoundError(
            f"A shard is missing: got {len(shards)} of {count} like {shorten(shards[min(shards)])}, expected number "
            f"{missing[0] if missing else count} as well. Download it into {shorten(folder.name)}."
        )
    return tuple(folder / shards[number] for number in sorted(shards))
