"""Room on disks: how much there is, and what to say when it is not enough."""

import shutil
from pathlib import Path

from ..quoting import shorten


def free_bytes(place: Path) -> int:
    """Of the disk where something is or will be."""
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def describe_room(place: Path, needed_bytes: int) -> str:
    """What is needed, free and missing for a new file at a place, in a few words."""
    try:
        free = free_bytes(place)
    except OSError:
        return f"{needed_bytes / 1e6:.1f} MB are needed in {shorten(str(place.parent), 300)}"
    missing = max(needed_bytes - free, 0)
    told = f"{missing / 1e6:.1f} MB are missing" if missing else "the disk takes no more all the same"
    where = shorten(str(place.parent), 300)
    return f"{needed_bytes / 1e6:.1f} MB are needed in {where}, {free / 1e6:.1f} MB are free: {told}"
