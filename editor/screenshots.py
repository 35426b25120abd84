"""Pictures of all workflows, apps and blueprints as the editor shows them, in both renderers, to be looked at.

Run by `python dev.py run -m pixart_pack.editor.screenshots FOLDER`. It needs Playwright, and a Chromium that
PIXART_BROWSER names or that is installed.
"""

import argparse
import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from ..devtools.process import ROOT, stop_on_signals
from .connection import connect

WINDOW = {"width": 1440, "height": 900}
RENDERERS = {"classic": False, "nodes_2": True}
READY = (
    "window.app?.graph && app.extensionManager?.workflow?.activeWorkflow"
    " && window.LiteGraph?.registered_node_types.PixArtLoadCheckpoint && !document.querySelector('.p-progressspinner')"
)
LEAVE = "app.canvas.setGraph(app.rootGraph ?? app.graph)"
LOAD = """async ([workflow, name]) => {
    app.graph.clear();
    await app.loadGraphData(workflow, true, true, name, {openSource: 'template'});
    for (const button of document.querySelectorAll('[data-testid=error-overlay-dismiss]')) button.click();
}"""
ENTER = """() => {
    const node = (app.rootGraph ?? app.graph).nodes.find(node => node.subgraph);
    app.canvas.openSubgraph(node.subgraph, node);
    app.extensionManager.command.execute('Comfy.Canvas.FitView');
}"""
SET_RENDERER = "isNew => app.extensionManager.setting.set('Comfy.VueNodes.Enabled', isNew)"
TIMEOUT_MS = 120_000
SETTLED_MS = 1200  # until a graph is drawn, and the view has moved to it


def shoot(page, folder: Path, paths: list[Path]) -> Iterator[Path]:
    """Open each file in the renderer that is chosen, and inside where it is a blueprint; yields the pictures' paths."""
    for path in paths:
        page.evaluate(LOAD, [json.loads(path.read_text(encoding="utf-8")), path.stem])
        is_blueprint = path.parent.name == "subgraphs"
        for name in (path.stem, f"{path.stem}, inside")[: 1 + is_blueprint]:
            if name != path.stem:
                page.evaluate(ENTER)
            page.wait_for_timeout(SETTLED_MS)
            page.screenshot(path=folder / f"{name}.png")
            yield folder / f"{name}.png"
        if is_blueprint:
            page.evaluate(LEAVE)
            page.wait_for_timeout(SETTLED_MS)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where the pictures go")
    parser.add_argument("words", nargs="*", help="only files that have one of these in their names")
    parser.add_argument("--url", help="a running server to ask, in place of one of its own")
    options = parser.parse_intermixed_args(arguments)
    from playwright.sync_api import sync_playwright  # only here, so that nothing else needs it

    stop_on_signals()
    paths = [*sorted((ROOT / "workflows").glob("*.json")), *sorted((ROOT / "subgraphs").glob("*.json"))]
    paths = [path for path in paths if not options.words or any(word in path.stem for word in options.words)]
    chosen = os.environ.get("PIXART_BROWSER") or shutil.which("chromium")
    with connect(options.url) as client, sync_playwright() as running:
        browser = running.chromium.launch(executable_path=chosen, args=["--no-sandbox"])
        page = browser.new_page(viewport=WINDOW)
        page.set_default_timeout(TIMEOUT_MS)
        client.post("/settings", {"Comfy.TutorialCompleted": True})
        page.goto(client.url)
        page.wait_for_function(READY)
        for renderer, is_new in RENDERERS.items():
            (options.folder / renderer).mkdir(parents=True, exist_ok=True)
            page.evaluate(SET_RENDERER, is_new)
            for picture in shoot(page, options.folder / renderer, paths):
                sys.stdout.write(f"{picture}\n")
        page.evaluate(SET_RENDERER, False)
        browser.close()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
