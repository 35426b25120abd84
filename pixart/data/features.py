"""Encoded datasets on disk, of whichever layout."""

from pathlib import Path

from .cache import open_cached
from .examples import FeatureSet
from .original_features import find_original_features, is_original
from .pairs import PAIRS, open_pairs


def open_features(path: str | Path) -> FeatureSet:
    """The encoded dataset at path: the list or folder of a cache, the root of features in PixArt-alpha's layout, or a
    folder of pairs.

    Raises FileNotFoundError and ValueError as open_cached and find_original_features do.
    """
    path = Path(path)
    if (path / PAIRS).is_file():
        return open_pairs(path)
    return find_original_features(path) if path.is_dir() and is_original(path) else open_cached(path)
