"""What an evaluation writes: scores.json, a sheet of the first pictures, and report.md."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from ..drawing.sheets import labelled_sheet
from ..files.atomic import write_atomically
from .measures import open_picture

SHOWN_PICTURES, SHOWN_PX = 16, 256


def write_report(
    folder: Path,
    title: str,
    settings: dict,
    pictures: Sequence[tuple[Path, str]],
    results: Mapping,
    notes: Sequence[str] = (),
) -> Path:
    """Write scores.json, the first pictures as one sheet, and report.md, whose path is returned.

    results: of `measure`. Rows and means leave out what a scorer did not give. notes: on how it was measured.
    """
    means = {name: mean for name, values in results.items() if not math.isnan(mean := _mean(values))}
    by_picture = {name: values for name, values in results.items() if isinstance(values, list)}
    rows = [
        {"picture": path.name, "prompt": prompt}
        | {name: values[index] for name, values in by_picture.items() if not math.isnan(values[index])}
        for index, (path, prompt) in enumerate(pictures)
    ]
    scores = json.dumps({"means": means, "pictures": rows}, indent=1, ensure_ascii=False)
    write_atomically(folder / "scores.json", lambda file: file.write_text(scores, encoding="utf-8"))
    shown = pictures[:SHOWN_PICTURES]
    cells = [open_picture(path) for path, _ in shown]
    for cell in cells:
        cell.thumbnail((SHOWN_PX, SHOWN_PX))
    sheet = labelled_sheet(cells, [prompt for _, prompt in shown])
    write_atomically(folder / "pictures.png", lambda file: sheet.save(file, "PNG"))
    lines = [
        f"# {title}",
        "",
        f"{len(pictures)} pictures of {len({prompt for _, prompt in pictures})} prompts.",
        "",
        *(["| score | value |", "| --- | --- |"] if means else []),
        *(f"| {name} | {value:.4f} |" for name, value in means.items()),
        *([""] if means else []),
        *(f"- {note}" for note in notes),
        *([""] if notes else []),
        "![The first pictures](pictures.png)",
        "",
        "```json",
        json.dumps(settings, indent=1, sort_keys=True),
        "```",
        "",
    ]
    report = folder / "report.md"
    write_atomically(report, lambda file: file.write_text("\n".join(lines), encoding="utf-8"))
    return report


def _mean(values: Sequence[float] | float) -> float:
    given = [value for value in np.atleast_1d(values) if not math.isnan(value)]
    return float(np.mean(given)) if given else float("nan")
