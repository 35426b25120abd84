"""The workflows as they open: what is seen of them, in both renderers; the blueprints and the apps, in use."""

import json
from pathlib import Path

import pytest

from pixart_pack.editor.templates.collection import TITLES
from pixart_pack.editor.templates.files import DEMO_MODEL, DEMO_T5, DEMO_VAE
from pixart_pack.tests.browser.editor import GROUPS, NODES_2, in_both, shipped_workflow

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent.parent
LEAST_ZOOM = 0.6  # the classic renderer hides what nodes say at less than 0.57
SMALLEST_WINDOW = {"width": 1440, "height": 900}
APPS = [name for name in TITLES if name.endswith("_app")]
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
# In Nodes 2.0: fields that reach out of their node, or whose text does not fit its box.
OUTSIDE = """() => [...document.querySelectorAll('[data-node-id]')].flatMap(node => {
    const box = node.getBoundingClientRect();
    return [...node.querySelectorAll('.lg-node-widgets :is(input, textarea, button, img)')].filter(part => {
        const own = part.getBoundingClientRect();
        return own.height && (own.left < box.left - 1 || own.right > box.right + 1 || own.bottom > box.bottom + 1);
    }).map(part => [node.dataset.nodeId, part.className]);
})"""
SET = """values => { for (const widget of app.graph.nodes[0].widgets)
    if (widget.name in values) widget.value = values[widget.name]; }"""
SAVE = """() => {
    const save = LiteGraph.createNode('SaveImage');
    save.pos = [app.graph.nodes[0].pos[0] + 420, app.graph.nodes[0].pos[1]];
    app.graph.add(save);
    app.graph.nodes[0].connect(0, save, 0);
}"""
SHOWN_IN_APP = """() => [...document.querySelectorAll('[data-testid=linear-center-panel] img')].some(
    image => image.src.includes('/view?') && image.naturalWidth > 0)"""
ENCODER = "app.graph.nodes.find(node => node.type === 'PixArtTextEncode')"
SHOWN = f"""() => {{ const node = {ENCODER};
    return node.widgets.filter(widget => node.isWidgetVisible(widget)).map(widget => widget.name); }}"""
# By the words of its element: a text box stands without its name.
SHOWN_IN_NODES_2 = f"""() => {{ const node = {ENCODER};
    const element = document.querySelector(`[data-node-id="${{node.id}}"]`), words = element.innerText.split(/\\n+/);
    return [...words, ...(element.querySelector('textarea') ? ['text'] : [])]; }}"""
UNFOLD = f"""() => {{ const node = {ENCODER};
    if (node.toggleAdvanced) node.toggleAdvanced(); else node.showAdvanced = true; }}"""
CHANGE_INSIDE = """() => { app.canvas.subgraph.nodes.find(node => node.type === 'KSampler')
    .widgets.find(widget => widget.name === 'sampler_name').value = 'euler'; }"""
SMALL = {"checkpoint": DEMO_MODEL, "vae": DEMO_VAE, "text_encoder": DEMO_T5, "width": 64, "height": 64, "steps": 2}


@pytest.fixture
def small_window(editor):
    before = editor.page.viewport_size
    editor.page.set_viewport_size(SMALLEST_WINDOW)
    yield editor
    editor.page.set_viewport_size(before)


def check_whole(editor, name: str, renderer: str) -> None:
    """What opened is what the files say, for the editor and for the API."""
    shipped, opened = shipped_workflow(name), editor.export()
    assert opened["unknown"] == []
    twin = json.loads((ROOT / "workflows" / "api" / f"{name}.json").read_text(encoding="utf-8"))
    for node in (*twin.values(), *opened["output"].values()):
        del node["_meta"]  # the titles of ComfyUI's own nodes, which change with its version
    assert opened["output"] == twin
    saved = {node["id"]: node for node in opened["workflow"]["nodes"]}
    measured = () if renderer == NODES_2 else ("size",)  # Nodes 2.0 measures its elements
    for node in shipped["nodes"]:
        for field in ("type", "pos", "title", "color", "properties", *measured):
            assert saved[node["id"]].get(field) == node.get(field), (node["type"], field)
        assert (saved[node["id"]].get("widgets_values") or []) == node["widgets_values"]
    assert opened["workflow"]["links"] == shipped["links"]
    for node in opened["asked"]:  # a node that asks for more room would grow over the next one
        assert node["needs"][0] <= node["has"][0] + 1 and node["needs"][1] <= node["has"][1] + 1, node


@in_both
@pytest.mark.parametrize("name", [name for name in TITLES if name not in APPS])
def test_a_template_opens_whole_and_can_be_read(small_window, name, renderer):
    small_window.open_template(name)
    small_window.page.wait_for_function("least => app.canvas.ds.scale >= least", arg=LEAST_ZOOM, timeout=5000)
    small_window.wait_for_rest()
    small_window.shoot(f"template_{name}_{renderer}")
    check_whole(small_window, name, renderer)
    small_window.check_places()
    assert small_window.page.evaluate(HIDDEN_WIRES) == []
    if renderer == NODES_2:
        assert small_window.page.evaluate(OUTSIDE) == []


@in_both
def test_advanced_inputs_are_folded_until_asked_for(small_window, renderer):
    shown = SHOWN_IN_NODES_2 if renderer == NODES_2 else SHOWN
    small_window.open_template("demo")
    small_window.wait_for_rest()
    folded = small_window.page.evaluate(shown)
    assert "text" in folded and "clean_caption" in folded and "aspect_ratio" not in folded
    small_window.page.evaluate(UNFOLD)
    small_window.wait_for_rest()
    assert "aspect_ratio" in small_window.page.evaluate(shown)
    small_window.open_template("batch_of_prompts")
    small_window.wait_for_rest()
    assert "batch_lines" in small_window.page.evaluate(shown)  # set, so it is seen


@in_both
@pytest.mark.parametrize("title", sorted(path.stem for path in (ROOT / "subgraphs").glob("*.json")))
def test_a_blueprint_is_found_and_inserted(small_window, title, renderer):
    small_window.insert_blueprint(title)
    exported = small_window.export()
    shipped = json.loads((ROOT / "subgraphs" / f"{title}.json").read_text(encoding="utf-8"))
    values = small_window.page.evaluate("app.graph.nodes[0].widgets.map(widget => widget.value)")
    assert values == shipped["nodes"][0]["widgets_values"]
    assert exported["unknown"] == []
    assert len(exported["output"]) == len(shipped["definitions"]["subgraphs"][0]["nodes"])
    assert small_window.page.evaluate(GROUPS) == []
    small_window.wait_for_rest()
    small_window.shoot(f"blueprint_{title}_{renderer}")
    small_window.page.evaluate("app.canvas.openSubgraph(app.graph.nodes[0].subgraph, app.graph.nodes[0])")
    small_window.page.wait_for_function("app.canvas.subgraph")
    small_window.page.evaluate("app.extensionManager.command.execute('Comfy.Canvas.FitView')")
    small_window.wait_for_rest()
    small_window.shoot(f"blueprint_inside_{title}_{renderer}")


@in_both
def test_a_blueprint_runs_and_can_be_edited(small_window):
    small_window.insert_blueprint("PixArt text to image")
    small_window.page.evaluate(SET, SMALL)
    small_window.page.evaluate(SAVE)
    end, report = small_window.run()
    assert end == "execution_success", report
    small_window.wait_for_picture("SaveImage")
    small_window.page.evaluate("app.canvas.openSubgraph(app.graph.nodes[0].subgraph, app.graph.nodes[0])")
    small_window.page.evaluate(CHANGE_INSIDE)
    small_window.page.evaluate("app.canvas.setGraph(app.graph)")
    sent = {node["class_type"]: node["inputs"] for node in small_window.export()["output"].values()}
    assert sent["KSampler"]["sampler_name"] == "euler" and sent["KSampler"]["steps"] == 2
    assert sent["EmptyLatentImage"].items() >= {"width": 64, "height": 64}.items()
    end, report = small_window.run()
    assert end == "execution_success", report


@pytest.mark.parametrize("name", APPS)
def test_an_app_opens_as_a_page(small_window, name, renderer):
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
    check_whole(small_window, name, renderer)


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
