"""The documentation: a short front, no dead link, no command that does not exist, no node or workflow left out."""

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pixart_pack.devtools import commands
from pixart_pack.editor import reference
from pixart_pack.pixart.__main__ import COMMANDS
from pixart_pack.samplers.presets import PRESETS

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("demo/*.md"), *ROOT.glob("web/docs/**/*.md")])
LONGEST_README = 150
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
FENCE = re.compile(r"```.*?```", re.DOTALL)
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]*")
PIXART = re.compile(r"(?:python -m|-m) pixart ([a-z]+)([^\n`]*)")
DEV = re.compile(r"python dev\.py ([a-z]+)([^\n`]*)")
OLD = re.compile(r"python -m pixart\.|pixart\.training (run|caption|encode)|-m pixart\.training|styles/user\.json")
OWN = "|".join(map(re.escape, ("pixart", "samplers", "nodes", "tests", "demo", "editor", "benchmarks", "web", "docs")))
FILE = re.compile(rf"`((?:{OWN})/[\w./-]+\.(?:py|md|json|txt|svg|otf))`")


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def anchors(path: Path) -> set[str]:
    """The anchors that a page's headings get on GitHub and on the site."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", read(path)), re.MULTILINE)
    plain = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
    return {heading.strip().replace(" ", "-") for heading in plain}


def names(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_the_readme_is_a_front_door():
    assert len(read(ROOT / "README.md").splitlines()) <= LONGEST_README


@pytest.mark.parametrize("path", PAGES, ids=names)
def test_no_link_is_dead(path):
    dead = []
    for target in LINK.findall(FENCE.sub("", read(path))):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        # The host serves the pages in another language from one folder above.
        folder = path.parent.parent if path.parent.parent == ROOT / "web" / "docs" else path.parent
        place = (folder / name).resolve() if name else path
        if not place.exists() or (anchor and place.suffix == ".md" and anchor not in anchors(place)):
            dead.append(target)
    assert not dead


@pytest.mark.parametrize("path", PAGES, ids=names)
def test_commands_and_files_exist(path):
    text = read(path)
    assert not OLD.search(text)
    assert {name for name, _ in PIXART.findall(text)} <= {*COMMANDS}
    for name, rest in DEV.findall(text):
        first = rest.split()[0] if rest.startswith(" ") and rest.split() else ""
        own = [first] if first.startswith("--") and name not in commands.PASSING_ON else []
        assert callable(getattr(commands, name, None)), f"dev.py {name} {own}"
    lost = [name for name in FILE.findall(text) if not (ROOT / name).exists() and "models/" not in name]
    assert not lost


@pytest.mark.parametrize("path", [path for path in PAGES if PIXART.search(read(path))], ids=names)
def test_options_of_commands_exist(path):
    joined = read(path).replace("\\\n", " ")
    for name, rest in PIXART.findall(joined):
        parser = importlib.import_module(f"pixart_pack.pixart.commands.{name}").parse()
        assert set(OPTION.findall(rest)) <= set(parser._option_string_actions), (name, rest)


@pytest.mark.parametrize("path", [path for path in PAGES if DEV.search(read(path))], ids=names)
def test_options_of_dev_exist(path, capsys):
    for name, rest in DEV.findall(read(path)):
        if name != "test" and name in commands.PASSING_ON:
            continue  # they belong to another program
        with pytest.raises(SystemExit):
            commands.make_parser().parse_args([name, "--help"])
        assert set(OPTION.findall(rest)) <= set(OPTION.findall(capsys.readouterr().out)), (name, rest)


def test_the_table_of_presets_is_what_the_samplers_have():
    page = read(ROOT / "docs" / "sampling.md")
    row = re.compile(r"^\| `([^`]+)`[^|]*\| `pixart_(\w+)` \| `pixart_(\w+)` \| (\d+) \| ([\d.]+) \|$", re.MULTILINE)
    shown = [(name, sampler, schedule, int(n), float(cfg)) for name, sampler, schedule, n, cfg in row.findall(page)]
    assert shown == [(name, each.sampler, each.schedule, each.steps, each.guidance) for name, each in PRESETS.items()]


def test_the_replaced_nodes_of_other_packs_are_listed():
    text = read(ROOT / "nodes" / "migration.py")
    others = re.findall(r'Replacement\(\s*"(\w+)"', text)
    page = read(ROOT / "docs" / "from-other-tools.md")
    assert others and [name for name in others if f"`{name}`" not in page] == []


def test_the_tables_of_nodes_and_workflows_are_what_the_pack_has():
    # Mend with: python dev.py run -m pixart_pack.editor.reference
    assert read(reference.NODES_PAGE) == reference.nodes_page()
    assert read(reference.CORE_PAGE) == reference.core_page()


def test_the_managers_list_of_nodes_is_what_the_pack_has():
    """ComfyUI-Manager takes its names for the ids of the pack's nodes, and offers the pack where one is missing."""
    assert read(reference.NODE_LIST) == reference.node_list()
    assert all(name.startswith("PixArt") for name in json.loads(reference.node_list()))


def test_the_picture_of_the_rooms_is_what_the_import_test_reads():
    # Mend with: python dev.py run -m pixart_pack.editor.reference
    assert read(reference.PICTURE) == reference.architecture_picture()


def test_every_page_is_in_the_navigation():
    navigation = read(ROOT / "mkdocs.yml")
    assert [path.name for path in ROOT.glob("docs/*.md") if f" {path.name}\n" not in navigation] == []


@pytest.mark.slow
def test_the_site_is_built_without_a_warning(tmp_path):
    pytest.importorskip("mkdocs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    variables = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    pages = {path.parent.name for path in (tmp_path / "site").glob("*/index.html")}
    assert {path.stem for path in (ROOT / "docs").glob("*.md")} - {"index"} <= pages
