"""Make the repository importable as the package `pixart_pack`, as ComfyUI makes it importable under its folder's name.

The root's __init__.py is not executed here; tests/host does that when it loads the pack.
"""

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ALIAS = "pixart_pack"


def register_alias() -> None:
    """Put a package named `pixart_pack` over the repository root into sys.modules."""
    if ALIAS in sys.modules:
        return
    spec = importlib.util.spec_from_file_location(ALIAS, ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
    sys.modules[ALIAS] = importlib.util.module_from_spec(spec)


# With the root on sys.path (`python -m pytest` puts it there) `import nodes` would give this pack's, not ComfyUI's.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]
register_alias()
pytest_plugins = ["pixart_pack.tests.closing", "pytester"]
