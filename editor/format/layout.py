"""Where the nodes of a workflow stand: in columns of titled groups from left to right, as large as both renderers ask.

A template opens so that all of it is seen. WIDEST_PX and HIGHEST_PX keep that zoom at 60 % or more in a window of
1440 x 900 pixels; below it the classic renderer hides what the nodes say.
"""

from .node import OWN_PREFIX, WIDTH_PX, Node
from .schema import inputs_of
from .wires import Box, Point, Router

WIDEST_PX, HIGHEST_PX = 1780, 1122
NARROWEST_PX, NOTE_PX = 240, 290
TITLE_PX, SLOT_PX = 30, 20
MARGIN_PX, GAP_PX, COLUMN_GAP_PX, GROUP_GAP_PX = 14, 40, 44, 22
GROUP_TITLE_PX = 44
# Heights in the classic renderer and in Nodes 2.0: a widget, and each line below them: the button of advanced inputs or
# of a subgraph, and the badge of a pack.
CLASSIC, VUE = (24, 0), (28, 26)
AROUND_PX = 14
LINE_PX, LETTER_PX, NOTE_LINE_PX, NOTE_LETTER_PX = 16, 6.8, 15, 6.4
LEAST_TEXT_PX = 76
# What a node shows below its widgets once it has run: a picture, the preview of one, or a line of text; or before that,
# that its file is missing, for which others have the line of their advanced inputs.
PICTURE_PX, INPUT_PX, PREVIEW_PX, SAMPLER_PX, CHART_PX, CURVE_PX, TEXT_PX = 280, 218, 233, 222, 190, 216, 70
SHOWN_PX = {
    **dict.fromkeys(("SaveImage", "PixArtCompareSheet"), PICTURE_PX),
    "LoadImage": INPUT_PX,
    "PreviewImage": PREVIEW_PX,
    **dict.fromkeys(("KSampler", "SamplerCustom", "SamplerCustomAdvanced"), SAMPLER_PX),
    **dict.fromkeys(("PixArtResolution", "PixArtScheduler"), CHART_PX),
    "PixArtLoadPromptEmbeddings": VUE[1],
    "PixArtEncodeDataset": TEXT_PX + PREVIEW_PX + 16,  # Nodes 2.0 draws both with room around
    **dict.fromkeys(
        ("PixArtTrainLoRA", "PixArtTrain", "PixArtDistillLCM", "PixArtDistillDMD", "PixArtTrainControlNet"),
        TEXT_PX + CURVE_PX,
    ),
}


def place(groups: list[tuple[str, str, list[list[Node]]]]) -> list[Box]:
    """Give every node its width and its place. groups: title, colour and columns of nodes. Returns the groups' boxes.

    Raises ValueError for more than is readable at once.
    """
    columns = [column for _, _, inside in groups for column in inside]
    notes = sum(column[0].type == "MarkdownNote" for column in columns)
    between = sum(len(inside) - 1 for _, _, inside in groups) * COLUMN_GAP_PX
    around = len(groups) * 2 * MARGIN_PX + (len(groups) - 1) * GROUP_GAP_PX
    room = WIDEST_PX - between - around - notes * NOTE_PX
    width = min(WIDTH_PX, room // (len(columns) - notes) // 2 * 2)
    if width < NARROWEST_PX:
        raise ValueError(f"Too wide: got {len(columns)} columns of {width} px, expected {NARROWEST_PX} px or more each")
    for column in columns:
        for node in column:
            node.width_px = NOTE_PX if node.type == "MarkdownNote" else width
    left, boxes = 0, []
    for _, _, inside in groups:
        x, bottom = left + MARGIN_PX, 0
        for column in inside:
            bottom = max(bottom, _stack(column, x))
            x += column[0].width_px + COLUMN_GAP_PX
        if bottom > HIGHEST_PX:
            names = ", ".join(node.type for column in inside for node in column)
            raise ValueError(f"Too high: got {bottom} px for {names}, expected {HIGHEST_PX} px at the most")
        right = x - COLUMN_GAP_PX + MARGIN_PX
        boxes.append((left, 0, right, bottom + MARGIN_PX))
        left = right + GROUP_GAP_PX
    return boxes


def _stack(column: list[Node], x: int) -> int:
    """Put nodes one below the other; returns where the last one ends."""
    y = GROUP_TITLE_PX + TITLE_PX
    for node in column:
        node.position = (x, y)
        y += size_of(node)[1] + GAP_PX + TITLE_PX
    return y - GAP_PX - TITLE_PX


def size_of(node: Node) -> tuple[int, int]:
    """Width and height of a node in pixels, the title not counted: the larger of what the two renderers need."""
    if node.type == "MarkdownNote":
        return node.width_px, 50 + NOTE_LINE_PX * text_rows(node.values["text"], NOTE_LETTER_PX, node.width_px)
    folded = () if node.unfolds else node.folded()
    shown = [each for each in node.widgets() if each not in folded]
    texts = [each for each in shown if each.is_multiline]
    plain = sum(1 + len(each.extra_values) for each in shown) - len(texts)
    text_px = sum(
        max(LEAST_TEXT_PX, 20 + LINE_PX * text_rows(str(node.values.get(each.name, "")), LETTER_PX, node.width_px))
        for each in texts
        if each.name not in node.sources
    ) + CLASSIC[0] * sum(each.name in node.sources for each in texts)
    lines = any(each.is_advanced for each in node.widgets()) + node.is_subgraph + node.type.startswith(OWN_PREFIX)
    rooms = [per_widget * plain + AROUND_PX + lines * line for per_widget, line in (CLASSIC, VUE)]
    says = "UNIQUE_ID" in str(node.info["input"].get("hidden"))
    height = slots_of(node) * SLOT_PX + text_px + max(rooms) + SHOWN_PX.get(node.type, TEXT_PX if says else 0)
    return node.width_px, max(height, node.height_px or 0)


def slots_of(node: Node) -> int:
    """The rows that the inputs without widgets and the outputs take."""
    return max(sum(not each.is_widget for each in inputs_of(node.info)), len(node.info["output"]))


def text_rows(text: str, letter_px: float, width_px: int) -> int:
    letters = int((width_px - 30) / letter_px)
    return sum(1 + len(line) // letters for line in text.splitlines())


def box_of(node: Node) -> Box:
    (x, y), (width, height) = node.position, size_of(node)
    return x, y - TITLE_PX, x + width, y + height


def output_at(node: Node, slot: int) -> Point:
    return node.position[0] + node.width_px, node.position[1] + (slot + 0.7) * SLOT_PX


def input_at(node: Node, name: str) -> Point:
    """Where a wire ends; that of a widget beside it."""
    sockets = [each.name for each in inputs_of(node.info) if not each.is_widget]
    x, y = node.position
    if name in sockets:
        return x, y + (sockets.index(name) + 0.7) * SLOT_PX
    folded = () if node.unfolds else node.folded()
    shown = [each.name for each in node.widgets() if each not in folded]
    return x, y + slots_of(node) * SLOT_PX + (shown.index(name) + 0.5) * CLASSIC[0]


def lead_wires(
    nodes: list[Node], links: list[list], ends: dict[tuple[int, int], Point] | None = None
) -> tuple[list[dict], list[dict]]:
    """The reroutes that keep wires from running under nodes, and which reroute each link comes from last, as saved.

    links: as saved in a workflow. ends: where wires begin that come from no node, by number and slot.
    """
    by_number = {node.number: node for node in nodes}
    router = Router({number: box_of(node) for number, node in by_number.items()})
    reroutes, extensions = [], []
    for number, origin, slot, target, socket, _ in links:
        name = by_number[target].sockets()[socket].name
        start = output_at(by_number[origin], slot) if origin in by_number else ends[origin, slot]
        last = None
        for point in router.lead(start, input_at(by_number[target], name), origin, target):
            parent = {} if last is None else {"parentId": last}
            last = len(reroutes) + 1
            reroutes.append({"id": last, **parent, "pos": [round(each) for each in point], "linkIds": [number]})
        if last is not None:
            extensions.append({"id": number, "parentId": last})
    return reroutes, extensions
