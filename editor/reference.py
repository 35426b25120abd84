"""The parts of the documentation that are read off the pack: tables of nodes and workflows, and the allowed imports.

`python dev.py run -m pixart_pack.editor.reference` writes `docs/nodes.md`, `docs/core-nodes.md`,
`docs/architecture.svg` and `node_list.json`.
"""

import json
import sys
import textwrap
from html import escape

from ..devtools.process import ROOT

NODES_PAGE = ROOT / "docs" / "nodes.md"
CORE_PAGE, CORE_TABLE = ROOT / "docs" / "core-nodes.md", ROOT / "tests" / "host" / "core_nodes.json"
# ComfyUI-Manager reads here which nodes a pack has: it runs no code, and cannot find ours in it.
NODE_LIST = ROOT / "node_list.json"
PICTURE = ROOT / "docs" / "architecture.svg"
BOX_PX, GAP_PX = (180, 66), (14, 34)
LETTERS_A_LINE = 25
BOX_STYLE = 'fill="#eef2fb" stroke="#3f51b5"'
INTRODUCTION = """# Nodes and workflows

Every node has a help page in the editor, in English and Chinese: select the node, then the *i* above it.
This page is written by `python dev.py run -m pixart_pack.editor.reference`.
"""
BLUEPRINTS_INTRODUCTION = """## Blueprints

Ready-made subgraphs: in the editor's node library under **Subgraph Blueprints**, and by a double click on the canvas.
The files are in `subgraphs/`.
"""
CORE_INTRODUCTION = """# ComfyUI's own nodes

What each of ComfyUI's nodes that take a MODEL, CONDITIONING, LATENT, SIGMAS, GUIDER or CONTROL_NET means on PixArt. A
test puts every one into a graph with the demo model, and holds it to this page, which is written by
`python dev.py run -m pixart_pack.editor.reference`.
"""
CORE_PARTS = {
    "acts": ("They act", "They change the picture as they do with other models, or end a graph."),
    "keeps": ("They change nothing by themselves", "The picture stays as it is without them."),
    "refused": ("They are refused in words", "The run ends with a message that says why, and what to use."),
    "other model": ("For other models", "They leave the picture as it is, or end with their own errors."),
    "other type": (
        "They need what PixArt has not",
        "An input takes what comes out of other models, or of the host's own training.",
    ),
}


def node_list() -> str:
    """The nodes' ids and names, as JSON."""
    return json.dumps({node_id: entry["display_name"] for node_id, entry in _definitions().items()}, indent=2) + "\n"


def _definitions() -> dict:
    return json.loads((ROOT / "locales" / "en" / "nodeDefs.json").read_text(encoding="utf-8"))


def nodes_page() -> str:
    """The page with all nodes and all workflows."""
    definitions = _definitions()
    nodes = sorted((entry["display_name"], node_id, entry["description"]) for node_id, entry in definitions.items())
    rows = [f"| [{name}](../web/docs/{node_id}.md) | {_cell(text)} |" for name, node_id, text in nodes]
    workflows = [f"| `{path.stem}` | {_cell(_note_of(path))} |" for path in sorted((ROOT / "workflows").glob("*.json"))]
    blueprints = [_blueprint_row(path) for path in sorted((ROOT / "subgraphs").glob("*.json"))]
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
            *(BLUEPRINTS_INTRODUCTION, "| blueprint | what it does |", "| --- | --- |", *blueprints, ""),
        ]
    )


def _blueprint_row(path) -> str:
    about = json.loads(path.read_text(encoding="utf-8"))["extra"]["BlueprintDescription"]
    return f"| `{path.stem}` | {_cell(about)} |"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def core_page() -> str:
    """The page that says of each of the host's nodes what it means on PixArt."""
    entries = json.loads(CORE_TABLE.read_text(encoding="utf-8"))
    lines = [CORE_INTRODUCTION]
    for meaning, (title, words) in CORE_PARTS.items():
        part = {name: entry for name, entry in entries.items() if entry["means"] == meaning}
        noted = [
            f"| {entry['title']} | `{name}` | {_cell(entry['note'])} |" for name, entry in part.items() if entry["note"]
        ]
        plain = [f"{entry['title']} (`{name}`)" for name, entry in part.items() if not entry["note"]]
        lines += [f"## {title}", "", words, ""]
        lines += ["| node | id | on PixArt |", "| --- | --- | --- |", *noted, ""] if noted else []
        lines += [f"{'Also ' if noted else ''}{', '.join(plain)}.", ""] if plain else []
    return "\n".join(lines)


def _note_of(path) -> str:
    """What a workflow's note says first: its paragraph after the title."""
    nodes = json.loads(path.read_text(encoding="utf-8"))["nodes"]
    note = next(node["widgets_values"][0] for node in nodes if node["type"] == "MarkdownNote")
    paragraphs = [part for part in note.split("\n\n") if not part.startswith("#")]
    return paragraphs[0]


def architecture_picture() -> str:
    """The rooms of the house as SVG, each right below those that import from it, without arrows that others imply."""
    from ..tests.architecture import ROOMS, arrows

    pairs = arrows()
    rows = _rows(list(ROOMS), pairs)
    widths = [sum(BOX_PX[0] if item in ROOMS else 0 for item in row) + GAP_PX[0] * (len(row) - 1) for row in rows]
    width, height = max(widths) + 2 * GAP_PX[0], len(rows) * (BOX_PX[1] + GAP_PX[1]) + GAP_PX[1]
    places = {}  # the middle of an item's upper edge
    for floor, row in enumerate(rows):
        left = (width - widths[floor]) / 2
        for item in row:
            item_px = BOX_PX[0] if item in ROOMS else 0
            places[item] = (left + item_px / 2, GAP_PX[1] + floor * (BOX_PX[1] + GAP_PX[1]))
            left += item_px + GAP_PX[0]
    boxes = {room: places[room] for room in ROOMS}
    return "\n".join([*_head(width, height), *_lines(pairs, places), *_boxes(ROOMS, boxes), "</svg>", ""])


def _rows(rooms: list[str], pairs: list[tuple[str, str]]) -> list[list]:
    """The items of each floor, the highest first: rooms, and (source, target, floor) where an arrow passes between."""
    depths: dict[str, int] = {}
    while len(depths) < len(rooms):
        for room in rooms:
            above = [source for source, target in pairs if target == room]
            if all(source in depths for source in above):
                depths.setdefault(room, max((depths[source] + 1 for source in above), default=0))
    rows: list[list] = [[room for room in rooms if not depths[room]]]
    for floor in range(1, max(depths.values()) + 1):
        above = {item: index for index, item in enumerate(rows[-1])}
        passing = [(a, b, floor) for a, b in pairs if depths[a] < floor < depths[b]]
        parents = {room: [a for a, b in pairs if b == room] for room in rooms if depths[room] == floor}
        parents |= {item: [item[0]] for item in passing}
        middles = {item: _middle(item, sources, above, floor) for item, sources in parents.items()}
        rows.append(sorted(middles, key=middles.get))
    return rows


def _middle(item, sources: list[str], above: dict, floor: int) -> float:
    """Where in its row an item belongs: the mean place of what leads to it from the row above."""
    target = item if isinstance(item, str) else item[1]
    found = [above.get(source, above.get((source, target, floor - 1))) for source in sources]
    return sum(found) / len(found)


def _head(width: float, height: float) -> list[str]:
    """No background: the boxes and lines are seen on light and on dark pages."""
    return [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" font-family="sans-serif">',
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0L8 4L0 8z" fill="#7a869a"/></marker></defs>',
    ]


def _lines(pairs: list, places: dict) -> list[str]:
    style = 'fill="none" stroke="#7a869a" stroke-width="1.5" marker-end="url(#tip)"'
    found = []
    for source, target in pairs:
        passed = sorted((item for item in places if item[:2] == (source, target)), key=lambda item: item[2])
        x, y = places[source]
        points = [(x, y + BOX_PX[1])]
        for item in passed:
            x, y = places[item]
            points += [(x, y), (x, y + BOX_PX[1])]
        points.append(places[target])
        found.append(f'<polyline points="{" ".join(f"{x:g},{y:g}" for x, y in points)}" {style}/>')
    return found


def _boxes(rooms: dict, places: dict) -> list[str]:
    found = []
    for room, (middle, y) in places.items():
        x = middle - BOX_PX[0] / 2
        text = textwrap.wrap(rooms[room][0].replace("`", ""), LETTERS_A_LINE)
        found += [
            f'<rect x="{x:g}" y="{y:g}" width="{BOX_PX[0]}" height="{BOX_PX[1]}" rx="6" {BOX_STYLE}/>',
            f'<text x="{middle:g}" y="{y + 22:g}" font-size="16" font-weight="bold" text-anchor="middle">{room}</text>',
        ]
        found += [
            f'<text x="{middle:g}" y="{y + 41 + 15 * line:g}" font-size="13" fill="#444" text-anchor="middle">'
            f"{escape(words)}</text>"
            for line, words in enumerate(text)
        ]
    return found


def main() -> int:
    NODES_PAGE.write_text(nodes_page(), encoding="utf-8")
    CORE_PAGE.write_text(core_page(), encoding="utf-8")
    NODE_LIST.write_text(node_list(), encoding="utf-8")
    PICTURE.write_text(architecture_picture(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
