"""T5 text encoders as the host's CLIP: finds the files and loads them."""

import functools
import re
from pathlib import Path
from types import SimpleNamespace

import comfy.sd
import comfy.sd1_clip
import comfy.text_encoders.pixart_t5
import comfy.text_encoders.sd3_clip
import comfy.text_encoders.spiece_tokenizer
import comfy.utils
import folder_paths
import torch
from transformers import T5TokenizerFast

from ....pixart.files.documents import parse_json
from ....pixart.quoting import plain, shorten
from ....pixart.weights.folders import read_json
from ....pixart.weights.quantised.forms import COMFY_MARK
from ....pixart.weights.quantised.packed import Packed
from ....pixart.weights.t5 import detect_t5_config, encoder_weights, is_t5_folder, plain_weights, read_encoder_tensors
from ..folders import find_folders, list_files, names_of
from ..weights.packed import PackedOperations, is_packed, name_kinds
from ..weights.patcher import know_packed_weights

AUTO, BUILT_IN = "auto", "built-in"
DEVICES = ("default", "cpu")
T5_KIND = "t5"  # models/t5, where ComfyUI_ExtraModels has its encoders
FILE_KINDS = ("text_encoders", T5_KIND)
FOLDER_KINDS = (*FILE_KINDS, "diffusers")
T5_NAME = "t5xxl"  # the host's name for a T5 of any size: the name of its tokens and LoRA keys
T5_METADATA = "t5_config"
_SHARD = re.compile(r"-(\d{5})-of-\d{5}\.")
_VOCABULARY_SLACK = 256  # rows without a token: T5 has 32128 for 32100, or for the 32000 of its spiece.model


def register_t5_folder() -> None:
    """Let files in models/t5 be found, as ComfyUI_ExtraModels does."""
    place = str(Path(folder_paths.models_dir, T5_KIND))
    extensions = folder_paths.supported_pt_extensions
    folder_paths.folder_names_and_paths.setdefault(T5_KIND, ([place], extensions))


def list_text_encoders() -> list[str]:
    """What Load T5 Text Encoder offers: files by their names, folders with a slash at the end.

    Shards are offered by their folder; those that lie in no folder of their own, by the first of them.
    """
    files = [name for name in list_files(FILE_KINDS) if not (shard := _SHARD.search(name)) or _leads(name, shard)]
    return [*files, *find_folders(FOLDER_KINDS, is_t5_folder)]


def _leads(name: str, shard: re.Match) -> bool:
    return int(shard[1]) == 1 and not re.search(r"[\\/]", name)


def list_tokenizers() -> list[str]:
    """`auto`, the host's own, and all folders with a T5 tokenizer."""
    return [AUTO, BUILT_IN, *find_folders(FOLDER_KINDS, _is_tokenizer_folder)]


def find_text_encoder(name: str) -> Path:
    """The path of one of list_text_encoders. Raises FileNotFoundError."""
    path = find_folders(FOLDER_KINDS, is_t5_folder).get(name)
    for kind in FILE_KINDS:
        if path is None and name in names_of(kind):
            path = folder_paths.get_full_path(kind, name)
    if path is not None and _SHARD.search(name) and Path(path).is_file():
        path = Path(path).parent
    if path is None:
        raise FileNotFoundError(
            f"Text encoder not found: got {shorten(name)}, expected a file or folder in models/text_encoders, "
            f"models/clip or models/diffusers. Press R to refresh the lists, and choose another one."
        )
    return Path(path)


def find_tokenizer(choice: str, encoder: Path) -> Path | None:
    """The folder of one of list_tokenizers, None for the host's own. `auto`: one that lies with the encoder's folder.

    Raises FileNotFoundError.
    """
    if choice == AUTO:
        near = (encoder, encoder.parent / "tokenizer") if encoder.is_dir() else ()
        return next((folder for folder in near if _is_tokenizer_folder(folder)), None)
    if choice == BUILT_IN:
        return None
    folder = find_folders(FOLDER_KINDS, _is_tokenizer_folder).get(choice)
    if folder is None:
        raise FileNotFoundError(
            f"Tokenizer not found: got {shorten(choice)}, expected a folder with spiece.model or tokenizer.json. "
            f"Press R to refresh the lists, or choose {BUILT_IN}."
        )
    return folder


def _is_tokenizer_folder(folder: Path) -> bool:
    if (folder / "spiece.model").is_file():
        return True
    if not (folder / "tokenizer.json").is_file():
        return False
    try:
        config = read_json(folder / "tokenizer_config.json")
    except (OSError, ValueError):
        return False
    return str(config.get("tokenizer_class")).startswith("T5")


def load_t5(
    path: Path, tokenizer: Path | None = None, device: str = "default", disable_dynamic: bool = False
) -> comfy.sd.CLIP:
    """Load a T5 v1.1 encoder of any size as the host's PixArt CLIP.

    path: a file, or a folder with one file or shards. tokenizer: a folder, None for the host's own.
    device: one of DEVICES. disable_dynamic: passed on to the host.
    Raises FileNotFoundError for missing shards and ValueError for other files; both name the file.
    """
    path = Path(path)
    weights, config, remark = _read_t5(path)
    tokens = _make_tokenizer(tokenizer, config, path.name)
    quantised = comfy.text_encoders.sd3_clip.t5_xxl_detect(weights)
    target = SimpleNamespace(
        params={}, clip=comfy.text_encoders.pixart_t5.pixart_te(**quantised), tokenizer=lambda **_: tokens
    )
    options = {f"{T5_NAME}_model_config": config}
    packed = is_packed(weights)
    if packed:
        options["custom_operations"], options["initial_device"] = PackedOperations, torch.device("cpu")
    if device == "cpu":
        options["load_device"] = options["offload_device"] = torch.device("cpu")
    try:
        clip = comfy.sd.CLIP(
            target,
            parameters=comfy.utils.calculate_parameters(weights),
            state_dict=[weights],
            model_options=options,
            disable_dynamic=disable_dynamic or packed,  # which casts layers by itself
        )
    except RuntimeError as error:
        if "size mismatch" not in str(error):
            raise
        raise ValueError(
            f"Text encoder cannot be loaded: got {plain(str(error).splitlines()[-1].strip(), 200)} in "
            f"{path.name}, expected a T5 v1.1 encoder. Download the file again."
        ) from error
    clip.pixart_remark = remark
    if packed:
        know_packed_weights(clip.patcher)
    clip.patcher.cached_patcher_init = (_load_patcher, (path, tokenizer, device))
    return clip


def take_t5(clip: comfy.sd.CLIP) -> comfy.sd.CLIP:
    """The T5 of a CLIP that holds several encoders, as one that has it alone; its weights are shared.

    Raises ValueError when there is none.
    """
    t5 = getattr(clip.cond_stage_model, T5_NAME, None)
    if t5 is None:
        raise ValueError(
            f"No T5 in this CLIP: got {type(clip.cond_stage_model).__name__}, expected one with {T5_NAME}. "
            f"Load a T5 v1.1 XXL with Load T5 Text Encoder."
        )
    table = t5.transformer.get_input_embeddings()
    rows, width = table.num_embeddings, table.embedding_dim
    alone = clip.clone()
    alone.tokenizer = _make_tokenizer(None, {"d_model": width, "vocab_size": rows}, "this CLIP")
    alone.cond_stage_model = comfy.sd1_clip.SD1ClipModel(clip_name=T5_NAME, name=T5_NAME, clip_model=lambda **_: t5)
    return alone


def _load_patcher(path, tokenizer, device, disable_dynamic=False):
    """What the host calls to load the same weights once more, for another device or without dynamic memory."""
    return load_t5(path, tokenizer, device, disable_dynamic).patcher


def remark_on(clip: comfy.sd.CLIP) -> str:
    """What whoever loaded a CLIP should know about its file; "" when there is nothing."""
    return getattr(clip, "pixart_remark", "")


def _read_t5(path: Path) -> tuple[dict[str, torch.Tensor], dict, str]:
    """(weights under their Hugging Face names with the host's quantisation marks, T5 config, a remark on them)."""
    state_dict, metadata = read_encoder_tensors(path)
    if hasattr(comfy.utils, "convert_old_quants"):
        state_dict, metadata = comfy.utils.convert_old_quants(state_dict, model_prefix="", metadata=metadata)
    stored = encoder_weights(state_dict, path.name)
    weights = plain_weights(stored, path, metadata, keep_comfy=True, keep_packed=True)
    config = detect_t5_config(weights, path.name, _declared_config(path, metadata))
    return weights, config, _remark(stored, weights)


def _remark(stored: dict, weights: dict) -> str:
    """How quantised weights lie in memory, and how much of it they take."""
    size = _show_size(sum(weight.nbytes for weight in weights.values()))
    kinds = name_kinds(weight.packing for weight in weights.values() if isinstance(weight, Packed))
    if kinds:
        return f"The weights stay packed ({kinds}): {size} in memory."
    before = sum(weight.nbytes for weight in stored.values())
    if stored.keys() == weights.keys() or any(name.endswith(COMFY_MARK) for name in stored):
        return ""
    return f"The quantised weights are expanded: {size} in memory, out of {_show_size(before)}."


def _show_size(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count > 2**29 else f"{count / 2**20:.1f} MiB"


def _declared_config(path: Path, metadata: dict[str, str]) -> dict:
    if (path / "config.json").is_file():
        return read_json(path / "config.json")
    try:
        config = parse_json(metadata.get(T5_METADATA, "{}"))
    except ValueError as error:
        raise ValueError(
            f"Damaged metadata: got {T5_METADATA} that is no JSON in {path.name}. Save it again."
        ) from error
    return config if isinstance(config, dict) else {}


def _make_tokenizer(folder: Path | None, config: dict, name: str) -> comfy.sd1_clip.SD1Tokenizer:
    """The host's tokenizer for prompts (weights, embeddings) over T5's; a None folder is the host's own vocabulary.

    Raises ValueError when the encoder has not the same vocabulary.
    """
    folder = folder or Path(comfy.text_encoders.pixart_t5.__file__).parent / "t5_tokenizer"
    piece = folder / "spiece.model"
    is_piece = piece.is_file()
    kind = functools.partial(
        comfy.sd1_clip.SDTokenizer,
        str(piece if is_piece else folder),
        tokenizer_class=comfy.text_encoders.spiece_tokenizer.SPieceTokenizer if is_piece else T5TokenizerFast,
        embedding_size=config["d_model"],
        embedding_key=T5_NAME,
        has_start_token=False,
        pad_with_end=False,
        pad_to_max_length=False,
        max_length=99999999,  # the caption is cut by the text node, which says so
        min_length=1,
    )
    embeddings = folder_paths.get_folder_paths("embeddings")
    tokenizer = comfy.sd1_clip.SD1Tokenizer(embedding_directory=embeddings, clip_name=T5_NAME, tokenizer=kind)
    pieces = 1 + max(getattr(tokenizer, tokenizer.clip).inv_vocab)
    if not pieces <= config["vocab_size"] < pieces + _VOCABULARY_SLACK:
        raise ValueError(
            f"Vocabulary mismatch: got {config['vocab_size']} rows in {name}, expected about {pieces} as in the "
            f"tokenizer {folder.name}. Choose a T5 v1.1 encoder, or the tokenizer that belongs to this one."
        )
    return tokenizer
