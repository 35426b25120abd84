"""How good pictures are: distances, similarities, and the benchmarks of text-to-image models."""
