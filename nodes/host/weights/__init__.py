"""Weights in the host's memory in forms of their own."""
