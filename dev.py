"""One command for everything: python dev.py demo | test | serve | bench | docs | lint | audit | run. Each has a --help.

Needs Python 3.10 or newer and its standard library; all else it installs into an environment of its own.
"""

import sys

if sys.version_info < (3, 10):  # noqa: UP036  an older Python can run this file, and is told so
    sys.exit("error: Python is too old: got " + sys.version.split()[0] + ", expected 3.10 or newer")

if __name__ == "__main__":
    from devtools.commands import main

    sys.exit(main(sys.argv[1:]))
