"""Training PixArt: the data, the objectives and the loop, inside a graph or on many processes."""
