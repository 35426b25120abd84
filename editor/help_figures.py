"""Draws the figures of the help pages, `web/docs/*.svg`: the table of sizes, and the schedules.

Run by `python dev.py run -m pixart_pack.editor.help_figures`.
"""

import sys
from collections.abc import Sequence

from ..pixart.resolution import ASPECT_RATIOS
from ..samplers.schedules import SCHEDULES
from .help_pages import DOCS

WIDTH_PX, HEIGHT_PX, MARGIN_PX = 320, 200, 24
INK, GRID, PALETTE = "#888", "#8884", ("#4a9eda", "#e0823d", "#5bb56b", "#b06fd0", "#d9534f")
SHOWN_RATIOS = (0.25, 0.4, 0.57, 0.75, 1.0, 1.33, 1.75, 2.5, 4.0)
SHOWN_SCHEDULES = ("uniform", "trailing", "lcm", "karras")
STEPS = 20


def _svg(parts: Sequence[str]) -> str:
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH_PX} {HEIGHT_PX}" font-family="sans-serif">'
    return "\n".join((head, *parts, "</svg>")) + "\n"


def _text(x: float, y: float, text: str, colour: str = INK, anchor: str = "middle") -> str:
    return f'<text x="{x:g}" y="{y:g}" font-size="9" fill="{colour}" text-anchor="{anchor}">{text}</text>'


def draw_bins() -> str:
    """Some sizes of the 1024 table to scale, all about their middle, the tallest and the widest named."""
    scale = (HEIGHT_PX - 2 * MARGIN_PX) / 2048
    middle_x, middle_y = WIDTH_PX / 2, HEIGHT_PX / 2
    parts = []
    for number, ratio in enumerate(SHOWN_RATIOS):
        height, width = ASPECT_RATIOS[1024][min(ASPECT_RATIOS[1024], key=lambda known: abs(known - ratio))]
        w, h = width * scale, height * scale
        colour = PALETTE[number % len(PALETTE)]
        place = f'x="{middle_x - w / 2:.1f}" y="{middle_y - h / 2:.1f}" width="{w:.1f}" height="{h:.1f}"'
        parts.append(f'<rect {place} fill="none" stroke="{colour}"/>')
        if ratio in (0.25, 1.0, 4.0):
            x = middle_x + w / 2 + 4
            parts.append(_text(x, middle_y - h / 2 + 8, f"{width}×{height}", colour, "start"))
    return _svg(parts)


def draw_schedules() -> str:
    """The timestep of every evaluation in a run of STEPS."""
    left, right, top, bottom = MARGIN_PX + 8, WIDTH_PX - 70, MARGIN_PX / 2, HEIGHT_PX - MARGIN_PX
    parts = []
    for timestep in (0, 250, 500, 750, 999):
        y = bottom - (bottom - top) * timestep / 999
        parts.append(f'<line x1="{left}" y1="{y:.1f}" x2="{right}" y2="{y:.1f}" stroke="{GRID}"/>')
        parts.append(_text(left - 4, y + 3, str(timestep), anchor="end"))
    parts.append(_text((left + right) / 2, HEIGHT_PX - 6, f"step 1 to {STEPS}; timestep"))
    for number, name in enumerate(each for each in SHOWN_SCHEDULES if each in SCHEDULES):
        times = [float(time) for time in SCHEDULES[name](STEPS)][:STEPS]
        points = [
            f"{left + (right - left) * index / (STEPS - 1):.1f},{bottom - (bottom - top) * time / 999:.1f}"
            for index, time in enumerate(times)
        ]
        colour = PALETTE[number]
        parts.append(f'<polyline points="{" ".join(points)}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        parts.append(_text(right + 6, top + 10 + 14 * number, name, colour, "start"))
    return _svg(parts)


def main() -> int:
    DOCS.mkdir(parents=True, exist_ok=True)
    for name, drawing in (("resolution_bins", draw_bins()), ("schedules", draw_schedules())):
        (DOCS / f"{name}.svg").write_text(drawing, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
