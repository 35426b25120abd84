"""Scores that are kept as they are made, so that a measuring that was interrupted goes on where it was."""

import json
from collections.abc import Mapping
from pathlib import Path

from ..files.documents import parse_json


class KeptScores:
    """A file with a line for each picture. Those of other settings, or of a picture that changed, do not count."""

    def __init__(self, path: Path, settings: Mapping):
        """settings: what decides the scores beside the picture; what JSON can hold."""
        self.path, self.rows = path, {}
        head = json.dumps(settings, sort_keys=True)
        lines = path.read_text(encoding="utf-8").split("\n") if path.is_file() else []
        if not lines or lines[0] != head:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(head + "\n", encoding="utf-8")
            return
        for line in lines[1:]:
            try:
                name, stamp, scores = parse_json(line)
            except ValueError:  # the last line of a process that was killed
                continue
            self.rows[name] = stamp, scores

    def get(self, picture: Path) -> dict[str, float] | None:
        stamp, scores = self.rows.get(picture.as_posix(), (None, None))
        return scores if stamp == _stamp(picture) else None

    def add(self, picture: Path, scores: Mapping[str, float]) -> None:
        self.rows[picture.as_posix()] = _stamp(picture), dict(scores)
        row = json.dumps([picture.as_posix(), _stamp(picture), scores])
        with self.path.open("a", encoding="utf-8") as file:
            file.write(f"\n{row}")  # on a line of its own, also behind one that was cut


def _stamp(picture: Path) -> list[int]:
    status = picture.stat()
    return [status.st_size, status.st_mtime_ns]
