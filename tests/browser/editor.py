"""What a user does in the ComfyUI editor, as functions."""

import json
import time
from itertools import combinations
from pathlib import Path

import pytest

from pixart_pack.editor.templates.collection import TITLES

CLASSIC, NODES_2 = "classic", "nodes2"  # what draws the nodes: a canvas, or elements of the page
in_both = pytest.mark.parametrize("renderer", (CLASSIC, NODES_2), indirect=True)
PACK = "pixart_pack"
WORKFLOWS = Path(__file__).parents[2] / "workflows"
TIMEOUT_MS = 120_000
READY = (
    "window.app?.graph && app.extensionManager?.workflow?.activeWorkflow"
    " && window.LiteGraph?.registered_node_types.PixArtLoadCheckpoint && !document.querySelector('.p-progressspinner')"
)
LISTEN = """() => {
    window.previews = []; window.ends = [];
    const note = event => window.previews.push((event.detail.blob ?? event.detail).size);
    for (const kind of ['b_preview', 'b_preview_with_metadata']) app.api.addEventListener(kind, note);
    for (const kind of ['execution_success', 'execution_error', 'execution_interrupted'])
        app.api.addEventListener(kind, event => window.ends.push([kind, event.detail]));
}"""
EXPORT = """async () => {
    const {workflow, output} = await app.graphToPrompt();
    const nodes = app.graph.nodes;
    const asked = nodes.map(node => ({type: node.type, needs: [...node.computeSize()], has: [...node.size]}));
    const unknown = nodes.filter(node => !LiteGraph.registered_node_types[node.type]).map(node => node.type);
    return {workflow, output, asked, unknown};
}"""
OPEN_TEMPLATE = """async ([pack, name]) => {
    const answer = await app.api.fetchApi(`/workflow_templates/${pack}/${name}.json`);
    await app.loadGraphData(await answer.json(), true, true, name, {openSource: 'template'});
}"""
IS_GHOST = "!!app.graph.nodes[0].flags.ghost"
ANSWER_S = 20
MIDDLE = (720, 300)  # of the canvas, and of nothing that lies above it
CARDS = "[data-testid^='template-workflow-']"
MORE_CARDS = f'count => document.querySelectorAll("{CARDS}").length > count'
FILL = """api => {
    const fill = (node, given) => {
        for (const widget of given ? node.widgets ?? [] : []) {
            const value = given.inputs[widget.name];
            if (value !== undefined && !Array.isArray(value)) widget.value = value;
        }
    };
    for (const node of app.graph.nodes) {
        fill(node, api[node.id]);
        for (const inner of node.subgraph?.nodes ?? []) {
            const given = api[`${node.id}:${inner.id}`];
            fill(inner, given);
            fill(node, given);  // which shows some of the widgets inside
        }
    }
}"""
A_DIALOG_LESS = """async () => {
    const count = () => document.querySelectorAll('[role=dialog]').length, before = count(), ends = Date.now() + 3000;
    while (count() && count() >= before && Date.now() < ends) await new Promise(go => setTimeout(go, 50));
}"""
# In Nodes 2.0 a picture is an element of the node's; the classic renderer keeps it with the node.
PICTURE_PX = """type => {
    const node = app.graph.nodes.find(node => node.type === type);
    const elements = () => [...document.querySelectorAll(`[data-node-id="${node.id}"] img`)];
    const shown = LiteGraph.vueNodesMode ? elements() : node.imgs;
    return Math.max(0, ...(shown ?? []).map(image => image.naturalWidth));
}"""
# By node: left, top, right, bottom in the graph, as it is drawn.
BOXES = """() => Object.fromEntries(app.graph.nodes.map(node => {
    const drawn = LiteGraph.vueNodesMode && document.querySelector(`[data-node-id="${node.id}"]`);
    const {scale, offset} = app.canvas.ds;
    const [x, y] = node.pos, title = LiteGraph.NODE_TITLE_HEIGHT;
    if (!drawn) return [node.id, [x, y - title, x + node.size[0], y + node.size[1]]];
    const box = drawn.getBoundingClientRect(), canvas = app.canvas.canvas.getBoundingClientRect();
    const place = (px, axis) => (px - [canvas.left, canvas.top][axis]) / scale - offset[axis];
    const buttons = [...drawn.querySelectorAll('button')];  // one for advanced inputs hangs below
    const foot = Math.max(box.bottom, ...buttons.map(each => each.getBoundingClientRect().bottom));
    return [node.id, [place(box.left, 0), place(box.top, 1), place(box.right, 0), place(foot, 1)]];
}))"""
GROUPS = (
    "() => app.graph.groups.map(group => [...group.pos, group.pos[0] + group.size[0], group.pos[1] + group.size[1]])"
)
# Whether view and nodes stand as they did a moment ago.
AT_REST = """() => {
    const drawn = [...document.querySelectorAll('[data-node-id]')];
    if (LiteGraph.vueNodesMode && drawn.length < app.graph.nodes.length) return false;
    const boxes = drawn.map(each => each.getBoundingClientRect()).map(box => [box.x, box.y, box.width, box.height]);
    const now = JSON.stringify([app.canvas.ds.scale, [...app.canvas.ds.offset], boxes]);
    const isAtRest = window.lastSeen === now;
    window.lastSeen = now;
    return isAtRest;
}"""
SEARCHED = "items => items.map(item => item.innerText.split('\\n')[0])"
PLACE_OF_TITLE = """number => {
    const node = app.graph.getNodeById(number), {scale, offset} = app.canvas.ds;
    const {left, top} = app.canvas.canvas.getBoundingClientRect();
    return [left + (node.pos[0] + 60 + offset[0]) * scale, top + (node.pos[1] - 12 + offset[1]) * scale];
}"""


def shipped_workflow(name: str) -> dict:
    return json.loads((WORKFLOWS / f"{TITLES[name]}.json").read_text(encoding="utf-8"))


def overlap(one: list, other: list) -> bool:
    return one[0] < other[2] - 1 and other[0] < one[2] - 1 and one[1] < other[3] - 1 and other[1] < one[3] - 1


class Editor:
    """The editor in a page of a browser; `problems` collects what its console and its requests complain of."""

    def __init__(self, page, url: str, shots: Path):
        self.page, self.url, self.shots = page, url, shots
        self.problems: list[str] = []
        self.renderer: str | None = None
        page.set_default_timeout(TIMEOUT_MS)
        page.on("console", self._on_console)
        page.on("pageerror", lambda error: self.problems.append(f"uncaught: {error}"))
        page.on("response", self._on_response)
        self.opened_s = self.open()

    def _on_console(self, message) -> None:
        # A failed request is reported with its address by _on_response.
        if message.type == "error" and "Failed to load resource" not in message.text:
            self.problems.append(message.text)

    def _on_response(self, response) -> None:
        # The editor asks for a page in the user's language first, and takes the English one where there is none.
        if response.status >= 400 and PACK in response.url and not response.url.endswith("/en.md"):
            self.problems.append(f"{response.status} {response.url}")

    def complaints(self) -> list[str]:
        """The problems that speak of this pack, less the editor asking Hugging Face in vain for the size of a file."""
        ours = (problem for problem in self.problems if "pixart" in problem.lower())
        return [problem for problem in ours if "Content Security Policy" not in problem]

    def open(self) -> float:
        """Open the editor anew; returns the seconds until it can be used."""
        began = time.perf_counter()
        self.page.goto(self.url)
        self.page.wait_for_function(READY)
        self.page.evaluate(LISTEN)
        return time.perf_counter() - began

    def shoot(self, name: str) -> None:
        self.page.screenshot(path=self.shots / f"{name}.png")

    def close_dialogs(self) -> None:
        for _ in range(3):
            if self.page.get_by_role("dialog").count() == 0:
                return
            self.page.keyboard.press("Escape")
            self.page.evaluate(A_DIALOG_LESS)

    def browse_templates(self) -> list[str]:
        """Open the template browser at this pack's; returns their titles."""
        content = self.page.get_by_test_id("template-workflows-content")
        if content.count() == 0:  # by its command: the editor may open it itself just now, over its own button
            self.page.evaluate("app.extensionManager.command.execute('Comfy.BrowseTemplates')")
        content.first.wait_for()
        self.page.get_by_text(PACK, exact=True).first.click()
        self.page.get_by_test_id(f"template-workflow-{TITLES['demo']}").wait_for()
        cards, shipped = self.page.locator(CARDS), len(list(WORKFLOWS.glob("*.json")))
        while (count := cards.count()) < shipped:  # the browser shows two dozen, and more when one scrolls to the last
            cards.last.scroll_into_view_if_needed()
            self.page.wait_for_function(MORE_CARDS, arg=count)
        ids = "cards => cards.map(card => card.dataset.testid.replace('template-workflow-', ''))"
        return cards.evaluate_all(ids)

    def choose_template(self, name: str) -> None:
        """Click a card of the template browser."""
        self.browse_templates()
        self.page.evaluate("app.graph.clear()")  # so that what is there afterwards is the template
        self.page.get_by_test_id(f"template-workflow-{TITLES[name]}").click()
        self.page.wait_for_function("app.graph.nodes.length > 2")

    def open_template(self, name: str) -> None:
        """What a click on a template's card does, without the seconds in which the cards are drawn."""
        self.close_dialogs()
        self.page.evaluate("app.graph.clear()")
        self.page.evaluate(OPEN_TEMPLATE, [PACK, TITLES[name]])
        self.page.wait_for_function("app.graph.nodes.length > 2")

    def insert_blueprint(self, title: str) -> None:
        """Find a blueprint by a double click on an empty canvas, and put it there."""
        self.close_dialogs()
        self.page.evaluate("app.canvas.setGraph(app.rootGraph ?? app.graph)")  # out of a subgraph
        self.page.evaluate("app.graph.clear()")
        search = self.page.get_by_role("dialog").locator("input").first
        self._until(search.is_visible, lambda: self.page.mouse.dblclick(*MIDDLE))
        search.fill(title)
        self.page.get_by_role("dialog").get_by_text(title, exact=True).first.click()
        self.page.wait_for_function("title => app.graph.nodes[0]?.title === title", arg=title)
        self._until(lambda: not self.page.evaluate(IS_GHOST), self._click_beside_the_middle)

    def _click_beside_the_middle(self) -> None:
        # The node hangs at the pointer, from its first movement on.
        self.page.mouse.move(MIDDLE[0] + 5, MIDDLE[1] + 5)
        self.page.mouse.click(*MIDDLE)

    def _until(self, is_done, act) -> None:
        """Do something again and again until it has had its effect: the editor misses what comes too early."""
        ends = time.monotonic() + ANSWER_S
        while not is_done():
            if time.monotonic() > ends:
                raise TimeoutError("the editor does not answer")
            act()
            self.page.wait_for_timeout(700)

    def load(self, workflow: dict) -> None:
        """Load a workflow, again where the editor then puts the one of its last session in its place."""
        ends = time.monotonic() + TIMEOUT_MS / 1000
        settled = False
        while not settled:
            if time.monotonic() > ends:
                raise TimeoutError("the workflow does not stay in the editor")
            self.page.evaluate("async workflow => { await app.loadGraphData(workflow, true, true, null) }", workflow)
            self.page.wait_for_timeout(500)
            settled = self.page.evaluate("app.graph.nodes.length") == len(workflow["nodes"])

    def export(self) -> dict:
        """workflow and output as the editor saves and sends them; what sizes its nodes ask for; unknown node types."""
        return self.page.evaluate(EXPORT)

    def run(self, timeout_s: float = 120) -> tuple[str, dict]:
        """Press Run and wait for the end; returns what it was, with the server's report."""
        self.begin()
        return self.end(timeout_s)

    def begin(self) -> None:
        """Press Run."""
        self.page.evaluate("() => { window.previews = []; window.ends = []; }")
        self.page.get_by_test_id("queue-button").click()

    def end(self, timeout_s: float = 120) -> tuple[str, dict]:
        """Wait for the end of a run."""
        self.page.wait_for_function("window.ends.length > 0", timeout=timeout_s * 1000)
        return self.page.evaluate("window.ends[0]")

    def draw_by(self, renderer: str) -> None:
        """Choose the renderer, of CLASSIC and NODES_2."""
        if renderer != self.renderer:
            self.set_setting("Comfy.VueNodes.Enabled", renderer == NODES_2)
            self.page.wait_for_function("is => LiteGraph.vueNodesMode === is", arg=renderer == NODES_2)
            self.renderer = renderer

    def wait_for_rest(self) -> None:
        """Wait until the view has moved to the workflow, and in Nodes 2.0 all nodes are drawn and have their sizes."""
        self.page.wait_for_function(AT_REST, polling=100)

    def check_places(self) -> None:
        """Assert that nodes lie apart as they are drawn, and each within one group."""
        boxes, groups = self.page.evaluate(BOXES), self.page.evaluate(GROUPS)
        assert [pair for pair in combinations(boxes, 2) if overlap(boxes[pair[0]], boxes[pair[1]])] == []
        for node, box in boxes.items():
            holding = [g for g in groups if g[0] <= box[0] and g[1] <= box[1] and box[2] <= g[2] and box[3] <= g[3]]
            assert len(holding) == 1, (node, box)

    def wait_for_picture(self, node_type: str) -> None:
        """Wait until a node shows a picture. The classic renderer loads none of a node that is out of sight."""
        self.page.wait_for_function(f"type => ({PICTURE_PX})(type) > 0", arg=node_type)

    def search_nodes(self, words: str) -> list[str]:
        """What the search for nodes lists, in its order."""
        self.page.evaluate("app.graph.clear()")
        box, ends = self.page.get_by_role("dialog").locator("input").first, time.monotonic() + TIMEOUT_MS / 1000
        while not box.is_visible():  # a click on a canvas that is just being made goes nowhere
            if time.monotonic() > ends:
                raise TimeoutError("The search for nodes does not open")
            self.page.mouse.dblclick(800, 600)
            self.page.wait_for_timeout(500)
        box.fill(words)
        items = self.page.get_by_test_id("result-item")
        items.first.wait_for()
        self.page.wait_for_timeout(300)  # the list follows the words
        found = items.evaluate_all(SEARCHED)
        self.close_dialogs()
        return found

    def number_of(self, node_type: str) -> int:
        return self.page.evaluate("type => app.graph.nodes.find(node => node.type === type).id", node_type)

    def select(self, node_type: str) -> None:
        """Click a node's title, again while the view still moves to the workflow and the click misses."""
        number = self.number_of(node_type)
        ends = time.monotonic() + TIMEOUT_MS / 1000
        while not self.page.evaluate(
            "number => [...app.canvas.selectedItems].some(each => each.id === number)", number
        ):
            if time.monotonic() > ends:
                raise TimeoutError(f"{node_type} cannot be selected")
            self.page.mouse.click(*self.page.evaluate(PLACE_OF_TITLE, number))
            self.page.wait_for_timeout(200)

    def fill(self, api: dict) -> None:
        """Set the widgets to the values of a workflow in API format."""
        self.page.evaluate(FILL, api)

    def set_setting(self, name: str, value: str | bool) -> None:
        self.page.evaluate("([name, value]) => app.extensionManager.setting.set(name, value)", [name, value])
