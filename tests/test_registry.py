"""What ComfyUI's registry asks of a pack."""

import re
from pathlib import Path

import pytest
from PIL import Image

tomllib = pytest.importorskip("tomllib", reason="needs Python 3.11 to read pyproject.toml")

ROOT = Path(__file__).parent.parent
SEMANTIC = re.compile(r"\d+\.\d+\.\d+")
BANNED = re.compile(r"(?<![\w.])(eval|exec)\(|subprocess.*\bpip\b|os\.system\(")
ICON_PX, BANNER_RATIO = (800, 400), 21 / 9


@pytest.fixture(scope="module")
def settings():
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_name_version_and_licence(settings):
    project = settings["project"]
    assert re.fullmatch(r"[a-z][a-z0-9._-]{0,99}", project["name"]) and "comfyui" not in project["name"]
    assert SEMANTIC.fullmatch(project["version"])
    assert (ROOT / project["license"]["file"]).is_file() and (ROOT / project["readme"]).is_file()
    assert project["description"]


def test_publisher_and_host(settings):
    comfy = settings["tool"]["comfy"]
    assert comfy["PublisherId"] and comfy["DisplayName"]
    assert re.fullmatch(r">=\d+\.\d+\.\d+", comfy["requires-comfyui"])


def test_nothing_that_the_registry_bans():
    shipped = [path for folder in ("nodes", "pixart", "samplers") for path in (ROOT / folder).rglob("*.py")]
    for path in [ROOT / "__init__.py", *shipped]:
        assert not BANNED.search(path.read_text(encoding="utf-8")), path


def test_icon_and_banner():
    icon, banner = Image.open(ROOT / "docs" / "icon.png"), Image.open(ROOT / "docs" / "banner.png")
    assert icon.width == icon.height and icon.width <= min(ICON_PX)
    assert banner.width / banner.height == pytest.approx(BANNER_RATIO, abs=0.01)
