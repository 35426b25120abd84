"""Tables and plots of benchmark results."""

from pathlib import Path

from matplotlib.figure import Figure

RESULTS = Path(__file__).parent / "results"


def markdown_table(head, rows):
    """A Markdown table. head: cells. rows: lists of as many cells; all are turned into text."""
    lines = ["| " + " | ".join(map(str, cells)) + " |" for cells in [head, ["---"] * len(head), *rows]]
    return "\n".join(lines) + "\n"


def save_plot(path, curves, title, x_label, y_label, logarithmic=("x", "y")):
    """A line plot as SVG. curves: label -> (x values, y values, matplotlib style options). logarithmic: which axes."""
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.subplots()
    for label, (x, y, style) in curves.items():
        axes.plot(x, y, label=label, marker="o", markersize=3, **style)
    axes.set(**{f"{axis}scale": "log" for axis in logarithmic})
    ticks = sorted({value for x, _, _ in curves.values() for value in x})
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.set(title=title, xlabel=x_label, ylabel=y_label)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
