"""What was done to a model before its training, kept as lines in its file's header."""

import json
from collections.abc import Mapping

STAGES_KEY = "pixart_stages"
_MOST_LINES, _MOST_CHARACTERS = 64, 300


def read_stages(metadata: Mapping[str, str]) -> tuple[str, ...]:
    """The lines that a file's header keeps, the first stage first; none where there are none that can be read."""
    try:
        lines = json.loads(metadata.get(STAGES_KEY, "[]"))
    except (ValueError, RecursionError):
        return ()
    known = lines if isinstance(lines, list) else []
    return tuple(line[:_MOST_CHARACTERS] for line in known[-_MOST_LINES:] if isinstance(line, str))


def with_stage(metadata: Mapping[str, str], line: str) -> dict[str, str]:
    """The header's texts with one more line."""
    return {**metadata, STAGES_KEY: json.dumps([*read_stages(metadata), line])}


def only_stages(metadata: Mapping[str, str]) -> dict[str, str]:
    """Of a header's texts those of the stages, which a training's result keeps."""
    return {STAGES_KEY: json.dumps(read_stages(metadata))} if read_stages(metadata) else {}
