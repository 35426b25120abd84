"""Data sets and trainings in the host."""
