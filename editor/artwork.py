"""Draws the pack's icon and banner for the registry, `docs/icon.png` and `docs/banner.png`, and the icon as SVG.

Run by `python dev.py run -m pixart_pack.editor.artwork`. The banner shows pictures of the demo model from `workflows/`.
"""

import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from ..devtools.process import ROOT
from .templates.collection import TITLES

DOCS = ROOT / "docs"
ICON_PX, BANNER_PX = 400, (1260, 540)  # the registry asks for at most 800x400 and 21:9
TILES, GAP = 8, 0.12
INK, PAPER = "#1d2230", "#f4f1ea"
# A tile for each patch: noise at the top left turns into a picture, a sun over a hill, at the bottom right.
PICTURE = (
    "nnnnbbbb",
    "nnnbbbyy",
    "nnbnbbyy",
    "nbnbbbbb",
    "nnbbggbb",
    "nbbggggg",
    "bnggGGgg",
    "ngGGGGGG",
)
COLOURS = {"b": "#4a9eda", "y": "#f2c14e", "g": "#5bb56b", "G": "#2f7d4f"}
NOISE = ("#b06fd0", "#e0823d", "#4a9eda", "#d9534f", "#5bb56b")


def tiles() -> list[tuple[float, float, float, str]]:
    """(left, top, side, colour) of every tile in a square of side 1."""
    pitch = 1 / TILES
    drawn = []
    for row, line in enumerate(PICTURE):
        for column, letter in enumerate(line):
            colour = COLOURS.get(letter) or NOISE[(3 * row + 5 * column + row * column) % len(NOISE)]
            place = (column + GAP / 2) * pitch, (row + GAP / 2) * pitch
            drawn.append((*place, pitch * (1 - GAP), colour))
    return drawn


def icon_svg() -> str:
    squares = [
        f'<rect x="{40 + 320 * x:.1f}" y="{40 + 320 * y:.1f}" width="{320 * side:.1f}" height="{320 * side:.1f}" '
        f'rx="4" fill="{colour}"/>'
        for x, y, side, colour in tiles()
    ]
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {ICON_PX} {ICON_PX}">'
    ground = f'<rect width="{ICON_PX}" height="{ICON_PX}" rx="72" fill="{INK}"/>'
    return "\n".join((head, ground, *squares, "</svg>")) + "\n"


def draw_icon(side_px: int) -> Image.Image:
    """The icon, drawn at four times its size for smooth edges."""
    large = 4 * side_px
    image = Image.new("RGBA", (large, large))
    draw = ImageDraw.Draw(image)
    draw.rounded_rectangle((0, 0, large - 1, large - 1), 0.18 * large, INK)
    for x, y, side, colour in tiles():
        left, top = (large * (0.1 + 0.8 * each) for each in (x, y))
        draw.rounded_rectangle((left, top, left + 0.8 * side * large, top + 0.8 * side * large), large // 100, colour)
    return image.resize((side_px, side_px), Image.Resampling.LANCZOS)


def draw_banner(pictures: list[Path]) -> Image.Image:
    """The icon, the name, and a row of pictures."""
    width, height = BANNER_PX
    banner = Image.new("RGB", BANNER_PX, PAPER)
    icon = draw_icon(180)
    banner.paste(icon, (70, 60), icon)
    draw = ImageDraw.Draw(banner)
    draw.text((290, 68), "PixArt", INK, ImageFont.load_default(96))
    draw.text((294, 182), "alpha and Sigma, native in ComfyUI", INK, ImageFont.load_default(34))
    side, top = 200, height - 250
    gap = (width - 140 - len(pictures) * side) // (len(pictures) - 1)
    for number, path in enumerate(pictures):
        picture = Image.open(path).convert("RGB").resize((side, side), Image.Resampling.LANCZOS)
        banner.paste(picture, (70 + number * (side + gap), top))
    return banner


def main() -> int:
    (DOCS / "icon.svg").write_text(icon_svg(), encoding="utf-8")
    draw_icon(ICON_PX).save(DOCS / "icon.png", optimize=True)
    names = ("demo", "text_to_image_1024", "text_to_image_512", "text_to_image_256", "sigma_300_tokens")
    pictures = [ROOT / "workflows" / f"{TITLES[name]}.jpg" for name in names]
    draw_banner(pictures).save(DOCS / "banner.png", optimize=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
