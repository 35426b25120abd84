"""The workflows as they open: what is seen of them, in both renderers; the blueprints and the apps, in use."""

import json
from itertools import combinations
from pathlib import Path

import pytest

from pixart_pack.editor.templates.collection import TITLES
from pixart_pack.editor.templates.files import DEMO_MODEL, DEMO_T5, DEMO_VAE

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent.parent
LEAST_ZOOM = 0.6  # the classic renderer hides what nodes say at less than 0.57
SMALLEST_WINDOW = {"width": 1440, "height": 900}
APPS = [name for name in TITLES if name.endswith("_app")]
NODES_2 = "Comfy.VueNodes.Enabled"
# By node: left, top, right, bottom in the graph, as it is drawn.
BOXES = """() => Object.fromEntries(app.graph.nodes.map(node => {
    const drawn = LiteGraph.vueNodesMode && document.querySelector(`[data-node-id="${node.id}"]`);
    const {scale, offset} = app.canvas.ds;
    const [x, y] = node.pos, title = LiteGraph.NODE_TITLE_HEIGHT;
    if (!drawn) return [node.id, [x, y - title, x + node.size[0], y + node.size[1]]];
    const box = drawn.getBoundingClientRect(), canvas = app.canvas.canvas.getBoundingClientRect();
    const place = (px, axis) => (px - [canvas.left, canvas.top][axis]) / scale - offset[axis];
    return [node.id, [place(box.left, 0), place(box.top, 1), place(box.right, 0), place(box.bottom, 1)]];
}))"""
GROUPS = (
    "() => app.graph.groups.map(group => [...group.pos, group.pos[0] + group.size[0], group.pos[1] + group.size[1]])"
)
# The wires that lie under a node: a rectangle within the node meets what was drawn of the wire. Of its own nodes a wire
# may touch the sides.
HIDDEN_WIRES = """() => {
    app.canvas.draw(true, true);
    const context = document.createElement('canvas').getContext('2d'), found = [];
    context.lineWidth = 8;
    const inside = (node, sides) => {
        const [left, top] = [node.pos[0] + sides, node.pos[1] - LiteGraph.NODE_TITLE_HEIGHT + 14];
        const [right, bottom] = [node.pos[0] + node.size[0] - sides, node.pos[1] + node.size[1] - 14], points = [];
        for (let x = left; x <= right; x += 6) points.push([x, top], [x, bottom]);
        for (let y = top; y <= bottom; y += 6) points.push([left, y], [right, y]);
        return points;
    };
    for (const link of app.graph._links.values()) {
        const parts = [link];
        for (let id = link.parentId; id != null; id = parts.at(-1).parentId) parts.push(app.graph.reroutes.get(id));
        for (const node of app.graph.nodes) {
            const points = inside(node, [link.origin_id, link.target_id].includes(node.id) ? 40 : 14);
            if (parts.some(part => points.some(([x, y]) => context.isPointInStroke(part.path, x, y))))
                found.push([link.id, node.type]);
        }
    }
    return found;
}"""
SET = """values => { for (const widget of app.graph.nodes[0].widgets)
    if (widget.name in values) widget.value = values[widget.name]; }"""
SAVE = """() => {
    const save = LiteGraph.createNode('SaveImage');
    save.pos = [app.graph.nodes[0].pos[0] + 420, app.graph.nodes[0].pos[1]];
    app.graph.add(save);
    app.graph.nodes[0].connect(0, save, 0);
}"""
HAS_PICTURE = "app.graph.nodes.find(node => node.type === 'SaveImage').imgs?.[0]?.naturalWidth > 0"
SHOWN_IN_APP = """() => [...document.querySelectorAll('[data-testid=linear-center-panel] img')].some(
    image => image.src.includes('/view?') && image.naturalWidth > 0)"""
CHANGE_INSIDE = """() => { app.canvas.subgraph.nodes.find(node => node.type === 'KSampler')
    .widgets.find(widget => widget.name === 'sampler_name').value = 'euler'; }"""
SMALL = {"checkpoint": DEMO_MODEL, "vae": DEMO_VAE, "text_encoder": DEMO_T5, "width": 64, "height": 64, "steps": 2}


@pytest.fixture
def small_window(editor):
    before = editor.page.viewport_size
    editor.page.set_viewport_size(SMALLEST_WINDOW)
    yield editor
    editor.page.set_viewport_size(before)


@pytest.fixture
def nodes_2(small_window):
    small_window.set_setting(NODES_2, True)
    yield small_window
    small_window.set_setting(NODES_2, False)


def overlap(one: list, other: list) -> bool:
    return one[0] < other[2] - 1 and other[0] < one[2] - 1 and one[1] < other[3] - 1 and other[1] < one[3] - 1


def check_places(editor) -> None:
    """Nodes lie apart, and each within one group."""
    boxes, groups = editor.page.evaluate(BOXES), editor.page.evaluate(GROUPS)
    assert [pair for pair in combinations(boxes, 2) if overlap(boxes[pair[0]], boxes[pair[1]])] == []
    for node, box in boxes.items():
        holding = [g for g in groups if g[0] <= box[0] and g[1] <= box[1] and box[2] <= g[2] and box[3] <= g[3]]
        assert len(holding) == 1, (node, box)


@pytest.mark.parametrize("name", [name for name in TITLES if name not in APPS])
def test_a_template_can_be_read_as_it_opens(small_window, name):
    small_window.open_template(name)
    small_window.page.wait_for_function("least => app.canvas.ds.scale >= least", arg=LEAST_ZOOM, timeout=5000)
    check_places(small_window)
    assert small_window.page.evaluate(HIDDEN_WIRES) == []


@pytest.mark.parametrize("name", ["demo", "controlnet_hed", "styles", "lora_training"])
def test_it_keeps_its_places_in_nodes_2(nodes_2, name):
    nodes_2.open_template(name)
    nodes_2.page.wait_for_function("document.querySelectorAll('[data-node-id]').length >= app.graph.nodes.length")
    nodes_2.page.wait_for_timeout(500)  # until the nodes have their heights
    nodes_2.shoot(f"nodes_2_{name}")
    check_places(nodes_2)


def test_advanced_inputs_are_folded_until_asked_for(small_window):
    small_window.open_template("demo")
    shown = """() => { const node = app.graph.nodes.find(node => node.type === 'PixArtTextEncode');
        return node.widgets.filter(widget => node.isWidgetVisible(widget)).map(widget => widget.name); }"""
    folded = small_window.page.evaluate(shown)
    assert "text" in folded and "clean_caption" in folded and "aspect_ratio" not in folded
    small_window.page.evaluate("app.graph.nodes.find(node => node.type === 'PixArtTextEncode').toggleAdvanced()")
    assert "aspect_ratio" in small_window.page.evaluate(shown)
    small_window.open_template("batch_of_prompts")
    assert "batch_lines" in small_window.page.evaluate(shown)  # set, so it is seen


@pytest.mark.parametrize("title", sorted(path.stem for path in (ROOT / "subgraphs").glob("*.json")))
def test_a_blueprint_is_found_and_inserted(small_window, title):
    small_window.insert_blueprint(title)
    exported = small_window.export()
    shipped = json.loads((ROOT / "subgraphs" / f"{title}.json").read_text(encoding="utf-8"))
    values = small_window.page.evaluate("app.graph.nodes[0].widgets.map(widget => widget.value)")
    assert values == shipped["nodes"][0]["widgets_values"]
    assert exported["unknown"] == []
    assert len(exported["output"]) == len(shipped["definitions"]["subgraphs"][0]["nodes"])
    assert small_window.page.evaluate(GROUPS) == []
    small_window.shoot(f"blueprint_{title}")
    small_window.page.evaluate("app.canvas.openSubgraph(app.graph.nodes[0].subgraph, app.graph.nodes[0])")
    small_window.page.wait_for_function("app.canvas.subgraph")
    small_window.page.evaluate("app.extensionManager.command.execute('Comfy.Canvas.FitView')")
    small_window.page.wait_for_timeout(500)
    small_window.shoot(f"blueprint_inside_{title}")


def test_a_blueprint_runs_and_can_be_edited(small_window):
    small_window.insert_blueprint("PixArt text to image")
    small_window.page.evaluate(SET, SMALL)
    small_window.page.evaluate(SAVE)
    end, report = small_window.run()
    assert end == "execution_success", report
    small_window.page.wait_for_function(HAS_PICTURE)
    small_window.page.evaluate("app.canvas.openSubgraph(app.graph.nodes[0].subgraph, app.graph.nodes[0])")
    small_window.page.evaluate(CHANGE_INSIDE)
    small_window.page.evaluate("app.canvas.setGraph(app.graph)")
    sent = {node["class_type"]: node["inputs"] for node in small_window.export()["output"].values()}
    assert sent["KSampler"]["sampler_name"] == "euler" and sent["KSampler"]["steps"] == 2
    assert sent["EmptyLatentImage"].items() >= {"width": 64, "height": 64}.items()
    end, report = small_window.run()
    assert end == "execution_success", report


@pytest.mark.parametrize("name", APPS)
def test_an_app_opens_as_a_page(small_window, name):
    small_window.open_template(name)
    page = small_window.page.get_by_test_id("linear-widgets")
    workflow = json.loads((ROOT / "workflows" / f"{TITLES[name]}.json").read_text(encoding="utf-8"))
    nodes = {node["id"]: node for node in workflow["nodes"]}
    labels = [
        next(each["label"] for each in nodes[number]["inputs"] if each["name"] == widget)
        for number, widget in workflow["extra"]["linearData"]["inputs"]
    ]
    for label in labels:
        page.get_by_text(label, exact=True).first.wait_for()
    assert page.get_by_test_id("app-mode-widget-item").count() == len(labels)
    small_window.shoot(f"app_{name}")


def test_who_types_into_the_app_and_runs_it_sees_a_picture(small_window):
    small_window.open_template("demo_app")
    page = small_window.page
    small_window.fill({str(small_window.number_of("KSampler")): {"inputs": {"steps": 4}}})
    page.get_by_test_id("linear-widgets").locator("textarea").first.fill("a large red circle in the center")
    page.evaluate("() => { window.ends = []; }")
    page.get_by_test_id("linear-run-button").get_by_role("button", name="Run").click()
    page.wait_for_function("window.ends.length > 0")
    assert page.evaluate("window.ends[0]")[0] == "execution_success"
    page.wait_for_function(SHOWN_IN_APP)
    small_window.shoot("app_ran")
    sent = small_window.export()["output"]
    assert "a large red circle in the center" in [node["inputs"].get("text") for node in sent.values()]
