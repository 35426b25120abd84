"""Puts a result onto the Hugging Face Hub; nothing else of this pack does, and this only where it is asked to."""

import re
from pathlib import Path

from ..quoting import plain, shorten

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}")


def check_repository(name: str) -> None:
    """Raises ValueError for what is no name of a repository, and where the package is missing."""
    if not _NAME.fullmatch(name):
        raise ValueError(
            f"Not a repository: got {shorten(name)}, expected owner/name as on the Hugging Face Hub. Correct it."
        )
    try:
        import huggingface_hub  # noqa: F401
    except ImportError as error:
        raise ValueError(
            "huggingface_hub is not installed: got none, expected it for --upload. Install it with pip install "
            "huggingface_hub, or train without --upload."
        ) from error


def upload(file: Path, repository: str) -> str:
    """Put a file into a repository, which is made, private, where there is none; returns its address.

    The account is that of huggingface_hub's own login. Raises ValueError where that fails; the file stays.
    """
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        api.create_repo(repository, private=True, exist_ok=True)
        commit = api.upload_file(path_or_fileobj=str(file), path_in_repo=file.name, repo_id=repository)
    except Exception as error:  # of the network, the account or the library, none of which may cost the result
        raise ValueError(
            f"Upload failed: got {plain(str(error), 300)}, expected {shorten(repository)} to take the file. It is kept "
            f"here: {plain(str(file), 300)}. Log in with `hf auth login`, and upload it by hand."
        ) from error
    return str(commit)
