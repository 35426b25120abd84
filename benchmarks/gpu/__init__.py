"""Everything that is to be known of a GPU, by one command: `python dev.py gpu`."""
