"""`python -m benchmarks NAME [ARGUMENTS]` runs one benchmark; without a name it lists them."""

import importlib
import logging
import pkgutil
import sys
from pathlib import Path

TOOLS = frozenset(
    [
        "__main__",
        "cases",
        "count_training",
        "counting",
        "gpu",
        "host",
        "mixture",
        "peaks",
        "peers",
        "plain",
        "report",
        "timing",
    ]
)


def main(arguments: list[str]) -> int:
    """Run the named benchmark's main(arguments)."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    names = sorted(module.name for module in pkgutil.iter_modules([str(Path(__file__).parent)]))
    benchmarks = [name for name in names if name not in TOOLS]
    if not arguments or arguments[0] not in benchmarks:
        logging.error("Unknown benchmark: got %s, expected one of %s.", arguments[:1] or "none", ", ".join(benchmarks))
        return 2
    importlib.import_module(f".{arguments[0]}", __package__).main(arguments[1:])
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
