"""Tables and plots of benchmark results."""

import json
from pathlib import Path

from matplotlib.figure import Figure

RESULTS = Path(__file__).parent / "results"
# Strong on white, and told apart by the colour-blind. Source: Okabe and Ito, "Color universal design", without yellow.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000", "#8b5a2b")
MARKERS = ("o", "s", "^", "D", "x")


def markdown_table(head, rows):
    """A Markdown table. head: cells. rows: lists of as many cells; all are turned into text."""
    lines = ["| " + " | ".join(map(str, cells)) + " |" for cells in [head, ["---"] * len(head), *rows]]
    return "\n".join(lines) + "\n"


def describe_ratio(found, digits=2):
    """`timing.compare` as a cell: the median, and the least and the greatest; "not run" for None."""
    if found is None:
        return "not run"
    return f"{found['ratio']:.{digits}f} ({found['least']:.{digits}f} to {found['greatest']:.{digits}f})"


def keep_runs(path, runs):
    """Put runs into a JSON file of results, each in the place of one with the same "case". Returns all that are there.

    runs: dicts with a "case", which says everything that a result depends on.
    """
    kept = json.loads(path.read_text(encoding="utf-8"))["runs"] if path.is_file() else []
    for run in runs:
        old = [index for index, other in enumerate(kept) if other["case"] == run["case"]]
        if old:
            kept[old[0]] = run
        else:
            kept.append(run)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"runs": kept}, indent=1) + "\n", encoding="utf-8")
    return kept


def save_plot(path, curves, title, x_label, y_label, logarithmic=("x", "y"), ticks=None):
    """A line plot as SVG. curves: label -> (x values, y values, matplotlib style options). logarithmic: which axes.

    ticks: of the x axis; all x values by default.
    Up to 40 curves differ in colour or marker. The background is white, so that dark pages show it too.
    """
    figure = Figure(figsize=(11, 6.5), layout="constrained", facecolor="white")
    axes = figure.subplots()
    looks = [{"color": colour, "marker": marker} for marker in MARKERS for colour in COLOURS]
    for look, (label, (x, y, style)) in zip(looks, curves.items(), strict=False):
        axes.plot(x, y, label=label, markersize=4.5, linewidth=1.4, **{**look, **style})
    axes.set(**{f"{axis}scale": "log" for axis in logarithmic})
    ticks = ticks or sorted({value for x, _, _ in curves.values() for value in x})
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.set(title=title, xlabel=x_label, ylabel=y_label)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
