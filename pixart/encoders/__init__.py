"""The networks beside the transformer: T5, autoencoders, the captioner, edge detectors."""
