"""The documentation: a short front, no dead link, no command that does not exist, no node or workflow left out."""

import re
from pathlib import Path

import pytest

from pixart_pack.devtools import commands
from pixart_pack.editor import reference
from pixart_pack.pixart.__main__ import COMMANDS

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("demo/*.md"), *ROOT.glob("web/docs/**/*.md")])
LONGEST_README = 150
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
FENCE = re.compile(r"```.*?```", re.DOTALL)
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
        folder = path.parent.parent if path.parent.parent.name == "docs" else path.parent
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


def test_the_tables_of_nodes_and_workflows_are_what_the_pack_has():
    # Mend with: python dev.py run -m pixart_pack.editor.reference
    assert read(reference.NODES_PAGE) == reference.nodes_page()


def test_the_picture_of_the_rooms_is_what_the_import_test_reads():
    # Mend with: python dev.py run -m pixart_pack.editor.reference
    assert read(reference.PICTURE) == reference.architecture_picture()


def test_every_page_is_in_the_navigation():
    navigation = read(ROOT / "mkdocs.yml")
    assert [path.name for path in ROOT.glob("docs/*.md") if f"- {path.name}" not in navigation] == []
