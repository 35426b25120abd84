"""The parts of the documentation that are read off the pack: tables of nodes and workflows, and the allowed imports.

`python dev.py run -m pixart_pack.editor.reference` writes `docs/nodes.md` and `docs/architecture.svg`.
"""

import json
import sys
from html import escape

from ..devtools.process import ROOT

NODES_PAGE = ROOT / "docs" / "nodes.md"
PICTURE = ROOT / "docs" / "architecture.svg"
BOX_PX, GAP_PX = (216, 50), (18, 34)
BOX_STYLE = 'fill="#eef2fb" stroke="#3f51b5"'
INTRODUCTION = """# Nodes and workflows

Every node has a help page in the editor, in English and Chinese: select the node, then the *i* above it.
This page is written by `python dev.py run -m pixart_pack.editor.reference`.
"""


def nodes_page() -> str:
    """The page with all nodes and all workflows."""
    definitions = json.loads((ROOT / "locales" / "en" / "nodeDefs.json").read_text(encoding="utf-8"))
    nodes = sorted((entry["display_name"], node_id, entry["description"]) for node_id, entry in definitions.items())
    rows = [f"| [{name}](../web/docs/{node_id}.md) | {_cell(text)} |" for name, node_id, text in nodes]
    workflows = [f"| `{path.stem}` | {_cell(_note_of(path))} |" for path in sorted((ROOT / "workflows").glob("*.json"))]
    return "\n".join(
        [
            *(INTRODUCTION, "## Nodes", "", "| node | what it does |", "| --- | --- |", *rows, ""),
            *(
                "## Workflows",
                "",
                "In the editor: **Templates**, then **pixart_pack** under Extensions. The files are in",
            ),
            *(
                "`workflows/`, and for the API in `workflows/api/`.",
                "",
                "| workflow | what it shows |",
                "| --- | --- |",
            ),
            *(*workflows, ""),
        ]
    )


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _note_of(path) -> str:
    """What a workflow's note says first: its paragraph after the title."""
    nodes = json.loads(path.read_text(encoding="utf-8"))["nodes"]
    note = next(node["widgets_values"][0] for node in nodes if node["type"] == "MarkdownNote")
    paragraphs = [part for part in note.split("\n\n") if not part.startswith("#")]
    return paragraphs[0]


def architecture_picture() -> str:
    """The rooms of the house as SVG, each above those that it may import from, without arrows that others imply."""
    from ..tests.architecture import ROOMS, arrows

    pairs = arrows()
    floors: dict[str, int] = {}
    while len(floors) < len(ROOMS):
        for room in ROOMS:
            below = [target for source, target in pairs if source == room]
            if all(target in floors for target in below):
                floors.setdefault(room, max((floors[target] + 1 for target in below), default=0))
    rows = [[room for room in ROOMS if floors[room] == floor] for floor in range(max(floors.values()) + 1)]
    width = max(map(len, rows)) * (BOX_PX[0] + GAP_PX[0]) + GAP_PX[0]
    height = len(rows) * (BOX_PX[1] + GAP_PX[1]) + GAP_PX[1]
    places = {}
    for floor, row in enumerate(rows):
        left = (width - len(row) * (BOX_PX[0] + GAP_PX[0]) + GAP_PX[0]) / 2
        top = height - (floor + 1) * (BOX_PX[1] + GAP_PX[1])
        places |= {room: (left + index * (BOX_PX[0] + GAP_PX[0]), top) for index, room in enumerate(row)}
    return "\n".join([*_head(width, height), *_lines(pairs, places), *_boxes(ROOMS, places), "</svg>", ""])


def _head(width: float, height: float) -> list[str]:
    return [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" font-family="sans-serif">',
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0L8 4L0 8z" fill="#7a869a"/></marker></defs>',
        f'<rect width="{width:g}" height="{height:g}" fill="#ffffff"/>',
    ]


def _lines(pairs: list, places: dict) -> list[str]:
    half, tall = BOX_PX[0] / 2, BOX_PX[1]
    style = 'stroke="#7a869a" stroke-width="1.5" marker-end="url(#tip)"'
    ends = [(*places[source], *places[target]) for source, target in pairs]
    return [f'<line x1="{a + half:g}" y1="{b + tall:g}" x2="{c + half:g}" y2="{d:g}" {style}/>' for a, b, c, d in ends]


def _boxes(rooms: dict, places: dict) -> list[str]:
    found = []
    for room, (x, y) in places.items():
        middle = x + BOX_PX[0] / 2
        found += [
            f'<rect x="{x:g}" y="{y:g}" width="{BOX_PX[0]}" height="{BOX_PX[1]}" rx="6" {BOX_STYLE}/>',
            f'<text x="{middle:g}" y="{y + 20:g}" font-size="14" font-weight="bold" text-anchor="middle">{room}</text>',
            f'<text x="{middle:g}" y="{y + 38:g}" font-size="10.5" fill="#444" text-anchor="middle">'
            f"{escape(rooms[room][0].replace('`', ''))}</text>",
        ]
    return found


def main() -> int:
    NODES_PAGE.write_text(nodes_page(), encoding="utf-8")
    PICTURE.write_text(architecture_picture(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
