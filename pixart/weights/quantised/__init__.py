"""Weights that another program quantised: which form they have, and what they are as plain numbers."""
