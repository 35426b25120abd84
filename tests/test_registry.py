"""What ComfyUI's registry asks of a pack."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

tomllib = pytest.importorskip("tomllib", reason="needs Python 3.11 to read pyproject.toml")

ROOT = Path(__file__).parent.parent
SEMANTIC = re.compile(r"\d+\.\d+\.\d+")
BANNED = re.compile(r"(?<![\w.])(eval|exec)\(|subprocess.*\bpip\b|os\.system\(")
ADDRESS = re.compile(r"https://(?!example\.|.*/(username|repository)\b)[^/]+\.[a-z]+/\S+")
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


def test_addresses_are_real_ones_if_there_are_any(settings):
    """A publisher adds them; a made-up one would lead users elsewhere."""
    addresses = [*settings["project"].get("urls", {}).values()]
    addresses += [settings["tool"]["comfy"][name] for name in ("Icon", "Banner") if name in settings["tool"]["comfy"]]
    assert all(ADDRESS.match(address) for address in addresses)


def test_what_the_registry_scans_for():
    rules = "S102,S307,E702"  # exec, eval, statements behind a semicolon: those of comfy-cli 1.23
    command = [sys.executable, "-m", "ruff", "check", ".", "--no-cache", "--quiet", "--select", rules]
    scan = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert scan.returncode == 0, scan.stdout + scan.stderr


@pytest.mark.slow
def test_the_registrys_own_validation(tmp_path):
    pytest.importorskip("comfy_cli", reason="needs comfy-cli: pip install comfy-cli")
    home = {name: str(tmp_path) for name in ("HOME", "USERPROFILE", "XDG_CONFIG_HOME", "APPDATA", "LOCALAPPDATA")}
    command = [sys.executable, "-m", "comfy_cli", "--skip-prompt", "--no-enable-telemetry", "node", "validate"]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | home, capture_output=True, text=True, timeout=300, check=False
    )
    said = done.stdout + done.stderr
    assert done.returncode == 0 and "All validation checks passed" in said, said
    assert "warning" not in said.lower()


def test_nothing_that_the_registry_bans():
    shipped = [path for folder in ("nodes", "pixart", "samplers") for path in (ROOT / folder).rglob("*.py")]
    for path in [ROOT / "__init__.py", *shipped]:
        assert not BANNED.search(path.read_text(encoding="utf-8")), path


def test_icon_and_banner():
    icon, banner = Image.open(ROOT / "docs" / "icon.png"), Image.open(ROOT / "docs" / "banner.png")
    assert icon.width == icon.height and icon.width <= min(ICON_PX)
    assert banner.width / banner.height == pytest.approx(BANNER_RATIO, abs=0.01)
