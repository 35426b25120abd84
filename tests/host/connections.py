"""Watches where a ComfyUI server connects to: a custom node of its own, which listens to Python's audit events."""

import shutil
from pathlib import Path

NAME = "connection_watch"
_LOG = "connections.log"


def install(base: Path) -> str:
    """Put the watch into a base directory; returns the custom node's name, which the server must allow."""
    folder = base / "custom_nodes" / NAME
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "__init__.py").write_text("NODE_CLASS_MAPPINGS = {}\n", encoding="utf-8")
    shutil.copy(Path(__file__).with_name("audit_hook.py"), folder / "prestartup_script.py")
    return NAME


def outside(base: Path) -> list[str]:
    """Every connection and look-up that a server of this base directory tried, but those to its own machine.

    Raises FileNotFoundError when the watch never began.
    """
    return (base / "custom_nodes" / NAME / _LOG).read_text(encoding="utf-8").splitlines()
