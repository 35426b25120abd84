"""A graph made for ComfyUI_ExtraModels' PixArt nodes, opened in the editor, gets ours in their place."""

import pytest

from pixart_pack.tests.browser.editor import in_both

pytestmark = pytest.mark.slow

CAPTION = "a large red circle in the center on a white background"
# By number: type, inputs (name, type, link; None: no widget), outputs (type, links), widgets' values.
NODES = {
    1: ("PixArtCheckpointLoader", (), (("MODEL", [1]),), ("pixart_demo.safetensors", "PixArt_XL_2")),
    2: ("T5v11Loader", (), (("T5", [2, 3]),), ("pixart_demo_t5.safetensors", "xxl", "file", "cpu", "default")),
    3: ("PixArtT5TextEncode", (("T5", "T5", 2),), (("CONDITIONING", [4]),), (CAPTION,)),
    4: ("T5TextEncode", (("T5", "T5", 3),), (("CONDITIONING", [5]),), ("",)),
    5: ("PixArtResolutionSelect", (), (("INT", [6]), ("INT", [7])), ("PixArt_XL_2", "0.57")),
    6: ("PixArtResolutionCond", (("cond", "CONDITIONING", 4),), (("CONDITIONING", [8]),), (512, 512)),
    7: ("EmptyLatentImage", (("width", "INT", 6), ("height", "INT", 7)), (("LATENT", [9]),), (64, 64, 1)),
    8: (
        "PixArtDPMSampler",
        (
            ("model", "MODEL", 1),
            ("positive", "CONDITIONING", 8),
            ("negative", "CONDITIONING", 5),
            ("latent_image", "LATENT", 9),
        ),
        (("LATENT", [10]),),
        (3, "fixed", 2, 4.5, "linear", "discrete"),
    ),
    9: ("VAELoader", (), (("VAE", [11]),), ("pixart_demo_vae.safetensors",)),
    10: ("VAEDecode", (("samples", "LATENT", 10), ("vae", "VAE", 11)), (("IMAGE", [12]),), ()),
    11: ("SaveImage", (("images", "IMAGE", 12),), (), ("old",)),
    12: ("PixArtCheckpointLoaderSimple", (), (("MODEL", []),), ("pixart_demo.safetensors",)),
    13: ("PixArtLoraLoader", (("model", "MODEL", None),), (("MODEL", []),), ("none.safetensors", 1.0)),
}
MODES = {12: 2, 13: 4}  # muted, bypassed
WIDGETS = {"width", "height"}  # inputs that were widgets before they were linked
# A text box is the widget's own element, or in Nodes 2.0 one of the node's.
UNSEEN = """() => app.graph.nodes.filter(node => {
    const least = node.computeSize(), boxes = (node.widgets ?? []).filter(widget => widget.element);
    const drawn = document.querySelector(`[data-node-id="${node.id}"] textarea`);
    const elementOf = box => LiteGraph.vueNodesMode ? drawn : document.contains(box.element) && box.element;
    const isThere = box => elementOf(box) && elementOf(box).getBoundingClientRect().height > 0;
    return !boxes.every(isThere) || node.size[0] + 1 < least[0] || node.size[1] + 1 < least[1];
}).map(node => node.type)"""


def old_workflow() -> dict:
    """The graph as the editor saved it."""
    nodes, origins, links = [], {}, []
    for number, (kind, inputs, outputs, values) in NODES.items():
        saved = {"id": number, "type": kind, "pos": [350 * ((number - 1) // 3), 250 * ((number - 1) % 3)]}
        saved |= {
            "size": [300, 200],
            "flags": {},
            "order": number,
            "mode": MODES.get(number, 0),
            "widgets_values": list(values),
        }
        saved["properties"] = {"Node name for S&R": kind}
        saved["inputs"] = [
            {"name": name, "type": type_of, "link": link, **({"widget": {"name": name}} if name in WIDGETS else {})}
            for name, type_of, link in inputs
        ]
        saved["outputs"] = [{"name": type_of, "type": type_of, "links": leaving} for type_of, leaving in outputs]
        origins |= {link: (number, slot) for slot, (_, leaving) in enumerate(outputs) for link in leaving}
        nodes.append(saved)
    for number, (_, inputs, _, _) in NODES.items():
        links += [[link, *origins[link], number, slot, kind] for slot, (_, kind, link) in enumerate(inputs) if link]
    ends = {"last_node_id": max(NODES), "last_link_id": max(origins)}
    return {**ends, "nodes": nodes, "links": links, "groups": [], "config": {}, "extra": {}, "version": 0.4}


@in_both
def test_an_old_graph_is_replaced_and_makes_a_picture(editor):
    editor.load(old_workflow())
    assert len(editor.export()["unknown"]) == 9
    editor.close_dialogs()
    editor.page.evaluate("app.refreshComboInNodes()")  # as R does
    editor.load(old_workflow())
    assert len(editor.export()["unknown"]) == 9
    editor.page.get_by_role("button", name="View details").first.click()
    editor.page.get_by_role("button", name="Replace All").click()
    editor.page.wait_for_function("app.graph.nodes.every(node => LiteGraph.registered_node_types[node.type])")
    modes = [editor.page.evaluate("number => app.graph.getNodeById(number).mode", number) for number in MODES]
    assert modes == [2, 4]
    editor.page.evaluate("app.extensionManager.command.execute('Comfy.Canvas.FitView')")
    editor.page.wait_for_function(f"!({UNSEEN})().length")
    sent = editor.export()["output"]
    editor.shoot("migrated")
    linked = {
        (number, name): tuple(value)
        for number, node in sent.items()
        for name, value in node["inputs"].items()
        if isinstance(value, list)
    }
    assert linked == {
        ("3", "clip"): ("2", 0),
        ("4", "clip"): ("2", 0),
        ("6", "conditioning"): ("3", 0),
        ("7", "width"): ("5", 0),
        ("7", "height"): ("5", 1),
        ("8", "model"): ("1", 0),
        ("8", "positive"): ("6", 0),
        ("8", "negative"): ("4", 0),
        ("8", "latent_image"): ("7", 0),
        ("10", "samples"): ("8", 0),
        ("10", "vae"): ("9", 0),
        ("11", "images"): ("10", 0),
    }
    assert sent["1"]["inputs"]["checkpoint"] == "pixart_demo.safetensors"
    assert sent["3"]["inputs"]["text"] == CAPTION
    assert sent["5"]["inputs"].items() >= {"base": "PixArt_XL_2", "mode": "by ratio", "ratio": "0.57"}.items()
    assert sent["6"]["inputs"].items() >= {"width": 512, "height": 512}.items()
    assert sent["8"]["inputs"].items() >= {"seed": 3, "steps": 2, "sampler_name": "pixart_dpm_solver"}.items()
    end, report = editor.run()
    assert end == "execution_success", report
    editor.wait_for_picture("SaveImage")
    editor.shoot("migrated_picture")
