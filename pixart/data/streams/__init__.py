"""Encoded pictures as tar files in WebDataset's form, read from a folder or over a network while training."""
