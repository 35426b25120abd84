"""Data sets: where pictures and captions lie, what is encoded of them, and in which order they are drawn."""
