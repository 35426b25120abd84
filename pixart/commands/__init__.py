"""What `python -m pixart <command>` runs: one module a command, and what they share."""
