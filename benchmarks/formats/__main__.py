"""`python dev.py run -m pixart_pack.benchmarks.formats`."""

import logging

from . import main

if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    main()
