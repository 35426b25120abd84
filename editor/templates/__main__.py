"""Write `workflows/` and `subgraphs/`: each workflow for the editor and for the API, its picture, and the blueprints.

A server of its own shows what the nodes look like. With --thumbnails each workflow runs on it with the demo model.
"""

import argparse
import json
import sys
from pathlib import Path

from ...demo.client import ComfyClient
from ...devtools.process import ROOT, stop_on_signals
from ..connection import connect
from ..format.api import to_api
from ..format.graph import Workflow
from ..format.subgraph import to_blueprint
from .blueprints import BLUEPRINTS
from .collection import TITLES, WORKFLOWS
from .rehearsal import NEEDS, prepare
from .thumbnails import write_thumbnail

WORKFLOWS_FOLDER, BLUEPRINTS_FOLDER = ROOT / "workflows", ROOT / "subgraphs"


def write_json(path: Path, content: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def make(name: str, object_info: dict) -> dict:
    """A workflow of the collection, as the editor has it."""
    workflow = Workflow(name, object_info)
    WORKFLOWS[name](workflow)
    return workflow.to_editor()


def make_blueprints(object_info: dict) -> dict[str, dict]:
    """The blueprints by their titles, as files of `subgraphs/`."""
    insides = [make(Workflow("blueprints", object_info)) for make in BLUEPRINTS]
    return {inside.title: to_blueprint(inside) for inside in insides}


def write_all(client: ComfyClient, names: list[str], thumbnails: bool) -> None:
    object_info = client.get_json("/object_info")
    prepare(client)
    for name in names:
        workflow = make(name, object_info)
        api = to_api(workflow, object_info)
        write_json(WORKFLOWS_FOLDER / f"{TITLES[name]}.json", workflow)
        write_json(WORKFLOWS_FOLDER / "api" / f"{name}.json", api)
        if thumbnails:
            first = WORKFLOWS_FOLDER / "api" / f"{NEEDS[name]}.json" if name in NEEDS else None
            write_thumbnail(client, name, api, first, WORKFLOWS_FOLDER / f"{TITLES[name]}.jpg")
        sys.stdout.write(f"{name}\n")
    for title, blueprint in make_blueprints(object_info).items():
        write_json(BLUEPRINTS_FOLDER / f"{title}.json", blueprint)


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", default=list(WORKFLOWS), metavar="NAME", help="default: all")
    parser.add_argument("--thumbnails", action="store_true", help="run each with the demo model, for its picture")
    parser.add_argument("--url", help="a running server to ask, in place of one of its own")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    stop_on_signals()
    with connect(options.url) as client:
        write_all(client, options.names, options.thumbnails)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
