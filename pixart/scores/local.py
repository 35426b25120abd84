"""Models of transformers from a folder on this machine: no download, no pickled program, no code of the folder's."""

from pathlib import Path

from ..files.inside import check_folder
from ..quoting import plain, shorten
from ..weights.folders import TEXT_ENCODER_STEMS, find_weights
from ..weights.reading import read_tensors

# What torch, safetensors and transformers raise for files of another kind.
LOAD_ERRORS = (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, EOFError)


def first_line(error: Exception) -> str:
    return shorten(Exception((str(error).splitlines() or [type(error).__name__])[0]), 200)


def load_model(folder: Path, model_class: type, config_class: type):
    """A model of transformers in eval mode. Raises one of LOAD_ERRORS for other files or weights that are missing."""
    check_folder(folder)
    files, _ = find_weights(folder, TEXT_ENCODER_STEMS)
    if all(file.suffix == ".safetensors" for file in files):
        source, options = folder, {"local_files_only": True, "use_safetensors": True}
    else:  # read here, so that transformers reads no pickles
        config = config_class.from_pretrained(folder, local_files_only=True)
        source, options = None, {"config": config, "state_dict": read_tensors(folder, TEXT_ENCODER_STEMS)[0]}
    model, found = model_class.from_pretrained(source, output_loading_info=True, **options)
    if found["missing_keys"]:
        raise ValueError(f"{len(found['missing_keys'])} weights too few")
    return model.eval()


def load_processor(folder: Path, processor_class: type):
    """What turns pictures and texts into a model's inputs. Raises as `load_model`."""
    return processor_class.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def refusal(kind: str, folder: Path, error: Exception, remedy: str) -> ValueError:
    """The error for a folder that holds something else than a model of this kind."""
    return ValueError(
        f"Not {kind}: got {shorten(str(folder), 300)} ({plain(first_line(error), 200)}), expected a folder with its "
        f"weights, tokenizer and preprocessor, as transformers saves them. {remedy}"
    )
